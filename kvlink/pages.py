"""`PageAllocator`: which pages of a pool are in use, by how many sequences, since when."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvlink._arguments import integer, positive, wrong
from kvlink.errors import DoubleFree, ForeignPage, InvalidArgument, NotAllocated, OutOfPages

Int32Array = npt.NDArray[np.int32]
PageIds = Sequence[int] | npt.NDArray[Any]


class WritablePages(NamedTuple):
    """What `PageAllocator.prepare_write` returns; all int32.

    `pages`: the sequence's page list from now on. `src`, `dst`: copy page `src[i]` to `dst[i]`
    (`kvlink.copy_pages(pool, src, dst)`) before anything is written or allocated.
    """

    pages: Int32Array
    src: Int32Array
    dst: Int32Array


class PageAllocator:
    """Hands out the page ids [0, num_pages) of a pool and counts who holds them.

    Every call costs O(1) per page it names and either succeeds or raises and changes nothing.
    Order is deterministic: a fresh allocator gives 0, 1, 2, ...; after that the pages freed last
    are given first, in the order in which they were freed. Safe to use from several threads.

    Attributes: `num_pages`, `page_size` (tokens in a page).
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        num_pages, page_size = positive(num_pages=num_pages, page_size=page_size)
        self.num_pages = num_pages
        self.page_size = page_size
        self._lock = threading.Lock()
        self._free = np.arange(num_pages - 1, -1, -1, dtype=np.int32)  # a stack; top at _num_free
        self._num_free = self.num_pages
        self._refcounts = np.zeros(num_pages, np.int32)
        self._generations = np.ones(num_pages, np.uint32)
        self._first_seen = np.empty(num_pages, np.int64)  # scratch of _release

    @property
    def num_free(self) -> int:
        """Pages that `allocate` could still give."""
        return self._num_free

    @property
    def generations(self) -> npt.NDArray[np.uint32]:
        """A number per page, uint32 [num_pages]: a live, read-only view, no copy.

        It changes when the page's last reference is dropped, so whoever remembers
        `generations[pages]` can tell later whether the pages still hold what they held.
        """
        view = self._generations.view()
        view.flags.writeable = False
        return view

    def allocate(self, num_pages: int) -> Int32Array:
        """Takes `num_pages` free pages, each with one reference; int32 [num_pages].

        Raises OutOfPages (nothing is taken), InvalidArgument.
        """
        num_pages = integer("num_pages", num_pages, 0)
        with self._lock:
            return self._take(num_pages)

    def free(self, pages: PageIds) -> None:
        """Drops one reference per entry; a page without references is free again.

        A page may stand in `pages` as often as it has references. Raises DoubleFree, ForeignPage.
        """
        ids = self._ids(pages)
        with self._lock:
            np.subtract.at(self._refcounts, ids, 1)
            below = self._refcounts[ids] < 0
            if below.any():
                np.add.at(self._refcounts, ids, 1)
                page = int(ids[below.argmax()])
                raise DoubleFree(
                    f"page {page}: freed {int((ids == page).sum())} time(s) in this call, but has "
                    f"{int(self._refcounts[page])} reference(s)"
                )
            self._release(ids)

    def retain(self, pages: PageIds) -> None:
        """Adds one reference per entry. Raises NotAllocated (a page is free), ForeignPage."""
        ids = self._ids(pages)
        with self._lock:
            self._check_allocated(ids)
            np.add.at(self._refcounts, ids, 1)

    def refcount(self, pages: PageIds) -> Int32Array:
        """References per page (0: free); int32 [len(pages)]. Raises ForeignPage."""
        ids = self._ids(pages)
        with self._lock:
            return self._refcounts[ids]

    def fork(self, pages: PageIds, num_tokens: int) -> Int32Array:
        """The page list of a new sequence that begins with the first `num_tokens` of another one.

        Nothing is copied: the pages that hold these tokens gain a reference. Before either sequence
        writes, `prepare_write` gives the writer a copy of a page that is still shared.
        Raises InvalidArgument (`pages` hold fewer tokens), NotAllocated, ForeignPage.
        """
        ids = self._ids(pages)
        capacity = len(ids) * self.page_size
        if not 0 <= (tokens := integer("num_tokens", num_tokens)) <= capacity:
            expected = f"0 to {capacity}, the room in {len(ids)} pages"
            raise wrong("num_tokens", expected, num_tokens)
        shared = ids[: -(-tokens // self.page_size)].astype(np.int32)
        self.retain(shared)
        return shared

    def prepare_write(self, pages: PageIds, start: int, stop: int) -> WritablePages:
        """Makes room for a sequence to write its token positions [start, stop).

        `pages` is the sequence's page list. Pages that would be written but are shared are replaced
        by fresh ones (the sequence's reference moves along), and pages are added up to position
        `stop`. The caller copies `src` to `dst` at once: a holder of `src` may write to it later.
        `start` is at most the room in `pages`, so no position is left out.
        Raises OutOfPages, InvalidArgument, NotAllocated, ForeignPage.
        """
        ids = self._ids(pages)
        size = self.page_size
        capacity = len(ids) * size
        start, stop = integer("start", start), integer("stop", stop)
        if not 0 <= start <= stop or start > capacity:
            raise InvalidArgument(
                f"start, stop: expected 0 <= start <= stop and start <= {capacity}, the room in "
                f"{len(ids)} pages; got {start}, {stop}"
            )
        first = start // size
        end = -(-stop // size) if stop > start else first
        if end - len(ids) > self.num_pages:
            raise OutOfPages(f"asked for {end - len(ids)} pages; the pool has {self.num_pages}")
        result = np.empty(max(len(ids), end), np.int32)
        result[: len(ids)] = ids
        with self._lock:
            self._check_allocated(ids)
            shared = first + np.flatnonzero(self._refcounts[ids[first:end]] > 1)
            src = result[shared]
            if len(np.unique(src)) != len(src):
                raise InvalidArgument(f"pages: expected each page once; got {ids[shared].tolist()}")
            fresh = self._take(len(shared) + len(result) - len(ids))
            dst, result[len(ids) :] = fresh[: len(shared)], fresh[len(shared) :]
            result[shared] = dst
            self._refcounts[src] -= 1
        # A page that is overwritten from end to end needs no copy.
        partial = (shared * size < start) | ((shared + 1) * size > stop)
        return WritablePages(result, src[partial], dst[partial])

    def slots(self, pages: PageIds, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Slots (page * page_size + slot in the page) of token positions [start, stop); int64."""
        ids = self._ids(pages)
        start, stop = integer("start", start), integer("stop", stop)
        if not 0 <= start <= stop <= len(ids) * self.page_size:
            raise InvalidArgument(
                f"start, stop: expected 0 <= start <= stop <= {len(ids) * self.page_size}, the "
                f"room in {len(ids)} pages; got {start}, {stop}"
            )
        positions = np.arange(start, stop, dtype=np.int64)
        return ids[positions // self.page_size] * self.page_size + positions % self.page_size

    def _ids(self, pages: PageIds) -> npt.NDArray[np.int64]:
        try:
            ids = np.asarray(pages)
        except (TypeError, ValueError, RuntimeError):  # lists of different lengths, ...
            raise wrong("pages", "a flat list of integers", pages) from None
        if ids.ndim == 1 and ids.size == 0:
            return np.empty(0, np.int64)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise wrong("pages", "a flat list of integers", pages)
        foreign = (ids < 0) | (ids >= self.num_pages)
        if foreign.any():
            index = int(foreign.argmax())
            raise ForeignPage(
                f"pages[{index}]: expected 0 to {self.num_pages - 1}; got {int(ids[index])}"
            )
        return ids.astype(np.int64)

    def _check_allocated(self, ids: npt.NDArray[np.int64]) -> None:
        free = self._refcounts[ids] == 0
        if free.any():
            raise NotAllocated(f"page {int(ids[free.argmax()])} is free")

    def _take(self, num_pages: int) -> Int32Array:
        if num_pages > self._num_free:
            raise OutOfPages(f"asked for {num_pages} pages; {self._num_free} are free")
        left = self._num_free - num_pages
        taken = self._free[left : self._num_free][::-1].copy()
        self._num_free = left
        self._refcounts[taken] = 1
        return taken

    def _release(self, ids: npt.NDArray[np.int64]) -> None:
        """Puts those of `ids` that have no reference left onto the stack, each once."""
        ids = ids[self._refcounts[ids] == 0]
        order = np.arange(len(ids))
        self._first_seen[ids[::-1]] = order[::-1]  # of equal indices the last assignment stays
        ids = ids[self._first_seen[ids] == order]
        self._generations[ids] += np.uint32(1)
        self._free[self._num_free : self._num_free + len(ids)] = ids[::-1]
        self._num_free += len(ids)
