"""Writing, moving and digesting pages of pools."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from kvlink import _C
from kvlink._arguments import (
    Check,
    a,
    array,
    array_or_integers,
    checked,
    counter,
    each,
    flag,
    index_of,
    integer,
    integer_or_integers,
    integers,
    number,
    optional,
    text,
)  # fmt: skip
from kvlink._arrays import as_reference, dtype_of
from kvlink._cuda_part import cuda_ops, on_cuda, stream_of
from kvlink._layer_pairs import checked_shard, shared_heads, stored_layers, stored_pairs
from kvlink._moving import (
    RELAYOUT_BACKENDS,
    DeviceOptions,
    RelayoutResult,
    digest_rows,
    move_rows,
)
from kvlink.backends import (
    FLOATS,
    STORED,
    TRITON_DEVICES,
    TRITON_PACKAGES,
    Capabilities,
    choose_name,
)
from kvlink.errors import InvalidArgument
from kvlink.layout import Shard
from kvlink.pool import KVPool
from kvlink.rope import Rope, rope_fields

__all__ = ["APPEND_BACKENDS", "RELAYOUT_BACKENDS", "RelayoutResult", "append_kv", "copy_pages",
           "digest_pages", "relayout_pages"]  # fmt: skip

_APPEND = frozenset({"layers", "rope"})

# What append_kv does where, in order of preference.
APPEND_BACKENDS = (
    Capabilities("cpu", frozenset({"cpu"}), FLOATS, STORED, _APPEND),
    Capabilities(
        "cuda", frozenset({"cuda"}), FLOATS, STORED, _APPEND, packages=("kvlink._cuda",)
    ),
    Capabilities("triton", TRITON_DEVICES, FLOATS, STORED, _APPEND, packages=TRITON_PACKAGES),
    Capabilities("reference", frozenset({"cpu"}), FLOATS, STORED, _APPEND, automatic=False),
)  # fmt: skip


_LAYERS = optional(integers)
_SHARD = optional(a(Shard))
_ON_DEVICE: dict[str, Check] = {
    "digest_into": optional(array), "ready": optional(each(counter)), "ready_timeout": number,
    "stream": optional(integer), "backend": text,
}  # fmt: skip


@checked(k=array, v=optional(array), pool=a(KVPool), layer=integer_or_integers, slots=array,
         rope=optional(rope_fields), stream=optional(integer), backend=text)  # fmt: skip
def append_kv(
    k: Any,
    v: Any,
    pool: KVPool,
    layer: int | Sequence[int],
    slots: Any,
    *,
    rope: Rope | None = None,
    stream: int | None = None,
    backend: str = "auto",
) -> None:
    """Writes the K and V of new tokens into the slots of one layer or many, in the pool's dtype.

    `k` [num_tokens, num_kv_heads, head_dim] and `v` [num_tokens, num_kv_heads, head_dim_v] are
    float32, float16 or bfloat16 of any DLPack library, dim contiguous; `v` is None for latent
    pools. With a sequence of layers both have an axis more, of the layers in their order, outside
    the others (by strides it may lie anywhere). `slots` is int64 [num_tokens], `page * page_size +
    slot`; tokens with slot -1 are skipped. `rope` turns K on its way, in float32. Quantised pools
    use their static scales, or compute one per row (`token_head`). Naming a slot twice leaves
    either token, or a mix of both, in it. Mutates the pool.

    Raises InvalidArgument (shapes, dtypes, a slot outside the pool, a position outside the rope's
    table: then nothing is written) and Unsupported (opaque pools; what no backend does). On a CUDA
    pool all arrays are on its device and the work is queued on `stream` (a handle; default: torch's
    current stream if torch is loaded, else the default stream); a token whose slot is outside the
    pool, or its position outside the table, is skipped and raised by a later call. `backend` is
    "auto" or the name of one in APPEND_BACKENDS.
    """
    if not isinstance(layer, int):
        number = index_of(layer)
        layer = _distinct_layers(pool, layer) if number is None else number
    name = "cpu"
    if backend != "auto" or rope is not None or _on_cuda(pool):
        needed = [] if rope is None else ["rope"]
        dtypes = dtype_of(k, "k"), pool.layout.dtype
        name = choose_name(APPEND_BACKENDS, backend, pool.device, *dtypes, needed, of="k")
    if name == "triton":
        _triton_ops().append_kv(k, v, pool, layer, slots, rope=rope, stream=stream)
    elif name == "cuda":
        cuda_ops().append_kv(k, v, pool.view, layer, slots, rope, stream_of(pool.device, stream))
    elif name == "reference":
        _append_by_definition(k, v, pool, layer, slots, rope)
    else:
        _C.append_kv(k, v, pool.view, layer, slots, rope)


def _append_by_definition(
    k: Any, v: Any, pool: KVPool, layer: int | Sequence[int], slots: Any, rope: Rope | None
) -> None:
    from kvlink.reference.append_kv import append_kv as reference

    if rope is not None:
        cos_sin, positions = as_reference(rope.cos_sin), as_reference(rope.positions)
        rope = rope._replace(cos_sin=cos_sin, positions=positions)
    reference(as_reference(k), as_reference(v), pool, layer, as_reference(slots), rope=rope)


@checked(src_pool=a(KVPool), src_pages=array_or_integers, dst_pool=a(KVPool),
         dst_pages=array_or_integers, num_tokens=integer, src_start=integer, dst_start=integer,
         src_shard=_SHARD, dst_shard=_SHARD, layers=_LAYERS, token_position=integer, digest=flag,
         raises=optional(each(array)), **_ON_DEVICE)  # fmt: skip
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
    digest_into: Any = None,
    ready: Any = None,
    ready_timeout: float = 1.0,
    raises: Any = None,
    stream: int | None = None,
    backend: str = "auto",
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
    would receive two different source layers; pools on two devices). On CUDA the work is queued on
    `stream` as for `append_kv`; page ids may be on the device; bad ones are skipped and raised by
    a later call; that destination pages are distinct is not checked. A digest is waited for, unless
    it goes into `digest_into`, int64 [1] on the device, to which it is added (the result has 0
    then): whoever reads that waits. `ready` and `ready_timeout` are those of `paged_attention` on
    CUDA: nothing is moved when a counter has not reached its target in time. `raises`: up to 16
    such counters, int64 [1], that grow by one when all rows are there (and not if nothing had to
    be moved, a page id was bad or the time was over). With page ids on the device, a CUDA graph
    may capture a call that waits for no digest. `backend` is "auto" or the name of one in
    RELAYOUT_BACKENDS.
    """
    src_shard = _shard_of(src_pool, src_shard, "src_shard")
    dst_shard = _shard_of(dst_pool, dst_shard, "dst_shard")
    moved = stored_pairs(src_pool.layer_map, src_shard, dst_pool.layer_map, dst_shard, layers)
    heads = shared_heads(src_shard, dst_shard)
    if not moved or not heads:
        return RelayoutResult(0, 0)
    return move_rows(
        src_pool, src_pages, dst_pool, dst_pages, backend, stream,
        src_layers=[src for _, src, _ in moved],
        dst_layers=[dst for _, _, dst in moved],
        model_layers=[model for model, _, _ in moved],
        num_heads=len(heads),
        src_head=heads.start - src_shard.kv_heads.start,
        dst_head=heads.start - dst_shard.kv_heads.start,
        model_head=heads.start,
        num_tokens=num_tokens, src_start=src_start, dst_start=dst_start,
        token_position=token_position, digest=digest,
        on_device=DeviceOptions(digest_into, ready, ready_timeout, raises),
    )  # fmt: skip


