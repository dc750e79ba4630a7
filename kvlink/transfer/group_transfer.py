"""`GroupTransfer`: the pools of one request on their way, in the hands of the side that moves."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from kvlink import _C
from kvlink._arguments import wait_end
from kvlink.errors import InvalidArgument
from kvlink.transfer.errors import (
    GrantRevoked,
    TransferCancelled,
    TransferError,
    TransferTimeout,
)
from kvlink.transfer.group_descriptor import GroupDescriptor
from kvlink.transfer.transfer import Progress, Transfer

if TYPE_CHECKING:
    from kvlink.transfer.offer import Lease

# How members end because of another one.
_CONSEQUENCES = (GrantRevoked, TransferCancelled)


class GroupTransfer:
    """Made by `Link.push_group`, `Link.begin_group` and `Link.pull_group`. Thread-safe.

    `members`: the transfers, in the order of the group; None where this side was given nothing to
    move (another rank does). It has arrived when all of them have; one that fails ends all.
    Dropping a group that was not finished cancels it.
    """

    def __init__(
        self, kind: _C.SlotKind, group_id: bytes, members: Sequence[Transfer | None]
    ) -> None:
        self.group_id = group_id
        self._kind = kind
        self.members = tuple(members)
        self._moving = [(idx, each) for idx, each in enumerate(members) if each is not None]

    def post_all(self) -> GroupTransfer:
        """Queues what is left of every member, and finishes; for `push_group`, `pull_group`."""
        for _, transfer in self._moving:
            for part in range(len(transfer.plan.parts)):
                transfer.post_part(part)
        self.finish()
        return self

    def finish(self) -> None:
        """Every layer of every member was queued (`members[i].push_layer`). Raises InvalidArgument
        when one was not. Does not wait."""
        for _, transfer in self._moving:
            transfer.finish()

    def cancel(self) -> None:
        """Gives up: nothing more is moved, and the receiver gets none of the members."""
        for _, transfer in self._moving:
            transfer.cancel()

    def progress(self) -> tuple[Progress | None, ...]:
        """A snapshot of each member, in their order."""
        return tuple(None if each is None else each.progress() for each in self.members)

    @property
    def source_reusable(self) -> bool:
        """No byte of any member's source will be read any more, whatever the outcome."""
        return all(transfer.source_reusable for _, transfer in self._moving)

    def wait_source_reusable(self, timeout: float = 30.0) -> None:
        """Until all source pages may be overwritten, whatever the outcome. Raises
        TransferTimeout."""
        end = wait_end(timeout)
        for _, transfer in self._moving:
            transfer.wait_source_reusable(max(0.0, end - time.monotonic()))

    def wait_arrived(self, timeout: float = 30.0) -> None:
        """Until every member has arrived and was verified; for a pull, only then may any of the
        pages be read. Raises TransferTimeout, or why the first member failed, as
        `Transfer.wait_arrived`: by then the others are cancelled, and a pull touches the
        destination pages no more."""
        end = wait_end(timeout)
        for idx, transfer in self._moving:
            try:
                transfer.wait_arrived(max(0.0, end - time.monotonic()))
            except TransferTimeout:
                raise
            except TransferError as error:
                cause = self._cause(idx, error, end)
                self.cancel()
                if self._kind == _C.SlotKind.OFFER:
                    self.wait_source_reusable(max(0.1, end - time.monotonic()))
                raise cause from None

    def _cause(self, idx: int, error: TransferError, end: float) -> TransferError:
        """Why the group failed: not that the other members were taken back because of it."""
        if isinstance(error, _CONSEQUENCES):
            for other, transfer in self._moving:
                try:
                    transfer.look(end)
                except (*_CONSEQUENCES, TransferTimeout):
                    continue
                except TransferError as failure:
                    idx, error = other, failure
                    break
        return type(error)(f"group {self.group_id.hex()}, member {idx}: {error}")


