"""Who gets a link: secrets, versions, paths, limits."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from knocking import HELLO, Crowd, ended, knock, proven, receive
from receiving import eventually

from kvlink.errors import InvalidArgument
from kvlink.testing.transfer_peer import SECRET
from kvlink.testing.transfer_pool import PoolSpec
from kvlink.transfer import (
    Endpoint,
    Link,
    LinkRefused,
    PathUnavailable,
    PeerUnreachable,
    SecretMismatch,
    VersionMismatch,
    accepting,
    wire,
)
from kvlink.transfer.address import Address
from kvlink.transfer.paths.ucx import Ucx

pytestmark = pytest.mark.timeout(60)
OTHER_SECRET = b"not the secret of the others"


@pytest.fixture
def server() -> Iterator[Endpoint]:
    with Endpoint("server", secret=SECRET, listen="127.0.0.1:0") as endpoint:
        yield endpoint


@pytest.fixture
def client() -> Iterator[Endpoint]:
    with Endpoint("client", secret=SECRET) as endpoint:
        endpoint.register(PoolSpec().build())
        yield endpoint


def tcp_only(endpoint: Endpoint) -> bytes:
    return replace(Address.from_bytes(endpoint.address), unix=None).to_bytes()


def set_versions(endpoint: Endpoint, low: int, high: int) -> None:
    peers = endpoint._peers
    identity = replace(peers.own.identity, min_version=low, max_version=high)
    peers.own = peers._acceptor._own = replace(peers.own, identity=identity)


def refusals(caplog: pytest.LogCaptureFixture, expected: int) -> list[str]:
    """What the server logged; it runs on its own thread."""
    lines: list[str] = []

    def told() -> bool:
        lines[:] = [each.getMessage() for each in caplog.records if "refused" in each.getMessage()]
        return len(lines) >= expected

    eventually(told)
    time.sleep(0.05)  # for one too many
    told()
    return lines


def works(client: Endpoint, server: Endpoint) -> Link:
    """Nothing was disturbed: the next peer is served."""
    link = client.connect(server.address)
    assert link.query(bytes(16)) is None
    return link


def test_both_sides_know_each_other(client: Endpoint, server: Endpoint) -> None:
    link = works(client, server)
    other = server.accept(20)
    assert (link.path, link.peer_name, link.peer_epoch) == ("host_shm", "server", server.epoch)
    assert (other.path, other.peer_name, other.peer_epoch) == ("host_shm", "client", client.epoch)
    assert link.version == other.version == wire.MAX_VERSION
    assert link.path_detail == "mapped memory"
    assert link.why_not == other.why_not == {}
    assert (link.state, link.num_sessions) == ("connected", 1)
    assert other.query(bytes(16)) is None
    link.close()
    assert link.closed
    eventually(lambda: other.closed)
    assert client.links == server.links == ()


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_wrong_secret_at_the_client(
    client: Endpoint, server: Endpoint, caplog: pytest.LogCaptureFixture, tcp: bool
) -> None:
    with Endpoint("stranger", secret=OTHER_SECRET) as stranger:
        with pytest.raises(SecretMismatch, match="does not hold the secret"):
            stranger.connect(tcp_only(server) if tcp else server.address)
        lines = refusals(caplog, 1)
    assert len(lines) == 1
    assert "SecretMismatch" in lines[0]
    works(client, server)


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_wrong_secret_at_a_client_that_does_not_look(
    client: Endpoint,
    server: Endpoint,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tcp: bool,
) -> None:
    """It takes any server; the server takes not any client, and says so."""
    import ssl

    from kvlink.transfer import tls

    with monkeypatch.context() as patched:
        context = tls._context

        def blind(protocol: int, certificate: bytes, chain: bytes) -> ssl.SSLContext:
            made = context(protocol, certificate, chain)
            made.verify_mode = ssl.CERT_NONE
            return made

        patched.setattr(tls, "_context", blind)
        patched.setattr(tls.Tls, "_check", lambda self: None)
        stranger = Endpoint("stranger", secret=OTHER_SECRET)
    with stranger:
        with pytest.raises(SecretMismatch):
            stranger.connect(tcp_only(server) if tcp else server.address)
        lines = refusals(caplog, 1)
    assert len(lines) == 1
    assert "SecretMismatch" in lines[0]
    assert server.links == ()
    works(client, server)


@pytest.mark.parametrize(("theirs", "agreed"), [((2, 5), 3), ((2, 2), 2), ((4, 5), None)])
def test_versions_are_negotiated(
    client: Endpoint, server: Endpoint, caplog: pytest.LogCaptureFixture,
    theirs: tuple[int, int], agreed: int | None,
) -> None:  # fmt: skip
    set_versions(server, 1, 3)
    set_versions(client, *theirs)
    if agreed is not None:
        assert works(client, server).version == agreed
        return
    with pytest.raises(VersionMismatch, match="'server' speaks 1 to 3; 'client' speaks 4 to 5"):
        client.connect(server.address)
    lines = refusals(caplog, 1)
    assert len(lines) == 1
    assert "VersionMismatch" in lines[0]
    set_versions(client, 2, 2)
    works(client, server)


def test_addresses_have_a_version(client: Endpoint) -> None:
    with pytest.raises(VersionMismatch, match="expected version 2; got 'kvlink:3'"):
        client.connect(b"kvlink:3;unix=x")


def test_silence_is_bounded(client: Endpoint, server: Endpoint) -> None:
    """A peer that never answers ends a connect; one that is gone ends it at once."""
    mute = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mute.bind("")
    mute.listen()
    address = b"kvlink:2;unix=" + mute.getsockname()[1:]
    with pytest.raises(PeerUnreachable, match="in time"):
        server.connect(address, timeout=0.2)
    mute.close()
    with pytest.raises(PeerUnreachable):
        server.connect(address)
    works(client, server)


def test_who_never_speaks_holds_nobody_up(
    client: Endpoint, server: Endpoint, caplog: pytest.LogCaptureFixture
) -> None:
    silent = [knock(server) for _ in range(20)]
    half_way = [proven(server) for _ in range(20)]
    works(client, server)
    incoming = server._peers._acceptor._incoming
    eventually(lambda: len(incoming) == 40)
    for each in list(incoming):
        assert each.deadline == each.began + accepting._HANDSHAKE_TIMEOUT
        each.deadline = 0.0  # it has passed
    assert all(ended(channel) for channel in half_way)
    assert len(refusals(caplog, 40)) == 40
    for sock in silent:
        assert sock.recv(1) == b""
        sock.close()


def test_a_crowd_that_never_speaks_keeps_nobody_out(client: Endpoint, server: Endpoint) -> None:
    crowd = [knock(server) for _ in range(accepting._MAX_INCOMING + 20)]
    works(client, server)
    for sock in crowd:
        sock.close()


def test_a_crowd_that_comes_again_and_again_keeps_nobody_out(
    client: Endpoint, server: Endpoint
) -> None:
    with Crowd(server, 2 * accepting._MAX_INCOMING) as crowd:
        eventually(lambda: crowd.num_knocks > 2 * accepting._MAX_INCOMING)
        for _ in range(5):
            client.connect(server.address, timeout=30.0).close()
        eventually(lambda: crowd.num_knocks > 3 * accepting._MAX_INCOMING)


# --- paths -------------------------------------------------------------------------------------


def test_required_paths(client: Endpoint, server: Endpoint) -> None:
    assert client.connect(server.address, require="host_shm").path == "host_shm"
    with pytest.raises(PathUnavailable, match="'nccl' is not in this build; there is host_shm"):
        client.connect(server.address, require="nccl")
    with pytest.raises(InvalidArgument, match="got 'tcp'"):
        client.connect(server.address, require="tcp")


def test_a_path_that_the_server_does_not_take(
    client: Endpoint, caplog: pytest.LogCaptureFixture
) -> None:
    with Endpoint("server", secret=SECRET, paths=("ucx",)) as server:
        with pytest.raises(PathUnavailable, match="it is not among the endpoint's paths"):
            client.connect(server.address, require="host_shm")
        assert len(refusals(caplog, 1)) == 1


def test_a_path_that_the_client_does_not_take(client: Endpoint, server: Endpoint) -> None:
    other = Endpoint("other", secret=SECRET, paths=("ucx",))
    with other, pytest.raises(PathUnavailable, match="not among the endpoint's paths"):
        other.connect(server.address, require="host_shm")
    works(client, server)


def test_host_shm_needs_one_host(client: Endpoint, server: Endpoint) -> None:
    with pytest.raises(PathUnavailable, match=r"host_shm: .*reached over TCP"):
        client.connect(tcp_only(server), require="host_shm")


@pytest.mark.parametrize("which", ["client", "server"])
def test_ucx_of_another_release(
    client: Endpoint, server: Endpoint, caplog: pytest.LogCaptureFixture, which: str
) -> None:
    """Links between some releases come up and carry nothing: there is no link then. The client
    hears of the server's first; where it does not look, the server does."""
    other = client if which == "client" else server
    path = other._peers.own.paths["ucx"]
    assert isinstance(path, Ucx)
    major, minor = path._release
    assert (major, minor) >= (1, 13)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(path, "_release", (major, minor + 1))
        if which == "client":
            patched.setattr(path, "_check_release", lambda peer, told: None)
        expected = f"one release of UCX at both ends; got {major}.{minor} here and "
        if which == "server":
            expected = f"one release of UCX .* {major}.{minor + 1} at 'server'"
        with pytest.raises(PathUnavailable, match=expected):
            client.connect(tcp_only(server))
        lines = refusals(caplog, 1)
    assert len(lines) == 1
    assert "PathUnavailable" in lines[0]
    assert client.connect(tcp_only(server)).path == "ucx"


