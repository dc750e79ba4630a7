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
    q_positions: torch.Tensor | None
    mask: torch.Tensor | None
    mask_starts: torch.Tensor | None
    generations: torch.Tensor | None  # int32, as the expected ones
    expected_generations: torch.Tensor | None


def read_arguments(
    pool: TensorPool, q: Any, page_table: Any, seq_lens: Any, q_indptr: Any, page_indptr: Any,
    sinks: Any, alibi_slopes: Any, out: Any, lse: Any, causal: bool, window: int | None,
    softcap: float | None, q_positions: Any, mask: Any, mask_starts: Any, page_generations: Any,
    expected_generations: Any,
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
    if (page_generations is None) != (expected_generations is None):
        raise InvalidArgument("expected_generations: comes with page_generations, and vice versa")
    if mask is None and mask_starts is not None:
        raise InvalidArgument("mask_starts: expected None without a mask")
    if mask is not None and mask_starts is None and q_positions is not None:
        raise InvalidArgument("mask_starts: expected, since q_positions are given")
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
    generations = expected = None
    if page_generations is not None:
        sizes.match("num_pages", pool.num_pages, "pool")
        generations = integers(
            _as_int32(page_generations), "page_generations", ("num_pages",), True
        )
        entries = ("num_entries",) if page_indptr is not None else ("num_seqs", "max_pages")
        wanted = _as_int32(expected_generations)
        expected = integers(wanted, "expected_generations", entries, False)
    if mask is not None:
        mask = check(mask, "mask", ("num_tokens", "mask_bytes"), ("uint8",), sizes, device)
    if q_positions is not None:
        q_positions = integers(q_positions, "q_positions", ("num_tokens",), True)
    if mask_starts is not None:
        mask_starts = integers(mask_starts, "mask_starts", ("num_seqs",), True)
    arguments = AttentionArguments(
        q, out, lse, starts, lens, table, page_starts,
        per_head(sinks, "sinks"), per_head(alibi_slopes, "alibi_slopes"),
        q_positions, mask, mask_starts, generations, expected,
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


def _as_int32(array: Any) -> Any:
    """Generations of 32 bits, whatever their sign."""
    if isinstance(array, list | tuple | range):
        return array
    tensor = as_tensor(array, "generations")
    return tensor.view(torch.int32) if tensor.dtype == torch.uint32 else tensor


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
        first, last = length - num_rows, length - 1
        if arguments.q_positions is not None and num_rows and length:
            first, last = _checked_positions(arguments.q_positions, starts[seq : seq + 2], length)
        elif 0 < length < num_rows:
            raise InvalidArgument(
                f"seq_lens[{seq}]: expected at least {num_rows}, the sequence's query rows "
                f"(new tokens count); got {length}"
            )
        if arguments.mask is not None and num_rows and length:
            _check_mask(arguments, seq, length, length - num_rows)
        entries: Any = seq
        if page_starts is not None:
            entries = slice(page_starts[seq], page_starts[seq + 1])
        pages = arguments.page_table[entries].tolist()
        begin = max(0, first - window + 1) if window else 0
        end = min(length, last + 1) if causal else length
        end = -(-end // pool.page_size) if num_rows else 0
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
        if arguments.generations is not None and arguments.expected_generations is not None:
            expected = arguments.expected_generations[entries].tolist()
            for i in range(begin // pool.page_size, end):
                now = int(arguments.generations[pages[i]])
                if now != expected[i]:
                    raise PageTableError(
                        f"page_table: sequence {seq}, index {i}: page {pages[i]} is of generation "
                        f"{now}; expected {expected[i]}"
                    )


def _checked_positions(positions: torch.Tensor, rows: list[int], length: int) -> tuple[int, int]:
    """The first and the last of a sequence's query rows [begin, end)."""
    own: list[int] = positions[rows[0] : rows[1]].tolist()
    for i, position in enumerate(own):
        least = own[i - 1] if i else 0
        if not least <= position < length:
            raise InvalidArgument(
                f"q_positions[{rows[0] + i}]: expected {least} to {length - 1}, not before the row "
                f"above; got {position}"
            )
    return own[0], own[-1]


def _check_mask(arguments: AttentionArguments, seq: int, length: int, first_new: int) -> None:
    assert arguments.mask is not None
    start = first_new if arguments.mask_starts is None else int(arguments.mask_starts[seq])
    if not 0 <= start <= length:
        raise InvalidArgument(f"mask_starts[{seq}]: expected 0 to {length}; got {start}")
    if length - start > 8 * arguments.mask.shape[1]:
        raise InvalidArgument(
            f"mask: sequence {seq} needs a bit for each of its positions from {start} to "
            f"{length - 1}; got {arguments.mask.shape[1]} bytes a row"
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
