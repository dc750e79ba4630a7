"""`Grant`: the receiver's promise of pages. `Arrival`: the proof that they hold what was sent."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvlink import _C
from kvlink._arguments import integer, wait_end
from kvlink.transfer.errors import TransferTimeout
from kvlink.transfer.region import Region
from kvlink.transfer.reservation import Reservation
from kvlink.transfer.slot_table import SlotTable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_OK = _C.TransferStatus.OK
_PENDING = _C.TransferStatus.PENDING


@dataclass(frozen=True)
class Arrival:
    """KV that has arrived and was verified: generation, row count and digest held.

    `pages` (int32, in token order) now belong to the request; `rows` is how many rows (one KV head
    of one token in one plane of one layer) were counted; `digest_verified` is False only for grants
    made with `digest=False`; `waited_s` are seconds of the call that
    returned it; `verify_s` those spent on digests, most of them while later layers were on their
    way.
    """

    transfer_id: bytes
    region: Region
    pages: npt.NDArray[np.int32]
    num_tokens: int
    rows: int
    digest_verified: bool
    waited_s: float
    verify_s: float


class Grant(Reservation):
    """Pages that peers may write one request into, until a deadline. `Endpoint.grant` makes it.

    Exactly one of two things happens to the pages: `wait` or `poll` returns an Arrival and they
    belong to the request, or the grant fails and they return to the owner, once, as soon as no
    writer is inside (`released`, `wait_released`, `on_release`).
    """

    kind = _C.SlotKind.GRANT

    def __init__(self, table: SlotTable, region: Region, *args: Any, **kwargs: Any) -> None:
        super().__init__(table, region, *args, **kwargs)
        self._with_digest: bool = kwargs["with_digest"]
        self._arrival: Arrival | None = None
        self._readiness: dict[int, _C.Readiness] = {}  # by stored layer

    def wait(self, timeout: float) -> Arrival:
        """Waits until everything has arrived, verifies it, and commits.

        Layers are verified as they complete, here in the caller's thread, without the GIL. Raises
        TransferTimeout (the grant stays open), or the reason why it failed: DigestMismatch,
        GenerationMismatch, RowCountMismatch, GrantExpired, GrantRevoked, TransferCancelled,
        PeerLost, MoveFailed. A failed grant keeps failing in the same way; a committed one keeps
        returning its Arrival.
        """
        began = time.monotonic_ns()
        deadline_ns = int(wait_end(timeout) * 1e9)
        if self._arrival is not None:
            return self._arrival
        status = self._outcome or self._control.arrive(self.key, deadline_ns)
        if timeout > 0:
            self._table.watch.metrics.waited(time.monotonic_ns() - began)
        self.advance()
        status = self._outcome or status  # of whoever ended it first, perhaps another thread
        if status == _OK:
            descriptor = self.region.descriptor
            rows = descriptor.num_stored_layers * descriptor.rows_per_token * self.num_tokens
            self._arrival = self._arrival or Arrival(
                self.transfer_id, self.region, self.pages, self.num_tokens, rows,
                self._with_digest, (time.monotonic_ns() - began) * 1e-9, self._own.verify_ns * 1e-9,
            )  # fmt: skip
            return self._arrival
        if status == _PENDING:
            raise TransferTimeout(f"transfer {self.transfer_id.hex()}: not there after {timeout} s")
        raise self._failure(status)

    def poll(self) -> Arrival | None:
        """As `wait`, without waiting: None while something is still missing."""
        try:
            return self.wait(0.0)
        except TransferTimeout:
            return None

    def wait_layer(self, layer: int, timeout: float) -> None:
        """Until every row of `layer` (of the pool) has arrived. Not yet verified: whoever reads it
        now must drop what it computed if the grant then fails.

        Raises TransferTimeout, or why the grant failed.
        """
        stored, deadline_ns = self._stored_layer(layer), int(wait_end(timeout) * 1e9)
        if self._arrival is not None:
            return
        status = self._outcome or self._control.wait_layer(self.key, stored, deadline_ns)
        if status == _PENDING:
            raise TransferTimeout(f"layer {layer}: not there after {timeout} s")
        if status != _OK:
            self.advance()
            raise self._failure(status)

    def readiness(self, layer: int) -> _C.Readiness:
        """What `paged_attention(..., ready=)` waits for before it reads `layer` (of the pool): the
        same as `wait_layer`, inside the operator. The same object each time for a layer; it goes
        on to say what holds after the grant has ended."""
        stored = self._stored_layer(layer)
        with self._table.lock:
            if stored not in self._readiness:
                name = f"transfer {self.transfer_id.hex()}, layer {layer}"
                self._readiness[stored] = self._control.readiness(self.key, stored, name)
                if self._outcome is not None:
                    self._settle(self._outcome)
            return self._readiness[stored]

    def _stored_layer(self, layer: int) -> int:
        layer_map = self.region.descriptor.layer_map
        return layer_map[integer("layer", layer, 0, len(layer_map) - 1)]

    def _settle(self, status: _C.TransferStatus) -> None:
        if status == _OK:
            for readiness in self._readiness.values():
                readiness.settle()

    def _gives_back(self) -> bool:
        return self._outcome != _OK
