"""Push, pull and adopt between two processes: what arrives is what the reference says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from kvlink.reference.relayout_pages import relayout_pages
from kvlink.testing.transfer_peer import Peer, open_endpoint, reachable
from kvlink.testing.transfer_pool import PoolSpec, pool_bytes
from kvlink.transfer import AlreadyWriting, TransferTimeout

pytestmark = [pytest.mark.two_process, pytest.mark.timeout(60)]

SRC = PoolSpec()
SRC_PAGES = [5, 3, 9]
NUM_TOKENS = 40
DESTINATIONS = {
    "same": SRC,
    "pages of 64": replace(SRC, page_size=64, num_pages=8),
    "pages of 7, HND": replace(SRC, page_size=7, kind="hnd"),
    "packed bfloat16": replace(SRC, kind="packed", dtype="bfloat16"),
    "int8, scale per row": replace(SRC, dtype="int8", scale="token_head", kind="hnd"),
    "fp8, scale per head": replace(SRC, dtype="float8_e4m3", scale="head"),
    "heads 1 and 2 of layers 3 and 1": replace(SRC, kv_heads=(1, 3), layers=(3, 1)),
}


def dst_pages(spec: PoolSpec, first: int = 1) -> list[int]:
    """Pages in falling order, enough for the request."""
    return list(range(first, first + -(-NUM_TOKENS // spec.page_size)))[::-1]


def expected(dst: PoolSpec, pages: list[int], *sources: PoolSpec) -> bytes:
    """The destination's whole memory, by the reference."""
    pool = dst.build()
    for source in sources:
        src = source.build()
        source.fill(src, SRC_PAGES, NUM_TOKENS)
        relayout_pages(
            src, SRC_PAGES, pool, pages, num_tokens=NUM_TOKENS, src_shard=source.shard,
            dst_shard=dst.shard,
        )  # fmt: skip
    return pool_bytes(pool).tobytes()


@pytest.fixture(scope="module")
def source(path: str) -> Iterator[Peer]:
    """A peer that holds the request."""
    with Peer(SRC, path=path) as peer:
        peer.call("fill", SRC_PAGES, NUM_TOKENS)
        yield peer


@pytest.mark.parametrize("name", DESTINATIONS)
def test_push_of_a_whole_request(source: Peer, name: str, path: str) -> None:
    spec = DESTINATIONS[name]
    with open_endpoint("decode", path) as endpoint:
        pool = spec.build()
        endpoint.register(pool, spec.shard)
        assert source.call("connect", reachable(endpoint)) == path.partition("_tcp")[0]
        pages = dst_pages(spec)
        grant = endpoint.grant(pages, NUM_TOKENS)
        transfer = source.call("push", SRC_PAGES, grant.to_bytes())
        arrival = grant.wait(10)
        source.call("wait_source_reusable", transfer)
        source.call("wait_arrived", transfer)
        assert arrival.pages.tolist() == pages
        assert arrival.digest_verified
        assert arrival.rows == NUM_TOKENS * len(spec.layers) * len(spec.shard.kv_heads) * 2
        assert pool_bytes(pool).tobytes() == expected(spec, pages, SRC)
        assert grant.wait(0) is arrival
        source.call("close_link")


def test_push_in_many_pieces(path: str) -> None:
    """16 MiB: where threads move apart, each takes several pieces of each layer."""
    spec = PoolSpec(head_dim=64, num_pages=128)
    pages = list(range(spec.num_pages))[::-1]
    num_tokens = spec.num_pages * spec.page_size
    with Peer(spec, path=path) as peer, open_endpoint("decode", path) as endpoint:
        peer.call("fill", pages, num_tokens)
        pool, same = spec.build(), spec.build()
        spec.fill(same, pages, num_tokens)
        endpoint.register(pool, spec.shard)
        peer.call("connect", reachable(endpoint))
        for _ in range(2):
            grant = endpoint.grant(pages, num_tokens)
            peer.call("push", pages, grant.to_bytes())
            assert grant.wait(30).digest_verified
            assert pool_bytes(pool).tobytes() == pool_bytes(same).tobytes()
            pool_bytes(pool)[:] = 0
        peer.call("close_link")


