"""Which part of one pool goes to which part of another: layers and KV heads that both hold."""

from __future__ import annotations

from dataclasses import dataclass

from kvlink.transfer.errors import Unconvertible
from kvlink.transfer.region import RegionDescriptor


@dataclass(frozen=True)
class TransferPlan:
    """The cut of two pools. Depends on layouts and shards only, so one serves every request.

    `parts`: (stored source layer, stored destination layer, model layer) for each stored
    destination layer that the source has, each moved once. `heads`: (count, first in the source
    pool, first in the destination pool, first in the model). `parts_of_layer[i]`: the parts that
    are complete when layer i of the source pool is.
    """

    parts: tuple[tuple[int, int, int], ...]
    heads: tuple[int, int, int, int]
    parts_of_layer: tuple[tuple[int, ...], ...]

    @classmethod
    def build(cls, src: RegionDescriptor, dst: RegionDescriptor) -> TransferPlan:
        """O(layers). Raises Unconvertible with the reason."""
        _check_layouts(src, dst)
        first = max(src.shard.kv_heads.start, dst.shard.kv_heads.start)
        last = min(src.shard.kv_heads.stop, dst.shard.kv_heads.stop)
        if first >= last:
            raise Unconvertible(
                f"shards: {src.shard.kv_heads} and {dst.shard.kv_heads} have no KV head in common"
            )
        stored_of = dict(zip(src.shard.layers, src.layer_map, strict=True))
        parts = []
        for dst_layer, model_layer in enumerate(dst.stored_model_layers):
            if model_layer in stored_of:
                _check_sharing(src, dst, stored_of, dst_layer)
                parts.append((stored_of[model_layer], dst_layer, model_layer))
        if not parts:
            raise Unconvertible("shards: no layer of the destination is stored by the source")
        parts_of_layer = tuple(
            tuple(idx for idx, part in enumerate(parts) if part[0] == stored)
            for stored in src.layer_map
        )
        heads = (
            last - first, first - src.shard.kv_heads.start, first - dst.shard.kv_heads.start, first
        )  # fmt: skip
        return cls(tuple(parts), heads, parts_of_layer)


def _check_layouts(src: RegionDescriptor, dst: RegionDescriptor) -> None:
    a, b = src.layout, dst.layout
    families = {"separate": "KV", "packed": "KV"}
    if families.get(a.form, a.form) != families.get(b.form, b.form):
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


def _check_sharing(
    src: RegionDescriptor, dst: RegionDescriptor, stored_of: dict[int, int], dst_layer: int
) -> None:
    """Model layers that share memory at the destination must share it at the source."""
    members = [
        layer
        for layer, stored in zip(dst.shard.layers, dst.layer_map, strict=True)
        if stored == dst_layer and layer in stored_of
    ]
    if len({stored_of[layer] for layer in members}) > 1:
        raise Unconvertible(
            f"shards: model layers {members} share memory at the destination, but not at the source"
        )
