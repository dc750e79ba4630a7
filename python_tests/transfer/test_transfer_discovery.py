"""Peers that find each other by name, and again after a restart."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from receiving import eventually

from kvlink.errors import InvalidArgument
from kvlink.testing.transfer_peer import SECRET
from kvlink.transfer import (
    Endpoint,
    FileDiscovery,
    PeerUnreachable,
    StoreDiscovery,
)

pytestmark = pytest.mark.timeout(60)
Discovery = Any


def tcp_store() -> Any:
    from torch.distributed import TCPStore

    timeout = timedelta(seconds=10)
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timeout)


@pytest.fixture(params=["file", "store"])
def discovery(request: pytest.FixtureRequest, tmp_path: Path) -> Discovery:
    return FileDiscovery(tmp_path) if request.param == "file" else StoreDiscovery(tcp_store())


@pytest.mark.parametrize("name", ["decode-0", "a/../b c", "ü" * 127, "." * 255])
def test_by_any_name(discovery: Discovery, name: str) -> None:
    with Endpoint(name, secret=SECRET) as server, Endpoint("client", secret=SECRET) as client:
        resolve = discovery.resolver(name)
        with pytest.raises(PeerUnreachable, match="nobody has published"):
            resolve()
        discovery.publish(server)
        assert resolve() == server.address
        assert client.connect(resolve).peer_name == name
        discovery.withdraw(server)
        with pytest.raises(PeerUnreachable):
            resolve()
        discovery.withdraw(server)


def test_nobody_is_there(discovery: Discovery) -> None:
    client = Endpoint("client", secret=SECRET)
    with client, pytest.raises(PeerUnreachable, match="nobody has published 'ghost'"):
        client.connect(discovery.resolver("ghost"), timeout=0.1)


def test_whom_one_waits_for(discovery: Discovery) -> None:
    with Endpoint("late", secret=SECRET) as late, Endpoint("client", secret=SECRET) as client:
        timer = threading.Timer(0.2, discovery.publish, (late,))
        timer.start()
        assert client.connect(discovery.resolver("late"), timeout=10).peer_name == "late"
        timer.join()


def test_a_stale_entry_does_no_harm(discovery: Discovery) -> None:
    stale = Endpoint("decode", secret=SECRET)
    discovery.publish(stale)
    stale.close()
    with Endpoint("client", secret=SECRET) as client:
        resolve = discovery.resolver("decode")
        with pytest.raises(PeerUnreachable):
            client.connect(resolve, timeout=0.1)
        with Endpoint("decode", secret=SECRET) as fresh:
            timer = threading.Timer(0.2, discovery.publish, (fresh,))
            timer.start()
            assert client.connect(resolve, timeout=10).peer_epoch == fresh.epoch
            timer.join()
            discovery.withdraw(stale)  # which is not its own any more
            assert resolve() == fresh.address


def test_a_restarted_peer_is_found_again(discovery: Discovery) -> None:
    with Endpoint("client", secret=SECRET) as client:
        first = Endpoint("decode", secret=SECRET)
        discovery.publish(first)
        link = client.connect(discovery.resolver("decode"))
        assert link.peer_epoch == first.epoch
        first.close()
        eventually(lambda: link.state != "connected")
        with Endpoint("decode", secret=SECRET) as second:
            discovery.publish(second)
            link.wait_connected(10)
            assert link.peer_epoch == second.epoch
            assert link.num_sessions == 2
            assert link.query(bytes(16)) is None


def test_files_are_replaced_in_one_step(tmp_path: Path) -> None:
    """Readers see whole addresses only, and nothing is left over."""
    discovery = FileDiscovery(tmp_path / "made" / "here")
    ends = [Endpoint("one", secret=SECRET, listen=listen) for listen in (None, "127.0.0.1:0")]
    resolve: Callable[[], bytes] = discovery.resolver("one")
    discovery.publish(ends[0])
    seen: set[bytes] = set()
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            seen.add(resolve())

    thread = threading.Thread(target=read)
    thread.start()
    for turn in range(500):
        discovery.publish(ends[turn % 2])
    stop.set()
    thread.join(10)
    assert seen <= {end.address for end in ends}
    assert os.listdir(discovery.folder) == ["one.kvlink"]
    for end in ends:
        end.close()


def test_what_is_no_store() -> None:
    with pytest.raises(InvalidArgument, match="store: expected a torch"):
        StoreDiscovery({})
    with pytest.raises(InvalidArgument, match="name"):
        StoreDiscovery(tcp_store()).resolver("")
