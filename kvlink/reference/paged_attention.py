"""The meaning of `kvlink.paged_attention`."""

from __future__ import annotations

from typing import Any

import torch

from kvlink.errors import PageTableError
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
    q_positions: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    mask_starts: torch.Tensor | None = None,
    page_generations: torch.Tensor | None = None,
    expected_generations: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kvlink.paged_attention`: out [T, Hq, head_dim_v] in q's dtype, lse float32 [T, Hq]."""
    layout = pool.layout
    num_tokens, num_q_heads, head_dim = q.shape
    scale = head_dim**-0.5 if scale is None else scale
    out = torch.zeros(num_tokens, num_q_heads, layout.head_dim_v)
    lse = torch.full((num_tokens, num_q_heads), float("-inf"))
    for seq, length in enumerate(seq_lens.tolist()):
        row, end_row = (seq, seq + 1) if q_indptr is None else q_indptr[seq : seq + 2].tolist()
        entries: Any = seq if page_indptr is None else slice(*page_indptr[seq : seq + 2].tolist())
        pages = page_table[entries]
        for row_idx in range(row, end_row):
            q_position = length - (end_row - row_idx)
            mask_start = length - (end_row - row) if mask_starts is None else int(mask_starts[seq])
            if q_positions is not None:
                q_position = int(q_positions[row_idx])
            begin, end = visible_range(q_position, length, causal, window)
            if begin >= end or length == 0:
                continue  # sees nothing: zeros and -inf, sink or not
            if page_generations is not None and expected_generations is not None:
                read = slice(begin // layout.page_size, (end - 1) // layout.page_size + 1)
                now = page_generations.view(torch.int32)[pages[read].long()]
                if not torch.equal(now, expected_generations[entries].view(torch.int32)[read]):
                    raise PageTableError(
                        f"page_table: sequence {seq}: a page of another generation"
                    )
            at = torch.arange(begin, end)
            k, v = gather(pool, layer, pages, begin, end)
            if mask is not None:
                shown = mask_shows(mask[row_idx], at - mask_start)
                at, k, v = at[shown], k[shown], v[shown]
                if not len(at):
                    continue
            k = k.repeat_interleave(num_q_heads // layout.num_kv_heads, dim=1)
            v = v.repeat_interleave(num_q_heads // layout.num_kv_heads, dim=1)
            scores = scale * torch.einsum("hd,phd->hp", q[row_idx].float(), k)
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            if alibi_slopes is not None:
                scores = scores + alibi_slopes[:, None] * (at - q_position)
            logits = scores if sinks is None else torch.cat([scores, sinks[:, None]], dim=1)
            lse[row_idx] = logits.logsumexp(dim=1)
            weights = logits.softmax(dim=1)[:, : len(at)]
            out[row_idx] = torch.einsum("hp,phd->hd", weights, v)
    return out.to(q.dtype), lse


def mask_shows(bits: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
    """Whether bit idx of uint8 [mask_bytes] is set; what comes before the mask is shown."""
    byte = bits[(idx // 8).clamp(0, len(bits) - 1)].long()
    return (idx < 0) | ((byte >> (idx % 8)) & 1).bool()


def visible_range(
    q_position: int, seq_len: int, causal: bool, window: int | None
) -> tuple[int, int]:
    """Positions [begin, end) that the query at `q_position` sees."""
    begin = max(0, q_position - window + 1) if window else 0
    return begin, min(seq_len, q_position + 1) if causal else seq_len
