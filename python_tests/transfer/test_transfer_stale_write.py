"""The target takes its memory back; a write of the old transfer comes later. It fails with a typed
error and changes no byte."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
from receiving import eventually

from kvlink.testing.transfer_peer import SECRET, Peer
from kvlink.testing.transfer_pool import PoolSpec, pool_bytes
from kvlink.transfer import (
    Endpoint,
    Grant,
    GrantRevoked,
    Region,
    TransferError,
    TransferTimeout,
    UnknownRegion,
)

pytestmark = [pytest.mark.two_process, pytest.mark.timeout(60)]

TOKENS = 1000
PAGES = [3, 1, 7, 2, 9, 4, 6, 8, 5, 10, 12, 11, 14, 13, 15, 0]
SPECS = {
    "short runs": PoolSpec(head_dim=64, page_size=64, num_pages=16, kind="hnd"),
    "long runs": PoolSpec(head_dim=128, page_size=64, num_pages=16),
}


@dataclass
class Target:
    """Lends its pages, takes them back, and writes something else into them."""

    spec: PoolSpec
    path: str

    def __post_init__(self) -> None:
        self.endpoint = Endpoint("target", secret=SECRET, paths=(self.path,))
        self.pool = self.spec.build()
        self.region: Region = self.endpoint.register(self.pool)

    def grant(self) -> Grant:
        return self.endpoint.grant(PAGES, TOKENS)

    def reuse(self) -> bytes:
        """Other KV in every byte of the pool; what is there from now on."""
        pool_bytes(self.pool)[:] = 0xA5
        return pool_bytes(self.pool).tobytes()

    def content(self) -> bytes:
        return pool_bytes(self.pool).tobytes()


@pytest.fixture(params=["host_shm", "ucx"])
def path(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(params=list(SPECS))
def target(path: str, request: pytest.FixtureRequest) -> Iterator[Target]:
    target = Target(SPECS[request.param], path)
    yield target
    target.endpoint.close()


@pytest.fixture
def sender(target: Target) -> Iterator[Peer]:
    # Another order than the target's where runs are to be short.
    kind = "nhd" if target.spec.kind == "hnd" else target.spec.kind
    with Peer(replace(target.spec, kind=kind)) as peer:
        peer.call("fill", PAGES, TOKENS)
        assert peer.call("connect", target.endpoint.address) == target.path
        yield peer


def begun(sender: Peer, grant: Grant) -> int:
    """A push of which the first layer has arrived."""
    transfer: int = sender.call("begin", PAGES, grant.to_bytes())
    sender.call("push_layer", transfer, 0)
    grant.wait_layer(0, 10)
    sender.call("wait_outside", transfer)
    return transfer


@pytest.mark.parametrize("how", ["unregister", "revoke"])
def test_the_memory_is_taken_back_before_the_write(target: Target, sender: Peer, how: str) -> None:
    grant = target.grant()
    transfer = begun(sender, grant)
    if how == "unregister":
        target.endpoint.unregister(target.region)
    else:
        grant.revoke()
        grant.wait_released(10)
    want = target.reuse()
    for layer in (1, 2, 3):
        sender.call("push_layer", transfer, layer)
    sender.call("finish", transfer)
    with pytest.raises(GrantRevoked):
        sender.call("wait_arrived", transfer)
    sender.call("wait_source_reusable", transfer)
    with pytest.raises((GrantRevoked, UnknownRegion)):
        sender.call("begin", PAGES, grant.to_bytes())
    assert target.content() == want
    assert grant.released


@pytest.mark.parametrize("delay", [0.0, 0.0005, 0.001, 0.002, 0.004])
def test_a_writer_that_is_stopped_inside_and_goes_on_after_the_reuse(
    target: Target, sender: Peer, delay: float
) -> None:
    grant = target.grant()
    sender.start("push", PAGES, grant.to_bytes())
    time.sleep(delay)
    sender.signal(signal.SIGSTOP)
    grant.revoke()
    try:
        grant.wait_released(0.3)
    except TransferTimeout:
        # It may be inside: the pages are not ours to reuse before it has left.
        assert not grant.released
        sender.signal(signal.SIGCONT)
        grant.wait_released(10)
    want = target.reuse()
    sender.signal(signal.SIGCONT)
    try:
        transfer = sender.result()
    except TransferError:  # begin came too late
        pass
    else:
        with pytest.raises(GrantRevoked):
            sender.call("wait_arrived", transfer)
        sender.call("wait_source_reusable", transfer)
    assert target.content() == want


def test_a_writer_that_is_held_inside(target: Target, sender: Peer) -> None:
    """Whatever holds it up there, quarantine lasts as long as it may still write."""
    grant = target.grant()
    assert sender.call("enter", grant.to_bytes()) == "OK"
    sender.signal(signal.SIGSTOP)
    with pytest.raises(TransferTimeout):
        target.endpoint.unregister(target.region, timeout=0.3)
    assert not grant.released
    sender.signal(signal.SIGCONT)
    sender.call("leave")
    eventually(lambda: grant.released)
    want = target.reuse()
    assert sender.call("enter", grant.to_bytes()) == "REVOKED"
    assert target.content() == want
