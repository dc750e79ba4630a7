"""Making a link: what both halves exchange, and `dial`, the client's half in the caller's thread.

The server's half is `accepting`.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kvlink import _C
from kvlink.errors import InvalidArgument
from kvlink.pool import KVPool
from kvlink.transfer import handshake, wire
from kvlink.transfer.channel import Channel, PeerGone, close_fds
from kvlink.transfer.errors import (
    ConnectError,
    LinkRefused,
    PeerUnreachable,
    ProtocolError,
    TransferError,
)
from kvlink.transfer.region import RegionDescriptor

SCHEME = b"host_shm:"
_MAX_REGIONS = 256


@dataclass(frozen=True)
class PeerRegion:
    """A peer's registered pool; `pool` is its mapping here, None when it is not shared."""

    descriptor: RegionDescriptor
    pool: KVPool | None


@dataclass
class PeerSide:
    """Everything a peer told in the handshake. `bit` is ours in its slots."""

    peer: handshake.Peer
    control: Any
    bit: int
    num_regions: int
    regions: dict[int, PeerRegion] = field(default_factory=dict)


@dataclass(frozen=True)
class OwnSide:
    """What an endpoint brings to a handshake. `describe` gives our frames and descriptors."""

    identity: handshake.Identity
    take_bit: Callable[[], int]
    free_bit: Callable[[int], None]
    describe: Callable[[int], list[tuple[wire.Frame, tuple[int, ...]]]]


def dial(address: bytes, own: OwnSide, timeout: float) -> tuple[Channel, PeerSide, int]:
    """Connects and proves; (channel, the peer, the peer's bit in our slots).

    Raises ConnectError's subclasses, ProtocolError, InvalidArgument.
    """
    if not isinstance(address, bytes) or not address.startswith(SCHEME):
        raise InvalidArgument(f"address: expected an Endpoint's address; got {address!r}")
    deadline = time.monotonic() + timeout
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel = Channel(sock)
    bit = None
    try:
        sock.settimeout(timeout)
        sock.connect(b"\0" + address[len(SCHEME) :])
        hello = handshake.hello_of(own.identity)
        channel.send(hello)
        challenge = wire.expect(_next(channel, deadline), wire.Challenge)
        auth = handshake.answer(own.identity, hello, challenge)
        channel.send(auth)
        handshake.set_keys(channel, own.identity.secret, hello, challenge, client=True)
        peer = handshake.Peer(challenge.name, challenge.epoch, challenge.version)
        side = begin_side(peer, *_first(channel, deadline))
        while len(side.regions) < side.num_regions:
            add_region(side.regions, *channel.receive_until(deadline))
        bit = own.take_bit()
        for frame, fds in own.describe(bit):
            channel.send(frame, fds)
        return channel, side, bit
    except BaseException as error:
        if isinstance(error, (ProtocolError, ConnectError)):
            with contextlib.suppress(PeerGone):
                channel.send(handshake.refusal(error))
        if bit is not None:
            own.free_bit(bit)
        channel.close()
        if isinstance(error, (PeerGone, OSError)) and not isinstance(error, TransferError):
            what = "did not answer in time" if isinstance(error, TimeoutError) else str(error)
            raise PeerUnreachable(f"address {address!r}: {what}") from error
        raise


def begin_side(peer: handshake.Peer, frame: wire.Frame, fds: list[int]) -> PeerSide:
    """The peer's control segment, from its Describe frame."""
    try:
        describe = wire.expect(frame, wire.Describe)
        if len(fds) != 1 or describe.bit >= _C.MAX_LINKS or describe.num_regions > _MAX_REGIONS:
            raise ProtocolError("describe: a field is out of range")
        control = _C.Control.attach(fds[0], describe.control_bytes)
    except (InvalidArgument, OSError) as error:
        raise ProtocolError(f"control segment: {error}") from error
    finally:
        close_fds(fds)
    return PeerSide(peer, control, describe.bit, describe.num_regions)


def add_region(regions: dict[int, PeerRegion], frame: wire.Frame, fds: list[int]) -> None:
    """Maps a peer's region, from its Region frame."""
    try:
        descriptor = RegionDescriptor.from_frame(wire.expect(frame, wire.RegionFrame))
        if descriptor.region_id in regions or len(regions) >= _MAX_REGIONS:
            raise ProtocolError(f"region {descriptor.region_id}: told before, or one too many")
        if len(fds) != int(descriptor.shared):
            raise ProtocolError(f"region {descriptor.region_id}: {len(fds)} descriptors")
        pool = None
        if descriptor.shared:
            pool = KVPool.attach(
                descriptor.layout, num_pages=descriptor.num_pages,
                layer_map=descriptor.layer_map, fd=fds[0],
            )  # fmt: skip
    except (InvalidArgument, OSError) as error:
        raise ProtocolError(f"region: {error}") from error
    finally:
        close_fds(fds)
    regions[descriptor.region_id] = PeerRegion(descriptor, pool)


def _next(channel: Channel, deadline: float) -> wire.Frame:
    """The next frame, which carries no descriptors; a refusal becomes its error."""
    frame, fds = channel.receive_until(deadline)
    close_fds(fds)
    if isinstance(frame, wire.Refuse):
        raise handshake.refused(frame)
    if fds:
        raise ProtocolError("frame: descriptors where there should be none")
    return frame


def _first(channel: Channel, deadline: float) -> tuple[wire.Frame, list[int]]:
    """The first frame under the new keys."""
    try:
        frame, fds = channel.receive_until(deadline)
    except PeerGone as error:
        raise LinkRefused(f"the peer ended the handshake: {error}") from error
    if isinstance(frame, wire.Refuse):
        close_fds(fds)
        raise handshake.refused(frame)
    return frame, fds
