"""`Endpoint`: one process's side of every transfer. Registers pools, grants and offers pages,
connects and accepts."""

from __future__ import annotations

import atexit
import queue
import secrets
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from kvlink import _C
from kvlink.errors import InvalidArgument, Unsupported
from kvlink.layout import Shard
from kvlink.pool import KVPool
from kvlink.transfer import wire
from kvlink.transfer.accepting import Acceptor
from kvlink.transfer.channel import Channel
from kvlink.transfer.connecting import OwnSide, PeerSide, dial
from kvlink.transfer.descriptor import descriptor_key
from kvlink.transfer.errors import LinkClosed, PathUnavailable, TransferTimeout
from kvlink.transfer.grant import Grant
from kvlink.transfer.handshake import Identity
from kvlink.transfer.link import Link
from kvlink.transfer.offer import Offer
from kvlink.transfer.region import Region, RegionDescriptor
from kvlink.transfer.reservation import SlotTable
from kvlink.transfer.service import Service, logger

PATHS = ("host_shm", "cuda_ipc", "ucx", "nccl")
_BUILT_PATHS = ("host_shm",)
_MIN_SECRET_BYTES = 16
_live: weakref.WeakSet[Endpoint] = weakref.WeakSet()


class Endpoint:
    """Listens at `address` (bytes; give them to peers by any channel) from construction to `close`.

    `secret`: at least 16 bytes, the same at every peer. `num_slots`: grants and offers that can be
    open at once; `num_page_entries`: pages that they can name together. Owns one service thread,
    which is on no data path. Thread-safe; not usable in a forked child (use `spawn`).
    """

    def __init__(
        self,
        name: str,
        *,
        secret: bytes,
        num_slots: int = 1024,
        num_page_entries: int = 1 << 22,
    ) -> None:
        if not isinstance(name, str) or not 1 <= len(name.encode()) <= 255:
            raise InvalidArgument(f"name: expected 1 to 255 bytes of text; got {name!r}")
        if not isinstance(secret, bytes) or len(secret) < _MIN_SECRET_BYTES:
            raise InvalidArgument(f"secret: expected at least {_MIN_SECRET_BYTES} bytes")
        self.name = name
        self.epoch = secrets.token_bytes(wire.EPOCH_BYTES)
        self.descriptor_key = descriptor_key(secret)
        self._table = SlotTable(num_slots, num_page_entries)
        table, identity = self._table, Identity(name, self.epoch, secret)
        self._own = OwnSide(identity, table.take_bit, table.free_bit, self._describe)
        self._described: dict[int, int] = {}  # regions told in a handshake, by the peer's bit
        self._lock = threading.RLock()
        self._regions: list[Region] = []
        self._links: set[Link] = set()
        self._accepted: queue.SimpleQueue[Link] = queue.SimpleQueue()
        self._closed = False
        self._acceptor = Acceptor(self._own, self._on_incoming)
        self.address = self._acceptor.address
        self.service = Service(name, self._tick)
        self._acceptor.start(self.service)
        _live.add(self)

    # --- pools --------------------------------------------------------------------------------

    def register(
        self, pool: KVPool, shard: Shard | None = None, *, generations: Any = None
    ) -> Region:
        """Makes a pool usable for transfers. Costs the same for any number of pages.

        `shard` says which of the model's layers and KV heads it holds (default: all, from 0).
        Peers can only reach pools made with `shared=True`; any CPU pool can be the near side of a
        push or a pull. `generations`: a live uint32 array [num_pages] that changes where a page is
        freed (`PageAllocator.generations`); without it, `Region.bump_generations` tells of reuse.
        """
        if pool.device[0] != 1:
            raise Unsupported(f"pool: the host_shm path moves CPU memory; got device {pool.device}")
        if shard is None:
            shard = Shard(range(pool.num_layers), range(pool.layout.num_kv_heads))
        with self._lock:
            descriptor = RegionDescriptor(
                len(self._regions), pool.layout, shard, pool.layer_map, pool.num_pages, pool.shared
            )
            descriptor.check()
            region = Region(pool, descriptor, generations)
            self._regions.append(region)
            for link in self._links:
                link.announce(*region.announcement())
        return region

    def region_of(self, region: Region | KVPool | None) -> Region:
        """A region given as itself, as its pool, or left out when there is only one."""
        regions = self._regions
        if region is None:
            if len(regions) == 1:
                return regions[0]
            raise InvalidArgument(f"region: {len(regions)} are registered; name one")
        for candidate in regions:
            if region is candidate or region is candidate.pool:
                return candidate
        raise InvalidArgument("region: it is not registered with this endpoint")

    # --- lending pages ------------------------------------------------------------------------

    def grant(
        self,
        pages: Any,
        num_tokens: int,
        ttl: float = 30.0,
        *,
        region: Region | KVPool | None = None,
        digest: bool = True,
        on_release: Callable[[Grant], None] | None = None,
    ) -> Grant:
        """Promises pages for `num_tokens` tokens of one request, for `ttl` seconds.

        `pages`: page ids in token order, each once; until the grant has ended and is `released`
        nobody else may use them. `on_release(grant)` is called once, on any thread, when a grant
        that failed gives the pages back. `digest=False` leaves out the digest on both sides: count
        and generations alone are then verified. Raises OutOfSlots, InvalidArgument, LinkClosed.
        """
        return Grant(
            self._table, self._lendable(region), pages, num_tokens, ttl, epoch=self.epoch,
            descriptor_key=self.descriptor_key, with_digest=digest, num_pulls=1,
            on_release=on_release,
        )  # fmt: skip

    def offer(
        self,
        pages: Any,
        num_tokens: int,
        ttl: float = 30.0,
        *,
        region: Region | KVPool | None = None,
        pulls: int = 1,
        digest: bool = True,
        on_release: Callable[[Offer], None] | None = None,
    ) -> Offer:
        """Lets peers pull or adopt the KV of `num_tokens` tokens in `pages`, for `ttl` seconds.

        `pulls`: how many pulls end the offer. `on_release(offer)` is called once, on any thread,
        when the pages are the owner's alone again. Raises as `grant`.
        """
        if not 1 <= pulls <= _C.MAX_LINKS:
            raise InvalidArgument(f"pulls: expected 1 to {_C.MAX_LINKS}; got {pulls}")
        return Offer(
            self._table, self._lendable(region), pages, num_tokens, ttl, epoch=self.epoch,
            descriptor_key=self.descriptor_key, with_digest=digest, num_pulls=pulls,
            on_release=on_release,
        )  # fmt: skip

    def status(self, transfer_id: bytes) -> Any:
        """How one of this endpoint's grants or offers stands or ended; None when not known."""
        return self._table.status(transfer_id)

    # --- peers --------------------------------------------------------------------------------

    def connect(self, address: bytes, *, require: str | None = None, timeout: float = 5.0) -> Link:
        """A link to the endpoint at `address`. A peer that restarts needs a new one.

        `require` refuses any other path than the one it names. Raises PeerUnreachable,
        SecretMismatch, VersionMismatch, PathUnavailable, LinkRefused, ProtocolError,
        InvalidArgument.
        """
        if require is not None and require not in PATHS:
            raise InvalidArgument(f"require: expected one of {', '.join(PATHS)}; got {require!r}")
        if require is not None and require not in _BUILT_PATHS:
            raise PathUnavailable(
                f"require: {require!r} is not in this build; there is {', '.join(_BUILT_PATHS)}"
            )
        if self._closed:
            raise LinkClosed("the endpoint is closed")
        return self._add_link(*dial(address, self._own, timeout))

    def accept(self, timeout: float) -> Link:
        """The next link that a peer made to this endpoint. Raises TransferTimeout.

        Only needed to use the link from this side: the peer's pushes need no call here.
        """
        try:
            return self._accepted.get(timeout=max(timeout, 0.0))
        except queue.Empty:
            raise TransferTimeout(f"nobody connected within {timeout} s") from None

    @property
    def links(self) -> tuple[Link, ...]:
        """The open links, of either direction."""
        with self._lock:
            return tuple(link for link in self._links if not link.closed)

    # --- the end ------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """`close` was called."""
        return self._closed

    def close(self, timeout: float = 1.0) -> None:
        """Closes every link, revokes what is open and stops listening. Idempotent.

        Waits up to `timeout` seconds for peers that are inside pages at this moment. One that is
        stopped there is logged: until it ends, its late write could still land in those pages.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            links = list(self._links)
        self._table.shut()
        for link in links:
            link.close()
        end = time.monotonic() + timeout
        while (self._links or self._table.open) and time.monotonic() < end:
            self.service.wake()
            time.sleep(0.002)
            if self.service.on_thread:
                break
        if self._table.open:
            inside = len(self._table.open)
            logger.warning("%r closed with peers inside %d transfers", self.name, inside)
        self.service.stop(5.0)
        self._acceptor.close()
        for link in list(self._links):
            link.on_gone("the endpoint was closed", quiet=False)
        _live.discard(self)

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- for links and the service thread -----------------------------------------------------

    def on_link_gone(self, link: Link, peer_bit: int) -> None:
        """The peer touches nothing any more: its pins, leases and unfinished writes end."""
        self._table.control.drop_link(peer_bit)
        with self._lock:
            self._links.discard(link)
        self._table.free_bit(peer_bit)
        self._table.reap()

    def _lendable(self, region: Region | KVPool | None) -> Region:
        found = self.region_of(region)
        if not found.descriptor.shared:
            raise Unsupported(
                "region: peers cannot map this pool; make it with KVPool.create(..., shared=True)"
            )
        self.service.wake()
        return found

    def _add_link(self, channel: Channel, side: PeerSide, bit: int) -> Link:
        link = Link(self, channel, side, bit)
        with self._lock:
            self._links.add(link)
            missed = self._regions[self._described.pop(bit) :]
        link.start()
        for region in missed:
            link.announce(*region.announcement())
        return link

    def _describe(self, bit: int) -> list[tuple[wire.Frame, tuple[int, ...]]]:
        control = self._table.control
        with self._lock:
            regions = list(self._regions)
            self._described[bit] = len(regions)
        describe = wire.Describe(bit, control.num_bytes, len(regions))
        return [(describe, (control.fd,)), *(region.announcement() for region in regions)]

    def _on_incoming(self, channel: Channel, side: PeerSide, bit: int) -> None:
        self._accepted.put(self._add_link(channel, side, bit))

    def _tick(self) -> bool:
        accepting = self._acceptor.tick()
        self._table.reap()
        busy = [link.tick(time.monotonic_ns()) for link in list(self._links)]
        return any(busy) or bool(self._table.open) or accepting


@atexit.register
def _close_all() -> None:
    """Workers must not outlive the interpreter."""
    for endpoint in list(_live):
        endpoint.close(timeout=0.2)
