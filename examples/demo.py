"""Generates from several prompts with a prefill and a decode process, then reports on the run.

The two processes keep their KV cache in different layouts, so every migrated page is rewritten on
the way. Options: `python examples/demo.py --help`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from kvlink.errors import KVLinkError
from kvlink.serving.generate import Generation
from kvlink.serving.options import Options, SideOptions, side_threads
from kvlink.serving.report import format_report
from kvlink.serving.request import Defaults

HERE = Path(__file__).resolve().parent
PREFILL = SideOptions(page_size=16, layout="nhd")
DECODE = SideOptions(page_size=24, layout="hnd")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=HERE / "demo_model", type=Path, metavar="DIR")
    parser.add_argument("--prompts", default=HERE / "demo_prompts.jsonl", type=Path, metavar="FILE")
    parser.add_argument("--max-new-tokens", default=96, type=int, metavar="N")
    parser.add_argument("--temperature", default=0.8, type=float, metavar="X")
    parser.add_argument("--seed", default=1, type=int, metavar="N")
    arguments = parser.parse_args()

    threads = side_threads()
    options = Options(
        model_dir=str(arguments.model),
        prefill=replace(PREFILL, num_threads=threads[0]),
        decode=replace(DECODE, num_threads=threads[1]),
    )
    defaults = Defaults(
        arguments.max_new_tokens, arguments.temperature, top_p=0.95, seed=arguments.seed
    )
    try:
        lines = arguments.prompts.read_bytes().strip().split(b"\n")
        generation = Generation(lines, options, defaults)
        for line, record in zip(lines, generation.run(), strict=True):
            show(json.loads(line)["prompt"], record.get("text") or record.get("error", ""))
    except (KVLinkError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    print(rule("report"))
    print(f"prefill   pages of {PREFILL.page_size} tokens, {PREFILL.layout}")
    print(f"decode    pages of {DECODE.page_size} tokens, {DECODE.layout}")
    print(format_report(generation.report))
    return 0


def show(prompt: str, text: str) -> None:
    """The end of the prompt, dimmed on a terminal, and its continuation."""
    dim, plain = ("\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "")
    shown = prompt if len(prompt) <= 240 else "[...] " + prompt[-240:]
    print(rule(f"prompt of {len(prompt)} characters"))
    print(f"{dim}{shown}{plain}|{text}\n", flush=True)


def rule(title: str) -> str:
    return f"--- {title} ".ljust(min(100, shutil.get_terminal_size().columns), "-")


if __name__ == "__main__":
    sys.exit(main())
