"""`Offer`: the holder of KV lets peers pull or adopt it. `Lease`: a peer's pages, used in place."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from kvlink import _C
from kvlink.pool import KVPool
from kvlink.transfer.descriptor import Descriptor
from kvlink.transfer.errors import GrantExpired, LinkClosed, again, status_error
from kvlink.transfer.forking import WHY, keep
from kvlink.transfer.reservation import Reservation

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from kvlink.transfer.session import Session


class Offer(Reservation):
    """Pages with KV that peers may pull (`Link.pull`) or use in place (`Link.adopt`).

    The pages must not change while it is open. It ends when it was pulled `pulls` times, when its
    adopter releases it, by `revoke`, at its deadline, or when its adopter dies; the pages are the
    owner's alone again when `released` says so (`wait_released`, `on_release`).
    """

    kind = _C.SlotKind.OFFER


class Lease:
    """A peer's pages, used where they lie: nothing was copied. `Link.adopt` makes it.

    Attributes: `pool` (the peer's pool, mapped here), `pages` (int32, in token order, read-only),
    `num_tokens`, `transfer_id`. Write nothing. The pages return to their owner on `release` (or at
    the end of a with block), at the deadline, or when this process ends; whoever reads them near
    the deadline calls `check` afterwards and drops what it computed if that raises.
    """

    def __init__(
        self,
        session: Session,
        control: Any,
        key: Any,
        descriptor: Descriptor,
        pool: KVPool,
        pages: npt.NDArray[np.int32],
    ) -> None:
        self.pool = pool
        self.pages = pages
        self.num_tokens = descriptor.num_tokens
        self.transfer_id = descriptor.transfer_id
        self._session = session
        self._control = control
        self._key = key
        self._over = False
        self._lost: Exception | None = None

    @property
    def valid(self) -> bool:
        """The pages still hold what was offered."""
        if self._over or self._lost is not None or self._session.closed:
            return False
        if time.monotonic_ns() > self._control.deadline_ns(self._key):
            return False
        return bool(self._control.status(self._key) == _C.TransferStatus.PENDING)

    def check(self) -> None:
        """Raises GrantExpired, GrantRevoked, PeerLost or LinkClosed when the pages may hold
        something else by now."""
        if self._lost is not None:
            raise again(self._lost)
        if self._over:
            raise LinkClosed("the lease was released")
        if self._session.closed:
            closed = LinkClosed("the link to the owner of the pages is closed")
            raise again(self._session.gone or closed)
        if not self.valid:
            status = self._control.status(self._key)
            if status == _C.TransferStatus.PENDING:
                raise GrantExpired(f"lease of transfer {self.transfer_id.hex()}: past its deadline")
            raise status_error(status, f"lease of transfer {self.transfer_id.hex()}")

    def release(self) -> None:
        """Gives the pages back. Idempotent."""
        if not self._over:
            self._over = True
            self._session.path_link.release(self._key)
            self._session.drop_lease(self)

    def leave(self) -> None:
        """In a forked child: see `forking`."""
        keep(self._control)
        self._over, self._lost = True, LinkClosed(WHY)

    def end(self, why: Exception | None) -> None:
        """For `Link`: the link closed, or the owner is gone."""
        self._lost = self._lost or why
        self.release()

    def reap(self, now_ns: int) -> None:
        """Gives the pages back when the deadline has passed or the owner took them back."""
        status = self._control.status(self._key)
        if status != _C.TransferStatus.PENDING:
            self._lost = status_error(status, f"lease of transfer {self.transfer_id.hex()}")
        elif now_ns > self._control.deadline_ns(self._key):
            self._lost = GrantExpired(
                f"lease of transfer {self.transfer_id.hex()}: past its deadline"
            )
        if self._lost is not None:
            self.release()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()
