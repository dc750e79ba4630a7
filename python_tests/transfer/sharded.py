"""A model's KV cut over the ranks of an engine, and the plain numpy meaning of moving it.

The truth is one array per model layer and plane, [tokens, KV heads, elements], of random bits. An
engine is a list of ranks; each holds what its shard says.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.dlpack import from_dlpack

from kvlink import KVPool, Shard
from kvlink.testing.pools import make_pool, rows_of

Bits = npt.NDArray[Any]
DIM = 8


@dataclass(frozen=True)
class Model:
    """What is moved, whoever holds it."""

    num_layers: int = 5
    num_kv_heads: int = 8
    num_tokens: int = 61
    dtype: str = "bfloat16"
    num_planes: int = 2
    same: tuple[int, ...] | None = None  # model layers with one number share their KV

    @cached_property
    def bits(self) -> list[list[Bits]]:
        """[layer][plane] of uint8 [tokens, heads, row bytes]."""
        random = np.random.default_rng(7)
        shape = (self.num_tokens, self.num_kv_heads, DIM)
        size = {"bfloat16": 2, "float8_e4m3": 1, "float32": 4}[self.dtype]
        kinds = {1: np.uint8, 2: np.int16, 4: np.int32}
        of_group: dict[int, list[Bits]] = {}
        for layer in range(self.num_layers):
            group = layer if self.same is None else self.same[layer]
            if group not in of_group:
                of_group[group] = [
                    random.integers(0, 127, shape).astype(kinds[size])
                    for _ in range(self.num_planes)
                ]
        return [
            of_group[layer if self.same is None else self.same[layer]]
            for layer in range(self.num_layers)
        ]


@dataclass
class Rank:
    """One rank's pool. Pages are listed in a scattered order; unused bytes are 0xff."""

    shard: Shard
    pool: KVPool
    memory: list[Any]
    pages: list[int] = field(default_factory=list)

    def bytes(self) -> bytes:
        return b"".join(part.numpy().tobytes() for part in self.memory)

    def at(self, num_tokens: int) -> tuple[Any, Any]:
        """Page and slot of each token."""
        tokens, size = np.arange(num_tokens), self.pool.layout.page_size
        return np.array(self.pages)[tokens // size], tokens % size

    def hold(self, model: Model) -> None:
        """Writes its cut of the model, by numpy alone."""
        where = self.at(model.num_tokens)
        for layer, model_layer in enumerate(self.shard.layers):
            for plane, name in enumerate("kv"[: model.num_planes]):
                rows = rows_of(self.pool, layer, name).numpy()
                heads = slice(self.shard.kv_heads.start, self.shard.kv_heads.stop)
                rows[where] = model.bits[model_layer][plane][:, heads]


def layer_map_of(shard: Shard, model: Model) -> list[int] | None:
    """Layers of a rank that share KV in the model share a stored layer."""
    if model.same is None:
        return None
    groups = [model.same[layer] for layer in shard.layers]
    stored = list(dict.fromkeys(groups))
    return [stored.index(group) for group in groups]


def make_rank(shard: Shard, model: Model, kind: str, page_size: int, seed: int = 0) -> Rank:
    num_pages = -(-model.num_tokens // page_size) + 2
    filled = make_pool(
        kind, dtype=model.dtype, num_kv_heads=len(shard.kv_heads), head_dim=DIM,
        page_size=page_size, num_pages=num_pages, num_layers=len(shard.layers),
        layer_map=layer_map_of(shard, model),
    )  # fmt: skip
    pages = np.random.default_rng(seed).permutation(num_pages)[:-2].tolist()
    return Rank(shard, filled.pool, filled.memory, pages)


def engine(
    model: Model, tp_size: int, pp_layers: list[int], kind: str, page_size: int
) -> list[Rank]:
    """Every rank's empty pool."""
    return [
        make_rank(
            Shard.of_rank(
                num_layers=model.num_layers, num_kv_heads=model.num_kv_heads, tp_rank=tp_rank,
                tp_size=tp_size, pp_rank=pp_rank, pp_size=len(pp_layers), pp_layers=pp_layers,
            ),
            model, kind, page_size, seed=tp_rank + 10 * pp_rank,
        )
        for pp_rank in range(len(pp_layers))
        for tp_rank in range(tp_size)
    ]  # fmt: skip


def copy_of(ranks: list[Rank], model: Model, kind: str, page_size: int) -> list[Rank]:
    """The same ranks with what the model says in their pages."""
    copies = []
    for rank in ranks:
        copy = make_rank(rank.shard, model, kind, page_size)
        copy.pages = rank.pages
        copy.hold(model)
        copies.append(copy)
    return copies


def raw(pool: KVPool, layer: int, name: str) -> Any:
    """A plane as DLPack gives it."""
    return from_dlpack(getattr(pool, name)(layer))
