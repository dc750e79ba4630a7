"""A receiver for each test, and a sender for those of a file: of one pool, and of a hybrid
model's (`decode`, `prefill`)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hybrid import PREFILL, SENT, Decode, HybridBody
from receiving import PAGES, SPEC, TOKENS, Receiver

from kvlink.testing.transfer_peer import PATHS, Peer


@pytest.fixture(scope="module", params=PATHS)
def path(request: pytest.FixtureRequest) -> str:
    """Every path has the same contract."""
    return str(request.param)


@pytest.fixture
def receiver(path: str) -> Iterator[Receiver]:
    receiver = Receiver(path)
    yield receiver
    receiver.endpoint.close()


@pytest.fixture(scope="module")
def sender(path: str) -> Iterator[Peer]:
    """A peer that outlives the tests; those that kill one make their own."""
    with Peer(SPEC, path=path) as peer:
        peer.call("fill", PAGES, TOKENS)
        yield peer


@pytest.fixture(params=["host_shm", "ucx"])
def decode(request: pytest.FixtureRequest) -> Iterator[Decode]:
    decode = Decode(paths=(request.param,))
    decode.path = request.param
    yield decode
    decode.endpoint.close()


@pytest.fixture(scope="module")
def hybrid_peer() -> Iterator[Peer]:
    with Peer(PREFILL, make=HybridBody) as peer:
        peer.call("fill", SENT)
        yield peer


@pytest.fixture
def prefill(hybrid_peer: Peer, decode: Decode) -> Peer:
    assert hybrid_peer.call("connect", decode.endpoint.address) == decode.path
    return hybrid_peer
