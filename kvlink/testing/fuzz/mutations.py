"""Frames of every type, and what can be done to their bytes."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import replace

from kvlink.layout import KVLayout
from kvlink.transfer import wire
from kvlink.transfer.errors import ProtocolError
from kvlink.transfer.framing import FrameHead, pack_frame, seal, unpack_frame

_LENGTH_AT = 4  # of the body, in the header
_SEQUENCE_AT = 8


# What may come next. A refusal ends a handshake, too, but nobody is told why.
PLACES = {
    "in TLS": {wire.FrameType.HELLO, wire.FrameType.REFUSE},
    "after WELCOME": {wire.FrameType.DESCRIBE, wire.FrameType.REFUSE},
    "session": {
        wire.FrameType.REGION, wire.FrameType.UNREGION, wire.FrameType.QUERY, wire.FrameType.REPLY,
    },
}  # fmt: skip


def corpus(choose: random.Random) -> list[wire.Frame]:
    """A good frame of each type."""
    layout = KVLayout.nhd(num_kv_heads=4, head_dim=16, page_size=16, dtype="float32")
    layers = tuple(range(choose.randint(1, 6)))
    return [
        wire.Hello(2, 2, choose.randbytes(16), "fuzz", (("host_shm", ""), ("ucx", "not here"))),
        wire.Welcome(2, choose.randbytes(16), "fuzz", "host_shm", (("ucx", "no"),)),
        wire.Refuse(choose.randint(1, 4), "because"),
        wire.Describe(choose.randrange(64), 0, choose.randbytes(16)),
        wire.RegionFrame(
            choose.randrange(300), False, 8, 0, 4, 0, 1, layers, layers, layout.to_bytes()
        ),
        wire.Ready(),
        wire.Unregion(choose.randrange(8)),
        wire.Query(choose.getrandbits(64), choose.randbytes(16)),
        wire.Reply(choose.getrandbits(64), choose.randrange(wire.NUM_STATUSES)),
    ]


class Talk:
    """Frames that fit the schema and their place, with values nobody sent before."""

    def __init__(self, choose: random.Random) -> None:
        self._choose = choose
        self._region = corpus(choose)[4]
        self._told = 0
        self._known: list[int] = []

    def next(self, sequence: int) -> bytes:
        """One of them."""
        choose = self._choose
        kind = choose.choice(("query", "query", "reply", "region"))
        frame: wire.Frame
        if kind == "query":
            frame = wire.Query(choose.getrandbits(64), choose.randbytes(16))
        elif kind == "reply":
            status = choose.choice((*range(wire.NUM_STATUSES), wire.Reply.UNKNOWN))
            frame = wire.Reply(choose.getrandbits(64), status)
        elif self._known and choose.random() < 0.5:
            frame = wire.Unregion(self._known.pop(choose.randrange(len(self._known))))
        else:
            assert isinstance(self._region, wire.RegionFrame)
            self._told += 1
            self._known.append(self._told)
            frame = replace(
                self._region, region_id=self._told, num_pages=choose.randint(1, 2**31 - 1)
            )
        return pack_frame(frame, sequence)


def _flip(data: bytearray, choose: random.Random, _: bytes) -> None:
    for _bit in range(choose.choice((1, 1, 2, 8))):
        data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)


def _truncate(data: bytearray, choose: random.Random, _: bytes) -> None:
    del data[choose.randrange(len(data)) :]
    data += b"\xff" * (FrameHead.SIZE - len(data))  # a header at least, or nobody looks


def _grow(data: bytearray, choose: random.Random, _: bytes) -> None:
    at = choose.randrange(len(data) + 1)
    data[at:at] = choose.randbytes(choose.choice((1, 3, 100, 5000)))


def _splice(data: bytearray, choose: random.Random, other: bytes) -> None:
    begin = choose.randrange(len(other))
    piece = other[begin : begin + choose.randint(1, 24)]
    at = choose.randrange(len(data))
    data[at : at + len(piece)] = piece


def _length(data: bytearray, choose: random.Random, _: bytes) -> None:
    value = choose.choice((0, 1, len(data), 2**16, 2**31, 2**32 - 1, choose.getrandbits(32)))
    struct.pack_into("<I", data, _LENGTH_AT, value)


def _sequence(data: bytearray, choose: random.Random, _: bytes) -> None:
    (now,) = struct.unpack_from("<Q", data, _SEQUENCE_AT)
    value = choose.choice((0, now - 1, now + 1, 2**63, choose.getrandbits(64))) % 2**64
    struct.pack_into("<Q", data, _SEQUENCE_AT, value)


def _wrong_place(data: bytearray, choose: random.Random, other: bytes) -> None:
    end = _SEQUENCE_AT + 8
    data[:] = other[:_SEQUENCE_AT] + bytes(data[_SEQUENCE_AT:end]) + other[end:]


MUTATIONS: dict[str, Callable[[bytearray, random.Random, bytes], None]] = {
    "flip": _flip,
    "truncate": _truncate,
    "grow": _grow,
    "splice": _splice,
    "length": _length,
    "sequence or replay": _sequence,
    "wrong order": _wrong_place,
}


def hard(choose: random.Random, sequence: int) -> tuple[str, bytes]:
    """(which mutation, a frame after it). Most have a right checksum, or nothing else was tried."""
    frames = corpus(choose)
    data = bytearray(pack_frame(choose.choice(frames), sequence))
    other = pack_frame(choose.choice(frames), sequence)
    name = choose.choice(list(MUTATIONS))
    MUTATIONS[name](data, choose, other)
    return name, bytes(data) if choose.random() < 0.1 else _sealed(bytes(data))


def _sealed(data: bytes) -> bytes:
    if len(data) < FrameHead.SIZE:
        return data
    (body_bytes,) = struct.unpack_from("<I", data, _LENGTH_AT)
    end = FrameHead.SIZE + body_bytes
    return seal(data[:end]) + data[end:]


def must_be_refused(data: bytes, sequence: int, stage: str) -> bool:
    """By the schema and the order alone: whole, and not a frame that may follow."""
    if len(data) < FrameHead.SIZE:
        return False
    try:
        head = FrameHead.unpack(data, sequence)
        message = data[: FrameHead.SIZE + head.body_bytes]
        if len(message) < FrameHead.SIZE + head.body_bytes:
            return False
        if head.num_fds:
            return True  # none came with it
        unpack_frame(message)
    except ProtocolError:
        return True
    return head.kind not in PLACES[stage]
