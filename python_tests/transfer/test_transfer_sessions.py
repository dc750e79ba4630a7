"""Links that outlive their sessions: peers that restart, connections that break, patience."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator

import pytest
from receiving import PAGES, SPEC, TOKENS, eventually

from kvlink.testing.transfer_peer import SECRET, Peer
from kvlink.transfer import (
    Endpoint,
    Link,
    LinkClosed,
    PeerLost,
    PeerUnreachable,
    TransferTimeout,
    UnknownRegion,
    reconnecting,
    wire,
)
from kvlink.transfer import link as link_module
from kvlink.transfer.channel import Channel

pytestmark = [pytest.mark.two_process, pytest.mark.timeout(60)]

SEARCHING = "kvlink-connect"  # the thread


@pytest.fixture
def prefill() -> Iterator[Endpoint]:
    with Endpoint("prefill", secret=SECRET) as endpoint:
        pool = SPEC.build()
        SPEC.fill(pool, PAGES, TOKENS)
        endpoint.register(pool)
        yield endpoint


def threads() -> int:
    return sum(1 for thread in threading.enumerate() if thread.name == SEARCHING)


def arrives(link: Link, peer: Peer) -> None:
    grant = peer.call("grant", PAGES, TOKENS)
    transfer = link.push(PAGES, grant)
    assert peer.call("wait", grant) == PAGES
    transfer.wait_arrived(10)


@pytest.mark.parametrize("path", ["host_shm", "ucx"])
def test_a_peer_that_is_killed_and_comes_back(prefill: Endpoint, path: str) -> None:
    """What was under way fails at once; the same link serves the new process."""
    address: list[bytes] = []
    with Peer(SPEC) as peer:
        address.append(peer.address)
        link = prefill.connect(lambda: address[0], require=path)
        arrives(link, peer)
        old_epoch = link.peer_epoch
        old_grant = peer.call("grant", PAGES, TOKENS)
        transfer = link.begin(PAGES, old_grant)
        transfer.push_layer(0)
        peer.kill()
    with pytest.raises(PeerLost):
        transfer.wait_arrived(10)
    with pytest.raises(PeerLost):
        link.begin(PAGES, old_grant)
    eventually(lambda: link.gone)
    assert not link.closed
    with pytest.raises(TransferTimeout, match="reconnecting"):
        link.wait_connected(0.1)
    for _ in range(2):  # twice, as once could be luck
        with Peer(SPEC) as peer:
            address[0] = peer.address
            link.wait_connected(20)
            assert link.gone is None
            assert link.peer_epoch != old_epoch
            with pytest.raises(UnknownRegion, match="restarted"):
                link.begin(PAGES, old_grant)
            arrives(link, peer)
            peer.kill()
        eventually(lambda: link.state != "connected")
    assert link.num_sessions == 3
    assert prefill.links == (link,)
    link.close()
    eventually(lambda: threads() == 0)
    assert prefill.links == ()


def test_a_connection_that_breaks(prefill: Endpoint) -> None:
    """Both live, the connection does not: the peer has another link, the grants stay."""
    with Endpoint("decode", secret=SECRET) as decode:
        decode.register(SPEC.build())
        link = prefill.connect(decode.address)
        theirs = decode.accept(20)
        grant = decode.grant(PAGES, TOKENS)
        epoch = link.peer_epoch
        theirs.close()
        eventually(lambda: link.num_sessions == 2)
        assert link.peer_epoch == epoch
        again = decode.accept(20)
        assert again is not theirs
        assert theirs.closed
        with pytest.raises(LinkClosed):
            theirs.query(bytes(16))
        link.push(PAGES, grant.to_bytes()).wait_source_reusable(10)
        grant.wait(10)
        assert again.query(bytes(16)) is None


def test_a_peer_comes_back_to_who_accepts() -> None:
    """The link that was accepted ends; the next one has the same name, and is not a dead one."""
    with Endpoint("decode", secret=SECRET) as decode:
        pool = SPEC.build()
        decode.register(pool)
        SPEC.fill(pool, PAGES, TOKENS)
        with Peer(SPEC) as peer:
            peer.call("connect", decode.address)
            first = decode.accept(20)
            old_grant, old_epoch = peer.call("grant", PAGES, TOKENS), first.peer_epoch
            peer.kill()
        eventually(lambda: first.gone)
        with pytest.raises(PeerLost):
            first.begin(PAGES, old_grant)
        with Peer(SPEC) as peer:  # nobody accepts this one
            peer.call("connect", decode.address)
            eventually(lambda: decode.links)
            peer.kill()
        eventually(lambda: not decode.links)
        with Peer(SPEC) as peer:
            peer.call("connect", decode.address)
            link = decode.accept(20)
            assert (link.peer_name, link.state) == (first.peer_name, "connected")
            assert link.peer_epoch != old_epoch
            with pytest.raises(UnknownRegion, match="restarted"):
                link.begin(PAGES, old_grant)
            arrives(link, peer)
            with pytest.raises(TransferTimeout):
                decode.accept(0)


@pytest.mark.parametrize("which", ["link", "endpoint"])
def test_closing_ends_the_search_at_once(which: str) -> None:
    prefill = Endpoint("prefill", secret=SECRET)
    decode = Endpoint("decode", secret=SECRET)
    link = prefill.connect(decode.address)
    waiting: list[BaseException] = []

    def wait() -> None:
        try:
            link.wait_connected(30)
        except LinkClosed as error:
            waiting.append(error)

    decode.close()
    eventually(lambda: threads() == 1)
    thread = threading.Thread(target=wait)
    thread.start()
    (link if which == "link" else prefill).close()
    thread.join(10)
    assert len(waiting) == 1
    assert (link.state, link.closed) == ("closed", True)
    eventually(lambda: threads() == 0)
    prefill.close()
    with pytest.raises(LinkClosed):
        prefill.connect(b"kvlink:2;unix=nobody")


@pytest.mark.parametrize("path", ["host_shm", "ucx"])
def test_a_closed_link_leaves_no_session_behind(
    prefill: Endpoint, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """It is closed while it connects again, when the peer is about to believe in the session: the
    peer's next link is the one that is made afterwards, and no other follows it."""
    monkeypatch.setattr(link_module, "_SEARCH_TIMEOUT", 30.0)
    send = Channel.send
    connecting = threading.Event()

    def send_late(channel: Channel, frame: wire.Frame, fds: tuple[int, ...] = ()) -> None:
        if isinstance(frame, wire.Describe) and threading.current_thread().name == SEARCHING:
            connecting.set()
            eventually(lambda: link.closed)
        send(channel, frame, fds)

    with Endpoint("decode", secret=SECRET) as decode:
        link = prefill.connect(decode.address, require=path)
        monkeypatch.setattr(Channel, "send", send_late)
        decode.accept(20).close()
        assert connecting.wait(20)
        link.close()
        assert threads() == 0
        again = prefill.connect(decode.address, require=path)
        theirs = decode.accept(20)
        assert theirs.query(bytes(16)) is None
        with pytest.raises(TransferTimeout):
            decode.accept(0.1)
        assert (again.state, theirs.state) == ("connected", "connected")


