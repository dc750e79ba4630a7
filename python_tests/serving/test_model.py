"""The model's logits beside transformers', through chunked prefill and decode steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import FAMILIES, make_prompts, token_ids

import kvlink
from kvlink.serving.batch import Batch, Chunk
from kvlink.serving.checkpoint import load_model
from kvlink.serving.config import ModelConfig

# Both sum in float32, in different orders: rounding differs by a few 2^-24 of the largest term per
# sum, through at most three layers. A wrong mask, position, scale or weight is off by 1e-2 or more.
RELATIVE_TOLERANCE = 2e-5

PAGE_SIZE = 6


def run(own: Any, pool: kvlink.KVPool, chunks: Sequence[Chunk]) -> torch.Tensor:
    logits: torch.Tensor = own(Batch.of(chunks, PAGE_SIZE), pool)
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family: str, checkpoint: Callable[[str], tuple[Any, Path]]) -> None:
    model, path = checkpoint(family)
    config = ModelConfig.from_dir(path)
    own = load_model(path, config, "float32")
    layout = kvlink.KVLayout.nhd(
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        page_size=PAGE_SIZE,
        dtype="float32",
    )
    pool = kvlink.KVPool.create(layout, num_layers=config.num_layers, num_pages=100)
    prompts = [token_ids(line) for line in make_prompts(24)[3:9]]
    num_new = 5
    sequences = [prompt + [7 * i % 256 for i in range(num_new)] for prompt in prompts]
    order = np.random.default_rng(0).permutation(100).astype(np.int32)
    pages = np.split(order, np.cumsum([-(-len(s) // PAGE_SIZE) for s in sequences]))[:-1]
    with torch.inference_mode():
        expected = [model(torch.tensor([s])).logits[0] for s in sequences]

    def check(chunks: list[tuple[int, int, int]]) -> None:
        """One step of (sequence, start, end); the logits of every last token."""
        logits = run(own, pool, [Chunk(sequences[i][a:b], a, pages[i], True) for i, a, b in chunks])
        for row, (i, _, end) in zip(logits, chunks, strict=True):
            bound = RELATIVE_TOLERANCE * expected[i].abs().max().item()
            torch.testing.assert_close(row, expected[i][end - 1], rtol=0, atol=bound)

    lengths = [len(prompt) for prompt in prompts]
    half = [max(1, length // 2) for length in lengths]
    check([(i, 0, half[i]) for i in range(len(prompts))])
    rest = [(i, half[i], n) for i, n in enumerate(lengths) if n > half[i]]
    check(rest)
    # Again, in one step in which only some are asked for logits.
    chunks = [Chunk(sequences[i][a:b], a, pages[i], i % 2 == 0) for i, a, b in rest]
    asked = [i for i, _, _ in rest if i % 2 == 0]
    for row, i in zip(run(own, pool, chunks), asked, strict=True):
        bound = RELATIVE_TOLERANCE * expected[i].abs().max().item()
        torch.testing.assert_close(row, expected[i][lengths[i] - 1], rtol=0, atol=bound)
    for step in range(num_new):
        check([(i, n + step, n + step + 1) for i, n in enumerate(lengths)])


def test_a_step_has_one_plan_and_reads_a_shared_prefix_once(
    checkpoint: Callable[[str], tuple[Any, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = checkpoint("llama2")
    config = ModelConfig.from_dir(path)
    own = load_model(path, config, "float32")
    layout = kvlink.KVLayout.nhd(num_kv_heads=4, head_dim=32, page_size=PAGE_SIZE, dtype="float32")
    pool = kvlink.KVPool.create(layout, num_layers=config.num_layers, num_pages=110)
    draw = np.random.default_rng(1)
    common, *tails = (draw.integers(0, 256, size).tolist() for size in (540, 3, 7))
    sequences = [common + tail for tail in tails]
    order = draw.permutation(110).astype(np.int32)
    pages = [np.concatenate([order[:90], order[first : first + 3]]) for first in (90, 100)]
    plans: list[Any] = []

    def plan_attention(*args: Any, **options: Any) -> Any:
        plans.append(plan(*args, **options))
        return plans[-1]

    plan = kvlink.plan_attention
    monkeypatch.setattr(kvlink, "plan_attention", plan_attention)
    run(own, pool, [Chunk(common, 0, pages[0], False)])
    run(own, pool, [Chunk(s[540:-1], 540, p, False) for s, p in zip(sequences, pages, strict=True)])
    plans.clear()
    chunks = [Chunk(s[-1:], len(s) - 1, p, True) for s, p in zip(sequences, pages, strict=True)]
    logits = run(own, pool, chunks)
    assert [each.shared_prefixes for each in plans] == [[([0, 1], 512)]]
    with torch.inference_mode():
        for row, sequence in zip(logits, sequences, strict=True):
            expected = model(torch.tensor([sequence])).logits[0, -1]
            bound = RELATIVE_TOLERANCE * expected.abs().max().item()
            torch.testing.assert_close(row, expected, rtol=0, atol=bound)


def test_layers_are_announced_in_order(checkpoint: Callable[[str], tuple[Any, Path]]) -> None:
    _, path = checkpoint("llama2")
    config = ModelConfig.from_dir(path)
    own = load_model(path, config, "float32")
    layout = kvlink.KVLayout.nhd(num_kv_heads=4, head_dim=32, page_size=PAGE_SIZE, dtype="float32")
    pool = kvlink.KVPool.create(layout, num_layers=config.num_layers, num_pages=1)
    k = [torch.from_dlpack(pool.k(layer)) for layer in range(config.num_layers)]
    seen = []

    def on_layer(layer: int) -> None:
        filled = [bool(tensor[0, :3].ne(0).all()) for tensor in k]
        assert filled == [i <= layer for i in range(config.num_layers)]
        seen.append(layer)

    chunk = Chunk([1, 2, 3], 0, np.zeros(1, np.int32), False)
    logits = own(Batch.of([chunk], PAGE_SIZE), pool, on_layer)
    assert seen == list(range(config.num_layers))
    assert logits.shape == (0, config.vocab_size)
