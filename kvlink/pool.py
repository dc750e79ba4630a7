"""`KVPool`: the pages of all layers that one process holds, wherever the memory comes from."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from kvlink import _C
from kvlink._arguments import a, checked, flag, integer, integers, optional, positive, shown, wrong
from kvlink._planes import Plane
from kvlink._tensor_axes import describe_layer
from kvlink.errors import InvalidArgument, Unsupported
from kvlink.layout import KVLayout

_LAYER_ALIGNMENT = 4096  # bytes, of each layer in a pool made here
_DEVICE_CPU = (1, 0)  # as in DLPack
_HOST_DEVICES = (1, 3)  # DLPack's CPU and CUDA-pinned memory

PlaneAddresses = tuple[int, int, int, int]  # of k, v, k_scale, v_scale; 0 where there is none


class KVPool:
    """Pages of `num_layers` layers that share one `KVLayout`.

    Make one with `create` (memory of its own), `wrap` (an engine's tensors) or `attach` (another
    process's shared pool). Logical layers may share a stored layer: `layer_map[i]` is the stored
    layer behind layer i.

    Attributes: `layout`, `num_layers`, `num_pages`, `layer_map`, `device` (DLPack's pair),
    `segment` (the `_C.Segment` behind the pool, or None when wrapped), `view` (what the operators
    take).
    """

    def __init__(
        self,
        layout: KVLayout,
        num_pages: int,
        planes: Sequence[PlaneAddresses],
        layer_map: Sequence[int],
        device: tuple[int, int],
        owner: Any,
        segment: _C.Segment | None = None,
    ) -> None:
        """For the class methods below; engines call those."""
        self.layout = layout
        self.num_pages = num_pages
        self.layer_map = tuple(layer_map)
        self.device = device
        self.segment = segment
        self._planes = tuple(planes)
        self._owner = owner
        self.choices: dict[tuple[Any, ...], str] = {}  # of backends, by what a call asked for
        self.view = _C.PoolView(
            layout.to_bytes(), list(planes), num_pages, list(layer_map), device, owner
        )

    @classmethod
    def create(
        cls,
        layout: KVLayout,
        *,
        num_layers: int,
        num_pages: int,
        device: str = "cpu",
        shared: bool = False,
        layer_map: Sequence[int] | None = None,
    ) -> KVPool:
        """A zeroed pool in memory of its own; static scales are 1.

        `shared=True` uses nameless shared memory that peers on this host can map and that vanishes
        with its last user. `layer_map` (one stored layer per logical layer) lets layers share KV;
        as many layers are stored as it names. Raises InvalidArgument, Unsupported (devices other
        than "cpu"), OSError (no memory).
        """
        a(KVLayout)("layout", layout)
        flag("shared", shared)
        if not isinstance(device, str) or device != "cpu":
            raise Unsupported(
                f"device: create makes pools on 'cpu', wrap takes any; got {shown(device)}"
            )
        (num_layers,) = positive(num_layers=num_layers)
        layer_map = _check_layer_map(layer_map, num_layers)
        num_stored = max(layer_map) + 1
        segment = _C.Segment.create(pool_bytes(layout, num_stored, num_pages), shared)
        pool = cls._in_segment(layout, num_pages, layer_map, segment)
        if layout.scale in ("tensor", "head"):
            ones = [1.0] * (layout.num_kv_heads if layout.scale == "head" else 1)
            for stored_layer in range(num_stored):
                pool._write_static_scales(stored_layer, ones, ones)
        return pool

    @classmethod
    def attach(
        cls, layout: KVLayout, *, num_pages: int, layer_map: Sequence[int], fd: int
    ) -> KVPool:
        """Maps a shared pool that another process created; `fd` is its segment's descriptor."""
        a(KVLayout)("layout", layout)
        layer_map = integers("layer_map", layer_map)
        layer_map = _check_layer_map(layer_map, len(layer_map))
        fd = integer("fd", fd, -1, 2**31 - 1)
        num_bytes = pool_bytes(layout, max(layer_map) + 1, num_pages)
        return cls._in_segment(layout, num_pages, layer_map, _C.Segment.attach(fd, num_bytes))

    @classmethod
    @checked(head_dim=optional(integer), head_dim_v=optional(integer))
    def wrap(
        cls,
        tensors: Sequence[Any],
        axes: str,
        *,
        form: str = "separate",
        head_dim: int | None = None,
        head_dim_v: int | None = None,
        dtype: Any = None,
        scale: str = "none",
        scales: Sequence[Any] | None = None,
        layer_map: Sequence[int] | None = None,
    ) -> KVPool:
        """An engine's own tensors, one (or one `(k, v)` pair) per stored layer; nothing is copied.

        `axes`, `form`, `head_dim`, `head_dim_v` and `dtype` are those of `KVLayout.from_tensor`.
        `scale` other than "none" takes `scales`, one `(k_scale, v_scale)` pair of float32 tensors
        per stored layer: shape [1], [head] or, for "token_head", [page, slot, head] in any strides.
        The tensors stay alive as long as the pool. Raises InvalidArgument when they differ in
        shape, strides, dtype or device.
        """
        if not isinstance(tensors, list | tuple) or not tensors:
            raise wrong("tensors", "a list of tensors, of at least one layer", tensors)
        if scales is not None and not isinstance(scales, list | tuple):
            raise wrong("scales", "a pair of tensors for each layer", scales)
        if scales is not None and len(scales) != len(tensors):
            raise InvalidArgument(f"scales: expected {len(tensors)} pairs; got {len(scales)}")
        layers = [
            describe_layer(
                tensor, axes, form, head_dim, head_dim_v, dtype, scale,
                None if scales is None else scales[i], f"tensors[{i}]",
            )
            for i, tensor in enumerate(tensors)
        ]  # fmt: skip
        first = layers[0]
        for i, layer in enumerate(layers):
            for what in ("layout", "num_pages", "device"):
                if getattr(layer, what) != getattr(first, what):
                    raise InvalidArgument(
                        f"tensors[{i}]: expected the {what} of tensors[0], "
                        f"{getattr(first, what)}; got {getattr(layer, what)}"
                    )
        if layer_map is not None:
            layer_map = integers("layer_map", layer_map)
        layer_map = _check_layer_map(layer_map, len(layers if layer_map is None else layer_map))
        if max(layer_map) >= len(layers):
            raise InvalidArgument(
                f"layer_map: expected stored layers below {len(layers)}; got {max(layer_map)}"
            )
        planes = [layer.planes for layer in layers]
        owner = [layer.owner for layer in layers]
        return cls(first.layout, first.num_pages, planes, layer_map, first.device, owner)

    @classmethod
    def _in_segment(
        cls, layout: KVLayout, num_pages: int, layer_map: Sequence[int], segment: _C.Segment
    ) -> KVPool:
        stride = layer_stride_bytes(layout, num_pages)
        planes = []
        for layer in range(max(layer_map) + 1):
            base = segment.address + layer * stride
            has_v = layout.form != "opaque"
            planes.append(
                (
                    base + layout.k.offset_bytes,
                    base + layout.v.offset_bytes if has_v else 0,
                    base + layout.k_scale.offset_bytes if layout.has_scales else 0,
                    base + layout.v_scale.offset_bytes if layout.has_scales else 0,
                )
            )
        return cls(layout, num_pages, planes, layer_map, _DEVICE_CPU, segment, segment)

    @property
    def num_layers(self) -> int:
        """Logical layers."""
        return len(self.layer_map)

    @property
    def num_stored_layers(self) -> int:
        """Layers with memory of their own."""
        return len(self._planes)

    @property
    def shared(self) -> bool:
        """Peers on this host can map the pool."""
        return self.segment is not None and self.segment.fd >= 0

    @property
    def num_bytes(self) -> int:
        """Bytes of the pages of all stored layers."""
        return self.num_stored_layers * self.layout.layer_bytes(self.num_pages)

    def k(self, layer: int) -> _C.ArrayView:
        """K of a layer as a DLPack array [num_pages, page_size, num_kv_heads, head_dim], no copy.

        `torch.from_dlpack(pool.k(0))` and `numpy.from_dlpack(pool.k(0))` take it.
        """
        return self._array(layer, 0, self.layout.k, self.layout.head_dim, self.layout.dtype)

    def v(self, layer: int) -> _C.ArrayView:
        """V of a layer as a DLPack array [num_pages, page_size, num_kv_heads, head_dim_v]."""
        if self.layout.form == "opaque":
            raise InvalidArgument("opaque pages have no V; k(layer) is their content")
        return self._array(layer, 1, self.layout.v, self.layout.head_dim_v, self.layout.dtype)

    def k_scale(self, layer: int) -> _C.ArrayView:
        """K scales as float32 [num_pages, page_size, num_kv_heads]; shared ones have stride 0."""
        return self._scale_array(layer, 2, self.layout.k_scale)

    def v_scale(self, layer: int) -> _C.ArrayView:
        """V scales as float32 [num_pages, page_size, num_kv_heads]; shared ones have stride 0."""
        return self._scale_array(layer, 3, self.layout.v_scale)

    def set_scales(self, layer: int, k_scale: Any, v_scale: Any) -> None:
        """Sets a layer's static scales ("tensor": a float each, "head": num_kv_heads floats each).

        Existing pages keep their stored values, so set scales before writing.
        """
        if self.layout.scale not in ("tensor", "head"):
            raise InvalidArgument(
                "scale: only 'tensor' and 'head' scales are set; "
                f"the layout has {self.layout.scale!r}"
            )
        stored_layer = self._stored(layer)
        if self.device[0] not in _HOST_DEVICES:
            raise Unsupported(f"device: scales are set in host memory; got DLPack's {self.device}")
        k_scales = self._static_scales("k_scale", k_scale)
        v_scales = self._static_scales("v_scale", v_scale)
        self._write_static_scales(stored_layer, k_scales, v_scales)

    def _static_scales(self, name: str, value: Any) -> list[float]:
        import numpy as np

        num = self.layout.num_kv_heads if self.layout.scale == "head" else 1
        try:
            values = np.atleast_1d(np.asarray(value, dtype=np.float32))
        except (TypeError, ValueError, RuntimeError):
            raise wrong(name, f"{num} finite positive floats", value) from None
        if values.shape != (num,) or not (np.isfinite(values).all() and (values > 0).all()):
            raise InvalidArgument(f"{name}: expected {num} finite positive floats; got {value!r}")
        return [float(each) for each in values]

    def _write_static_scales(
        self, stored_layer: int, k_scales: list[float], v_scales: list[float]
    ) -> None:
        # Not through numpy: before 2.1 it takes every DLPack array for read-only.
        addresses = self._planes[stored_layer][2:]
        for address, plane, values in zip(
            addresses, (self.layout.k_scale, self.layout.v_scale), (k_scales, v_scales), strict=True
        ):
            for i, value in enumerate(values):
                ctypes.c_float.from_address(address + 4 * i * plane.stride_head).value = value

    def _scale_array(self, layer: int, plane: int, strides: Plane) -> _C.ArrayView:
        if not self.layout.has_scales:
            raise InvalidArgument("the layout has no scales")
        return self._array(layer, plane, strides, 1, "float32")

    def _array(self, layer: int, plane: int, strides: Plane, dims: int, dtype: str) -> _C.ArrayView:
        stored_layer = self._stored(layer)
        layout = self.layout
        shape = [self.num_pages, layout.page_size, layout.num_kv_heads]
        steps = [strides.stride_page, strides.stride_slot, strides.stride_head]
        if plane < 2:
            shape.append(dims)
            steps.append(strides.stride_dim)
        address = self._planes[stored_layer][plane]
        return _C.ArrayView(address, shape, steps, dtype, self.device, self._owner)

    def _stored(self, layer: int) -> int:
        return self.layer_map[integer("layer", layer, 0, self.num_layers - 1)]


def layer_stride_bytes(layout: KVLayout, num_pages: int) -> int:
    """Bytes from one stored layer to the next in a pool made by `KVPool.create`."""
    return -(-layout.layer_bytes(num_pages) // _LAYER_ALIGNMENT) * _LAYER_ALIGNMENT


def pool_bytes(layout: KVLayout, num_stored_layers: int, num_pages: int) -> int:
    """Bytes of the memory behind a pool made by `KVPool.create`."""
    return num_stored_layers * layer_stride_bytes(layout, num_pages)


def _check_layer_map(layer_map: Sequence[int] | None, num_layers: int) -> list[int]:
    if layer_map is None:
        return list(range(num_layers))
    checked = integers("layer_map", layer_map)
    if len(checked) != num_layers or not checked:
        raise InvalidArgument(f"layer_map: expected {num_layers} entries; got {len(checked)}")
    if max(checked) >= len(checked) or sorted(set(checked)) != list(range(max(checked) + 1)):
        raise InvalidArgument(
            f"layer_map: expected stored layers 0 to n-1, each used; got {checked}"
        )
    return checked
