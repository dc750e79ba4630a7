"""The pools of one request are used in place together, or none of them is."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from hybrid import DECODE, PREFILL, RECEIVED, SENT, Held, HybridBody, expected
from receiving import eventually

from kvlink._C import SlotKind
from kvlink.testing.transfer_peer import SECRET, Peer
from kvlink.testing.transfer_pool import pool_bytes
from kvlink.transfer import (
    AlreadyWriting,
    GrantExpired,
    GrantRevoked,
    InvalidDescriptor,
    LeaseGroup,
    Link,
    LinkClosed,
    OfferGroup,
    PagesLent,
    PathUnavailable,
    PeerLost,
    StaleTransfer,
    TransferStatus,
    TransferTimeout,
)
from kvlink.transfer.group_descriptor import GroupDescriptor

pytestmark = [pytest.mark.two_process, pytest.mark.timeout(60)]


@pytest.fixture
def owner() -> Iterator[Peer]:
    with Peer(PREFILL, make=HybridBody) as peer:
        peer.call("fill", SENT)
        yield peer


@pytest.fixture
def decode() -> Iterator[Held]:
    decode = Held("decode", DECODE, SECRET)
    yield decode
    decode.endpoint.close()


def check_content(lease: LeaseGroup) -> None:
    wanted = expected(PREFILL, SENT)
    for member, (name, pages, num_tokens) in zip(lease.members, SENT, strict=True):
        assert (member.pages.tolist(), member.num_tokens) == (pages, num_tokens)
        assert pool_bytes(member.pool).tobytes() == wanted[name]


def test_a_group_is_used_in_place(owner: Peer, decode: Held) -> None:
    link = decode.endpoint.connect(owner.address)
    for _ in range(3):
        token = owner.call("offer_group", SENT)
        with link.adopt_group(token) as lease:
            check_content(lease)
            lease.check()
            assert lease.valid
        with pytest.raises(LinkClosed, match="released"):
            lease.check()
        assert not lease.valid
        assert owner.call("wait_released", token) == "OK"
    assert link.metrics()["adopted"] == 3 * len(SENT)


def test_one_side_adopts_all_of_it(owner: Peer, decode: Held) -> None:
    links = [decode.endpoint.connect(owner.address) for _ in range(2)]
    token = owner.call("offer_group", SENT)
    lease = links[0].adopt_group(token)
    with pytest.raises(AlreadyWriting):
        links[1].adopt_group(token)
    check_content(lease)
    lease.check()
    lease.release()
    assert owner.call("wait_released", token) == "OK"
    with pytest.raises(StaleTransfer):
        links[1].adopt_group(token)


def test_what_fails_halfway_is_open_again(owner: Peer, decode: Held) -> None:
    links = [decode.endpoint.connect(owner.address) for _ in range(2)]
    token = owner.call("offer_group", SENT)
    key = decode.endpoint.descriptor_key
    parts = GroupDescriptor.from_bytes(token, key, SlotKind.OFFER).members
    last = links[1].adopt(parts[-1])
    for _ in range(2):
        with pytest.raises(AlreadyWriting):
            links[0].adopt_group(token)
    assert links[0].metrics()["adopted"] == 0
    assert links[0].metrics()["refused"] == {"AlreadyWriting": 2}
    others = [links[1].adopt(part) for part in parts[:-1]]  # nobody holds them
    for lease in (*others, last):
        lease.check()
        lease.release()
    assert owner.call("wait_released", token) == "OK"


def test_one_member_ends_all(owner: Peer, decode: Held) -> None:
    link = decode.endpoint.connect(owner.address)
    token = owner.call("offer_group", SENT)
    lease = link.adopt_group(token)
    assert owner.call("revoke_member", token, 1)
    assert owner.call("wait_released", token) == "REVOKED"
    assert not lease.valid
    with pytest.raises(GrantRevoked):
        lease.check()
    for member in lease.members:
        with pytest.raises(GrantRevoked):
            member.check()
    with pytest.raises(GrantRevoked):
        link.adopt_group(token)


def test_a_deadline_ends_all(owner: Peer, decode: Held) -> None:
    link = decode.endpoint.connect(owner.address)
    token = owner.call("offer_group", SENT)
    lease = link.adopt_group(token)
    assert owner.call("extend", token, 0.1)
    assert owner.call("wait_released", token) == "EXPIRED"
    with pytest.raises(GrantExpired):
        lease.check()


def test_closing_the_link_gives_all_back(owner: Peer, decode: Held) -> None:
    link = decode.endpoint.connect(owner.address)
    token = owner.call("offer_group", SENT)
    lease = link.adopt_group(token)
    link.close()
    assert owner.call("wait_released", token) == "OK"
    with pytest.raises(LinkClosed):
        lease.check()


def test_the_owner_dies(owner: Peer, decode: Held) -> None:
    link = decode.endpoint.connect(owner.address)
    lease = link.adopt_group(owner.call("offer_group", SENT))
    owner.kill()
    eventually(lambda: link.gone)
    with pytest.raises(PeerLost):
        lease.check()
    check_content(lease)  # still mapped: no crash
    lease.release()


def offer(decode: Held, adopter: Peer) -> OfferGroup:
    """What another process adopts."""
    decode.fill(RECEIVED)
    adopter.call("connect", decode.endpoint.address)
    group = decode.endpoint.offer_group(decode.members(RECEIVED))
    wanted = expected(DECODE, RECEIVED)
    got = adopter.call("adopt_group", group.to_bytes())
    assert got == [(pages, wanted[name]) for name, pages, _ in RECEIVED]
    return group


def test_the_adopter_dies(owner: Peer, decode: Held) -> None:
    group = offer(decode, owner)
    owner.kill()
    group.wait_released(20)
    assert group.status == TransferStatus.PEER_LOST
    assert decode.endpoint.grant_group(decode.members(RECEIVED)).revoke()
    with Peer(PREFILL, make=HybridBody) as another:
        group = offer(decode, another)
        another.call("check_lease")
        another.call("release")
        group.wait_released(20)
        assert group.status == TransferStatus.OK


def test_a_stopped_adopter_keeps_all_pages(owner: Peer, decode: Held) -> None:
    group = offer(decode, owner)
    owner.signal(signal.SIGSTOP)
    assert group.revoke()
    with pytest.raises(TransferTimeout):
        group.wait_released(0.2)
    for member in decode.members(RECEIVED):
        with pytest.raises(PagesLent, match="REVOKED and is not released yet"):
            decode.endpoint.grant(member[1], member[2], region=member[0])
    owner.signal(signal.SIGCONT)
    group.wait_released(20)
    with pytest.raises(GrantRevoked):
        owner.call("check_lease")
    assert decode.endpoint.grant_group(decode.members(RECEIVED)).revoke()


def test_other_paths_say_so(owner: Peer, decode: Held) -> None:
    link = decode.endpoint.connect(owner.address, require="ucx")
    token = owner.call("offer_group", SENT)
    with pytest.raises(PathUnavailable, match="in place over host_shm"):
        link.adopt_group(token)
    transfer = link.pull_group(token, [m[:2] for m in decode.members(RECEIVED)])
    transfer.wait_arrived(10)
    assert owner.call("wait_released", token) == "OK"


def test_bytes_that_are_no_offers(owner: Peer, decode: Held) -> None:
    link: Link = decode.endpoint.connect(owner.address)
    token = owner.call("offer_group", SENT)
    grants = decode.endpoint.grant_group(decode.members(RECEIVED))
    for bad in (b"", token[:-1], token[:40] + bytes([token[40] ^ 1]) + token[41:], grants):
        with pytest.raises(InvalidDescriptor):
            link.adopt_group(bad)
    with pytest.raises(InvalidDescriptor):
        link.adopt(token)
    link.adopt_group(token).release()
