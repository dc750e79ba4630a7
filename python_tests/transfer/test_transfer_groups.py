"""The pools of one request arrive together, or every page of every pool goes back, once."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hybrid import (
    DECODE,
    EMBEDDINGS,
    PREFILL,
    RECEIVED,
    SENT,
    Held,
    HybridBody,
    expected,
    flip_bit,
)
from receiving import eventually

from kvlink._C import SlotKind
from kvlink.errors import InvalidArgument
from kvlink.testing.transfer_peer import SECRET, Peer
from kvlink.testing.transfer_pool import pool_bytes
from kvlink.transfer import (
    DigestMismatch,
    GenerationMismatch,
    GrantExpired,
    GrantGroup,
    GrantRevoked,
    InvalidDescriptor,
    OutOfSlots,
    PeerLost,
    StaleTransfer,
    TransferCancelled,
    TransferStatus,
    TransferTimeout,
    Unconvertible,
)

pytestmark = [pytest.mark.two_process, pytest.mark.timeout(60)]


class Decode(Held):
    """The receiver, and the groups that gave their pages back."""

    path = "host_shm"

    def __init__(self, **arguments: Any) -> None:
        super().__init__("decode", DECODE, SECRET, **arguments)
        self.returned: list[GrantGroup] = []

    def grant(self, ttl: float = 30.0) -> GrantGroup:
        return self.endpoint.grant_group(
            self.members(RECEIVED), ttl, on_release=self.returned.append
        )

    def check_arrived(self, seed: int = 0) -> None:
        wanted = expected(DECODE, RECEIVED, seed)
        for name in DECODE:
            assert self.content(name) == wanted[name]

    def check_returned(self, group: GrantGroup) -> None:
        """Once, and nobody is inside any page; the pages serve another request."""
        eventually(lambda: group.released and self.returned)
        time.sleep(0.05)  # more than two looks of the reaper
        assert self.returned == [group]
        assert not group.revoke()
        assert not group.extend(30)
        assert all(member.released for member in group.members)

    def clear(self) -> None:
        for name, pool in self.pools.items():
            pool_bytes(pool)[:] = pool_bytes(DECODE[name].build())


@pytest.fixture(params=["host_shm", "ucx"])
def decode(request: pytest.FixtureRequest) -> Iterator[Decode]:
    decode = Decode(paths=(request.param,))
    decode.path = request.param
    yield decode
    decode.endpoint.close()


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    with Peer(PREFILL, make=HybridBody) as peer:
        peer.call("fill", SENT)
        yield peer


@pytest.fixture
def prefill(peer: Peer, decode: Decode) -> Peer:
    assert peer.call("connect", decode.endpoint.address) == decode.path
    return peer


def serves(decode: Decode, prefill: Peer) -> None:
    """One more request, over the same pages."""
    decode.clear()
    group = decode.grant()
    idx = prefill.call("push_group", SENT, group.to_bytes())
    assert len(group.wait(10)) == 4
    prefill.call("wait_arrived", idx)
    decode.check_arrived()


def test_a_hybrid_request(decode: Decode, prefill: Peer) -> None:
    group = decode.grant()
    assert group.poll() is None
    assert group.status == TransferStatus.PENDING
    assert group.extend(30)
    idx = prefill.call("push_group", SENT, group.to_bytes())
    arrivals = group.wait(10)
    prefill.call("wait_source_reusable", idx)
    prefill.call("wait_arrived", idx)
    assert [arrival.pages.tolist() for arrival in arrivals] == [pages for _, pages, _ in RECEIVED]
    assert [arrival.num_tokens for arrival in arrivals] == [45, 16, 1, 1]
    assert [arrival.rows for arrival in arrivals] == [45 * 2 * 4 * 2, 16 * 2 * 4 * 2, 4, 4]
    assert all(arrival.digest_verified for arrival in arrivals)
    decode.check_arrived()
    assert group.wait(0) is arrivals
    assert group.poll() is arrivals
    assert group.status == TransferStatus.OK
    group.wait_released(20)
    assert not group.revoke()
    assert not group.extend(1)
    assert decode.returned == []  # the pages belong to the request


def test_layer_by_layer(decode: Decode, prefill: Peer) -> None:
    """States go last; until then nothing has arrived, whatever is complete."""
    group = decode.grant()
    idx = prefill.call("begin_group", SENT, group.to_bytes())
    for layer in (1, 0):
        prefill.call("push_layer", idx, 0, layer)
        group.members[0].wait_layer(layer, 10)
        prefill.call("push_layer", idx, 1, layer)
    assert group.poll() is None
    for layer in range(4):
        prefill.call("push_layer", idx, 2, layer)
        assert group.poll() is None
        prefill.call("push_layer", idx, 3, layer)
    prefill.call("finish", idx)
    group.wait(10)
    prefill.call("wait_arrived", idx)
    decode.check_arrived()


def test_ranks_that_send_some_of_the_members(decode: Decode) -> None:
    """One rank has the KV, another one the states."""
    with Peer(PREFILL, make=HybridBody) as first, Peer(PREFILL, make=HybridBody) as second:
        group = decode.grant()
        parts = [[*SENT[:2], None, None], [None, None, *SENT[2:]]]
        for rank, part in zip((first, second), parts, strict=True):
            rank.call("fill", SENT)
            rank.call("connect", decode.endpoint.address)
            assert group.poll() is None
            rank.call("push_group", part, group.to_bytes())
        group.wait(10)
        for rank in (first, second):
            rank.call("wait_arrived", 0)
        decode.check_arrived()


def test_a_group_is_pulled(decode: Decode, prefill: Peer) -> None:
    link = decode.endpoint.connect(prefill.address)
    offer = prefill.call("offer_group", SENT)
    transfer = link.pull_group(offer, decode.members(RECEIVED))
    transfer.wait_arrived(10)
    assert transfer.source_reusable
    rows = [each.num_rows for each in transfer.progress() if each is not None]
    assert rows == [45 * 2 * 4 * 2, 16 * 2 * 4 * 2, 4, 4]
    decode.check_arrived()
    assert prefill.call("wait_released", offer) == "OK"


def test_embeddings_from_an_encoder() -> None:
    """64 x 3584 bfloat16 a page, of no form that the receiver needs to know."""
    pages, granted = [5, 0, 2], [1, 2, 4]
    sent, received = [("embeddings", pages, 3)], [("embeddings", granted, 3)]
    decode = Held("prefill", EMBEDDINGS, SECRET)
    with decode.endpoint, Peer(EMBEDDINGS, make=HybridBody) as encoder:
        encoder.call("fill", sent)
        encoder.call("connect", decode.endpoint.address)
        group = decode.endpoint.grant_group(decode.members(received))
        idx = encoder.call("push_group", sent, group.to_bytes())
        (arrival,) = group.wait(20)
        encoder.call("wait_arrived", idx)
        assert arrival.rows == 3
        assert decode.content("embeddings") == expected(EMBEDDINGS, received)["embeddings"]


# --- one member fails ---------------------------------------------------------------------------


def corrupt(decode: Decode, group: GrantGroup) -> None:
    flip_bit(decode.pools["conv"], DECODE["conv"], RECEIVED[2][1][0])


def reuse_page(decode: Decode, group: GrantGroup) -> None:
    decode.regions["window"].bump_generations([RECEIVED[1][1][0]])


def revoke_member(decode: Decode, group: GrantGroup) -> None:
    assert group.members[3].revoke()


def let_member_expire(decode: Decode, group: GrantGroup) -> None:
    assert group.members[1].extend(0.01)
    eventually(lambda: group.status != TransferStatus.PENDING)


def revoke_group(decode: Decode, group: GrantGroup) -> None:
    assert group.revoke()


AFTER_THE_LAST_BYTE: dict[str, tuple[Callable[[Decode, GrantGroup], None], type[Exception]]] = {
    "flipped bit": (corrupt, DigestMismatch),
    "page reused": (reuse_page, GenerationMismatch),
    "member revoked": (revoke_member, GrantRevoked),
    "member expired": (let_member_expire, GrantExpired),
    "group revoked": (revoke_group, GrantRevoked),
}


@pytest.mark.parametrize("name", AFTER_THE_LAST_BYTE)
def test_one_member_fails_at_the_receiver(decode: Decode, prefill: Peer, name: str) -> None:
    fail, error = AFTER_THE_LAST_BYTE[name]
    group = decode.grant()
    idx = prefill.call("push_group", SENT, group.to_bytes())
    prefill.call("wait_source_reusable", idx)
    fail(decode, group)
    for _ in range(2):
        with pytest.raises(error, match=f"group {group.group_id.hex()}, member"):
            group.wait(10)
    with pytest.raises(error):
        group.poll()
    with pytest.raises(error):
        prefill.call("wait_arrived", idx)
    decode.check_returned(group)
    decode.returned.clear()
    serves(decode, prefill)
    assert decode.returned == []


def test_nobody_needs_to_wait_for_a_group_that_fails(decode: Decode, prefill: Peer) -> None:
    """The reaper alone gives the pages back, also those of members that had arrived."""
    group = decode.grant()
    idx = prefill.call("begin_group", SENT, group.to_bytes())
    for layer in range(2):
        prefill.call("push_layer", idx, 0, layer)
    assert group.members[0].wait(10).num_tokens == 45
    prefill.call("cancel", idx)
    decode.check_returned(group)
    with pytest.raises(TransferCancelled, match="member 1"):
        group.wait(0)
    decode.returned.clear()
    serves(decode, prefill)


def test_expiry_of_the_whole(decode: Decode, prefill: Peer) -> None:
    group = decode.grant()
    idx = prefill.call("begin_group", SENT, group.to_bytes())
    prefill.call("push_layer", idx, 0, 0)
    assert group.extend(0.1)
    with pytest.raises(GrantExpired):
        group.wait(10)
    decode.check_returned(group)


def test_the_sender_dies(decode: Decode) -> None:
    with Peer(PREFILL, make=HybridBody) as doomed:
        doomed.call("fill", SENT)
        doomed.call("connect", decode.endpoint.address)
        group = decode.grant()
        idx = doomed.call("begin_group", SENT, group.to_bytes())
        for layer in range(2):
            doomed.call("push_layer", idx, 0, layer)
        group.members[0].wait_layer(1, 10)
        doomed.call("wait_outside", idx)
        doomed.kill()
    with pytest.raises(PeerLost, match="member 1"):
        group.wait(10)
    decode.check_returned(group)


def test_a_member_of_the_wrong_region_begins_nothing(decode: Decode, prefill: Peer) -> None:
    group = decode.grant()
    wrong = [*SENT[:2], SENT[3], SENT[2]]
    with pytest.raises(Unconvertible):
        prefill.call("push_group", wrong, group.to_bytes())
    with pytest.raises(AssertionError, match="expected 4, as the group has; got 3"):
        prefill.call("push_group", SENT[:3], group.to_bytes())
    with pytest.raises(AssertionError, match=r"pages\[1\]: expected a page in"):
        prefill.call("push_group", [("attention", [1, 99, 2], 45), *SENT[1:]], group.to_bytes())
    assert group.status == TransferStatus.PENDING
    assert decode.returned == []
    idx = prefill.call("push_group", SENT, group.to_bytes())
    group.wait(10)
    prefill.call("wait_arrived", idx)


@pytest.mark.parametrize("name", ["revoked", "cancelled"])
def test_one_member_fails_in_a_pull(decode: Decode, prefill: Peer, name: str) -> None:
    link = decode.endpoint.connect(prefill.address)
    offer = prefill.call("offer_group", SENT)
    if name == "revoked":
        assert prefill.call("revoke_member", offer, 2)
        with pytest.raises((GrantRevoked, StaleTransfer)):
            link.pull_group(offer, decode.members(RECEIVED)).wait_arrived(10)
    else:
        # Nothing is posted yet: a pull of pages this small may have arrived before it is cancelled.
        transfer = link._start_group(SlotKind.OFFER, offer, decode.members(RECEIVED))
        transfer.cancel()
        with pytest.raises(TransferCancelled, match="member 0"):
            transfer.wait_arrived(10)
        assert transfer.source_reusable
        prefill.call("revoke_member", offer, 3)
    assert prefill.call("wait_released", offer) == "REVOKED"
    serves(decode, prefill)


def test_a_revocation_while_it_arrives_takes_all_or_nothing(decode: Decode) -> None:
    """Revoked between any two steps of the arrival: who waits and who owns the pages agree."""
    random = np.random.default_rng(0)
    source = Held("prefill", PREFILL, SECRET)
    with source.endpoint:
        source.fill(SENT)
        link = source.endpoint.connect(decode.endpoint.address)
        for _ in range(150):
            group = decode.grant()
            revoked: list[bool] = []
            delay = random.exponential(0.001)

            def revoke(
                group: GrantGroup = group, delay: float = delay, to: list[bool] = revoked
            ) -> None:
                time.sleep(delay)
                to.append(group.revoke())

            thread = threading.Thread(target=revoke)
            thread.start()
            arrived = sent = False
            with contextlib.suppress(GrantRevoked):
                transfer = link.push_group(source.members(SENT), group.to_bytes())
                with contextlib.suppress(GrantRevoked):
                    arrived = len(group.wait(10)) == 4
                transfer.wait_arrived(10)
                sent = True
            thread.join()
            group.wait_released(10)
            assert sent == arrived
            assert revoked == [not arrived]
            if not arrived:
                eventually(lambda group=group: group in decode.returned)
            assert decode.returned == ([] if arrived else [group])
            decode.returned.clear()


# --- refusals -----------------------------------------------------------------------------------


def test_bytes_that_are_no_group(decode: Decode, prefill: Peer) -> None:
    group = decode.grant()
    token = group.to_bytes()
    single = decode.endpoint.grant([1], 1, region=decode.regions["conv"])
    altered = bytearray(token)
    altered[40] ^= 1
    offers = prefill.call("offer_group", SENT)
    for bad in (b"", token[:-1], token + b"x", bytes(altered), single.to_bytes(), offers):
        with pytest.raises(InvalidDescriptor):
            prefill.call("push_group", SENT, bad)
    with pytest.raises(InvalidDescriptor):
        decode.endpoint.connect(prefill.address).pull_group(token, decode.members(RECEIVED))
    with pytest.raises(InvalidArgument, match="members: expected a list of them; got 5"):
        decode.endpoint.connect(prefill.address).pull_group(offers, 5)  # type: ignore[arg-type]
    prefill.call("push_group", SENT, token)
    group.wait(10)


def test_what_cannot_be_granted(decode: Decode) -> None:
    attention, conv = decode.regions["attention"], decode.regions["conv"]
    for members, message in (
        (5, "members: expected a list of them; got 5"),
        ([], "members: expected 1 to 64; got 0"),
        ([(conv, [1], 1)] * 65, "members: expected 1 to 64; got 65"),
        ([(conv, [1])], "members: expected"),
        ([(conv, [1], 1), (attention, [1], 25)], "pages: expected at least 2 for 25 tokens"),
        ([(conv, [1], 1), (attention, [99], 1)], r"pages\[0\]: expected a page"),
        ([(conv, [1, 2], 2), (conv, [2], 1)], "members: page 2 of one region is named twice"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            decode.endpoint.grant_group(members, on_release=decode.returned.append)
    assert decode.returned == []


def test_a_group_that_finds_no_room_takes_none() -> None:
    decode = Decode(num_slots=3)
    with decode.endpoint:
        with pytest.raises(OutOfSlots):
            decode.grant()
        assert decode.returned == []
        eventually(lambda: opens(decode))


def opens(decode: Decode) -> bool:
    """All three slots are free again."""
    group = decode.endpoint.grant_group(decode.members(RECEIVED[:3]))
    with pytest.raises(TransferTimeout):
        group.wait(0)
    return group.revoke()
