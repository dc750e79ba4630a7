"""`Generation`: input lines to output records, in input order, by way of the workers."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from kvlink.errors import InvalidArgument, Unsupported
from kvlink.serving.checkpoint import eos_ids, load_tokenizer, weight_files
from kvlink.serving.config import ModelConfig
from kvlink.serving.options import Options
from kvlink.serving.report import make_report, tpot_s, ttft_s
from kvlink.serving.request import Defaults, Request, Result, parse_line
from kvlink.serving.router import Router

Record = dict[str, Any]
_NEEDED = ("torch", "safetensors", "tokenizers")


class Generation:
    """Checks the model directory and every line on construction; `run` serves.

    Attributes: `options` with the pools sized, `requests`, `num_errors` (bad lines, failed
    requests), `report` (after `run`; plain values). Raises InvalidArgument and Unsupported when the
    model cannot be served at all; a bad line becomes an error record instead.
    """

    def __init__(self, lines: Sequence[bytes], options: Options, defaults: Defaults) -> None:
        for name in _NEEDED:
            if importlib.util.find_spec(name) is None:
                raise Unsupported(f"generate needs {name}: pip install 'kvlink[serving]'")
        model_dir = Path(options.model_dir)
        if not model_dir.is_dir():
            raise InvalidArgument(f"model: {model_dir}: no such directory")
        self.config = ModelConfig.from_dir(model_dir)
        weight_files(model_dir)
        eos_ids(model_dir)
        self.tokenizer = load_tokenizer(model_dir)
        self.num_lines = len(lines)
        self.requests: list[Request] = []
        self.report: Record = {}
        self._records: dict[int, Record] = {}
        for index, line in enumerate(lines):
            try:
                self.requests.append(parse_line(line, index, defaults, self.config, self.tokenizer))
            except InvalidArgument as error:
                self._records[index] = {"index": index, "error": str(error)}
        num_tokens = [(len(r.prompt), r.num_kv_tokens) for r in self.requests]
        self.options = options.sized(self.config, num_tokens)
        self.requests = [request for request in self.requests if self._fits(request)]

    @property
    def num_errors(self) -> int:
        """Lines that got an error record so far."""
        return sum("error" in record for record in self._records.values())

    def run(self, on_progress: Callable[[int, int], None] | None = None) -> Generator[Record]:
        """Yields one record per line, in order, as early as order allows.

        `on_progress(requests ended, tokens generated)` is called as requests end. Raises
        WorkerFailed; the workers are gone when this returns or raises.
        """
        written = 0
        results: list[Result] = []
        path, started_at = ("", ""), 0.0
        stats: dict[str, Counter[str]] = {}
        if self.requests:
            with Router(self.options) as router:
                router.connect()
                for result in router.generate(self.requests):
                    self._records[result.index] = self._record(result, router.started_at)
                    if result.error is None:
                        results.append(result)
                    if on_progress is not None:
                        on_progress(1, router.num_generated)
                    while written in self._records:
                        yield self._records[written]
                        written += 1
                router.stop()
                path = (router.path, router.path_detail)
                started_at, stats = router.started_at, router.stats
        for index in range(written, self.num_lines):
            yield self._records[index]
        self.report = make_report(results, self.num_errors, started_at, path, stats)

    def _fits(self, request: Request) -> bool:
        for name, side, num_tokens in (
            ("prefill", self.options.prefill, len(request.prompt)),
            ("decode", self.options.decode, request.num_kv_tokens),
        ):
            needed = side.pages_for(num_tokens)
            if needed > side.num_pages:
                self._records[request.index] = {
                    "index": request.index,
                    "error": f"too long: {num_tokens} tokens take {needed} pages of {name}; it has "
                    f"{side.num_pages}",
                }
                return False
        return True

    def _record(self, result: Result, started_at: float) -> Record:
        if result.error is not None:
            return {"index": result.index, "error": result.error}
        text = None if self.tokenizer is None else self.tokenizer.decode(result.token_ids)
        return {
            "index": result.index,
            "token_ids": result.token_ids,
            "text": text,
            "finish_reason": result.finish_reason,
            "ttft_s": ttft_s(result, started_at),
            "tpot_s": tpot_s(result),
        }
