"""relayout_pages and digest_pages on the CPU, byte for byte: SIMD levels, threads, any geometry.

What every backend does is in operators/test_every_relayout.py.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlink import _C, Shard, digest_pages, relayout_pages
from kvlink.reference.digest_pages import run_digest
from kvlink.reference.relayout_pages import relayout_pages as reference_relayout_pages
from kvlink.testing.pools import DTYPES, KINDS, SCALES, fill_run, make_pool, rows_of

EXAMPLES = int(os.environ.get("KVLINK_HYPOTHESIS_EXAMPLES", "80"))
WILD = [-1, 2**31 - 1, -(2**31), 12345]


def table(pages: list[int], start: int, num_tokens: int, page_size: int) -> np.ndarray:
    """The page table of a run, with wild ids wherever the run does not look."""
    used = range(start // page_size, -(-(start + num_tokens) // page_size))
    ids = [p if i in used else WILD[i % len(WILD)] for i, p in enumerate(pages)]
    return np.array([*ids, *WILD], dtype=np.int32)


def check_against_reference(
    src_shape: dict[str, object],
    dst_shape: dict[str, object],
    *,
    num_tokens: int,
    src_start: int = 0,
    dst_start: int = 0,
    src_shard: Shard | None = None,
    dst_shard: Shard | None = None,
    seed: int = 0,
) -> None:
    src = make_pool(**src_shape, seed=seed)  # type: ignore[arg-type]
    ours, expected = (make_pool(**dst_shape, seed=seed + 7) for _ in range(2))  # type: ignore[arg-type]
    random = np.random.default_rng(seed)
    src_pages = random.permutation(src.pool.num_pages).tolist()
    dst_pages = random.permutation(ours.pool.num_pages).tolist()
    fill_run(src, src_pages, src_start, num_tokens, seed)
    before = src.bytes()
    run = dict(num_tokens=num_tokens, src_start=src_start, dst_start=dst_start)
    shards = dict(src_shard=src_shard, dst_shard=dst_shard)
    result = relayout_pages(
        src.pool, table(src_pages, src_start, num_tokens, src.pool.layout.page_size),
        ours.pool, table(dst_pages, dst_start, num_tokens, ours.pool.layout.page_size),
        **run, **shards, token_position=11, digest=True,
    )  # type: ignore[arg-type]  # fmt: skip
    reference_relayout_pages(src.pool, src_pages, expected.pool, dst_pages, **run, **shards)  # type: ignore[arg-type]
    assert ours.bytes() == expected.bytes()
    assert src.bytes() == before
    if src_shard is None and dst_shard is None:
        digest = digest_pages(
            ours.pool, dst_pages, num_tokens=num_tokens, start=dst_start, token_position=11
        )
        assert digest == result
        planes = 2 if ours.pool.layout.has_v_plane else 1
        heads = ours.pool.layout.num_kv_heads
        assert result.rows == num_tokens * heads * planes * ours.pool.num_layers


@pytest.mark.parametrize("dst_dtype", DTYPES)
@pytest.mark.parametrize("src_dtype", DTYPES)
def test_every_dtype_and_scale(src_dtype: str, dst_dtype: str) -> None:
    for i, (src_scale, dst_scale) in enumerate((a, b) for a in SCALES for b in SCALES):
        kinds = KINDS[i % 5], KINDS[(i // 5 + DTYPES.index(src_dtype)) % 5]
        check_against_reference(
            dict(kind=kinds[0], dtype=src_dtype, scale=src_scale, num_kv_heads=3, page_size=5),
            dict(kind=kinds[1], dtype=dst_dtype, scale=dst_scale, num_kv_heads=3, page_size=7),
            num_tokens=17, src_start=3, dst_start=2, seed=i,
        )  # fmt: skip


@pytest.mark.parametrize("dst_kind", KINDS)
@pytest.mark.parametrize("src_kind", KINDS)
def test_every_layout_at_every_level(simd_level: str, src_kind: str, dst_kind: str) -> None:
    for i, (src_dtype, dst_dtype) in enumerate((a, b) for a in DTYPES for b in DTYPES):
        check_against_reference(
            dict(kind=src_kind, dtype=src_dtype, scale=SCALES[i % 4], head_dim=37, head_dim_v=16),
            dict(kind=dst_kind, dtype=dst_dtype, scale=SCALES[i // 4 % 4], head_dim=37,
                 head_dim_v=16, page_size=3, num_pages=9),
            num_tokens=20, src_start=1, dst_start=5, seed=i,
        )  # fmt: skip


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.data())
def test_any_run_and_shard(data: st.DataObject) -> None:
    draw = data.draw
    layers = draw(st.permutations(range(4)))
    shape = dict(
        head_dim=draw(st.sampled_from([1, 8, 72, 1030])), head_dim_v=draw(st.integers(1, 9))
    )
    sides = []
    for side in ("src", "dst"):
        num_heads = draw(st.integers(1, 4), label=f"{side} heads")
        first_head = draw(st.integers(0, 3))
        held = layers[draw(st.integers(0, 1)) : draw(st.integers(2, 4))]
        if side == "dst":
            held = sorted(held)
        page_size = draw(st.integers(1, 9))
        start = draw(st.integers(0, 2 * page_size))
        sides.append((
            dict(
                kind=draw(st.sampled_from(KINDS)), dtype=draw(st.sampled_from(DTYPES)),
                scale=draw(st.sampled_from(SCALES)), num_kv_heads=num_heads, page_size=page_size,
                num_pages=-(-(start + 23) // page_size), num_layers=len(held), **shape,
            ),
            Shard(held, range(first_head, first_head + num_heads)),
            start,
        ))  # fmt: skip
    (src_shape, src_shard, src_start), (dst_shape, dst_shard, dst_start) = sides
    check_against_reference(
        src_shape, dst_shape, num_tokens=draw(st.integers(1, 23)), src_start=src_start,
        dst_start=dst_start, src_shard=src_shard, dst_shard=dst_shard,
        seed=draw(st.integers(0, 99)),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [*DTYPES, "uint8"])
def test_opaque_pages_move_whole(simd_level: str, dtype: str) -> None:
    src, dst = (make_pool("opaque", dtype=dtype, head_dim=3001) for _ in range(2))
    src.memory[0].random_(0, 256)
    result = relayout_pages(src.pool, [4, 0, 4], dst.pool, [1, 2, 5], num_tokens=3, digest=True)
    for page, origin in enumerate((None, 4, 0, None, None, 4)):
        stored = rows_of(dst.pool, 0, "k")[page]
        if origin is None:
            assert (stored == -1).all() or (stored == 255).all()
        else:
            assert torch.equal(stored, rows_of(src.pool, 0, "k")[origin])
    shard = Shard([0], [0])
    assert result == (3, run_digest(dst.pool, [1, 2, 5], 3, 0, shard))


# --- threads -----------------------------------------------------------------


@pytest.mark.parametrize("digest", [False, True])
def test_any_number_of_threads(digest: bool) -> None:
    shape = dict(num_kv_heads=4, head_dim=64, page_size=16, num_pages=64, num_layers=2)
    src = make_pool("nhd", dtype="bfloat16", **shape)  # type: ignore[arg-type]
    fill_run(src, list(range(64)), 0, 1024)
    threads = _C.num_threads()
    seen = []
    try:
        for count in (1, 2, 7):
            _C.set_num_threads(count)
            for dtype, kind in (("bfloat16", "hnd"), ("int8", "nhd")):
                scale = "token_head" if dtype == "int8" else "none"
                dst = make_pool(kind, dtype=dtype, scale=scale, **shape)  # type: ignore[arg-type]
                pages = list(range(63, -1, -1))
                result = relayout_pages(
                    src.pool,
                    range(64),
                    dst.pool,
                    pages,
                    num_tokens=1000,
                    dst_start=5,
                    digest=digest,
                )
                seen.append((dtype, result, dst.bytes()))
    finally:
        _C.set_num_threads(threads)
    assert seen[0] == seen[2] == seen[4]
    assert seen[1] == seen[3] == seen[5]
