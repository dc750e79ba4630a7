"""Which layers of two pools belong together: what moving and digesting pages begin with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvlink._arguments import integers
from kvlink._shard import Shard
from kvlink.errors import InvalidArgument, Unsupported


def checked_shard(shard: Shard | None, num_layers: int, num_kv_heads: int, name: str) -> Shard:
    """The shard, or all of the pool. Raises InvalidArgument if the pool has other numbers."""
    if shard is None:
        return Shard(range(num_layers), range(num_kv_heads))
    if (len(shard.layers), len(shard.kv_heads)) != (num_layers, num_kv_heads):
        raise InvalidArgument(
            f"{name}: expected {num_layers} layers and {num_kv_heads} KV heads, "
            f"as the pool has; got {len(shard.layers)} and {len(shard.kv_heads)}"
        )
    return shard


def wanted_layers(held: Iterable[int], layers: Iterable[int] | None) -> list[int]:
    """Model layers, in the order of `held`, that `layers` lets through."""
    if layers is None:
        return list(held)
    wanted = set(integers("layers", layers))
    missing = wanted - set(held)
    if missing:
        raise InvalidArgument(
            f"layers: expected layers that are held, {sorted(held)}; got {sorted(missing)}"
        )
    return [model for model in held if model in wanted]


def stored_layers(
    layer_map: Sequence[int], shard: Shard, layers: Iterable[int] | None
) -> dict[int, int]:
    """Stored layer -> the lowest model layer that it stands for, of those that are wanted."""
    stored: dict[int, int] = {}
    for model in sorted(wanted_layers(shard.layers, layers)):
        stored.setdefault(layer_map[shard.layers.index(model)], model)
    return stored


def stored_pairs(
    src_layer_map: Sequence[int],
    src_shard: Shard,
    dst_layer_map: Sequence[int],
    dst_shard: Shard,
    layers: Iterable[int] | None,
) -> list[tuple[int, int, int]]:
    """(model layer, stored source layer, stored destination layer), each destination once."""
    src_index = {model: i for i, model in enumerate(src_shard.layers)}
    dst_index = {model: i for i, model in enumerate(dst_shard.layers)}
    pairs: dict[int, tuple[int, int]] = {}  # stored destination -> (model layer, stored source)
    for model in sorted(wanted_layers(src_index.keys() & dst_index.keys(), layers)):
        src = src_layer_map[src_index[model]]
        dst = dst_layer_map[dst_index[model]]
        first, already = pairs.setdefault(dst, (model, src))
        if already != src:
            raise Unsupported(
                f"layers {first} and {model} share a stored layer of the destination, but not of "
                "the source; it cannot hold both"
            )
    return [(model, src, dst) for dst, (model, src) in pairs.items()]


def shared_heads(src_shard: Shard, dst_shard: Shard) -> range:
    """The KV heads, by their numbers in the model, that both shards have."""
    src, dst = src_shard.kv_heads, dst_shard.kv_heads
    return range(max(src.start, dst.start), min(src.stop, dst.stop))
