"""`kvlink generate`: reads the input, serves it, writes the output in input order."""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from pathlib import Path
from typing import IO

from kvlink.errors import KVLinkError
from kvlink.serving.arguments import defaults_from, options_from, parse_arguments
from kvlink.serving.generate import Generation
from kvlink.serving.report import format_report
from kvlink.serving.workers import WorkerFailed

_FAILED_STATUS = 1
_USAGE_STATUS = 2
_INTERRUPTED_STATUS = 130


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 0 served (bad lines included), 1 a worker failed, 2 wrong usage."""
    arguments = parse_arguments(argv)
    try:
        _run(arguments)
    except WorkerFailed as error:
        return _fail(_FAILED_STATUS, error)
    except BrokenPipeError:  # whoever read the output is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILED_STATUS
    except (KVLinkError, OSError) as error:
        return _fail(_USAGE_STATUS, error)
    except KeyboardInterrupt:
        return _fail(_INTERRUPTED_STATUS, "interrupted")
    return 0


def _run(arguments: Namespace) -> None:
    lines = _read_lines(arguments.input)
    options = options_from(arguments, arguments.model)
    generation = Generation(lines, options, defaults_from(arguments))
    with ExitStack() as stack:
        report = _open_report(stack, arguments.report)
        output = stack.enter_context(_open_output(arguments.output))
        on_progress = _progress_bar(stack, len(generation.requests))
        records = stack.enter_context(closing(generation.run(on_progress)))
        for record in records:
            output.write(json.dumps(record, ensure_ascii=False) + "\n")
            output.flush()
        if report is not None:
            report.write(json.dumps(generation.report, indent=2) + "\n")
    if generation.num_errors:
        print(
            f"kvlink generate: {generation.num_errors} of {len(lines)} lines were not served; "
            'each has an "error" in the output',
            file=sys.stderr,
        )
    if arguments.report == "-":
        print(format_report(generation.report), file=sys.stderr)


def _read_lines(path: str) -> list[bytes]:
    content = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    # Lines end with \n; blank ones at the end of the file are no lines.
    return content.rstrip().split(b"\n") if content.strip() else []


def _open_output(path: str) -> AbstractContextManager[IO[str]]:
    if path == "-":
        sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
        return nullcontext(sys.stdout)
    return open(path, "w", encoding="utf-8")


def _open_report(stack: ExitStack, path: str | None) -> IO[str] | None:
    if path in (None, "-"):
        return None
    return stack.enter_context(open(str(path), "w", encoding="utf-8"))


def _progress_bar(stack: ExitStack, total: int) -> Callable[[int, int], None] | None:
    """On a terminal only."""
    if not sys.stderr.isatty():
        return None
    from tqdm import tqdm

    bar = stack.enter_context(tqdm(total=total, unit="request"))

    def on_progress(num_ended: int, num_tokens: int) -> None:
        bar.set_postfix(tokens=num_tokens, refresh=False)
        bar.update(num_ended)

    return on_progress


def _fail(status: int, error: object) -> int:
    print(f"kvlink generate: {error}", file=sys.stderr)
    return status
