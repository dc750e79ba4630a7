"""Many requests, few pages: everything is served, nothing deadlocks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import generate
from tiny import greedy, make_prompts, to_jsonl, token_ids

pytestmark = pytest.mark.two_process


@pytest.mark.parametrize(
    ("prefill_pages", "decode_pages", "more"),
    [(16, 64, ()), (64, 18, ()), (16, 18, ("--max-num-seqs=2", "--max-batch-tokens=5"))],
    ids=["prefill is short", "decode is short", "both are short"],
)
def test_few_pages(
    prefill_pages: int,
    decode_pages: int,
    more: tuple[str, ...],
    checkpoint: Callable[[str], tuple[Any, Path]],
    tmp_path: Path,
) -> None:
    model, path = checkpoint("mistral")
    lines = make_prompts(30)
    # One request fills either pool exactly, one does not fit into either.
    fits = {"prompt_token_ids": [5] * 128, "max_new_tokens": 17}
    too_long = {"prompt_token_ids": [5] * 150, "max_new_tokens": 17}
    records, _ = generate(
        path,
        to_jsonl([*lines, fits, too_long, *lines]),
        "--dtype=float32",
        "--prefill-page-size=8",
        "--decode-page-size=8",
        f"--prefill-num-pages={prefill_pages}",
        f"--decode-num-pages={decode_pages}",
        *more,
    )
    expected = [greedy(model, line) for line in [*lines, fits]]
    served = [record["token_ids"] for record in records if "error" not in record]
    assert served == expected + expected[:-1]
    assert "too long" in records[len(lines) + 1]["error"]
    assert sum("error" in record for record in records) == 1


def test_error_names_what_is_needed(checkpoint: Callable[[str], tuple[Any, Path]]) -> None:
    _, path = checkpoint("mistral")
    line = {"prompt_token_ids": [5] * 20, "max_new_tokens": 9}
    records, _ = generate(path, to_jsonl([line]), "--num-pages=1", "--decode-page-size=8")
    assert records[0]["error"] == "too long: 20 tokens take 2 pages of prefill; it has 1"


def test_pool_size_follows_the_input(checkpoint: Callable[[str], tuple[Any, Path]]) -> None:
    from kvlink.serving.config import ModelConfig
    from kvlink.serving.options import Options, SideOptions

    _, path = checkpoint("mistral")
    config = ModelConfig.from_dir(path)
    lines = make_prompts(10)
    sizes = [(len(token_ids(line)), len(token_ids(line)) + 9) for line in lines]
    options = Options(
        str(path),
        prefill=SideOptions(page_size=4),
        decode=SideOptions(page_size=16, num_pages=77),
        max_num_seqs=3,
    ).sized(config, sizes)
    longest = sorted((-(-prompt // 4) for prompt, _ in sizes), reverse=True)
    assert options.prefill.num_pages == sum(longest[:3])
    assert options.decode.num_pages == 77
    assert Options.from_message(json.loads(json.dumps(options.to_message()))) == options
