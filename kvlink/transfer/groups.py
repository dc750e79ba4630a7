"""Groups: the pools of one request (attention KV, states, embeddings) that arrive together.

A group is several grants or several offers. Each moves as it would alone; the group ends well only
if all of them do. `group_transfer` is the moving side.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from kvlink import _C
from kvlink._arguments import function, optional, wait_end
from kvlink.errors import InvalidArgument
from kvlink.transfer.errors import TransferError, TransferTimeout, status_error
from kvlink.transfer.grant import Arrival, Grant
from kvlink.transfer.group_descriptor import GroupDescriptor
from kvlink.transfer.offer import Offer

if TYPE_CHECKING:
    from kvlink.pool import KVPool
    from kvlink.transfer.region import Region

MAX_MEMBERS = 64
_OK, _PENDING = _C.TransferStatus.OK, _C.TransferStatus.PENDING
# How members end because of another one.
_CONSEQUENCES = (_C.TransferStatus.REVOKED, _C.TransferStatus.CANCELLED)


class Member(NamedTuple):
    """One pool's part of a request: `pages` in token order, `num_tokens` of them (pages of page
    size 1 for states). A plain tuple does as well."""

    region: Region | KVPool
    pages: Any
    num_tokens: int


class MemberGrant(Grant):
    """Tells its group whenever nobody is inside any more, however it ended."""

    def _gives_back(self) -> bool:
        return True


ReservationT = TypeVar("ReservationT", Grant, Offer)


class _Group(Generic[ReservationT]):
    """Base of `GrantGroup` and `OfferGroup`.

    Attributes: `group_id` (16 random bytes), `members` (the grants or offers, as they were given).
    """

    _kind: _C.SlotKind

    def __init__(
        self,
        members: Sequence[Any],
        lend: Callable[..., ReservationT],
        descriptor_key: bytes,
        on_release: Callable[[Any], None] | None,
    ) -> None:
        """For `Endpoint`; `lend(region, pages, num_tokens, on_release)` opens one."""
        wanted = _checked(members)
        self.group_id = secrets.token_bytes(16)
        self.members: tuple[ReservationT, ...] = ()
        self._lock = threading.Lock()
        self._cause: tuple[int, Any] | None = None  # member and status that ended the group
        self._released = threading.Event()
        optional(function)("on_release", on_release)
        self._on_release = on_release
        opened: list[ReservationT] = []
        try:
            for region, pages, num_tokens in wanted:
                opened.append(lend(region, pages, num_tokens, self._on_member))
        except BaseException:
            for reservation in opened:
                reservation.revoke()
            raise
        tokens = tuple(reservation.to_bytes() for reservation in opened)
        self._bytes = GroupDescriptor(self.group_id, tokens).to_bytes(descriptor_key, self._kind)
        self.members = tuple(opened)
        self.advance()

    def to_bytes(self) -> bytes:
        """What the peer needs. It may travel by any channel: altered bytes are refused."""
        return self._bytes

    @property
    def status(self) -> Any:
        """PENDING, OK when every member is, or how the first one failed."""
        self.advance()
        if self._cause is not None:
            return self._cause[1]
        return _OK if all(member.status == _OK for member in self.members) else _PENDING

    @property
    def released(self) -> bool:
        """All members have ended and no peer is inside the pages of any."""
        return self._released.is_set()

    def extend(self, ttl: float) -> bool:
        """Moves the deadline of what is still open to `ttl` seconds from now; False when the group
        has ended."""
        for member in self.members:
            if not member.extend(ttl) and member.status != _OK:
                return False
        return bool(self.status == _PENDING)

    def revoke(self) -> bool:
        """Takes all pages back. Does not wait. False when the group had ended already."""
        if self.status != _PENDING:
            return False
        revoked = [member.revoke() for member in self.members]
        return any(revoked) and bool(self.status == _C.TransferStatus.REVOKED)

    def wait_released(self, timeout: float) -> None:
        """Until all have ended and the pages are the owner's alone. Raises TransferTimeout."""
        end = wait_end(timeout)
        for member in self.members:
            member.wait_released(max(0.0, end - time.monotonic()))
        self.advance()

    def advance(self) -> None:
        """Ends all members once one has failed, and gives the pages back once all have ended."""
        ends = [(idx, member.status) for idx, member in enumerate(self.members)]
        failed = [end for end in ends if end[1] not in (_OK, _PENDING)]
        if failed and self._cause is None:
            failed.sort(key=lambda end: end[1] in _CONSEQUENCES)
            with self._lock:
                self._cause = self._cause or failed[0]
            for member in self.members:
                member.revoke()
        with self._lock:
            released = bool(self.members) and all(member.released for member in self.members)
            if not released or self._released.is_set():
                return
            self._released.set()
        if self._on_release is not None and self._gives_back():
            self._on_release(self)

    def _on_member(self, member: Any) -> None:
        """Any thread: nobody is inside this member any more."""
        self.advance()

    def _gives_back(self) -> bool:
        return True

    def _failure(self) -> TransferError:
        assert self._cause is not None
        idx, status = self._cause
        return status_error(status, f"group {self.group_id.hex()}, member {idx}")


