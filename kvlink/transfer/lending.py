"""Which pages of a pool are lent: to one grant each, or to any number of offers."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING

from kvlink import _C
from kvlink.errors import InvalidArgument
from kvlink.transfer.errors import PagesLent

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from kvlink.pool import KVPool
    from kvlink.transfer.region import Region
    from kvlink.transfer.reservation import Reservation
    from kvlink.transfer.slot_table import SlotTable

_GRANTED = -1
_pools: weakref.WeakKeyDictionary[KVPool, LentPages] = weakref.WeakKeyDictionary()
_pools_lock = threading.Lock()


class LentPages:
    """Of one pool, in this process. Thread-safe; O(pages named) a call."""

    def __init__(self, num_pages: int) -> None:
        self._num_pages = num_pages
        self._lock = threading.Lock()
        self._uses: npt.NDArray[np.int32] | None = None  # [num_pages] offers, or _GRANTED
        self._first_seen: npt.NDArray[np.int32]  # scratch of take

    def take(self, pages: npt.NDArray[np.int32], *, to_write: bool) -> int:
        """Lends `pages` (ids of the pool): to a grant, or to one more offer. -1, or a page that is
        lent otherwise; nothing is lent then. Raises InvalidArgument when one is named twice."""
        import numpy as np

        with self._lock:
            if self._uses is None:  # memory that comes to life where pages are lent
                self._uses = np.zeros(self._num_pages, np.int32)
                self._first_seen = np.zeros(self._num_pages, np.int32)
            order = np.arange(pages.size, dtype=np.int32)
            self._first_seen[pages] = order
            if not np.array_equal(self._first_seen[pages], order):
                raise InvalidArgument("pages: expected each page once")
            uses = self._uses[pages]
            taken = uses != 0 if to_write else uses == _GRANTED
            if taken.any():
                return int(pages[taken.argmax()])
            self._uses[pages] = _GRANTED if to_write else uses + 1
        return -1

    def give(self, pages: npt.NDArray[np.int32], *, to_write: bool) -> None:
        """Ends what one `take` began."""
        with self._lock:
            assert self._uses is not None
            self._uses[pages] = 0 if to_write else self._uses[pages] - 1

    def lent(self, pages: npt.NDArray[np.int32]) -> int:
        """A page among them that is lent, or -1."""
        if self._uses is None:
            return -1
        taken = self._uses[pages] != 0
        return int(pages[taken.argmax()]) if taken.any() else -1


def lent_pages(pool: KVPool) -> LentPages:
    """Those of a pool, whichever endpoints and regions lend them."""
    with _pools_lock:
        found = _pools.get(pool)
        if found is None:
            found = _pools[pool] = LentPages(pool.num_pages)
        return found


def take_pages(
    region: Region, pages: npt.NDArray[np.int32], kind: _C.SlotKind, table: SlotTable
) -> None:
    """Marks pages as lent to a new grant or offer; raises PagesLent, InvalidArgument."""
    to_write = kind == _C.SlotKind.GRANT
    if region.lent.take(pages, to_write=to_write) < 0:
        return
    for each in _lent_by(table, region):
        each.tidy()  # what has ended unnoticed is in nobody's way
    page = region.lent.take(pages, to_write=to_write)
    if page >= 0:
        raise PagesLent(f"{kind.name.lower()}: {_who_has(page, region, table)}")


def check_not_lent(region: Region, pages: npt.NDArray[np.int32], table: SlotTable) -> None:
    """This side is about to write into `pages`; raises PagesLent."""
    if region.lent.lent(pages) < 0:
        return
    for each in _lent_by(table, region):
        each.tidy()
    page = region.lent.lent(pages)
    if page >= 0:
        raise PagesLent(f"pull: {_who_has(page, region, table)}")


def _lent_by(table: SlotTable, region: Region) -> list[Reservation]:
    with table.lock:
        return [each for each in table.open.values() if each.region.lent is region.lent]


def _who_has(page: int, region: Region, table: SlotTable) -> str:
    who = "by another endpoint"
    for each in _lent_by(table, region):
        if page in each.pages:
            ended = each.status != _C.TransferStatus.PENDING
            who = f"by {each.kind.name.lower()} {each.transfer_id.hex()}"
            who += f", which ended as {each.status.name} and is not released yet" if ended else ""
    return f"page {page} of region {region.region_id} is lent {who}"
