"""Registered pools: `Region` is the local handle, `RegionDescriptor` what a peer knows of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvlink import _C
from kvlink._arguments import wrong
from kvlink.errors import InvalidArgument
from kvlink.layout import KVLayout, Shard
from kvlink.pool import KVPool
from kvlink.transfer.errors import ProtocolError
from kvlink.transfer.lending import lent_pages
from kvlink.transfer.wire import RegionFrame

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True)
class RegionDescriptor:
    """Enough to address every byte of a registered pool from the other end of a link.

    `layer_map[i]` is the stored layer behind layer i of the pool, which is layer `shard.layers[i]`
    of the model. `shared`: a peer on this host can map it.
    """

    region_id: int
    layout: KVLayout
    shard: Shard
    layer_map: tuple[int, ...]
    num_pages: int
    shared: bool

    @property
    def num_stored_layers(self) -> int:
        """Layers with memory of their own."""
        return max(self.layer_map) + 1

    @property
    def stored_model_layers(self) -> tuple[int, ...]:
        """The model layer as which each stored layer travels: the lowest one that it backs."""
        return lowest_layers(self.shard, self.layer_map)

    @property
    def rows_per_token(self) -> int:
        """Rows of one token in one stored layer: one per KV head and plane."""
        return self.layout.num_kv_heads * (2 if self.layout.has_v_plane else 1)

    def to_frame(self, blob: bytes = b"") -> RegionFrame:
        """As it goes over the wire; `blob` is what a path has to tell of it."""
        return RegionFrame(
            self.region_id, self.shared, self.num_pages, self.shard.kv_heads.start,
            len(self.shard.kv_heads), *self.shard.replica, self.shard.layers, self.layer_map,
            self.layout.to_bytes(), blob,
        )  # fmt: skip

    @classmethod
    def from_frame(cls, frame: RegionFrame) -> RegionDescriptor:
        """Inverse of `to_frame`; raises ProtocolError on anything a pool cannot be."""
        try:
            layout = KVLayout.from_bytes(frame.layout)
            if not 1 <= frame.num_pages < 2**31 or frame.first_head + frame.num_heads > 2**20:
                raise InvalidArgument(f"{frame.num_pages} pages or {frame.num_heads} heads")
            heads = range(frame.first_head, frame.first_head + frame.num_heads)
            shard = Shard(frame.layers, heads, (frame.replica_idx, frame.num_replicas))
            descriptor = cls(
                frame.region_id, layout, shard, frame.layer_map, frame.num_pages, frame.shared
            )
            descriptor.check()
        except InvalidArgument as error:
            raise ProtocolError(f"region {frame.region_id}: {error}") from error
        return descriptor

    def check(self) -> None:
        """Raises InvalidArgument when shard, layout and layer map do not fit each other."""
        check_shard(self.layout, self.shard, self.layer_map)


class Region:
    """A pool registered with an endpoint; make one with `Endpoint.register`.

    Attributes: `pool`, `descriptor`, `generations` (uint32 [num_pages], live).
    """

    def __init__(self, pool: KVPool, descriptor: RegionDescriptor, generations: Any) -> None:
        import numpy as np

        self.pool = pool
        self.descriptor = descriptor
        self.lent = lent_pages(pool)
        self._own_generations = generations is None
        if generations is None:
            generations = np.zeros(pool.num_pages, np.uint32)
        if (
            not isinstance(generations, np.ndarray)
            or generations.dtype != np.uint32
            or generations.shape != (pool.num_pages,)
            or not generations.flags.c_contiguous
        ):
            raise InvalidArgument(
                f"generations: expected a contiguous uint32 numpy array of {pool.num_pages} "
                f"entries; got {generations!r}"
            )
        self.generations: npt.NDArray[np.uint32] = generations

    @property
    def region_id(self) -> int:
        """Number of the region within its endpoint."""
        return self.descriptor.region_id

    def bump_generations(self, pages: Sequence[int]) -> None:
        """Tells that these pages now hold something else: grants of them cannot commit any more.

        For pools without a `PageAllocator`, whose generations change by themselves.
        """
        import numpy as np

        if not self._own_generations:
            raise InvalidArgument("generations: they belong to whoever passed them to register")
        np.add.at(self.generations, page_ids(pages, self.pool.num_pages), 1)


def lowest_layers(shard: Shard, layer_map: Sequence[int]) -> tuple[int, ...]:
    """The lowest model layer behind each stored layer: the one as which it travels."""
    names = [-1] * (max(layer_map) + 1)
    for model_layer, stored in zip(shard.layers, layer_map, strict=True):
        if names[stored] < 0 or model_layer < names[stored]:
            names[stored] = model_layer
    return tuple(names)


def check_shard(layout: KVLayout, shard: Shard, layer_map: Sequence[int]) -> None:
    """Raises InvalidArgument when the three do not fit each other."""
    if len(shard.kv_heads) != layout.num_kv_heads:
        raise InvalidArgument(
            f"shard: expected {layout.num_kv_heads} KV heads, as the layout has; "
            f"got {len(shard.kv_heads)}"
        )
    if len(shard.layers) != len(layer_map):
        raise InvalidArgument(
            f"shard: expected {len(layer_map)} layers, as the pool has; got {len(shard.layers)}"
        )
    if min(layer_map) < 0 or max(layer_map) + 1 != len(set(layer_map)):
        raise InvalidArgument("layer_map: expected stored layers 0 to n-1, each used")


def page_ids(pages: Any, num_pages: int, name: str = "pages") -> npt.NDArray[np.int32]:
    """Page ids as a contiguous int32 array of their own, each in [0, num_pages)."""
    checked: npt.NDArray[np.int32] | None = _C.page_ids(pages, num_pages)
    if checked is not None:
        return checked
    import numpy as np

    try:
        ids = np.array(pages)
    except (TypeError, ValueError):  # lists of different lengths, ...
        raise wrong(name, "a non-empty list of page ids", pages) from None
    if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
        raise wrong(name, "a non-empty list of page ids", pages)
    if ids.min() < 0 or ids.max() >= num_pages:
        bad = int(np.flatnonzero((ids < 0) | (ids >= num_pages))[0])
        raise InvalidArgument(
            f"{name}[{bad}]: expected a page in [0, {num_pages}); got {int(ids[bad])}"
        )
    return np.ascontiguousarray(ids, dtype=np.int32)


def granted_ids(pages: Any, num_pages: int, num_tokens: int, page_size: int) -> Any:
    """Checked page ids that hold `num_tokens` tokens; `LentPages.take` finds one named twice."""
    ids = page_ids(pages, num_pages)
    needed = -(-num_tokens // page_size)
    if ids.size < needed:
        raise InvalidArgument(
            f"pages: expected at least {needed} for {num_tokens} tokens of page size {page_size}; "
            f"got {ids.size}"
        )
    return ids
