"""The control protocol's frames: a fixed binary schema (docs/transfer_contract.md, "Wire format").

Every frame is one message of a SOCK_SEQPACKET socket: header, body, and after the handshake a
32-byte authentication code. All integers are little-endian. Whatever does not fit the schema
exactly is a ProtocolError.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from kvlink.layout import LAYOUT_BYTES
from kvlink.transfer.errors import ProtocolError
from kvlink.transfer.fields import Reader, pack_text

MIN_VERSION = 1
MAX_VERSION = 1
MAX_FRAME = 64 * 1024
MAC_BYTES = 32
NONCE_BYTES = 32
EPOCH_BYTES = 16
TRANSFER_ID_BYTES = 16
MAX_LAYERS = 4096
NUM_STATUSES = 13

_MAGIC = b"KV"
HEADER = struct.Struct("<2sBBIQ")  # magic, type, reserved, body bytes, sequence number


class FrameType(enum.IntEnum):
    """Kinds of frames."""

    HELLO = 1
    CHALLENGE = 2
    AUTH = 3
    REFUSE = 4
    DESCRIBE = 5
    REGION = 6
    QUERY = 7
    REPLY = 8


class RefuseCode(enum.IntEnum):
    """Why a peer was refused."""

    MALFORMED = 1
    VERSION = 2
    SECRET = 3
    BUSY = 4


@dataclass(frozen=True)
class Hello:
    """Client to server: the versions it speaks, and its nonce."""

    type: ClassVar = FrameType.HELLO
    min_version: int
    max_version: int
    nonce: bytes
    epoch: bytes
    name: str

    def pack(self) -> bytes:
        versions = struct.pack("<HH", self.min_version, self.max_version)
        return versions + self.nonce + self.epoch + pack_text("B", self.name, 255)

    @classmethod
    def unpack(cls, body: bytes) -> Hello:
        reader = Reader(body)
        low, high = reader.unpack("HH")
        hello = cls(low, high, reader.take(NONCE_BYTES), reader.take(EPOCH_BYTES), reader.text("B"))
        reader.end()
        if low > high:
            raise ProtocolError(f"hello: versions {low} to {high} are no range")
        return hello


@dataclass(frozen=True)
class Challenge:
    """Server to client: the version chosen, its nonce, and the proof that it knows the secret."""

    type: ClassVar = FrameType.CHALLENGE
    version: int
    min_version: int
    max_version: int
    nonce: bytes
    epoch: bytes
    name: str
    proof: bytes

    def claims(self) -> bytes:
        """Everything but the proof, as it enters the transcript."""
        versions = struct.pack("<HHH", self.version, self.min_version, self.max_version)
        return versions + self.nonce + self.epoch + pack_text("B", self.name, 255)

    def pack(self) -> bytes:
        return self.claims() + self.proof

    @classmethod
    def unpack(cls, body: bytes) -> Challenge:
        reader = Reader(body)
        version, low, high = reader.unpack("HHH")
        challenge = cls(
            version, low, high, reader.take(NONCE_BYTES), reader.take(EPOCH_BYTES),
            reader.text("B"), reader.take(MAC_BYTES),
        )  # fmt: skip
        reader.end()
        return challenge


@dataclass(frozen=True)
class Auth:
    """Client to server: the proof that it knows the secret, too."""

    type: ClassVar = FrameType.AUTH
    proof: bytes

    def pack(self) -> bytes:
        return self.proof

    @classmethod
    def unpack(cls, body: bytes) -> Auth:
        reader = Reader(body)
        auth = cls(reader.take(MAC_BYTES))
        reader.end()
        return auth


@dataclass(frozen=True)
class Refuse:
    """Either way, instead of the next frame: why there will be no link."""

    type: ClassVar = FrameType.REFUSE
    code: int
    message: str

    def pack(self) -> bytes:
        return struct.pack("<H", self.code) + pack_text("H", self.message, 1024)

    @classmethod
    def unpack(cls, body: bytes) -> Refuse:
        reader = Reader(body)
        (code,) = reader.unpack("H")
        refuse = cls(code, reader.text("H"))
        reader.end()
        return refuse


@dataclass(frozen=True)
class Describe:
    """Either way, with the control segment: the link's bit, and how many Regions follow."""

    type: ClassVar = FrameType.DESCRIBE
    bit: int
    control_bytes: int
    num_regions: int

    def pack(self) -> bytes:
        return struct.pack("<BQH", self.bit, self.control_bytes, self.num_regions)

    @classmethod
    def unpack(cls, body: bytes) -> Describe:
        reader = Reader(body)
        describe = cls(*reader.unpack("BQH"))
        reader.end()
        return describe


