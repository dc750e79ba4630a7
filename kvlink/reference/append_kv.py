"""The meaning of `kvlink.append_kv`, and of storing values in a pool's dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

from kvlink.errors import InvalidArgument
from kvlink.reference.rope import apply_rope

TORCH_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "int8": torch.int8,
    "uint8": torch.uint8,
}
QUANT_MAX = {"float8_e4m3": 448.0, "float8_e5m2": 57344.0, "int8": 127.0}


def plane(pool: Any, layer: int, name: str) -> torch.Tensor:
    """K ("k") or V ("v") of a layer in place: [num_pages, page_size, num_kv_heads, dims]."""
    return from_dlpack(getattr(pool, name)(layer))


def scale_plane(pool: Any, layer: int, name: str) -> torch.Tensor:
    """Scales of a layer's K or V in place: float32 [num_pages, page_size, num_kv_heads]."""
    return from_dlpack(getattr(pool, f"{name}_scale")(layer))


def round_to(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """Float32 values rounded to nearest even; float8 and int8 saturate, and NaN in int8 is 0."""
    if dtype == "int8":
        return values.nan_to_num(nan=0.0).round().clamp(-127, 127).to(torch.int8)
    if dtype in QUANT_MAX:
        return values.clamp(-QUANT_MAX[dtype], QUANT_MAX[dtype]).to(TORCH_DTYPES[dtype])
    return values.to(TORCH_DTYPES[dtype])


def row_scales(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """The scale per row that "token_head" stores: largest finite magnitude / the type's largest.

    1 where that would be 0 or subnormal, and for types that are not quantised.
    """
    amax = torch.where(values.isfinite(), values.abs(), 0.0).amax(-1)
    if dtype not in QUANT_MAX:
        return torch.ones_like(amax)
    scale = amax / torch.tensor(QUANT_MAX[dtype])
    return torch.where(scale >= torch.finfo(torch.float32).tiny, scale, 1.0)


def store_rows(
    pool: Any,
    layer: int,
    name: str,
    pages: torch.Tensor,
    slots: torch.Tensor,
    heads: slice,
    values: torch.Tensor,
) -> None:
    """Stores float32 rows [num_tokens, num_heads, dims] at (pages[t], slots[t], heads)."""
    layout = pool.layout
    if layout.scale == "token_head":
        scale_plane(pool, layer, name)[pages, slots, heads] = row_scales(values, layout.dtype)
    if layout.scale != "none":
        values = values / scale_plane(pool, layer, name)[pages, slots, heads].unsqueeze(-1)
    stored = round_to(values, layout.dtype)
    # Indexed stores of float8 are not implemented; bytes are.
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[layout.element_bytes]
    plane(pool, layer, name).view(bits)[pages, slots, heads] = stored.view(bits)


def append_kv(
    k: torch.Tensor,
    v: torch.Tensor | None,
    pool: Any,
    layer: int | Sequence[int],
    slots: Any,
    *,
    rope: Any = None,
) -> None:
    """See `kvlink.append_kv`; here tokens are stored in order, so the last one wins a slot."""
    if not isinstance(layer, int):
        for i, each in enumerate(layer):
            append_kv(k[i], None if v is None else v[i], pool, each, slots, rope=rope)
        return
    layout = pool.layout
    num_slots = pool.num_pages * layout.page_size
    for t, slot in enumerate(slots.tolist()):
        if not -1 <= slot < num_slots:
            raise InvalidArgument(
                f"slots[{t}]: expected -1 or a slot in [0, {num_slots}); got {slot}"
            )
    for t, slot in enumerate(slots.tolist()):
        if slot == -1:
            continue
        page, at = divmod(slot, layout.page_size)
        index = (torch.tensor([page]), torch.tensor([at]), slice(None))
        keys = k[t : t + 1].float()
        if rope is not None:
            keys = apply_rope(keys, rope._replace(positions=rope.positions[t : t + 1]))
        store_rows(pool, layer, "k", *index, keys)
        if layout.has_v_plane:
            assert v is not None
            store_rows(pool, layer, "v", *index, v[t : t + 1].float())
