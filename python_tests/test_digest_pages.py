"""The digest: what it is, what it ignores and what it sees."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kvlink import Shard, append_kv, digest_pages, relayout_pages
from kvlink.reference.digest_pages import run_digest
from kvlink.testing.pools import KINDS, Filled, fill_run, make_pool, model_pool, rows_of


@pytest.mark.parametrize("kind", [*KINDS, "latent"])
@pytest.mark.parametrize("scale", ["none", "token_head"])
def test_digest_is_the_specified_one(simd_level: str, kind: str, scale: str) -> None:
    for dtype, head_dim in (("int8", 7), ("bfloat16", 128), ("float32", 1030)):
        heads = 1 if kind == "latent" else 3
        filled = make_pool(
            kind, dtype=dtype, scale=scale, num_kv_heads=heads, head_dim=head_dim, head_dim_v=5,
            num_layers=2,
        )  # fmt: skip
        fill_run(filled, [3, 0, 2], 2, 9)
        shard = Shard([9, 4], range(6, 6 + heads))
        result = digest_pages(
            filled.pool, [3, 0, 2], num_tokens=9, start=2, shard=shard, token_position=1000
        )
        assert result.digest == run_digest(filled.pool, [3, 0, 2], 9, 2, shard, 1000)


@pytest.mark.parametrize(
    ("dtype", "scale"), [("bfloat16", "none"), ("int8", "token_head"), ("float8_e4m3", "none")]
)
def test_digest_ignores_how_the_tokens_lie(dtype: str, scale: str) -> None:
    source = model_pool(kind="nhd", dtype=dtype, scale=scale)
    whole = digest_pages(source.pool, range(6), num_tokens=24)
    everything = Shard(range(3), range(4))
    for kind, page_size, tp in (
        ("hnd", 16, 1),
        ("packed", 1, 2),
        ("strided", 5, 4),
        ("nhd", 24, 2),
    ):
        parts = []
        for rank in range(tp):
            heads = range(rank * 4 // tp, (rank + 1) * 4 // tp)
            for layers in ((2, 0), (1,)):
                dst = make_pool(
                    kind, dtype=dtype, scale=scale, num_kv_heads=len(heads), head_dim=16,
                    page_size=page_size, num_layers=len(layers), num_pages=24,
                )  # fmt: skip
                for first, count in ((13, 11), (0, 6), (6, 7)):
                    pages = list(range(23, -1, -1))
                    parts.append(
                        relayout_pages(
                            source.pool,
                            range(6),
                            dst.pool,
                            pages,
                            num_tokens=count,
                            src_start=first,
                            dst_start=first,
                            src_shard=everything,
                            dst_shard=Shard(layers, heads),
                            token_position=first,
                            digest=True,
                        )
                    )
        assert sum(part.rows for part in parts) == whole.rows
        assert sum(part.digest for part in parts) % 2**64 == whole.digest


def test_digest_is_of_the_converted_values() -> None:
    source = model_pool(kind="nhd", dtype="float32")
    dst = [make_pool(k, dtype="int8", scale="token_head", num_kv_heads=4, num_layers=3, head_dim=16)
           for k in ("nhd", "hnd")]  # fmt: skip
    results = [relayout_pages(source.pool, range(6), d.pool, range(6), num_tokens=24, digest=True)
               for d in dst]  # fmt: skip
    assert results[0] == results[1]
    assert results[0] == digest_pages(dst[0].pool, range(6), num_tokens=24)
    assert results[0] != digest_pages(source.pool, range(6), num_tokens=24)


def _flip_a_bit(filled: Filled) -> None:
    rows_of(filled.pool, 1, "v")[2, 1, 3, 15] ^= 1


def _swap_tokens(filled: Filled) -> None:
    rows = rows_of(filled.pool, 0, "k")
    rows[0, [1, 2]] = rows[0, [2, 1]]


def _swap_heads(filled: Filled) -> None:
    rows = rows_of(filled.pool, 0, "k")
    rows[:, :, [0, 3]] = rows[:, :, [3, 0]]


def _swap_planes(filled: Filled) -> None:
    k, v = (rows_of(filled.pool, 2, name) for name in ("k", "v"))
    kept = k.clone()
    k.copy_(v)
    v.copy_(kept)


def _swap_layers(filled: Filled) -> None:
    for name in ("k", "v"):
        a, b = (rows_of(filled.pool, layer, name) for layer in (0, 1))
        kept = a.clone()
        a.copy_(b)
        b.copy_(kept)


def _swap_elements(filled: Filled) -> None:
    row = rows_of(filled.pool, 0, "v")[1, 1, 1]
    row[[0, 8]] = row[[8, 0]]


def _swap_rows(filled: Filled) -> None:
    rows = rows_of(filled.pool, 1, "k")
    rows[1, 0, [0, 2]] = rows[1, 0, [2, 0]]


def _zero_a_row(filled: Filled) -> None:
    rows = rows_of(filled.pool, 1, "v")
    rows[tuple(rows.any(dim=-1).nonzero()[-1])] = 0


def _change_a_scale(filled: Filled) -> None:
    torch.from_dlpack(filled.pool.k_scale(0))[3, 1, 0] *= 2


@pytest.mark.parametrize(
    "damage",
    [_flip_a_bit, _swap_tokens, _swap_heads, _swap_planes, _swap_layers, _swap_elements,
     _swap_rows, _zero_a_row, _change_a_scale],
)  # fmt: skip
def test_digest_sees_damage(simd_level: str, damage: Callable[[Filled], None]) -> None:
    filled = model_pool(kind="nhd", dtype="int8", scale="token_head")
    before = digest_pages(filled.pool, range(6), num_tokens=24)
    damage(filled)
    after = digest_pages(filled.pool, range(6), num_tokens=24)
    assert after.rows == before.rows
    assert after.digest != before.digest


def test_every_bit_of_a_row_counts(simd_level: str) -> None:
    filled = make_pool("nhd", dtype="int8", num_kv_heads=1, head_dim=200, page_size=1, num_pages=1)
    row = rows_of(filled.pool, 0, "k")[0, 0, 0]
    seen = set()
    for value in (0, 255):
        row[:] = value
        for bit in range(200 * 8):
            row[bit // 8] ^= 1 << bit % 8
            seen.add(digest_pages(filled.pool, [0], num_tokens=1).digest)
            row[bit // 8] ^= 1 << bit % 8
        seen.add(digest_pages(filled.pool, [0], num_tokens=1).digest)
    assert len(seen) == 2 * (200 * 8 + 1)


def test_digest_ignores_other_slots_and_sees_positions() -> None:
    filled = model_pool(kind="hnd", dtype="bfloat16")
    before = digest_pages(filled.pool, range(6), num_tokens=10, start=3)
    k = torch.zeros(3, 4, 16)
    append_kv(k, k, filled.pool, 0, torch.tensor([0, 2, 13]))
    assert digest_pages(filled.pool, range(6), num_tokens=10, start=3) == before
    moved = digest_pages(filled.pool, range(6), num_tokens=10, start=3, token_position=1)
    assert moved.digest != before.digest


def test_without_digest_there_is_none() -> None:
    src, dst = model_pool(kind="nhd"), make_pool("hnd", num_kv_heads=4, num_layers=3, head_dim=16)
    result = relayout_pages(src.pool, range(6), dst.pool, range(6), num_tokens=24)
    assert result == (24 * 4 * 2 * 3, 0)
