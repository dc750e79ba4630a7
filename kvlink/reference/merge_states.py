"""The meaning of `kvlink.merge_states`."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def merge_states(
    outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Joins results over disjoint positions: outs [T, H, D] each, lses float32 [T, H] each."""
    lse = torch.stack(list(lses)).logsumexp(dim=0)
    total = torch.zeros_like(outs[0], dtype=torch.float32)
    for out, part in zip(outs, lses, strict=True):
        weight = torch.exp(part - lse).unsqueeze(-1)
        seen = torch.isfinite(part).unsqueeze(-1)  # a state that has seen nothing is not read
        total = total + torch.where(seen, weight * out.float(), 0.0)
    return total.to(outs[0].dtype), lse
