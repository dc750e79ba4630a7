"""Wrong bytes and late writers: nobody reads foreign KV, and no stale write lands."""

from __future__ import annotations

import signal
import threading

import numpy as np
import pytest
from receiving import PAGES, SPEC, TOKENS, Receiver, new_sender, poison

from kvlink import _C
from kvlink.testing.transfer_peer import Peer
from kvlink.testing.transfer_pool import pool_bytes
from kvlink.transfer import (
    DigestMismatch,
    GenerationMismatch,
    GrantExpired,
    GrantRevoked,
    RowCountMismatch,
    StaleTransfer,
    TransferTimeout,
)

pytestmark = [pytest.mark.two_process, pytest.mark.timeout(60)]


@pytest.mark.parametrize("plane", ["k", "v"])
@pytest.mark.parametrize("at", [(5, 0, 0, 0), (9, 7, 3, 15)], ids=["first", "last"])
def test_a_flipped_bit_is_no_arrival(
    receiver: Receiver, sender: Peer, plane: str, at: tuple[int, int, int, int]
) -> None:
    sender.call("connect", receiver.address)
    grant = receiver.grant()
    transfer = sender.call("push", PAGES, grant.to_bytes())
    sender.call("wait_source_reusable", transfer)
    np.from_dlpack(getattr(receiver.pool, plane)(3)).view(np.int32)[at] ^= 1 << 3
    for _ in range(2):
        with pytest.raises(DigestMismatch):
            grant.wait(10)
    with pytest.raises(DigestMismatch):
        sender.call("wait_arrived", transfer)
    receiver.gave_back(grant)
    assert grant.released
    receiver.arrive(sender)


def test_slots_behind_the_request_do_not_matter(receiver: Receiver, sender: Peer) -> None:
    sender.call("connect", receiver.address)
    grant = receiver.grant()
    transfer = sender.call("push", PAGES, grant.to_bytes())
    sender.call("wait_source_reusable", transfer)
    np.from_dlpack(receiver.pool.k(3)).view(np.int32)[9, 8:] = 0
    assert grant.wait(10).rows == TOKENS * 4 * 4 * 2


def test_page_reuse_during_a_transfer(receiver: Receiver, sender: Peer) -> None:
    sender.call("connect", receiver.address)
    grant = receiver.grant()
    transfer = sender.call("push", PAGES, grant.to_bytes())
    sender.call("wait_source_reusable", transfer)
    receiver.region.bump_generations([3])
    with pytest.raises(GenerationMismatch):
        grant.wait(10)
    with pytest.raises(GenerationMismatch):
        sender.call("wait_arrived", transfer)
    receiver.gave_back(grant)
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
    sender.call("connect", receiver.address)
    grant = receiver.grant()
    for _ in range(2):
        transfer = sender.call("push", PAGES, grant.to_bytes())
        sender.call("wait_source_reusable", transfer)
    with pytest.raises(RowCountMismatch):
        grant.wait(10)


# --- late writers ----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["revoke", "expire", "commit", "reuse"])
def test_a_stale_write_cannot_land(receiver: Receiver, sender: Peer, how: str) -> None:
    sender.call("connect", receiver.address)
    grant = receiver.grant()
    token = grant.to_bytes()
    late = sender.call("begin", PAGES, token)
    sender.call("push_layer", late, 0)
    grant.wait_layer(0, 10)
    sender.call("wait_outside", late)
    error: type[Exception] = GrantRevoked
    if how == "expire":
        error = GrantExpired
        assert grant.extend(0.05)
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
        receiver.gave_back(grant)


def test_a_writer_that_goes_on_ends_the_quarantine(receiver: Receiver, sender: Peer) -> None:
    sender.call("connect", receiver.address)
    grant = receiver.grant()
    assert sender.call("enter", grant.to_bytes()) == "OK"
    assert grant.extend(0.1)
    with pytest.raises(GrantExpired):
        grant.wait(10)
    with pytest.raises(TransferTimeout):
        grant.wait_released(0.2)
    sender.call("leave")
    grant.wait_released(10)
    receiver.gave_back(grant)


def test_revoke_and_deadline_end_a_verification_that_waits(
    receiver: Receiver, sender: Peer
) -> None:
    sender.call("connect", receiver.address)
    for error in (GrantRevoked, GrantExpired):
        grant = receiver.grant()
        transfer = sender.call("push", PAGES, grant.to_bytes())
        sender.call("wait_source_reusable", transfer)
        assert sender.call("enter", grant.to_bytes()) == "OK"
        revoke = threading.Timer(0.1, grant.revoke)
        if error is GrantRevoked:
            revoke.start()
        else:
            assert grant.extend(0.1)
        with pytest.raises(error):
            grant.wait(10)
        assert not grant.released
        sender.call("leave")
        grant.wait_released(20)


def test_no_digest_while_a_writer_is_inside(receiver: Receiver, sender: Peer) -> None:
    sender.call("connect", receiver.address)
    grant = receiver.grant()
    transfer = sender.call("push", PAGES, grant.to_bytes())
    sender.call("wait_source_reusable", transfer)
    assert sender.call("enter", grant.to_bytes()) == "OK"
    with pytest.raises(TransferTimeout):
        grant.wait(0.2)
    sender.call("leave")
    grant.wait(10)
    sender.call("wait_arrived", transfer)
