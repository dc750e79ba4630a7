"""Peers and pools that come, go and change sides while traffic flows."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from receiving import PAGES, SPEC, TOKENS, Receiver, eventually, new_sender

from kvlink.errors import InvalidArgument
from kvlink.testing.transfer_peer import SECRET, Peer
from kvlink.testing.transfer_pool import PoolSpec
from kvlink.transfer import (
    Endpoint,
    Grant,
    GrantRevoked,
    PeerLost,
    TransferCancelled,
    TransferStatus,
    TransferTimeout,
    UnknownRegion,
)
from kvlink.transfer.regions import MAX_REGIONS

pytestmark = [pytest.mark.two_process, pytest.mark.timeout(120)]
OTHER = [20, 21, 22]


class Traffic:
    """Arrivals of one request after the other, in a thread; any failure ends it and is told."""

    def __init__(self, receiver: Receiver, peer: Peer) -> None:
        self.count = 0
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(receiver, peer))
        self._thread.start()

    def _run(self, receiver: Receiver, peer: Peer) -> None:
        try:
            while not self._stop.is_set():
                receiver.arrive(peer)
                self.count += 1
        except BaseException as error:
            self._error = error

    def goes_on(self) -> None:
        """Another request arrives, begun after now."""
        seen = self.count
        eventually(lambda: self.count > seen + 1 or self._error is not None)
        assert self._error is None, self._error

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(30)
        assert not self._thread.is_alive()
        assert self._error is None, self._error


@pytest.fixture
def traffic(receiver: Receiver) -> Iterator[Traffic]:
    with new_sender(receiver) as peer:
        flowing = Traffic(receiver, peer)
        yield flowing
        flowing.stop()


def test_peers_come_and_go(receiver: Receiver, traffic: Traffic) -> None:
    for turn in range(3):
        with new_sender(receiver) as peer:
            grant = receiver.grant(OTHER)
            peer.call("push", PAGES, grant.to_bytes())
            grant.wait(10)
            traffic.goes_on()
            if turn == 1:
                peer.kill()
        eventually(lambda: len(receiver.endpoint.links) == 1)
        traffic.goes_on()


def test_who_granted_now_pushes(receiver: Receiver, traffic: Traffic) -> None:
    """Both ways over the links that there are, and back."""
    receiver.endpoint.accept(10)  # of the traffic
    region = receiver.endpoint.register(SPEC.build())
    SPEC.fill(region.pool, OTHER, TOKENS, seed=5)
    with Peer(SPEC) as peer:
        for _ in range(3):
            peer.call("connect", receiver.endpoint.address)
            link = None
            while link is None or link.closed or link.peer_name != "peer":
                link = receiver.endpoint.accept(10)
            grant = peer.call("grant", PAGES, TOKENS)
            link.push(OTHER, grant, region=region).wait_source_reusable(10)
            assert peer.call("wait", grant) == PAGES
            back = receiver.endpoint.grant(PAGES, TOKENS, region=region)
            peer.call("push", PAGES, back.to_bytes())
            back.wait(10)
            for layer in range(4):
                k = np.from_dlpack(region.pool.k(layer))
                for sent, returned in zip(OTHER[:2], PAGES[:2], strict=True):
                    assert (k[sent].view(np.int32) == k[returned].view(np.int32)).all()
            traffic.goes_on()


def test_pools_come_while_traffic_flows(receiver: Receiver, traffic: Traffic) -> None:
    with new_sender(receiver) as peer:
        for _ in range(3):
            region = receiver.endpoint.register(SPEC.build())
            grant = receiver.endpoint.grant(PAGES, TOKENS, region=region)
            peer.call("push", PAGES, grant.to_bytes())
            grant.wait(10)
            receiver.endpoint.unregister(region)
            traffic.goes_on()


# --- unregister --------------------------------------------------------------------------------


def test_unregister_revokes_and_tells(receiver: Receiver) -> None:
    other = receiver.endpoint.register(PoolSpec(num_pages=8).build())
    with new_sender(receiver) as peer:
        grant = receiver.grant()
        offer = receiver.endpoint.offer(OTHER, TOKENS, region=receiver.region)
        beside = receiver.endpoint.grant([1, 2, 3], TOKENS, region=other)
        transfer = peer.call("begin", PAGES, grant.to_bytes())
        peer.call("push_layer", transfer, 0)
        grant.wait_layer(0, 10)
        receiver.endpoint.unregister(receiver.region)
        assert grant.released
        assert offer.released
        receiver.gave_back(grant)
        assert offer.status == TransferStatus.REVOKED
        with pytest.raises(GrantRevoked):
            peer.call("wait_arrived", transfer)
        eventually(lambda: "has no region 0 registered" in refusal(peer, grant))  # it was told
        with pytest.raises(InvalidArgument, match="not registered"):
            receiver.endpoint.grant(PAGES, TOKENS, region=receiver.region)
        with pytest.raises(InvalidArgument, match="not registered"):
            receiver.endpoint.unregister(receiver.region)
        peer.call("push", PAGES, beside.to_bytes())
        beside.wait(10)


def refusal(peer: Peer, grant: Grant) -> str:
    with pytest.raises((GrantRevoked, UnknownRegion)) as told:
        peer.call("begin", PAGES, grant.to_bytes())
    return str(told.value)


def test_unregister_ends_own_transfers(receiver: Receiver) -> None:
    """What moves from the pool is cancelled, and the pool is left before the call returns."""
    with Peer(SPEC) as peer:
        link = receiver.endpoint.connect(peer.address)
        transfer = link.begin(PAGES, peer.call("grant", PAGES, TOKENS))
        transfer.push_layer(0)
        receiver.endpoint.unregister(receiver.pool)
        assert transfer.source_reusable
        with pytest.raises(TransferCancelled):
            transfer.wait_arrived(10)


def test_unregister_with_a_peer_stopped_inside(receiver: Receiver) -> None:
    with new_sender(receiver) as peer:
        grant = receiver.grant()
        assert peer.call("enter", grant.to_bytes()) == "OK"
        with pytest.raises(TransferTimeout):
            receiver.endpoint.unregister(receiver.region, timeout=0.1)
        assert not grant.released
        peer.call("leave")
        grant.wait_released(10)


def test_new_peers_hear_only_of_what_is_registered() -> None:
    with contextlib.ExitStack() as stack:
        owner = stack.enter_context(Endpoint("owner", secret=SECRET))
        gone = owner.register(SPEC.build())
        kept = owner.register(SPEC.build())
        before = stack.enter_context(Endpoint("before", secret=SECRET)).connect(owner.address)
        owner.unregister(gone)
        after = stack.enter_context(Endpoint("after", secret=SECRET)).connect(owner.address)
        for link in (before, after):
            eventually(lambda link=link: set(link._last.remote.regions) == {kept.region_id})


def test_regions_come_back_with_a_session() -> None:
    """What was registered and unregistered while the peer was away is told when it is back."""
    with Endpoint("prefill", secret=SECRET) as prefill:
        address: list[bytes] = []
        first = Endpoint("decode", secret=SECRET)
        address.append(first.address)
        gone = prefill.register(SPEC.build())
        link = prefill.connect(lambda: address[0])
        first.close()
        eventually(lambda: link.gone)
        with pytest.raises(PeerLost):
            link.query(bytes(16))
        prefill.unregister(gone)
        kept = prefill.register(SPEC.build())
        with Endpoint("decode", secret=SECRET) as second:
            address[0] = second.address
            theirs = second.accept(20)
            assert set(theirs._last.remote.regions) == {kept.region_id}


def test_regions_have_a_limit_and_leaving_makes_room() -> None:
    small = PoolSpec(num_pages=1, layers=(0,), shared=False)
    with Endpoint("owner", secret=SECRET) as owner, Endpoint("peer", secret=SECRET) as peer:
        regions = [owner.register(small.build(), small.shard) for _ in range(MAX_REGIONS)]
        with pytest.raises(InvalidArgument, match="at most 256 registered"):
            owner.register(small.build(), small.shard)
        link = peer.connect(owner.address)
        for _ in range(3):
            owner.unregister(regions.pop(0))
            regions.append(owner.register(small.build(), small.shard))
        wanted = {region.region_id for region in regions}
        eventually(lambda: set(link._last.remote.regions) == wanted)
        assert link.query(bytes(16)) is None
