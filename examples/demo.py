"""Generates from several prompts with a prefill and a decode process, then reports on the run.

The two processes keep their KV cache in different layouts, so every migrated page is rewritten on
the way. Options: `python examples/demo.py --help`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from kvlink.errors import KVLinkError
from kvlink.serving.arguments import add_generation_arguments, defaults_from, options_from
from kvlink.serving.generate import Generation
from kvlink.serving.report import format_report

HERE = Path(__file__).resolve().parent
DEFAULTS = dict(
    max_new_tokens=96, temperature=0.8, top_p=0.95, seed=1,
    prefill_page_size=16, prefill_layout="nhd", decode_page_size=24, decode_layout="hnd",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model", default=HERE / "demo_model", metavar="DIR", help="Hugging Face checkpoint"
    )
    parser.add_argument(
        "--prompts", default=HERE / "demo_prompts.jsonl", type=Path, metavar="FILE",
        help="JSON lines with prompt",
    )  # fmt: skip
    add_generation_arguments(parser)
    parser.set_defaults(**DEFAULTS)
    arguments = parser.parse_args()
    options = options_from(arguments, str(arguments.model))
    try:
        content = arguments.prompts.read_bytes().rstrip()
        lines = content.split(b"\n") if content else []
        generation = Generation(lines, options, defaults_from(arguments))
        for line, record in zip(lines, generation.run(), strict=True):
            show(prompt_of(line), record.get("text") or record.get("error", ""))
    except (KVLinkError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    print(rule("report"))
    print(f"prefill   pages of {options.prefill.page_size} tokens, {options.prefill.layout}")
    print(f"decode    pages of {options.decode.page_size} tokens, {options.decode.layout}")
    print(format_report(generation.report))
    return 0


def prompt_of(line: bytes) -> str:
    """The line's prompt; a line without one as it is."""
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, LookupError, TypeError):
        prompt = None
    return prompt if isinstance(prompt, str) else line.decode(errors="replace")


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
