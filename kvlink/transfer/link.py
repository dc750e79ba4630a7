"""`Link`: a connected peer whose memory is mapped here, and ours there."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from typing import TYPE_CHECKING, Any

from kvlink import _C
from kvlink.errors import InvalidArgument
from kvlink.transfer import wire
from kvlink.transfer.channel import Channel, PeerGone, close_fds
from kvlink.transfer.connecting import PeerSide
from kvlink.transfer.errors import (
    LinkClosed,
    PeerLost,
    ProtocolError,
    TransferTimeout,
    status_error,
)
from kvlink.transfer.offer import Lease
from kvlink.transfer.region import Region, page_ids
from kvlink.transfer.remote import Remote
from kvlink.transfer.service import logger
from kvlink.transfer.transfer import Transfer

if TYPE_CHECKING:
    from kvlink.transfer.endpoint import Endpoint


class Link:
    """Made by `Endpoint.connect` on one side and by `Endpoint.accept` on the other; both may push,
    pull and adopt. Thread-safe. Not usable in a forked child.

    Attributes: `path` ("host_shm"), `peer_name`, `peer_epoch` (16 bytes, new whenever the peer
    restarts), `version` of the control protocol.
    """

    path = "host_shm"

    def __init__(self, endpoint: Endpoint, channel: Channel, side: PeerSide, bit: int) -> None:
        """For `Endpoint`; `bit` is the peer's in our slots."""
        self.peer_name = side.peer.name
        self.peer_epoch = side.peer.epoch
        self.version = side.peer.version
        self._endpoint = endpoint
        self._channel = channel
        self._control = side.control
        self._bit = side.bit  # ours in the peer's slots
        self._peer_bit = bit
        self._remote = Remote(side, endpoint.descriptor_key)
        self._shm = _C.ShmLink(side.control, side.bit)
        self._leases: set[Lease] = set()
        self._lock = threading.Lock()
        self._requests = itertools.count(1)
        self._answers: dict[int, tuple[threading.Event, list[int]]] = {}
        self._closed = False
        self.gone: PeerLost | None = None  # why, once the peer is
        self._pidfd = channel.peer_pidfd()

    # --- moving KV ----------------------------------------------------------------------------

    def push(self, src_pages: Any, grant: Any, *, region: Region | None = None) -> Transfer:
        """Pushes a whole request: `begin`, every layer, `finish`. Returns at once."""
        transfer = self.begin(src_pages, grant, region=region)
        for layer in range(len(transfer.plan.parts_of_layer)):
            transfer.push_layer(layer)
        transfer.finish()
        return transfer

    def begin(self, src_pages: Any, grant: Any, *, region: Region | None = None) -> Transfer:
        """Begins a push that is then fed layer by layer.

        `src_pages`: page ids in token order that hold the granted number of tokens, in the pool of
        `region` (by default the endpoint's only one). `grant`: the peer's `Grant.to_bytes()`. What
        both pools hold is moved, converted on the way; several links may fill one grant with
        different layers or heads. O(layers + pages). Raises InvalidDescriptor, UnknownRegion,
        Unconvertible, AlreadyWriting, GrantExpired, GrantRevoked, StaleTransfer, LinkClosed,
        InvalidArgument.
        """
        return self._start(_C.SlotKind.GRANT, grant, src_pages, region)

    def pull(self, offer: Any, dst_pages: Any, *, region: Region | None = None) -> Transfer:
        """Copies what the peer offers into `dst_pages` of `region`'s pool. Returns at once.

        `offer`: the peer's `Offer.to_bytes()`. `wait_arrived` of the result tells when all is there
        and verified: only then may the pages be read. Raises as `begin`.
        """
        transfer = self._start(_C.SlotKind.OFFER, offer, dst_pages, region)
        for part in range(len(transfer.plan.parts)):
            transfer.post_part(part)
        transfer.finish()
        return transfer

    def adopt(self, offer: Any) -> Lease:
        """Uses the offered pages where they lie: no byte moves, and the time it takes does not
        depend on the request's length. Raises as `begin`."""
        self._check_open()
        descriptor = self._remote.parse(_C.SlotKind.OFFER, offer)
        pool = self._remote.pool(descriptor)
        key = _C.SlotKey(descriptor.slot, descriptor.generation)
        pages = self._remote.pages(descriptor)
        status = self._control.adopt(key, self._bit)
        if status != _C.TransferStatus.OK:
            raise status_error(status, f"offer {descriptor.transfer_id.hex()}")
        lease = Lease(self, self._control, key, descriptor, pool, pages)
        with self._lock:
            self._leases.add(lease)
        self._endpoint.service.wake()
        return lease

    def query(self, transfer_id: bytes, timeout: float = 5.0) -> Any:
        """How a transfer of the peer's grants and offers stands or ended, by its id: a
        `TransferStatus` (PENDING, OK, or why it failed), or None when the peer does not know it.
        Idempotent. Raises TransferTimeout, LinkClosed, InvalidArgument."""
        if not isinstance(transfer_id, bytes) or len(transfer_id) != wire.TRANSFER_ID_BYTES:
            raise InvalidArgument(f"transfer_id: expected 16 bytes; got {transfer_id!r}")
        self._check_open()
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
                    raise TransferTimeout(f"{self.peer_name!r}: no answer within {timeout} s")
        finally:
            self._answers.pop(request, None)
        if not answer:
            raise LinkClosed(f"the link to {self.peer_name!r} closed")
        return None if answer[0] == wire.Reply.UNKNOWN else _C.TransferStatus(answer[0])

    # --- the end ------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """No more transfers: this side closed it, or the peer is gone."""
        return self._closed

    def close(self) -> None:
        """Cancels what is under way, gives leases back, and tells the peer. Idempotent.

        When it returns, this side touches no page of the peer any more.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._shm.close(_C.TransferStatus.CANCELLED)
        self._end_leases()
        # The peer's bits in our slots stay until it has stopped, which its own end tells.
        self._channel.shut()
        self._endpoint.service.wake()

    def end_lease(self, lease: Lease, key: Any) -> None:
        """For Lease.release."""
        self._control.release(key, self._bit)
        with self._lock:
            self._leases.discard(lease)

    def start(self) -> None:
        """For `Endpoint`: frames are read from now on."""
        service = self._endpoint.service
        service.watch(self._channel.sock.fileno(), self.on_readable)
        if self._pidfd >= 0:
            service.watch(self._pidfd, lambda: self.on_gone("its process ended"))

    def on_readable(self) -> None:
        """Service thread: takes the frames that are there."""
        try:
            while not self.gone:
                frame, fds = self._channel.receive()
                self._take(frame, fds)
        except BlockingIOError:
            return
        except PeerGone as error:
            self.on_gone(str(error))
        except ProtocolError as error:
            # No page is given back before the peer has ended: it may be writing.
            if not self._closed:
                logger.warning("link to %r dropped: %s", self.peer_name, error)
                self.close()

    def on_gone(self, why: str, *, quiet: bool = True) -> None:
        """Service thread: the peer closed its end or died.

        `quiet`: it touches nothing of ours any more. Otherwise its pins stay, and what it is inside
        of stays quarantined.
        """
        with self._lock:
            if self.gone:
                return
            self.gone = PeerLost(f"{self.peer_name!r}, the owner of the pages, is gone: {why}")
            lost, self._closed = not self._closed, True
        if lost:
            logger.info("link to %r lost: %s", self.peer_name, why)
        self._shm.close(_C.TransferStatus.PEER_LOST)
        self._end_leases(self.gone)
        for event, _ in list(self._answers.values()):
            event.set()
        service = self._endpoint.service
        service.unwatch(self._channel.sock.fileno())
        if self._pidfd >= 0:
            service.unwatch(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        self._channel.close()
        if quiet:
            self._endpoint.on_link_gone(self, self._peer_bit)

    def tick(self, now_ns: int) -> bool:
        """Service thread: True while something needs watching."""
        with self._lock:
            leases = list(self._leases)
        for lease in leases:
            lease.reap(now_ns)
        if self.gone:
            return False
        try:
            flushed = self._channel.flush()
        except PeerGone as error:
            self.on_gone(str(error))
            return False
        return bool(leases) or not flushed or self._closed

    def announce(self, frame: wire.Frame, fds: tuple[int, ...]) -> None:
        """For `Endpoint.register`: tells the peer of a region."""
        if not self._closed:
            with contextlib.suppress(LinkClosed):
                self._send(frame, fds)

    # --- inside -------------------------------------------------------------------------------

    def _start(self, kind: Any, token: Any, pages: Any, region: Region | None) -> Transfer:
        self._check_open()
        descriptor = self._remote.parse(kind, token)
        pool = self._remote.pool(descriptor)
        own = self._endpoint.region_of(region)
        own_ids = page_ids(pages, own.pool.num_pages)
        peer_ids = self._remote.pages(descriptor)
        plan = self._remote.plan(kind, own, descriptor)
        key = _C.SlotKey(descriptor.slot, descriptor.generation)
        if kind == _C.SlotKind.GRANT:
            views = (own.pool.view, pool.view, own_ids, peer_ids)
            generations = None
        else:
            views = (pool.view, own.pool.view, peer_ids, own_ids)
            generations = own.generations
        moving = self._shm.begin(
            kind, key, plan.parts, plan.heads, *views, descriptor.num_tokens, generations
        )
        if isinstance(moving, _C.TransferStatus):
            self._check_open()
            name = f"{kind.name.lower()} {descriptor.transfer_id.hex()}"
            if moving == _C.TransferStatus.STALE:
                moving = self.query(descriptor.transfer_id) or moving
            if moving == _C.TransferStatus.OK:
                moving = _C.TransferStatus.STALE
            raise status_error(moving, name)
        return Transfer(self, moving, plan, descriptor.transfer_id, (own, pool))

    def _take(self, frame: wire.Frame, fds: list[int]) -> None:
        if isinstance(frame, wire.RegionFrame):
            self._remote.add(frame, fds)
            return
        close_fds(fds)
        if isinstance(frame, wire.Query):
            status = self._endpoint.status(frame.transfer_id)
            known = wire.Reply.UNKNOWN if status is None else status.value
            self._channel.send(wire.Reply(frame.request, known))
        elif isinstance(frame, wire.Reply):
            waiting = self._answers.get(frame.request)
            if waiting is not None:
                waiting[1].append(frame.status)
                waiting[0].set()
        else:
            raise ProtocolError(f"frame: {type(frame).__name__} has no place after the handshake")

    def _send(self, frame: wire.Frame, fds: tuple[int, ...] = ()) -> None:
        try:
            self._channel.send(frame, fds)
        except PeerGone as error:
            raise LinkClosed(f"the link to {self.peer_name!r} closed: {error}") from error
        self._endpoint.service.wake()

    def _check_open(self) -> None:
        if self._closed:
            raise LinkClosed(f"the link to {self.peer_name!r} is closed")

    def _end_leases(self, why: Exception | None = None) -> None:
        with self._lock:
            leases = list(self._leases)
        for lease in leases:
            lease.end(why)