def test_a_link_that_is_ending_is_not_given(prefill: Endpoint) -> None:
    """Its end was seen, but what the path has to clean up takes a while."""
    let_go = threading.Event()
    with Endpoint("decode", secret=SECRET) as decode:
        first = prefill.connect(decode.address)
        eventually(lambda: decode._peers._accepted)
        session = next(iter(decode._peers._accepted))._last
        close = session.path_link.close

        def close_late(status: object) -> None:
            assert let_go.wait(30)
            close(status)

        session.path_link.close = close_late
        first.close()
        try:
            eventually(lambda: session.gone)
            with pytest.raises(TransferTimeout):
                decode.accept(0)
        finally:
            let_go.set()
        prefill.connect(decode.address)
        assert decode.accept(20).state == "connected"


def test_refusals_are_told_once_and_waited_out(
    prefill: Endpoint, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another secret stands for a peer that is set up wrongly for a while."""
    monkeypatch.setattr(reconnecting, "_LATE", (0.05, 0.1))
    first = Endpoint("decode", secret=SECRET)
    address = [first.address]
    link = prefill.connect(lambda: address[0])
    first.close()
    asked = []

    def resolve() -> bytes:
        asked.append(1)
        return address[0]

    assert link._reconnector is not None
    link._reconnector._address = resolve
    with Endpoint("decode", secret=b"set up with another secret") as wrong:
        address[0] = wrong.address
        eventually(lambda: "SecretMismatch" in link.state)
        asked.clear()
        eventually(lambda: len(asked) > 3)
    ours = [r for r in caplog.records if "does not connect again" in r.getMessage()]
    assert sum("SecretMismatch" in r.getMessage() for r in ours) == 1
    with Endpoint("decode", secret=SECRET) as right:
        address[0] = right.address
        link.wait_connected(10)
        assert link.state == "connected"


def test_a_resolver_that_fails(prefill: Endpoint, caplog: pytest.LogCaptureFixture) -> None:
    """At first it is the caller's; later it is only a reason to wait."""

    def broken() -> bytes:
        raise OSError("the directory is away")

    with pytest.raises(OSError, match="directory is away"):
        prefill.connect(broken)
    assert prefill.links == ()
    first = Endpoint("decode", secret=SECRET)
    calls = [lambda: first.address, broken]
    link = prefill.connect(lambda: calls[0]())
    calls.pop(0)
    first.close()
    eventually(lambda: "directory is away" in link.state)
    with Endpoint("decode", secret=SECRET) as second:
        calls[0] = lambda: second.address
        link.wait_connected(10)
    assert any("directory is away" in record.getMessage() for record in caplog.records)


def test_nobody_at_the_address(prefill: Endpoint) -> None:
    with Endpoint("gone", secret=SECRET) as gone:
        address = gone.address
    with pytest.raises(PeerUnreachable):
        prefill.connect(address)
    assert prefill.links == ()
    eventually(lambda: threads() == 0)  # those of earlier tests have ended


def test_sessions_are_logged(prefill: Endpoint, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kvlink.transfer")
    with Endpoint("decode", secret=SECRET) as decode:
        link = prefill.connect(decode.address)
        decode.accept(20).close()
        eventually(lambda: link.num_sessions == 2)
    lines = [record.getMessage() for record in caplog.records]
    assert any("reconnected 'decode'" in line for line in lines)
    assert any("link to 'decode' lost" in line for line in lines)
