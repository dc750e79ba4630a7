"""Making a session: what both halves exchange, and `dial`, the client's half, in the caller's
thread. The server's half is `accepting`.

    client                                   server
      |  <------------- TLS 1.3 ------------>  |
      |  HELLO (versions, paths)           ->  |
      |  <-  WELCOME (version, path)           |
      |  <-  DESCRIBE, REGION ...              |
      |  DESCRIBE, REGION ...              ->  |
      |  <-  READY                             |
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

from kvlink import _C
from kvlink.transfer import address as addresses
from kvlink.transfer import handshake, wire
from kvlink.transfer.channel import Channel, PeerGone, wait_for
from kvlink.transfer.errors import ConnectError, PeerUnreachable, ProtocolError
from kvlink.transfer.fds import close_fds, require_no_fds
from kvlink.transfer.fields import Pairs
from kvlink.transfer.paths import Path, PathLink, Peer
from kvlink.transfer.regions import MAX_REGIONS
from kvlink.transfer.remote import Remote
from kvlink.transfer.tls import Credentials
from kvlink.transfer.watching import EndpointWatch

_CROWD_PAUSE = 0.002  # s, while too many others knock at the same time


@dataclass
class Joined:
    """A session that both ends have agreed on. `bit` is ours in the peer's slots, `peer_bit` the
    peer's in ours."""

    channel: Channel
    peer: Peer
    path: str
    why_not: Pairs
    path_link: PathLink
    remote: Remote
    bit: int
    peer_bit: int


@dataclass(frozen=True)
class OwnSide:
    """What an endpoint brings to a handshake.

    `describe(bit, path)` gives our frames and descriptors; `reasons(same_host, require)` why each
    path cannot be used; `abandon` takes a session that the peer may believe in, until its end.
    """

    identity: handshake.Identity
    credentials: Credentials
    descriptor_key: bytes
    paths: dict[str, Path]
    peer_timeout: float
    watch: EndpointWatch
    take_bit: Callable[[], int]
    free_bit: Callable[[int], None]
    describe: Callable[[int, str], list[tuple[wire.Frame, tuple[int, ...]]]]
    reasons: Callable[[bool, str | None], Pairs]
    abandon: Callable[[Joined], None]


def dial(
    own: OwnSide,
    address: bytes,
    require: str | None,
    timeout: float,
    given_up: Callable[[], bool] = lambda: False,
) -> Joined:
    """Connects to the parts of the address in order (unix, then tcp) until one answers.

    Raises ConnectError's subclasses, ProtocolError, InvalidArgument.
    """
    deadline = time.monotonic() + timeout
    reasons = []
    for family, where in addresses.targets(addresses.Address.from_bytes(address)):
        kind = "unix" if family == socket.AF_UNIX else "tcp"
        try:
            sock = socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:
            reasons.append(f"{kind}: {error}")
            continue
        try:
            while not addresses.begin_connect(sock, where):
                if time.monotonic() > deadline or given_up():
                    raise TimeoutError
                time.sleep(_CROWD_PAUSE)
            wait_for(sock, select.POLLOUT, deadline, given_up)
            addresses.end_connect(sock)
        except (OSError, PeerGone) as error:
            sock.close()
            what = "no answer in time" if isinstance(error, TimeoutError) else str(error)
            reasons.append(f"{kind}: {what}")
            continue
        addresses.tune(sock, own.peer_timeout)
        channel = Channel(sock, own.credentials.begin(server_side=False))
        try:
            return _join(own, channel, require, deadline, given_up)
        except (PeerGone, OSError) as error:
            what = "no answer in time" if isinstance(error, TimeoutError) else str(error)
            raise PeerUnreachable(f"address {address!r}: {what}") from error
    raise PeerUnreachable(f"address {address!r}: {'; '.join(reasons)}")


def _join(
    own: OwnSide, channel: Channel, require: str | None, deadline: float,
    given_up: Callable[[], bool],
) -> Joined:  # fmt: skip
    bit: int | None = None
    joined: Joined | None = None
    told = False

    def receive() -> tuple[wire.Frame, list[int]]:
        frame, fds = channel.receive_until(deadline, given_up)
        if isinstance(frame, wire.Refuse):
            close_fds(fds)
            raise handshake.refused(frame)
        return frame, fds

    try:
        channel.shake_until(deadline, given_up)
        hello = handshake.hello_of(own.identity, own.reasons(channel.same_host, require))
        with contextlib.suppress(PeerGone):  # why it went away is told by what it sent before
            channel.send(hello)
        frame, fds = receive()
        require_no_fds(fds)
        welcome = wire.expect(frame, wire.Welcome)
        handshake.check_welcome(own.identity, hello, welcome)
        peer = Peer(welcome.name, welcome.epoch, welcome.version, channel.same_host)
        bit = own.take_bit()
        ours = own.describe(bit, welcome.path)
        joined, num_regions = join(own, channel, peer, welcome.path, bit, *receive())
        joined.why_not = welcome.why_not
        while len(joined.remote.regions) < num_regions:
            joined.remote.add(*receive())
        for frame, own_fds in ours:
            channel.send(frame, own_fds)
        told = True
        frame, fds = receive()
        require_no_fds(fds)
        wire.expect(frame, wire.Ready)
        return joined
    except BaseException as error:
        if isinstance(error, (ProtocolError, ConnectError)):
            with contextlib.suppress(PeerGone, ProtocolError):
                channel.send(handshake.refusal(error))
        if joined is not None:
            joined.path_link.close(_C.TransferStatus.CANCELLED)
        if joined is not None and told:
            own.abandon(joined)
        else:
            channel.close()
            if bit is not None:
                own.free_bit(bit)
        raise


def join(
    own: OwnSide, channel: Channel, peer: Peer, path: str, peer_bit: int,
    frame: wire.Frame, fds: list[int],
) -> tuple[Joined, int]:  # fmt: skip
    """The session that the peer's Describe frame begins, and how many Regions follow."""
    try:
        describe = wire.expect(frame, wire.Describe)
        if describe.bit >= _C.MAX_LINKS or describe.num_regions > MAX_REGIONS:
            raise ProtocolError("describe: a field is out of range")
        path_link = own.paths[path].connect(peer, describe.bit, peer_bit, describe.blob, fds)
    finally:
        close_fds(fds)
    remote = Remote(peer, own.descriptor_key, path_link)
    joined = Joined(channel, peer, path, (), path_link, remote, describe.bit, peer_bit)
    return joined, describe.num_regions
