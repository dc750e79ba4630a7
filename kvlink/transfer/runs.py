"""Contiguous pieces of memory: how many copies a move of rows takes, and how long each is.

A run is contiguous on every side it is asked for. Everything is in bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from kvlink._planes import Plane
from kvlink.layout import KVLayout

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Offsets = npt.NDArray[np.int64]

_SCALE_BYTES = 4


class Rows(NamedTuple):
    """One plane as an array of rows; K and V of a page are one where `num_planes` is 2.

    `name` is the plane's (k, v, k_scale, v_scale). Strides in bytes, of (page, plane, slot, head,
    element).
    """

    name: str
    num_planes: int
    row_elements: int
    element_bytes: int
    strides: tuple[int, int, int, int, int]


def rows_of(layout: KVLayout, *, with_scales: bool, joined: bool) -> list[Rows]:
    """The planes of a layer. `joined`: K and V as one array, where they have the same rows and the
    same strides."""
    k, v, size = layout.k, layout.v, layout.element_bytes
    planes = []
    if not layout.has_v_plane:
        planes.append(_rows("k", 1, layout.head_dim, size, k, 0))
    elif layout.form == "packed" and joined:
        row = layout.head_dim + layout.head_dim_v
        planes.append(_rows("k", 1, row, size, k, 0))
    elif joined:
        planes.append(_rows("k", 2, layout.head_dim, size, k, v.offset_bytes - k.offset_bytes))
    else:
        planes.append(_rows("k", 1, layout.head_dim, size, k, 0))
        planes.append(_rows("v", 1, layout.head_dim_v, size, v, 0))
    if with_scales:
        planes.append(_rows("k_scale", 1, 1, _SCALE_BYTES, layout.k_scale, 0))
        if layout.has_v_plane:
            planes.append(_rows("v_scale", 1, 1, _SCALE_BYTES, layout.v_scale, 0))
    return planes


def can_join(layout: KVLayout) -> bool:
    """K and V lie in one allocation, and may be taken as one array."""
    gap = layout.v.offset_bytes - layout.k.offset_bytes
    if layout.form == "packed":
        return gap == layout.head_dim * layout.element_bytes and layout.k.stride_dim == 1
    alike = (layout.head_dim, *_strides(layout.k)) == (layout.head_dim_v, *_strides(layout.v))
    return layout.form == "separate" and gap != 0 and alike


def box_lengths(num_tokens: int, page_sizes: Sequence[int]) -> Offsets:
    """int64 tokens of each stretch in which no side changes its page, in token order."""
    import numpy as np

    cuts = [np.arange(0, num_tokens, size) for size in page_sizes]
    firsts = np.unique(np.concatenate(cuts))
    lengths: Offsets = np.diff(firsts, append=num_tokens)
    return lengths


class Pieces(NamedTuple):
    """How a box falls into runs: the bytes of each, and the axes that count them."""

    run_bytes: int
    outer: tuple[tuple[int, tuple[int, ...]], ...]  # (count, stride on each side)

    @property
    def num_runs(self) -> int:
        """Runs of one box."""
        count = 1
        for size, _ in self.outer:
            count *= size
        return count


def pieces(sides: Sequence[Rows], num_tokens: int, num_heads: int) -> Pieces:
    """The runs of one box that are contiguous on every side."""
    first = sides[0]
    counts = (first.num_planes, num_tokens, num_heads, first.row_elements)
    strides = [tuple(side.strides[axis] for side in sides) for axis in range(1, 5)]
    axes = [(count, steps) for count, steps in zip(counts, strides, strict=True) if count > 1]
    run = first.element_bytes
    while True:
        inner = next((axis for axis in axes if set(axis[1]) == {run}), None)
        if inner is None:
            return Pieces(run, tuple(axes))
        axes.remove(inner)
        run *= inner[0]


def run_offsets(
    sides: Sequence[Rows],
    pages: Sequence[Any],
    page_sizes: Sequence[int],
    first_heads: Sequence[int],
    num_heads: int,
    num_tokens: int,
) -> Offsets:
    """int64 [runs, sides + 1]: where each run begins on each side, from the plane's first element,
    and its bytes. In the order of the first side's addresses; neighbours are one run."""
    import numpy as np

    boxes = box_lengths(num_tokens, page_sizes)
    tokens = np.cumsum(boxes) - boxes
    found = []
    for length in np.unique(boxes):
        at = tokens[boxes == length]
        run, outer = pieces(sides, int(length), num_heads)
        columns = []
        for idx, side in enumerate(sides):
            ids = np.asarray(pages[idx], np.int64)[at // page_sizes[idx]]
            begin = ids * side.strides[0] + at % page_sizes[idx] * side.strides[2]
            begin += first_heads[idx] * side.strides[3]
            for count, steps in outer:
                begin = (begin[:, None] + np.arange(count) * steps[idx]).reshape(-1)
            columns.append(begin)
        found.append(np.stack([*columns, np.full(len(columns[0]), run)], axis=1))
    runs: Offsets = np.concatenate(found).astype(np.int64)
    runs = runs[np.argsort(runs[:, 0], kind="stable")]
    ends = runs[:-1, :-1] + runs[:-1, -1:]
    starts = np.concatenate([[True], (runs[1:, :-1] != ends).any(axis=1)])
    merged: Offsets = runs[starts]
    merged[:, -1] = np.add.reduceat(runs[:, -1], np.flatnonzero(starts))
    return merged


def longest(layout: KVLayout, num_tokens: int, num_heads: int) -> int:
    """Bytes of the longest run of K or V in a page, on one side."""
    tokens = min(num_tokens, layout.page_size)
    sides = rows_of(layout, with_scales=False, joined=can_join(layout))
    return max(pieces([side], tokens, num_heads).run_bytes for side in sides)


def paired(src: KVLayout, dst: KVLayout) -> list[tuple[Rows, Rows]]:
    """The planes of two layouts whose rows hold the same bytes."""
    joined = can_join(src) and can_join(dst) and (src.form == "packed") == (dst.form == "packed")
    sides = (
        rows_of(layout, with_scales=layout.scale == "token_head", joined=joined)
        for layout in (src, dst)
    )
    return list(zip(*sides, strict=True))


def _strides(plane: Plane) -> tuple[int, int, int, int]:
    return plane.stride_page, plane.stride_slot, plane.stride_head, plane.stride_dim


def _rows(name: str, num_planes: int, row: int, size: int, plane: Plane, plane_stride: int) -> Rows:
    page, slot, head, dim = (stride * size for stride in _strides(plane))
    return Rows(name, num_planes, row, size, (page, plane_stride, slot, head, dim))
