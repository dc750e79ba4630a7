"""Whatever dies, stops, lies or comes late: nobody reads foreign KV, and every page comes back."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from kvlink import _C
from kvlink.testing.transfer_peer import SECRET, Peer
from kvlink.testing.transfer_pool import PoolSpec, pool_bytes
from kvlink.transfer import (
    Arrival,
    DigestMismatch,
    Endpoint,
    GenerationMismatch,
    Grant,
    GrantExpired,
    GrantRevoked,
    InvalidDescriptor,
    LinkClosed,
    OutOfSlots,
    PeerLost,
    RowCountMismatch,
    StaleTransfer,
    TransferCancelled,
    TransferStatus,
    TransferTimeout,
    UnknownRegion,
)

pytestmark = [pytest.mark.two_process, pytest.mark.timeout(60)]

SPEC = PoolSpec()
PAGES = [5, 3, 9]
TOKENS = 40


class Receiver:
    """An endpoint with a pool, and how often each grant gave its pages back."""

    def __init__(self) -> None:
        self.endpoint = Endpoint("decode", secret=SECRET)
        self.pool = SPEC.build()
        self.region = self.endpoint.register(self.pool)
        self.returned: list[bytes] = []

    def grant(self, pages: list[int] | None = None, ttl: float = 30.0) -> Grant:
        def note(released: Grant) -> None:
            self.returned.append(released.transfer_id)

        return self.endpoint.grant(pages or PAGES, TOKENS, ttl, on_release=note)

    def arrive(self, peer: Peer) -> Arrival:
        """A new request, from the first byte to the last."""
        grant = self.grant()
        peer.call("push", PAGES, grant.to_bytes())
        arrival = grant.wait(10)
        want = SPEC.build()
        SPEC.fill(want, PAGES, TOKENS)
        for layer in range(4):
            got, expected = (np.from_dlpack(p.k(layer))[PAGES] for p in (self.pool, want))
            assert (got.view(np.int32) == expected.view(np.int32)).all()
        return arrival


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.endpoint.close()


@pytest.fixture(scope="module")
def sender() -> Iterator[Peer]:
    """A peer that outlives the tests; those that kill one make their own."""
    with Peer(SPEC) as peer:
        peer.call("fill", PAGES, TOKENS)
        yield peer


def new_sender(receiver: Receiver) -> Peer:
    peer = Peer(SPEC)
    peer.call("fill", PAGES, TOKENS)
    peer.call("connect", receiver.endpoint.address)
    return peer


def eventually(condition: Callable[[], Any], timeout: float = 10.0) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


# --- wrong bytes -----------------------------------------------------------------------------


@pytest.mark.parametrize("plane", ["k", "v"])
@pytest.mark.parametrize("at", [(5, 0, 0, 0), (9, 7, 3, 15)], ids=["first", "last"])
def test_a_flipped_bit_is_no_arrival(
    receiver: Receiver, sender: Peer, plane: str, at: tuple[int, int, int, int]
) -> None:
    sender.call("connect", receiver.endpoint.address)
    grant = receiver.grant()
    transfer = sender.call("push", PAGES, grant.to_bytes())
    sender.call("wait_source_reusable", transfer)
    np.from_dlpack(getattr(receiver.pool, plane)(3)).view(np.int32)[at] ^= 1 << 3
    for _ in range(2):
        with pytest.raises(DigestMismatch):
            grant.wait(10)
    with pytest.raises(DigestMismatch):
        sender.call("wait_arrived", transfer)
    assert grant.released
    assert receiver.returned == [grant.transfer_id]
    receiver.arrive(sender)


def test_slots_behind_the_request_do_not_matter(receiver: Receiver, sender: Peer) -> None:
    sender.call("connect", receiver.endpoint.address)
    grant = receiver.grant()
    transfer = sender.call("push", PAGES, grant.to_bytes())
    sender.call("wait_source_reusable", transfer)
    np.from_dlpack(receiver.pool.k(3)).view(np.int32)[9, 8:] = 0
    assert grant.wait(10).rows == TOKENS * 4 * 4 * 2


def test_page_reuse_during_a_transfer(receiver: Receiver, sender: Peer) -> None:
    sender.call("connect", receiver.endpoint.address)
    grant = receiver.grant()
    transfer = sender.call("push", PAGES, grant.to_bytes())
    sender.call("wait_source_reusable", transfer)
    receiver.region.bump_generations([3])
    with pytest.raises(GenerationMismatch):
        grant.wait(10)
    with pytest.raises(GenerationMismatch):
        sender.call("wait_arrived", transfer)
    assert receiver.returned == [grant.transfer_id]
    receiver.arrive(sender)


def test_page_reuse_during_a_pull(receiver: Receiver, sender: Peer) -> None:
    generations = np.zeros(SPEC.num_pages, np.uint32)
    pool = SPEC.build()
    region = receiver.endpoint.register(pool, generations=generations)
    link = receiver.endpoint.connect(sender.address)
    offer = sender.call("offer", PAGES, TOKENS)
    transfer = link._start(_C.SlotKind.OFFER, offer, PAGES, region)
    generations[9] += 1
    for part in range(4):
        transfer.post_part(part)
    transfer.finish()
    with pytest.raises(GenerationMismatch):
        transfer.wait_arrived(10)
    # The offer was not used up.
    link.pull(offer, PAGES, region=region).wait_arrived(10)
    assert sender.call("wait_released", offer) == "OK"


def test_the_same_rows_twice(receiver: Receiver, sender: Peer) -> None:
    sender.call("connect", receiver.endpoint.address)
    grant = receiver.grant()
    for _ in range(2):
        transfer = sender.call("push", PAGES, grant.to_bytes())
        sender.call("wait_source_reusable", transfer)
    with pytest.raises(RowCountMismatch):
        grant.wait(10)


# --- late writers ----------------------------------------------------------------------------


def poison(receiver: Receiver) -> bytes:
    pool_bytes(receiver.pool)[:] = 0xEE
    return pool_bytes(receiver.pool).tobytes()


@pytest.mark.parametrize("how", ["revoke", "expire", "commit", "reuse"])
def test_a_stale_write_cannot_land(receiver: Receiver, sender: Peer, how: str) -> None:
    sender.call("connect", receiver.endpoint.address)
    grant = receiver.grant(ttl=0.2 if how == "expire" else 30.0)
    token = grant.to_bytes()
    late = sender.call("begin", PAGES, token)
    sender.call("push_layer", late, 0)
    grant.wait_layer(0, 10)
    error: type[Exception] = GrantRevoked
    if how == "expire":
        error = GrantExpired
        with pytest.raises(GrantExpired):
            grant.wait(10)
    elif how == "commit":
        for layer in (1, 2, 3):
            sender.call("push_layer", late, layer)
        grant.wait(10)
    else:
        assert grant.revoke()
        assert not grant.revoke()
    assert grant.released
    if how == "reuse":
        # The same slot and the same pages serve other requests by now.
        for _ in range(receiver.endpoint._table.control.num_slots - 1):
            receiver.grant().revoke()
        again = receiver.grant()
        assert again.key.slot == grant.key.slot
    before = poison(receiver)
    if how == "commit":
        with pytest.raises(StaleTransfer):
            sender.call("begin", PAGES, token)
    else:
        sender.call("push_layer", late, 1)
        with pytest.raises(error):
            sender.call("wait_arrived", late)
        with pytest.raises(error):
            sender.call("begin", PAGES, token)
        sender.call("wait_source_reusable", late)
    assert sender.call("enter", token) != "OK"
    assert pool_bytes(receiver.pool).tobytes() == before
    sender.call("close_link")


def test_revoke_while_a_writer_is_stopped(receiver: Receiver) -> None:
    with new_sender(receiver) as peer:
        grant = receiver.grant()
        assert peer.call("enter", grant.to_bytes()) == "OK"
        peer.signal(signal.SIGSTOP)
        assert grant.revoke()
        with pytest.raises(GrantRevoked):
            grant.wait(10)
        with pytest.raises(TransferTimeout):
            grant.wait_released(0.2)
        assert not receiver.returned  # quarantined: the writer could go on at any moment
        other = receiver.grant([11, 12, 13])  # and the owner serves others meanwhile
        with new_sender(receiver) as second:
            second.call("push", PAGES, other.to_bytes())
            other.wait(10)
        assert not grant.released
        peer.kill()
        grant.wait_released(10)
        assert receiver.returned == [grant.transfer_id]


def test_a_writer_that_goes_on_ends_the_quarantine(receiver: Receiver, sender: Peer) -> None:
    sender.call("connect", receiver.endpoint.address)
    grant = receiver.grant(ttl=0.2)
    assert sender.call("enter", grant.to_bytes()) == "OK"
    with pytest.raises(GrantExpired):
        grant.wait(10)
    with pytest.raises(TransferTimeout):
        grant.wait_released(0.2)
    sender.call("leave")
    grant.wait_released(10)
    assert receiver.returned == [grant.transfer_id]


def test_revoke_and_deadline_end_a_verification_that_waits(
    receiver: Receiver, sender: Peer
) -> None:
    sender.call("connect", receiver.endpoint.address)
    for error, ttl in ((GrantRevoked, 30.0), (GrantExpired, 0.3)):
        grant = receiver.grant(ttl=ttl)
        transfer = sender.call("push", PAGES, grant.to_bytes())
        sender.call("wait_source_reusable", transfer)
        assert sender.call("enter", grant.to_bytes()) == "OK"
        revoke = threading.Timer(0.1, grant.revoke)
        if error is GrantRevoked:
            revoke.start()
        with pytest.raises(error):
            grant.wait(10)
        assert not grant.released
        sender.call("leave")
        grant.wait_released(5)


def test_no_digest_while_a_writer_is_inside(receiver: Receiver, sender: Peer) -> None:
    sender.call("connect", receiver.endpoint.address)
    grant = receiver.grant()
    transfer = sender.call("push", PAGES, grant.to_bytes())
    sender.call("wait_source_reusable", transfer)
    assert sender.call("enter", grant.to_bytes()) == "OK"
    with pytest.raises(TransferTimeout):
        grant.wait(0.2)
    sender.call("leave")
    grant.wait(10)
    sender.call("wait_arrived", transfer)


# --- deaths ----------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["connected", "begun", "one layer", "inside", "complete"])
def test_sender_dies(receiver: Receiver, step: str) -> None:
    with new_sender(receiver) as peer:
        grant = receiver.grant(ttl=2.0 if step in ("connected", "inside") else 30.0)
        if step in ("begun", "one layer", "complete"):
            transfer = peer.call("begin", PAGES, grant.to_bytes())
            for layer in {"begun": (), "one layer": (0,), "complete": range(4)}[step]:
                peer.call("push_layer", transfer, layer)
                grant.wait_layer(layer, 10)
        if step == "inside":
            assert peer.call("enter", grant.to_bytes()) == "OK"
        peer.kill()
    eventually(lambda: not receiver.endpoint.links)
    if step == "complete":
        assert grant.wait(10).rows == TOKENS * 4 * 4 * 2
        assert not receiver.returned
    else:
        with pytest.raises(GrantExpired if step in ("connected", "inside") else PeerLost):
            grant.wait(10)
        grant.wait_released(5)
        assert receiver.returned == [grant.transfer_id]
    with new_sender(receiver) as peer:
        receiver.arrive(peer)


@pytest.mark.parametrize("step", ["begun", "one layer", "finished"])
def test_receiver_dies(step: str) -> None:
    endpoint = Endpoint("prefill", secret=SECRET)
    pool = SPEC.build()
    endpoint.register(pool)
    SPEC.fill(pool, PAGES, TOKENS)
    with endpoint:
        with Peer(SPEC) as peer:
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
        transfer.wait_source_reusable(1)
        assert link.closed
        with pytest.raises(LinkClosed):
            link.begin(PAGES, b"")
        with Peer(SPEC) as peer:
            grant = peer.call("grant", PAGES, TOKENS)
            endpoint.connect(peer.address).push(PAGES, grant).wait_source_reusable(10)
            peer.call("wait", grant)


def test_adopter_dies(receiver: Receiver) -> None:
    SPEC.fill(receiver.pool, PAGES, TOKENS)
    with new_sender(receiver) as peer:
        offer = receiver.endpoint.offer(PAGES, TOKENS)
        peer.call("adopt", offer.to_bytes())
        offer.revoke()
        offer.wait_released(5)  # the adopter saw it and let go
        with pytest.raises(GrantRevoked):
            peer.call("check_lease", offer.to_bytes())
        second = receiver.endpoint.offer(PAGES, TOKENS)
        peer.call("adopt", second.to_bytes())
        peer.kill()
        second.wait_released(5)
        assert second.status == TransferStatus.PEER_LOST


def test_owner_of_adopted_pages_dies(receiver: Receiver) -> None:
    with Peer(SPEC) as peer:
        link = receiver.endpoint.connect(peer.address)
        lease = link.adopt(peer.call("offer", PAGES, TOKENS))
        assert lease.valid
        peer.kill()
        eventually(lambda: link.closed)
        assert not lease.valid
        with pytest.raises(PeerLost):
            lease.check()
        assert lease.pages.tolist() == PAGES  # still mapped: no crash


def test_lease_ends_at_its_deadline(receiver: Receiver, sender: Peer) -> None:
    sender.call("connect", receiver.endpoint.address)
    offer = receiver.endpoint.offer(PAGES, TOKENS, ttl=0.2)
    sender.call("adopt", offer.to_bytes())
    sender.call("check_lease", offer.to_bytes())
    offer.wait_released(5)
    assert offer.status == TransferStatus.EXPIRED
    with pytest.raises(GrantExpired):
        sender.call("check_lease", offer.to_bytes())


def test_a_stopped_adopter_keeps_the_pages_quarantined(receiver: Receiver) -> None:
    with new_sender(receiver) as peer:
        offer = receiver.endpoint.offer(PAGES, TOKENS, ttl=0.3)
        peer.call("adopt", offer.to_bytes())
        peer.signal(signal.SIGSTOP)
        with pytest.raises(TransferTimeout):
            offer.wait_released(1.0)
        assert offer.status == TransferStatus.EXPIRED
        peer.signal(signal.SIGCONT)
        offer.wait_released(5)


# --- ends and bounds -------------------------------------------------------------------------


def test_cancel(receiver: Receiver, sender: Peer) -> None:
    sender.call("connect", receiver.endpoint.address)
    grant = receiver.grant()
    transfer = sender.call("begin", PAGES, grant.to_bytes())
    sender.call("push_layer", transfer, 0)
    sender.call("cancel", transfer)
    sender.call("wait_source_reusable", transfer)
    with pytest.raises(TransferCancelled):
        sender.call("wait_arrived", transfer)
    with pytest.raises(TransferCancelled):
        grant.wait(10)
    grant.wait_released(5)
    assert receiver.returned == [grant.transfer_id]


def test_link_closed_by_the_sender(receiver: Receiver, sender: Peer) -> None:
    sender.call("connect", receiver.endpoint.address)
    grant = receiver.grant()
    transfer = sender.call("begin", PAGES, grant.to_bytes())
    sender.call("close_link")
    with pytest.raises((PeerLost, TransferCancelled)):
        grant.wait(10)
    with pytest.raises(TransferCancelled):
        sender.call("wait_arrived", transfer)
    with pytest.raises(LinkClosed):
        sender.call("begin", PAGES, grant.to_bytes())
    eventually(lambda: receiver.returned == [grant.transfer_id])


def test_deadline_can_be_moved(receiver: Receiver, sender: Peer) -> None:
    grant = receiver.grant(ttl=0.3)
    assert grant.extend(30.0)
    time.sleep(0.5)
    assert grant.status == TransferStatus.PENDING
    sender.call("connect", receiver.endpoint.address)
    sender.call("push", PAGES, grant.to_bytes())
    grant.wait(10)
    assert not grant.extend(1.0)


def test_waits_are_bounded(receiver: Receiver) -> None:
    grant = receiver.grant()
    assert grant.poll() is None
    for wait in (grant.wait, grant.wait_released, lambda t: grant.wait_layer(0, t)):
        with pytest.raises(TransferTimeout):
            wait(0.05)
    with pytest.raises(TransferTimeout):
        receiver.endpoint.accept(0.05)


def test_ended_between_the_last_look_and_the_verdict(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    grant = receiver.grant()
    advance = grant.advance

    def reaped_first() -> None:
        grant._control.close(grant.key, TransferStatus.EXPIRED)
        advance()

    monkeypatch.setattr(grant, "advance", reaped_first)
    with pytest.raises(GrantExpired):
        grant.poll()


def test_expired_without_any_peer(receiver: Receiver) -> None:
    grant = receiver.grant(ttl=0.1)
    eventually(lambda: receiver.returned == [grant.transfer_id], 5)
    with pytest.raises(GrantExpired):
        grant.wait(1)


def test_query_by_transfer_id(receiver: Receiver, sender: Peer) -> None:
    link = receiver.endpoint.connect(sender.address)
    token = sender.call("grant", PAGES, TOKENS)
    SPEC.fill(receiver.pool, PAGES, TOKENS)
    transfer = link.begin(PAGES, token)
    for _ in range(2):
        assert link.query(transfer.transfer_id) == TransferStatus.PENDING
    transfer.cancel()
    for _ in range(2):
        assert link.query(transfer.transfer_id) == TransferStatus.CANCELLED
    assert link.query(bytes(16)) is None


@pytest.mark.parametrize("what", ["truncated", "altered", "other secret", "other endpoint", "kind"])
def test_bytes_of_a_grant_that_are_not_its_own(receiver: Receiver, sender: Peer, what: str) -> None:
    sender.call("connect", receiver.endpoint.address)
    token = receiver.grant().to_bytes()
    error: type[Exception] = InvalidDescriptor
    forged = [token]
    if what == "truncated":
        forged = [b"", token[:-1], token[:40], token + b"\0"]
    elif what == "altered":
        forged = [token[:i] + bytes([token[i] ^ 1]) + token[i + 1 :] for i in range(len(token))]
    elif what == "kind":
        forged = [receiver.endpoint.offer([1, 2, 4], TOKENS).to_bytes()]
    else:
        error = InvalidDescriptor if what == "other secret" else UnknownRegion
        other = b"another secret, just as long ..." if what == "other secret" else SECRET
        with Endpoint("decode", secret=other) as stranger:
            stranger.register(SPEC.build())
            forged = [stranger.grant(PAGES, TOKENS).to_bytes()]
    for bad in forged:
        with pytest.raises(error):
            sender.call("begin", PAGES, bad)
    receiver.arrive(sender)


def test_slots_run_out_and_come_back() -> None:
    with Endpoint("decode", secret=SECRET, num_slots=4, num_page_entries=8) as endpoint:
        endpoint.register(SPEC.build())
        for _ in range(5):
            grants = [endpoint.grant([page], 16) for page in range(4)]
            with pytest.raises(OutOfSlots, match="all 4 slots"):
                endpoint.grant([4], 16)
            grants[1].revoke()
            with pytest.raises(OutOfSlots, match="no room for a list of 6 pages"):
                endpoint.grant(list(range(6)), 16)
            for grant in grants:
                grant.revoke()
            endpoint.grant(list(range(8)), 16).revoke()


def test_nothing_is_left_behind(sender: Peer) -> None:
    def count() -> tuple[int, int, list[str]]:
        gc.collect()
        threads = sum(1 for thread in threading.enumerate() if thread.name.startswith("kvlink"))
        return len(os.listdir("/proc/self/fd")), threads, sorted(os.listdir("/dev/shm"))

    def once() -> None:
        receiver = Receiver()
        sender.call("connect", receiver.endpoint.address)
        receiver.arrive(sender)
        receiver.grant()
        receiver.endpoint.close()

    once()
    before = count()
    theirs = sender.call("num_fds")
    for _ in range(3):
        once()
    assert count() == before
    eventually(lambda: sender.call("num_fds") <= theirs)
