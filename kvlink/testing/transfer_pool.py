"""Pools that any process of a test can make again, and what the model would have put into them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvlink import _C
from kvlink.cache_ops import append_kv
from kvlink.layout import KVLayout, Shard
from kvlink.pool import KVPool


@dataclass(frozen=True)
class PoolSpec:
    """A pool that any process can make again: a shard of a model of `model_heads` KV heads."""

    kind: str = "nhd"
    dtype: str = "float32"
    scale: str = "none"
    page_size: int = 16
    num_pages: int = 32
    head_dim: int = 16
    layers: tuple[int, ...] = (0, 1, 2, 3)
    kv_heads: tuple[int, int] = (0, 4)  # first and past the last
    layer_map: tuple[int, ...] | None = None
    shared: bool = True
    replica: tuple[int, int] = (0, 1)

    @property
    def shard(self) -> Shard:
        return Shard(self.layers, range(*self.kv_heads), self.replica)

    def build(self) -> KVPool:
        """The pool, every byte of its pages 0xff: NaN wherever that is a value."""
        arguments: dict[str, Any] = dict(
            head_dim=self.head_dim, page_size=self.page_size, dtype=self.dtype, scale=self.scale
        )
        if self.kind == "latent":
            layout = KVLayout.latent(head_dim_v=self.head_dim // 2, **arguments)
        elif self.kind == "opaque":
            layout = KVLayout.opaque((self.head_dim,), self.dtype)
        else:
            arguments["num_kv_heads"] = len(self.shard.kv_heads)
            layout = getattr(KVLayout, self.kind)(**arguments)
        pool = KVPool.create(
            layout, num_layers=len(self.layers), num_pages=self.num_pages, shared=self.shared,
            layer_map=self.layer_map,
        )  # fmt: skip
        pool_bytes(pool)[:] = 0xFF
        if self.scale in ("tensor", "head"):
            for layer in range(pool.num_layers):
                num = layout.num_kv_heads if self.scale == "head" else 1
                pool.set_scales(layer, [0.01] * num, [0.02] * num)
        return pool

    def fill(self, pool: KVPool, pages: list[int], num_tokens: int, seed: int = 0) -> None:
        """Writes the KV of request `seed`, as every shard of the model has it."""
        at = np.arange(num_tokens)
        slots = np.array(pages, np.int64)[at // self.page_size] * self.page_size
        slots += at % self.page_size
        for layer, model_layer in enumerate(self.layers):
            heads = slice(*self.kv_heads)
            if self.kind == "opaque":
                values = logical_kv(model_layer, 0, num_tokens, self.head_dim, seed)[:, 0]
                np.from_dlpack(pool.k(layer)).reshape(self.num_pages, -1)[pages] = values
                continue
            k, v = (
                logical_kv(model_layer, plane, num_tokens, self.head_dim, seed)[:, heads]
                for plane in (0, 1)
            )
            append_kv(k, None if self.kind == "latent" else v, pool, layer, slots)


def logical_kv(
    model_layer: int, plane: int, num_tokens: int, head_dim: int, seed: int
) -> npt.NDArray[np.float32]:
    """What the model computed: float32 [num_tokens, 8 heads, head_dim]."""
    random = np.random.default_rng([seed, model_layer, plane])
    return random.standard_normal((num_tokens, 8, head_dim), dtype=np.float32)


def pool_bytes(pool: KVPool) -> npt.NDArray[np.uint8]:
    """All memory behind a pool made by `KVPool.create`, padding included."""
    segment = pool.segment
    assert segment is not None
    view = _C.ArrayView(segment.address, [segment.num_bytes], [1], "uint8", (1, 0), segment)
    memory: npt.NDArray[np.uint8] = np.from_dlpack(view)  # type: ignore[assignment]
    return memory
