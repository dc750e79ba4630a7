"""`Session`: one connection to one peer, of one epoch of it. Links outlive their sessions."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

from kvlink import _C
from kvlink.transfer import wire
from kvlink.transfer.channel import PeerGone
from kvlink.transfer.connecting import Joined
from kvlink.transfer.errors import (
    LinkClosed,
    PeerLost,
    ProtocolError,
    TransferError,
    TransferTimeout,
    again,
)
from kvlink.transfer.fds import close_fds
from kvlink.transfer.forking import PARENTS, keep
from kvlink.transfer.log import logger

if TYPE_CHECKING:
    from kvlink.transfer.link import Link
    from kvlink.transfer.offer import Lease
    from kvlink.transfer.peers import Peers
    from kvlink.transfer.transfer import Transfer

_GOODBYE_NS = 5_000_000_000  # for a peer on another host; nothing of ours waits for its end


class Session:
    """Reads frames, answers, and tells its link (None: nobody's any more) of the end.

    It ends in two steps: `gone` once the connection or the peer has ended, and off the endpoint's
    list once the path says that the peer can touch nothing of ours (`quiet`).
    """

    def __init__(self, peers: Peers, joined: Joined, link: Link | None) -> None:
        self.peer, self.path, self.why_not = joined.peer, joined.path, joined.why_not
        self.path_link, self.remote = joined.path_link, joined.remote
        self.peer_bit = joined.peer_bit
        self.gone: PeerLost | None = None  # why, once the peer is
        self.closed = False  # no more transfers
        self._give_up_ns = 0
        self.transfers: weakref.WeakSet[Transfer] = weakref.WeakSet()
        self._peers = peers
        self._link = link
        self._channel = joined.channel
        self._pidfd = self._channel.peer_pidfd()
        self._leases: set[Lease] = set()
        self._lock = threading.Lock()
        self._requests = itertools.count(1)
        self._answers: dict[int, tuple[threading.Event, list[int]]] = {}
        self._telling = threading.Lock()
        self._told: set[int] = set()  # our regions

    def start(self) -> None:
        """Frames are read from now on, those first that came behind the handshake."""
        self._peers.service.call(self._start)

    def _start(self) -> None:
        service = self._peers.service
        service.watch(self._channel.sock.fileno(), self.on_readable)
        if self._pidfd >= 0:
            service.watch(self._pidfd, lambda: self.on_gone("its process ended"))
        self.on_readable()

    # --- frames -------------------------------------------------------------------------------

    def query(self, transfer_id: bytes, timeout: float) -> Any:
        """See `Link.query`."""
        request = next(self._requests)
        event: threading.Event = threading.Event()
        answer: list[int] = []
        self._answers[request] = (event, answer)
        try:
            self._send(wire.Query(request, transfer_id))
            end = time.monotonic() + timeout
            while not event.wait(min(0.1, max(0.0, end - time.monotonic()))):
                self._check_open()
                if time.monotonic() >= end:
                    raise TransferTimeout(f"{self.peer.name!r}: no answer within {timeout} s")
        finally:
            self._answers.pop(request, None)
        if not answer:
            self._check_open()
            raise LinkClosed(f"the link to {self.peer.name!r} closed")
        return None if answer[0] == wire.Reply.UNKNOWN else _C.TransferStatus(answer[0])

    def tell_regions(self) -> None:
        """Tells the peer what was registered and unregistered since it was told last."""
        path = self._peers.path(self.path)
        with self._telling, contextlib.suppress(LinkClosed, PeerLost):
            if self.closed:
                return
            regions = self._peers.regions.all()
            for number in sorted(self._told - set(regions)):
                self._send(wire.Unregion(number))
            for number in sorted(set(regions) - self._told):
                blob, fds = path.describe_region(regions[number])
                self._send(regions[number].descriptor.to_frame(blob), fds)
            self._told = set(regions)

    def was_told(self, numbers: set[int]) -> None:
        """The regions that the handshake told of."""
        self._told = numbers

    def on_readable(self) -> None:
        """Service thread: takes the frames that are there."""
        if self.gone:
            return
        try:
            for frame, fds in self._channel.take():
                if self.closed:
                    close_fds(fds)
                else:
                    self._take(frame, fds)
        except PeerGone as error:
            self.on_gone(str(error))
        except TransferError as error:
            self._drop(error)

    def _take(self, frame: wire.Frame, fds: list[int]) -> None:
        if isinstance(frame, wire.RegionFrame):
            self.remote.add(frame, fds)
            return
        close_fds(fds)
        if isinstance(frame, wire.Unregion):
            self.remote.remove(frame.region_id)
        elif isinstance(frame, wire.Query):
            status = self._peers.table.status(frame.transfer_id)
            known = wire.Reply.UNKNOWN if status is None else status.value
            self._channel.send(wire.Reply(frame.request, known))
        elif isinstance(frame, wire.Reply):
            waiting = self._answers.get(frame.request)
            if waiting is not None:
                waiting[1].append(frame.status)
                waiting[0].set()
        else:
            raise ProtocolError(f"frame: {type(frame).__name__} has no place after the handshake")

    def _drop(self, error: TransferError) -> None:
        if not self.closed:
            logger.warning("link to %r dropped: %s", self.peer.name, error)
        if self.peer.same_host:
            # No page is given back before the peer has ended: it may be writing.
            self.close()
            self._channel.deafen()
        else:
            self.on_gone(str(error))

    def _send(self, frame: wire.Frame, fds: tuple[int, ...] = ()) -> None:
        try:
            self._channel.send(frame, fds)
        except PeerGone as error:
            raise LinkClosed(f"the link to {self.peer.name!r} closed: {error}") from error
        except ProtocolError as error:
            self._peers.service.call(functools.partial(self._drop, error))
            raise LinkClosed(f"the link to {self.peer.name!r} closed: {error}") from error
        self._peers.service.wake()

    def _check_open(self) -> None:
        if self.gone:
            raise again(self.gone)
        if self.closed:
            raise LinkClosed(f"the link to {self.peer.name!r} is closed")

    # --- leases -------------------------------------------------------------------------------

    def add_lease(self, lease: Lease) -> None:
        """It ends with the session."""
        with self._lock:
            self._leases.add(lease)
        self._peers.service.wake()

    def drop_lease(self, lease: Lease) -> None:
        """It was released."""
        with self._lock:
            self._leases.discard(lease)

    def _end_leases(self, why: Exception | None = None) -> None:
        with self._lock:
            leases = list(self._leases)
        for lease in leases:
            lease.end(why)

    # --- the end ------------------------------------------------------------------------------

    def close(self) -> None:
        """Cancels what is under way, gives leases back, and tells the peer. Idempotent. When it
        returns, this side touches no page of the peer any more."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
            self._give_up_ns = time.monotonic_ns() + _GOODBYE_NS
        self.path_link.close(_C.TransferStatus.CANCELLED)
        self._end_leases()
        # The peer's bits in our slots stay until it has stopped, which its own end tells.
        self._channel.shut()
        self._peers.service.wake()

    def on_gone(self, why: str, *, quiet: bool = True) -> None:
        """Service thread: the peer closed its end, or died, or is out of reach.

        `quiet`: what the peer was inside of is given back as soon as the path allows. Otherwise it
        stays quarantined.
        """
        with self._lock:
            if self.gone:
                return
            self.gone = PeerLost(f"{self.peer.name!r}, the owner of the pages, is gone: {why}")
            self.closed = True
        self.path_link.close(_C.TransferStatus.PEER_LOST)
        self._end_leases(self.gone)
        for event, _ in list(self._answers.values()):
            event.set()
        service = self._peers.service
        service.unwatch(self._channel.sock.fileno())
        if self._pidfd >= 0:
            service.unwatch(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        self._channel.close()
        if quiet:
            self._give_back()
        if self._link is not None:
            self._link.on_session_gone(self, why)
            self._link = None  # which keeps this session: neither waits for the other to be freed

    def leave(self) -> None:
        """In a forked child: see `forking`. The peer must see the parent's end, not this one's."""
        self._channel.sock.close()
        keep(self.path_link)
        self.path_link = PARENTS
        self.closed = True
        for transfer in self.transfers:
            transfer.leave()
        for lease in self._leases:
            lease.leave()

    def _give_back(self) -> bool:
        if not self.path_link.quiet():
            return False
        self._peers.on_session_quiet(self)
        return True

    def tick(self, now_ns: int) -> bool:
        """Service thread: True while something needs watching."""
        if self.gone:
            return not self._give_back()
        with self._lock:
            leases = list(self._leases)
        for lease in leases:
            lease.reap(now_ns)
        if self._link is not None:
            self._link.watch.sweep()
        why = self.path_link.failed()
        if why is not None:
            self.on_gone(why)
            return True
        if self.closed and not self.peer.same_host and now_ns > self._give_up_ns:
            self.on_gone("it did not say goodbye")
            return True
        try:
            flushed = self._channel.flush()
        except PeerGone as error:
            self.on_gone(str(error))
            return True
        return bool(leases) or not flushed or self.closed
