"""The K and V of one sequence, read from a pool's pages as float32."""

from __future__ import annotations

from typing import Any

import torch

from kvlink.reference.append_kv import plane, scale_plane


def gather(
    pool: Any, layer: int, pages: torch.Tensor, begin: int, end: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """K [end - begin, num_kv_heads, head_dim] and V [.., head_dim_v] of positions [begin, end).

    `pages` [n] holds the sequence's page ids in order; only those of the positions are looked at.
    """
    at = torch.arange(begin, end)
    page = pages.long()[at // pool.layout.page_size]
    slot = at % pool.layout.page_size
    return _values(pool, layer, "k", page, slot), _values(pool, layer, "v", page, slot)


def _values(
    pool: Any, layer: int, name: str, page: torch.Tensor, slot: torch.Tensor
) -> torch.Tensor:
    stored = plane(pool, layer, name)
    # Indexing of float8 is not implemented; that of bytes is.
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[stored.element_size()]
    values = stored.view(bits)[page, slot].view(stored.dtype).float()
    if pool.layout.has_scales:
        values = values * scale_plane(pool, layer, name)[page, slot].unsqueeze(-1)
    return values