@dataclass(frozen=True)
class RegionFrame:
    """Either way: a registered pool; with its segment's descriptor when it is shared."""

    type: ClassVar = FrameType.REGION
    region_id: int
    shared: bool
    num_pages: int
    first_head: int
    num_heads: int
    replica_idx: int
    num_replicas: int
    layers: tuple[int, ...]
    layer_map: tuple[int, ...]
    layout: bytes

    def pack(self) -> bytes:
        head = struct.pack(
            "<IBIIIHHH", self.region_id, self.shared, self.num_pages, self.first_head,
            self.num_heads, self.replica_idx, self.num_replicas, len(self.layers),
        )  # fmt: skip
        count = len(self.layers)
        return head + struct.pack(f"<{2 * count}I", *self.layers, *self.layer_map) + self.layout

    @classmethod
    def unpack(cls, body: bytes) -> RegionFrame:
        reader = Reader(body)
        fields = reader.unpack("IBIIIHHH")
        region_id, shared, num_pages, first_head, num_heads, replica, replicas, count = fields
        if shared > 1 or not 1 <= count <= MAX_LAYERS:
            raise ProtocolError(f"region: shared {shared} and {count} layers are out of range")
        layers = reader.unpack(f"{count}I")
        layer_map = reader.unpack(f"{count}I")
        layout = reader.take(LAYOUT_BYTES)
        reader.end()
        return cls(
            region_id, bool(shared), num_pages, first_head, num_heads, replica, replicas, layers,
            layer_map, layout,
        )  # fmt: skip


@dataclass(frozen=True)
class Query:
    """How did (or does) this transfer stand?"""

    type: ClassVar = FrameType.QUERY
    request: int
    transfer_id: bytes

    def pack(self) -> bytes:
        return struct.pack("<Q", self.request) + self.transfer_id

    @classmethod
    def unpack(cls, body: bytes) -> Query:
        reader = Reader(body)
        (request,) = reader.unpack("Q")
        query = cls(request, reader.take(TRANSFER_ID_BYTES))
        reader.end()
        return query


@dataclass(frozen=True)
class Reply:
    """Answer to a Query: a TransferStatus, or UNKNOWN."""

    UNKNOWN: ClassVar[int] = 255
    type: ClassVar = FrameType.REPLY
    request: int
    status: int

    def pack(self) -> bytes:
        return struct.pack("<QB", self.request, self.status)

    @classmethod
    def unpack(cls, body: bytes) -> Reply:
        reader = Reader(body)
        reply = cls(*reader.unpack("QB"))
        reader.end()
        if reply.status not in (*range(NUM_STATUSES), cls.UNKNOWN):
            raise ProtocolError(f"reply: unknown status {reply.status}")
        return reply


Frame = Hello | Challenge | Auth | Refuse | Describe | RegionFrame | Query | Reply

_UNPACK: dict[int, Callable[[bytes], Frame]] = {
    int(kind.type): kind.unpack
    for kind in (Hello, Challenge, Auth, Refuse, Describe, RegionFrame, Query, Reply)
}

FrameT = TypeVar("FrameT")


def pack_frame(frame: Frame, sequence: int) -> bytes:
    """Header and body of a frame, without the authentication code."""
    body = frame.pack()
    return HEADER.pack(_MAGIC, frame.type, 0, len(body), sequence) + body


def unpack_frame(message: bytes, sequence: int) -> Frame:
    """Inverse of `pack_frame`; the sequence number must be the expected one."""
    if not HEADER.size <= len(message) <= MAX_FRAME:
        raise ProtocolError(
            f"frame: expected {HEADER.size} to {MAX_FRAME} bytes; got {len(message)}"
        )
    magic, kind, reserved, length, got_sequence = HEADER.unpack_from(message)
    if magic != _MAGIC or reserved != 0:
        raise ProtocolError("frame: not one of this protocol")
    if length != len(message) - HEADER.size:
        raise ProtocolError(
            f"frame: body of {len(message) - HEADER.size} bytes says it has {length}"
        )
    if got_sequence != sequence:
        raise ProtocolError(f"frame: expected sequence number {sequence}; got {got_sequence}")
    unpack = _UNPACK.get(kind)
    if unpack is None:
        raise ProtocolError(f"frame: unknown type {kind}")
    return unpack(message[HEADER.size :])


def expect(frame: Frame, kind: type[FrameT]) -> FrameT:
    """The frame, if it is of the kind that must come now."""
    if not isinstance(frame, kind):
        raise ProtocolError(f"frame: expected {kind.__name__}; got {type(frame).__name__}")
    return frame
