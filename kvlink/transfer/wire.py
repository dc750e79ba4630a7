"""The control protocol's frames: a fixed binary schema (docs/transfer_contract.md, "Wire format").

A frame is a header (framing.py) and a body inside TLS. All integers are little-endian. Whatever
does not fit the schema exactly is a ProtocolError. Hello and Refuse are the same in every version.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from kvlink import _C
from kvlink.layout import LAYOUT_BYTES
from kvlink.transfer.errors import ProtocolError
from kvlink.transfer.fields import Pairs, Reader, pack_blob, pack_pairs, pack_text

MIN_VERSION = 2
MAX_VERSION = 2
MAX_FRAME = 256 * 1024
MAX_BLOB = 192 * 1024  # what a path tells of itself or of a region
MAX_FDS = 4  # with one frame
EPOCH_BYTES = 16
TRANSFER_ID_BYTES = 16
MAC_BYTES = 32  # of the descriptors of grants and offers
MAX_LAYERS = 4096
MAX_PATHS = 16
NUM_STATUSES = len(_C.TransferStatus.__members__)


class FrameType(enum.IntEnum):
    """Kinds of frames."""

    HELLO = 1
    WELCOME = 2
    REFUSE = 3
    DESCRIBE = 4
    REGION = 5
    READY = 6
    UNREGION = 7
    QUERY = 8
    REPLY = 9


class RefuseCode(enum.IntEnum):
    """Why a peer was refused."""

    MALFORMED = 1
    VERSION = 2
    PATH = 3
    BUSY = 4


@dataclass(frozen=True)
class Hello:
    """Client to server: the versions it speaks, and for each path why it cannot use it (empty where
    it can)."""

    type: ClassVar = FrameType.HELLO
    min_version: int
    max_version: int
    epoch: bytes
    name: str
    paths: Pairs

    def pack(self) -> bytes:
        versions = struct.pack("<HH", self.min_version, self.max_version)
        return versions + self.epoch + pack_text("B", self.name, 255) + pack_pairs(self.paths)

    @classmethod
    def unpack(cls, reader: Reader) -> Hello:
        low, high = reader.unpack("HH")
        hello = cls(low, high, reader.take(EPOCH_BYTES), reader.text("B"), reader.pairs(MAX_PATHS))
        if low > high:
            raise ProtocolError(f"hello: versions {low} to {high} are no range")
        return hello


@dataclass(frozen=True)
class Welcome:
    """Server to client: the version and the path chosen, and why the faster ones were not."""

    type: ClassVar = FrameType.WELCOME
    version: int
    epoch: bytes
    name: str
    path: str
    why_not: Pairs

    def pack(self) -> bytes:
        head = struct.pack("<H", self.version) + self.epoch + pack_text("B", self.name, 255)
        return head + pack_text("B", self.path, 255) + pack_pairs(self.why_not)

    @classmethod
    def unpack(cls, reader: Reader) -> Welcome:
        (version,) = reader.unpack("H")
        epoch, name, path = reader.take(EPOCH_BYTES), reader.text("B"), reader.text("B")
        return cls(version, epoch, name, path, reader.pairs(MAX_PATHS))


@dataclass(frozen=True)
class Refuse:
    """Either way, instead of the next frame: why there will be no link."""

    type: ClassVar = FrameType.REFUSE
    code: int
    message: str

    def pack(self) -> bytes:
        return struct.pack("<H", self.code) + pack_text("H", self.message, 1024)

    @classmethod
    def unpack(cls, reader: Reader) -> Refuse:
        (code,) = reader.unpack("H")
        return cls(code, reader.text("H"))


@dataclass(frozen=True)
class Describe:
    """Either way: the receiver's bit in the sender's slots, how many Regions follow, and what the
    path has to tell, with its descriptors."""

    type: ClassVar = FrameType.DESCRIBE
    bit: int
    num_regions: int
    blob: bytes

    def pack(self) -> bytes:
        return struct.pack("<BH", self.bit, self.num_regions) + pack_blob(self.blob, MAX_BLOB)

    @classmethod
    def unpack(cls, reader: Reader) -> Describe:
        bit, num_regions = reader.unpack("BH")
        return cls(bit, num_regions, reader.blob(MAX_BLOB))


@dataclass(frozen=True)
class RegionFrame:
    """Either way: a registered pool, and what the path has to tell of it, with descriptors."""

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
    blob: bytes = b""

    def pack(self) -> bytes:
        head = struct.pack(
            "<IBIIIHHH", self.region_id, self.shared, self.num_pages, self.first_head,
            self.num_heads, self.replica_idx, self.num_replicas, len(self.layers),
        )  # fmt: skip
        count = len(self.layers)
        layers = struct.pack(f"<{2 * count}I", *self.layers, *self.layer_map)
        return head + layers + self.layout + pack_blob(self.blob, MAX_BLOB)

    @classmethod
    def unpack(cls, reader: Reader) -> RegionFrame:
        fields = reader.unpack("IBIIIHHH")
        region_id, shared, num_pages, first_head, num_heads, replica, replicas, count = fields
        if shared > 1 or not 1 <= count <= MAX_LAYERS:
            raise ProtocolError(f"region: shared {shared} and {count} layers are out of range")
        return cls(
            region_id, bool(shared), num_pages, first_head, num_heads, replica, replicas,
            reader.unpack(f"{count}I"), reader.unpack(f"{count}I"), reader.take(LAYOUT_BYTES),
            reader.blob(MAX_BLOB),
        )  # fmt: skip


@dataclass(frozen=True)
class Ready:
    """Server to client: everything was understood; transfers may begin."""

    type: ClassVar = FrameType.READY

    def pack(self) -> bytes:
        return b""

    @classmethod
    def unpack(cls, reader: Reader) -> Ready:
        return cls()


@dataclass(frozen=True)
class Unregion:
    """Either way: a pool is not registered any more."""

    type: ClassVar = FrameType.UNREGION
    region_id: int

    def pack(self) -> bytes:
        return struct.pack("<I", self.region_id)

    @classmethod
    def unpack(cls, reader: Reader) -> Unregion:
        return cls(*reader.unpack("I"))


@dataclass(frozen=True)
class Query:
    """How did (or does) this transfer stand?"""

    type: ClassVar = FrameType.QUERY
    request: int
    transfer_id: bytes

    def pack(self) -> bytes:
        return struct.pack("<Q", self.request) + self.transfer_id

    @classmethod
    def unpack(cls, reader: Reader) -> Query:
        (request,) = reader.unpack("Q")
        return cls(request, reader.take(TRANSFER_ID_BYTES))


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
    def unpack(cls, reader: Reader) -> Reply:
        reply = cls(*reader.unpack("QB"))
        if reply.status not in (*range(NUM_STATUSES), cls.UNKNOWN):
            raise ProtocolError(f"reply: unknown status {reply.status}")
        return reply


Frame = Hello | Welcome | Refuse | Describe | RegionFrame | Ready | Unregion | Query | Reply
_KINDS = (Hello, Welcome, Refuse, Describe, RegionFrame, Ready, Unregion, Query, Reply)
UNPACK: dict[int, Callable[[Reader], Frame]] = {int(kind.type): kind.unpack for kind in _KINDS}

FrameT = TypeVar("FrameT")


def expect(frame: Frame, kind: type[FrameT]) -> FrameT:
    """The frame, if it is of the kind that must come now."""
    if not isinstance(frame, kind):
        raise ProtocolError(f"frame: expected {kind.__name__}; got {type(frame).__name__}")
    return frame
