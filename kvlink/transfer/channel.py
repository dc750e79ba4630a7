"""A SOCK_SEQPACKET connection that carries frames, descriptors beside them, and their codes."""

from __future__ import annotations

import array
import contextlib
import hmac
import os
import socket
import struct
import threading
import time
from collections import deque

from kvlink.transfer.errors import ProtocolError
from kvlink.transfer.wire import MAC_BYTES, MAX_FRAME, Frame, pack_frame, unpack_frame

_MAX_FDS = 4
_MAX_BACKLOG = 256  # frames that wait for a peer that does not read


class PeerGone(Exception):
    """The connection ended: an orderly close, or the peer died."""


class Channel:
    """Sends and receives whole frames. `set_keys` turns authentication codes on.

    Sending is thread-safe and never blocks; frames that the socket does not take yet wait for
    `flush`. Receiving is for one thread at a time.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._lock = threading.Lock()
        self._send_key = self._receive_key = b""
        self._sent = self._received = 0
        self._backlog: deque[tuple[bytes, list[int]]] = deque()

    def set_keys(self, send_key: bytes, receive_key: bytes) -> None:
        """From now on each frame carries a code under its direction's key."""
        self._send_key, self._receive_key = send_key, receive_key

    def send(self, frame: Frame, fds: tuple[int, ...] = ()) -> None:
        """Sends a frame; raises PeerGone."""
        with self._lock:
            message = pack_frame(frame, self._sent)
            self._sent += 1
            if self._send_key:
                message += hmac.digest(self._send_key, message, "sha256")
            if len(self._backlog) >= _MAX_BACKLOG:
                raise PeerGone(f"{_MAX_BACKLOG} frames wait for a peer that does not read")
            # Duplicates, so that a descriptor outlives its pool until it is really sent.
            self._backlog.append((message, [os.dup(fd) for fd in fds]))
            self._flush()

    def flush(self) -> bool:
        """Sends what waits; False when something still does. Raises PeerGone."""
        with self._lock:
            return self._flush()

    def _flush(self) -> bool:
        while self._backlog:
            message, fds = self._backlog[0]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            try:
                self.sock.sendmsg([message], rights, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
            except BlockingIOError:
                return False
            except OSError as error:
                raise PeerGone(str(error)) from error
            self._backlog.popleft()
            _close_all(fds)
        return True

    def receive(self, timeout: float | None = None) -> tuple[Frame, list[int]]:
        """The next frame and the descriptors with it, which the caller must close.

        Without `timeout` it does not wait (BlockingIOError when nothing is there). Raises
        TimeoutError, PeerGone, ProtocolError.
        """
        self.sock.settimeout(timeout if timeout is not None else 0.0)
        try:
            message, ancillary, flags, _ = self.sock.recvmsg(
                MAX_FRAME + MAC_BYTES, socket.CMSG_SPACE(_MAX_FDS * 4), socket.MSG_CMSG_CLOEXEC
            )
        except (BlockingIOError, TimeoutError):
            raise
        except OSError as error:
            raise PeerGone(str(error)) from error
        fds = array.array("i")
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
        try:
            if not message:
                raise PeerGone("the peer closed the connection")
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise ProtocolError(f"frame: more than {MAX_FRAME} bytes or {_MAX_FDS} descriptors")
            return self._open(message), list(fds)
        except BaseException:
            _close_all(fds)
            raise

    def _open(self, message: bytes) -> Frame:
        if self._receive_key:
            message, code = message[:-MAC_BYTES], message[-MAC_BYTES:]
            if not hmac.compare_digest(hmac.digest(self._receive_key, message, "sha256"), code):
                raise ProtocolError("frame: its authentication code is wrong")
        frame = unpack_frame(message, self._received)
        self._received += 1
        return frame

    def receive_until(self, deadline: float) -> tuple[Frame, list[int]]:
        """As `receive`, waiting until `deadline` (time.monotonic)."""
        return self.receive(max(deadline - time.monotonic(), 1e-3))

    def peer_pidfd(self) -> int:
        """Becomes readable when the peer's process ends, even if a child of it still holds the
        socket; -1 where that cannot be had."""
        format_ = "3i"  # pid, uid, gid
        credentials = self.sock.getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize(format_)
        )
        pid = struct.unpack(format_, credentials)[0]
        if pid <= 0 or pid == os.getpid():
            return -1
        try:
            return os.pidfd_open(pid)
        except (OSError, AttributeError):
            return -1

    def shut(self) -> None:
        """Tells the peer that nothing more will come; its end is still to be awaited."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Closes the socket and what waited to be sent."""
        with self._lock:
            for _, fds in self._backlog:
                _close_all(fds)
            self._backlog.clear()
            self.sock.close()


def _close_all(fds: list[int] | array.array[int]) -> None:
    for fd in fds:
        os.close(fd)


def close_fds(fds: list[int]) -> None:
    """Closes descriptors that came with a frame."""
    _close_all(fds)
