"""ucx over TCP between two network namespaces: right, cut and restored, slow and lossy."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from kvlink.testing.faults.peer import PeerProcess, Remote
from kvlink.testing.two_hosts import ADDRESSES, NotPermitted, TwoHosts

pytestmark = [pytest.mark.two_hosts, pytest.mark.two_process, pytest.mark.timeout(120)]

# s, after which a silent peer is lost: soon where a test waits for it, else longer than what lost
# packets and a busy machine take.
SHORT, LONG = 2.0, 20.0
WAIT = 30.0


class Pair:
    """A party on each host, the first one connected to the second."""

    def __init__(self, hosts: TwoHosts, stack: ExitStack, peer_timeout: float) -> None:
        self.hosts = hosts
        self.parties = []
        for idx, address in enumerate(ADDRESSES):
            with hosts.executable(idx):
                party = PeerProcess(
                    f"host {idx}", "ucx", fork=False, listen=f"{address}:0",
                    peer_timeout=peer_timeout,
                )  # fmt: skip
            stack.callback(self._end, party)
            self.parties.append(party)
        self.first, self.second = self.parties
        self.first.call("connect", self.second.address, WAIT)
        self.second.call("accept", WAIT)

    @staticmethod
    def _end(party: PeerProcess) -> None:
        assert party.end() == 0

    def push(self, shape: str, request: int) -> None:
        token = self.second.call("grant", shape, request, WAIT)
        for layer in range(self.first.call("begin", token, shape, request)):
            self.first.call("layer", layer)
        self.first.call("finish")
        self.second.call("wait", WAIT)
        self.first.call("arrived", WAIT)
        self.audit()

    def pull(self, shape: str, request: int) -> None:
        token = self.second.call("offer", shape, request, WAIT)
        for part in range(self.first.call("begin_pull", token, shape, request)):
            self.first.call("part", part)
        self.first.call("finish")
        self.first.call("arrived", WAIT)
        self.second.call("released", WAIT)
        self.audit()

    def audit(self) -> None:
        """Every byte is where it must be, and every page is back."""
        for party in self.parties:
            party.call("end_job")
            assert party.call("audit") == []
            assert party.call("pages_out") == 0


def make(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch, peer_timeout: float = LONG, **wire: float
) -> Pair:
    monkeypatch.setenv("UCX_TLS", "tcp")
    try:
        hosts = stack.enter_context(TwoHosts(**wire))
    except NotPermitted as error:
        pytest.skip(f"network namespaces cannot be made here: {error}")
    return Pair(hosts, stack, peer_timeout)


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    with ExitStack() as stack:
        yield make(stack, monkeypatch, SHORT)


def test_push_and_pull_over_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as stack:
        pair = make(stack, monkeypatch)
        for party in pair.parties:
            path, detail = party.call("path")
            assert path == "ucx"
            assert "tcp" in detail
        for request, shape in enumerate(("same", "large")):
            pair.push(shape, request)
            pair.pull(shape, 100 + request)


@pytest.mark.parametrize("at", ["begun", "two layers"])
def test_a_cut_wire(pair: Pair, at: str) -> None:
    """Both sides are told within a bound, have their pages back, and find each other again."""
    pair.push("same", 1)
    token = pair.second.call("grant", "large", 2, 60.0)
    pair.first.call("begin", token, "large", 2)
    pair.hosts.cut()
    if at == "two layers":
        for layer in (2, 0):
            pair.first.call("layer", layer)
    # The grant would last a minute: it is the lost peer that ends it, within these waits.
    for party, wait in ((pair.second, "wait"), (pair.first, "arrived")):
        with pytest.raises(Remote) as told:
            party.call(wait, 15.0)
        assert told.value.name == "PeerLost"
    for party in pair.parties:
        assert party.call("settle_pages") == []
    with pytest.raises(Remote) as told:
        pair.first.call("begin", token, "same", 2)
    assert told.value.name == "PeerLost"
    assert pair.first.call("settle_pages") == []
    pair.hosts.restore()
    assert pair.first.call("wait_connected", WAIT) == 2
    pair.second.call("accept", WAIT)
    pair.push("large", 3)
    pair.pull("same", 4)


def test_latency_and_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as stack:
        pair = make(stack, monkeypatch, delay_s=0.02, loss=0.01)
        assert pair.hosts.wire.startswith(("veth with netem", "tun, "))
        began = time.monotonic()
        for request in range(3):
            pair.push("large", request)
            pair.pull("large", 100 + request)
        # Six transfers, each answered at least twice: the wire was as slow as was asked.
        assert time.monotonic() - began > 6 * 2 * 0.04
        assert pair.hosts.num_lost() > 0


def test_a_narrow_wire(monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as stack:
        pair = make(stack, monkeypatch, gbit_s=0.2)
        assert pair.hosts.wire == "veth with tbf, 0.2 Gbit/s"
        pair.push("large", 1)
        pair.pull("large", 2)
