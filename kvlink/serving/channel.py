"""`Channel`: JSON messages between the router and one worker; no pickle, no thread left waiting."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

Message = dict[str, Any]


class Channel:
    """A worker's end. A thread reads, so that the router's writes always progress.

    `on_close` is called (from that thread) when the router is gone.
    """

    def __init__(self, connection: Connection, on_close: Callable[[], None]) -> None:
        self._connection = connection
        self._inbox: queue.Queue[Message] = queue.Queue()
        self._on_close = on_close
        threading.Thread(target=self._read, name="channel", daemon=True).start()

    def send(self, kind: str, **fields: Any) -> None:
        """Sends a message of that type."""
        send(self._connection, kind, **fields)

    def take(self, timeout: float) -> Iterator[Message]:
        """All messages that are there; waits up to `timeout` seconds for a first one."""
        try:
            yield self._inbox.get(timeout=timeout) if timeout > 0 else self._inbox.get_nowait()
            while True:
                yield self._inbox.get_nowait()
        except queue.Empty:
            return

    def _read(self) -> None:
        try:
            while True:
                self._inbox.put(receive(self._connection))
        except (EOFError, OSError):
            self._on_close()


def send(connection: Connection, kind: str, **fields: Any) -> None:
    """Writes one message."""
    connection.send_bytes(json.dumps({"type": kind, **fields}).encode())


def receive(connection: Connection) -> Message:
    """Reads one message. Raises EOFError, OSError."""
    message = json.loads(connection.recv_bytes())
    assert isinstance(message, dict)
    return message
