"""Packing and unpacking of a frame's fields; little-endian."""

from __future__ import annotations

import struct

from kvlink.transfer.errors import ProtocolError

Pairs = tuple[tuple[str, str], ...]


class Reader:
    """Takes fields off the front of a body; `end` demands that nothing is left."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._at = 0

    def take(self, num_bytes: int) -> bytes:
        """The next bytes; raises ProtocolError when fewer are left."""
        if num_bytes > len(self._body) - self._at:
            raise ProtocolError(
                f"frame: expected {num_bytes} more bytes; got {len(self._body) - self._at}"
            )
        self._at += num_bytes
        return self._body[self._at - num_bytes : self._at]

    def unpack(self, format_: str) -> tuple[int, ...]:
        """The next numbers, by a struct format without byte order."""
        return struct.unpack("<" + format_, self.take(struct.calcsize("<" + format_)))

    def text(self, length_format: str) -> str:
        """A text behind its length."""
        (length,) = self.unpack(length_format)
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise ProtocolError("frame: text is not UTF-8") from None

    def blob(self, limit: int) -> bytes:
        """Bytes behind their number, which is at most `limit`."""
        (length,) = self.unpack("I")
        if length > limit:
            raise ProtocolError(f"frame: expected at most {limit} bytes of a path; got {length}")
        return self.take(length)

    def pairs(self, limit: int) -> Pairs:
        """At most `limit` pairs of a name and a text."""
        (count,) = self.unpack("B")
        if count > limit:
            raise ProtocolError(f"frame: expected at most {limit} texts; got {count}")
        return tuple((self.text("B"), self.text("H")) for _ in range(count))

    def end(self) -> None:
        """Raises ProtocolError when something is left."""
        if self._at != len(self._body):
            raise ProtocolError(f"frame: {len(self._body) - self._at} bytes too many")


def pack_text(length_format: str, text: str, limit: int) -> bytes:
    """Length and UTF-8 of a text, cut at `limit` bytes."""
    encoded = text.encode()[:limit].decode(errors="ignore").encode()
    return struct.pack("<" + length_format, len(encoded)) + encoded


def pack_blob(blob: bytes, limit: int) -> bytes:
    """Number of bytes, and the bytes; inverse of `Reader.blob`."""
    assert len(blob) <= limit
    return struct.pack("<I", len(blob)) + blob


def pack_pairs(pairs: Pairs) -> bytes:
    """Inverse of `Reader.pairs`."""
    texts = [pack_text("B", name, 255) + pack_text("H", text, 1024) for name, text in pairs]
    return struct.pack("<B", len(texts)) + b"".join(texts)
