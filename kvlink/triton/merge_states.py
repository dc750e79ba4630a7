"""merge_states as a Triton kernel. See `kvlink.merge_states`."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kvlink.errors import InvalidArgument, Unsupported
from kvlink.triton import configs
from kvlink.triton.arguments import FLOATS, Sizes, as_tensor, check, short_name
from kvlink.triton.tensor_pool import on_stream
from kvlink.triton.values import from_float32, to_float32

_UNSEEN = tl.constexpr(float("-inf"))
_MOST_STATES = 64  # their addresses travel with the launch


@triton.jit(do_not_specialize=["num_rows"])
def merge_states_kernel(
    outs,  # tuple of [num_rows, head_dim]
    lses,  # tuple of [num_rows]
    out,
    lse,
    num_rows,
    head_dim,
    KIND: tl.constexpr,
    NUM_STATES: tl.constexpr,
    ROWS: tl.constexpr,
    DIMS: tl.constexpr,
):
    """Grid: blocks of ROWS rows; DIMS >= head_dim."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, DIMS)
    within = row < num_rows
    at = row[:, None] * head_dim + dim[None, :]
    inside = within[:, None] & (dim < head_dim)[None, :]

    largest = tl.full([ROWS], _UNSEEN, tl.float32)
    for i in tl.static_range(NUM_STATES):
        largest = tl.maximum(largest, tl.load(lses[i] + row, mask=within, other=_UNSEEN))
    shift = tl.where(largest == _UNSEEN, 0.0, largest)

    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIMS], tl.float32)
    for i in tl.static_range(NUM_STATES):
        part = tl.load(lses[i] + row, mask=within, other=_UNSEEN)
        weight = tl.exp(part - shift)
        total += weight
        seen = inside & (part != _UNSEEN)[:, None]  # what has seen nothing is not read
        value = to_float32(tl.load(outs[i] + at, mask=seen, other=0.0), KIND)
        acc += weight[:, None] * value

    divisor = tl.where(total == 0.0, 1.0, total)
    tl.store(out + at, from_float32(acc / divisor[:, None], KIND), mask=inside)
    tl.store(lse + row, shift + tl.log(total), mask=within)


def merge_states(
    out_a: Any,
    lse_a: Any,
    out_b: Any = None,
    lse_b: Any = None,
    *,
    into: Any = None,
    stream: int | None = None,
) -> tuple[Any, Any]:
    """See `kvlink.merge_states`; compiled once per number of states. Returns torch tensors.

    `into` is an (out, lse) pair to write to. The work is queued on `stream`, by default torch's
    current one. Raises Unsupported for more than 64 states.
    """
    if out_b is None and lse_b is None:
        outs, lses = list(out_a), list(lse_a)
    else:
        outs, lses = [out_a, out_b], [lse_a, lse_b]
    if not outs:
        raise InvalidArgument("outs: expected at least one state; got none")
    if len(outs) != len(lses):
        raise InvalidArgument(
            "states: expected one lse for each of at least one out; got "
            f"{len(outs)} outs and {len(lses)} lses"
        )
    if len(outs) > _MOST_STATES:
        raise Unsupported(
            f"merge_states: triton supports up to {_MOST_STATES} states; got {len(outs)}"
        )
    sizes = Sizes()
    kinds: tuple[str, ...] = FLOATS
    device = as_tensor(outs[0], "outs[0]").device
    axes = ("num_tokens", "num_heads", "head_dim")
    for i in range(len(outs)):
        outs[i] = check(outs[i], f"outs[{i}]", axes, kinds, sizes, device, contiguous=True)
        kinds = (short_name(outs[0].dtype),)
        lses[i] = check(
            lses[i], f"lses[{i}]", axes[:2], ("float32",), sizes, device, contiguous=True
        )
    out, lse = into or (torch.empty_like(outs[0]), torch.empty_like(lses[0]))
    out = check(out, "out", axes, kinds, sizes, device, contiguous=True)
    lse = check(lse, "lse", axes[:2], ("float32",), sizes, device, contiguous=True)
    num_rows, head_dim = lse.numel(), sizes["head_dim"]
    if num_rows and head_dim:
        config = configs.rows(head_dim)
        with on_stream(device, stream):
            merge_states_kernel[(triton.cdiv(num_rows, config.rows),)](
                tuple(outs), tuple(lses), out, lse, num_rows, head_dim,
                KIND=kinds[0], NUM_STATES=len(outs), ROWS=config.rows, DIMS=config.dims,
                num_warps=config.num_warps, enable_fp_fusion=False,
            )  # fmt: skip
    return out, lse
