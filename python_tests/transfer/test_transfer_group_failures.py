"""One pool of a request fails: every page of every pool goes back, once, and serves another one."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from hybrid import DECODE, PREFILL, RECEIVED, SENT, Decode, Held, HybridBody, flip_bit, serves
from receiving import eventually

from kvlink._C import SlotKind
from kvlink.testing.transfer_peer import SECRET, Peer
from kvlink.transfer import (
    DigestMismatch,
    GenerationMismatch,
    GrantExpired,
    GrantGroup,
    GrantRevoked,
    PeerLost,
    StaleTransfer,
    TransferCancelled,
    TransferStatus,
    Unconvertible,
)

pytestmark = [pytest.mark.two_process, pytest.mark.timeout(60)]


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
