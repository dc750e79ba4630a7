"""What grants and offers have in common: pages lent under a deadline, and the slot that says so."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvlink import _C
from kvlink._arguments import flag, function, integer, number_of, optional, wait_end, wrong
from kvlink.transfer.descriptor import Descriptor
from kvlink.transfer.errors import TransferTimeout, status_error
from kvlink.transfer.forking import PARENTS, keep
from kvlink.transfer.lending import take_pages
from kvlink.transfer.region import Region, granted_ids
from kvlink.transfer.wire import TRANSFER_ID_BYTES

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from kvlink.transfer.slot_table import SlotTable

_GRANT = _C.SlotKind.GRANT
_QUIET_POLL = 0.002  # s


class Reservation:
    """Base of `Grant` and `Offer`.

    Attributes: `transfer_id` (16 random bytes), `region`, `pages` (int32 array), `num_tokens`.
    """

    kind: _C.SlotKind

    def __init__(
        self,
        table: SlotTable,
        region: Region,
        pages: Any,
        num_tokens: int,
        ttl: float,
        *,
        epoch: bytes,
        descriptor_key: bytes,
        with_digest: bool,
        num_pulls: int,
        on_release: Callable[[Any], None] | None,
    ) -> None:
        descriptor = region.descriptor
        deadline_ns = time.monotonic_ns() + _ttl_ns(ttl)
        num_tokens = integer("num_tokens", num_tokens, 1)
        flag("digest", with_digest)
        optional(function)("on_release", on_release)
        ids = granted_ids(pages, region.pool.num_pages, num_tokens, descriptor.layout.page_size)
        self.transfer_id = secrets.token_bytes(TRANSFER_ID_BYTES)
        self.region = region
        self.pages: npt.NDArray[np.int32] = ids
        self.num_tokens = num_tokens
        self._table = table
        self._control = table.control
        self._on_release = on_release
        self._outcome: _C.TransferStatus | None = None
        self._released = threading.Event()
        self._own = own = _C.OwnPages(
            region.pool.view, list(descriptor.stored_model_layers),
            descriptor.shard.kv_heads.start, ids, num_tokens, region.generations,
        )  # fmt: skip
        rows = descriptor.rows_per_token * num_tokens
        self._lent = ids.copy()  # `pages` may be changed by whoever reads it
        take_pages(region, ids, self.kind, table)
        try:
            with table.lock:
                slot, first_page = table.take_slot(ids.size)
                self._slot = (slot, first_page, ids.size)
                try:
                    self.key = self._control.open(
                        slot, self.kind, self.transfer_id, deadline_ns,
                        descriptor.num_stored_layers, rows, num_pulls, with_digest, first_page, own,
                    )  # fmt: skip
                except BaseException:
                    table.give_slot(*self._slot)
                    raise
                table.open[self.transfer_id] = self
        except BaseException:
            region.lent.give(ids, to_write=self.kind == _GRANT)
            raise
        self._bytes = Descriptor(
            self.kind, epoch, self.transfer_id, slot, self.key.generation, region.region_id,
            num_tokens, first_page, ids.size, deadline_ns,
        ).to_bytes(descriptor_key)  # fmt: skip
        table.watch.opened(self)

    def __repr__(self) -> str:
        outcome = "open" if self._outcome is None else self._outcome.name
        return (
            f"<{type(self).__name__} {self.transfer_id.hex()}: {self.num_tokens} tokens in "
            f"{self.pages.size} pages, {outcome}>"
        )

    def to_bytes(self) -> bytes:
        """What the peer needs. It may travel by any channel: altered bytes are refused."""
        return self._bytes

    @property
    def status(self) -> _C.TransferStatus:
        """How it stands (PENDING) or ended."""
        if self._outcome is not None:
            return self._outcome
        status = self._control.status(self.key)
        return self._outcome or status

    @property
    def released(self) -> bool:
        """It has ended and no peer is inside the pages any more."""
        return self._released.is_set()

    @property
    def deadline(self) -> float:
        """When it ends by itself, in seconds of time.monotonic()."""
        return float(self._control.deadline_ns(self.key)) * 1e-9

    def extend(self, ttl: float) -> bool:
        """Moves the deadline to `ttl` seconds from now; False when it has ended already."""
        return self._control.extend(self.key, time.monotonic_ns() + _ttl_ns(ttl))

    def revoke(self) -> bool:
        """Takes the pages back: no peer enters them from now on. Does not wait.

        False when it had ended already. `released` tells when the last peer that was inside has
        left: at once, except when one is being written or read at this moment.
        """
        revoked = self._control.close(self.key, _C.TransferStatus.REVOKED)
        self.advance()
        return bool(revoked)

    def wait_released(self, timeout: float) -> None:
        """Until it has ended and the pages are the owner's alone; another thread may be about to
        call `on_release`. Raises TransferTimeout."""
        end = wait_end(timeout)
        if not self._released.is_set():
            self._control.wait_closed(self.key, int(end * 1e9))
        while not self._released.is_set():
            self.advance()
            left = end - time.monotonic()
            if self._released.wait(max(0.0, min(_QUIET_POLL, left))):
                break
            if left <= 0:
                raise TransferTimeout(f"pages not released within {timeout} s; {self.status.name}")

    def advance(self) -> None:
        """Records the outcome, and gives the pages back once nobody is inside."""
        watch = self._table.watch
        with self._table.lock:
            if self._released.is_set():
                return
            status = self._control.status(self.key)
            if status == _C.TransferStatus.PENDING:
                return
            if self._outcome is None:
                self._outcome = status
                self._table.remember(self.transfer_id, status)
                self._settle(status)
                watch.ended(self, status, self._own.verify_ns)
            if not self._control.quiet(self.key):
                return
            del self._table.open[self.transfer_id]
            self._table.give_slot(*self._slot)
            self._control.forget(self.key)
            self.region.lent.give(self._lent, to_write=self.kind == _GRANT)
            self._released.set()
        watch.released(self)
        if self._on_release is not None and self._gives_back():
            self._on_release(self)

    def leave(self) -> None:
        """In a forked child: see `forking`."""
        keep(self._own)
        self._table = self._control = PARENTS

    def tidy(self) -> None:
        """As `advance`, unless somebody waits for `on_release` before the pages are used again."""
        if self._on_release is None:
            self.advance()

    def _gives_back(self) -> bool:
        """The pages return to the owner's pool, rather than to the request that arrived in them."""
        return True

    def _settle(self, status: _C.TransferStatus) -> None:
        """The outcome is known; called once, with the lock, while the slot is still ours."""

    def _failure(self, status: _C.TransferStatus) -> Exception:
        if status == _C.TransferStatus.STALE and self._outcome is not None:
            status = self._outcome
        return status_error(status, f"transfer {self.transfer_id.hex()}")


def _ttl_ns(ttl: float) -> int:
    seconds = number_of(ttl)
    if seconds is None or not 0 < seconds <= 7 * 24 * 3600:
        raise wrong("ttl", "seconds in (0, 604800]", ttl)
    return int(seconds * 1e9)
