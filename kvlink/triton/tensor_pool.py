"""The cache as the kernels see it: torch tensors [num_pages, page_size, num_kv_heads, dims]."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

from kvlink._planes import dtype_name
from kvlink.errors import InvalidArgument, Unsupported

SCALES = ("none", "tensor", "head", "token_head")
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class TensorPool:
    """An engine's own torch tensors, one per stored layer; needs no compiled part of kvlink.

    `k` and `v` are tensors [num_pages, page_size, num_kv_heads, dims] each, of any strides: views
    (`permute`, `unflatten`, slices) of what the engine has. Without `v` the pool is latent (MLA):
    V is the first `head_dim_v` elements of K; with `head_dim_v=0` pages are opaque, and only moved
    and digested. `scale` other than "none" takes `k_scale` and `v_scale` per layer, float32: [1]
    ("tensor"), [num_kv_heads] ("head") or [num_pages, page_size, num_kv_heads] ("token_head").
    `layer_map[i]` is the stored layer behind layer i. Nothing is copied. Raises InvalidArgument
    when the tensors do not fit together.
    """

    def __init__(
        self,
        k: Sequence[torch.Tensor],
        v: Sequence[torch.Tensor] | None = None,
        *,
        head_dim_v: int | None = None,
        dtype: Any = None,
        scale: str = "none",
        k_scale: Sequence[torch.Tensor] | None = None,
        v_scale: Sequence[torch.Tensor] | None = None,
        layer_map: Sequence[int] | None = None,
    ) -> None:
        if not k or k[0].ndim != 4:
            raise InvalidArgument(
                "k: expected tensors [num_pages, page_size, num_kv_heads, head_dim]; got "
                f"{tuple(k[0].shape) if k else 'none'}"
            )
        if scale not in SCALES:
            raise InvalidArgument(f"scale: expected one of {', '.join(SCALES)}; got {scale!r}")
        self.num_pages, self.page_size, self.num_kv_heads, self.head_dim = k[0].shape
        self.has_v_plane = v is not None
        self.dtype = dtype_name(k[0].dtype if dtype is None else dtype)
        self.scale = scale
        self.device = k[0].device
        self.layer_map = tuple(range(len(k)) if layer_map is None else layer_map)
        if v is None:
            if head_dim_v is None or not 0 <= head_dim_v <= self.head_dim:
                raise InvalidArgument(
                    f"head_dim_v: expected 0 to {self.head_dim} without v; got {head_dim_v}"
                )
            v, v_scale = [each[..., :head_dim_v] for each in k], k_scale
        self.head_dim_v = v[0].shape[-1]
        self.k = self._checked("k", k, k[0], self.head_dim)
        self.v = self._checked("v", v, k[0], self.head_dim_v)
        self.k_scale = self._scales("k_scale", k_scale)
        self.v_scale = self._scales("v_scale", v_scale)

    @property
    def num_layers(self) -> int:
        """Logical layers."""
        return len(self.layer_map)

    @property
    def opaque(self) -> bool:
        """Only the owner knows what the elements mean."""
        return self.head_dim_v == 0

    @functools.cached_property
    def addresses(self) -> dict[str, torch.Tensor]:
        """Where "k", "v", "k_scale" and "v_scale" begin: int64 [stored layer] on the device."""
        planes = dict(k=self.k, v=self.v, k_scale=self.k_scale or [], v_scale=self.v_scale or [])
        return {
            name: torch.tensor([each.data_ptr() for each in layers], device=self.device)
            for name, layers in planes.items()
        }

    def aligned(self, name: str) -> bool:
        """Plane "k" or "v" of every layer begins at a multiple of 16 bytes."""
        return all(each.data_ptr() % 16 == 0 for each in getattr(self, name))

    def scales_of(self, stored: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(k_scale, v_scale) of a stored layer, [num_pages, page_size, num_kv_heads] each."""
        if self.k_scale is None or self.v_scale is None:
            return None, None
        return self.k_scale[stored], self.v_scale[stored]

    def stored(self, layer: int) -> int:
        """The stored layer behind a logical one. Raises InvalidArgument."""
        if not 0 <= layer < self.num_layers:
            raise InvalidArgument(f"layer: expected 0 to {self.num_layers - 1}; got {layer}")
        return self.layer_map[layer]

    def _checked(
        self, name: str, layers: Sequence[torch.Tensor], like: torch.Tensor, dims: int
    ) -> list[torch.Tensor]:
        shape = (*like.shape[:3], dims)
        for i, each in enumerate(layers):
            if tuple(each.shape) != shape or (each.dtype, each.device) != (like.dtype, like.device):
                raise InvalidArgument(
                    f"{name}[{i}]: expected {like.dtype} {list(shape)} on {like.device}; got "
                    f"{each.dtype} {list(each.shape)} on {each.device}"
                )
        raw = torch.int8 if self.dtype == "int8" else torch.uint8
        return [each.view(raw) if each.element_size() == 1 else each for each in layers]

    def _scales(
        self, name: str, layers: Sequence[torch.Tensor] | None
    ) -> list[torch.Tensor] | None:
        if (layers is None) != (self.scale == "none"):
            raise InvalidArgument(
                f"{name}: expected scales exactly if scale is not 'none'; it is {self.scale!r}"
            )
        if layers is None:
            return None
        full = (self.num_pages, self.page_size, self.num_kv_heads)
        shape = {"tensor": (1,), "head": full[2:], "token_head": full}[self.scale]
        for i, each in enumerate(layers):
            if tuple(each.shape) != shape or each.dtype != torch.float32:
                raise InvalidArgument(
                    f"{name}[{i}]: expected float32 {list(shape)}; got {each.dtype} "
                    f"{list(each.shape)}"
                )
        return [each.expand(full) for each in layers]


