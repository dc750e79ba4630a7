"""kvlink.integrations.torch_ops: what torch's own checks ask of custom ops, and torch.compile."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config

import kvlink
from kvlink.errors import InvalidArgument, PageTableError
from kvlink.integrations import torch_ops as ops
from kvlink.testing.tolerances import assert_same_bits

NUM_PAGES, PAGE_SIZE, HEADS, DIM = 6, 4, 2, 16


def make_cache(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[2, page, slot, head, dim], as engines have it."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, NUM_PAGES, PAGE_SIZE, HEADS, DIM)
    return torch.randn(shape, generator=generator).to(dtype)


def batch() -> dict[str, Any]:
    return dict(
        q=torch.randn(5, 4, DIM),
        page_table=torch.tensor([[3, 0, 1], [5, 2, -1]], dtype=torch.int32),
        seq_lens=torch.tensor([11, 7], dtype=torch.int32),
        q_indptr=torch.tensor([0, 2, 5], dtype=torch.int32),
    )


ROWS = torch.randn(5, HEADS, DIM)
SLOTS = torch.tensor([21, -1, 0, 7, 8])
NO_SCALES: tuple[list[torch.Tensor], ...] = ([], [], [], [])


def samples() -> dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    cache, other, inputs = make_cache(), make_cache(torch.bfloat16), batch()
    scales = [torch.ones(NUM_PAGES, PAGE_SIZE, HEADS) for _ in range(2)]
    quantised = [torch.zeros(NUM_PAGES, PAGE_SIZE, HEADS, DIM, dtype=torch.int8) for _ in range(2)]
    rope = dict(cos_sin=torch.randn(9, 8), positions=torch.arange(5))
    q, table, lens, indptr = inputs.values()
    pages = torch.tensor([4, 1, 2], dtype=torch.int32), torch.tensor([0, 3, 5], dtype=torch.int32)
    states = [torch.randn(5, 4, DIM) for _ in range(3)], [torch.randn(5, 4) for _ in range(3)]
    latent = torch.randn(NUM_PAGES, PAGE_SIZE, 1, DIM)
    separate = cache[0].clone(), cache[1].clone()
    return {
        "append": (ops.append_kv, (ROWS, ROWS + 1, *separate, SLOTS), rope),
        "append-quantised": (
            ops.append_kv, (ROWS, ROWS + 1, *quantised, SLOTS),
            dict(k_scale=scales[0], v_scale=scales[1]),
        ),
        "append-latent": (
            ops.append_kv, (ROWS[:, :1], None, latent, None, SLOTS), dict(head_dim_v=8),
        ),
        "attention": (
            ops.paged_attention, (q, *separate, table, lens), dict(q_indptr=indptr, window=6)
        ),
        "attention-latent": (
            ops.paged_attention, (q, latent, None, table, lens),
            dict(q_indptr=indptr, head_dim_v=8, sinks=torch.randn(4)),
        ),
        "merge": (ops.merge_states, states, {}),
        "relayout": (
            ops.relayout_pages,
            ([separate[0]], [separate[1]], pages[0], [other[0].clone()], [other[1].clone()],
             pages[1], *NO_SCALES),
            dict(num_tokens=9, digest=True, src_start=1),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", samples())
def test_opcheck(name: str) -> None:
    """Schema (what is mutated), fake tensors, and what AOT dispatch makes of them."""
    op, args, kwargs = samples()[name]
    torch.library.opcheck(op, args, kwargs)


def test_the_ops_are_the_operators() -> None:
    cache, expected, inputs = make_cache(), make_cache(), batch()
    pool = kvlink.KVPool.wrap([expected], "kv page slot head dim")
    ops.append_kv(ROWS, ROWS + 1, cache[0], cache[1], SLOTS)
    kvlink.append_kv(ROWS, ROWS + 1, pool, 0, SLOTS)
    assert torch.equal(cache, expected)
    q, table, lens, indptr = inputs.values()
    out, lse = torch.ops.kvlink.paged_attention(q, cache[0], cache[1], table, lens, q_indptr=indptr)
    wanted = kvlink.paged_attention(q, pool, 0, table, lens, q_indptr=indptr, return_lse=True)
    assert_same_bits(out, wanted[0])
    assert_same_bits(lse, wanted[1], "lse")
    merged = ops.merge_states([out, out * 2], [lse, lse - 1])
    assert_same_bits(merged[0], kvlink.merge_states([out, out * 2], [lse, lse - 1])[0])
    other, target = torch.zeros(2, NUM_PAGES, PAGE_SIZE, 1, DIM), make_cache(torch.bfloat16)
    pages = torch.arange(3, dtype=torch.int32)
    moved = ops.relayout_pages(
        [cache[0]], [cache[1]], pages, [other[0]], [other[1]], pages, *NO_SCALES,
        num_tokens=12, dst_kv_head=1, digest=True,
    )  # fmt: skip
    assert torch.equal(other[:, :3], cache[:, :3, :, 1:])
    shard = kvlink.Shard([0], [1])
    digest = kvlink.digest_pages(
        kvlink.KVPool.wrap([other], "kv page slot head dim"), pages, num_tokens=12, shard=shard
    )
    assert (int(moved[0]), int(moved[1]) % 2**64) == digest
    ops.relayout_pages(
        [cache[0]], [cache[1]], pages, [target[0]], [target[1]], pages, *NO_SCALES, num_tokens=12
    )
    assert torch.equal(target[:, :3], cache[:, :3].bfloat16())


def test_quantised_caches_and_every_granularity() -> None:
    inputs = batch()
    for shape in ((1,), (HEADS,), (NUM_PAGES, PAGE_SIZE, HEADS)):
        k, v = (torch.zeros(NUM_PAGES, PAGE_SIZE, HEADS, DIM, dtype=torch.int8) for _ in range(2))
        scales = [torch.full(shape, 0.05) for _ in range(2)]
        how = dict(k_scale=scales[0], v_scale=scales[1])
        slots = torch.arange(24)
        rows = torch.randn(24, HEADS, DIM)
        ops.append_kv(rows, rows, k, v, slots, **how)
        out, _ = ops.paged_attention(
            inputs["q"], k, v, inputs["page_table"], inputs["seq_lens"],
            q_indptr=inputs["q_indptr"], **how,
        )  # fmt: skip
        exact = torch.zeros(NUM_PAGES, PAGE_SIZE, HEADS, DIM)
        ops.append_kv(rows, rows, exact, exact, slots)
        wanted, _ = ops.paged_attention(
            inputs["q"], exact, exact, inputs["page_table"], inputs["seq_lens"],
            q_indptr=inputs["q_indptr"],
        )  # fmt: skip
        assert float((out - wanted).abs().max()) < 0.1


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_without_a_break(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of a layer in one graph: the write is seen by the read behind it. Inductor compiles
    what is beside the ops by a C++ compiler."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def step(
        cache: torch.Tensor, rows: torch.Tensor, q: torch.Tensor, table: torch.Tensor,
        lens: torch.Tensor, indptr: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        k, v = cache[0], cache[1]
        before, before_lse = ops.paged_attention(q, k, v, table, lens, q_indptr=indptr)
        ops.append_kv(rows * 2, rows, k, v, SLOTS)
        out, lse = ops.paged_attention(q + 1, k, v, table, lens, q_indptr=indptr)
        return ops.merge_states([before, out], [before_lse, lse])

    q, table, lens, indptr = batch().values()
    cache, expected = make_cache(), make_cache()
    torch._dynamo.reset()
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    compiler = os.environ.get("CXX", "c++").split()[-1]  # without what caches its results
    for _ in range(2):
        with torch._inductor.config.patch({"cpp.cxx": (None, compiler)}):
            out, lse = compiled(cache, ROWS, q, table, lens, indptr)
        wanted, wanted_lse = step(expected, ROWS, q, table, lens, indptr)
        assert torch.equal(cache, expected)
        assert_same_bits(out, wanted)
        assert_same_bits(lse, wanted_lse, "lse")
    assert (backend == "inductor") == any(tmp_path.rglob("*.cpp"))


def test_errors_are_kvlinks() -> None:
    q, _, lens, indptr = batch().values()
    cache = make_cache()
    bad = torch.tensor([[3, 0, 1], [5, -1, -1]], dtype=torch.int32)
    with pytest.raises(PageTableError, match="sequence 1, index 1: page is unmapped"):
        ops.paged_attention(q, cache[0], cache[1], bad, lens, q_indptr=indptr)
    with pytest.raises(InvalidArgument, match="backend: expected auto or one of"):
        ops.merge_states([q], [torch.zeros(5, 4)], backend="fast")
