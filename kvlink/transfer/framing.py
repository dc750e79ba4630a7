"""The header of a control frame, and its checksum (docs/transfer_contract.md, "Wire format").

TLS finds what is altered on its way. The checksum, made where the frame is, finds what was altered
before: a frame may fit the schema and say something else.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import ClassVar

from kvlink.transfer.errors import ProtocolError
from kvlink.transfer.fields import Reader
from kvlink.transfer.wire import MAX_FDS, MAX_FRAME, UNPACK, Frame

_MAGIC = b"KV"
_FIELDS = struct.Struct("<2sBBIQ")  # magic, type, descriptors, body bytes, sequence number
_CHECKSUM = struct.Struct("<I")  # of all other bytes of the frame


@dataclass(frozen=True)
class FrameHead:
    """What comes before a body."""

    SIZE: ClassVar[int] = _FIELDS.size + _CHECKSUM.size
    kind: int
    num_fds: int
    body_bytes: int

    @classmethod
    def unpack(cls, message: bytes | bytearray, sequence: int) -> FrameHead:
        """From the front of `message`; the sequence number must be the expected one."""
        magic, kind, num_fds, body_bytes, got = _FIELDS.unpack_from(message)
        if magic != _MAGIC:
            raise ProtocolError("frame: not one of this protocol")
        if kind not in UNPACK:
            raise ProtocolError(f"frame: unknown type {kind}")
        if body_bytes > MAX_FRAME - cls.SIZE or num_fds > MAX_FDS:
            raise ProtocolError(
                f"frame: expected at most {MAX_FRAME} bytes and {MAX_FDS} descriptors; got "
                f"{body_bytes + cls.SIZE} and {num_fds}"
            )
        if got != sequence:
            raise ProtocolError(f"frame: expected sequence number {sequence}; got {got}")
        return cls(kind, num_fds, body_bytes)


def pack_frame(frame: Frame, sequence: int, num_fds: int = 0) -> bytes:
    """Header and body of a frame that goes with `num_fds` descriptors."""
    body = frame.pack()
    assert len(body) <= MAX_FRAME - FrameHead.SIZE
    fields = _FIELDS.pack(_MAGIC, frame.type, num_fds, len(body), sequence)
    return seal(fields + bytes(_CHECKSUM.size) + body)


def unpack_frame(message: bytes) -> Frame:
    """The frame that is `message`, whose head was found right; raises ProtocolError unless the
    checksum is, and every byte has its place."""
    (got,) = _CHECKSUM.unpack_from(message, _FIELDS.size)
    wanted = _checksum(message)
    if got != wanted:
        raise ProtocolError(f"frame: expected checksum {wanted:08x}; got {got:08x}: it was altered")
    reader = Reader(message[FrameHead.SIZE :])
    frame = UNPACK[message[len(_MAGIC)]](reader)
    reader.end()
    return frame


def seal(message: bytes) -> bytes:
    """`message`, a header at least, with the checksum that it must have."""
    checksum = _CHECKSUM.pack(_checksum(message))
    return message[: _FIELDS.size] + checksum + message[FrameHead.SIZE :]


def _checksum(message: bytes) -> int:
    return zlib.crc32(message[FrameHead.SIZE :], zlib.crc32(message[: _FIELDS.size]))
