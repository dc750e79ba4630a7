"""The meaning of `kvlink.paged_attention`."""

from __future__ import annotations

from typing import Any

import torch

from kvlink.reference.gather import gather


def paged_attention(
    q: torch.Tensor,
    pool: Any,
    layer: int,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    q_indptr: torch.Tensor | None = None,
    page_indptr: torch.Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kvlink.paged_attention`: out [T, Hq, head_dim_v] in q's dtype, lse float32 [T, Hq]."""
    layout = pool.layout
    num_tokens, num_q_heads, head_dim = q.shape
    scale = head_dim**-0.5 if scale is None else scale
    out = torch.zeros(num_tokens, num_q_heads, layout.head_dim_v)
    lse = torch.full((num_tokens, num_q_heads), float("-inf"))
    for seq, length in enumerate(seq_lens.tolist()):
        row, end_row = (seq, seq + 1) if q_indptr is None else q_indptr[seq : seq + 2].tolist()
        if page_indptr is None:
            pages = page_table[seq]
        else:
            pages = page_table[int(page_indptr[seq]) : int(page_indptr[seq + 1])]
        for row_idx in range(row, end_row):
            q_position = length - (end_row - row_idx)
            begin, end = visible_range(q_position, length, causal, window)
            if begin >= end:
                continue  # sees nothing: zeros and -inf, sink or not
            k, v = gather(pool, layer, pages, begin, end)
            k = k.repeat_interleave(num_q_heads // layout.num_kv_heads, dim=1)
            v = v.repeat_interleave(num_q_heads // layout.num_kv_heads, dim=1)
            scores = scale * torch.einsum("hd,phd->hp", q[row_idx].float(), k)
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            if alibi_slopes is not None:
                distance = torch.arange(begin, end) - q_position
                scores = scores + alibi_slopes[:, None] * distance
            logits = scores if sinks is None else torch.cat([scores, sinks[:, None]], dim=1)
            lse[row_idx] = logits.logsumexp(dim=1)
            weights = logits.softmax(dim=1)[:, : end - begin]
            out[row_idx] = torch.einsum("hp,phd->hd", weights, v)
    return out.to(q.dtype), lse


def visible_range(
    q_position: int, seq_len: int, causal: bool, window: int | None
) -> tuple[int, int]:
    """Positions [begin, end) that the query at `q_position` sees."""
    begin = max(0, q_position - window + 1) if window else 0
    return begin, min(seq_len, q_position + 1) if causal else seq_len
