"""`SlotTable`: which slots an endpoint has, and what is open in them."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from typing import TYPE_CHECKING

from kvlink import _C
from kvlink._arguments import integer
from kvlink.transfer.errors import LinkClosed, LinkRefused, OutOfSlots

if TYPE_CHECKING:
    from kvlink.transfer.region import Region
    from kvlink.transfer.reservation import Reservation
    from kvlink.transfer.watching import EndpointWatch

_HISTORY = 4096  # outcomes remembered for queries


class SlotTable:
    """The owner's side of a control segment: free slots, room for page lists, what is open."""

    def __init__(self, num_slots: int, num_page_entries: int, watch: EndpointWatch) -> None:
        num_slots = integer("num_slots", num_slots, 1, 2**31 - 1)
        num_page_entries = integer("num_page_entries", num_page_entries, 1)
        self.control = _C.Control.create(num_slots, num_page_entries)
        self.watch = watch
        self.lock = threading.RLock()
        self.open: dict[bytes, Reservation] = {}  # by transfer id
        # Slots are used in turn, so that an outcome stays readable as long as possible.
        self._free = deque(range(num_slots))
        self._rooms: list[tuple[int, int]] = [(0, num_page_entries)]  # free (first, count), sorted
        self._outcomes: OrderedDict[bytes, _C.TransferStatus] = OrderedDict()
        self._free_bits = list(range(_C.MAX_LINKS - 1, -1, -1))
        self._closed = False

    def take_bit(self) -> int:
        """A link's bit in every slot; raises LinkRefused."""
        with self.lock:
            if not self._free_bits:
                raise LinkRefused(f"{_C.MAX_LINKS} links are open, as many as can be")
            return self._free_bits.pop()

    def free_bit(self, bit: int) -> None:
        """The link's peer touches nothing any more."""
        with self.lock:
            self._free_bits.append(bit)

    def take_slot(self, num_pages: int) -> tuple[int, int]:
        """(slot, first entry of its page list); raises OutOfSlots."""
        if self._closed:
            raise LinkClosed("the endpoint is closed")
        if not self._free:
            raise OutOfSlots(f"all {self.control.num_slots} slots hold open grants and offers")
        for idx, (first, count) in enumerate(self._rooms):
            if count >= num_pages:
                rest = (first + num_pages, count - num_pages)
                self._rooms[idx : idx + 1] = [rest] if rest[1] else []
                return self._free.popleft(), first
        raise OutOfSlots(f"no room for a list of {num_pages} pages beside those that are open")

    def give_slot(self, slot: int, first: int, num_pages: int) -> None:
        """Takes a slot and its page list back."""
        self._free.append(slot)
        rooms = sorted([*self._rooms, (first, num_pages)])
        merged = rooms[:1]
        for start, count in rooms[1:]:
            last = merged[-1]
            if last[0] + last[1] == start:
                merged[-1] = (last[0], last[1] + count)
            else:
                merged.append((start, count))
        self._rooms = merged

    def remember(self, transfer_id: bytes, status: _C.TransferStatus) -> None:
        """Keeps an outcome for queries."""
        self._outcomes[transfer_id] = status
        while len(self._outcomes) > _HISTORY:
            self._outcomes.popitem(last=False)

    def status(self, transfer_id: bytes) -> _C.TransferStatus | None:
        """How a transfer stands or ended; None when it is not (or no longer) known."""
        with self.lock:
            reservation = self.open.get(transfer_id)
            if reservation is not None:
                return reservation.status
            return self._outcomes.get(transfer_id)

    def reap(self) -> None:
        """Ends what is past its deadline, and gives back what nobody is inside of any more."""
        now = time.monotonic_ns()
        with self.lock:
            reservations = list(self.open.values())
        for reservation in reservations:
            self.control.expire(reservation.key, now)
            reservation.advance()

    def revoke(self, region: Region) -> list[Reservation]:
        """Takes back what is lent of a region; gives what was open."""
        with self.lock:
            lent = [each for each in self.open.values() if each.region is region]
        for reservation in lent:
            reservation.revoke()
        return lent

    def leave(self) -> None:
        """In a forked child: see `forking`."""
        for reservation in self.open.values():
            reservation.leave()

    def shut(self) -> None:
        """Revokes everything and opens nothing more."""
        with self.lock:
            self._closed = True
            reservations = list(self.open.values())
        for reservation in reservations:
            reservation.revoke()
