"""Reads a `KVLayout` off an engine's own tensors and the names of their axes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from kvlink import _C
from kvlink._arguments import one_of, shown, text
from kvlink._planes import DTYPE_BYTES, Plane, dtype_name
from kvlink._serialise import SCALES
from kvlink.errors import InvalidArgument
from kvlink.layout import KVLayout

_AXES = ("kv", "page", "slot", "head", "dim")


@dataclass(frozen=True)
class DescribedLayer:
    """One stored layer: its layout, and the addresses of its planes (k, v, k_scale, v_scale)."""

    layout: KVLayout
    num_pages: int
    planes: tuple[int, int, int, int]
    device: tuple[int, int]
    owner: Any


@dataclass(frozen=True)
class _Axes:
    """A tensor with named axes; a missing axis has size 1 and stride 0."""

    address: int
    dtype: str
    device: tuple[int, int]
    size: dict[str, int]
    stride: dict[str, int]


def layout_from_tensor(
    tensor: Any,
    axes: str,
    form: str,
    head_dim: int | None,
    head_dim_v: int | None,
    dtype: Any,
) -> KVLayout:
    """See `KVLayout.from_tensor`."""
    return describe_layer(
        tensor, axes, form, head_dim, head_dim_v, dtype, "none", None, "tensor"
    ).layout


def describe_layer(
    tensor: Any,
    axes: str,
    form: str,
    head_dim: int | None,
    head_dim_v: int | None,
    dtype: Any,
    scale: str,
    scales: Any,
    name: str,
) -> DescribedLayer:
    """The layer that `tensor` (or a pair of tensors) holds. Raises InvalidArgument."""
    text("axes", axes)
    one_of("form", form, ("separate", "packed", "latent"))
    one_of("scale", scale, SCALES)
    if isinstance(tensor, tuple | list):
        if form != "separate" or len(tensor) != 2 or "kv" in axes.split():
            raise InvalidArgument(
                f"{name}: a (k, v) pair goes with form='separate' and axes without 'kv'; "
                f"got {len(tensor)} tensors, form {form!r}, axes {axes!r}"
            )
        k = _read(tensor[0], axes, f"{name}[0]")
        v = _read(tensor[1], axes, f"{name}[1]")
        for axis in ("page", "slot", "head"):
            if k.size[axis] != v.size[axis]:
                raise InvalidArgument(
                    f"{name}: expected K and V of one size; axis {axis!r} has "
                    f"{k.size[axis]} and {v.size[axis]}"
                )
        if (k.dtype, k.device) != (v.dtype, v.device):
            raise InvalidArgument(f"{name}: expected K and V of one dtype and device")
        v_bytes = 0
        dims, dims_v = k.size["dim"], v.size["dim"]
    else:
        k = v = _read(tensor, axes, name)
        dims, dims_v, v_elements = _split_dims(k, form, head_dim, head_dim_v, name)
        v_bytes = v_elements * DTYPE_BYTES[k.dtype]
    _check_no_overlap(k, name)
    if v is not k:
        _check_no_overlap(v, name)
    stored = k.dtype if dtype is None else dtype_name(dtype)
    if DTYPE_BYTES[stored] != DTYPE_BYTES[k.dtype]:
        raise InvalidArgument(f"dtype: {stored} does not fit into elements of {k.dtype} of {name}")
    layout = KVLayout(
        form, stored, "none", k.size["head"], dims, dims_v, k.size["slot"],
        _plane(k, 0), Plane() if form == "opaque" else _plane(v, v_bytes),
    )  # fmt: skip
    v_address = 0 if form == "opaque" else v.address + v_bytes
    planes = (k.address, v_address, 0, 0)
    owner = [tensor, scales]
    described = DescribedLayer(layout, k.size["page"], planes, k.device, owner)
    if scale == "none":
        if scales is not None:
            raise InvalidArgument("scales: given, but scale is 'none'")
        return described
    return _add_scales(described, scale, scales, name)


def _split_dims(
    k: _Axes, form: str, head_dim: int | None, head_dim_v: int | None, name: str
) -> tuple[int, int, int]:
    """(head_dim, head_dim_v, elements from K to V) of a single tensor."""
    dims = k.size["dim"]
    if form == "separate":
        if k.size["kv"] != 2:
            raise InvalidArgument(f"{name}: expected a kv axis of size 2; got {k.size['kv']}")
        return dims, dims, k.stride["kv"]
    if k.size["kv"] != 1:
        raise InvalidArgument(f"{name}: form {form!r} has no kv axis")
    if form == "packed":
        first = dims // 2 if head_dim is None else head_dim
        rest = dims - first if head_dim_v is None else head_dim_v
        if first < 1 or rest < 1 or first + rest != dims:
            raise InvalidArgument(
                f"{name}: expected a dim axis of head_dim + head_dim_v; got {dims} for "
                f"{first} + {rest}"
            )
        return first, rest, first * k.stride["dim"]
    if form == "latent":
        if head_dim_v is None:
            raise InvalidArgument("head_dim_v: required for form 'latent'")
        return dims, head_dim_v, 0
    raise InvalidArgument(f"form: expected separate, packed or latent; got {form!r}")


def _add_scales(layer: DescribedLayer, scale: str, scales: Any, name: str) -> DescribedLayer:
    if not isinstance(scales, tuple | list) or len(scales) != 2:
        raise InvalidArgument(
            f"scales of {name}: scale {scale!r} takes a (k_scale, v_scale) pair; "
            f"got {shown(scales)}"
        )
    layout = layer.layout
    shapes = {
        "tensor": [1],
        "head": [layout.num_kv_heads],
        "token_head": [layer.num_pages, layout.page_size, layout.num_kv_heads],
    }
    if scale not in shapes:
        raise InvalidArgument(f"scale: expected none, tensor, head or token_head; got {scale!r}")
    planes: list[Plane] = []
    addresses: list[int] = []
    for which, tensor in zip(("k_scale", "v_scale"), scales, strict=True):
        address, shape, strides, dtype, device, _ = _C.tensor_info(tensor, which)
        if dtype != "float32" or shape != shapes[scale] or device != layer.device:
            raise InvalidArgument(
                f"{which} of {name}: expected float32 {shapes[scale]} on device {layer.device}; "
                f"got {dtype} {shape} on {device}"
            )
        steps = {"tensor": [0, 0, 0], "head": [0, 0, *strides], "token_head": strides}[scale]
        page, slot, head = steps
        planes.append(Plane(0, page, slot, head, 0))
        addresses.append(address)
    layout = replace(layout, scale=scale, k_scale=planes[0], v_scale=planes[1])
    k, v = layer.planes[:2]
    return replace(layer, layout=layout, planes=(k, v, addresses[0], addresses[1]))


def _read(tensor: Any, axes: str, name: str) -> _Axes:
    names = axes.split()
    unknown = [axis for axis in names if axis not in _AXES]
    if unknown or len(set(names)) != len(names) or not {"page", "slot", "dim"} <= set(names):
        raise InvalidArgument(
            f"axes: expected each of page, slot, dim and optionally kv, head once; got {axes!r}"
        )
    address, shape, strides, dtype, device, read_only = _C.tensor_info(tensor, name)
    if len(shape) != len(names):
        raise InvalidArgument(f"{name}: expected {len(names)} axes ({axes}); got shape {shape}")
    if min(shape) < 1 or min(strides) < 0:
        raise InvalidArgument(
            f"{name}: expected positive sizes and strides; got {shape} and {strides}"
        )
    if read_only:
        raise InvalidArgument(f"{name}: a pool is written to, but the tensor is read-only")
    size = dict.fromkeys(_AXES, 1) | dict(zip(names, shape, strict=True))
    stride = dict.fromkeys(_AXES, 0) | dict(zip(names, strides, strict=True))
    return _Axes(address, dtype_name(dtype), device, size, stride)


def _plane(axes: _Axes, offset_bytes: int) -> Plane:
    return Plane(offset_bytes, *(axes.stride[axis] for axis in ("page", "slot", "head", "dim")))


def _check_no_overlap(axes: _Axes, name: str) -> None:
    reach = 0  # of the axes with smaller strides
    for stride, size in sorted(
        (axes.stride[axis], axes.size[axis]) for axis in _AXES if axes.size[axis] > 1
    ):
        if stride <= reach:
            raise InvalidArgument(
                f"{name}: elements overlap (strides {axes.stride}, sizes {axes.size})"
            )
        reach += stride * (size - 1)
