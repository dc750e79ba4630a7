"""The server's half of making sessions: on the service thread, a step per look, never waiting."""

from __future__ import annotations

import contextlib
import functools
import select
import socket
import time
from collections.abc import Callable

from kvlink import _C
from kvlink.transfer import address as addresses
from kvlink.transfer import handshake, wire
from kvlink.transfer.address import Address
from kvlink.transfer.channel import Channel, PeerGone
from kvlink.transfer.connecting import Joined, OwnSide, join
from kvlink.transfer.errors import LinkRefused, PeerUnreachable, ProtocolError, TransferError
from kvlink.transfer.fds import SCARCE, close_fds, require_no_fds
from kvlink.transfer.paths import Peer
from kvlink.transfer.service import Service

_HANDSHAKE_TIMEOUT = 5.0  # s
_MAX_INCOMING = 64
_SCARCE_PAUSE = 0.05  # s, while this process can open no more files
_CROWDED_TIMEOUT = 0.2  # s, for TLS, while so many knock: ten times what an honest peer takes

Done = Callable[[Joined], None]


class Acceptor:
    """Listens, and takes peers through the handshake; `done` gets those that proved themselves."""

    def __init__(self, own: OwnSide, listen: str | None, done: Done) -> None:
        self._own = own
        self._done = done
        self._incoming: dict[Incoming, None] = {}  # the oldest first
        self._shut = False
        self._resume = 0.0  # time.monotonic()
        self._full = False  # new connections wait in the listeners' queues
        sock, unix = addresses.listen_unix()
        self._listeners = [sock]
        tcp = None
        if listen is not None:
            try:
                sock, tcp = addresses.listen_tcp(listen)
            except BaseException:
                self.close()
                raise
            self._listeners.append(sock)
        self.address = Address(unix, tcp).to_bytes()

    def start(self, service: Service) -> None:
        """Connections are taken from now on."""
        self._service = service
        service.call(self._listen)

    def tick(self) -> bool:
        """Ends handshakes that take too long; True while there are any."""
        now = time.monotonic()
        for incoming in list(self._incoming):
            if now > incoming.deadline:
                self._forget(incoming, f"no handshake within {_HANDSHAKE_TIMEOUT} s")
            else:
                incoming.flush()
        if self._full and not self._shut and now >= self._resume:
            self._listen()
        return bool(self._incoming) or self._full

    def shut(self) -> None:
        """Nobody is let in from now on, and who knocks finds nobody."""
        self._shut = True
        self._service.call(self._stop)

    def _stop(self) -> None:
        for listener in self._listeners:
            self._service.unwatch(listener.fileno())
        for incoming in self._incoming:
            self._service.unwatch(incoming.channel.sock.fileno())
        self.close()

    def close(self) -> None:
        """Ends everything; the service has stopped, or this is its thread."""
        for listener in self._listeners:
            listener.close()
        for incoming in self._incoming:
            incoming.drop()
        self._incoming.clear()

    def leave(self) -> None:
        """In a forked child: who knocks is for the parent alone."""
        for listener in self._listeners:
            listener.close()
        for incoming in self._incoming:
            incoming.channel.sock.close()

    def _listen(self) -> None:
        self._full = False
        for listener in self._listeners:
            on_readable = functools.partial(self._on_connections, listener)
            self._service.watch(listener.fileno(), on_readable)

    def _on_connections(self, listener: socket.socket) -> None:
        for _ in range(_MAX_INCOMING):
            if not self._make_room(listener):
                self._pause()
                return
            try:
                sock, _where = listener.accept()
            except OSError as error:
                if error.errno in SCARCE:  # who knocks would be heard again at once
                    self._pause(_SCARCE_PAUSE)
                return
            self._on_connection(sock)

    def _pause(self, seconds: float = 0.0) -> None:
        """Those who knock wait until then, or until somebody leaves."""
        self._full, self._resume = True, time.monotonic() + seconds
        for listener in self._listeners:
            self._service.unwatch(listener.fileno())

    def _make_room(self, listener: socket.socket) -> bool:
        """For whoever waits there. Those who have proved themselves stay, and so do those who have
        just come: a crowd must not push out anybody whose next word is already here."""
        if len(self._incoming) < _MAX_INCOMING:
            return True
        waiting = select.poll()
        waiting.register(listener, select.POLLIN)
        if not waiting.poll(0):
            return False
        slowest = next((each for each in self._incoming if not each.secure), None)
        if slowest is None or time.monotonic() - slowest.began < _CROWDED_TIMEOUT:
            return False
        self._forget(slowest, f"{_MAX_INCOMING} others knock, and it is the slowest")
        return True

    def _on_connection(self, sock: socket.socket) -> None:
        if self._shut:
            sock.close()
            return
        addresses.tune(sock, self._own.peer_timeout)
        incoming = Incoming(sock, self._own, _HANDSHAKE_TIMEOUT)
        self._incoming[incoming] = None
        self._await(incoming)

    def _await(self, incoming: Incoming) -> None:
        """Its next word. What waits for it ends with it: nothing here refers to itself."""
        on_readable = functools.partial(self._on_readable, incoming)
        self._service.watch(incoming.channel.sock.fileno(), on_readable)

    def _on_readable(self, incoming: Incoming) -> None:
        if incoming not in self._incoming:
            return  # turned away a moment ago; its descriptor may be another's by now
        # A session that is made watches the same descriptor, so ours goes first.
        self._service.unwatch(incoming.channel.sock.fileno())
        if self._shut:
            self._incoming.pop(incoming, None)
            incoming.drop()
            return
        if incoming.on_readable():
            self._await(incoming)
            return
        self._incoming.pop(incoming, None)
        if self._full:
            self._listen()
        if incoming.made is not None:
            self._done(incoming.made)

    def _forget(self, incoming: Incoming, why: str) -> None:
        self._service.unwatch(incoming.channel.sock.fileno())
        self._incoming.pop(incoming, None)
        incoming.refuse(LinkRefused(why))


