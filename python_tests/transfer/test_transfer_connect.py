"""Who gets a link: secrets, versions, frames of the wrong shape, paths."""

from __future__ import annotations

import logging
import random
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from kvlink.errors import InvalidArgument, Unsupported
from kvlink.layout import Shard
from kvlink.testing.transfer_peer import SECRET
from kvlink.testing.transfer_pool import PoolSpec
from kvlink.transfer import (
    Endpoint,
    Link,
    LinkRefused,
    PathUnavailable,
    PeerUnreachable,
    ProtocolError,
    SecretMismatch,
    TransferError,
    VersionMismatch,
    handshake,
    wire,
)

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def server() -> Iterator[Endpoint]:
    with Endpoint("server", secret=SECRET) as endpoint:
        yield endpoint


@pytest.fixture
def client() -> Iterator[Endpoint]:
    with Endpoint("client", secret=SECRET) as endpoint:
        endpoint.register(PoolSpec().build())
        yield endpoint


def set_versions(endpoint: Endpoint, low: int, high: int) -> None:
    identity = replace(endpoint._own.identity, min_version=low, max_version=high)
    endpoint._own = endpoint._acceptor._own = replace(endpoint._own, identity=identity)


def refusals(caplog: pytest.LogCaptureFixture, expected: int) -> list[str]:
    """What the server logged; it runs on its own thread."""
    end = time.monotonic() + 5
    while True:
        lines = [each.getMessage() for each in caplog.records if "refused" in each.getMessage()]
        if len(lines) >= expected or time.monotonic() > end:
            time.sleep(0.05)
            return lines
        time.sleep(0.005)


def works(client: Endpoint, server: Endpoint) -> Link:
    """Nothing was disturbed: the next peer is served."""
    link = client.connect(server.address)
    assert link.query(bytes(16)) is None
    return link


def test_both_sides_know_each_other(client: Endpoint, server: Endpoint) -> None:
    link = works(client, server)
    other = server.accept(5)
    assert (link.path, link.peer_name, link.peer_epoch) == ("host_shm", "server", server.epoch)
    assert (other.path, other.peer_name, other.peer_epoch) == ("host_shm", "client", client.epoch)
    assert link.version == other.version == wire.MAX_VERSION
    assert other.query(bytes(16)) is None
    link.close()
    assert link.closed
    end = time.monotonic() + 5
    while not other.closed and time.monotonic() < end:
        time.sleep(0.005)
    assert other.closed
    assert client.links == server.links == ()


def test_wrong_secret(client: Endpoint, server: Endpoint, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "kvlink.transfer")
    with Endpoint("stranger", secret=b"not the secret of the others") as stranger:
        with pytest.raises(SecretMismatch, match="'server' does not hold the secret of 'stranger'"):
            stranger.connect(server.address)
        lines = refusals(caplog, 1)
    assert len(lines) == 1
    assert "SecretMismatch" in lines[0]
    works(client, server)


def test_a_client_that_skips_its_own_check_is_refused(
    server: Endpoint, caplog: pytest.LogCaptureFixture
) -> None:
    channel = raw(server)
    channel.send(wire.pack_frame(hello(), 0))
    challenge = wire.expect(wire.unpack_frame(channel.recv(1 << 16), 0), wire.Challenge)
    # A reflected proof is none: the two directions have labels of their own.
    channel.send(wire.pack_frame(wire.Auth(challenge.proof), 1))
    refuse = wire.expect(wire.unpack_frame(channel.recv(1 << 16), 1), wire.Refuse)
    assert refuse.code == wire.RefuseCode.SECRET
    assert channel.recv(1 << 16) == b""
    assert len(refusals(caplog, 1)) == 1
    assert server.links == ()


@pytest.mark.parametrize(("theirs", "agreed"), [((1, 5), 3), ((2, 2), 2), ((4, 5), None)])
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
    assert len(refusals(caplog, 1)) == 1
    set_versions(client, 1, 1)
    works(client, server)


def test_versions_cannot_be_downgraded(client: Endpoint) -> None:
    """The range a client offered is in the transcript that both sides prove."""
    identity = client._own.identity
    offered = handshake.hello_of(replace(identity, max_version=3))
    tampered = replace(offered, max_version=1)
    challenge = handshake.challenge_of(replace(identity, max_version=3), tampered)
    assert challenge.version == 1
    with pytest.raises(SecretMismatch):
        handshake.answer(identity, offered, challenge)


def raw(server: Endpoint) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(5)
    sock.connect(b"\0" + server.address.removeprefix(b"host_shm:"))
    return sock


def hello() -> wire.Hello:
    return wire.Hello(1, 1, bytes(32), bytes(16), "fuzz")


