"""The bytes of a grant or an offer: what travels, by any channel, to the peer that uses it.

Fixed size, whatever the request's length: the page ids lie in the owner's control segment, which
the peer has mapped, and the descriptor names where.
"""

from __future__ import annotations

import hmac
import struct
from dataclasses import dataclass

from kvlink import _C
from kvlink.transfer.errors import InvalidDescriptor
from kvlink.transfer.wire import MAC_BYTES

_MAGIC = b"KVGR"
_VERSION = 1
_BODY = struct.Struct("<4sHBB16s16sIQIQQIQ")
DESCRIPTOR_BYTES = _BODY.size + MAC_BYTES
_KINDS = {1: _C.SlotKind.GRANT, 2: _C.SlotKind.OFFER}


def descriptor_key(secret: bytes) -> bytes:
    """The key that authenticates descriptors, derived from the shared secret."""
    return hmac.digest(secret, b"kvlink descriptor v1", "sha256")


@dataclass(frozen=True)
class Descriptor:
    """One grant or offer, as its bytes tell it."""

    kind: _C.SlotKind
    epoch: bytes  # of the endpoint that made it
    transfer_id: bytes
    slot: int
    generation: int
    region_id: int
    num_tokens: int
    first_page: int  # in the owner's page list
    num_pages: int
    deadline_ns: int  # CLOCK_MONOTONIC, when it was made; extending it moves the slot's only

    def to_bytes(self, key: bytes) -> bytes:
        """The canonical bytes, with their authentication code."""
        body = _BODY.pack(
            _MAGIC, _VERSION, self.kind.value, 0, self.epoch, self.transfer_id, self.slot,
            self.generation, self.region_id, self.num_tokens, self.first_page, self.num_pages,
            self.deadline_ns,
        )  # fmt: skip
        return body + hmac.digest(key, body, "sha256")

    @classmethod
    def from_bytes(cls, data: bytes, key: bytes, kind: _C.SlotKind) -> Descriptor:
        """Inverse of `to_bytes`; raises InvalidDescriptor."""
        if len(data) != DESCRIPTOR_BYTES:
            raise InvalidDescriptor(
                f"descriptor: expected {DESCRIPTOR_BYTES} bytes; got {len(data)}"
            )
        body = data[: _BODY.size]
        if not hmac.compare_digest(hmac.digest(key, body, "sha256"), data[_BODY.size :]):
            raise InvalidDescriptor(
                "descriptor: wrong authentication code: altered, or made under another secret"
            )
        magic, version, kind_number, reserved, *fields = _BODY.unpack(body)
        if magic != _MAGIC or version != _VERSION or reserved != 0:
            raise InvalidDescriptor(f"descriptor: expected version {_VERSION}; got {version}")
        if _KINDS.get(kind_number) != kind:
            names = {1: "a grant", 2: "an offer"}
            got = names.get(kind_number, f"kind {kind_number}")
            raise InvalidDescriptor(f"descriptor: expected {names[kind.value]}; got {got}")
        return cls(kind, *fields)