@pytest.mark.parametrize("name", ["pages of 7, HND", "int8, scale per row"])
def test_pull(source: Peer, name: str, path: str) -> None:
    spec = DESTINATIONS[name]
    with open_endpoint("decode", path) as endpoint:
        pool = spec.build()
        endpoint.register(pool, spec.shard)
        link = endpoint.connect(source.address)
        offer = source.call("offer", SRC_PAGES, NUM_TOKENS, 30.0, 2)
        for first in (1, 12):
            pages = dst_pages(spec, first)
            transfer = link.pull(offer, pages)
            transfer.wait_arrived(10)
            assert transfer.source_reusable
        both = spec.build()
        src = SRC.build()
        SRC.fill(src, SRC_PAGES, NUM_TOKENS)
        for first in (1, 12):
            relayout_pages(src, SRC_PAGES, both, dst_pages(spec, first), num_tokens=NUM_TOKENS)
        assert pool_bytes(pool).tobytes() == pool_bytes(both).tobytes()
        assert source.call("wait_released", offer) == "OK"


def test_layers_in_any_order_are_ready_one_by_one(source: Peer, path: str) -> None:
    with open_endpoint("decode", path) as endpoint:
        pool = SRC.build()
        endpoint.register(pool)
        source.call("connect", reachable(endpoint))
        grant = endpoint.grant([1, 2, 4], NUM_TOKENS)
        transfer = source.call("begin", SRC_PAGES, grant.to_bytes())
        for layer in (2, 0, 3):
            with pytest.raises(TransferTimeout):
                grant.wait_layer(layer, 0)
            source.call("push_layer", transfer, layer)
            grant.wait_layer(layer, 10)
            reference = SRC.build()
            SRC.fill(reference, [1, 2, 4], NUM_TOKENS)
            for plane in ("k", "v"):
                got = np.from_dlpack(getattr(pool, plane)(layer)).view(np.int32)
                want = np.from_dlpack(getattr(reference, plane)(layer)).view(np.int32)
                assert (got == want).all()
        assert grant.poll() is None
        source.call("push_layer", transfer, 1, 33)  # a chunk of tokens, then the rest
        with pytest.raises(TransferTimeout):
            grant.wait_layer(1, 0.05)
        source.call("push_layer", transfer, 1)
        grant.wait_layer(1, 10)
        grant.wait(10)  # before the sender has said finish
        source.call("finish", transfer)
        source.call("wait_arrived", transfer)
        assert pool_bytes(pool).tobytes() == expected(SRC, [1, 2, 4], SRC)


def test_finish_needs_every_layer(source: Peer, path: str) -> None:
    with open_endpoint("decode", path) as endpoint:
        endpoint.register(SRC.build())
        source.call("connect", reachable(endpoint))
        grant = endpoint.grant([1, 2, 4], NUM_TOKENS)
        transfer = source.call("begin", SRC_PAGES, grant.to_bytes())
        source.call("push_layer", transfer, 0)
        with pytest.raises(AssertionError, match=r"finish: .* expected 40 tokens; got 0"):
            source.call("finish", transfer)
        with pytest.raises(AlreadyWriting):
            source.call("begin", SRC_PAGES, grant.to_bytes())
        source.call("close_link")


def test_two_ranks_fill_one_grant(path: str) -> None:
    ranks = [replace(SRC, kv_heads=(0, 2)), replace(SRC, kv_heads=(2, 4), kind="hnd")]
    dst = DESTINATIONS["pages of 7, HND"]
    with (
        open_endpoint("decode", path) as endpoint,
        Peer(ranks[0], path=path) as first,
        Peer(ranks[1], path=path) as second,
    ):
        pool = dst.build()
        endpoint.register(pool)
        pages = dst_pages(dst)
        grant = endpoint.grant(pages, NUM_TOKENS)
        for peer in (first, second):
            peer.call("fill", SRC_PAGES, NUM_TOKENS)
            peer.call("connect", reachable(endpoint))
        one = first.call("push", SRC_PAGES, grant.to_bytes())
        first.call("wait_source_reusable", one)
        assert grant.poll() is None  # half of the rows
        first.call("close_link")  # its part is complete, so this loses nothing
        two = second.call("push", SRC_PAGES, grant.to_bytes())
        grant.wait(10)
        second.call("wait_arrived", two)
        assert pool_bytes(pool).tobytes() == expected(dst, pages, *ranks)


