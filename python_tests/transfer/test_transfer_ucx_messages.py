"""ucx: messages lost, doubled, late or damaged. The request arrives whole, or not at all."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from receiving import PAGES, TOKENS, Receiver, poison

from kvlink.testing.transfer_peer import Peer
from kvlink.testing.transfer_pool import pool_bytes
from kvlink.transfer import (
    DigestMismatch,
    GrantExpired,
    Link,
    RowCountMismatch,
    TransferError,
)
from kvlink.transfer.paths import ucx

pytestmark = [pytest.mark.two_process, pytest.mark.timeout(60)]

TTL = 0.6  # s, of what has to end by its deadline


@pytest.fixture(scope="module", params=["ucx", "ucx_tcp"])
def path(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def link(receiver: Receiver, sender: Peer) -> Iterator[Link]:
    """From the sender to the receiver; this is the receiver's end."""
    assert sender.call("connect", receiver.address) == "ucx"
    link = receiver.endpoint.accept(20)
    # What the two sides ask each other once, before their first transfers, is over.
    grant = receiver.grant()
    transfer = sender.call("push", PAGES, grant.to_bytes())
    grant.wait(10)
    sender.call("wait_arrived", transfer)
    link.pull(sender.call("offer", PAGES, TOKENS), [20, 21, 22]).wait_arrived(10)
    yield link
    receiver.arrive(sender)  # nothing that happened before is in the way
    sender.call("close_link")


def inject(link: Link, fault: str, count: int = 1) -> None:
    """On the messages that the receiver sends."""
    link.path_link.inject(fault, count)  # type: ignore[attr-defined]


def test_a_flipped_bit(receiver: Receiver, sender: Peer, link: Link) -> None:
    grant = receiver.grant()
    sender.call("inject", "flip_bit", 1)
    transfer = sender.call("push", PAGES, grant.to_bytes())
    with pytest.raises(DigestMismatch):
        grant.wait(10)
    with pytest.raises(DigestMismatch):
        sender.call("wait_arrived", transfer)
    receiver.gave_back(grant)  # once its writer has left


def test_a_flipped_bit_of_a_pull(receiver: Receiver, sender: Peer, link: Link) -> None:
    offer = sender.call("offer", PAGES, TOKENS)
    sender.call("inject", "flip_bit", 1)
    with pytest.raises(DigestMismatch):
        link.pull(offer, [20, 21, 22]).wait_arrived(10)
    link.pull(offer, [20, 21, 22]).wait_arrived(10)  # it was not used up
    assert sender.call("wait_released", offer) == "OK"


def test_a_chunk_twice(receiver: Receiver, sender: Peer, link: Link) -> None:
    grant = receiver.grant()
    transfer = sender.call("begin", PAGES, grant.to_bytes())
    sender.call("inject", "duplicate", 1)
    for layer in range(4):
        sender.call("push_layer", transfer, layer)
    sender.call("finish", transfer)
    sender.call("wait_source_reusable", transfer)
    with pytest.raises(RowCountMismatch):
        grant.wait(10)


def test_every_message_twice_but_the_chunks(receiver: Receiver, sender: Peer, link: Link) -> None:
    grant = receiver.grant()
    inject(link, "duplicate", 1000)
    transfer = sender.call("push", PAGES, grant.to_bytes())
    grant.wait(10)
    sender.call("wait_arrived", transfer)
    offer = sender.call("offer", PAGES, TOKENS)
    link.pull(offer, [20, 21, 22]).wait_arrived(10)
    inject(link, "duplicate", 0)
    assert sender.call("wait_released", offer) == "OK"


@pytest.mark.parametrize("position", range(6))
def test_a_lost_message_of_the_sender(
    receiver: Receiver, sender: Peer, link: Link, position: int
) -> None:
    grant = receiver.grant()
    transfer = sender.call("begin", PAGES, grant.to_bytes())
    for layer in range(4):
        if layer == position:
            sender.call("inject", "drop", 1)
        sender.call("push_layer", transfer, layer)
        sender.call("wait_outside" if layer < position else "settle", transfer)
    if position >= 4:
        sender.call("inject", "drop", 1 if position == 4 else 2)
    sender.call("finish", transfer)
    if position >= 4:  # it is over by then
        assert grant.wait(10).rows == TOKENS * 4 * 4 * 2
        sender.call("inject", "drop", 0)
        return
    assert grant.extend(TTL)
    with pytest.raises(GrantExpired):
        grant.wait(10)
    with pytest.raises(GrantExpired):
        sender.call("wait_arrived", transfer)
    grant.wait_released(20)


@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_lost_answers_of_the_owner(
    receiver: Receiver, sender: Peer, link: Link, count: int
) -> None:
    grant = receiver.grant()
    transfer = sender.call("begin", PAGES, grant.to_bytes())
    inject(link, "drop", count)
    for layer in range(4):
        sender.call("push_layer", transfer, layer)
    sender.call("finish", transfer)
    grant.wait(10)  # every row is there
    sender.call("wait_arrived", transfer)  # it asks again
    inject(link, "drop", 0)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_lost_messages_of_a_pull(
    receiver: Receiver, sender: Peer, link: Link, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(ucx, "_BEGIN_TIMEOUT_NS", 700_000_000)  # its answer is the first to be lost
    offer = sender.call("offer", PAGES, TOKENS, TTL)
    sender.call("inject", "drop", count)
    with pytest.raises(TransferError):
        link.pull(offer, [20, 21, 22]).wait_arrived(10)
    sender.call("inject", "drop", 0)
    assert sender.call("wait_released", offer) == "EXPIRED"


def test_late_messages(receiver: Receiver, sender: Peer, link: Link) -> None:
    grant = receiver.grant()
    sender.call("inject", "delay", 3)
    inject(link, "delay", 3)
    transfer = sender.call("push", PAGES, grant.to_bytes())
    grant.wait(10)
    sender.call("wait_arrived", transfer)


def test_a_chunk_that_comes_after_the_end(receiver: Receiver, sender: Peer, link: Link) -> None:
    grant = receiver.grant()
    transfer = sender.call("begin", PAGES, grant.to_bytes())
    sender.call("inject", "delay", 1)
    sender.call("push_layer", transfer, 0)
    grant.revoke()
    grant.wait_released(20)
    before = poison(receiver)
    with pytest.raises(TransferError):
        sender.call("wait_arrived", transfer)
    sender.call("settle", transfer, 0.2)
    assert pool_bytes(receiver.pool).tobytes() == before
    pool_bytes(receiver.pool)[:] = 0xFF  # as a new pool has it
