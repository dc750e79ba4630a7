"""No page is lent to two requests: what one peer may write is neither granted nor offered again."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from receiving import PAGES, SPEC, TOKENS, Receiver, eventually, new_sender

from kvlink.errors import InvalidArgument
from kvlink.testing.transfer_peer import SECRET, Peer
from kvlink.transfer import (
    Endpoint,
    Grant,
    GrantRevoked,
    OutOfSlots,
    PagesLent,
    TransferError,
    TransferStatus,
    TransferTimeout,
)

pytestmark = [pytest.mark.two_process, pytest.mark.timeout(60)]


def test_a_page_is_granted_once(receiver: Receiver, sender: Peer) -> None:
    sender.call("connect", receiver.address)
    grant = receiver.grant()
    for pages in (PAGES, [1, PAGES[1], 2], np.array([1, 2, PAGES[2]])):
        with pytest.raises(PagesLent, match=r"grant: page \d of region 0 is lent by grant") as told:
            receiver.endpoint.grant(pages, TOKENS)
        assert grant.transfer_id.hex() in str(told.value)
    beside = receiver.endpoint.grant([1, 2, 4], TOKENS)  # what was refused holds nothing
    sender.call("push", PAGES, grant.to_bytes())
    grant.wait(10)
    assert not receiver.returned
    assert beside.revoke()
    receiver.arrive(sender)  # the same pages: they belong to the request, and to nobody else


def test_a_page_is_granted_or_offered(receiver: Receiver, sender: Peer) -> None:
    sender.call("connect", receiver.address)
    grant = receiver.grant()
    with pytest.raises(PagesLent, match="offer: page 5 of region 0 is lent by grant"):
        receiver.endpoint.offer([1, 5], 20)
    grant.revoke()
    SPEC.fill(receiver.pool, PAGES, TOKENS)
    offers = [receiver.endpoint.offer(PAGES, TOKENS) for _ in range(3)]  # as many as wanted
    with pytest.raises(PagesLent, match="grant: page 9 of region 0 is lent by offer"):
        receiver.endpoint.grant([9], 16)
    for offer in offers:
        sender.call("wait_arrived", sender.call("pull", offer.to_bytes(), [0, 1, 2]))
        if offer is not offers[-1]:
            with pytest.raises(PagesLent):
                receiver.endpoint.grant([9], 16)
    # The last one has ended, whether its owner has looked or not.
    assert receiver.endpoint.grant([9], 16).revoke()


def test_pages_are_lent_while_a_peer_is_inside(receiver: Receiver, sender: Peer) -> None:
    sender.call("connect", receiver.address)
    grants = []
    for end in ("revoke", "deadline"):
        grants.append(grant := receiver.grant())
        assert sender.call("enter", grant.to_bytes()) == "OK"
        if end == "revoke":
            assert grant.revoke()
        else:
            assert grant.extend(0.01)
            eventually(lambda grant=grant: grant.status == TransferStatus.EXPIRED)
        with pytest.raises(PagesLent, match=r"which ended as \w+ and is not released yet"):
            receiver.grant()
        with pytest.raises(PagesLent):
            receiver.endpoint.offer([PAGES[0]], 16)
        sender.call("leave")
        grant.wait_released(20)
        receiver.arrive(sender)
    receiver.gave_back(*grants)


def test_pages_of_a_peer_that_dies_inside(receiver: Receiver) -> None:
    with new_sender(receiver) as peer:
        grant = receiver.grant()
        assert peer.call("enter", grant.to_bytes()) == "OK"
        grant.revoke()
        with pytest.raises(PagesLent):
            receiver.grant()
        peer.kill()
    grant.wait_released(20)
    with new_sender(receiver) as peer:
        receiver.arrive(peer)


def test_pages_are_not_pulled_into_while_lent(receiver: Receiver, sender: Peer) -> None:
    link = receiver.endpoint.connect(sender.address)
    token = sender.call("offer", PAGES, TOKENS)
    grant = receiver.endpoint.grant([3, 4], 32)
    with pytest.raises(PagesLent, match="pull: page 3 of region 0 is lent by grant"):
        link.pull(token, PAGES)
    assert link.metrics()["refused"] == {"PagesLent": 1}
    grant.revoke()
    link.pull(token, PAGES).wait_arrived(10)


# --- without a peer -------------------------------------------------------------------------------


@pytest.fixture
def endpoint() -> Endpoint:
    return Endpoint("owner", secret=SECRET, num_slots=2, num_page_entries=8)


def test_a_refusal_takes_no_slot(endpoint: Endpoint) -> None:
    with endpoint:
        endpoint.register(SPEC.build())
        held = endpoint.grant([1], 16)
        for _ in range(8):
            with pytest.raises(PagesLent):
                endpoint.grant([2, 1], 32)
        other = endpoint.grant([2], 16)
        for _ in range(4):
            with pytest.raises(OutOfSlots):
                endpoint.grant([3, 4], 32)
            with pytest.raises(InvalidArgument, match="each page once"):
                endpoint.grant([3, 3], 32)
        other.pages[:] = 7  # whoever reads a grant may change what it has read
        held.revoke(), other.revoke()
        for pages in ([3, 4], [1, 2]):  # nothing stayed lent
            assert endpoint.grant(pages, 32).revoke()


def test_callbacks_may_lend_again(endpoint: Endpoint) -> None:
    with endpoint:
        told: list[Grant] = []

        def note(grant: Grant) -> None:
            told.append(endpoint.grant(grant.pages, 32))

        endpoint.register(SPEC.build())
        for ttl in (0.001, 30.0):
            grant = endpoint.grant([1, 2], 32, ttl, on_release=note)
            if ttl == 30.0:
                grant.revoke()
            eventually(lambda: told)
            assert told.pop().revoke()


def test_one_pool_in_two_regions_and_endpoints(endpoint: Endpoint) -> None:
    pool = SPEC.build()
    with endpoint, Endpoint("second", secret=SECRET) as second:
        regions = [endpoint.register(pool), endpoint.register(pool), second.register(pool)]
        grant = endpoint.grant([1], 16, region=regions[0])
        with pytest.raises(PagesLent, match="page 1 of region 1 is lent by grant"):
            endpoint.grant([1], 16, region=regions[1])
        with pytest.raises(PagesLent, match="page 1 of region 0 is lent by another endpoint"):
            second.grant([1], 16)
        assert second.grant([2], 16).revoke()
        endpoint.close()
        assert grant.released
        assert second.grant([1], 16).revoke()


def test_one_of_many_threads_is_granted_a_page() -> None:
    with Endpoint("owner", secret=SECRET) as endpoint:
        endpoint.register(SPEC.build())
        granted: list[Grant] = []
        refused: list[TransferError] = []
        start = threading.Barrier(8)

        def grant() -> None:
            start.wait(10)
            for page in range(10):
                try:
                    granted.append(endpoint.grant([page, (page + 1) % 10], 32))
                except PagesLent as error:
                    refused.append(error)

        threads = [threading.Thread(target=grant) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        pages = np.concatenate([grant.pages for grant in granted])
        assert len(granted) + len(refused) == 80
        assert np.unique(pages).size == pages.size >= 2


def test_a_group_grants_nothing_when_a_page_is_lent(endpoint: Endpoint) -> None:
    with endpoint:
        regions = [endpoint.register(SPEC.build()) for _ in range(2)]
        held = endpoint.grant([1], 16, region=regions[1])
        with pytest.raises(PagesLent, match="page 1 of region 1"):
            endpoint.grant_group([(regions[0], [1], 16), (regions[1], [1], 16)])
        assert endpoint.grant([1], 16, region=regions[0]).revoke()
        held.revoke()
        group = endpoint.grant_group([(regions[0], [1], 16), (regions[1], [1], 16)])
        with pytest.raises(PagesLent):
            endpoint.grant([1], 16, region=regions[0])
        with pytest.raises(TransferTimeout):
            group.wait(0)
        group.revoke()
        with pytest.raises(GrantRevoked):
            group.wait(0)
        assert endpoint.grant([1], 16, region=regions[0]).revoke()
