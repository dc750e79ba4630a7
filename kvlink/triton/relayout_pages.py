"""relayout_pages and digest_pages as one Triton kernel. See `kvlink.relayout_pages`."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from kvlink._layer_pairs import checked_shard, shared_heads, stored_layers, stored_pairs
from kvlink._shard import Shard
from kvlink.errors import InvalidArgument
from kvlink.triton import configs
from kvlink.triton.error_record import DST_PAGES, PAGES, SRC_PAGES, record, report_errors
from kvlink.triton.relayout_arguments import (
    TokenRun,
    check_overlap,
    check_same_meaning,
    check_token_position,
    read_run,
)
from kvlink.triton.relayout_kernel import relayout_kernel
from kvlink.triton.tensor_pool import TensorPool, as_tensor_pool, on_stream, strides_of

_BITS = {1: tl.uint8, 2: tl.uint16, 4: tl.uint32}


@dataclass(frozen=True)
class _Side:
    """One pool of a move, and where the moved rows are in it."""

    pool: TensorPool
    run: TokenRun
    head: int  # the first that is moved
    argument: tl.constexpr  # by which errors name the run


def relayout_pages(
    src_pool: Any,
    src_pages: Any,
    dst_pool: Any,
    dst_pages: Any,
    *,
    num_tokens: int,
    src_start: int = 0,
    dst_start: int = 0,
    src_shard: Shard | None = None,
    dst_shard: Shard | None = None,
    layers: Iterable[int] | None = None,
    token_position: int = 0,
    digest: bool = False,
    stream: int | None = None,
) -> tuple[int, int]:
    """See `kvlink.relayout_pages`; pools are TensorPools or KVPools. Returns (rows, digest).

    A launch for K and one for V, queued on `stream`, by default torch's current one, and waited for
    only if a digest is asked for. Page ids on a device are not waited for: bad ones are skipped,
    and raised as PageTableError by a later call; that destinations are distinct is not checked
    there. On the CPU everything is checked before anything is written.
    """
    src, dst = as_tensor_pool(src_pool, opaque=True), as_tensor_pool(dst_pool, opaque=True)
    src_shard = checked_shard(src_shard, src.num_layers, src.num_kv_heads, "src_shard")
    dst_shard = checked_shard(dst_shard, dst.num_layers, dst.num_kv_heads, "dst_shard")
    moved = stored_pairs(src.layer_map, src_shard, dst.layer_map, dst_shard, layers)
    heads = shared_heads(src_shard, dst_shard)
    if not moved or not heads:
        return 0, 0
    return move_rows(
        src, src_pages, dst, dst_pages,
        src_layers=[src for _, src, _ in moved],
        dst_layers=[dst for _, _, dst in moved],
        model_layers=[model for model, _, _ in moved],
        num_heads=len(heads),
        src_head=heads.start - src_shard.kv_heads.start,
        dst_head=heads.start - dst_shard.kv_heads.start,
        model_head=heads.start,
        num_tokens=num_tokens, src_start=src_start, dst_start=dst_start,
        token_position=token_position, digest=digest, stream=stream,
    )  # fmt: skip


def move_rows(
    src_pool: Any, src_pages: Any, dst_pool: Any, dst_pages: Any, *, src_layers: list[int],
    dst_layers: list[int], model_layers: list[int], num_heads: int, src_head: int, dst_head: int,
    model_head: int, num_tokens: int, src_start: int, dst_start: int, token_position: int,
    digest: bool, stream: int | None,
) -> tuple[int, int]:  # fmt: skip
    """relayout_pages by stored layers and by heads of the pools."""
    report_errors()
    src, dst = as_tensor_pool(src_pool, opaque=True), as_tensor_pool(dst_pool, opaque=True)
    check_same_meaning(src, dst)
    with on_stream(dst.device, stream):
        src_run = read_run(src_pages, "src_pages", src, num_tokens, src_start)
        dst_run = read_run(dst_pages, "dst_pages", dst, num_tokens, dst_start)
        table = tuple(zip(src_layers, dst_layers, model_layers, strict=True))
        if dst.device.type == "cpu":
            check_overlap(src, src_run, dst, dst_run, table)
        return _run(
            _Side(src, src_run, src_head, SRC_PAGES), _Side(dst, dst_run, dst_head, DST_PAGES),
            table, range(model_head, model_head + num_heads), num_tokens, token_position, digest,
        )  # fmt: skip


def copy_pages(pool: Any, src_pages: Any, dst_pages: Any, *, stream: int | None = None) -> None:
    """See `kvlink.copy_pages`; the pool is a TensorPool or a KVPool."""
    cache = as_tensor_pool(pool, opaque=True)
    if len(src_pages) != len(dst_pages):
        raise InvalidArgument(f"dst_pages: expected {len(src_pages)} pages; got {len(dst_pages)}")
    stored = list(range(len(cache.k)))
    move_rows(
        cache, src_pages, cache, dst_pages,
        src_layers=stored, dst_layers=stored, model_layers=stored,
        num_heads=cache.num_kv_heads, src_head=0, dst_head=0, model_head=0,
        num_tokens=len(src_pages) * cache.page_size, src_start=0, dst_start=0,
        token_position=0, digest=False, stream=stream,
    )  # fmt: skip


def digest_pages(
    pool: Any,
    pages: Any,
    *,
    num_tokens: int,
    start: int = 0,
    shard: Shard | None = None,
    token_position: int = 0,
    layers: Iterable[int] | None = None,
    stream: int | None = None,
) -> tuple[int, int]:
    """See `kvlink.digest_pages`; the pool is a TensorPool or a KVPool. Returns (rows, digest)."""
    cache = as_tensor_pool(pool, opaque=True)
    shard = checked_shard(shard, cache.num_layers, cache.num_kv_heads, "shard")
    stored = stored_layers(cache.layer_map, shard, layers)
    if not stored:
        return 0, 0
    return digest_rows(
        cache, pages, layers=list(stored), model_layers=list(stored.values()),
        num_heads=len(shard.kv_heads), head=0, model_head=shard.kv_heads.start,
        num_tokens=num_tokens, start=start, token_position=token_position, stream=stream,
    )  # fmt: skip


def digest_rows(
    pool: Any, pages: Any, *, layers: list[int], model_layers: list[int], num_heads: int,
    head: int, model_head: int, num_tokens: int, start: int, token_position: int,
    stream: int | None,
) -> tuple[int, int]:  # fmt: skip
    """digest_pages by stored layers and by heads of the pool."""
    report_errors()
    cache = as_tensor_pool(pool, opaque=True)
    table = tuple(zip(layers, layers, model_layers, strict=True))
    heads = range(model_head, model_head + num_heads)
    with on_stream(cache.device, stream):
        side = _Side(cache, read_run(pages, "pages", cache, num_tokens, start), head, PAGES)
        return _run(None, side, table, heads, num_tokens, token_position, True)


def _run(
    src: _Side | None, dst: _Side, table: tuple[tuple[int, int, int], ...], heads: range,
    num_tokens: int, token_position: int, digest: bool,
) -> tuple[int, int]:  # fmt: skip
    check_token_position(token_position)
    planes = [("k", dst.pool.head_dim)]
    if dst.pool.has_v_plane:
        planes.append(("v", dst.pool.head_dim_v))
    if num_tokens == 0:
        return 0, 0
    device = dst.pool.device
    total = torch.zeros(1, dtype=torch.int64, device=device) if digest else None
    for plane, (name, dims) in enumerate(planes):
        _launch(src, dst, name, plane, dims, table, heads, num_tokens, token_position, total)
    found = 0 if total is None else int(total) % 2**64
    if digest:
        report_errors()
    return num_tokens * len(heads) * len(planes) * len(table), found


def _launch(
    src: _Side | None, dst: _Side, name: str, plane: int, dims: int,
    table: tuple[tuple[int, int, int], ...], heads: range, num_tokens: int, token_position: int,
    digest: torch.Tensor | None,
) -> None:  # fmt: skip
    source = src or dst  # the same twice: to digest
    sides = (source, dst)
    element_bytes = [getattr(side.pool, name)[0].element_size() for side in sides]
    config = configs.moved_rows(dims, element_bytes[1])
    scales = [getattr(side.pool, f"{name}_scale") for side in sides]
    aligned = all(side.pool.aligned(name) for side in sides)
    src_pool, dst_pool = source.pool, dst.pool
    addresses = [side.pool.addresses for side in sides]
    relayout_kernel[(triton.cdiv(num_tokens * len(heads), config.rows), len(table))](
        _on_device(table, dst_pool.device),
        None if src is None else addresses[0][name], addresses[1][name],
        addresses[0][f"{name}_scale"], addresses[1][f"{name}_scale"],
        source.run.pages, dst.run.pages, digest, record(),
        num_tokens * len(heads), len(heads), dims,
        source.head, dst.head, heads.start, token_position, source.run.start, dst.run.start,
        src_pool.num_pages, dst_pool.num_pages,
        getattr(src_pool, name)[0].stride(), getattr(dst_pool, name)[0].stride(),
        strides_of(scales[0] and scales[0][0]), strides_of(scales[1] and scales[1][0]),
        PLANE=plane, SRC_ARGUMENT=source.argument.value, DST_ARGUMENT=dst.argument.value,
        SRC_PAGE_SIZE=src_pool.page_size, DST_PAGE_SIZE=dst_pool.page_size,
        SRC_KIND=src_pool.dtype, DST_KIND=dst_pool.dtype,
        SRC_SCALE=src_pool.scale, DST_SCALE=dst_pool.scale,
        VERBATIM=_verbatim(src_pool, dst_pool),
        SRC_BITS=_BITS[element_bytes[0]], DST_BITS=_BITS[element_bytes[1]],
        DST_BYTES=element_bytes[1], ALIGNMENT=16 if aligned else max(element_bytes),
        ROWS=config.rows, CHUNK=config.dims, WHOLE=dims <= config.dims,
        num_warps=config.num_warps, maxnreg=configs.MOVING_REGISTERS, enable_fp_fusion=False,
    )  # fmt: skip


def _verbatim(src: TensorPool, dst: TensorPool) -> bool:
    """Every row keeps its bytes; with static scales the kernel compares them."""
    return src.dtype == dst.dtype and src.scale == dst.scale and src.scale in ("none", "token_head")


@functools.lru_cache(maxsize=256)
def _on_device(table: tuple[tuple[int, int, int], ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(table, dtype=torch.int32, device=device)
