"""Pools of every kind, filled with poison, whose every byte can be compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from kvlink import _C
from kvlink.cache_ops import append_kv
from kvlink.layout import KVLayout
from kvlink.pool import KVPool
from kvlink.reference.append_kv import TORCH_DTYPES

DTYPES = ("float32", "float16", "bfloat16", "float8_e4m3", "float8_e5m2", "int8")
SCALES = ("none", "tensor", "head", "token_head")
KINDS = ("nhd", "hnd", "packed", "packed_hnd", "strided")  # pools with K and V of their own


@dataclass
class Filled:
    """A pool and all the memory behind it, as flat uint8 tensors."""

    pool: KVPool
    memory: list[torch.Tensor]

    def bytes(self) -> bytes:
        """Every byte, padding included."""
        return b"".join(part.numpy().tobytes() for part in self.memory)


def make_pool(
    kind: str,
    *,
    dtype: str = "float32",
    scale: str = "none",
    num_kv_heads: int = 2,
    head_dim: int = 8,
    head_dim_v: int | None = None,
    page_size: int = 4,
    num_pages: int = 6,
    num_layers: int = 1,
    layer_map: list[int] | None = None,
    seed: int = 0,
) -> Filled:
    """A pool whose bytes are all 0xff (NaN wherever that is a value), static scales random.

    Kinds: those of KINDS, "latent" and "opaque" (one page of head_dim elements). "strided" wraps
    K and V tensors of their own in which dim is the outermost axis of a page.
    """
    layout_args: dict[str, Any] = dict(
        num_kv_heads=num_kv_heads, head_dim=head_dim, page_size=page_size, dtype=dtype, scale=scale
    )
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    if kind == "strided":
        filled = _strided_pool(
            num_layers, num_pages, page_size, num_kv_heads, (head_dim, head_dim_v), dtype, scale
        )
    else:
        if kind == "opaque":
            layout = KVLayout.opaque((head_dim,), dtype)
        elif kind == "latent":
            del layout_args["num_kv_heads"]
            layout = KVLayout.latent(head_dim_v=head_dim_v, **layout_args)
        elif kind == "packed_hnd":
            layout = KVLayout.packed(head_dim_v=head_dim_v, order="hnd", **layout_args)
        else:
            layout = getattr(KVLayout, kind)(head_dim_v=head_dim_v, **layout_args)
        pool = KVPool.create(
            layout, num_layers=num_layers, num_pages=num_pages, layer_map=layer_map
        )
        filled = Filled(pool, [_segment_bytes(pool)])
    for part in filled.memory:
        part.fill_(0xFF)
    if scale in ("tensor", "head"):
        random = np.random.default_rng(seed)
        for layer in range(num_layers):
            num = num_kv_heads if scale == "head" and kind != "latent" else 1
            # Few values, so that some heads of two pools agree.
            k_scale, v_scale = random.choice([0.01, 0.25, 1.0], (2, num))
            for name, values in (("k_scale", k_scale), ("v_scale", v_scale)):
                plane = from_dlpack(getattr(filled.pool, name)(layer))
                plane[0, 0, :num] = torch.from_numpy(values).float()
    return filled


def random_rows(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Values of many magnitudes, with a zero row, signed zeros and infinities among them."""
    random = np.random.default_rng(seed)
    values = random.standard_normal(shape) * np.exp(random.uniform(-9, 7, shape[:-1]))[..., None]
    values[random.random(shape[:-1]) < 0.1] = 0.0
    values[random.random(shape) < 0.01] = -0.0
    values[random.random(shape) < 0.003] = np.inf
    return torch.from_numpy(values).to(dtype)


def rows_of(pool: KVPool, layer: int, name: str) -> torch.Tensor:
    """K or V of a layer as raw bits in place: [num_pages, page_size, num_kv_heads, dims]."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[pool.layout.element_bytes]
    plane: torch.Tensor = from_dlpack(getattr(pool, name)(layer)).view(bits)
    return plane


def fill_run(filled: Filled, pages: list[int], start: int, num_tokens: int, seed: int = 0) -> None:
    """Writes values into the run alone; every other slot keeps its NaN."""
    pool, layout = filled.pool, filled.pool.layout
    at = np.arange(start, start + num_tokens)
    slots = np.array(pages)[at // layout.page_size] * layout.page_size + at % layout.page_size
    rows = (num_tokens, layout.num_kv_heads)
    for layer in range(pool.num_layers):
        k = random_rows(*rows, layout.head_dim, seed=seed + layer)
        v = random_rows(*rows, layout.head_dim_v, seed=seed + layer + 50)
        append_kv(k, v if layout.has_v_plane else None, pool, layer, torch.from_numpy(slots).long())


def model_pool(**shape: Any) -> Filled:
    """Three layers of four heads and 24 filled slots."""
    filled = make_pool(num_kv_heads=4, num_layers=3, head_dim=16, **shape)
    fill_run(filled, list(range(filled.pool.num_pages)), 0, 24)
    return filled


def _segment_bytes(pool: KVPool) -> torch.Tensor:
    segment = pool.segment
    assert segment is not None
    view = _C.ArrayView(segment.address, [segment.num_bytes], [1], "uint8", (1, 0), segment)
    memory: torch.Tensor = from_dlpack(view)
    return memory


def _strided_pool(
    num_layers: int,
    num_pages: int,
    page_size: int,
    num_kv_heads: int,
    dims: tuple[int, int],
    dtype: str,
    scale: str,
) -> Filled:
    memory: list[torch.Tensor] = []

    def tensor(
        shape: tuple[int, ...], order: tuple[int, ...], as_type: torch.dtype
    ) -> torch.Tensor:
        """A tensor of `shape` whose axes lie in memory in `order`, outermost first, with a gap."""
        sizes = [shape[axis] for axis in order]
        sizes[-1] += 1
        base = torch.empty(sizes, dtype=as_type)
        memory.append(base.view(-1).view(torch.uint8))
        narrowed = base.narrow(-1, 0, shape[order[-1]])
        return narrowed.permute(*(order.index(axis) for axis in range(len(shape))))

    layers, scales = [], []
    for _ in range(num_layers):
        layers.append(
            tuple(
                tensor((num_pages, page_size, num_kv_heads, n), (0, 3, 2, 1), TORCH_DTYPES[dtype])
                for n in dims
            )
        )
        shapes: dict[str, tuple[int, ...]] = {
            "none": (),
            "tensor": (1,),
            "head": (num_kv_heads,),
            "token_head": (num_pages, page_size, num_kv_heads),
        }
        shape = shapes[scale]
        order = tuple(reversed(range(len(shape))))
        if shape:
            scales.append(tuple(tensor(shape, order, torch.float32) for _ in range(2)))
    pool = KVPool.wrap(layers, "page slot head dim", scale=scale, scales=scales or None)
    return Filled(pool, memory)
