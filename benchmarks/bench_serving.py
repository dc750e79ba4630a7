"""The reference serving loop end to end, beside transformers in one process.

    python benchmarks/bench_serving.py [--case NAME ...] [--json]

mixed    16 prompts of 32 to 1024 tokens, 48 new tokens each
shared   16 prompts of 1024 tokens in common and 32 of their own, 48 new tokens each
long     2 prompts of 8192 tokens, 48 new tokens each

All requests are there from the start, greedy, of one random Llama model (63 million parameters,
float32) that is written to a temporary directory. TTFT is the time from the start to a request's
first token, TPOT that per token after it; medians over requests. kvlink serves with its two
processes, which share the machine's CPUs; with prefix caching, and without where prompts have
something in common. transformers generates in one process with all threads: one request after the
other, and all of them as one batch padded on the left. Loading is not counted.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import harness
import torch
import transformers
from harness import Figure

from kvlink import _C
from kvlink.serving.generate import Generation
from kvlink.serving.options import Options, SideOptions, side_threads
from kvlink.serving.request import Defaults

VOCAB_SIZE = 8192
NUM_NEW = 48


@dataclass
class Outcome:
    """`tokens` of each request, and when they came: seconds from the start."""

    tokens: list[list[int]]
    ttft: list[float]
    tpot: list[float]
    seconds: float


def prompts(case: str) -> list[list[int]]:
    """Token ids, the same each time."""
    draw = random.Random(7)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(VOCAB_SIZE) for _ in range(count)]

    if case == "mixed":
        return [tokens(draw.choice((32, 64, 128, 256, 512, 1024))) for _ in range(16)]
    if case == "shared":
        common = tokens(1024)
        return [common + tokens(32) for _ in range(16)]
    return [tokens(8192) for _ in range(2)]


def write_model(path: Path) -> None:
    """A Llama checkpoint whose random weights keep activations of ordinary size."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=768, intermediate_size=2048, num_hidden_layers=8,
        num_attention_heads=12, num_key_value_heads=4, max_position_embeddings=16384,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0.0, 1.3 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(path)


def kvlink_run(path: Path, asked: Sequence[list[int]], shares: bool = True) -> Outcome:
    """By a prefill and a decode process; prompts share pages if `shares`."""
    threads = side_threads(_C.num_threads())
    sides = [SideOptions(num_threads=count) for count in threads]
    options = Options(
        str(path),
        "float32",
        prefill=sides[0],
        decode=sides[1],
        ignore_eos=True,
        prefix_caching=shares,
    )
    lines = [json.dumps({"prompt_token_ids": prompt}).encode() for prompt in asked]
    generation = Generation(lines, options, Defaults(NUM_NEW, 0.0, 1.0, 0))
    records = list(generation.run())
    failed = [record["error"] for record in records if "error" in record]
    if failed:
        raise RuntimeError(f"a request failed: {failed[0]}")
    ends = [record["ttft_s"] + record["tpot_s"] * (NUM_NEW - 1) for record in records]
    return Outcome(
        [record["token_ids"] for record in records],
        [record["ttft_s"] for record in records],
        [record["tpot_s"] for record in records],
        max(ends),
    )


class Clock(transformers.StoppingCriteria):  # type: ignore[misc]
    """Notes when each token came; never stops."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def transformers_run(path: Path, asked: Sequence[list[int]], at_once: bool) -> Outcome:
    """In this process: `at_once` as one padded batch, else one after the other."""
    model = transformers.LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    outcome = Outcome([], [], [], 0.0)
    batches = [list(asked)] if at_once else [[prompt] for prompt in asked]
    begin = time.perf_counter()
    for batch in batches:
        longest = max(map(len, batch))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch])
        clock = Clock()
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=mask, do_sample=False, max_new_tokens=NUM_NEW, pad_token_id=0,
                stopping_criteria=transformers.StoppingCriteriaList([clock]),
            )  # fmt: skip
        first, last = clock.times[0], clock.times[-1]
        for row in out[:, longest:].tolist():
            outcome.tokens.append(row)
            outcome.ttft.append(first - begin)
            outcome.tpot.append((last - first) / (NUM_NEW - 1))
    outcome.seconds = time.perf_counter() - begin
    return outcome


NOT_SHARED = "kvlink, no prefix caching"
PEERS: dict[str, Callable[[Path, Sequence[list[int]]], Outcome]] = {
    "kvlink": kvlink_run,
    NOT_SHARED: lambda path, asked: kvlink_run(path, asked, shares=False),
    "transformers": lambda path, asked: transformers_run(path, asked, False),
    "transformers, batch": lambda path, asked: transformers_run(path, asked, True),
}


def figures(cases: Sequence[str], num_rounds: int) -> Iterator[Figure]:
    """Peers take turns; what is told is the median over rounds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        write_model(path)
        for case in cases:
            asked = prompts(case)
            names = [name for name in PEERS if name != NOT_SHARED or case == "shared"]
            found: dict[str, list[Outcome]] = {name: [] for name in names}
            for _ in range(num_rounds):
                for name in names:
                    found[name].append(PEERS[name](path, asked))
            expected = found["transformers"][0].tokens
            for name, outcomes in found.items():
                yield from rows(case, name, outcomes, expected)


def rows(
    case: str, peer: str, outcomes: Sequence[Outcome], expected: Sequence[list[int]]
) -> Iterator[Figure]:
    same = sum(ours == theirs for ours, theirs in zip(outcomes[0].tokens, expected, strict=True))
    seconds = statistics.median(outcome.seconds for outcome in outcomes)
    ttft = statistics.median(statistics.median(outcome.ttft) for outcome in outcomes)
    tpot = statistics.median(statistics.median(outcome.tpot) for outcome in outcomes)
    rate = len(expected) * NUM_NEW / seconds
    note = f"{rate:.1f} tokens/s; {same} of {len(expected)} continuations as one by one"
    plain = Figure("run", case, "cpu", "float32", 16, 0.0, 0, 0, "none", 0, peer)
    yield replace(plain, ms=round(seconds * 1e3, 1), note=note)
    yield replace(plain, op="ttft", ms=round(ttft * 1e3, 1))
    yield replace(plain, op="tpot", ms=round(tpot * 1e3, 2))


def more_arguments(parser: Any) -> None:
    parser.add_argument("--rounds", type=int, default=3, help="of each peer (default: 3)")


def main() -> int:
    """Runs the cases named on the command line."""
    cases = ["mixed", "shared", "long"]
    options = harness.arguments("serving", cases, ["float32"], more=more_arguments)
    torch.set_num_threads(_C.num_threads())
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    harness.report(figures(options.case, options.rounds), options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