def test_a_peer_that_shares_no_path_is_told_why(server: Endpoint) -> None:
    channel = proven(server)
    channel.send(replace(HELLO, paths=(("nccl", ""), ("host_shm", "it is switched off"))))
    refuse = wire.expect(receive(channel), wire.Refuse)
    assert refuse.code == wire.RefuseCode.PATH
    assert "host_shm: at 'knocker' it is switched off" in refuse.message
    assert ended(channel)


# --- limits ------------------------------------------------------------------------------------


def test_links_have_a_limit_and_closing_makes_room(client: Endpoint, server: Endpoint) -> None:
    links = [client.connect(server.address) for _ in range(64)]
    with pytest.raises(LinkRefused):
        client.connect(server.address)
    links[7].close()
    end = time.monotonic() + 5
    while time.monotonic() < end:
        try:
            works(client, server)
            return
        except LinkRefused:
            time.sleep(0.01)
    raise AssertionError("no link within 5 s after one was closed")


def test_links_that_nobody_accepts_are_forgotten(client: Endpoint, server: Endpoint) -> None:
    for _ in range(5):
        client.connect(server.address).close()
    eventually(lambda: not server.links)
    assert not server._peers._accepted
    link = works(client, server)
    assert server.accept(20).peer_epoch == client.epoch
    assert link.state == "connected"


def test_logging_names_the_peer(
    client: Endpoint, server: Endpoint, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kvlink.transfer")
    works(client, server).close()
    eventually(lambda: any("link to 'client' lost" in r.getMessage() for r in caplog.records))
