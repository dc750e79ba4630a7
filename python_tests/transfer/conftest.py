"""A receiver for each test, and a sender for those of a file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from receiving import PAGES, SPEC, TOKENS, Receiver

from kvlink.testing.transfer_peer import Peer


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
