"""The meaning of `kvlink.relayout_pages`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kvlink.errors import InvalidArgument, Unsupported
from kvlink.layout import Shard
from kvlink.reference.append_kv import plane, scale_plane, store_rows
from kvlink.reference.digest_pages import BITS, digest_rows, locate

__all__ = ["digest_rows", "move_rows", "relayout_pages"]


def relayout_pages(
    src_pool: Any,
    src_pages: Sequence[int],
    dst_pool: Any,
    dst_pages: Sequence[int],
    *,
    num_tokens: int,
    src_start: int = 0,
    dst_start: int = 0,
    src_shard: Shard | None = None,
    dst_shard: Shard | None = None,
) -> None:
    """Moves the layers and heads that both shards have, row by row through float32.

    Rows of one dtype keep their bytes where both sides have scales per row, or the static scales
    (1 where there are none) are equal.
    """
    src_shard = src_shard or _all_of(src_pool)
    dst_shard = dst_shard or _all_of(dst_pool)
    from_at = locate(src_pool, src_pages, src_start, num_tokens, "src_pages")
    to_at = locate(dst_pool, dst_pages, dst_start, num_tokens, "dst_pages")
    for layer in [model for model in src_shard.layers if model in dst_shard.layers]:
        from_layer = src_shard.layers.index(layer)
        to_layer = dst_shard.layers.index(layer)
        for head in [model for model in src_shard.kv_heads if model in dst_shard.kv_heads]:
            from_head = src_shard.kv_heads.index(head)
            to_head = dst_shard.kv_heads.index(head)
            _move_head(src_pool, from_layer, from_head, from_at, dst_pool, to_layer, to_head, to_at)


def move_rows(
    src_pool: Any,
    src_pages: Any,
    dst_pool: Any,
    dst_pages: Any,
    *,
    src_layers: Sequence[int],
    dst_layers: Sequence[int],
    model_layers: Sequence[int],
    num_heads: int,
    src_head: int,
    dst_head: int,
    model_head: int,
    num_tokens: int,
    src_start: int,
    dst_start: int,
    token_position: int,
    digest: bool,
) -> tuple[int, int]:
    """(rows, digest): relayout_pages by stored layers and by heads of the pools.

    Raises InvalidArgument, PageTableError, Unsupported.
    """
    _check_same_meaning(src_pool.layout, dst_pool.layout)
    from_at = locate(src_pool, src_pages, src_start, num_tokens, "src_pages")
    to_at = locate(dst_pool, dst_pages, dst_start, num_tokens, "dst_pages")
    size = dst_pool.layout.page_size
    listed = [int(page) for page in dst_pages]
    written = listed[dst_start // size : -(-(dst_start + num_tokens) // size)]
    for page in written if num_tokens else ():
        if written.count(page) > 1:
            raise InvalidArgument(f"dst_pages: expected distinct pages; got {page} twice")
        if src_pool is dst_pool and page in from_at[0].tolist():
            raise InvalidArgument(
                f"dst_pages: expected no source page of the same pool; got {page}"
            )
    for src, dst in zip(src_layers, dst_layers, strict=True):
        layers = src_pool.layer_map.index(src), dst_pool.layer_map.index(dst)
        for head in range(num_heads):
            _move_head(
                src_pool, layers[0], src_head + head, from_at,
                dst_pool, layers[1], dst_head + head, to_at,
            )  # fmt: skip
    planes = 2 if dst_pool.layout.has_v_plane else 1
    if not digest:
        return num_tokens * num_heads * planes * len(dst_layers), 0
    return digest_rows(
        dst_pool, dst_pages, layers=dst_layers, model_layers=model_layers, num_heads=num_heads,
        head=dst_head, model_head=model_head, num_tokens=num_tokens, start=dst_start,
        token_position=token_position,
    )  # fmt: skip


def _move_head(
    src_pool: Any, src_layer: int, src_head: int, src_at: tuple[torch.Tensor, torch.Tensor],
    dst_pool: Any, dst_layer: int, dst_head: int, dst_at: tuple[torch.Tensor, torch.Tensor],
) -> None:  # fmt: skip
    src = src_pool.layout
    from_at = (*src_at, slice(src_head, src_head + 1))
    to_at = (*dst_at, slice(dst_head, dst_head + 1))
    bits = BITS[src.element_bytes]
    for name in ("k", "v") if src.has_v_plane else ("k",):
        stored = plane(src_pool, src_layer, name).view(bits)[from_at]
        if _verbatim(src_pool, src_layer, src_head, dst_pool, dst_layer, dst_head, name):
            plane(dst_pool, dst_layer, name).view(bits)[to_at] = stored
            if src.scale == "token_head":
                scales = scale_plane(src_pool, src_layer, name)[from_at]
                scale_plane(dst_pool, dst_layer, name)[to_at] = scales
            continue
        values = stored.view(plane(src_pool, src_layer, name).dtype).float()
        if src.has_scales:
            values = values * scale_plane(src_pool, src_layer, name)[from_at].unsqueeze(-1)
        store_rows(dst_pool, dst_layer, name, *to_at, values)


def _all_of(pool: Any) -> Shard:
    return Shard(range(pool.num_layers), range(pool.layout.num_kv_heads))


def _check_same_meaning(src: Any, dst: Any) -> None:
    same = src.form == dst.form or (src.has_v_plane and dst.has_v_plane)
    if src.form == "opaque":
        same = same and (src.dtype, src.head_dim) == (dst.dtype, dst.head_dim)
    if not same:
        raise Unsupported(
            f"relayout_pages: no conversion from {src.form} pages of {src.head_dim} x {src.dtype} "
            f"to {dst.form} pages of {dst.head_dim} x {dst.dtype}"
        )
    if (src.head_dim, src.head_dim_v) != (dst.head_dim, dst.head_dim_v):
        raise InvalidArgument(
            f"head_dim and head_dim_v: expected {src.head_dim} and {src.head_dim_v} as in the "
            f"source; got {dst.head_dim} and {dst.head_dim_v}"
        )


def _verbatim(
    src_pool: Any,
    src_layer: int,
    src_head: int,
    dst_pool: Any,
    dst_layer: int,
    dst_head: int,
    name: str,
) -> bool:
    src, dst = src_pool.layout, dst_pool.layout
    per_row = src.scale == "token_head", dst.scale == "token_head"
    if src.dtype != dst.dtype or per_row[0] != per_row[1]:
        return False
    if per_row[0]:
        return True
    return _static_scale(src_pool, src_layer, src_head, name) == _static_scale(
        dst_pool, dst_layer, dst_head, name
    )


def _static_scale(pool: Any, layer: int, head: int, name: str) -> float:
    if not pool.layout.has_scales:
        return 1.0
    return float(scale_plane(pool, layer, name)[0, 0, head])