class GrantGroup(_Group[Grant]):
    """Pages of several pools that peers may write one request into: `Endpoint.grant_group`.

    Either `wait` or `poll` returns the arrivals of all members, and all pages belong to the
    request, or the group fails and all pages return to the owner, once, as soon as no writer is
    inside any of them (`released`, `on_release`): also those of members that had arrived.
    """

    _kind = _C.SlotKind.GRANT
    _arrivals: tuple[Arrival, ...] | None = None

    def wait(self, timeout: float) -> tuple[Arrival, ...]:
        """Waits until every member has arrived and was verified; one Arrival each, in their order.

        Raises TransferTimeout (the group stays open) or the reason why its first member failed; as
        `Grant.wait`. A group that has failed or arrived stays so.
        """
        end = wait_end(timeout)
        if self._arrivals is not None:
            return self._arrivals
        arrivals = []
        for idx, member in enumerate(self.members):
            try:
                arrivals.append(member.wait(max(0.0, end - time.monotonic())))
            except TransferTimeout:
                self.advance()
                if self._cause is not None:
                    raise self._failure() from None
                raise TransferTimeout(
                    f"group {self.group_id.hex()}, member {idx}: not there after {timeout} s"
                ) from None
            except TransferError as error:
                self.advance()
                raise (self._failure() if self._cause is not None else error) from None
        self._arrivals = tuple(arrivals)
        return self._arrivals

    def poll(self) -> tuple[Arrival, ...] | None:
        """As `wait`, without waiting: None while something is still missing."""
        try:
            return self.wait(0.0)
        except TransferTimeout:
            return None

    def _gives_back(self) -> bool:
        return self._cause is not None


class OfferGroup(_Group[Offer]):
    """Pages of several pools that peers may pull together: `Endpoint.offer_group`.

    It ends when every member was pulled, or with the first that ends otherwise; the pages are the
    owner's alone again when `released` says so (`wait_released`, `on_release`).
    """

    _kind = _C.SlotKind.OFFER


def _checked(members: Sequence[Any]) -> list[Member]:
    """Members with the fields of one."""
    if not isinstance(members, Sequence):
        raise InvalidArgument(f"members: expected a list of them; got {members!r}")
    if not 1 <= len(members) <= MAX_MEMBERS:
        raise InvalidArgument(f"members: expected 1 to {MAX_MEMBERS}; got {len(members)}")
    try:
        checked = [Member(*member) for member in members]
    except TypeError:
        raise InvalidArgument(
            f"members: expected (region, pages, num_tokens) each; got {members!r}"
        ) from None
    _check_distinct(checked)
    return checked


def _check_distinct(members: Sequence[Member]) -> None:
    """Members of one region name no page twice."""
    import numpy as np

    used: dict[int, set[int]] = {}
    for member in members:
        before = used.setdefault(id(getattr(member.region, "pool", member.region)), set())
        pages = np.ravel(member.pages).tolist()
        if not before.isdisjoint(pages):
            twice = min(before.intersection(pages))
            raise InvalidArgument(f"members: page {twice} of one region is named twice")
        before.update(pages)


class LendsGroups:
    """What `Endpoint` does for groups."""

    descriptor_key: bytes

    def lend(
        self, kind: type[ReservationT], ttl: float, digest: bool, num_pulls: int, region: Any,
        pages: Any, num_tokens: int, on_release: Callable[[Any], None] | None,
    ) -> ReservationT:  # fmt: skip
        """Opens one grant or offer."""
        raise NotImplementedError

    def grant_group(
        self,
        members: Sequence[Any],
        ttl: float = 30.0,
        *,
        digest: bool = True,
        on_release: Callable[[GrantGroup], None] | None = None,
    ) -> GrantGroup:
        """Promises pages of several pools to one request: all of it arrives, or none.

        `members`: `(region, pages, num_tokens)` each, as for `grant`. `on_release(group)` is called
        once, on any thread, when a group that failed gives all its pages back. Raises as `grant`;
        then nothing was granted.
        """
        lend = partial(self.lend, MemberGrant, ttl, digest, 1)
        return GrantGroup(members, lend, self.descriptor_key, on_release)

    def offer_group(
        self,
        members: Sequence[Any],
        ttl: float = 30.0,
        *,
        digest: bool = True,
        on_release: Callable[[OfferGroup], None] | None = None,
    ) -> OfferGroup:
        """Lets a peer pull or adopt what several pools hold of one request; as `grant_group`, but
        `on_release(group)` is called in any case, when the pages are the owner's alone again."""
        lend = partial(self.lend, Offer, ttl, digest, 1)
        return OfferGroup(members, lend, self.descriptor_key, on_release)
