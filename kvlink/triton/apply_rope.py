"""apply_rope as a Triton kernel, and what append_kv shares with it. See `kvlink.apply_rope`."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kvlink.errors import InvalidArgument
from kvlink.triton import configs
from kvlink.triton.arguments import FLOATS, Sizes, as_tensor, check, short_name
from kvlink.triton.error_record import POSITIONS, record, record_first, report_errors
from kvlink.triton.tensor_pool import on_stream
from kvlink.triton.values import from_float32


@triton.jit
def turn(row, src, from_row, inside, cos_sin, at_angles, first_dim, DIMS: tl.constexpr,
         ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr):  # fmt: skip
    """The row with its pairs turned; see `kvlink.Rope`. The other dim of each is loaded again."""
    dim = tl.arange(0, DIMS) - first_dim
    HALF: tl.constexpr = ROTARY // 2
    if INTERLEAVED:
        pair, is_first = dim // 2, dim % 2 == 0
        other = tl.where(is_first, dim + 1, dim - 1)
    else:
        pair, is_first = dim % HALF, dim < HALF
        other = tl.where(is_first, dim + HALF, dim - HALF)
    turning = inside & ((dim >= 0) & (dim < ROTARY))[None, :]
    at = from_row[:, None] + (other + first_dim)[None, :]
    others = tl.load(src + at, mask=turning, other=0.0).to(tl.float32)
    at = at_angles[:, None] + pair[None, :]
    cos = tl.load(cos_sin + at, mask=turning, other=1.0)
    sin = tl.load(cos_sin + at + HALF, mask=turning, other=0.0)
    turned = row * cos + tl.where(is_first[None, :], -1.0, 1.0) * (others * sin)
    return tl.where(turning, turned, row)


@triton.jit(do_not_specialize=["num_rows", "num_positions"])
def apply_rope_kernel(
    x, out,  # [num_tokens, num_heads, head_dim]; may be the same
    cos_sin,  # float32 [num_positions, ROTARY]
    positions,  # int64 [num_tokens]
    errors,
    num_rows, head_dim,
    x_strides, out_strides,  # of token and head
    num_positions, table_stride, first_dim,
    NUM_HEADS: tl.constexpr, KIND: tl.constexpr, ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of ROWS rows; a row is one head of one token."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token, head = row // NUM_HEADS, row % NUM_HEADS
    within = row < num_rows
    position = tl.load(positions + token, mask=within, other=0)
    known = (position >= 0) & (position < num_positions)
    record_first(errors, POSITIONS, within & (known == 0), token, position, num_rows)
    dim = tl.arange(0, DIMS)
    inside = (within & known)[:, None] & (dim < head_dim)[None, :]
    from_row = token * x_strides[0] + head * x_strides[1]
    values = tl.load(x + from_row[:, None] + dim[None, :], mask=inside, other=0.0).to(tl.float32)
    values = turn(
        values, x, from_row, inside, cos_sin, position * table_stride, first_dim, DIMS, ROTARY,
        INTERLEAVED,
    )  # fmt: skip
    tl.debug_barrier()  # both dims of a pair are read before either is written
    to_row = token * out_strides[0] + head * out_strides[1]
    tl.store(out + to_row[:, None] + dim[None, :], from_float32(values, KIND), mask=inside)


def apply_rope(x: Any, rope: Any, out: Any = None, *, stream: int | None = None) -> Any:
    """See `kvlink.apply_rope`; returns a torch tensor, or what `out` is.

    The work is queued on `stream`, by default torch's current one. A token whose position is
    outside the table is not written, and raised as InvalidArgument by a later call; on the CPU it
    is raised at once, and nothing is written.
    """
    report_errors()
    sizes = Sizes("x")
    device = as_tensor(x, "x").device
    axes = ("num_tokens", "num_heads", "head_dim")
    x = check(x, "x", axes, FLOATS, sizes, device)
    kind = short_name(x.dtype)
    target = check(torch.empty_like(x) if out is None else out, "out", axes, (kind,), sizes, device)
    turning = checked_rope(rope, sizes, device, sizes["head_dim"])
    if device.type == "cpu":
        check_positions(turning)
    table, positions, interleaved, first_dim = turning
    num_rows = x.shape[0] * x.shape[1]
    if num_rows:
        config = configs.rows(x.shape[2])
        with on_stream(device, stream):
            apply_rope_kernel[(triton.cdiv(num_rows, config.rows),)](
                x, target, table, positions, record(), num_rows, x.shape[2], x.stride()[:2],
                target.stride()[:2], len(table), table.stride(0), first_dim,
                NUM_HEADS=x.shape[1], KIND=kind, ROTARY=table.shape[1], INTERLEAVED=interleaved,
                ROWS=config.rows, DIMS=config.dims, num_warps=config.num_warps,
                enable_fp_fusion=False,
            )  # fmt: skip
    return target if out is None else out


def checked_rope(
    rope: Any, sizes: Sizes, device: torch.device, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor, bool, int]:
    """The rope's parts, as tensors on the device. Raises InvalidArgument."""
    table, positions, interleaved, first_dim = rope
    axes = ("num_positions", "rotary_dim")
    table = check(table, "rope.cos_sin", axes, ("float32",), sizes, device)
    positions = check(
        positions, "rope.positions", ("num_tokens",), ("int64",), sizes, device, contiguous=True
    )
    rotary_dim = table.shape[1]
    if rotary_dim % 2 or not rotary_dim:
        raise InvalidArgument(f"rope.cos_sin: expected an even number of columns; got {rotary_dim}")
    if first_dim < 0 or first_dim + rotary_dim > head_dim:
        raise InvalidArgument(
            f"rope: expected dims within the {head_dim} of a head; got {first_dim} to "
            f"{first_dim + rotary_dim - 1}"
        )
    return table, positions, bool(interleaved), int(first_dim)


def check_positions(rope: Any, wanted: torch.Tensor | None = None) -> None:
    """Each token's (or each wanted one's) position is a row of the table. On the host."""
    last, positions = len(rope[0]) - 1, rope[1]
    outside = (positions < 0) | (positions > last)
    bad = (outside if wanted is None else outside & wanted).nonzero()
    if len(bad):
        first = int(bad[0])
        raise InvalidArgument(
            f"rope.positions[{first}]: expected a row of the table, 0 to {last}; "
            f"got {int(positions[first])}"
        )
