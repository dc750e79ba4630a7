"""Spoils control frames where this process sends them, above encryption and authentication."""

from __future__ import annotations

import contextlib
import os
import random
import threading
from dataclasses import dataclass
from typing import Any

from kvlink.transfer import channel as channel_module
from kvlink.transfer.channel import Channel

_DELAY = 0.15  # s


@dataclass
class FrameFault:
    """What happens to the `nth` frame from now on, and what has been counted so far."""

    action: str
    nth: int
    seed: int
    seen: int = 0
    held: tuple[Any, Any, tuple[int, ...]] | None = None


_lock = threading.RLock()
_armed: FrameFault | None = None
_corrupt = threading.local()


def arm(action: str, nth: int, seed: int) -> None:
    """From now on, until `disarm`, the `nth` frame sent on any channel is spoilt."""
    global _armed
    with _lock:
        _armed = FrameFault(action, nth, seed)


def disarm() -> bool:
    """Back to normal; whether the frame was ever sent."""
    global _armed
    with _lock:
        fault, _armed = _armed, None
        if fault is not None and fault.held is not None:
            _close(fault.held[2])
        return fault is not None and fault.seen > fault.nth


def install() -> None:
    """Puts the hooks in place; once in a process."""
    module: Any = channel_module
    send, pack = Channel.send, module.pack_frame

    def spoiling_send(self: Channel, frame: Any, fds: tuple[int, ...] = ()) -> None:
        with _lock:
            fault = _armed
            idx = -1
            if fault is not None:
                idx = fault.seen
                fault.seen += 1
        if fault is None or idx < fault.nth:
            return send(self, frame, fds)
        if idx > fault.nth:
            send(self, frame, fds)
            held, fault.held = fault.held, None
            if held is not None:
                _late(*held)
            return None
        return _spoil(fault, self, frame, fds)

    def _spoil(fault: FrameFault, channel: Channel, frame: Any, fds: tuple[int, ...]) -> None:
        if fault.action == "duplicate":
            send(channel, frame, fds)
            send(channel, frame, fds)
        elif fault.action == "corrupt":
            _corrupt.seed = fault.seed
            try:
                send(channel, frame, fds)
            finally:
                _corrupt.seed = None
        elif fault.action in ("delay", "reorder"):
            copies = tuple(os.dup(fd) for fd in fds)
            if fault.action == "reorder":
                fault.held = (channel, frame, copies)
                return
            timer = threading.Timer(_DELAY, _late, (channel, frame, copies))
            timer.daemon = True
            timer.start()

    def _late(channel: Channel, frame: Any, fds: tuple[int, ...]) -> None:
        with contextlib.suppress(Exception):
            send(channel, frame, fds)
        _close(fds)

    def spoiling_pack(*args: Any, **kwargs: Any) -> bytes:
        message = pack(*args, **kwargs)
        seed = getattr(_corrupt, "seed", None)
        if seed is None:
            return bytes(message)
        choose = random.Random(seed)
        bad = bytearray(message)
        for _ in range(choose.randint(1, 4)):
            bad[choose.randrange(len(bad))] ^= 1 << choose.randrange(8)
        return bytes(bad)

    Channel.send = spoiling_send  # type: ignore[method-assign]
    module.pack_frame = spoiling_pack


def _close(fds: tuple[int, ...]) -> None:
    for fd in fds:
        os.close(fd)
