"""What has ended is freed at once: nothing of a connection waits for the garbage collector, which
engines freeze or turn off."""

from __future__ import annotations

import gc
import multiprocessing as mp
import traceback
from collections import Counter
from collections.abc import Iterator

import pytest
from receiving import PAGES, SPEC, TOKENS, eventually

from kvlink.testing.fuzz.client import run_fuzzer
from kvlink.testing.transfer_peer import SECRET, Peer
from kvlink.transfer import Endpoint, Link, PeerLost
from kvlink.transfer.accepting import Incoming
from kvlink.transfer.channel import Channel
from kvlink.transfer.log import logger
from kvlink.transfer.reconnecting import Reconnector
from kvlink.transfer.session import Session
from kvlink.transfer.tls import Tls

pytestmark = [pytest.mark.two_process, pytest.mark.timeout(100)]

KINDS = (Incoming, Channel, Tls, Session, Link, Reconnector)
NUM_FRAMES = 200


def alive() -> Counter[str]:
    return Counter(type(each).__name__ for each in gc.get_objects() if type(each) in KINDS)


@pytest.fixture
def before(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """What there was, without the collector from now on."""
    monkeypatch.setattr(logger, "disabled", True)  # who keeps records keeps errors, and frames
    gc.collect()
    gc.disable()
    yield alive()
    gc.enable()


def test_connections_under_fuzzing(before: Counter[str]) -> None:
    with Endpoint("target", secret=SECRET, paths=("host_shm",)) as endpoint:
        endpoint.register(SPEC.build())
        context = mp.get_context("spawn")
        ours, theirs = context.Pipe()
        fuzzer = context.Process(
            target=run_fuzzer, args=(theirs, endpoint.address, 11, NUM_FRAMES), daemon=True
        )
        fuzzer.start()
        theirs.close()
        assert ours.poll(60)
        counts, problems = ours.recv()
        assert not problems
        assert sum(counts.values()) >= NUM_FRAMES
        fuzzer.join(20)
        assert fuzzer.exitcode == 0
        eventually(lambda: not alive() - before)


@pytest.mark.parametrize("path", ["host_shm", "ucx"])
def test_links_of_either_side(before: Counter[str], path: str) -> None:
    with Endpoint("prefill", secret=SECRET) as endpoint, Peer(SPEC) as peer:
        pool = SPEC.build()
        SPEC.fill(pool, PAGES, TOKENS)
        endpoint.register(pool)

        def push() -> None:
            link = endpoint.connect(peer.address, require=path)
            grant = peer.call("grant", PAGES, TOKENS)
            transfer = link.push(PAGES, grant)
            peer.call("wait", grant)
            transfer.wait_arrived(10)
            link.close()

        def be_connected_to() -> None:
            peer.call("connect", endpoint.address)
            link = endpoint.accept(20)
            link.query(bytes(16))
            peer.call("close_link")
            eventually(lambda: link.closed)

        for _ in range(3):
            push()
            be_connected_to()
        eventually(lambda: not alive() - before)


def depth_of_loss(link: Link) -> int:
    """How many frames the error of a link without a session has."""
    try:
        link.query(bytes(16))
    except PeerLost as error:
        return len(traceback.extract_tb(error.__traceback__))
    raise AssertionError("it was not lost")


def test_a_link_that_looks_for_its_peer(before: Counter[str]) -> None:
    """Neither the errors that it tells nor those that it meets keep anything."""

    def lose_peer(endpoint: Endpoint) -> None:
        with Peer(SPEC) as peer:
            link = endpoint.connect(peer.address)
            peer.kill()
        eventually(lambda: "PeerUnreachable" in link.state)
        assert depth_of_loss(link) == depth_of_loss(link) == depth_of_loss(link)
        assert link.gone is not None
        assert link.gone.__traceback__ is None
        link.close()

    with Endpoint("prefill", secret=SECRET) as endpoint:
        lose_peer(endpoint)
        eventually(lambda: not alive() - before)
