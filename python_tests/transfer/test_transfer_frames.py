"""Bytes that are no frames, before and behind TLS: each refused once, and nobody else notices."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import struct
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace

import pytest
from knocking import HELLO, closed, ended, knock, proven, receive
from receiving import eventually

from kvlink._C import SlotKind
from kvlink.layout import KVLayout
from kvlink.testing.transfer_peer import SECRET
from kvlink.testing.transfer_pool import PoolSpec
from kvlink.transfer import Endpoint, LinkClosed, ProtocolError, wire
from kvlink.transfer.descriptor import Descriptor
from kvlink.transfer.framing import FrameHead, pack_frame, seal, unpack_frame
from kvlink.transfer.region import RegionDescriptor

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def server(caplog: pytest.LogCaptureFixture) -> Iterator[Endpoint]:
    caplog.set_level(logging.WARNING, "kvlink.transfer")
    with Endpoint("server", secret=SECRET, listen="127.0.0.1:0") as endpoint:
        yield endpoint


def works(server: Endpoint) -> None:
    with Endpoint("client", secret=SECRET) as client:
        assert client.connect(server.address).query(bytes(16)) is None


def told_once(caplog: pytest.LogCaptureFixture, what: str) -> None:
    eventually(lambda: caplog.records)
    time.sleep(0.05)
    lines = [each.getMessage() for each in caplog.records]
    assert len(lines) == 1, lines
    assert what in lines[0]


BEFORE_TLS = {
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "zeros": bytes(300),
    "random": random.Random(1).randbytes(300),
    "a lot": random.Random(2).randbytes(1 << 20),
    "a frame": pack_frame(HELLO, 0),
    "a record too long": b"\x16\x03\x01\xff\xff" + bytes(1 << 16),
}


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
@pytest.mark.parametrize("name", BEFORE_TLS)
def test_no_tls(server: Endpoint, caplog: pytest.LogCaptureFixture, name: str, tcp: bool) -> None:
    sock = knock(server, tcp)
    try:
        sock.sendall(BEFORE_TLS[name])
    except ConnectionError:
        assert name == "a lot"  # it did not wait for the end
    assert closed(sock)
    sock.close()
    told_once(caplog, "refused an unknown peer: ProtocolError: TLS")
    works(server)


def test_a_tls_handshake_that_breaks_off(
    server: Endpoint, caplog: pytest.LogCaptureFixture
) -> None:
    sock = knock(server)
    sock.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
    sock.close()
    told_once(caplog, "went away during the handshake")
    works(server)


def test_records_that_were_altered(server: Endpoint, caplog: pytest.LogCaptureFixture) -> None:
    channel = proven(server)
    channel.sock.setblocking(True)
    channel.sock.sendall(b"\x17\x03\x03\x00\x40" + bytes(64))
    assert closed(channel.sock)
    channel.close()
    told_once(caplog, "ProtocolError: TLS")
    works(server)


GOOD = pack_frame(HELLO, 0)
GARBAGE = {
    "random": random.Random(3).randbytes(300),
    "other type": GOOD[:2] + b"\xc8" + GOOD[3:],
    "frame of later": pack_frame(wire.Query(1, bytes(16)), 0),
    "describe first": pack_frame(wire.Describe(0, 0, b""), 0),
    "sequence": pack_frame(HELLO, 7),
    "oversized": GOOD[:4] + struct.pack("<I", wire.MAX_FRAME) + GOOD[8:],
    "huge": GOOD[:4] + struct.pack("<I", 0xFFFFFFFF) + GOOD[8:],
    "short body": seal(GOOD[:4] + struct.pack("<I", len(GOOD) - FrameHead.SIZE - 1) + GOOD[8:-1]),
    "altered": GOOD.replace(b"knocker", b"knicker"),
    "versions": pack_frame(replace(HELLO, min_version=3), 0),
    "text": seal(GOOD.replace(b"knocker", b"\xff\xfe\xfd\xfc\xfb\xfa\xf9")),
    "paths": pack_frame(replace(HELLO, paths=tuple((str(i), "") for i in range(17))), 0),
    "descriptors": pack_frame(HELLO, 0, num_fds=2),
    "more descriptors than there can be": pack_frame(HELLO, 0, num_fds=200),
}


REASONS = {
    "random": "not one of this protocol",
    "other type": "unknown type 200",
    "frame of later": "expected Hello; got Query",
    "describe first": "expected Hello; got Describe",
    "sequence": "expected sequence number 0; got 7",
    "oversized": "expected at most 262144 bytes and 4 descriptors; got 262164 and 0",
    "huge": "expected at most 262144 bytes and 4 descriptors; got 4294967315 and 0",
    "short body": "expected 2 more bytes; got 1",
    "altered": "it was altered",
    "versions": "versions 3 to 2 are no range",
    "text": "text is not UTF-8",
    "paths": "expected at most 16 texts; got 17",
    "descriptors": "expected 2 descriptors; got 0",
    "more descriptors than there can be": "and 4 descriptors; got 60 and 200",
}


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_refused(
    server: Endpoint, caplog: pytest.LogCaptureFixture, name: str, tcp: bool
) -> None:
    channel = proven(server, tcp=tcp)
    channel.send_bytes(GARBAGE[name])
    refuse = wire.expect(receive(channel), wire.Refuse)
    assert refuse.code == wire.RefuseCode.MALFORMED
    assert REASONS[name] in refuse.message
    assert ended(channel)
    channel.close()
    told_once(caplog, f"ProtocolError: {refuse.message}")
    works(server)


def test_a_frame_that_breaks_off(server: Endpoint, caplog: pytest.LogCaptureFixture) -> None:
    channel = proven(server)
    channel.send_bytes(GOOD[:-1])
    channel.shut()
    assert ended(channel)
    channel.close()
    told_once(caplog, "within a frame")
    works(server)


def test_descriptors_before_the_proof(server: Endpoint, caplog: pytest.LogCaptureFixture) -> None:
    import array
    import socket

    sock = knock(server)
    before = len(os.listdir("/proc/self/fd"))
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 0, 0]))]
    sock.sendmsg([b"\x16"], rights)
    assert closed(sock)
    told_once(caplog, "ProtocolError: connection: more descriptors")
    sock.close()
    eventually(lambda: len(os.listdir("/proc/self/fd")) < before)
    works(server)


def test_mutated_frames_never_get_through() -> None:
    """Each kind of frame, cut and flipped: a ProtocolError. With a checksum made for it, that or a
    frame that packs to the same."""
    region = PoolSpec(shared=False)
    with Endpoint("one", secret=SECRET) as endpoint:
        frame = endpoint.register(region.build()).descriptor.to_frame(b"what a path tells")
    frames: list[wire.Frame] = [
        HELLO, wire.Welcome(2, bytes(16), "x", "host_shm", (("ucx", "no"),)),
        wire.Refuse(1, "no"), wire.Describe(3, 1, b"blob"), frame, wire.Ready(), wire.Unregion(7),
        wire.Query(5, bytes(16)), wire.Reply(5, 0),
    ]  # fmt: skip
    choose = random.Random(2)
    refused = 0
    for original in frames:
        good = pack_frame(original, 9)
        assert unpack(good) == original
        for _ in range(500):
            bad = bytearray(good)
            if choose.random() < 0.3:
                del bad[choose.randrange(len(bad)) :]
            else:
                bad[choose.randrange(len(bad))] ^= 1 << choose.randrange(8)
            with pytest.raises(ProtocolError):
                unpack(bytes(bad))
            if len(bad) < FrameHead.SIZE:
                continue
            sealed = seal(bytes(bad))
            try:
                frame = unpack(sealed)
                assert pack_frame(frame, 9, FrameHead.unpack(sealed, 9).num_fds) == sealed
            except ProtocolError:
                refused += 1
    assert refused > 500


def unpack(message: bytes) -> wire.Frame:
    if len(message) < FrameHead.SIZE:
        raise ProtocolError("not even a header")
    head = FrameHead.unpack(message, 9)
    if head.body_bytes != len(message) - FrameHead.SIZE:
        raise ProtocolError("cut, or more than one")
    return unpack_frame(message)


@pytest.mark.parametrize("what", ["sequence", "type", "unknown region", "told before", "random"])
def test_frames_behind_the_handshake_are_checked(
    server: Endpoint, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    with Endpoint("client", secret=SECRET) as client:
        region = client.register(PoolSpec().build())
        first = client.connect(server.address)
        bystander = client.connect(server.address)
        other = server.accept(20)
        channel = first._last._channel
        if what == "sequence":
            channel._sent -= 1
            channel.send(wire.Query(99, bytes(16)))
        elif what == "type":
            channel.send(wire.Ready())
        elif what == "unknown region":
            channel.send(wire.Unregion(99))
        elif what == "told before":
            channel.send(region.descriptor.to_frame(), (0,))
        else:
            channel.send_bytes(random.Random(4).randbytes(100))
        eventually(lambda: other.closed)
        told_once(caplog, "link to 'client' dropped: ")
        assert bystander.query(bytes(16)) is None
        first.wait_connected(10)  # who sent it finds back by itself
        assert first.query(bytes(16)) is None
        assert first.num_sessions == 2


def test_a_peer_that_does_not_read(
    server: Endpoint, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is dropped before it costs more memory; what it is inside of stays until its own end."""
    server.register(PoolSpec().build())
    grant = server.grant([1, 2, 3], 40)
    with Endpoint("client", secret=SECRET) as client:
        link = client.connect(server.address)
        descriptor = Descriptor.from_bytes(grant.to_bytes(), client.descriptor_key, SlotKind.GRANT)
        assert link.path_link.enter(descriptor) == "OK"
        session = link._last
        monkeypatch.setattr(session, "on_readable", lambda: None)
        client.service.call(lambda: client.service.unwatch(session._channel.sock.fileno()))
        other = server.accept(20)
        other._last._channel.max_backlog = 1 << 12
        end = time.monotonic() + 20
        while other.state == "connected" and time.monotonic() < end:
            with contextlib.suppress(LinkClosed):
                session._send(wire.Query(1, bytes(16)))
        told_once(caplog, "link to 'client' dropped: ")
        assert "does not read" in caplog.records[0].getMessage()
        grant.revoke()
        assert not grant.released
        link.path_link.leave(descriptor)
        grant.wait_released(20)
    works(server)


def test_a_small_frame_costs_little_memory() -> None:
    """Whatever numbers it names: here a million heads."""
    layout = KVLayout.nhd(num_kv_heads=4, head_dim=16, page_size=16, dtype="float32").to_bytes()
    frame = wire.RegionFrame(0, False, 8, 0, 2**20, 0, 1, (0,), (0,), layout)
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match="region 0: shard: expected 4 KV heads"):
            RegionDescriptor.from_frame(frame)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
