"""append_kv as a Triton kernel. See `kvlink.append_kv`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from kvlink.errors import InvalidArgument
from kvlink.triton import configs
from kvlink.triton.apply_rope import check_positions, checked_rope, turn
from kvlink.triton.arguments import FLOATS, Sizes, check, short_name
from kvlink.triton.error_record import POSITIONS, SLOTS, record, record_first, report_errors
from kvlink.triton.tensor_pool import TensorPool, as_tensor_pool, on_stream, strides_of
from kvlink.triton.values import from_float32, largest_finite, row_scales


@triton.jit
def _store_rows(
    row, dst, scale, head, page, slot, wanted, dst_strides, scale_strides,
    num_dims, KIND: tl.constexpr, SCALE: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    dim = tl.arange(0, DIMS)
    if SCALE != "none":
        at_scale = page * scale_strides[0] + slot * scale_strides[1] + head * scale_strides[2]
        if SCALE == "token_head":
            scales = row_scales(largest_finite(row), KIND)
            tl.store(scale + at_scale, scales, mask=wanted)
        else:
            scales = tl.load(scale + at_scale, mask=wanted, other=1.0)
        row = tl.div_rn(row, tl.broadcast_to(scales[:, None], row.shape))
    to_row = page * dst_strides[0] + slot * dst_strides[1] + head * dst_strides[2]
    at = to_row[:, None] + dim.to(tl.int64)[None, :] * dst_strides[3]
    tl.store(dst + at, from_float32(row, KIND), mask=wanted[:, None] & (dim < num_dims)[None, :])


@triton.jit(do_not_specialize=["num_rows", "num_slots", "num_positions"])
def append_kv_kernel(
    k,  # [num_tokens, num_heads, head_dim]
    v,  # [num_tokens, num_heads, head_dim_v] or None
    slots,  # int64 [num_tokens]
    cos_sin,  # float32 [num_positions, ROTARY] or None
    positions,  # int64 [num_tokens] or None
    k_pages, v_pages,  # [page, slot, head, dim]
    k_scale, v_scale,  # [page, slot, head] or None
    errors,
    num_rows, num_slots, head_dim, head_dim_v,
    k_strides, v_strides,  # of token and head
    k_pages_strides, v_pages_strides, k_scale_strides, v_scale_strides,
    num_positions, table_stride, first_dim,
    NUM_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr, KIND: tl.constexpr, SCALE: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr, DIMS: tl.constexpr, DIMS_V: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of ROWS rows; a row is one head of one token."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token, head = row // NUM_HEADS, row % NUM_HEADS
    slot = tl.load(slots + token, mask=row < num_rows, other=-1)
    wanted = (slot >= 0) & (slot < num_slots)
    record_first(errors, SLOTS, (slot < -1) | (slot >= num_slots), token, slot, num_rows)
    if cos_sin is not None:
        position = tl.load(positions + token, mask=wanted, other=0)
        known = (position >= 0) & (position < num_positions)
        record_first(errors, POSITIONS, wanted & (known == 0), token, position, num_rows)
        wanted = wanted & known
    page, at = slot // PAGE_SIZE, slot % PAGE_SIZE

    dim = tl.arange(0, DIMS)
    inside = wanted[:, None] & (dim < head_dim)[None, :]
    from_row = token * k_strides[0] + head * k_strides[1]
    keys = tl.load(k + from_row[:, None] + dim[None, :], mask=inside, other=0.0).to(tl.float32)
    if cos_sin is not None:
        keys = turn(
            keys, k, from_row, inside, cos_sin, position * table_stride, first_dim, DIMS, ROTARY,
            INTERLEAVED,
        )  # fmt: skip
    _store_rows(
        keys, k_pages, k_scale, head, page, at, wanted, k_pages_strides, k_scale_strides, head_dim,
        KIND, SCALE, DIMS,
    )  # fmt: skip
    if v is not None:
        dim_v = tl.arange(0, DIMS_V)
        inside = wanted[:, None] & (dim_v < head_dim_v)[None, :]
        from_row = token * v_strides[0] + head * v_strides[1]
        values = tl.load(v + from_row[:, None] + dim_v[None, :], mask=inside, other=0.0)
        _store_rows(
            values.to(tl.float32), v_pages, v_scale, head, page, at, wanted, v_pages_strides,
            v_scale_strides, head_dim_v, KIND, SCALE, DIMS_V,
        )  # fmt: skip


def append_kv(
    k: Any,
    v: Any,
    pool: Any,
    layer: int | Sequence[int],
    slots: Any,
    *,
    rope: Any = None,
    stream: int | None = None,
) -> None:
    """See `kvlink.append_kv`; `pool` is a TensorPool or a KVPool, and each layer is a launch.

    The work is queued on `stream`, by default torch's current one. A slot outside the pool or a
    position outside the rope's table is skipped, and raised as InvalidArgument by a later call; on
    the CPU it is raised at once, and nothing is written.
    """
    report_errors()
    cache = as_tensor_pool(pool)
    many = not isinstance(layer, int)
    layers = [int(each) for each in layer] if not isinstance(layer, int) else [layer]
    stored = [cache.stored(each) for each in layers]
    if len(set(stored)) != len(stored):
        raise InvalidArgument(f"layer: expected distinct stored layers; got {layers}")
    sizes = Sizes(
        num_kv_heads=cache.num_kv_heads, head_dim=cache.head_dim, head_dim_v=cache.head_dim_v
    )
    sizes.match("num_layers", len(layers), "layer")
    outer = ("num_layers",) if many else ()
    axes = (*outer, "num_tokens", "num_kv_heads")
    k = check(k, "k", (*axes, "head_dim"), FLOATS, sizes, cache.device)
    if cache.has_v_plane:
        v = check(v, "v", (*axes, "head_dim_v"), FLOATS, sizes, cache.device)
        if v.dtype != k.dtype:
            raise InvalidArgument(
                f"v: expected dtype {short_name(k.dtype)} as in k; got {short_name(v.dtype)}"
            )
    elif v is not None:
        raise InvalidArgument("v: expected None, as V is part of K in latent pages")
    slots = check(slots, "slots", ("num_tokens",), ("int64",), sizes, cache.device, contiguous=True)
    turning = None if rope is None else checked_rope(rope, sizes, cache.device, cache.head_dim)
    if cache.device.type == "cpu":
        _check_values(slots, cache.num_pages * cache.page_size, turning)
    if slots.numel():
        with on_stream(cache.device, stream):
            for i, index in enumerate(stored):
                values = v if v is None or not many else v[i]
                _launch(k[i] if many else k, values, slots, turning, cache, index)


def _launch(
    k: torch.Tensor, v: torch.Tensor | None, slots: torch.Tensor, rope: Any, cache: TensorPool,
    index: int,
) -> None:  # fmt: skip
    config = configs.rows(max(cache.head_dim, cache.head_dim_v))
    num_rows = k.shape[0] * cache.num_kv_heads
    k_pages, v_pages = cache.k[index], cache.v[index]
    k_scale, v_scale = cache.scales_of(index)
    cos_sin, positions, interleaved, first_dim = rope or (None, None, False, 0)
    num_positions, table_stride, rotary_dim = 0, 0, 0
    if cos_sin is not None:
        (num_positions, rotary_dim), table_stride = cos_sin.shape, cos_sin.stride(0)
    append_kv_kernel[(triton.cdiv(num_rows, config.rows),)](
        k, v, slots, cos_sin, positions, k_pages, v_pages, k_scale, v_scale, record(),
        num_rows, cache.num_pages * cache.page_size, cache.head_dim, cache.head_dim_v,
        k.stride()[:2], (0, 0) if v is None else v.stride()[:2],
        k_pages.stride(), v_pages.stride(), strides_of(k_scale), strides_of(v_scale),
        num_positions, table_stride, first_dim,
        NUM_HEADS=cache.num_kv_heads, PAGE_SIZE=cache.page_size, KIND=cache.dtype,
        SCALE=cache.scale, ROTARY=rotary_dim, INTERLEAVED=interleaved,
        ROWS=config.rows,
        DIMS=configs.rows(cache.head_dim).dims, DIMS_V=configs.rows(cache.head_dim_v).dims,
        num_warps=config.num_warps, enable_fp_fusion=False,
    )  # fmt: skip


def _check_values(slots: torch.Tensor, num_slots: int, rope: Any) -> None:
    bad = ((slots < -1) | (slots >= num_slots)).nonzero()
    if len(bad):
        first = int(bad[0])
        raise InvalidArgument(
            f"slots[{first}]: expected -1 or a slot in [0, {num_slots}); got {int(slots[first])}"
        )
    if rope is not None:
        check_positions(rope, slots >= 0)