class LeaseGroup:
    """The pools of one request in place: `Link.adopt_group` makes it. Thread-safe.

    `members`: a `Lease` each, in the order of the group; read them as any. They hold together:
    when one has ended (its owner took it back, its deadline passed), `check` raises and `valid` is
    False, and the owner ends the others. A context manager; `release` at its end.
    """

    def __init__(self, group_id: bytes, members: Sequence[Lease]) -> None:
        self.group_id = group_id
        self.members = tuple(members)

    @property
    def valid(self) -> bool:
        """The pages of all members still hold what was offered."""
        return all(lease.valid for lease in self.members)

    def check(self) -> None:
        """Raises as `Lease.check` when the pages of any member may hold something else by now."""
        for lease in self.members:
            lease.check()

    def release(self) -> None:
        """Gives the pages of all members back. Idempotent."""
        for lease in self.members:
            lease.release()

    def __enter__(self) -> LeaseGroup:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


class MovesGroups:
    """What `Link` does for groups."""

    def parse_group(self, kind: Any, token: Any) -> GroupDescriptor:
        """The members of the peer's group."""
        raise NotImplementedError

    def prepare(
        self, kind: Any, token: Any, pages: Any, region: Any, whole: bool = False
    ) -> Callable[[], Transfer]:
        """Checks one member, and gives what begins it."""
        raise NotImplementedError

    def adopt_all(self, offers: Sequence[Any]) -> list[Lease]:
        """Adopts all of these offers, or none."""
        raise NotImplementedError

    def push_group(self, src_members: Sequence[Any], grants: Any) -> GroupTransfer:
        """Pushes the pools of one request together: `begin_group`, every layer, `finish`."""
        return self.begin_group(src_members, grants).post_all()

    def begin_group(self, src_members: Sequence[Any], grants: Any) -> GroupTransfer:
        """Begins the push of several pools that arrive together or not at all.

        `grants`: the peer's `GrantGroup.to_bytes()`. `src_members`: for each of its members, in
        order, `(region, pages)` as for `begin`, or None where another rank sends it all. Nothing
        is begun unless every member can be. Raises as `begin`.
        """
        return self._start_group(_C.SlotKind.GRANT, grants, src_members)

    def pull_group(self, offers: Any, dst_members: Sequence[Any]) -> GroupTransfer:
        """Pulls what the peer's `OfferGroup.to_bytes()` offers into `(region, pages)` each, as
        `pull`; nothing of it may be read before every member has arrived. Raises as `begin`."""
        return self._start_group(_C.SlotKind.OFFER, offers, dst_members).post_all()

    def adopt_group(self, offers: Any) -> LeaseGroup:
        """Uses all members of the peer's `OfferGroup.to_bytes()` where they lie, as `adopt`: all of
        them, or an error (as `adopt`'s) that leaves the group as it was, open to another try."""
        group = self.parse_group(_C.SlotKind.OFFER, offers)
        return LeaseGroup(group.group_id, self.adopt_all(group.members))

    def _start_group(self, kind: Any, token: Any, members: Sequence[Any]) -> GroupTransfer:
        group = self.parse_group(kind, token)
        if not isinstance(members, Sequence):
            raise InvalidArgument(f"members: expected a list of them; got {members!r}")
        if len(members) != len(group.members):
            raise InvalidArgument(
                f"members: expected {len(group.members)}, as the group has; got {len(members)}"
            )
        ready: list[Callable[[], Transfer] | None] = []
        for part, member in zip(group.members, members, strict=True):
            if member is None:
                ready.append(None)
                continue
            try:
                region, pages = member[:2]
            except (TypeError, ValueError):
                raise InvalidArgument(
                    f"members: expected (region, pages) or None; got {member!r}"
                ) from None
            ready.append(self.prepare(kind, part, pages, region))
        begun: list[Transfer | None] = []
        try:
            for begin in ready:
                begun.append(None if begin is None else begin())
        except BaseException:
            GroupTransfer(kind, group.group_id, begun).cancel()
            raise
        return GroupTransfer(kind, group.group_id, begun)
