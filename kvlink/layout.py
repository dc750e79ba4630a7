"""How a KV cache lies in memory: the Python mirror of `csrc/kvlink/layout/kv_layout.hpp`.

`KVLayout` addresses any element of one stored layer, `Shard` says which layers and KV heads of the
model a pool holds. The byte-exact specification is docs/kv_layout.md. Pure Python: importing this
module needs neither numpy nor the compiled extension.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvlink._arguments import (
    a,
    checked,
    index_of,
    integer,
    integers,
    one_of,
    optional,
    positive,
    wrong,
)  # fmt: skip
from kvlink._planes import (
    DTYPE_BYTES,
    DTYPES,
    PAGE_ALIGNMENT,
    Plane,
    dtype_name,
    page_planes,
    round_up,
)
from kvlink._serialise import FORMS, PLANE_FIELDS, SCALES, pack, unpack
from kvlink._serialise import LAYOUT_BYTES as LAYOUT_BYTES
from kvlink._serialise import LAYOUT_VERSION as LAYOUT_VERSION
from kvlink._shard import Shard as Shard
from kvlink.errors import InvalidArgument

_MAX_STRIDE = 1 << 48
_NO_PLANE = Plane()


@dataclass(frozen=True)
class KVLayout:
    """One stored layer: form, dtype, scales, dimensions and the strides of its planes.

    Make one with `nhd`, `hnd`, `packed`, `latent`, `opaque` or `from_tensor`. Values are
    immutable and hashable; equal layouts have equal `fingerprint`s.
    """

    form: str
    dtype: str
    scale: str
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    page_size: int
    k: Plane
    v: Plane
    k_scale: Plane = _NO_PLANE
    v_scale: Plane = _NO_PLANE

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("form", self.form, FORMS),
            ("dtype", self.dtype, DTYPES),
            ("scale", self.scale, SCALES),
        ):
            one_of(name, value, allowed)
        positive(num_kv_heads=self.num_kv_heads, head_dim=self.head_dim, page_size=self.page_size)
        if self.form == "opaque":
            if self.head_dim_v != 0 or self.scale != "none":
                raise InvalidArgument("opaque pages have neither V nor scales")
        else:
            positive(head_dim_v=self.head_dim_v)
            if self.dtype == "uint8":
                raise InvalidArgument("dtype: uint8 is for opaque pages; name the value type")
        if self.form == "latent" and self.head_dim_v > self.head_dim:
            expected = f"at most {self.head_dim}: V is the first part of K"
            raise wrong("head_dim_v", expected, self.head_dim_v)
        for name in ("k", "v", "k_scale", "v_scale"):
            plane = getattr(self, name)
            a(Plane)(name, plane)
            for field in PLANE_FIELDS:
                stride = index_of(given := getattr(plane, field))
                if stride is None or not 0 <= stride < _MAX_STRIDE:
                    raise wrong(f"{name}.{field}", "0 <= value < 2^48", given)

    # --- making one -------------------------------------------------------------------------

    @classmethod
    def nhd(
        cls,
        *,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        dtype: Any,
        head_dim_v: int | None = None,
        scale: str = "none",
    ) -> KVLayout:
        """Pages of [K | V], each [page_size, num_kv_heads, head_dim]."""
        return cls._make(
            "separate", "nhd", num_kv_heads, head_dim, head_dim_v, page_size, dtype, scale
        )

    @classmethod
    def hnd(
        cls,
        *,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        dtype: Any,
        head_dim_v: int | None = None,
        scale: str = "none",
    ) -> KVLayout:
        """Pages of [K | V], each [num_kv_heads, page_size, head_dim]."""
        return cls._make(
            "separate", "hnd", num_kv_heads, head_dim, head_dim_v, page_size, dtype, scale
        )

    @classmethod
    def packed(
        cls,
        *,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        dtype: Any,
        head_dim_v: int | None = None,
        scale: str = "none",
        order: str = "nhd",
    ) -> KVLayout:
        """Pages of rows [head_dim | head_dim_v]: a head's K and V side by side."""
        return cls._make(
            "packed", order, num_kv_heads, head_dim, head_dim_v, page_size, dtype, scale
        )

    @classmethod
    def latent(
        cls, *, head_dim: int, head_dim_v: int, page_size: int, dtype: Any, scale: str = "none"
    ) -> KVLayout:
        """MLA: one head of `head_dim` per token; V is its first `head_dim_v` elements."""
        return cls._make("latent", "nhd", 1, head_dim, head_dim_v, page_size, dtype, scale)

    @classmethod
    def opaque(cls, page_shape: Sequence[int], dtype: Any, *, num_heads: int = 1) -> KVLayout:
        """Pages of `page_shape` elements that only their owner understands; moved whole.

        With `num_heads`, a page's first axis consists of so many equal slices, which a `Shard`
        numbers as it does KV heads: a state that TP ranks hold by heads can then be resharded.
        """
        (num_heads,) = positive(num_heads=num_heads)
        page_shape = integers("page_shape", page_shape)
        for size in [*page_shape, num_elements := math.prod(page_shape)]:
            positive(page_shape=size)
        if num_heads > 1 and (not page_shape or page_shape[0] % num_heads):
            raise InvalidArgument(
                f"page_shape: expected a first axis of {num_heads} equal slices; "
                f"got {tuple(page_shape)}"
            )
        name = dtype_name(dtype)
        page_bytes = round_up(num_elements * DTYPE_BYTES[name], PAGE_ALIGNMENT)
        dims = num_elements // num_heads
        k = Plane(0, page_bytes // DTYPE_BYTES[name], num_elements, dims, 1)
        return cls("opaque", name, "none", num_heads, dims, 0, 1, k, Plane())

    @classmethod
    @checked(head_dim=optional(integer), head_dim_v=optional(integer))
    def from_tensor(
        cls,
        tensor: Any,
        axes: str,
        *,
        form: str = "separate",
        head_dim: int | None = None,
        head_dim_v: int | None = None,
        dtype: Any = None,
    ) -> KVLayout:
        """Layout of an engine's own tensor of one layer (any DLPack producer).

        `axes` names its dimensions, for example "kv page slot head dim" or "page kv head slot dim";
        the head axis may be missing (one head). `form="packed"` reads a dim axis of
        head_dim + head_dim_v elements, `form="latent"` one whose first `head_dim_v` are V. `dtype`
        names the value type when the tensor stores raw bytes (float8 in uint8). A pair `(k, v)`
        of tensors without a kv axis describes K and V in allocations of their own.
        Raises InvalidArgument when the axes do not fit the tensor.
        """
        from kvlink._tensor_axes import layout_from_tensor

        return layout_from_tensor(tensor, axes, form, head_dim, head_dim_v, dtype)

    @classmethod
    def _make(
        cls,
        form: str,
        order: str,
        num_kv_heads: int,
        head_dim: int,
        head_dim_v: int | None,
        page_size: int,
        dtype: Any,
        scale: str,
    ) -> KVLayout:
        head_dim_v = head_dim if head_dim_v is None else head_dim_v
        heads, dim, dim_v, size = positive(
            num_kv_heads=num_kv_heads, head_dim=head_dim, head_dim_v=head_dim_v, page_size=page_size
        )
        name = dtype_name(dtype)
        one_of("scale", scale, SCALES)
        planes = page_planes(form, order, name, scale, heads, dim, dim_v, size)
        return cls(form, name, scale, heads, dim, dim_v, size, *planes)

    # --- addressing -------------------------------------------------------------------------

    @property
    def element_bytes(self) -> int:
        """Bytes of one stored element."""
        return DTYPE_BYTES[self.dtype]

    @property
    def has_v_plane(self) -> bool:
        """V occupies bytes of its own."""
        return self.form in ("separate", "packed")

    @property
    def has_scales(self) -> bool:
        """Stored values are to be multiplied by a scale."""
        return self.scale != "none"

    @checked(page=integer, slot=integer, head=integer, dim=integer)
    def k_offset(self, page: int, slot: int, head: int, dim: int) -> int:
        """Bytes from the layer's base to an element of K."""
        return self.k.offset_bytes + self.k.element(page, slot, head, dim) * self.element_bytes

    @checked(page=integer, slot=integer, head=integer, dim=integer)
    def v_offset(self, page: int, slot: int, head: int, dim: int) -> int:
        """Bytes from the layer's base to an element of V."""
        return self.v.offset_bytes + self.v.element(page, slot, head, dim) * self.element_bytes

    @checked(page=integer, slot=integer, head=integer)
    def k_scale_offset(self, page: int, slot: int, head: int) -> int:
        """Bytes from the layer's base to the float32 scale of a K row."""
        return self.k_scale.offset_bytes + self.k_scale.element(page, slot, head) * 4

    @checked(page=integer, slot=integer, head=integer)
    def v_scale_offset(self, page: int, slot: int, head: int) -> int:
        """Bytes from the layer's base to the float32 scale of a V row."""
        return self.v_scale.offset_bytes + self.v_scale.element(page, slot, head) * 4

    def planes(self) -> list[tuple[str, Plane, int, int]]:
        """(name, plane, dims in a row, element bytes) of each plane that has bytes of its own."""
        planes = [("k", self.k, self.head_dim, self.element_bytes)]
        if self.has_v_plane:
            planes.append(("v", self.v, self.head_dim_v, self.element_bytes))
        if self.has_scales:
            planes.append(("k_scale", self.k_scale, 1, 4))
            if self.has_v_plane:
                planes.append(("v_scale", self.v_scale, 1, 4))
        return planes

    def layer_bytes(self, num_pages: int) -> int:
        """Bytes from a layer's base to the end of its last element (page padding included)."""
        positive(num_pages=num_pages)
        end = 0
        for _, plane, dims, size in self.planes():
            last = plane.element(num_pages - 1, self.page_size - 1, self.num_kv_heads - 1, dims - 1)
            end = max(end, plane.offset_bytes + (last + 1) * size)
        return round_up(end, PAGE_ALIGNMENT)

    def token_bytes(self) -> int:
        """Bytes of one token in one layer: K, V and per-token scales, without padding."""
        row = self.head_dim + (self.head_dim_v if self.has_v_plane else 0)
        scales = (2 if self.has_v_plane else 1) if self.scale == "token_head" else 0
        return self.num_kv_heads * (row * self.element_bytes + scales * 4)

    # --- serialisation ----------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """Canonical form: LAYOUT_BYTES bytes, little-endian, equal for equal layouts."""
        dims = (self.num_kv_heads, self.head_dim, self.head_dim_v, self.page_size)
        planes = (self.k, self.v, self.k_scale, self.v_scale)
        return pack(self.form, self.dtype, self.scale, dims, planes)

    @classmethod
    def from_bytes(cls, data: bytes) -> KVLayout:
        """Inverse of `to_bytes`; raises InvalidArgument on anything that is not a valid layout."""
        a(bytes)("data", data)
        form, dtype, scale, dims, planes = unpack(data)
        return cls(form, dtype, scale, *dims, *planes)

    @property
    def fingerprint(self) -> str:
        """32 hex digits that name this layout: the front of the SHA-256 of `to_bytes`."""
        return hashlib.sha256(self.to_bytes()).hexdigest()[:32]
