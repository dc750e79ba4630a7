"""The one thread of an endpoint: accepts, reads frames, reaps. Never on the data path."""

from __future__ import annotations

import contextlib
import os
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable

from kvlink.transfer.log import logger

_BUSY_TICK = 0.02  # s, while pages are lent or something is under way
_IDLE_TICK = 0.5


class Service:
    """Runs callbacks when descriptors become readable, and `tick` at least every few ms while it
    returns True (there is something to watch)."""

    def __init__(self, name: str, tick: Callable[[], bool]) -> None:
        self._tick = tick
        self._selector = selectors.DefaultSelector()
        self._calls: deque[Callable[[], None]] = deque()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector.register(self._wake_fd, selectors.EVENT_READ, self._drain)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=f"kvlink-{name}"[:15], daemon=True)
        self._thread.start()

    def call(self, function: Callable[[], None]) -> None:
        """Runs `function` on the service thread, soon."""
        self._calls.append(function)
        self.wake()

    def wake(self) -> None:
        """Runs `tick` soon."""
        with contextlib.suppress(OSError):
            os.eventfd_write(self._wake_fd, 1)

    def watch(self, fd: int, on_readable: Callable[[], None]) -> None:
        """Calls `on_readable` while `fd` is readable; only on the service thread, so that nobody
        can close `fd` before."""
        with contextlib.suppress(KeyError, ValueError, OSError):
            self._selector.register(fd, selectors.EVENT_READ, on_readable)

    def unwatch(self, fd: int) -> None:
        """Forgets `fd`; only on the service thread, before it is closed."""
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(fd)

    @property
    def on_thread(self) -> bool:
        """The caller is the service thread."""
        return threading.current_thread() is self._thread

    def stop(self, timeout: float) -> None:
        """Ends the thread and waits for it."""
        self._stopping = True
        self.wake()
        if not self.on_thread:
            self._thread.join(timeout)
        if not self._thread.is_alive() or self.on_thread:
            self._selector.close()
            os.close(self._wake_fd)
            self._wake_fd = -1

    def _drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)

    def _run(self) -> None:
        busy = True
        while not self._stopping:
            ready = self._selector.select(_BUSY_TICK if busy else _IDLE_TICK)
            while ready:  # and keeps no callback, with all that it refers to, until the next event
                self._guard(ready.pop(0)[0].data)
            while self._calls:
                self._guard(self._calls.popleft())
            busy = self._guard(self._tick)

    def _guard(self, function: Callable[[], bool | None]) -> bool:
        """One failing callback must not take the others down."""
        try:
            return bool(function())
        except Exception:
            logger.exception("unexpected error on the service thread")
            time.sleep(_BUSY_TICK)
            return True
