"""kvlink's operators as torch custom ops, so that torch.compile keeps them in its graphs.

Importing this registers `torch.ops.kvlink.append_kv`, `paged_attention`, `merge_states` and
`relayout_pages`; the functions here are the same ops. Custom ops take tensors, so a layer's cache
is given as its planes, views [num_pages, page_size, num_kv_heads, dims] of whatever the engine
has, and wrapped as a pool in every call. Without `v_cache` pages are latent, with the first
`head_dim_v` elements of K as V. Scales are float32: [1] (one a layer), [num_kv_heads], or
[num_pages, page_size, num_kv_heads] (one a row). Meaning, dtypes, streams and errors are those of
kvlink's operators of these names; there are no gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import kvlink

_AXES = "page slot head dim"


def _pool(
    k_cache: Sequence[Tensor],
    v_cache: Sequence[Tensor] | None,
    head_dim_v: int | None,
    k_scale: Sequence[Tensor] | None,
    v_scale: Sequence[Tensor] | None,
) -> kvlink.KVPool:
    k = [each.detach() for each in k_cache]
    how: dict[str, Any] = {}
    if k_scale:
        scales = zip(k_scale, v_scale or k_scale, strict=True)
        how["scales"] = [(a.detach(), b.detach()) for a, b in scales]
        shape = k_scale[0].shape
        how["scale"] = "token_head" if len(shape) == 3 else "tensor" if shape == (1,) else "head"
    if not v_cache:
        head_dim_v = k[0].shape[-1] if head_dim_v is None else head_dim_v
        return kvlink.KVPool.wrap(k, _AXES, form="latent", head_dim_v=head_dim_v, **how)
    pairs = list(zip(k, (each.detach() for each in v_cache), strict=True))
    return kvlink.KVPool.wrap(pairs, _AXES, **how)


def _listed(tensor: Tensor | None) -> list[Tensor] | None:
    return None if tensor is None else [tensor]


@torch.library.custom_op(
    "kvlink::append_kv", mutates_args=("k_cache", "v_cache", "k_scale", "v_scale")
)
def append_kv(
    k: Tensor,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor | None,
    slots: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    cos_sin: Tensor | None = None,
    positions: Tensor | None = None,
    *,
    head_dim_v: int | None = None,
    interleaved: bool = False,
    first_dim: int = 0,
    backend: str = "auto",
) -> None:
    """`kvlink.append_kv` into one layer; `cos_sin` and `positions` are those of a `kvlink.Rope`.

    Mutates `k_cache` and `v_cache`, and scales of shape [num_pages, page_size, num_kv_heads].
    """
    pool = _pool([k_cache], _listed(v_cache), head_dim_v, _listed(k_scale), _listed(v_scale))
    rope = None
    if cos_sin is not None:
        rope = kvlink.Rope(cos_sin, positions, interleaved, first_dim)
    kvlink.append_kv(k.detach(), None if v is None else v.detach(), pool, 0, slots, rope=rope,
                     backend=backend)  # fmt: skip


@append_kv.register_fake
def _(k: Tensor, v: Tensor | None, k_cache: Tensor, v_cache: Tensor | None, slots: Tensor,
      *args: Any, **kwargs: Any) -> None:  # fmt: skip
    return None


@torch.library.custom_op("kvlink::paged_attention", mutates_args=())
def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor | None,
    page_table: Tensor,
    seq_lens: Tensor,
    q_indptr: Tensor | None = None,
    page_indptr: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    mask: Tensor | None = None,
    mask_starts: Tensor | None = None,
    q_positions: Tensor | None = None,
    *,
    head_dim_v: int | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`kvlink.paged_attention` over one layer: (out, lse). Mutates nothing."""
    pool = _pool([k_cache], _listed(v_cache), head_dim_v, _listed(k_scale), _listed(v_scale))
    out, lse = kvlink.paged_attention(
        q.detach(), pool, 0, page_table, seq_lens, q_indptr=q_indptr, page_indptr=page_indptr,
        causal=causal, scale=scale, window=window, softcap=softcap, sinks=sinks,
        alibi_slopes=alibi_slopes, mask=mask, mask_starts=mask_starts, q_positions=q_positions,
        return_lse=True, backend=backend,
    )  # fmt: skip
    return out, lse


@paged_attention.register_fake
def _(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor | None,
    page_table: Tensor,
    seq_lens: Tensor,
    *args: Any,
    head_dim_v: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    dims = k_cache.shape[-1] if head_dim_v is None else head_dim_v
    if v_cache is not None:
        dims = v_cache.shape[-1]
    return q.new_empty((*q.shape[:2], dims)), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.custom_op("kvlink::merge_states", mutates_args=())
def merge_states(
    outs: Sequence[Tensor], lses: Sequence[Tensor], backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """`kvlink.merge_states` of lists: (out, lse). Mutates nothing."""
    out, lse = kvlink.merge_states(
        [each.detach() for each in outs], [each.detach() for each in lses], backend=backend
    )
    return out, lse


@merge_states.register_fake
def _(outs: Sequence[Tensor], lses: Sequence[Tensor], backend: str = "auto"
      ) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(outs[0]), torch.empty_like(lses[0])


@torch.library.custom_op(
    "kvlink::relayout_pages",
    mutates_args=("dst_k_cache", "dst_v_cache", "dst_k_scale", "dst_v_scale"),
)
def relayout_pages(
    src_k_cache: Sequence[Tensor],
    src_v_cache: Sequence[Tensor],
    src_pages: Tensor,
    dst_k_cache: Sequence[Tensor],
    dst_v_cache: Sequence[Tensor],
    dst_pages: Tensor,
    src_k_scale: Sequence[Tensor],
    src_v_scale: Sequence[Tensor],
    dst_k_scale: Sequence[Tensor],
    dst_v_scale: Sequence[Tensor],
    *,
    num_tokens: int,
    src_start: int = 0,
    dst_start: int = 0,
    src_kv_head: int = 0,
    dst_kv_head: int = 0,
    head_dim_v: int | None = None,
    token_position: int = 0,
    digest: bool = False,
    backend: str = "auto",
) -> Tensor:
    """`kvlink.relayout_pages` of the layers listed, in their order; latent ones come without V.

    Lists of scales are empty where there are none. The caches hold the model's KV heads from
    `src_kv_head` and `dst_kv_head` on; those that both hold are moved. Returns int64 [2] in host
    memory: rows, and the digest as a signed number (0 without `digest`). Mutates the destination's
    caches, and its scales where it has one a row.
    """
    src = _pool(src_k_cache, src_v_cache, head_dim_v, src_k_scale, src_v_scale)
    dst = _pool(dst_k_cache, dst_v_cache, head_dim_v, dst_k_scale, dst_v_scale)
    shards = [
        kvlink.Shard(range(pool.num_layers), range(head, head + pool.layout.num_kv_heads))
        for pool, head in ((src, src_kv_head), (dst, dst_kv_head))
    ]
    rows, found = kvlink.relayout_pages(
        src, src_pages, dst, dst_pages, num_tokens=num_tokens, src_start=src_start,
        dst_start=dst_start, src_shard=shards[0], dst_shard=shards[1],
        token_position=token_position, digest=digest, backend=backend,
    )  # fmt: skip
    return torch.tensor([rows, found - 2**64 if found >= 2**63 else found])


@relayout_pages.register_fake
def _(src_k_cache: Sequence[Tensor], *args: Any, **kwargs: Any) -> Tensor:
    return torch.empty(2, dtype=torch.int64, device="cpu")
