"""Resharding that converts: what the plans of all ranks move is what the reference says."""

from __future__ import annotations

from typing import Any

import pytest
from sharded import Rank
from test_transfer_plan import apply, plan_of

from kvlink import Shard
from kvlink.reference.relayout_pages import relayout_pages
from kvlink.testing.pools import Filled, fill_run, make_pool

TOKENS = 61
CONVERSIONS = [
    ("float8_e4m3", "none"), ("float8_e4m3", "tensor"), ("float8_e4m3", "token_head"),
    ("float8_e5m2", "none"), ("float8_e5m2", "token_head"),
    ("int8", "tensor"), ("int8", "head"), ("int8", "token_head"), ("float16", "none"),
]  # fmt: skip
SHAPES = [  # kind and page size of either side
    (("nhd", 16), ("hnd", 24)), (("hnd", 7), ("packed", 5)), (("strided", 64), ("strided", 16)),
]  # fmt: skip


def build(shard: Shard, kind: str, page_size: int, dtype: str, scale: str) -> Rank:
    num_pages = -(-TOKENS // page_size)
    filled = make_pool(
        kind, dtype=dtype, scale=scale, num_kv_heads=len(shard.kv_heads), page_size=page_size,
        num_pages=num_pages, num_layers=len(shard.layers), head_dim=16, seed=shard.kv_heads.start,
    )  # fmt: skip
    return Rank(shard, filled.pool, filled.memory, list(range(num_pages))[::-1])


def ranks(tp_size: int, num_kv_heads: int, *layout: Any) -> list[Rank]:
    return [
        build(
            Shard.of_rank(
                num_layers=3, num_kv_heads=num_kv_heads, tp_rank=rank, tp_size=tp_size
            ),
            *layout,
        )
        for rank in range(tp_size)
    ]  # fmt: skip


def check(src: list[Rank], dst: list[Rank], wanted: list[Rank]) -> None:
    for rank in src:
        fill_run(
            Filled(rank.pool, rank.memory), rank.pages, 0, TOKENS, seed=rank.shard.kv_heads.start
        )
    for rank, want in zip(dst, wanted, strict=True):
        for sender in src:
            plan = plan_of(sender, rank)
            if plan is None:
                continue
            apply(plan, sender, rank, TOKENS)
            relayout_pages(
                sender.pool, sender.pages, want.pool, want.pages, num_tokens=TOKENS,
                src_shard=sender.shard, dst_shard=want.shard,
            )  # fmt: skip
        assert rank.bytes() == want.bytes()


@pytest.mark.parametrize(("src_layout", "dst_layout"), SHAPES)
@pytest.mark.parametrize("conversion", CONVERSIONS, ids="-".join)
def test_bfloat16_is_converted_on_the_way(
    conversion: tuple[str, str], src_layout: tuple[str, int], dst_layout: tuple[str, int]
) -> None:
    src = ranks(4, 8, *src_layout, "bfloat16", "none")
    dst, wanted = (ranks(3, 8, *dst_layout, *conversion) for _ in range(2))
    check(src, dst, wanted)


@pytest.mark.parametrize(("src_tp", "dst_tp"), [(2, 4), (8, 1)])
@pytest.mark.parametrize(
    ("stored", "conversion"),
    [
        (("int8", "token_head"), ("int8", "token_head")),  # stored bytes and scales are copied
        (("float8_e4m3", "head"), ("float8_e4m3", "head")),
        (("int8", "token_head"), ("float8_e4m3", "tensor")),
        (("float8_e5m2", "token_head"), ("bfloat16", "none")),
    ],
)
def test_quantised_at_the_source(
    stored: tuple[str, str], conversion: tuple[str, str], src_tp: int, dst_tp: int
) -> None:
    src = ranks(src_tp, 8, "nhd", 16, *stored)
    dst, wanted = (ranks(dst_tp, 8, "hnd", 7, *conversion) for _ in range(2))
    check(src, dst, wanted)


@pytest.mark.parametrize("conversion", CONVERSIONS, ids="-".join)
def test_latents_are_converted_by_the_rank_that_sends_them(conversion: tuple[str, str]) -> None:
    src = ranks(2, 1, "latent", 16, "bfloat16", "none")
    dst, wanted = (ranks(1, 1, "latent", 24, *conversion) for _ in range(2))
    assert [rank.shard.replica for rank in src] == [(0, 2), (1, 2)]
    check(src, dst, wanted)