class Incoming:
    """A connection that is not a session yet."""

    def __init__(self, sock: socket.socket, own: OwnSide, timeout: float) -> None:
        self.channel = Channel(sock, own.credentials.begin(server_side=True))
        self.began = time.monotonic()
        self.deadline = self.began + timeout
        self.made: Joined | None = None
        self._own = own
        self.secure = False  # it has proved that it holds the secret
        self._name = ""
        self._peer: Peer | None = None
        self._welcome: wire.Welcome | None = None
        self._bit: int | None = None
        self._joined: Joined | None = None
        self._num_regions = 0

    def on_readable(self) -> bool:
        """Takes what is there; False when this object has nothing more to do."""
        try:
            if not self.secure:
                self.secure = self.channel.shake()
                if not self.secure:
                    return True
            return not any(self._take(frame, fds) for frame, fds in self.channel.take())
        except PeerGone as error:
            self.refuse(PeerUnreachable(f"it went away during the handshake ({error})"))
        except TransferError as error:
            self.refuse(error)
        except (OSError, RuntimeError, MemoryError) as error:  # too little of something here
            self.refuse(LinkRefused(f"{self._own.identity.name!r} cannot: {error}"))
        return False

    def flush(self) -> None:
        """Sends what the socket did not take."""
        with contextlib.suppress(PeerGone):  # which reading tells as well
            self.channel.flush()

    def refuse(self, error: Exception) -> None:
        """Tells the peer and the log why there will be no link, and forgets it."""
        self._own.watch.turned_away(self._name, error)
        if self.secure:
            with contextlib.suppress(PeerGone, ProtocolError):
                self.channel.send(handshake.refusal(error))
        self.drop()

    def drop(self) -> None:
        """Forgets it. It was not told that it may begin, so its bit was never used."""
        if self._joined is not None:
            self._joined.path_link.close(_C.TransferStatus.CANCELLED)
        if self._bit is not None:
            self._own.free_bit(self._bit)
        self.channel.close()

    def _take(self, frame: wire.Frame, fds: list[int]) -> bool:
        """One step; True when the session is made."""
        if isinstance(frame, wire.Refuse):
            close_fds(fds)
            raise handshake.refused(frame)
        if self._joined is not None:
            self._joined.remote.add(frame, fds)
        elif self._peer is not None and self._welcome is not None and self._bit is not None:
            path = self._welcome.path
            self._joined, self._num_regions = join(
                self._own, self.channel, self._peer, path, self._bit, frame, fds
            )
            self._joined.why_not = self._welcome.why_not
        else:
            require_no_fds(fds)
            self._greet(wire.expect(frame, wire.Hello))
        if self._joined is None or len(self._joined.remote.regions) < self._num_regions:
            return False
        self.channel.send(wire.Ready())
        self.made = self._joined
        return True

    def _greet(self, hello: wire.Hello) -> None:
        own = self._own
        self._name = hello.name
        reasons = own.reasons(self.channel.same_host, None)
        welcome = handshake.welcome_of(own.identity, hello, reasons)
        self._bit = own.take_bit()
        self._peer = Peer(hello.name, hello.epoch, welcome.version, self.channel.same_host)
        self._welcome = welcome
        self.channel.send(welcome)
        for reply, reply_fds in own.describe(self._bit, welcome.path):
            self.channel.send(reply, reply_fds)
