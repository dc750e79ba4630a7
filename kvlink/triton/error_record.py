"""What only a kernel can see: it skips a bad page id or slot and leaves a record on the host.

The record lies in page-locked host memory, so nothing is waited for; a later call reports it.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from kvlink.errors import InvalidArgument, PageTableError

SLOTS = tl.constexpr(1)
SRC_PAGES = tl.constexpr(2)
DST_PAGES = tl.constexpr(3)
PAGE_TABLE = tl.constexpr(4)
POSITIONS = tl.constexpr(5)
PAGES = tl.constexpr(6)
_NAMES = {
    1: "slots", 2: "src_pages", 3: "dst_pages", 4: "page_table", 5: "rope.positions", 6: "pages",
}  # fmt: skip
_VALUES = ("slots", "rope.positions")  # the others are page ids

_EMPTY, _COMPLETE = 0, 2  # 1: a kernel is writing it


@functools.lru_cache(maxsize=1)
def record() -> torch.Tensor:
    """int64 [5]: state, argument, sequence (-1: none), index, value. One a process."""
    return torch.zeros(5, dtype=torch.int64, pin_memory=torch.cuda.is_available())


@triton.jit
def record_error(record, ARGUMENT: tl.constexpr, sequence, index, value):
    """Leaves the record, unless there is one already."""
    if tl.atomic_cas(record, tl.full((), 0, tl.int64), tl.full((), 1, tl.int64)) == 0:
        tl.store(record + 1, ARGUMENT)
        tl.store(record + 2, sequence)
        tl.store(record + 3, index)
        tl.store(record + 4, value)
        tl.debug_barrier()
        tl.atomic_xchg(record, tl.full((), 2, tl.int64), sem="release", scope="sys")


@triton.jit
def record_first(record, ARGUMENT: tl.constexpr, bad, token, value, num_rows):
    """Leaves the record of the first token that is bad, if one is."""
    if tl.max(bad.to(tl.int32), 0) != 0:
        first = tl.min(tl.where(bad, token, num_rows), 0)
        found = tl.max(tl.where(bad & (token == first), value, -(2**63)), 0)
        record_error(record, ARGUMENT, -1, first, found)


def report_errors() -> None:
    """Raises what a kernel has recorded, and forgets it.

    PageTableError; InvalidArgument for slots and positions.
    """
    seen = record()
    if int(seen[0]) != _COMPLETE:
        return
    _, argument, sequence, index, value = seen.tolist()
    seen[0] = _EMPTY
    place = f"[{index}]" if sequence < 0 else f": sequence {sequence}, index {index}"
    what = "the pool or table"
    if argument == PAGE_TABLE.value:
        what = "the pool, or is of another generation than expected,"
    text = (
        f"an earlier call: {_NAMES[argument]}{place} lies outside {what} and was skipped; "
        f"got {value}"
    )
    raise (InvalidArgument if _NAMES[argument] in _VALUES else PageTableError)(text)
