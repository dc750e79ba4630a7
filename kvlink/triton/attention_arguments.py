"""The arguments of paged_attention, checked as far as that needs no waiting for a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kvlink.errors import InvalidArgument, PageTableError, Unsupported
from kvlink.triton.arguments import FLOATS, Sizes, as_tensor, check, short_name
from kvlink.triton.tensor_pool import TensorPool

MAX_HEAD_DIM, MAX_HEAD_DIM_V = 576, 512


@dataclass(frozen=True)
class AttentionArguments:
    """Tensors on the pool's device; None where there is none."""

    q: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor | None
    q_indptr: torch.Tensor | None
    seq_lens: torch.Tensor
    page_table: torch.Tensor
    page_indptr: torch.Tensor | None
    sinks: torch.Tensor | None
    alibi_slopes: torch.Tensor | None


def read_arguments(
    pool: TensorPool, q: Any, page_table: Any, seq_lens: Any, q_indptr: Any, page_indptr: Any,
    sinks: Any, alibi_slopes: Any, out: Any, lse: Any, causal: bool, window: int | None,
    softcap: float | None,
) -> AttentionArguments:  # fmt: skip
    """Raises InvalidArgument and Unsupported; on the CPU, PageTableError."""
    if window is not None and window < 1:
        raise InvalidArgument(f"window: expected >= 1 or None; got {window}")
    if softcap is not None and not softcap > 0:
        raise InvalidArgument(f"softcap: expected > 0 or None; got {softcap}")
    if pool.head_dim > MAX_HEAD_DIM or pool.head_dim_v > MAX_HEAD_DIM_V:
        raise Unsupported(
            f"head_dim: triton supports up to {MAX_HEAD_DIM} and head_dim_v up to "
            f"{MAX_HEAD_DIM_V}; got {pool.head_dim} and {pool.head_dim_v}"
        )
    device = pool.device
    q = as_tensor(q, "q")
    if q.ndim != 3:
        raise InvalidArgument(f"q: expected shape [T, Hq, head_dim]; got {tuple(q.shape)}")
    sizes = Sizes("pool", head_dim=pool.head_dim, head_dim_v=pool.head_dim_v)
    q = check(q, "q", ("num_tokens", "num_q_heads", "head_dim"), FLOATS, sizes, device)
    num_q_heads = q.shape[1]
    if num_q_heads < 1 or num_q_heads % pool.num_kv_heads:
        raise InvalidArgument(
            "q: expected a number of query heads that is a multiple of the "
            f"{pool.num_kv_heads} KV heads; got {num_q_heads}"
        )

    def integers(array: Any, name: str, axes: tuple[str, ...], contiguous: bool) -> torch.Tensor:
        on_device = as_device_int32(array, device)
        return check(on_device, name, axes, ("int32",), sizes, device, contiguous=contiguous)

    def per_head(array: Any, name: str) -> torch.Tensor | None:
        if array is None:
            return None
        return check(array, name, ("num_q_heads",), ("float32",), sizes, device, contiguous=True)

    lens = integers(seq_lens, "seq_lens", ("num_seqs",), True)
    sizes.match("num_seqs + 1", len(lens) + 1, "seq_lens")
    starts = None
    if q_indptr is not None:
        starts = integers(q_indptr, "q_indptr", ("num_seqs + 1",), True)
    elif len(lens) != len(q):
        raise InvalidArgument(
            f"q: expected one row for each of the {len(lens)} sequences, or q_indptr; got {len(q)}"
        )
    page_starts = None
    if page_indptr is not None:
        page_starts = integers(page_indptr, "page_indptr", ("num_seqs + 1",), True)
        table = integers(page_table, "page_table", ("num_entries",), True)
    else:
        table = integers(page_table, "page_table", ("num_seqs", "max_pages"), False)
    q_dtype = short_name(q.dtype)
    if out is None:
        out = torch.empty((*q.shape[:2], pool.head_dim_v), dtype=q.dtype, device=device)
    axes = ("num_tokens", "num_q_heads", "head_dim_v")
    out = check(out, "out", axes, (q_dtype,), sizes, device)
    if lse is not None:
        lse = check(lse, "lse", axes[:2], ("float32",), sizes, device, contiguous=True)
    arguments = AttentionArguments(
        q, out, lse, starts, lens, table, page_starts,
        per_head(sinks, "sinks"), per_head(alibi_slopes, "alibi_slopes"),
    )  # fmt: skip
    if device.type == "cpu":
        _check_values(arguments, pool, causal, window)
    return arguments


def as_device_int32(values: Any, device: torch.device) -> Any:
    """Sequences as int32 on `device`, short rows padded with -1; arrays as they are."""
    if not isinstance(values, list | tuple | range):
        return values
    rows: list[Any] = list(values)
    if rows and isinstance(rows[0], list | tuple | range):
        width = max(map(len, rows))
        rows = [[*row, *[-1] * (width - len(row))] for row in rows]
    return torch.tensor(rows, dtype=torch.int32, device=device)


def _check_values(
    arguments: AttentionArguments, pool: TensorPool, causal: bool, window: int | None
) -> None:
    """What the CPU backend checks; on a device only kernels see the values."""
    lens = arguments.seq_lens.tolist()
    starts = list(range(len(lens) + 1))
    if arguments.q_indptr is not None:
        starts = _checked_starts(arguments.q_indptr, len(arguments.q), "q_indptr")
    page_starts = None
    if arguments.page_indptr is not None:
        table = arguments.page_table
        page_starts = _checked_starts(arguments.page_indptr, len(table), "page_indptr")
    for seq, length in enumerate(lens):
        num_rows = starts[seq + 1] - starts[seq]
        if length < 0:
            raise InvalidArgument(f"seq_lens[{seq}]: expected >= 0; got {length}")
        if 0 < length < num_rows:
            raise InvalidArgument(
                f"seq_lens[{seq}]: expected at least {num_rows}, the sequence's query rows "
                f"(new tokens count); got {length}"
            )
        if page_starts is None:
            pages = arguments.page_table[seq].tolist()
        else:
            pages = arguments.page_table[page_starts[seq] : page_starts[seq + 1]].tolist()
        begin = max(0, length - num_rows - window + 1) if window else 0
        end = -(-length // pool.page_size) if num_rows else 0
        if end > len(pages):
            raise InvalidArgument(
                f"page_table: sequence {seq} of length {length} needs {end} pages of "
                f"{pool.page_size}; got {len(pages)} entries"
            )
        for i in range(begin // pool.page_size, end):
            if not 0 <= pages[i] < pool.num_pages:
                what = "page is unmapped (-1)" if pages[i] == -1 else f"no such page: {pages[i]}"
                raise PageTableError(
                    f"page_table: sequence {seq}, index {i}: {what}; "
                    f"the pool has {pool.num_pages} pages"
                )


def _checked_starts(indptr: torch.Tensor, total: int, name: str) -> list[int]:
    starts: list[int] = indptr.tolist()
    if starts[0] != 0:
        raise InvalidArgument(f"{name}[0]: expected 0; got {starts[0]}")
    for i in range(1, len(starts)):
        if starts[i] < starts[i - 1]:
            raise InvalidArgument(
                f"{name}[{i}]: expected at least {starts[i - 1]}, the entry before it; "
                f"got {starts[i]}"
            )
    if starts[-1] != total:
        raise InvalidArgument(
            f"{name}[{len(starts) - 1}]: expected {total}, the rows or entries that it divides; "
            f"got {starts[-1]}"
        )
    return starts
