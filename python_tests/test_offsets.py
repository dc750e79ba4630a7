"""Pools of more bytes and elements than 32 bits count: every operator, and every path of transfers.

Their memory is asked for and hardly touched, so it costs next to nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import kvlink
from kvlink import KVLayout, KVPool
from kvlink.testing.tolerances import assert_same_bits
from kvlink.testing.transfer_peer import SECRET
from kvlink.transfer import Endpoint

PAGE_SIZE, TOKENS = 16, 70
LAYOUT = KVLayout.nhd(num_kv_heads=4, head_dim=128, page_size=PAGE_SIZE, dtype="bfloat16")
PAGE_BYTES = LAYOUT.layer_bytes(1)
NUM_PAGES = (9 << 30) // PAGE_BYTES  # 9 GiB of two bytes each: more than 2**32 elements
FAR = [NUM_PAGES - 1, NUM_PAGES // 2, (4 << 30) // PAGE_BYTES, (2 << 30) // PAGE_BYTES, 3]
NEAR = [1, 4, 0, 3, 2]


def make(num_pages: int, shared: bool = False) -> KVPool:
    return KVPool.create(LAYOUT, num_layers=1, num_pages=num_pages, shared=shared)


def fill(pool: KVPool, pages: list[int]) -> None:
    rows = torch.randn((2, TOKENS, 4, 128), generator=torch.Generator().manual_seed(5))
    at = np.arange(TOKENS)
    slots = np.array(pages, np.int64)[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE
    kvlink.append_kv(rows[0], rows[1], pool, 0, slots)


def content(pool: KVPool, pages: list[int]) -> bytes:
    """The request's pages, as DLPack shows them."""
    planes = (torch.from_dlpack(plane)[pages] for plane in (pool.k(0), pool.v(0)))
    return b"".join(rows.view(torch.int16).numpy().tobytes() for rows in planes)


@pytest.fixture(scope="module")
def large() -> KVPool:
    pool = make(NUM_PAGES)
    fill(pool, FAR)
    return pool


@pytest.fixture(scope="module")
def small() -> KVPool:
    pool = make(8)
    fill(pool, NEAR)
    return pool


def test_rows_are_written_where_they_belong(large: KVPool, small: KVPool) -> None:
    assert content(large, FAR) == content(small, NEAR)


@pytest.mark.parametrize("num_rows", [1, 40], ids=["decode", "prefill"])
def test_attention(large: KVPool, small: KVPool, num_rows: int) -> None:
    q = torch.randn((num_rows, 8, 128), generator=torch.Generator().manual_seed(6))

    def attend(pool: KVPool, pages: list[int], **options: Any) -> Any:
        return kvlink.paged_attention(
            q, pool, 0, [pages], [TOKENS], q_indptr=[0, num_rows], **options
        )

    assert_same_bits(attend(large, FAR), attend(small, NEAR))
    plan = kvlink.plan_attention(large, [FAR], [TOKENS], num_q_heads=8, q_indptr=[0, num_rows])
    assert_same_bits(attend(large, FAR, plan=plan), attend(small, NEAR))


def test_moves_within_a_process(large: KVPool, small: KVPool) -> None:
    target = make(8)
    there = kvlink.relayout_pages(large, FAR, target, NEAR, num_tokens=TOKENS, digest=True)
    assert content(target, NEAR) == content(small, NEAR)
    assert there == kvlink.digest_pages(large, FAR, num_tokens=TOKENS)
    assert there == kvlink.digest_pages(small, NEAR, num_tokens=TOKENS)
    again = [page - 1 for page in FAR]
    assert kvlink.relayout_pages(small, NEAR, large, again, num_tokens=TOKENS, digest=True) == there
    assert content(large, again) == content(small, NEAR)
    kvlink.copy_pages(large, FAR, [page - 2 for page in FAR])
    assert content(large, [page - 2 for page in FAR]) == content(small, NEAR)


@pytest.mark.parametrize("path", ["host_shm", "ucx"])
def test_transfers(small: KVPool, path: str) -> None:
    with Endpoint("a", secret=SECRET) as sender, Endpoint("b", secret=SECRET) as owner:
        pools = [make(NUM_PAGES, shared=True) for _ in range(2)]
        fill(pools[0], FAR)
        sender.register(pools[0])
        owner.register(pools[1])
        link = sender.connect(owner.address, require=path)
        granted = FAR[::-1]
        grant = owner.grant(granted, TOKENS)
        link.push(FAR, grant.to_bytes())
        grant.wait(20)
        assert content(pools[1], granted) == content(small, NEAR)
        offer = owner.offer(granted, TOKENS)
        fetched = [page - 1 for page in FAR]
        link.pull(offer.to_bytes(), fetched).wait_arrived(20)
        assert content(pools[0], fetched) == content(small, NEAR)
