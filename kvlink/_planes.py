"""Storage types, planes, and where the planes of a page made by kvlink lie. See `kvlink.layout`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvlink._arguments import one_of, wrong

DTYPES = ("float32", "float16", "bfloat16", "float8_e4m3", "float8_e5m2", "int8", "uint8")
DTYPE_BYTES = {name: size for name, size in zip(DTYPES, (4, 2, 2, 1, 1, 1, 1), strict=True)}
_DTYPE_ALIASES = {
    "fp32": "float32", "float": "float32", "fp16": "float16", "half": "float16",
    "bf16": "bfloat16", "float8_e4m3fn": "float8_e4m3", "fp8_e4m3": "float8_e4m3",
    "fp8": "float8_e4m3", "fp8_e5m2": "float8_e5m2",
}  # fmt: skip

PAGE_ALIGNMENT = 16  # bytes, of every page of a layout made here
_STATIC_SCALES_ALIGNMENT = 256  # bytes, of page 0 behind the per-tensor or per-head scales


def dtype_name(dtype: Any) -> str:
    """Canonical name of a dtype given by name or as a torch/numpy dtype."""
    name = getattr(dtype, "name", None) or str(dtype).removeprefix("torch.")
    name = _DTYPE_ALIASES.get(name, name)
    if name not in DTYPES:
        raise wrong("dtype", f"one of {', '.join(DTYPES)}", dtype)
    return name


@dataclass(frozen=True)
class Plane:
    """A strided array indexed [page, slot, head, dim].

    Strides count elements of the plane's own type (the layout's dtype; float32 for scales); a
    stride of 0 broadcasts. `offset_bytes` leads from the layer's base to element [0, 0, 0, 0].
    """

    offset_bytes: int = 0
    stride_page: int = 0
    stride_slot: int = 0
    stride_head: int = 0
    stride_dim: int = 0

    def element(self, page: int, slot: int, head: int, dim: int = 0) -> int:
        """Elements from [0, 0, 0, 0] to the given coordinate."""
        return (
            page * self.stride_page
            + slot * self.stride_slot
            + head * self.stride_head
            + dim * self.stride_dim
        )


def page_planes(
    form: str,
    order: str,
    dtype: str,
    scale: str,
    num_kv_heads: int,
    head_dim: int,
    head_dim_v: int,
    page_size: int,
) -> tuple[Plane, Plane, Plane, Plane]:
    """The planes k, v, k_scale and v_scale of pages that hold K, then V, then per-token scales.

    Static scales lie before page 0. `order` is "nhd" or "hnd".
    """
    one_of("order", order, ("nhd", "hnd"))
    size = DTYPE_BYTES[dtype]
    num_rows = page_size * num_kv_heads
    first_v = 0  # elements from K to V
    if form == "separate":
        first_v = num_rows * head_dim
        k_strides = _row_strides(order, num_kv_heads, page_size, head_dim)
        v_strides = _row_strides(order, num_kv_heads, page_size, head_dim_v)
        num_elements = num_rows * (head_dim + head_dim_v)
    else:
        row = head_dim + head_dim_v if form == "packed" else head_dim
        first_v = head_dim if form == "packed" else 0
        k_strides = v_strides = _row_strides(order, num_kv_heads, page_size, row)
        num_elements = num_rows * row

    num_scale_planes = 1 if form == "latent" else 2
    first_page = 0
    page_bytes = num_elements * size
    k_scale = v_scale = Plane()
    if scale in ("tensor", "head"):
        per_plane = num_kv_heads if scale == "head" else 1
        stride_head = 1 if scale == "head" else 0
        k_scale = Plane(0, 0, 0, stride_head, 0)
        v_scale = Plane((num_scale_planes - 1) * per_plane * 4, 0, 0, stride_head, 0)
        first_page = round_up(num_scale_planes * per_plane * 4, _STATIC_SCALES_ALIGNMENT)
    elif scale == "token_head":
        first_scale = round_up(page_bytes, 4)
        page_bytes = first_scale + num_scale_planes * num_rows * 4
    page_bytes = round_up(page_bytes, PAGE_ALIGNMENT)
    if scale == "token_head":
        slot, head = _row_strides(order, num_kv_heads, page_size, 1)
        k_scale = Plane(first_scale, page_bytes // 4, slot, head, 0)
        v_scale = Plane(
            first_scale + (num_scale_planes - 1) * num_rows * 4, page_bytes // 4, slot, head, 0
        )
    k = Plane(first_page, page_bytes // size, *k_strides, 1)
    v = Plane(first_page + first_v * size, page_bytes // size, *v_strides, 1)
    return k, v, k_scale, v_scale


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


def _row_strides(order: str, num_kv_heads: int, page_size: int, row: int) -> tuple[int, int]:
    """(stride_slot, stride_head) of rows of `row` elements inside a page."""
    if order == "nhd":
        return num_kv_heads * row, row
    return row, page_size * row
