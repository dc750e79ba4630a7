"""Addresses of endpoints, and the sockets behind them: AF_UNIX on one host, TCP between hosts."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
from dataclasses import dataclass

from kvlink.errors import InvalidArgument
from kvlink.transfer.errors import VersionMismatch

_SCHEME = "kvlink:"
_VERSION = "2"
_BACKLOG = 64
HostPort = tuple[str, int]


@dataclass(frozen=True)
class Address:
    """Where an endpoint listens: `kvlink:2;unix=NAME;tcp=HOST:PORT`, each part where there is one.

    `unix` is a name in the abstract namespace, one per network namespace; HOST is numeric.
    """

    unix: str | None
    tcp: HostPort | None

    def to_bytes(self) -> bytes:
        """What peers are given."""
        parts = [_SCHEME + _VERSION]
        if self.unix is not None:
            parts.append(f"unix={self.unix}")
        if self.tcp is not None:
            parts.append("tcp=" + join_host_port(*self.tcp))
        return ";".join(parts).encode()

    @classmethod
    def from_bytes(cls, address: bytes) -> Address:
        """Inverse of `to_bytes`; parts of unknown kinds are passed over. Raises InvalidArgument,
        VersionMismatch."""
        wrong = InvalidArgument(f"address: expected an Endpoint's address; got {address!r}")
        if not isinstance(address, bytes) or len(address) > 1024 or not address.isascii():
            raise wrong
        head, *parts = address.decode().split(";")
        if not head.startswith(_SCHEME):
            raise wrong
        if head != _SCHEME + _VERSION:
            raise VersionMismatch(f"address: expected version {_VERSION}; got {head!r}")
        fields = dict(part.partition("=")[::2] for part in parts)
        unix, tcp = fields.get("unix"), fields.get("tcp")
        if not unix and not tcp:
            raise wrong
        return cls(unix or None, split_host_port(tcp, "address") if tcp else None)


def join_host_port(host: str, port: int) -> str:
    """`host:port`, with brackets around an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_host_port(text: str, argument: str) -> HostPort:
    """Inverse of `join_host_port`; raises InvalidArgument, naming `argument`."""
    host, colon, port = text.rpartition(":") if isinstance(text, str) else ("", "", "")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise InvalidArgument(f"{argument}: expected HOST:PORT; got {text!r}")
    return host.removeprefix("[").removesuffix("]"), int(port)


def listen_unix() -> tuple[socket.socket, str]:
    """A listener under a random abstract name, which vanishes with the socket."""
    name = f"kvlink-{secrets.token_hex(8)}"
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(b"\0" + name.encode())
    sock.listen(_BACKLOG)
    sock.setblocking(False)
    return sock, name


def listen_tcp(listen: str) -> tuple[socket.socket, HostPort]:
    """A listener at HOST:PORT (port 0: any), and where it is. Raises InvalidArgument."""
    host, port = split_host_port(listen, "listen")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        if found[4][0] in ("0.0.0.0", "::"):
            raise InvalidArgument(
                f"listen: expected the host by which peers reach this one; got {listen!r}, which "
                "stands for all of them"
            )
        sock = socket.socket(found[0], socket.SOCK_STREAM)
    except OSError as error:
        raise InvalidArgument(f"listen: {listen!r}: {error}") from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(found[4])
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise InvalidArgument(f"listen: {listen!r}: {error}") from error
    sock.setblocking(False)
    return sock, sock.getsockname()[:2]


def targets(address: Address) -> list[tuple[int, object]]:
    """(family, where) to try, in order. Raises InvalidArgument."""
    found: list[tuple[int, object]] = []
    if address.unix is not None:
        found.append((socket.AF_UNIX, b"\0" + address.unix.encode()))
    if address.tcp is not None:
        host, port = address.tcp
        try:
            # Numeric only: asking a name server could take any time.
            flags = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
            (family, *_, where), *_ = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=flags
            )
        except OSError as error:
            raise InvalidArgument(
                f"address: expected a numeric host; got {host!r} ({error})"
            ) from error
        found.append((family, where))
    return found


def begin_connect(sock: socket.socket, where: object) -> bool:
    """Starts connecting; the socket becomes writable when that has ended. False when the listener
    has too many to take for the moment. Raises OSError."""
    sock.setblocking(False)
    code = sock.connect_ex(where)  # type: ignore[arg-type]
    if code not in (0, errno.EINPROGRESS, errno.EAGAIN):
        raise OSError(code, os.strerror(code))
    return code != errno.EAGAIN


def end_connect(sock: socket.socket) -> None:
    """What has come of it. Raises OSError."""
    code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        raise OSError(code, os.strerror(code))


def tune(sock: socket.socket, peer_timeout: float) -> None:
    """TCP: frames leave at once, and a peer that is silent for `peer_timeout` seconds is gone."""
    if sock.family == socket.AF_UNIX:
        return
    seconds = max(1, int(peer_timeout / 3))
    for level, option, value in (
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, seconds),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, seconds),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(peer_timeout * 1000)),
    ):
        with contextlib.suppress(OSError):
            sock.setsockopt(level, option, value)


def same_host(sock: socket.socket) -> bool:
    """Both ends are on one host: descriptors can be passed."""
    return sock.family == socket.AF_UNIX
