"""`Transfer`: one request's KV on its way, in the hands of the side that moves it."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from kvlink import _C
from kvlink._arguments import checked, integer, optional, wait_end
from kvlink.errors import InvalidArgument
from kvlink.transfer.errors import (
    StaleTransfer,
    TransferError,
    TransferTimeout,
    status_error,
)
from kvlink.transfer.forking import PARENTS, keep
from kvlink.transfer.plan import TransferPlan

if TYPE_CHECKING:
    from kvlink.transfer.link import Link
    from kvlink.transfer.metrics import Moving
    from kvlink.transfer.region import Region

_OK = _C.TransferStatus.OK
_PENDING = _C.TransferStatus.PENDING
_STALE = _C.TransferStatus.STALE


class PartTimes(NamedTuple):
    """When one stored layer was posted, begun and done: time.monotonic_ns(); 0 if not yet."""

    posted_ns: int
    started_ns: int
    done_ns: int


@dataclass(frozen=True)
class Progress:
    """A snapshot of the work on this side.

    `num_bytes` were stored at the destination, in `moving_s` seconds of moving; `parts` has one
    entry for each stored layer that both pools hold. `status` is that of the work here (PENDING,
    OK when all was moved, or why it stopped); whether it arrived is told by `wait_arrived`.
    """

    status: _C.TransferStatus
    source_reusable: bool
    num_bytes: int
    num_rows: int
    moving_s: float
    parts: tuple[PartTimes, ...]
    message: str


class Transfer:
    """Made by `Link.push`, `Link.begin` and `Link.pull`. Thread-safe.

    Two completions, never the same: *source reusable* (the source pages may be overwritten) and
    *arrived* (the receiver has verified every byte). Dropping a transfer that was not finished
    cancels it.
    """

    def __init__(self, link: Link, moving: Moving, plan: TransferPlan, region: Region) -> None:
        self.link = link
        self.plan = plan
        self.transfer_id = moving.transfer_id
        self.region = region  # ours
        self._moving = moving.moving
        self._watch, self._watched = link.watch, moving
        self._ends = False  # finish or cancel was called

    @checked(layer=integer, num_tokens=optional(integer))
    def push_layer(self, layer: int, num_tokens: int | None = None) -> None:
        """Queues a layer of the source pool whose KV is complete, and returns at once.

        Layers may come in any order. `num_tokens` queues only the next that many tokens of the
        layer (chunked prefill), by default all that are left. A layer whose stored layer was queued
        before (shared KV), or that the receiver does not hold, is nothing to do. Raises
        InvalidArgument; a transfer that has failed meanwhile is told by the waits.
        """
        begin = time.perf_counter_ns()
        parts_of_layer = self.plan.parts_of_layer
        if not 0 <= layer < len(parts_of_layer):
            raise InvalidArgument(f"layer: expected 0 to {len(parts_of_layer) - 1}; got {layer}")
        for part in parts_of_layer[layer]:
            left = self._moving.tokens_left(part)
            if left:
                self._moving.post(part, left if num_tokens is None else num_tokens)
        self._watch.posted(self._watched, layer, time.perf_counter_ns() - begin)

    def post_part(self, part: int) -> None:
        """Queues what is left of one part; for groups, and for pulls that go part by part."""
        self._moving.post(part, self._moving.tokens_left(part))

    def posted_all(self, nanoseconds: int) -> None:
        """For `Link.push` and `Link.pull`: everything was queued, which took that long."""
        self._will_end()
        if self._watched.kind == "push":
            self._watch.posted_all(self._watched, len(self.plan.parts_of_layer), nanoseconds)

    def finish(self) -> None:
        """Every layer was queued. Raises InvalidArgument when one was not. Does not wait."""
        self._moving.finish()
        self._will_end()

    def cancel(self) -> None:
        """Gives up: nothing more is moved and the receiver sees TransferCancelled. Does not wait;
        `wait_source_reusable` tells when the chunk under way has ended. No effect on a transfer
        that has ended."""
        self._moving.cancel()
        self._will_end()

    @property
    def source_reusable(self) -> bool:
        """No byte of the source pages will be read any more, whatever the outcome."""
        return bool(self._moving.progress()["source_reusable"])

    def wait_source_reusable(self, timeout: float = 30.0) -> None:
        """Until the source pages may be overwritten, whatever the outcome (that is told by
        `wait_arrived`). Raises TransferTimeout."""
        begin = time.monotonic_ns()
        reusable = self._moving.wait_source_reusable(_deadline_ns(timeout))
        self._watch.metrics.waited(time.monotonic_ns() - begin, source=True)
        if not reusable:
            raise TransferTimeout(f"{self._name()}: the source is still needed after {timeout} s")

    def wait_arrived(self, timeout: float = 30.0) -> None:
        """Until the receiver has verified every byte and committed (for a pull: until this side
        has). The receiver of a push verifies in its `Grant.wait` or `poll`; this waits for one of
        them. Raises TransferTimeout, or why it failed: TransferCancelled, GrantRevoked,
        GrantExpired, PeerLost, DigestMismatch, GenerationMismatch, RowCountMismatch, MoveFailed,
        StaleTransfer."""
        begin = time.monotonic_ns()
        deadline_ns = _deadline_ns(timeout)
        status = self._moving.wait_arrived(deadline_ns)
        self._watch.metrics.waited(time.monotonic_ns() - begin)
        if status == _STALE:
            # The slot was reused before we looked; its owner remembers how this one ended.
            left = max(0.1, (deadline_ns - time.monotonic_ns()) * 1e-9)
            answer = self.link.query(self.transfer_id, timeout=left)
            if answer is None:
                raise StaleTransfer(f"{self._name()}: the peer does not know how it ended")
            status = answer
        if status != _PENDING:
            self._watch.settle(self._watched, status)
        if status == _PENDING:
            hint = "; its receiver does so in Grant.wait" if self._watched.kind == "push" else ""
            raise TransferTimeout(f"{self._name()}: not confirmed after {timeout} s{hint}")
        if status != _OK:
            raise status_error(status, self._name(), self._moving.progress()["message"])

    def look(self, end: float) -> None:
        """For groups: as `wait_arrived` without waiting for the outcome; where it is not known here
        yet, the owner of the pages is asked, until `end` (time.monotonic)."""
        with contextlib.suppress(TransferTimeout):
            return self.wait_arrived(0.0)
        status = None
        if (left := end - time.monotonic()) > 0:
            with contextlib.suppress(TransferError):  # the link's end, not this transfer's
                status = self.link.query(self.transfer_id, timeout=left)
        if status in (None, _PENDING):
            raise TransferTimeout(f"{self._name()}: it has not ended")
        if status != _OK:
            raise status_error(status, self._name())

    def readiness(self, layer: int) -> _C.Readiness:
        """Of a pull: what `paged_attention(..., ready=)` waits for before it reads `layer` of the
        destination pool. What has landed is not verified before `wait_arrived`. Raises
        InvalidArgument for pushes (`Grant.readiness` tells their receiver) and for layers that
        this transfer does not move."""
        layer_map = self.plan.dst.layers
        layer = integer("layer", layer, 0, len(layer_map) - 1)
        for idx, (_, stored, _) in enumerate(self.plan.parts):
            if stored == layer_map[layer]:
                name = f"transfer {self.transfer_id.hex()}, layer {layer}"
                readiness: _C.Readiness = self._moving.readiness(idx, name)
                return readiness
        raise InvalidArgument(f"layer: {layer} is not moved by this transfer")

    def progress(self) -> Progress:
        """A snapshot: bytes, rows, seconds, times of each layer."""
        raw = self._moving.progress()
        parts = tuple(PartTimes(*times) for times in raw["parts"])
        return Progress(
            raw["status"], raw["source_reusable"], raw["num_bytes"], raw["num_rows"],
            raw["moving_ns"] * 1e-9, parts, raw["message"],
        )  # fmt: skip

    def leave(self) -> None:
        """In a forked child: see `forking`."""
        keep(self._moving, self._watched)
        self._moving = self._watched = PARENTS
        self._ends = True

    def __del__(self) -> None:
        if not self._ends:
            self.cancel()

    def __repr__(self) -> str:
        return f"<Transfer: {self._name()}>"

    def _will_end(self) -> None:
        """From now on its outcome is waited for, whether or not anybody holds this object."""
        if not self._ends:
            self._ends = True
            self._watch.metrics.watch(self._watched)

    def _name(self) -> str:
        return f"transfer {self.transfer_id.hex()} to {self.link.peer_name!r}"


def _deadline_ns(timeout: float) -> int:
    return int(wait_end(timeout) * 1e9)