GOOD = wire.pack_frame(hello(), 0)
GARBAGE = {
    "one byte": b"\0",
    "random": random.Random(1).randbytes(300),
    "truncated": GOOD[:-1],
    "too long": GOOD + b"\0",
    "other type": GOOD[:2] + b"\xc8" + GOOD[3:],
    "frame of later": wire.pack_frame(wire.Query(1, bytes(16)), 0),
    "auth first": wire.pack_frame(wire.Auth(bytes(32)), 0),
    "sequence": wire.pack_frame(hello(), 7),
    "length": GOOD[:4] + struct.pack("<I", 0xFFFFFFFF) + GOOD[8:],
    "versions": wire.pack_frame(replace(hello(), min_version=2), 0),
    "name": GOOD[:-4] + b"\xff\xff\xff\xff",
    "oversized": bytes(wire.MAX_FRAME + 100),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_refused(
    client: Endpoint, server: Endpoint, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    sock = raw(server)
    sock.send(GARBAGE[name])
    refuse = wire.expect(wire.unpack_frame(sock.recv(1 << 16), 0), wire.Refuse)
    assert refuse.code == wire.RefuseCode.MALFORMED
    assert sock.recv(1 << 16) == b""
    lines = refusals(caplog, 1)
    assert len(lines) == 1
    assert "ProtocolError" in lines[0]
    works(client, server)


def test_mutated_frames_never_get_through() -> None:
    """Each kind of frame, cut and flipped: a ProtocolError or a frame that packs to the same."""
    region = PoolSpec(shared=False)
    with Endpoint("one", secret=SECRET) as endpoint:
        frame = endpoint.register(region.build()).descriptor.to_frame()
    frames: list[wire.Frame] = [
        hello(), wire.Challenge(1, 1, 1, bytes(32), bytes(16), "x", bytes(32)),
        wire.Auth(bytes(32)), wire.Refuse(1, "no"), wire.Describe(3, 4096, 1), frame,
        wire.Query(5, bytes(16)), wire.Reply(5, 0),
    ]  # fmt: skip
    choose = random.Random(2)
    refused = 0
    for original in frames:
        good = wire.pack_frame(original, 9)
        assert wire.unpack_frame(good, 9) == original
        for _ in range(500):
            bad = bytearray(good)
            if choose.random() < 0.3:
                del bad[choose.randrange(len(bad)) :]
            else:
                bad[choose.randrange(len(bad))] ^= 1 << choose.randrange(8)
            try:
                assert wire.pack_frame(wire.unpack_frame(bytes(bad), 9), 9) == bad
            except ProtocolError:
                refused += 1
    assert refused > 500


@pytest.mark.parametrize("what", ["code", "replay", "type"])
def test_frames_behind_the_handshake_are_authenticated(
    client: Endpoint, server: Endpoint, what: str
) -> None:
    link = works(client, server)
    channel = link._channel
    query = wire.Query(99, bytes(16))
    if what == "code":
        channel._send_key = bytes(32)
    elif what == "replay":
        channel._sent -= 1
    channel.send(wire.Auth(bytes(32)) if what == "type" else query)
    end = time.monotonic() + 5
    while not link.closed and time.monotonic() < end:
        time.sleep(0.005)
    assert link.closed
    works(client, server)


def test_silence_is_bounded(server: Endpoint) -> None:
    """A peer that never answers ends a connect; one that never speaks holds nothing up."""
    mute = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    mute.bind("")
    mute.listen()
    address = b"host_shm:" + mute.getsockname()[1:]
    with pytest.raises(PeerUnreachable, match="in time"):
        server.connect(address, timeout=0.2)
    mute.close()
    with pytest.raises(PeerUnreachable):
        server.connect(address)


def test_paths(client: Endpoint, server: Endpoint) -> None:
    assert client.connect(server.address, require="host_shm").path == "host_shm"
    with pytest.raises(PathUnavailable, match="'ucx' is not in this build; there is host_shm"):
        client.connect(server.address, require="ucx")
    with pytest.raises(InvalidArgument, match="got 'tcp'"):
        client.connect(server.address, require="tcp")
    with pytest.raises(InvalidArgument, match="address"):
        client.connect(b"tcp://localhost")


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


UNCONVERTIBLE = {
    "head_dim": (PoolSpec(), PoolSpec(head_dim=8), "head_dim/head_dim_v differ: 16/16 and 8/8"),
    "form": (PoolSpec(), PoolSpec(kind="latent", kv_heads=(0, 1)), "separate pages do not convert"),
    "layers": (PoolSpec(), PoolSpec(layers=(8, 9)), "no layer of the destination"),
    "heads": (PoolSpec(), PoolSpec(kv_heads=(4, 8)), "have no KV head in common"),
    "sharing": (PoolSpec(), PoolSpec(layer_map=(0, 0, 1, 2)), "share memory at the destination"),
}


@pytest.mark.parametrize("name", UNCONVERTIBLE)
def test_pools_that_do_not_convert(client: Endpoint, server: Endpoint, name: str) -> None:
    src, dst, reason = UNCONVERTIBLE[name]
    region = client.register(src.build(), src.shard)
    server.register(dst.build(), dst.shard)
    link = client.connect(server.address)
    grant = server.grant([1, 2, 3], 10)
    with pytest.raises(TransferError, match=reason) as raised:
        link.begin([1, 2, 3], grant.to_bytes(), region=region)
    assert type(raised.value).__name__ == "Unconvertible"
    works(client, server)


def test_wrong_arguments_are_named(client: Endpoint, server: Endpoint) -> None:
    pool = PoolSpec().build()
    with pytest.raises(InvalidArgument, match="expected 4 layers, as the pool has; got 3"):
        client.register(pool, Shard(range(3), range(4)))
    with pytest.raises(InvalidArgument, match="expected 4 KV heads, as the layout has; got 2"):
        client.register(pool, Shard(range(4), range(2)))
    with pytest.raises(InvalidArgument, match="0 are registered; name one"):
        server.grant([1], 1)
    server.register(PoolSpec().build())
    for pages, tokens, message in (
        ([1, 1], 20, "each page once"),
        ([1], 17, "at least 2 for 17 tokens of page size 16; got 1"),
        ([32], 1, r"pages\[0\]: expected a page in \[0, 32\); got 32"),
        ([0, -1], 1, r"pages\[1\]: expected a page in \[0, 32\); got -1"),
        ([1], 0, "num_tokens: expected a positive integer; got 0"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            server.grant(pages, tokens)
    with pytest.raises(InvalidArgument, match="ttl"):
        server.grant([1], 1, ttl=0)
    private = server.register(PoolSpec(shared=False).build())
    with pytest.raises(Unsupported, match="shared=True"):
        server.grant([1], 1, region=private)
    with pytest.raises(InvalidArgument, match="secret"):
        Endpoint("x", secret=b"short")
