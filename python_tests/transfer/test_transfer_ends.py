"""How transfers end, what bounds them, and what is told of it."""

from __future__ import annotations

import gc
import os
import threading

import pytest
from receiving import PAGES, SPEC, TOKENS, Receiver, eventually

from kvlink.testing.transfer_peer import SECRET, Peer, open_endpoint
from kvlink.transfer import (
    Endpoint,
    GrantExpired,
    InvalidDescriptor,
    LinkClosed,
    Offer,
    OutOfSlots,
    PeerLost,
    TransferCancelled,
    TransferStatus,
    TransferTimeout,
    UnknownRegion,
)

pytestmark = [pytest.mark.two_process, pytest.mark.timeout(60)]


def test_cancel(receiver: Receiver, sender: Peer) -> None:
    sender.call("connect", receiver.address)
    grant = receiver.grant()
    transfer = sender.call("begin", PAGES, grant.to_bytes())
    sender.call("push_layer", transfer, 0)
    sender.call("cancel", transfer)
    sender.call("wait_source_reusable", transfer)
    with pytest.raises(TransferCancelled):
        sender.call("wait_arrived", transfer)
    with pytest.raises(TransferCancelled):
        grant.wait(10)
    grant.wait_released(10)
    receiver.gave_back(grant)


def test_link_closed_by_the_sender(receiver: Receiver, sender: Peer) -> None:
    sender.call("connect", receiver.address)
    grant = receiver.grant()
    transfer = sender.call("begin", PAGES, grant.to_bytes())
    sender.call("close_link")
    with pytest.raises((PeerLost, TransferCancelled)):
        grant.wait(10)
    with pytest.raises(TransferCancelled):
        sender.call("wait_arrived", transfer)
    with pytest.raises(LinkClosed):
        sender.call("begin", PAGES, grant.to_bytes())
    receiver.gave_back(grant)


def test_an_owner_may_close_as_soon_as_its_offer_was_pulled(path: str) -> None:
    """The answer that this side may keep what it verified is overtaken by nothing."""
    for _ in range(20):
        with open_endpoint("prefill", path) as owner, open_endpoint("decode", path) as endpoint:
            owner.register(SPEC.build())
            endpoint.register(SPEC.build())
            offer = owner.offer(PAGES, TOKENS)
            link = endpoint.connect(owner.address)

            def close(owner: Endpoint = owner, offer: Offer = offer) -> None:
                offer.wait_released(10)
                owner.close()

            closing = threading.Thread(target=close)
            closing.start()
            link.pull(offer.to_bytes(), PAGES).wait_arrived(10)
            closing.join(20)
            assert not closing.is_alive()


def test_deadline_can_be_moved(receiver: Receiver, sender: Peer) -> None:
    grant = receiver.grant(ttl=10.0)
    before = grant.deadline
    assert grant.extend(30.0)
    assert not receiver.endpoint._table.control.expire(grant.key, int(before * 1e9) + 1)
    assert grant.status == TransferStatus.PENDING
    sender.call("connect", receiver.address)
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
    receiver.gave_back(grant)
    with pytest.raises(GrantExpired):
        grant.wait(10)


def test_query_by_transfer_id(receiver: Receiver, sender: Peer) -> None:
    link = receiver.endpoint.connect(sender.address)
    token = sender.call("grant", PAGES, TOKENS)
    SPEC.fill(receiver.pool, PAGES, TOKENS)
    transfer = link.begin(PAGES, token)
    for _ in range(2):
        assert link.query(transfer.transfer_id) == TransferStatus.PENDING
    transfer.cancel()
    eventually(lambda: link.query(transfer.transfer_id) == TransferStatus.CANCELLED)
    assert link.query(transfer.transfer_id) == TransferStatus.CANCELLED
    assert link.query(bytes(16)) is None


@pytest.mark.parametrize("what", ["truncated", "altered", "other secret", "other endpoint", "kind"])
def test_bytes_of_a_grant_that_are_not_its_own(receiver: Receiver, sender: Peer, what: str) -> None:
    sender.call("connect", receiver.address)
    grant = receiver.grant()
    token = grant.to_bytes()
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
    assert grant.revoke()
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
                endpoint.grant(list(range(4, 10)), 16)
            for grant in grants:
                grant.revoke()
            endpoint.grant(list(range(8)), 16).revoke()


def test_nothing_is_left_behind(sender: Peer, path: str) -> None:
    def count() -> tuple[int, int]:
        gc.collect()
        threads = sum(1 for thread in threading.enumerate() if thread.name.startswith("kvlink"))
        return len(os.listdir("/proc/self/fd")), threads

    def once() -> None:
        receiver = Receiver(path)
        sender.call("connect", receiver.address)
        receiver.arrive(sender)
        receiver.grant()
        receiver.endpoint.close()

    num_threads = count()[1]
    once()
    eventually(lambda: count()[1] <= num_threads)  # what ends in the background has ended
    before = count()
    theirs = sender.call("num_fds")
    files = set(os.listdir("/dev/shm"))
    for _ in range(3):
        once()
    eventually(lambda: all(now <= then for now, then in zip(count(), before, strict=True)))
    eventually(lambda: sender.call("num_fds") <= theirs)
    # Others on this machine have some for a moment, too.
    left = set(os.listdir("/dev/shm")) - files
    eventually(lambda: not left & set(os.listdir("/dev/shm")))