@checked(pool=a(KVPool), pages=array_or_integers, num_tokens=integer, start=integer, shard=_SHARD,
         layers=_LAYERS, token_position=integer, **_ON_DEVICE)  # fmt: skip
def digest_pages(
    pool: KVPool,
    pages: Any,
    *,
    num_tokens: int,
    start: int = 0,
    shard: Shard | None = None,
    token_position: int = 0,
    layers: Iterable[int] | None = None,
    digest_into: Any = None,
    ready: Any = None,
    ready_timeout: float = 1.0,
    stream: int | None = None,
    backend: str = "auto",
) -> RelayoutResult:
    """Rows and digest of a run of tokens as stored: what relayout_pages reports for moving it here.

    Arguments and errors are those of `relayout_pages`; nothing is mutated.
    """
    shard = _shard_of(pool, shard, "shard")
    stored = stored_layers(pool.layer_map, shard, layers)
    if not stored:
        return RelayoutResult(0, 0)
    return digest_rows(
        pool, pages, backend, stream,
        layers=list(stored), model_layers=list(stored.values()), num_heads=len(shard.kv_heads),
        head=0, model_head=shard.kv_heads.start, num_tokens=num_tokens, start=start,
        token_position=token_position,
        on_device=DeviceOptions(digest_into, ready, ready_timeout),
    )  # fmt: skip


@checked(pool=a(KVPool), src_pages=array_or_integers, dst_pages=array_or_integers,
         stream=optional(integer), backend=text)  # fmt: skip
def copy_pages(
    pool: KVPool,
    src_pages: Any,
    dst_pages: Any,
    *,
    stream: int | None = None,
    backend: str = "auto",
) -> None:
    """Copies whole pages inside a pool, in all stored layers: what copy-on-write needs.

    Page `src_pages[i]` goes to `dst_pages[i]`; both have a length. Raises InvalidArgument (lengths
    differ, a destination is listed twice or is a source, too) and PageTableError (an id names no
    page). `stream` and `backend` as for `relayout_pages`.
    """
    if len(src_pages) != len(dst_pages):
        raise InvalidArgument(
            f"dst_pages: expected {len(src_pages)} pages; got {len(dst_pages)}, not as many as "
            "src_pages has"
        )
    stored = list(range(pool.num_stored_layers))
    move_rows(
        pool, src_pages, pool, dst_pages, backend, stream,
        src_layers=stored, dst_layers=stored, model_layers=stored,
        num_heads=pool.layout.num_kv_heads, src_head=0, dst_head=0, model_head=0,
        num_tokens=len(src_pages) * pool.layout.page_size, src_start=0, dst_start=0,
        token_position=0, digest=False, on_device=DeviceOptions(),
    )  # fmt: skip


def _shard_of(pool: KVPool, shard: Shard | None, name: str) -> Shard:
    return checked_shard(shard, pool.num_layers, pool.layout.num_kv_heads, name)


def _on_cuda(pool: KVPool) -> bool:
    return on_cuda(pool.device)


def _triton_ops() -> Any:
    import kvlink.triton

    return kvlink.triton


def _distinct_layers(pool: KVPool, layers: Sequence[int]) -> list[int]:
    """The layers as a list, each with memory of its own."""
    listed = integers("layer", layers)
    stored = [pool.layer_map[layer] for layer in listed if 0 <= layer < pool.num_layers]
    if len(set(stored)) != len(stored):
        raise InvalidArgument(f"layer: expected distinct stored layers; got {listed}")
    return listed
