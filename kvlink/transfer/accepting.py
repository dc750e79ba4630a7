"""The server's half of making links: on the service thread, a step per frame."""

from __future__ import annotations

import contextlib
import secrets
import socket
import time
from collections.abc import Callable

from kvlink.transfer import handshake, wire
from kvlink.transfer.channel import Channel, PeerGone, close_fds
from kvlink.transfer.connecting import SCHEME, OwnSide, PeerSide, add_region, begin_side
from kvlink.transfer.errors import LinkRefused, PeerUnreachable, TransferError
from kvlink.transfer.service import Service, logger

_HANDSHAKE_TIMEOUT = 5.0  # s
_MAX_INCOMING = 64

Done = Callable[[Channel, PeerSide, int], None]


class Acceptor:
    """Listens, and takes peers through the handshake; `done` gets those that proved themselves."""

    def __init__(self, own: OwnSide, done: Done) -> None:
        self._own = own
        self._done = done
        self._incoming: set[Incoming] = set()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        name = b"kvlink-" + secrets.token_hex(8).encode()
        self._listener.bind(b"\0" + name)  # in the abstract namespace: it vanishes with the socket
        self._listener.listen(_MAX_INCOMING)
        self._listener.setblocking(False)
        self.address = SCHEME + name

    def start(self, service: Service) -> None:
        """Connections are taken from now on."""
        self._service = service
        service.watch(self._listener.fileno(), self._on_connection)

    def tick(self) -> bool:
        """Ends handshakes that take too long; True while there are any."""
        now = time.monotonic()
        for incoming in [one for one in self._incoming if now > one.deadline]:
            self._service.unwatch(incoming.channel.sock.fileno())
            self._incoming.discard(incoming)
            incoming.refuse(LinkRefused(f"no handshake within {_HANDSHAKE_TIMEOUT} s"))
        return bool(self._incoming)

    def close(self) -> None:
        """Ends everything; the service has stopped."""
        self._listener.close()
        for incoming in self._incoming:
            incoming.channel.close()
        self._incoming.clear()

    def _on_connection(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        if len(self._incoming) >= _MAX_INCOMING:
            sock.close()
            return
        incoming = Incoming(sock, self._own, self._done, _HANDSHAKE_TIMEOUT)
        fd = sock.fileno()

        def on_readable() -> None:
            # A link that is made watches the same descriptor, so ours goes first.
            self._service.unwatch(fd)
            if incoming.on_readable():
                self._service.watch(fd, on_readable)
            else:
                self._incoming.discard(incoming)

        self._incoming.add(incoming)
        self._service.watch(fd, on_readable)


class Incoming:
    """A connection whose peer has not proved itself yet."""

    def __init__(
        self, sock: socket.socket, own: OwnSide, done: Done,
        timeout: float,
    ) -> None:  # fmt: skip
        self.channel = Channel(sock)
        self.deadline = time.monotonic() + timeout
        self._own = own
        self._done = done
        self._hello: wire.Hello | None = None
        self._challenge: wire.Challenge | None = None
        self._side: PeerSide | None = None
        self._bit: int | None = None
        self._proved = False

    def on_readable(self) -> bool:
        """Takes what is there; False when this object has nothing more to do."""
        try:
            while True:
                try:
                    frame, fds = self.channel.receive()
                except BlockingIOError:
                    return True
                if self._take(frame, fds):
                    return False
        except PeerGone as error:
            self.refuse(PeerUnreachable(f"it went away during the handshake ({error})"))
        except TransferError as error:
            self.refuse(error)
        return False

    def refuse(self, error: Exception) -> None:
        """Tells the peer and the log why there will be no link, and forgets it."""
        who = repr(self._hello.name) if self._hello else "an unknown peer"
        logger.warning(
            "%r refused %s: %s: %s", self._own.identity.name, who, type(error).__name__, error
        )
        with contextlib.suppress(PeerGone):
            self.channel.send(handshake.refusal(error))
        if self._bit is not None:
            self._own.free_bit(self._bit)
        self.channel.close()

    def _take(self, frame: wire.Frame, fds: list[int]) -> bool:
        """One step; True when the link is made."""
        own = self._own
        if isinstance(frame, wire.Refuse):
            close_fds(fds)
            raise handshake.refused(frame)
        if self._side is not None:
            add_region(self._side.regions, frame, fds)
        elif self._proved:
            assert self._hello is not None
            assert self._challenge is not None
            peer = handshake.Peer(self._hello.name, self._hello.epoch, self._challenge.version)
            self._side = begin_side(peer, frame, fds)
        else:
            close_fds(fds)
            if self._hello is None:
                self._hello = wire.expect(frame, wire.Hello)
                self._challenge = handshake.challenge_of(own.identity, self._hello)
                self.channel.send(self._challenge)
            else:
                assert self._challenge is not None
                auth = wire.expect(frame, wire.Auth)
                handshake.check_auth(own.identity, self._hello, self._challenge, auth)
                secret = own.identity.secret
                handshake.set_keys(self.channel, secret, self._hello, self._challenge, client=False)
                self._proved = True
                self._bit = own.take_bit()
                for reply, reply_fds in own.describe(self._bit):
                    self.channel.send(reply, reply_fds)
        if self._side is None or len(self._side.regions) < self._side.num_regions:
            return False
        assert self._bit is not None
        self._done(self.channel, self._side, self._bit)
        return True
