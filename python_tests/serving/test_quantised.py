"""Other dtypes: 8-bit KV on the decode side, 16-bit weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import generate
from tiny import make_prompts, to_jsonl, token_ids

import kvlink
from kvlink.serving.batch import Batch, Chunk
from kvlink.serving.checkpoint import eos_ids, load_model
from kvlink.serving.config import ModelConfig
from kvlink.serving.options import SideOptions

# A reduced precision is off by a few of its steps (2^-8 in bfloat16) through three layers; the
# checkpoint's own code in that precision is off by as much.
STEPS = 8


@pytest.mark.two_process
@pytest.mark.parametrize("kv_dtype", ["int8", "fp8_e4m3"])
def test_quantised_on_the_way(kv_dtype: str, checkpoint: Callable[[str], tuple[Any, Path]]) -> None:
    """Two processes give what one gives that prefills, converts its pages and decodes."""
    _, path = checkpoint("llama3")
    lines = make_prompts(6, longest=60)
    records, _ = generate(
        path,
        to_jsonl(lines),
        "--dtype=float32",
        "--prefill-page-size=8",
        "--decode-page-size=16",
        "--decode-layout=hnd",
        f"--decode-kv-dtype={kv_dtype}",
    )
    config = ModelConfig.from_dir(path)
    model = load_model(path, config, "float32")
    sides = (SideOptions(8), SideOptions(16, "hnd", kv_dtype))
    source, target = (
        kvlink.KVPool.create(
            side.kv_layout(config, "float32"), num_layers=config.num_layers, num_pages=20
        )
        for side in sides
    )
    pages = np.arange(20, dtype=np.int32)
    for line, record in zip(lines, records, strict=True):
        prompt = token_ids(line)
        logits = model(Batch.of([Chunk(prompt, 0, pages, True)], 8), source)
        kvlink.relayout_pages(source, pages[:10], target, pages[:10], num_tokens=len(prompt))
        expected = [int(logits[0].argmax())]
        while len(expected) < line["max_new_tokens"] and expected[-1] not in eos_ids(path):
            at = len(prompt) + len(expected) - 1
            logits = model(Batch.of([Chunk(expected[-1:], at, pages, True)], 16), target)
            expected.append(int(logits[0].argmax()))
        assert record["token_ids"] == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_reduced_precision(dtype: str, checkpoint: Callable[[str], tuple[Any, Path]]) -> None:
    reference, path = checkpoint("qwen3")
    config = ModelConfig.from_dir(path)
    model = load_model(path, config, dtype)
    assert all(str(p.dtype) == f"torch.{dtype}" for p in model.parameters())
    layout = SideOptions(16).kv_layout(config, dtype)
    assert layout.dtype == dtype
    pool = kvlink.KVPool.create(layout, num_layers=config.num_layers, num_pages=8)
    prompt = token_ids(make_prompts(24)[5])
    logits = model(Batch.of([Chunk(prompt, 0, np.arange(8, dtype=np.int32), True)], 16), pool)
    with torch.inference_mode():
        exact = reference(torch.tensor([prompt])).logits[0, -1]
    step = torch.finfo(getattr(torch, dtype)).eps
    assert (logits[0] - exact).abs().max() <= STEPS * step * exact.abs().max()
    assert logits.dtype == torch.float32


@pytest.mark.two_process
def test_bfloat16_end_to_end(checkpoint: Callable[[str], tuple[Any, Path]]) -> None:
    _, path = checkpoint("qwen3")
    lines = make_prompts(6)
    options = ["--dtype=bfloat16", "--ignore-eos", "--decode-layout=packed"]
    records, _ = generate(path, to_jsonl(lines), *options)
    assert [len(r["token_ids"]) for r in records] == [line["max_new_tokens"] for line in lines]
    again, _ = generate(path, to_jsonl(lines), *options)
    assert [r["token_ids"] for r in again] == [r["token_ids"] for r in records]
