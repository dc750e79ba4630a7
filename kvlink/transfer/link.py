"""`Link`: a peer that this endpoint can push to, pull from, and adopt pages of."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from kvlink import _C
from kvlink._arguments import wait_end
from kvlink.errors import InvalidArgument
from kvlink.transfer import wire
from kvlink.transfer.errors import (
    LinkClosed,
    PeerLost,
    TransferTimeout,
    again,
    status_error,
)
from kvlink.transfer.forking import PARENTS, keep
from kvlink.transfer.group_transfer import MovesGroups
from kvlink.transfer.lending import check_not_lent
from kvlink.transfer.link_facts import LinkFacts
from kvlink.transfer.offer import Lease
from kvlink.transfer.region import Region, page_ids
from kvlink.transfer.transfer import Transfer

if TYPE_CHECKING:
    from kvlink.transfer.descriptor import Descriptor
    from kvlink.transfer.group_descriptor import GroupDescriptor
    from kvlink.transfer.peers import Peers
    from kvlink.transfer.plan import TransferPlan
    from kvlink.transfer.reconnecting import Reconnector
    from kvlink.transfer.session import Session

_WAIT_SLICE = 0.1  # s, so that signals are handled
_SEARCH_TIMEOUT = 1.0  # s, for a thread that looks for the peer


class Link(LinkFacts, MovesGroups):
    """Made by `Endpoint.connect` on one side and by `Endpoint.accept` on the other; both may push,
    pull and adopt. Thread-safe. In a forked child it raises LinkClosed.

    A link made by `connect` stays: when the peer or the connection is lost, what was under way
    fails with PeerLost and the link connects again by itself, in a new session, until `close`. A
    link from `accept` ends with its session; the peer's next one comes out of `accept` anew.
    """

    def __init__(self, peers: Peers, reconnector: Reconnector | None = None) -> None:
        """For `Endpoint`."""
        self.watch = peers.watch.new_link()
        self._peers = peers
        self._reconnector = reconnector
        self._changed = threading.Condition()
        self._session: Session | None = None
        self._num_sessions = 0
        self._closed = False
        self._lost: PeerLost | None = None

    # --- moving KV ----------------------------------------------------------------------------

    def push(self, src_pages: Any, grant: Any, *, region: Region | None = None) -> Transfer:
        """Pushes a whole request: `begin`, every layer, `finish`. Does not wait for the bytes."""
        return self._start_all(_C.SlotKind.GRANT, grant, src_pages, region)

    def begin(self, src_pages: Any, grant: Any, *, region: Region | None = None) -> Transfer:
        """Begins a push that is then fed layer by layer.

        `src_pages`: page ids in token order that hold the granted number of tokens, in the pool of
        `region` (by default the endpoint's only one). `grant`: the peer's `Grant.to_bytes()`. What
        both pools hold is moved, converted on the way; several links may fill one grant with
        different layers or heads. O(layers + pages); over ucx it asks the peer, too. Raises
        InvalidDescriptor, UnknownRegion, Unconvertible, AlreadyWriting, GrantExpired, GrantRevoked,
        StaleTransfer, PeerLost (at once, while it reconnects), TransferTimeout (ucx: no answer
        within 5 s), LinkClosed, InvalidArgument.
        """
        return self._start(_C.SlotKind.GRANT, grant, src_pages, region)

    def pull(self, offer: Any, dst_pages: Any, *, region: Region | None = None) -> Transfer:
        """Copies what the peer offers into `dst_pages` of `region`'s pool. Returns at once.

        `offer`: the peer's `Offer.to_bytes()`. `wait_arrived` of the result tells when all is there
        and verified: only then may the pages be read. Raises as `begin`, and PagesLent when this
        side has granted or offered one of them.
        """
        return self._start_all(_C.SlotKind.OFFER, offer, dst_pages, region)

    def adopt(self, offer: Any) -> Lease:
        """Uses the offered pages where they lie: no byte moves, and the time it takes does not
        depend on the request's length. Raises as `begin`, and PathUnavailable on paths that map
        nothing."""
        return self.adopt_all([offer])[0]

    def adopt_all(self, offers: Sequence[Any]) -> list[Lease]:
        """For `MovesGroups`: adopts all of them or none; an error leaves every one open."""
        taken: list[tuple[Descriptor, Any]] = []
        with self.watch.beginning(_C.SlotKind.OFFER, "adoption") as logged:
            session = self._current()
            descriptors = [session.remote.parse(_C.SlotKind.OFFER, offer) for offer in offers]
            try:
                for descriptor in descriptors:
                    logged["transfer_id"] = descriptor.transfer_id.hex()
                    taken.append((descriptor, session.path_link.adopt(descriptor)))
            except BaseException:
                for _, (*_, key) in taken:
                    session.path_link.unadopt(key)
                raise
        leases = []
        for descriptor, (pool, pages, control, key) in taken:
            leases.append(lease := Lease(session, control, key, descriptor, pool, pages))
            session.add_lease(lease)
            self.watch.adopted(descriptor.transfer_id, descriptor.num_pages)
        return leases

    def query(self, transfer_id: bytes, timeout: float = 5.0) -> Any:
        """How a transfer of the peer's grants and offers stands or ended, by its id: a
        `TransferStatus` (PENDING, OK, or why it failed), or None when the peer does not know it.
        Idempotent. Raises TransferTimeout, PeerLost, LinkClosed, InvalidArgument."""
        wait_end(timeout)
        if not isinstance(transfer_id, bytes) or len(transfer_id) != wire.TRANSFER_ID_BYTES:
            raise InvalidArgument(f"transfer_id: expected 16 bytes; got {transfer_id!r}")
        return self._current().query(transfer_id, timeout)

    # --- sessions -----------------------------------------------------------------------------

    def wait_connected(self, timeout: float) -> None:
        """Until there is a session. Raises TransferTimeout (with the last reason), LinkClosed."""
        end = wait_end(timeout)
        with self._changed:
            while self.state != "connected":
                if self._closed:
                    raise LinkClosed("the link is closed")
                left = end - time.monotonic()
                if left <= 0:
                    raise TransferTimeout(f"not connected after {timeout} s: {self.state}")
                self._changed.wait(min(left, _WAIT_SLICE))

    def wait_closed(self, timeout: float) -> None:
        """For `Reconnector`: a pause, which `close` ends."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed, timeout)

    def attach(self, session: Session) -> bool:
        """For `Endpoint`: a session of this link; False when the link was closed meanwhile."""
        with self._changed:
            if self._closed:
                return False
            self.watch.session_up(session)  # first: who sees the session finds it counted
            self._session = session
            self._num_sessions += 1
            self._lost = None
            self._changed.notify_all()
        return True

    def on_session_gone(self, session: Session, why: str) -> None:
        """For `Session`, on the service thread."""
        lost = not self._closed
        self.watch.session_down(session, why if lost else "this side closed it", lost)
        with self._changed:
            if self._session is not session or self._closed:
                return
            self._lost = session.gone
            if self._reconnector is None:
                self._closed = True
            self._changed.notify_all()
        if self._reconnector is None:
            self._peers.on_link_closed(self)
        else:
            self._reconnector.begin(self)

    def close(self) -> None:
        """Cancels what is under way, gives leases back, tells the peer, and connects no more.
        Idempotent. When it returns, this side touches no page of the peer any more, and an attempt
        to connect again that was under way has ended (a resolver that does not return is waited for
        1 s): a link made later is the newest at the peer, too."""
        self.end()
        if self._reconnector is not None:
            self._reconnector.join(_SEARCH_TIMEOUT)

    def end(self) -> None:
        """For `Peers`: `close`, but an attempt to connect again may go on for a moment."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._lost = None
            self._changed.notify_all()
        if self._session is not None:
            self._session.close()
        self._peers.on_link_closed(self)

    def leave(self) -> None:
        """In a forked child: see `forking`."""
        keep(self.watch, self._peers)
        self.watch = self._peers = PARENTS
        self._changed, self._closed = threading.Condition(), True

    # --- inside -------------------------------------------------------------------------------

    def _current(self) -> Session:
        session = self._last
        if self.gone is not None:
            raise again(self.gone)
        if self._closed:
            raise LinkClosed(f"the link to {self.peer_name!r} is closed")
        if session.closed:
            raise PeerLost(f"the link to {self.peer_name!r} has just been lost")
        return session

    def parse_group(self, kind: Any, token: Any) -> GroupDescriptor:
        """For `MovesGroups`."""
        with self.watch.beginning(kind):
            return self._current().remote.parse_group(kind, token)

    def prepare(
        self, kind: Any, token: Any, pages: Any, region: Region | None, whole: bool = False
    ) -> Callable[[], Transfer]:
        """For `MovesGroups`: checks all that can be before it begins, and gives what begins it
        (and, if `whole`, moves all of it)."""
        with self.watch.beginning(kind) as logged:
            session = self._current()
            descriptor = session.remote.parse(kind, token)
            logged["transfer_id"] = descriptor.transfer_id.hex()
            own = self._peers.regions.of(region)
            name = "dst_pages" if kind == _C.SlotKind.OFFER else "src_pages"
            own_ids = page_ids(pages, own.pool.num_pages, name)
            needed = -(-descriptor.num_tokens // own.descriptor.layout.page_size)
            if own_ids.size < needed:
                raise InvalidArgument(
                    f"{name}: expected at least {needed} for {descriptor.num_tokens} tokens; "
                    f"got {own_ids.size}"
                )
            plan = session.remote.plan(kind, own, descriptor)
            if kind == _C.SlotKind.OFFER:
                check_not_lent(own, own_ids[:needed], self._peers.table)
        return lambda: self._begin(session, kind, descriptor, own, own_ids, plan, whole)

    def _start(self, kind: Any, token: Any, pages: Any, region: Region | None) -> Transfer:
        return self.prepare(kind, token, pages, region)()

    def _start_all(self, kind: Any, token: Any, pages: Any, region: Region | None) -> Transfer:
        """Begins it, and moves all of it."""
        return self.prepare(kind, token, pages, region, whole=True)()

    def _begin(
        self, session: Session, kind: Any, descriptor: Descriptor, own: Region, own_ids: Any,
        plan: TransferPlan, whole: bool,
    ) -> Transfer:  # fmt: skip
        generations = own.generations if kind == _C.SlotKind.OFFER else None
        with self.watch.beginning(kind) as logged:
            logged["transfer_id"] = descriptor.transfer_id.hex()
            moving = session.path_link.begin(kind, descriptor, own, own_ids, plan, generations)
            if isinstance(moving, _C.TransferStatus):
                raise self._why_not_begun(kind, descriptor, moving)
        if whole:  # what follows is done while it moves
            begin = time.perf_counter_ns()
            moving.post_all()
            nanoseconds = time.perf_counter_ns() - begin
        watched = self.watch.begun(kind, descriptor.transfer_id, moving, own_ids.size)
        transfer = Transfer(self, watched, plan, own)
        session.transfers.add(transfer)
        if whole:
            transfer.posted_all(nanoseconds)
        return transfer

    def _why_not_begun(self, kind: Any, descriptor: Descriptor, status: Any) -> Exception:
        self._current()
        if status == (stale := _C.TransferStatus.STALE):
            status = self.query(descriptor.transfer_id) or stale
        status = stale if status == _C.TransferStatus.OK else status
        return status_error(status, f"{kind.name.lower()} {descriptor.transfer_id.hex()}")
