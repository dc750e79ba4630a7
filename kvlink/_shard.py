"""`Shard`: which layers and KV heads of the model a pool holds. See `kvlink.layout`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kvlink._arguments import a, integer, integers, positive, shown, wrong
from kvlink.errors import InvalidArgument

MAX_REPLICAS = 65535


@dataclass(frozen=True)
class Shard:
    """Which layers and KV heads of the model a pool holds.

    `layers[i]` is the model's number of the pool's i-th layer; `kv_heads` are contiguous.
    `replica=(idx, count)`: `count` ranks hold these layers and heads alike and this is number
    `idx` of them. As the source of a transfer each sends its share of the layers, so all of them
    together send everything once; as a destination each receives all of it.
    """

    layers: tuple[int, ...]
    kv_heads: range
    replica: tuple[int, int] = (0, 1)

    def __init__(
        self,
        layers: Iterable[int],
        kv_heads: Iterable[int],
        replica: tuple[int, int] = (0, 1),
    ) -> None:
        layers = tuple(integers("layers", layers))
        heads = _contiguous(kv_heads)
        if not layers or min(layers) < 0 or len(set(layers)) != len(layers):
            raise InvalidArgument(f"layers: expected distinct numbers >= 0; got {layers}")
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "kv_heads", heads)
        object.__setattr__(self, "replica", _checked_replica(replica))

    def overlaps(self, other: Shard) -> bool:
        """They hold a layer and a KV head in common: ranks of two engines that link."""
        a(Shard)("other", other)
        heads = range(
            max(self.kv_heads.start, other.kv_heads.start),
            min(self.kv_heads.stop, other.kv_heads.stop),
        )
        return bool(heads) and not set(self.layers).isdisjoint(other.layers)

    @classmethod
    def of_rank(
        cls,
        *,
        num_layers: int,
        num_kv_heads: int,
        tp_rank: int,
        tp_size: int,
        pp_rank: int = 0,
        pp_size: int = 1,
        pp_layers: Sequence[int] | None = None,
        layers: Iterable[int] | None = None,
    ) -> Shard:
        """What a rank of a TP x PP engine holds of a model.

        Heads and layers are cut into contiguous parts whose sizes differ by one at most, the
        larger ones first. With more TP ranks than KV heads each rank holds one head and the ranks
        are cut among the heads in the same way: those of one head are its replicas. A latent
        (MLA) is one head, so all TP ranks are replicas. `pp_layers` gives the number of layers of
        each PP rank instead. `layers` names those of the model's layers that this kind of pool
        holds (hybrid models), by default all. Raises InvalidArgument.
        """
        num_layers, num_kv_heads, tp_size, pp_size = positive(
            num_layers=num_layers, num_kv_heads=num_kv_heads, tp_size=tp_size, pp_size=pp_size
        )
        tp_rank = integer("tp_rank", tp_rank, 0, tp_size - 1)
        pp_rank = integer("pp_rank", pp_rank, 0, pp_size - 1)
        if tp_size <= num_kv_heads:
            heads, replica = _part(num_kv_heads, tp_size, tp_rank), (0, 1)
        else:
            ranks = [_part(tp_size, num_kv_heads, head) for head in range(num_kv_heads)]
            head = next(head for head, held_by in enumerate(ranks) if tp_rank in held_by)
            heads = range(head, head + 1)
            replica = (tp_rank - ranks[head].start, len(ranks[head]))
        stage = _stage(num_layers, pp_rank, pp_size, pp_layers)
        wanted = stage if layers is None else integers("layers", layers)
        held = [layer for layer in wanted if layer in stage]
        if not held:
            raise InvalidArgument(
                f"pp_rank: rank {pp_rank} of {pp_size} holds none of the layers of this pool; "
                f"it holds {stage}, got layers {shown(layers)}"
            )
        return cls(held, heads, replica)


def _contiguous(kv_heads: Iterable[int]) -> range:
    """Of a range without looking at each: peers tell ranges of any length."""
    found: Sequence[int]
    if isinstance(kv_heads, range) and kv_heads.step == 1:
        integers("kv_heads", (kv_heads.start, kv_heads.stop))
        found = heads = kv_heads
    else:
        found = integers("kv_heads", kv_heads)
        heads = range(found[0], found[0] + len(found)) if found else range(0)
    if not heads or heads[0] < 0 or (found is not heads and list(heads) != found):
        raise InvalidArgument(
            f"kv_heads: expected a contiguous rising range; got {tuple(found[:64])}"
        )
    return heads


def _checked_replica(replica: Any) -> tuple[int, int]:
    numbers = integers("replica", replica)
    if len(numbers) != 2 or not 0 <= numbers[0] < numbers[1] <= MAX_REPLICAS:
        raise wrong("replica", f"(idx, count), 0 <= idx < count <= {MAX_REPLICAS}", replica)
    return numbers[0], numbers[1]


def _part(total: int, num_parts: int, idx: int) -> range:
    """The idx-th of contiguous parts whose sizes differ by one at most, the larger ones first."""
    size, larger = divmod(total, num_parts)
    first = idx * size + min(idx, larger)
    return range(first, first + size + (idx < larger))


def _stage(num_layers: int, pp_rank: int, pp_size: int, pp_layers: Sequence[int] | None) -> range:
    """The model layers of a PP rank."""
    if pp_layers is None:
        if pp_size > num_layers:
            raise InvalidArgument(f"pp_size: expected at most {num_layers} layers; got {pp_size}")
        return _part(num_layers, pp_size, pp_rank)
    counts = integers("pp_layers", pp_layers)
    if len(counts) != pp_size or min(counts) < 1 or sum(counts) != num_layers:
        raise InvalidArgument(
            f"pp_layers: expected {pp_size} positive counts with sum {num_layers}; got {counts}"
        )
    first = sum(counts[:pp_rank])
    return range(first, first + counts[pp_rank])
