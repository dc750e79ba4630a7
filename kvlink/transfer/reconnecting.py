"""How a link finds its peer again: the address (or who knows it), and patience."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvlink.errors import InvalidArgument
from kvlink.transfer.connecting import Joined, OwnSide, dial
from kvlink.transfer.errors import (
    LinkRefused,
    PathUnavailable,
    PeerUnreachable,
    ProtocolError,
    SecretMismatch,
    VersionMismatch,
)

if TYPE_CHECKING:
    from kvlink.transfer.link import Link

Address = bytes | Callable[[], bytes]
_SOON = (0.01, 1.0)  # s: the first pause after an attempt, and the longest; each twice the last
_LATE = (1.0, 30.0)  # after a refusal for a reason that rarely goes away
_REASONS_THAT_STAY = (
    SecretMismatch, VersionMismatch, PathUnavailable, LinkRefused, ProtocolError, InvalidArgument,
)  # fmt: skip


class Reconnector:
    """Connects a link, and connects it again whenever its session was lost."""

    def __init__(
        self,
        own: OwnSide,
        address: Address,
        require: str | None,
        timeout: float,
        done: Callable[[Joined, Link], bool],
    ) -> None:
        self.last_error = ""  # and not the exception, which keeps every frame that it passed
        self._own = own
        self._address = address
        self._require = require
        self._timeout = timeout
        self._done = done
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def first(self, given_up: Callable[[], bool]) -> Joined:
        """In the caller's thread. Where the address is asked for, a peer that cannot be reached yet
        is asked for again until the timeout. Raises as `Endpoint.connect`."""
        end = time.monotonic() + self._timeout
        pause = _SOON[0]
        while True:
            try:
                return self._dial(max(end - time.monotonic(), 1e-3), given_up)
            except PeerUnreachable:
                if not callable(self._address) or time.monotonic() + pause > end or given_up():
                    raise
            time.sleep(pause)
            pause = min(2 * pause, _SOON[1])

    def begin(self, link: Link) -> None:
        """Starts looking for the peer, on a thread of its own, until `link` is connected or closed.
        One at a time."""
        with self._lock:
            if link.closed:
                return
            thread = threading.Thread(
                target=self._run, args=(link, self._thread), name="kvlink-connect", daemon=True
            )
            thread.start()
            self._thread = thread

    def join(self, timeout: float) -> None:
        """Waits for that thread; its link is closed."""
        with self._lock:
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)

    def _dial(self, timeout: float, given_up: Callable[[], bool]) -> Joined:
        address = self._address() if callable(self._address) else self._address
        return dial(self._own, address, self._require, timeout, given_up)

    def _run(self, link: Link, before: threading.Thread | None) -> None:
        if before is not None:
            before.join(self._timeout)
        pauses = {_SOON: _SOON[0], _LATE: _LATE[0]}
        told: set[type[Exception]] = set()
        while not link.closed:
            try:
                joined = self._dial(self._timeout, lambda: link.closed)
            except Exception as error:  # a caller's resolver may raise anything
                self.last_error = f"{type(error).__name__}: {error}"
                if not link.closed:
                    first = type(error) not in told
                    told.add(type(error))
                    self._own.watch.unconnected(link.peer_name, error, first=first, again=True)
                kind = _LATE if isinstance(error, _REASONS_THAT_STAY) else _SOON
                # Those who lost the same peer do not all knock at the same moment.
                link.wait_closed(pauses[kind] * random.uniform(0.5, 1.0))
                pauses[kind] = min(2 * pauses[kind], kind[1])
                continue
            self.last_error = ""
            self._done(joined, link)
            return
