"""Prefill on several ranks, each of which holds and sends its part of the KV heads.

Every rank runs the whole model, so that a token does not depend on how many there are: what is
divided is the transfer. An engine with tensor parallelism divides the computation, too; the
transfers are the same.
"""

from __future__ import annotations

from typing import Any

from kvlink import KVPool, Shard
from kvlink.serving.config import ModelConfig


def rank_name(rank: int, num_ranks: int) -> str:
    """Of a prefill worker, for people."""
    return "prefill" if num_ranks == 1 else f"prefill-{rank}"


def shard_of(config: ModelConfig, rank: int, num_ranks: int) -> Shard:
    """What a rank holds for the peer. With more ranks than KV heads, those of one head divide its
    layers."""
    return Shard.of_rank(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        tp_rank=rank,
        tp_size=num_ranks,
    )


def head_view(pool: KVPool, heads: range) -> KVPool:
    """Some KV heads of a pool as a pool of their own, over the same memory. Peers cannot map it."""
    import torch.utils.dlpack

    if len(heads) == pool.layout.num_kv_heads:
        return pool
    kept = slice(heads.start, heads.stop)

    def cut(*arrays: Any) -> tuple[Any, ...]:
        return tuple(torch.utils.dlpack.from_dlpack(array)[:, :, kept] for array in arrays)

    layers = range(pool.num_layers)
    with_scales = pool.layout.has_scales
    return KVPool.wrap(
        [cut(pool.k(layer), pool.v(layer)) for layer in layers],
        "page slot head dim",
        scale=pool.layout.scale,
        scales=[cut(pool.k_scale(i), pool.v_scale(i)) for i in layers] if with_scales else None,
    )
