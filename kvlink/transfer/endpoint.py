"""`Endpoint`: one process's side of every transfer. Registers pools, grants and offers pages,
connects and accepts."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from kvlink import _C
from kvlink._arguments import a, integer, name_text, number_of, one_of, wait_end, wrong
from kvlink.errors import InvalidArgument, Unsupported
from kvlink.layout import Shard
from kvlink.pool import KVPool
from kvlink.transfer.descriptor import descriptor_key
from kvlink.transfer.errors import LinkClosed
from kvlink.transfer.forking import PARENTS, keep, live
from kvlink.transfer.grant import Grant
from kvlink.transfer.groups import LendsGroups, ReservationT
from kvlink.transfer.link import Link
from kvlink.transfer.log import logger
from kvlink.transfer.offer import Offer
from kvlink.transfer.paths import BUILT_PATHS
from kvlink.transfer.peers import Peers
from kvlink.transfer.region import Region
from kvlink.transfer.regions import Regions
from kvlink.transfer.service import Service
from kvlink.transfer.slot_table import SlotTable
from kvlink.transfer.watching import EndpointWatch

_MIN_SECRET_BYTES = 16


class Endpoint(LendsGroups):
    """Listens at `address` (bytes; give them to peers by any channel) from construction to `close`.

    `secret`: at least 16 bytes, random, the same at every peer; who can connect could try guesses.
    `listen`: "HOST:PORT" to be reached from other hosts, too (port 0: any); without it, only from
    this host. `paths`: those that links may use. `peer_timeout`: seconds after which a peer on
    another host that answers nothing is lost. `num_slots`: grants and offers that can be open at
    once; `num_page_entries`: pages that they can name together. Owns one service thread, which is
    on no data path. Thread-safe. In a forked child it raises LinkClosed (use `spawn`).
    """

    def __init__(
        self,
        name: str,
        *,
        secret: bytes,
        listen: str | None = None,
        paths: tuple[str, ...] = BUILT_PATHS,
        peer_timeout: float = 10.0,
        num_slots: int = 1024,
        num_page_entries: int = 1 << 22,
    ) -> None:
        name_text("name", name)
        if not isinstance(secret, bytes) or len(secret) < _MIN_SECRET_BYTES:
            got = f"{len(secret)} bytes" if isinstance(secret, bytes) else type(secret).__name__
            raise InvalidArgument(f"secret: expected at least {_MIN_SECRET_BYTES} bytes; got {got}")
        if not isinstance(paths, tuple | list | set | frozenset) or not paths:
            raise wrong("paths", f"some of {BUILT_PATHS}", paths)
        for path in paths:
            one_of("paths", path, BUILT_PATHS)
        seconds = number_of(peer_timeout)
        if seconds is None or not 1.0 <= seconds <= 3600.0:
            raise wrong("peer_timeout", "1 to 3600 s", peer_timeout)
        self.name = name
        self.descriptor_key = descriptor_key(secret)
        self._table = SlotTable(num_slots, num_page_entries, EndpointWatch(name))
        self._regions = Regions()
        self._peers = Peers(
            name, secret, self.descriptor_key, self._table, self._regions,
            listen=listen, paths=tuple(paths), peer_timeout=seconds,
        )  # fmt: skip
        self.epoch = self._peers.epoch
        self.address = self._peers.address
        self._closed = False
        self.service = Service(name, self._tick)
        self._peers.start(self.service)
        live.add(self)

    # --- pools --------------------------------------------------------------------------------

    def register(
        self, pool: KVPool, shard: Shard | None = None, *, generations: Any = None
    ) -> Region:
        """Makes a pool usable for transfers. Costs the same for any number of pages.

        `shard` says which of the model's layers and KV heads it holds (default: all, from 0).
        Over `host_shm` peers reach only pools made with `shared=True`, over `ucx` any CPU pool; any
        can be the near side of a push or a pull. `generations`: a live uint32 array [num_pages]
        that changes where a page is freed (`PageAllocator.generations`); without it,
        `Region.bump_generations` tells of reuse.
        Raises InvalidArgument, Unsupported (not CPU memory), LinkClosed.
        """
        if self._closed:
            raise LinkClosed("the endpoint is closed")
        region = self._regions.add(pool, shard, generations)
        self._peers.tell_regions()
        return region

    def unregister(self, region: Region | KVPool, timeout: float = 5.0) -> None:
        """Takes a pool out of every transfer: revokes its grants and offers, cancels what moves
        from or to it, and tells the peers. When it returns, nobody touches its memory any more.

        Raises TransferTimeout when a peer is still inside its pages after `timeout` seconds (it is
        stopped there): the region is unregistered then, but its memory must stay. InvalidArgument
        when it is not registered.
        """
        end = wait_end(timeout)
        found = self._regions.remove(region)
        self._peers.tell_regions()
        lent = self._table.revoke(found)
        moving = self._peers.transfers_of(found)
        for transfer in moving:
            transfer.cancel()
        for transfer in moving:
            transfer.wait_source_reusable(max(end - time.monotonic(), 0.0))
        for reservation in lent:
            reservation.wait_released(max(end - time.monotonic(), 0.0))
        self._peers.forget_region(found)

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
        nobody else may use them, and they are neither granted nor offered again (PagesLent).
        `on_release(grant)` is called once, on any thread, when a grant that failed gives the pages
        back. `digest=False` leaves out the digest on both sides: count and generations alone are
        then verified. Raises PagesLent, OutOfSlots, InvalidArgument,
        LinkClosed.
        """
        return self.lend(Grant, ttl, digest, 1, region, pages, num_tokens, on_release)

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

        Pages may be offered several times at once, but not while they are granted (PagesLent).
        `pulls`: how many pulls end the offer. `on_release(offer)` is called once, on any thread,
        when the pages are the owner's alone again. Raises as `grant`.
        """
        pulls = integer("pulls", pulls, 1, _C.MAX_LINKS)
        return self.lend(Offer, ttl, digest, pulls, region, pages, num_tokens, on_release)

    def lend(
        self, kind: type[ReservationT], ttl: float, digest: bool, num_pulls: int, region: Any,
        pages: Any, num_tokens: int, on_release: Callable[[Any], None] | None,
    ) -> ReservationT:  # fmt: skip
        """Opens one grant or offer; see `grant` and `offer`."""
        lent = kind(
            self._table, self._lendable(region), pages, num_tokens, ttl, epoch=self.epoch,
            descriptor_key=self.descriptor_key, with_digest=digest, num_pulls=num_pulls,
            on_release=on_release,
        )  # fmt: skip
        self.service.wake()  # the reaper has something to watch
        return lent

    def status(self, transfer_id: bytes) -> Any:
        """How one of this endpoint's grants or offers stands or ended; None when not known."""
        a(bytes)("transfer_id", transfer_id)
        return self._table.status(transfer_id)

    def metrics(self) -> dict[str, Any]:
        """What this endpoint has counted so far, and its links by peer and path (those that have
        closed, too): plain nested dicts, ready for JSON (docs/transfer_contract.md,
        Observability)."""
        return self._table.watch.snapshot(self._table)

    # --- peers --------------------------------------------------------------------------------

    def connect(
        self,
        address: bytes | Callable[[], bytes],
        *,
        require: str | None = None,
        timeout: float = 5.0,
    ) -> Link:
        """A link to the endpoint at `address`, which connects again by itself when it is lost.

        `address`: the peer's, or a callable that finds it (`FileDiscovery.resolver`, ...), asked
        again each time; a peer that it does not lead to yet is waited for until `timeout`.
        `require` refuses any other path than the one it names. Raises PeerUnreachable,
        SecretMismatch, VersionMismatch, PathUnavailable, LinkRefused, ProtocolError, LinkClosed,
        InvalidArgument.
        """
        wait_end(timeout)
        return self._peers.connect(address, require, timeout)

    def accept(self, timeout: float) -> Link:
        """The next link that a peer made to this endpoint. Raises TransferTimeout, LinkClosed.

        Only needed to use the link from this side: the peer's pushes need no call here. A peer that
        connects again comes as a new link.
        """
        wait_end(timeout)
        if self._closed:
            raise LinkClosed("the endpoint is closed")
        return self._peers.accept(timeout)

    @property
    def links(self) -> tuple[Link, ...]:
        """The open links, of either direction."""
        return self._peers.links

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
        end = wait_end(timeout)
        if self._closed:
            return
        self._closed = True
        self._table.shut()
        self._peers.close_links()
        end = wait_end(timeout)
        while not (self._peers.quiet and not self._table.open) and time.monotonic() < end:
            self.service.wake()
            time.sleep(0.002)
            if self.service.on_thread:
                break
        if self._table.open:
            inside = len(self._table.open)
            logger.warning("%r closed with peers inside %d transfers", self.name, inside)
        self.service.stop(5.0)
        self._peers.close()
        live.discard(self)

    def __repr__(self) -> str:
        state = "closed" if self._closed else self.address.decode()
        return f"<Endpoint {self.name!r}: {state}>"

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- inside -------------------------------------------------------------------------------

    def _lendable(self, region: Region | KVPool | None) -> Region:
        found = self._regions.of(region)
        if not found.descriptor.shared and self._peers.missing("ucx"):
            raise Unsupported(
                "region: peers cannot map this pool; make it with KVPool.create(..., shared=True)"
            )
        return found

    def leave(self) -> None:
        """In a forked child: the endpoint is the parent's alone."""
        self._peers.leave()
        self._table.leave()
        keep(self._table, self._peers, self._regions, self.service)
        self._table = self._peers = self._regions = self.service = PARENTS
        self._closed = True

    def _tick(self) -> bool:
        self._table.reap()
        return self._peers.tick() or bool(self._table.open)
