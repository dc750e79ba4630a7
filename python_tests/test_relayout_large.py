"""Moves too large for the caches, whose stores go around them, and rows longer than a page."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvlink import _C, KVLayout, KVPool, Shard, digest_pages, relayout_pages
from kvlink.reference.digest_pages import run_digest
from kvlink.testing.pools import make_pool, rows_of

STREAMED_BYTES = 16 << 20  # from here on


def memory_of(pool: KVPool) -> np.ndarray:
    """The pool's memory in place."""
    segment = pool.segment
    assert segment is not None
    view = _C.ArrayView(segment.address, [segment.num_bytes], [1], "uint8", (1, 0), segment)
    memory: np.ndarray = torch.from_dlpack(view).numpy()
    return memory


def random_bytes(pool: KVPool, seed: int = 0) -> np.ndarray:
    """The pool's memory, filled at random."""
    memory = memory_of(pool)
    memory[:] = np.random.default_rng(seed).integers(0, 256, memory.size, dtype=np.uint8)
    return memory


@pytest.mark.parametrize("digest", [False, True])
@pytest.mark.parametrize("dims", [(128, 64), (80, 100)])  # whole stripes, and not
def test_large_moves(simd_level: str, dims: tuple[int, int], digest: bool) -> None:
    num_tokens = STREAMED_BYTES // (2 * 4 * sum(dims)) + 5
    pools = []
    for kind, page_size in (("nhd", 16), ("hnd", 48)):
        layout = getattr(KVLayout, kind)(
            num_kv_heads=4, head_dim=dims[0], head_dim_v=dims[1], page_size=page_size,
            dtype="bfloat16",
        )  # fmt: skip
        pools.append(KVPool.create(layout, num_layers=1, num_pages=num_tokens // page_size + 2))
    src, dst = pools
    random_bytes(src)
    before = random_bytes(dst, 1).copy()
    random = np.random.default_rng(2)
    src_pages, dst_pages = (random.permutation(pool.num_pages) for pool in pools)
    result = relayout_pages(
        src, src_pages, dst, dst_pages, num_tokens=num_tokens, src_start=3, dst_start=7,
        digest=digest,
    )  # fmt: skip
    tokens = np.arange(num_tokens)
    for name in ("k", "v"):
        places = [
            (torch.from_numpy(pages[(start + tokens) // size]),
             torch.from_numpy((start + tokens) % size))
            for pages, start, size in ((src_pages, 3, 16), (dst_pages, 7, 48))
        ]  # fmt: skip
        moved = rows_of(dst, 0, name)
        assert torch.equal(moved[places[1]], rows_of(src, 0, name)[places[0]])
        # Nothing else of the destination changed.
        moved[places[1]] = 0
    after = memory_of(dst)
    blank = KVPool.create(dst.layout, num_layers=1, num_pages=dst.num_pages)
    memory_of(blank)[:] = before
    for name in ("k", "v"):
        rows_of(blank, 0, name)[places[1]] = 0
    assert np.array_equal(after, memory_of(blank))
    if digest:
        relayout_pages(
            src, src_pages, dst, dst_pages, num_tokens=num_tokens, src_start=3, dst_start=7
        )
        assert result == digest_pages(dst, dst_pages, num_tokens=num_tokens, start=7)


@pytest.mark.parametrize("dtype", ["float8_e4m3", "int8"])
def test_large_quantised_moves(simd_level: str, dtype: str) -> None:
    """The same rows as when they are moved a few at a time, the lines of their scales begun and
    ended by other rows or by none."""
    shape = dict(num_kv_heads=4, head_dim=128)
    src = make_pool("nhd", dtype="bfloat16", page_size=16, num_pages=1040, **shape)  # type: ignore[arg-type]
    values = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).bfloat16()
    for name in ("k", "v"):
        rows = rows_of(src.pool, 0, name)
        rows.copy_(values.repeat(-(-rows.numel() // values.numel()))[: rows.numel()]
                   .view(torch.int16).view(rows.shape))  # fmt: skip
    whole, parts = (
        make_pool("hnd", dtype=dtype, scale="token_head", page_size=20, num_pages=832, **shape)  # type: ignore[arg-type]
        for _ in range(2)
    )
    num_tokens, pages = 1040 * 16 - 9, np.random.default_rng(0).permutation(832)
    result = relayout_pages(
        src.pool, range(1040), whole.pool, pages, num_tokens=num_tokens, src_start=5, dst_start=3,
        digest=True,
    )  # fmt: skip
    assert result.rows * 128 >= STREAMED_BYTES
    digest = 0
    for first in range(0, num_tokens, 999):
        run = dict(
            num_tokens=min(999, num_tokens - first), src_start=5 + first, dst_start=3 + first
        )
        part = relayout_pages(
            src.pool, range(1040), parts.pool, pages, token_position=first, digest=True, **run
        )  # type: ignore[arg-type]
        digest += part.digest
    assert whole.bytes() == parts.bytes()
    assert result.digest == digest % 2**64


def test_pages_of_encoder_embeddings(simd_level: str) -> None:
    layout = KVLayout.opaque((64, 3584), "bfloat16")
    src, dst = (KVPool.create(layout, num_layers=1, num_pages=4) for _ in range(2))
    random_bytes(src)
    result = relayout_pages(src, [2, 0, 1], dst, [3, 1, 0], num_tokens=3, digest=True)
    assert torch.equal(rows_of(dst, 0, "k")[[3, 1, 0]], rows_of(src, 0, "k")[[2, 0, 1]])
    assert result.digest == run_digest(dst, [3, 1, 0], 3, 0, Shard([0], [0]))
    assert result == digest_pages(dst, [3, 1, 0], num_tokens=3)


def test_consecutive_pages_are_not_confused() -> None:
    """Pages that continue each other on one side, on both, or backwards."""
    shape = dict(num_kv_heads=2, head_dim=24, page_size=4, num_pages=12)
    src, dst = (make_pool("strided" if i else "nhd", **shape) for i in range(2))  # type: ignore[arg-type]
    wrapped = [
        KVPool.wrap([tuple(torch.zeros(12, 4, 2, 24) for _ in range(2))], "page slot head dim")
        for _ in range(2)
    ]
    for pool in (src.pool, wrapped[0]):
        for name in ("k", "v"):
            rows = rows_of(pool, 0, name)
            rows.copy_(torch.arange(rows.numel(), dtype=torch.int32).view(rows.shape))
    for source in (src.pool, wrapped[0]):
        for target in (dst.pool, wrapped[1]):
            for ids in ([3, 4, 5, 6], [6, 5, 4, 3], [0, 1, 7, 8], [2, 4, 6, 8]):
                for other in ([3, 4, 5, 6], [11, 10, 1, 2]):
                    result = relayout_pages(source, ids, target, other, num_tokens=14, digest=True)
                    for name in ("k", "v"):
                        moved = rows_of(target, 0, name)[other].reshape(16, 2, 24)[:14]
                        origin = rows_of(source, 0, name)[ids].reshape(16, 2, 24)[:14]
                        assert torch.equal(moved, origin)
                    assert result == digest_pages(target, other, num_tokens=14)
