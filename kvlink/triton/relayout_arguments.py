"""The arguments of relayout_pages and digest_pages, checked as the other backends check them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from kvlink._arguments import index_of, wrong
from kvlink.errors import InvalidArgument, PageTableError, Unsupported
from kvlink.triton.arguments import as_tensor, short_name
from kvlink.triton.tensor_pool import TensorPool

_INT32 = torch.iinfo(torch.int32)
_MANY = 2**48


class TokenRun(NamedTuple):
    """Token t is slot (start + t) % page_size of page pages[(start + t) // page_size]."""

    pages: torch.Tensor  # int32, on the pool's device
    start: int
    used: list[int]  # the ids that the run touches, on the CPU; else none are known


def check_same_meaning(src: TensorPool, dst: TensorPool) -> None:
    """Raises Unsupported for forms that do not convert, InvalidArgument for rows of other sizes."""
    opaque = src.opaque or dst.opaque
    same = (src.has_v_plane, src.opaque) == (dst.has_v_plane, dst.opaque)
    if not same or (opaque and (src.dtype, src.head_dim) != (dst.dtype, dst.head_dim)):
        raise Unsupported(
            f"relayout_pages: no conversion from {_described(src)} to {_described(dst)}; separate "
            "and packed convert to each other, latent to latent, opaque to opaque of the same "
            "elements"
        )
    if (src.head_dim, src.head_dim_v) != (dst.head_dim, dst.head_dim_v):
        raise InvalidArgument(
            f"head_dim and head_dim_v: expected {src.head_dim} and {src.head_dim_v} as in the "
            f"source; got {dst.head_dim} and {dst.head_dim_v}"
        )
    if src.device != dst.device:
        raise Unsupported(
            f"relayout_pages: both pools on one device; got {src.device} and {dst.device}"
        )


def _described(pool: TensorPool) -> str:
    form = "separate" if pool.has_v_plane else "opaque" if pool.opaque else "latent"
    return f"{form} pages of {pool.head_dim} x {pool.dtype}"


def check_token_position(token_position: int) -> None:
    """Raises InvalidArgument beyond 64 bits."""
    if not -(2**63) <= token_position < 2**63:
        raise InvalidArgument(f"token_position: expected 64 bits; got {token_position}")


def read_run(pages: Any, name: str, pool: TensorPool, num_tokens: int, start: int) -> TokenRun:
    """Raises InvalidArgument; on the CPU, PageTableError."""
    ids = _read_ids(pages, name, pool.device)
    if not 0 <= start < _MANY:
        raise InvalidArgument(f"{name}: expected a first slot >= 0; got {start}")
    if not 0 <= num_tokens < _MANY:
        raise InvalidArgument(f"num_tokens: expected >= 0; got {num_tokens}")
    end = -(-(start + num_tokens) // pool.page_size)
    if num_tokens and end > len(ids):
        raise InvalidArgument(
            f"{name}: expected at least {end} pages for {num_tokens} tokens from slot {start}; "
            f"got {len(ids)}"
        )
    used: list[int] = []
    if num_tokens and pool.device.type == "cpu":
        first = start // pool.page_size
        used = ids[first:end].tolist()
        for i, page in enumerate(used, first):
            if not 0 <= page < pool.num_pages:
                raise PageTableError(
                    f"{name}[{i}]: expected a page in [0, {pool.num_pages}); got {page}"
                )
    return TokenRun(ids, start, used)


def _read_ids(pages: Any, name: str, device: torch.device) -> torch.Tensor:
    """int32 on `device`. An id beyond int32 stays one that no pool has."""
    if not hasattr(pages, "__dlpack__"):
        listed = list(pages)
        for i, page in enumerate(listed):
            if index_of(page) is None:
                raise wrong(f"{name}[{i}]", "an integer", page)
        clamped = [max(_INT32.min, min(int(page), _INT32.max)) for page in listed]
        return torch.tensor(clamped, dtype=torch.int32, device=device)
    ids = as_tensor(pages, name)
    if ids.ndim != 1:
        raise InvalidArgument(f"{name}: expected shape [num_pages]; got {list(ids.shape)}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise InvalidArgument(f"{name}: expected dtype int32 or int64; got {short_name(ids.dtype)}")
    if ids.device.type != "cpu" and ids.device != device:
        raise InvalidArgument(
            f"{name}: expected an array on the pool's device, {device}; got {ids.device}"
        )
    narrow = ids.clamp(_INT32.min, _INT32.max).int() if ids.dtype == torch.int64 else ids
    return narrow.contiguous().to(device)


def check_overlap(
    src: TensorPool, src_run: TokenRun, dst: TensorPool, dst_run: TokenRun,
    layers: tuple[tuple[int, int, int], ...],
) -> None:  # fmt: skip
    """Raises InvalidArgument where a page would be written twice, or written and read."""
    seen: set[int] = set()
    for page in dst_run.used:
        if page in seen:
            raise InvalidArgument(f"dst_pages: expected distinct pages; got {page} twice")
        seen.add(page)
    begins = {src.k[src_layer].data_ptr() for src_layer, _, _ in layers}
    if begins.isdisjoint(dst.k[dst_layer].data_ptr() for _, dst_layer, _ in layers):
        return
    for page in src_run.used:
        if page in seen:
            raise InvalidArgument(
                f"dst_pages: expected no source page of the same pool; got {page}"
            )