def strides_of(scale: torch.Tensor | None) -> tuple[int, ...]:
    """Of page, slot and head; zeros where there are no scales."""
    return (0, 0, 0) if scale is None else scale.stride()


def on_stream(device: torch.device, stream: int | None) -> Any:
    """A context in which kernels go to a stream of the device: a handle, or torch's current one.

    The handle's stream waits for the current one, on which the arguments were made or imported.
    """
    if device.type != "cuda":
        return contextlib.nullcontext()
    if stream is None:
        return torch.cuda.device(device)
    current = torch.cuda.current_stream(device)
    if stream == current.cuda_stream:
        return torch.cuda.device(device)
    chosen: Any = torch.cuda.ExternalStream
    chosen = chosen(stream, device)
    chosen.wait_stream(current)
    return torch.cuda.stream(chosen)


def as_tensor_pool(pool: Any, opaque: bool = False) -> TensorPool:
    """A TensorPool as it is; a KVPool as one, made once. Raises Unsupported for opaque pages."""
    if isinstance(pool, TensorPool):
        known = pool
    else:
        made = _KNOWN.get(pool)
        if made is None:
            _KNOWN[pool] = made = _from_kv_pool(pool)
        known = made
    if known.opaque and not opaque:
        raise Unsupported("pool: expected K and V; the pool's pages are opaque")
    return known


_KNOWN: weakref.WeakKeyDictionary[Any, TensorPool] = weakref.WeakKeyDictionary()


def _from_kv_pool(pool: Any) -> TensorPool:
    layout = pool.layout
    logical = [pool.layer_map.index(stored) for stored in range(max(pool.layer_map) + 1)]

    def tensors(name: str) -> list[torch.Tensor]:
        return [from_dlpack(getattr(pool, name)(layer)) for layer in logical]

    def scales(name: str) -> list[torch.Tensor] | None:
        if not layout.has_scales:
            return None
        planes = tensors(name)
        return [
            {"tensor": each[0, 0, :1], "head": each[0, 0], "token_head": each}[layout.scale]
            for each in planes
        ]

    return TensorPool(
        tensors("k"),
        tensors("v") if layout.has_v_plane else None,
        head_dim_v=layout.head_dim_v,
        dtype=layout.dtype,
        scale=layout.scale,
        k_scale=scales("k_scale"),
        v_scale=scales("v_scale"),
        layer_map=pool.layer_map,
    )
