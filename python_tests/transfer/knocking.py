"""Clients that are no endpoints: raw sockets, and channels that proved the secret."""

from __future__ import annotations

import select
import socket
import threading
import time

from kvlink.testing.transfer_peer import SECRET
from kvlink.transfer import Endpoint, wire
from kvlink.transfer.address import Address
from kvlink.transfer.channel import Channel, PeerGone
from kvlink.transfer.fds import close_fds
from kvlink.transfer.tls import Credentials

SECONDS = 20.0  # bound of every wait here
HELLO = wire.Hello(2, 2, bytes(16), "knocker", (("host_shm", ""),))


def knock(endpoint: Endpoint, tcp: bool = False) -> socket.socket:
    """A connection on which nothing was said."""
    address = Address.from_bytes(endpoint.address)
    if tcp:
        assert address.tcp is not None
        return socket.create_connection(address.tcp, SECONDS)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(SECONDS)
    assert address.unix is not None
    while True:
        try:
            sock.connect(b"\0" + address.unix.encode())
            return sock
        except BlockingIOError:  # the backlog is full for a moment
            time.sleep(0.001)


def never() -> bool:
    return False


def proven(endpoint: Endpoint, secret: bytes = SECRET, tcp: bool = False) -> Channel:
    """A channel behind the TLS handshake."""
    channel = Channel(knock(endpoint, tcp), Credentials(secret).begin(server_side=False))
    channel.shake_until(time.monotonic() + SECONDS, never)
    return channel


def receive(channel: Channel) -> wire.Frame:
    """The next frame, without its descriptors."""
    frame, fds = channel.receive_until(time.monotonic() + SECONDS, never)
    close_fds(fds)
    return frame


def ended(channel: Channel) -> bool:
    """The other side closed it in time."""
    try:
        while True:
            receive(channel)
    except (PeerGone, TimeoutError) as error:
        return isinstance(error, PeerGone)


def closed(sock: socket.socket) -> bool:
    """The other side closed it in time; what it said before is dropped."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if select.select([sock], [], [], 0.1)[0]:
            try:
                if not sock.recv(1 << 16):
                    return True
            except ConnectionError:
                return True
    return False


class Crowd:
    """Strangers who are silent, or say something of no use, and knock again once turned away."""

    def __init__(self, server: Endpoint, number: int) -> None:
        self._where = b"\0" + (Address.from_bytes(server.address).unix or "").encode()
        self._number = number
        self._over = threading.Event()
        self.num_knocks = 0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        poll = select.poll()
        open_socks: dict[int, socket.socket] = {}
        while not self._over.wait(0.002):
            for fd, _ in poll.poll(0):  # they never get an answer, so this is the end
                poll.unregister(fd)
                open_socks.pop(fd).close()
            while len(open_socks) < self._number:
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                sock.setblocking(False)
                if sock.connect_ex(self._where):
                    sock.close()
                    break
                if self.num_knocks % 2:
                    sock.send(b"\x16\x03\x01")  # the begin of a TLS record
                self.num_knocks += 1
                open_socks[sock.fileno()] = sock
                poll.register(sock, select.POLLIN)
        for sock in open_socks.values():
            sock.close()

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join(30)
