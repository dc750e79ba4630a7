"""Writing, moving and digesting pages of pools."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from kvlink import _C
from kvlink.errors import InvalidArgument, Unsupported
from kvlink.layout import Shard
from kvlink.pool import KVPool


class RelayoutResult(NamedTuple):
    """What was moved: rows (one KV head of one token in K or V of one layer) and their digest.

    Digests are 64-bit sums over rows: add up parts modulo 2**64, in any order. 0 if not asked for.
    """

    rows: int
    digest: int


def append_kv(k: Any, v: Any, pool: KVPool, layer: int, slots: Any) -> None:
    """Writes the K and V of new tokens into the slots of one layer, in the pool's dtype.

    `k` [num_tokens, num_kv_heads, head_dim] and `v` [num_tokens, num_kv_heads, head_dim_v] are
    float32, float16 or bfloat16 of any DLPack library, dim contiguous; `v` is None for latent
    pools. `slots` is int64 [num_tokens], `page * page_size + slot`; tokens with slot -1 are
    skipped. Quantised pools use their static scales, or compute one per row (`token_head`).
    Naming a slot twice leaves either token, or a mix of both, in it. Mutates the pool.

    Raises InvalidArgument (shapes, dtypes, a slot outside the pool: then nothing is written) and
    Unsupported (opaque pools).
    """
    _C.append_kv(k, v, pool.view, layer, slots)


def relayout_pages(
    src_pool: KVPool,
    src_pages: Any,
    dst_pool: KVPool,
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
) -> RelayoutResult:
    """Copies a run of tokens from one pool to another, whatever their layouts, dtypes and scales.

    `src_pages` and `dst_pages` are int32 page ids (array or sequence) in the order of the tokens;
    the run begins at slot `src_start` of the first listed source page and `dst_start` of the first
    listed destination page (both may exceed the page size). Moved are the layers and KV heads that
    both shards have; a shard defaults to all of its pool, numbered from 0. `layers` (model
    numbers) restricts them further. `token_position` is the first token's position in its request
    and enters the digest, which is taken over the destination's stored values.

    Rows of one dtype whose scales mean the same keep their bytes; others are converted through
    float32. Layers that share a stored layer are moved once, as the lowest of them. Mutates
    `dst_pool`; destination pages must not be source pages.

    Raises, before any byte is written: InvalidArgument (sizes, shards), PageTableError (an entry
    that is used names no page), Unsupported (forms that do not convert; a destination layer that
    would receive two different source layers).
    """
    src_shard = _checked_shard(src_pool, src_shard, "src_shard")
    dst_shard = _checked_shard(dst_pool, dst_shard, "dst_shard")
    moved = _stored_pairs(src_pool, src_shard, dst_pool, dst_shard, layers)
    heads = range(
        max(src_shard.kv_heads.start, dst_shard.kv_heads.start),
        min(src_shard.kv_heads.stop, dst_shard.kv_heads.stop),
    )
    if not moved or not heads:
        return RelayoutResult(0, 0)
    rows, value = _C.relayout_pages(
        src=src_pool.view,
        src_pages=_C.PageIds(src_pages, "src_pages"),
        dst=dst_pool.view,
        dst_pages=_C.PageIds(dst_pages, "dst_pages"),
        src_layers=[src for _, src, _ in moved],
        dst_layers=[dst for _, _, dst in moved],
        model_layers=[model for model, _, _ in moved],
        num_heads=len(heads),
        src_head=heads.start - src_shard.kv_heads.start,
        dst_head=heads.start - dst_shard.kv_heads.start,
        model_head=heads.start,
        num_tokens=num_tokens,
        src_start=src_start,
        dst_start=dst_start,
        token_position=token_position,
        digest=digest,
    )
    return RelayoutResult(rows, value)


def digest_pages(
    pool: KVPool,
    pages: Any,
    *,
    num_tokens: int,
    start: int = 0,
    shard: Shard | None = None,
    token_position: int = 0,
    layers: Iterable[int] | None = None,
) -> RelayoutResult:
    """Rows and digest of a run of tokens as stored: what relayout_pages reports for moving it here.

    Arguments and errors are those of `relayout_pages`; nothing is mutated.
    """
    shard = _checked_shard(pool, shard, "shard")
    stored: dict[int, int] = {}  # stored layer -> the lowest model layer it stands for
    for model in sorted(_wanted_layers(shard.layers, layers)):
        stored.setdefault(pool.layer_map[shard.layers.index(model)], model)
    if not stored:
        return RelayoutResult(0, 0)
    rows, value = _C.digest_pages(
        pool=pool.view,
        pages=_C.PageIds(pages, "pages"),
        layers=list(stored),
        model_layers=list(stored.values()),
        num_heads=len(shard.kv_heads),
        head=0,
        model_head=shard.kv_heads.start,
        num_tokens=num_tokens,
        start=start,
        token_position=token_position,
    )
    return RelayoutResult(rows, value)


def copy_pages(pool: KVPool, src_pages: Any, dst_pages: Any) -> None:
    """Copies whole pages inside a pool, in all stored layers: what copy-on-write needs.

    Page `src_pages[i]` goes to `dst_pages[i]`. Raises InvalidArgument (lengths differ, a
    destination is listed twice or is a source, too) and PageTableError (an id names no page).
    """
    src = _C.PageIds(src_pages, "src_pages")
    dst = _C.PageIds(dst_pages, "dst_pages")
    if len(src) != len(dst):
        raise InvalidArgument(f"dst_pages: expected {len(src)} pages; got {len(dst)}")
    stored = list(range(pool.num_stored_layers))
    _C.relayout_pages(
        src=pool.view, src_pages=src, dst=pool.view, dst_pages=dst,
        src_layers=stored, dst_layers=stored, model_layers=stored,
        num_heads=pool.layout.num_kv_heads, src_head=0, dst_head=0, model_head=0,
        num_tokens=len(src) * pool.layout.page_size, src_start=0, dst_start=0,
        token_position=0, digest=False,
    )  # fmt: skip


def _checked_shard(pool: KVPool, shard: Shard | None, name: str) -> Shard:
    if shard is None:
        return Shard(range(pool.num_layers), range(pool.layout.num_kv_heads))
    if (len(shard.layers), len(shard.kv_heads)) != (pool.num_layers, pool.layout.num_kv_heads):
        raise InvalidArgument(
            f"{name}: expected {pool.num_layers} layers and {pool.layout.num_kv_heads} KV heads, "
            f"as the pool has; got {len(shard.layers)} and {len(shard.kv_heads)}"
        )
    return shard


def _wanted_layers(held: Iterable[int], layers: Iterable[int] | None) -> list[int]:
    """Model layers, in the order of `held`, that `layers` lets through."""
    if layers is None:
        return list(held)
    wanted = set(layers)
    missing = wanted - set(held)
    if missing:
        raise InvalidArgument(
            f"layers: expected layers that are held, {sorted(held)}; got {sorted(missing)}"
        )
    return [model for model in held if model in wanted]


def _stored_pairs(
    src_pool: KVPool,
    src_shard: Shard,
    dst_pool: KVPool,
    dst_shard: Shard,
    layers: Iterable[int] | None,
) -> list[tuple[int, int, int]]:
    """(model layer, stored source layer, stored destination layer), each destination once."""
    src_index = {model: i for i, model in enumerate(src_shard.layers)}
    dst_index = {model: i for i, model in enumerate(dst_shard.layers)}
    pairs: dict[int, tuple[int, int]] = {}  # stored destination -> (model layer, stored source)
    for model in sorted(_wanted_layers(src_index.keys() & dst_index.keys(), layers)):
        src = src_pool.layer_map[src_index[model]]
        dst = dst_pool.layer_map[dst_index[model]]
        first, already = pairs.setdefault(dst, (model, src))
        if already != src:
            raise Unsupported(
                f"layers {first} and {model} share a stored layer of the destination, but not of "
                "the source; it cannot hold both"
            )
    return [(model, src, dst) for dst, (model, src) in pairs.items()]
