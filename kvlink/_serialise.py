"""The canonical bytes of a layout: docs/kv_layout.md, csrc/kvlink/layout/serialise.cpp."""

from __future__ import annotations

import struct
from dataclasses import fields

from kvlink._planes import DTYPES, Plane
from kvlink.errors import InvalidArgument

FORMS = ("separate", "packed", "latent", "opaque")
SCALES = ("none", "tensor", "head", "token_head")
LAYOUT_VERSION = 1
_MAGIC = b"KVLY"
_HEADER = struct.Struct("<4sHBBBxxx4i")
_PLANE = struct.Struct("<5q")
PLANE_FIELDS = tuple(field.name for field in fields(Plane))
LAYOUT_BYTES = _HEADER.size + 4 * _PLANE.size

Dims = tuple[int, int, int, int]  # num_kv_heads, head_dim, head_dim_v, page_size
Planes = tuple[Plane, Plane, Plane, Plane]  # k, v, k_scale, v_scale


def pack(form: str, dtype: str, scale: str, dims: Dims, planes: Planes) -> bytes:
    """LAYOUT_BYTES bytes of a layout."""
    codes = (FORMS.index(form), DTYPES.index(dtype), SCALES.index(scale))
    return _HEADER.pack(_MAGIC, LAYOUT_VERSION, *codes, *dims) + b"".join(
        _PLANE.pack(*(getattr(plane, field) for field in PLANE_FIELDS)) for plane in planes
    )


def unpack(data: bytes) -> tuple[str, str, str, Dims, Planes]:
    """Inverse of `pack`; raises InvalidArgument on what `pack` cannot have made."""
    if len(data) != LAYOUT_BYTES:
        raise InvalidArgument(
            f"data: expected the {LAYOUT_BYTES} bytes of a layout; got {len(data)}"
        )
    magic, version, form, dtype, scale, *dims = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise InvalidArgument(f"layout: expected magic {_MAGIC!r}; got {magic!r}")
    if version != LAYOUT_VERSION:
        raise InvalidArgument(f"layout version: expected {LAYOUT_VERSION}; got {version}")
    for name, value, allowed in (
        ("form", form, FORMS),
        ("dtype", dtype, DTYPES),
        ("scale", scale, SCALES),
    ):
        if value >= len(allowed):
            raise InvalidArgument(f"layout {name}: expected < {len(allowed)}; got {value}")
    num_kv_heads, head_dim, head_dim_v, page_size = dims
    k, v, k_scale, v_scale = (
        Plane(*_PLANE.unpack_from(data, _HEADER.size + i * _PLANE.size)) for i in range(4)
    )
    unpacked = (
        FORMS[form], DTYPES[dtype], SCALES[scale],
        (num_kv_heads, head_dim, head_dim_v, page_size), (k, v, k_scale, v_scale),
    )  # fmt: skip
    if pack(*unpacked) != data:
        raise InvalidArgument("layout: reserved bytes are not zero")
    return unpacked
