"""Which part of one pool goes to which part of another: layers and KV heads that both hold."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from kvlink._arguments import integer
from kvlink.errors import InvalidArgument
from kvlink.layout import KVLayout, Shard
from kvlink.transfer import runs
from kvlink.transfer.errors import Unconvertible
from kvlink.transfer.region import RegionDescriptor, check_shard, lowest_layers, page_ids

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_MAX_PLANS = 1024  # kept, for all links of the process
_FAMILIES = {"separate": "KV", "packed": "KV"}


class PoolShape(NamedTuple):
    """What a plan needs to know of a pool: no memory, no endpoint.

    `layer_map` as in `KVPool`: the stored layer behind each layer of the shard; by default each
    has memory of its own.
    """

    layout: KVLayout
    shard: Shard
    layer_map: tuple[int, ...] | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        """The layer map, filled in."""
        return tuple(range(len(self.shard.layers))) if self.layer_map is None else self.layer_map


@dataclass(frozen=True)
class PlanSummary:
    """What a plan moves for a number of tokens, and in what pieces.

    `rows`: one KV head of one token in one plane of one layer each. `src_bytes`, `dst_bytes`: read
    and written, scales per row included. `src_run_bytes`, `dst_run_bytes`: the longest piece of a
    page that is contiguous on that side. `run_bytes`, `num_runs`: the same for pieces contiguous
    on both sides, and how many such there are in all layers; where page ids were given, pages that
    follow each other are one piece; both 0 when values are converted. `verbatim`: stored bytes are
    copied (True) or converted (False); None when that depends on the static scales being equal.
    """

    num_tokens: int
    num_parts: int
    num_heads: int
    rows: int
    src_bytes: int
    dst_bytes: int
    src_run_bytes: int
    dst_run_bytes: int
    run_bytes: int
    num_runs: int
    verbatim: bool | None


@dataclass(frozen=True)
class TransferPlan:
    """The cut of two pools. Depends on layouts and shards only, so one serves every request.

    `parts`: (stored source layer, stored destination layer, model layer) for each stored
    destination layer that this source sends, each moved once. `heads`: (count, first in the source
    pool, first in the destination pool, first in the model). `parts_of_layer[i]`: the parts that
    are complete when layer i of the source pool is.
    """

    src: PoolShape
    dst: PoolShape
    parts: tuple[tuple[int, int, int], ...]
    heads: tuple[int, int, int, int]
    parts_of_layer: tuple[tuple[int, ...], ...]

    @classmethod
    def build(
        cls,
        src: PoolShape | RegionDescriptor | tuple[Any, ...],
        dst: PoolShape | RegionDescriptor | tuple[Any, ...],
    ) -> TransferPlan:
        """The plan from one pool to another, each given as `(layout, shard)`, `(layout, shard,
        layer_map)` or a registered region's descriptor.

        Moved are the layers and KV heads that both hold, each stored destination layer as the
        lowest model layer behind it. Of these, replica idx of count at the source sends every
        count-th. A rank whose share is empty has a plan without parts. O(layers); equal pairs
        share one plan. Raises Unconvertible with the reason, InvalidArgument when a shard does not
        fit its layout.
        """
        src, dst = _shape("src", src), _shape("dst", dst)
        # As a destination, one replica is like the others.
        return _compile(src, dst._replace(shard=Shard(dst.shard.layers, dst.shard.kv_heads)))

    @property
    def verbatim(self) -> bool | None:
        """Stored bytes are copied (True), or converted (False); None: copied if the static scales
        of both pools are equal."""
        src, dst = self.src.layout, self.dst.layout
        per_row = [layout.scale == "token_head" for layout in (src, dst)]
        if src.dtype != dst.dtype or per_row[0] != per_row[1]:
            return False
        return True if per_row[0] or not (src.has_scales or dst.has_scales) else None

    def describe(
        self, num_tokens: int, src_pages: Any = None, dst_pages: Any = None
    ) -> PlanSummary:
        """What moving `num_tokens` tokens takes. O(pages). With the page ids of both sides, pieces
        are counted over page boundaries. Raises InvalidArgument."""
        num_tokens = integer("num_tokens", num_tokens, 1)
        src, dst, num_heads = self.src.layout, self.dst.layout, self.heads[0]
        rows_per_plane = len(self.parts) * num_heads * num_tokens
        run_bytes = num_runs = 0
        if self.verbatim is False or not self.parts:
            pass
        elif src_pages is None and dst_pages is None:
            boxes = runs.box_lengths(num_tokens, (src.page_size, dst.page_size))
            lengths, counts = _unique(boxes)
            for sides in runs.paired(src, dst):
                for length, count in zip(lengths, counts, strict=True):
                    cut = runs.pieces(sides, length, num_heads)
                    run_bytes = max(run_bytes, cut.run_bytes)
                    num_runs += count * cut.num_runs
        else:
            for copies in self.runs(src_pages, dst_pages, num_tokens).values():
                run_bytes = max(run_bytes, int(copies[:, 2].max()))
                num_runs += len(copies)
        return PlanSummary(
            num_tokens, len(self.parts), num_heads,
            rows_per_plane * (2 if dst.has_v_plane else 1),
            rows_per_plane * src.token_bytes() // src.num_kv_heads,
            rows_per_plane * dst.token_bytes() // dst.num_kv_heads,
            runs.longest(src, num_tokens, num_heads), runs.longest(dst, num_tokens, num_heads),
            run_bytes, num_runs * len(self.parts), self.verbatim,
        )  # fmt: skip

    def runs(
        self, src_pages: Any, dst_pages: Any, num_tokens: int
    ) -> dict[str, npt.NDArray[np.int64]]:
        """The copies that move one part, the same for every part. O(pages).

        By plane ("k", "v", "k_scale", "v_scale"; K and V of one allocation are both in "k"): int64
        [copies, 3] of source offset, destination offset (each from the plane's first element) and
        bytes. Runs that follow each other on both sides are one. Raises InvalidArgument, and
        Unconvertible where values are not copied but converted.
        """
        num_tokens = integer("num_tokens", num_tokens, 1)
        if self.verbatim is False:
            raise Unconvertible("plan: the values are converted, not copied; there are no runs")
        ids, sizes = [], []
        for name, shape, pages in (("src", self.src, src_pages), ("dst", self.dst, dst_pages)):
            sizes.append(shape.layout.page_size)
            ids.append(page_ids(pages, 2**31 - 1, f"{name}_pages"))
            if ids[-1].size * sizes[-1] < num_tokens:
                raise InvalidArgument(
                    f"{name}_pages: expected at least {-(-num_tokens // sizes[-1])} for "
                    f"{num_tokens} tokens; got {ids[-1].size}"
                )
        return {
            sides[0].name: runs.run_offsets(
                sides, ids, sizes, self.heads[1:3], self.heads[0], num_tokens
            )
            for sides in runs.paired(self.src.layout, self.dst.layout)
        }


def _shape(name: str, given: Any) -> PoolShape:
    if isinstance(given, RegionDescriptor):
        return PoolShape(given.layout, given.shard, given.layer_map)
    try:
        shape = PoolShape(*given)
    except TypeError:
        raise InvalidArgument(f"{name}: expected (layout, shard); got {given!r}") from None
    if not isinstance(shape.layout, KVLayout) or not isinstance(shape.shard, Shard):
        raise InvalidArgument(f"{name}: expected (layout, shard); got {given!r}")
    shape = shape._replace(layer_map=tuple(shape.layers))
    check_shard(shape.layout, shape.shard, shape.layers)
    return shape


@functools.lru_cache(maxsize=_MAX_PLANS)
def _compile(src: PoolShape, dst: PoolShape) -> TransferPlan:
    _check_layouts(src.layout, dst.layout)
    src_heads, dst_heads = src.shard.kv_heads, dst.shard.kv_heads
    first, last = max(src_heads.start, dst_heads.start), min(src_heads.stop, dst_heads.stop)
    if first >= last:
        raise Unconvertible(f"shards: {src_heads} and {dst_heads} have no KV head in common")
    stored_of = dict(zip(src.shard.layers, src.layers, strict=True))
    common = [
        (stored_of[model_layer], dst_layer, model_layer)
        for dst_layer, model_layer in enumerate(lowest_layers(dst.shard, dst.layers))
        if model_layer in stored_of
    ]
    if not stored_of.keys() & set(dst.shard.layers):
        raise Unconvertible("shards: no layer of the destination is held by the source")
    _check_sharing(dst, stored_of, {part[1] for part in common})
    replica, num_replicas = src.shard.replica
    parts = tuple(common[replica::num_replicas])
    parts_of_stored: dict[int, tuple[int, ...]] = {}
    for idx, part in enumerate(parts):
        parts_of_stored[part[0]] = (*parts_of_stored.get(part[0], ()), idx)
    heads = (last - first, first - src_heads.start, first - dst_heads.start, first)
    parts_of_layer = tuple(parts_of_stored.get(stored, ()) for stored in src.layers)
    return TransferPlan(src, dst, parts, heads, parts_of_layer)


def _check_layouts(a: KVLayout, b: KVLayout) -> None:
    if _FAMILIES.get(a.form, a.form) != _FAMILIES.get(b.form, b.form):
        raise Unconvertible(f"layouts: {a.form} pages do not convert to {b.form} pages")
    if (a.head_dim, a.head_dim_v) != (b.head_dim, b.head_dim_v):
        raise Unconvertible(
            f"layouts: head_dim/head_dim_v differ: {a.head_dim}/{a.head_dim_v} and "
            f"{b.head_dim}/{b.head_dim_v}"
        )
    if a.form == "opaque" and (a.dtype, a.page_size) != (b.dtype, b.page_size):
        raise Unconvertible(
            f"layouts: opaque pages are moved whole, but hold {a.dtype} and {b.dtype}"
        )


def _check_sharing(dst: PoolShape, stored_of: dict[int, int], moved: set[int]) -> None:
    """Model layers that share memory at the destination must share it at the source."""
    members: dict[int, list[int]] = {}  # stored destination layer -> model layers of the source
    for layer, stored in zip(dst.shard.layers, dst.layers, strict=True):
        if layer in stored_of and stored in moved:
            members.setdefault(stored, []).append(layer)
    for layers in members.values():
        if len({stored_of[layer] for layer in layers}) > 1:
            raise Unconvertible(
                f"shards: model layers {layers} share memory at the destination, but not at the "
                "source"
            )


def _unique(values: Any) -> tuple[list[int], list[int]]:
    import numpy as np

    found, counts = np.unique(values, return_counts=True)
    return found.tolist(), counts.tolist()
