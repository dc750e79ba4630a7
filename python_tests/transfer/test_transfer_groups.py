"""The pools of one request arrive together; what is no group is refused."""

from __future__ import annotations

import pytest
from hybrid import EMBEDDINGS, PREFILL, RECEIVED, SENT, Decode, Held, HybridBody, expected
from receiving import eventually

from kvlink.errors import InvalidArgument
from kvlink.testing.transfer_peer import SECRET, Peer
from kvlink.transfer import InvalidDescriptor, OutOfSlots, TransferStatus, TransferTimeout

pytestmark = [pytest.mark.two_process, pytest.mark.timeout(60)]


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
