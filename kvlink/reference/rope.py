"""The meaning of `kvlink.Rope`."""

from __future__ import annotations

from typing import Any

import torch


def apply_rope(x: torch.Tensor, rope: Any) -> torch.Tensor:
    """Float32 x [num_tokens, num_heads, head_dim] with the rope's dims turned."""
    table = torch.as_tensor(rope.cos_sin)[torch.as_tensor(rope.positions)]
    cos, sin = table[:, None].chunk(2, dim=-1)
    end = rope.first_dim + table.shape[-1]
    turned = x[..., rope.first_dim : end]
    if rope.interleaved:
        first, second = turned[..., ::2], turned[..., 1::2]
    else:
        first, second = turned.chunk(2, dim=-1)
    pairs = (first * cos - second * sin, second * cos + first * sin)
    joined = torch.stack(pairs, -1).flatten(-2) if rope.interleaved else torch.cat(pairs, -1)
    return torch.cat((x[..., : rope.first_dim], joined, x[..., end:]), dim=-1)
