"""One side of a plain TCP stream: what the network between two processes carries (see lines.py)."""

from __future__ import annotations

import socket
import time

import lines

_PIECE_BYTES = 1 << 20


class Stream:
    """Both roles: the target takes in a buffer's worth of bytes and says when it has them."""

    def expose(self, num_bytes: int, host: str = "127.0.0.1") -> list[object]:
        """Target: listens; [host, port]."""
        self.buffer = memoryview(bytearray(num_bytes))
        self.listener = socket.create_server((host, 0))
        return [host, self.listener.getsockname()[1]]

    def attach(self, num_bytes: int, host: str, port: int) -> None:
        """Initiator: connects."""
        self.buffer = memoryview(bytearray(num_bytes))
        self.sock = socket.create_connection((host, port), timeout=10)
        self.sock.settimeout(60)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def accept(self) -> None:
        """Target: takes the connection."""
        self.listener.settimeout(10)
        self.sock, _ = self.listener.accept()
        self.sock.settimeout(60)

    def take(self) -> None:
        """Target: until all bytes are there; then answers with one."""
        have = 0
        while have < len(self.buffer):
            got = self.sock.recv_into(self.buffer[have : have + _PIECE_BYTES])
            if not got:
                raise ConnectionError(f"the stream ended after {have} bytes")
            have += got
        self.sock.sendall(b"x")

    def write(self) -> float:
        """Initiator: seconds from the first byte sent until the answer."""
        begin = time.perf_counter()
        for first in range(0, len(self.buffer), _PIECE_BYTES):
            self.sock.sendall(self.buffer[first : first + _PIECE_BYTES])
        if self.sock.recv(1) != b"x":
            raise ConnectionError("the stream ended before the answer")
        return time.perf_counter() - begin


if __name__ == "__main__":
    lines.serve(Stream())
