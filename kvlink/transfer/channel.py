"""A connection that carries frames inside TLS, and descriptors beside them (AF_UNIX)."""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

from kvlink.transfer.address import same_host
from kvlink.transfer.errors import ProtocolError, TransferError
from kvlink.transfer.fds import close_fds, copies_of
from kvlink.transfer.framing import FrameHead, pack_frame, unpack_frame
from kvlink.transfer.tls import Tls
from kvlink.transfer.wire import MAX_FDS, Frame

_READ = 1 << 16
_MAX_WAITING_FDS = 4 * MAX_FDS  # that came before their frames were complete
_MAX_BACKLOG = 32 << 20  # bytes that wait for a peer that does not read
_SLICE = 0.05  # s, between two looks whether the caller gave up


class PeerGone(Exception):
    """The connection ended: an orderly close, or the peer died."""


class Channel:
    """Sends and receives whole frames once `shake` said True.

    Sending is thread-safe and never blocks; what the socket does not take yet waits for `flush`.
    Receiving is for one thread at a time.
    """

    def __init__(self, sock: socket.socket, tls: Tls) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.same_host = same_host(sock)
        self._tls = tls
        self._lock = threading.Lock()
        self._secure = False
        self._sent = self._received = 0
        self._backlog: deque[tuple[memoryview, list[int]]] = deque()
        self._backlog_bytes = 0
        self.max_backlog = _MAX_BACKLOG
        self._plain = bytearray()
        self._fds: deque[int] = deque()
        self._ended = ""
        self._deaf = self._shut = False

    # --- both ways ----------------------------------------------------------------------------

    def shake(self) -> bool:
        """A step of the TLS handshake; True when it is complete. Raises SecretMismatch,
        ProtocolError, PeerGone."""
        with self._lock:
            self._fill()
            try:
                self._secure = self._tls.shake()
            finally:
                self._enqueue([])  # an alert, when it failed
                with contextlib.suppress(PeerGone):
                    self._flush()  # why the peer went away is told by what it sent before
            if self._ended and not self._secure:
                raise PeerGone(self._ended)
            return self._secure

    def send(self, frame: Frame, fds: tuple[int, ...] = ()) -> None:
        """Sends a frame; raises PeerGone, ProtocolError when the peer does not read, or OSError
        (no descriptor left; nothing was sent)."""
        with self._lock:
            self._send(pack_frame(frame, self._sent, len(fds)), fds)
            self._sent += 1

    def send_bytes(self, message: bytes, fds: tuple[int, ...] = ()) -> None:
        """Sends what may be no frame at all; for fault injection."""
        with self._lock:
            self._send(message, fds)

    def flush(self) -> bool:
        """Sends what waits; False when something still does. Raises PeerGone."""
        with self._lock:
            return self._flush()

    def take(self) -> Iterator[tuple[Frame, list[int]]]:
        """The frames that are there, after one look at the socket, each with its descriptors, which
        the caller must close. Does not wait. Raises PeerGone, ProtocolError, SecretMismatch."""
        yield from self._whole_frames()
        with self._lock:
            self._fill()
            if not self._deaf:
                self._decrypt()
        yield from self._whole_frames()
        if self._ended:
            raise PeerGone(self._ended + (" within a frame" if self._plain else ""))

    # --- waiting, for who has no selector -------------------------------------------------------

    def shake_until(self, deadline: float, given_up: Callable[[], bool]) -> None:
        """As `shake`, until it is complete. Raises TimeoutError past `deadline`."""
        while not self.shake():
            self._wait(deadline, given_up)

    def receive_until(
        self, deadline: float, given_up: Callable[[], bool]
    ) -> tuple[Frame, list[int]]:
        """The next frame and its descriptors. Raises TimeoutError past `deadline`."""
        while True:
            for found in self.take():
                return found
            self._wait(deadline, given_up)

    def _wait(self, deadline: float, given_up: Callable[[], bool]) -> None:
        events = select.POLLIN if self.flush() else select.POLLIN | select.POLLOUT
        wait_for(self.sock, events, deadline, given_up)

    # --- the end ------------------------------------------------------------------------------

    def peer_pidfd(self) -> int:
        """Becomes readable when the peer's process ends, even if a child of it still holds the
        socket; -1 where that cannot be had."""
        if not self.same_host:
            return -1
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

    def deafen(self) -> None:
        """Understands nothing from now on: `take` only looks for the peer's end."""
        self._deaf = True
        self._plain.clear()

    def shut(self) -> None:
        """Tells the peer that nothing more will come; its end is still to be awaited."""
        with self._lock:
            if self._shut:
                return
            with contextlib.suppress(PeerGone):
                self._flush()
            # What is left would fail from now on, and that is not the peer's end.
            self._shut = True
            self._drop_backlog()
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Closes the socket, what waited to be sent and what was not taken."""
        with self._lock:
            self._drop_backlog()
            close_fds(self._fds)
            self._fds.clear()
            self.sock.close()

    # --- inside; with the lock held -------------------------------------------------------------

    def _send(self, message: bytes, fds: tuple[int, ...]) -> None:
        if self._shut or self.sock.fileno() < 0:
            raise PeerGone("the connection was closed on this side")
        if self._backlog_bytes > self.max_backlog:
            # It is alive, and may be inside pages: this is not its end.
            raise ProtocolError(f"{self._backlog_bytes} bytes wait for a peer that does not read")
        copies = copies_of(fds)  # so that a descriptor outlives its pool until it is really sent
        try:
            self._tls.write(message)
        except TransferError as error:
            close_fds(copies)
            raise PeerGone(str(error)) from error
        self._enqueue(copies)
        self._flush()

    def _drop_backlog(self) -> None:
        for _, fds in self._backlog:
            close_fds(fds)
        self._backlog.clear()
        self._backlog_bytes = 0

    def _enqueue(self, fds: list[int]) -> None:
        data = self._tls.pending()
        if data and not self._shut:
            self._backlog.append((memoryview(data), fds))
            self._backlog_bytes += len(data)

    def _flush(self) -> bool:
        while self._backlog:
            data, fds = self._backlog[0]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            try:
                count = self.sock.sendmsg([data], rights, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
            except BlockingIOError:
                return False
            except OSError as error:
                raise PeerGone(str(error)) from error
            close_fds(fds)
            self._backlog_bytes -= count
            if count < len(data):
                self._backlog[0] = (data[count:], [])
            else:
                self._backlog.popleft()
        return True

    def _fill(self) -> None:
        """One look at the socket."""
        if self._ended:
            return
        space = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize) if self.same_host else 0
        try:
            data, ancillary, flags, _ = self.sock.recvmsg(
                _READ, space, socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
            )
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._ended = str(error)
            return
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
                self._fds.extend(fds)
        if self._deaf:
            close_fds(self._fds)
            self._fds.clear()
        elif flags & socket.MSG_CTRUNC or len(self._fds) > (
            _MAX_WAITING_FDS if self._secure else 0
        ):
            raise ProtocolError(
                "connection: more descriptors than any frame has, or than this process may open"
            )
        if not data:
            self._ended = "the peer closed the connection"
        elif not self._deaf:
            self._tls.take(data)

    def _decrypt(self) -> None:
        while data := self._tls.read():
            self._plain += data
        self._enqueue([])  # what TLS itself had to answer

    # --- inside; the receiving thread -----------------------------------------------------------

    def _whole_frames(self) -> Iterator[tuple[Frame, list[int]]]:
        while len(self._plain) >= FrameHead.SIZE:
            head = FrameHead.unpack(self._plain, self._received)
            end = FrameHead.SIZE + head.body_bytes
            if len(self._plain) < end:
                return
            message = bytes(self._plain[:end])
            del self._plain[:end]
            self._received += 1
            frame = unpack_frame(message)
            if head.num_fds > len(self._fds):
                raise ProtocolError(
                    f"frame: expected {head.num_fds} descriptors; got {len(self._fds)}"
                )
            yield frame, [self._fds.popleft() for _ in range(head.num_fds)]


def wait_for(
    sock: socket.socket, events: int, deadline: float, given_up: Callable[[], bool]
) -> None:
    """Until the socket is ready. Raises TimeoutError past `deadline` (time.monotonic), and PeerGone
    when the caller gave up."""
    poll = select.poll()
    poll.register(sock, events)
    while True:
        if given_up():
            raise PeerGone("given up")
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        if poll.poll(max(1, int(min(left, _SLICE) * 1000))):
            return
