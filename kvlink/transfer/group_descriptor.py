"""The bytes of a group of grants or offers: those of its members, under one authentication code."""

from __future__ import annotations

import hmac
import struct
from dataclasses import dataclass
from typing import Any

from kvlink import _C
from kvlink.errors import InvalidArgument
from kvlink.transfer.errors import InvalidDescriptor
from kvlink.transfer.wire import MAC_BYTES

_MAGIC = b"KVGM"
_VERSION = 1
_HEAD = struct.Struct("<4sHBB16sH")  # magic, version, kind, 0, group id, members


@dataclass(frozen=True)
class GroupDescriptor:
    """The bytes of a group, taken apart: its id, and the bytes of each grant or offer."""

    group_id: bytes
    members: tuple[bytes, ...]

    def to_bytes(self, key: bytes, kind: _C.SlotKind) -> bytes:
        """The canonical bytes, with their authentication code."""
        body = _HEAD.pack(_MAGIC, _VERSION, kind.value, 0, self.group_id, len(self.members))
        for member in self.members:
            body += struct.pack("<H", len(member)) + member
        return body + hmac.digest(key, body, "sha256")

    @classmethod
    def from_bytes(cls, data: Any, key: bytes, kind: _C.SlotKind) -> GroupDescriptor:
        """Inverse of `to_bytes`; raises InvalidDescriptor, InvalidArgument."""
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise InvalidArgument(f"group: expected its bytes; got {data!r}")
        data = bytes(data)
        body, mac = data[:-MAC_BYTES], data[-MAC_BYTES:]
        if len(body) < _HEAD.size or not hmac.compare_digest(hmac.digest(key, body, "sha256"), mac):
            raise InvalidDescriptor(
                "group: wrong authentication code: truncated, altered, or under another secret"
            )
        magic, version, kind_number, reserved, group_id, count = _HEAD.unpack_from(body)
        if magic != _MAGIC or version != _VERSION or reserved != 0:
            raise InvalidDescriptor(f"group: expected version {_VERSION} of a group's bytes")
        if kind_number != kind.value:
            raise InvalidDescriptor(f"group: expected {kind.name.lower()}s")
        members, at = [], _HEAD.size
        for _ in range(count):
            (length,) = struct.unpack_from("<H", body, at) if at + 2 <= len(body) else (0,)
            members.append(body[at + 2 : at + 2 + length])
            at += 2 + length
        if at != len(body):
            raise InvalidDescriptor(f"group: {count} members do not fill {len(body)} bytes")
        return cls(group_id, tuple(members))
