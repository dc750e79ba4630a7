"""Sits in the wire between two endpoints and spoils bytes below the encryption."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from dataclasses import dataclass

from kvlink.testing.transfer_peer import CALL_TIMEOUT
from kvlink.transfer.address import Address, listen_unix

_STALL = 0.2  # s
_MAX_FDS = 16


@dataclass(eq=False)
class _End:
    """One side of a connection through the tap."""

    sock: socket.socket
    spoilt: bool  # what comes from here
    other: _End | None = None
    num_bytes: int = 0
    ended: bool = False


class Tap:
    """Passes connections on to the endpoint at `target`, descriptors included.

    Of the first connection the byte at `offset` in one direction (`of_dialer`: what the client
    sends) is flipped, or comes late, or the connection is cut there. Later ones are left alone.
    """

    def __init__(self, target: bytes, action: str, offset: int, *, of_dialer: bool) -> None:
        self._action, self._offset, self._of_dialer = action, offset, of_dialer
        unix = Address.from_bytes(target).unix
        assert unix is not None
        self._target = b"\0" + unix.encode()
        self._listener, name = listen_unix()
        self.address = Address(name, None).to_bytes()
        self._ends: dict[int, _End] = {}
        self._first = True
        self._stop_read, self._stop_write = os.pipe()
        self._thread = threading.Thread(target=self._run, name="tap", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Cuts what is left."""
        os.write(self._stop_write, b"x")
        self._thread.join(CALL_TIMEOUT)
        for end in list(self._ends.values()):
            self._drop(end)
        self._listener.close()
        os.close(self._stop_read)
        os.close(self._stop_write)

    def _run(self) -> None:
        while True:
            open_ends = [fd for fd, end in self._ends.items() if not end.ended]
            listening = self._listener.fileno()
            ready, _, _ = select.select([listening, self._stop_read, *open_ends], [], [])
            if self._stop_read in ready:
                return
            if listening in ready:
                self._accept()
            for fd in ready:
                if fd in self._ends:
                    self._pass_on(self._ends[fd])

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            client, _ = self._listener.accept()
            server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            ends = [_End(client, self._first and self._of_dialer)]
            ends.append(_End(server, self._first and not self._of_dialer, ends[0]))
            ends[0].other = ends[1]
            self._first = False
            for end in ends:
                end.sock.settimeout(CALL_TIMEOUT)
                self._ends[end.sock.fileno()] = end
            try:
                server.connect(self._target)
            except OSError:
                self._drop(ends[0])

    def _pass_on(self, end: _End) -> None:
        assert end.other is not None
        fds: list[int] = []
        try:
            data, fds, _, _ = socket.recv_fds(end.sock, 1 << 16, _MAX_FDS)
            if not data:
                end.ended = True
                end.other.sock.shutdown(socket.SHUT_WR)
                if end.other.ended:
                    self._drop(end)
                return
            spoilt = self._spoil(end, data)
            if spoilt is None:
                self._drop(end)
                return
            sent = socket.send_fds(end.other.sock, [spoilt], fds)
            end.other.sock.sendall(spoilt[sent:])
        except OSError:
            self._drop(end)
        finally:
            for fd in fds:
                os.close(fd)

    def _spoil(self, end: _End, data: bytes) -> bytes | None:
        """What goes on; None to cut the connection."""
        at = self._offset - end.num_bytes
        end.num_bytes += len(data)
        if not end.spoilt or not 0 <= at < len(data):
            return data
        if self._action == "cut":
            return None
        if self._action == "stall":
            time.sleep(_STALL)
            return data
        return data[:at] + bytes([data[at] ^ 1 << self._offset % 8]) + data[at + 1 :]

    def _drop(self, end: _End) -> None:
        assert end.other is not None
        for each in (end, end.other):
            self._ends.pop(each.sock.fileno(), None)
            each.sock.close()
