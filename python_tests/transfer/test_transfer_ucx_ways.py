"""ucx: which way chunks take, and that each brings the same bytes."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import replace

import pytest
from receiving import eventually

from kvlink.testing.transfer_peer import Peer, open_endpoint, reachable
from kvlink.testing.transfer_pool import PoolSpec, pool_bytes
from kvlink.transfer import GrantRevoked, TransferTimeout

pytestmark = [pytest.mark.two_process, pytest.mark.timeout(60)]

# Whole pages are runs of 32 KiB, in either order: long enough to be put and got, or to be sent from
# where they lie (if in the order of a chunk, which is that of tokens).
LONG = PoolSpec(page_size=128, num_pages=12)
PAGES, OTHERS, TOKENS = [5, 3, 9], [1, 2, 4], 300
LAYERS = 4


@pytest.fixture(scope="module", params=["ucx", "ucx_tcp", "ucx_tcp puts"])
def setting(request: pytest.FixtureRequest) -> Iterator[str]:
    """A path; and whether long runs are put and got over TCP, too, as they are over RDMA."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param.endswith("puts"):
            patch.setenv("KVLINK_UCX_PUT_OVER_TCP", "1")
        yield str(request.param)


@pytest.fixture(scope="module")
def path(setting: str) -> str:
    return setting.split()[0]


@pytest.fixture(scope="module", params=["nhd", "hnd"])
def source(path: str, request: pytest.FixtureRequest) -> Iterator[tuple[PoolSpec, Peer]]:
    spec = replace(LONG, kind=request.param)
    with Peer(spec, path=path) as peer:
        peer.call("fill", PAGES, TOKENS)
        yield spec, peer


def way(setting: str, order: str, same: bool) -> str:
    """How the chunks of a push go."""
    if setting == "ucx":
        return "in_place_chunks"
    if setting.endswith("puts") and same:
        return "direct_chunks"
    return "gathered_chunks" if order == "nhd" else "copied_chunks"


@pytest.mark.parametrize("same", [True, False], ids=["same layout", "other pages"])
def test_push(source: tuple[PoolSpec, Peer], setting: str, path: str, same: bool) -> None:
    spec, peer = source
    dst = spec if same else replace(spec, page_size=10, num_pages=60)
    pages = OTHERS if same else list(range(31, 1, -1))
    with open_endpoint("decode", path) as endpoint:
        pool = dst.build()
        endpoint.register(pool)
        peer.call("connect", reachable(endpoint))
        grant = endpoint.grant(pages, TOKENS)
        transfer = peer.call("push", PAGES, grant.to_bytes())
        grant.wait(10)
        peer.call("wait_arrived", transfer)
        counters = peer.call("counters")
        want = dst.build()
        dst.fill(want, pages, TOKENS)
        assert pool_bytes(pool).tobytes() == pool_bytes(want).tobytes()
        taken = {name for name, count in counters.items() if count and name.endswith("_chunks")}
        expected = way(setting, spec.kind, same)
        assert taken == {expected}
        assert counters[expected] >= LAYERS
        peer.call("close_link")


def test_pull(source: tuple[PoolSpec, Peer], setting: str, path: str) -> None:
    spec, peer = source
    with open_endpoint("decode", path) as endpoint:
        pool = spec.build()
        endpoint.register(pool)
        link = endpoint.connect(peer.address)
        offer = peer.call("offer", PAGES, TOKENS)
        link.pull(offer, OTHERS).wait_arrived(10)
        assert peer.call("wait_released", offer) == "OK"
        want = spec.build()
        spec.fill(want, OTHERS, TOKENS)
        assert pool_bytes(pool).tobytes() == pool_bytes(want).tobytes()
        counters = link.path_link.counters()
        assert (counters["direct_chunks"] >= LAYERS) == setting.endswith("puts")


WINDOW = 4  # chunks of a transfer that may be under way


def test_a_receiver_that_stands_still_holds_the_sender_up(path: str) -> None:
    """Credits: no more chunks than the window has leave before the first is answered."""
    spec = PoolSpec(layers=tuple(range(3 * WINDOW)))  # a chunk a layer
    with (
        open_endpoint("prefill", path) as endpoint,
        Peer(spec, path=path) as peer,
    ):
        pool = spec.build()
        endpoint.register(pool, spec.shard)
        spec.fill(pool, PAGES, 40)
        link = endpoint.connect(peer.address)
        grant = peer.call("grant", OTHERS, 40)
        transfer = link.begin(PAGES, grant)

        def left() -> int:
            counters = link.path_link.counters()
            return sum(count for name, count in counters.items() if name.endswith("_chunks"))

        peer.signal(signal.SIGSTOP)
        for layer in spec.layers:
            transfer.push_layer(layer)
        transfer.finish()
        eventually(lambda: link.path_link.counters()["credit_waits"])
        assert left() == WINDOW
        with pytest.raises(TransferTimeout):
            transfer.wait_source_reusable(0.3)
        assert left() == WINDOW
        peer.signal(signal.SIGCONT)
        assert peer.call("wait", grant) == OTHERS
        transfer.wait_arrived(10)
        assert left() == len(spec.layers)
        want = spec.build()
        spec.fill(want, OTHERS, 40)
        assert peer.call("content") == pool_bytes(want).tobytes()


def test_a_put_that_was_begun_before_the_revocation(
    source: tuple[PoolSpec, Peer], setting: str, path: str
) -> None:
    """It lands in pages that are still quarantined, or not at all."""
    spec, peer = source
    returned: list[bytes] = []
    with open_endpoint("decode", path) as endpoint:
        pool = spec.build()
        before = pool_bytes(pool).tobytes()
        endpoint.register(pool)
        peer.call("connect", reachable(endpoint))
        grant = endpoint.grant(
            OTHERS, TOKENS, on_release=lambda _: returned.append(pool_bytes(pool).tobytes())
        )
        transfer = peer.call("begin", PAGES, grant.to_bytes())
        assert peer.call("enter", grant.to_bytes()) == "OK"
        assert grant.revoke()
        with pytest.raises(TransferTimeout):
            grant.wait_released(0.2)
        peer.call("leave")
        grant.wait_released(10)
        eventually(lambda: returned)
        landed = returned[0] != before
        assert landed == (way(setting, spec.kind, True) == "direct_chunks")
        assert pool_bytes(pool).tobytes() == returned[0]
        with pytest.raises(GrantRevoked):
            peer.call("wait_arrived", transfer)
        peer.call("wait_source_reusable", transfer)
        peer.call("close_link")