@pytest.mark.parametrize("kind", ["latent", "opaque"])
def test_other_forms(kind: str, path: str) -> None:
    src = PoolSpec(kind=kind, kv_heads=(0, 1), page_size=1 if kind == "opaque" else 16)
    dst = src if kind == "opaque" else replace(src, page_size=5)
    tokens = 3 if kind == "opaque" else NUM_TOKENS
    pages = [7, 2, 6] if kind == "opaque" else dst_pages(dst)
    with open_endpoint("decode", path) as endpoint, Peer(src, path=path) as peer:
        pool = dst.build()
        endpoint.register(pool)
        peer.call("fill", SRC_PAGES, tokens)
        peer.call("connect", reachable(endpoint))
        grant = endpoint.grant(pages, tokens)
        peer.call("push", SRC_PAGES, grant.to_bytes())
        grant.wait(10)
        reference = dst.build()
        dst.fill(reference, pages, tokens)
        assert pool_bytes(pool).tobytes() == pool_bytes(reference).tobytes()


def test_layers_that_share_memory_move_once(path: str) -> None:
    spec = replace(SRC, layers=(4, 5, 6, 7), layer_map=(0, 1, 0, 1))
    with open_endpoint("decode", path) as endpoint, Peer(spec, path=path) as peer:
        pool = spec.build()
        endpoint.register(pool, spec.shard)
        peer.call("fill", SRC_PAGES, NUM_TOKENS)
        peer.call("connect", reachable(endpoint))
        grant = endpoint.grant([1, 2, 4], NUM_TOKENS)
        transfer = peer.call("begin", SRC_PAGES, grant.to_bytes())
        peer.call("push_layer", transfer, 1)
        grant.wait_layer(3, 10)
        peer.call("push_layer", transfer, 2)
        peer.call("push_layer", transfer, 3)  # moved with layer 1
        peer.call("finish", transfer)
        assert grant.wait(10).rows == NUM_TOKENS * 2 * 4 * 2
        reference = spec.build()
        spec.fill(reference, [1, 2, 4], NUM_TOKENS)
        assert pool_bytes(pool).tobytes() == pool_bytes(reference).tobytes()


@pytest.mark.parametrize("path", ["host_shm"], indirect=True, scope="module")
def test_adopt_moves_nothing(source: Peer, path: str) -> None:
    with open_endpoint("decode", path) as endpoint:
        link = endpoint.connect(source.address)
        before = source.call("content")
        offer = source.call("offer", SRC_PAGES, NUM_TOKENS)
        lease = link.adopt(offer)
        reference = SRC.build()
        SRC.fill(reference, SRC_PAGES, NUM_TOKENS)
        assert lease.num_tokens == NUM_TOKENS
        assert lease.pages.tolist() == SRC_PAGES
        assert pool_bytes(lease.pool).tobytes() == before == pool_bytes(reference).tobytes()
        with pytest.raises(AlreadyWriting):
            link.adopt(offer)
        endpoint.register(SRC.build())
        with pytest.raises(AlreadyWriting):
            link.pull(offer, [1, 2, 3])
        with pytest.raises(TransferTimeout):
            source.call("wait_released", offer, 0.05)
        assert lease.valid
        lease.release()
        lease.release()
        assert not lease.valid
        assert source.call("wait_released", offer) == "OK"


def test_both_ends_of_a_link_move(source: Peer, path: str) -> None:
    with open_endpoint("decode", path) as endpoint:
        pool = SRC.build()
        endpoint.register(pool)
        SRC.fill(pool, SRC_PAGES, NUM_TOKENS, 3)
        source.call("connect", reachable(endpoint))
        link = endpoint.accept(20)
        grant = source.call("grant", [20, 21, 22], NUM_TOKENS)
        transfer = link.push(SRC_PAGES, grant)
        assert source.call("wait", grant) == [20, 21, 22]
        transfer.wait_arrived(20)
        offer = source.call("offer", [20, 21, 22], NUM_TOKENS)
        link.pull(offer, [30, 31, 1]).wait_arrived(20)
        for layer in range(4):
            k = np.from_dlpack(pool.k(layer))
            assert (k[[30, 31, 1]].reshape(48, -1)[:40] == k[SRC_PAGES].reshape(48, -1)[:40]).all()


def test_region_registered_after_the_link(source: Peer, path: str) -> None:
    with open_endpoint("decode", path) as endpoint:
        source.call("connect", reachable(endpoint))
        pool = SRC.build()
        endpoint.register(pool)
        grant = endpoint.grant([1, 2, 4], NUM_TOKENS)
        source.call("push", SRC_PAGES, grant.to_bytes())
        grant.wait(10)
        assert pool_bytes(pool).tobytes() == expected(SRC, [1, 2, 4], SRC)
