"""Whoever dies or stops, at whatever step: the survivor has its pages back and goes on."""

from __future__ import annotations

import signal

import pytest
from receiving import PAGES, SPEC, TOKENS, Receiver, eventually, new_sender

from kvlink.testing.transfer_peer import Peer, open_endpoint
from kvlink.transfer import (
    GrantExpired,
    GrantRevoked,
    LinkClosed,
    PeerLost,
    TransferStatus,
    TransferTimeout,
)

pytestmark = [pytest.mark.two_process, pytest.mark.timeout(60)]


@pytest.mark.parametrize("step", ["connected", "begun", "one layer", "inside", "complete"])
def test_sender_dies(receiver: Receiver, step: str) -> None:
    with new_sender(receiver) as peer:
        grant = receiver.grant(ttl=2.0 if step == "connected" else 30.0)
        if step in ("begun", "one layer", "complete"):
            transfer = peer.call("begin", PAGES, grant.to_bytes())
            for layer in {"begun": (), "one layer": (0,), "complete": range(4)}[step]:
                peer.call("push_layer", transfer, layer)
                grant.wait_layer(layer, 10)
            peer.call("wait_outside", transfer)
        if step == "inside":
            assert peer.call("enter", grant.to_bytes()) == "OK"
        peer.kill()
    eventually(lambda: not receiver.endpoint.links)
    if step == "complete":
        assert grant.wait(10).rows == TOKENS * 4 * 4 * 2
        assert not receiver.returned
    else:
        with pytest.raises(GrantExpired if step == "connected" else PeerLost):
            grant.wait(10)
        grant.wait_released(10)
        receiver.gave_back(grant)
    with new_sender(receiver) as peer:
        receiver.arrive(peer)


@pytest.mark.parametrize("step", ["begun", "one layer", "finished"])
def test_receiver_dies(step: str, path: str) -> None:
    endpoint = open_endpoint("prefill", path)
    pool = SPEC.build()
    endpoint.register(pool)
    SPEC.fill(pool, PAGES, TOKENS)
    with endpoint:
        with Peer(SPEC, path=path) as peer:
            link = endpoint.connect(peer.address)
            transfer = link.begin(PAGES, peer.call("grant", PAGES, TOKENS))
            for layer in {"begun": (), "one layer": (0,), "finished": range(4)}[step]:
                transfer.push_layer(layer)
            if step == "finished":
                transfer.finish()
                transfer.wait_source_reusable(10)
            peer.kill()
        with pytest.raises(PeerLost):
            transfer.wait_arrived(10)
        transfer.wait_source_reusable(10)
        eventually(lambda: link.state.startswith("reconnecting"))
        with pytest.raises(PeerLost):
            link.begin(PAGES, b"")
        link.close()
        with pytest.raises(LinkClosed):
            link.begin(PAGES, b"")
        with Peer(SPEC, path=path) as peer:
            grant = peer.call("grant", PAGES, TOKENS)
            endpoint.connect(peer.address).push(PAGES, grant).wait_source_reusable(10)
            peer.call("wait", grant)


@pytest.mark.parametrize("path", ["host_shm"], indirect=True, scope="module")
def test_adopter_dies(receiver: Receiver) -> None:
    SPEC.fill(receiver.pool, PAGES, TOKENS)
    with new_sender(receiver) as peer:
        offer = receiver.endpoint.offer(PAGES, TOKENS)
        peer.call("adopt", offer.to_bytes())
        offer.revoke()
        offer.wait_released(20)  # the adopter saw it and let go
        with pytest.raises(GrantRevoked):
            peer.call("check_lease", offer.to_bytes())
        second = receiver.endpoint.offer(PAGES, TOKENS)
        peer.call("adopt", second.to_bytes())
        peer.kill()
        second.wait_released(20)
        assert second.status == TransferStatus.PEER_LOST


@pytest.mark.parametrize("path", ["host_shm"], indirect=True, scope="module")
def test_owner_of_adopted_pages_dies(receiver: Receiver, path: str) -> None:
    with Peer(SPEC, path=path) as peer:
        link = receiver.endpoint.connect(peer.address)
        lease = link.adopt(peer.call("offer", PAGES, TOKENS))
        assert lease.valid
        peer.kill()
        eventually(lambda: link.gone)
        assert not lease.valid
        with pytest.raises(PeerLost):
            lease.check()
        assert lease.pages.tolist() == PAGES  # still mapped: no crash


@pytest.mark.parametrize("path", ["host_shm"], indirect=True, scope="module")
def test_lease_ends_at_its_deadline(receiver: Receiver, sender: Peer) -> None:
    sender.call("connect", receiver.address)
    offer = receiver.endpoint.offer(PAGES, TOKENS)
    sender.call("adopt", offer.to_bytes())
    sender.call("check_lease", offer.to_bytes())
    assert offer.extend(0.1)
    offer.wait_released(20)
    assert offer.status == TransferStatus.EXPIRED
    with pytest.raises(GrantExpired):
        sender.call("check_lease", offer.to_bytes())


@pytest.mark.parametrize("path", ["host_shm"], indirect=True, scope="module")
def test_a_stopped_adopter_keeps_the_pages_quarantined(receiver: Receiver) -> None:
    with new_sender(receiver) as peer:
        offer = receiver.endpoint.offer(PAGES, TOKENS)
        peer.call("adopt", offer.to_bytes())
        peer.signal(signal.SIGSTOP)
        assert offer.extend(0.1)
        eventually(lambda: offer.status == TransferStatus.EXPIRED)
        with pytest.raises(TransferTimeout):
            offer.wait_released(0.3)
        peer.signal(signal.SIGCONT)
        offer.wait_released(20)
