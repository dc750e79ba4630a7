"""The meaning of `kvlink.relayout_pages`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kvlink.layout import Shard
from kvlink.reference.append_kv import plane, scale_plane, store_rows


def locate(
    pages: Sequence[int], start: int, num_tokens: int, page_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Page and slot of each token of a run that begins at slot `start` of pages[0]."""
    at = torch.arange(start, start + num_tokens)
    return torch.tensor(list(pages))[at // page_size], at % page_size


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
    src, dst = src_pool.layout, dst_pool.layout
    from_page, from_slot = locate(src_pages, src_start, num_tokens, src.page_size)
    to_page, to_slot = locate(dst_pages, dst_start, num_tokens, dst.page_size)
    for layer in [model for model in src_shard.layers if model in dst_shard.layers]:
        from_layer = src_shard.layers.index(layer)
        to_layer = dst_shard.layers.index(layer)
        for name in ("k", "v") if src.has_v_plane else ("k",):
            for head in [model for model in src_shard.kv_heads if model in dst_shard.kv_heads]:
                from_head = src_shard.kv_heads.index(head)
                to_head = dst_shard.kv_heads.index(head)
                from_at = (from_page, from_slot, slice(from_head, from_head + 1))
                to_at = (to_page, to_slot, slice(to_head, to_head + 1))
                bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[src.element_bytes]
                stored = plane(src_pool, from_layer, name).view(bits)[from_at]
                if _verbatim(src_pool, from_layer, from_head, dst_pool, to_layer, to_head, name):
                    plane(dst_pool, to_layer, name).view(bits)[to_at] = stored
                    if src.scale == "token_head":
                        scales = scale_plane(src_pool, from_layer, name)[from_at]
                        scale_plane(dst_pool, to_layer, name)[to_at] = scales
                    continue
                values = stored.view(plane(src_pool, from_layer, name).dtype).float()
                if src.has_scales:
                    values = values * scale_plane(src_pool, from_layer, name)[from_at].unsqueeze(-1)
                store_rows(dst_pool, to_layer, name, *to_at, values)


def _all_of(pool: Any) -> Shard:
    return Shard(range(pool.num_layers), range(pool.layout.num_kv_heads))


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
