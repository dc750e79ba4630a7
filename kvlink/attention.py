"""`paged_attention`, and how a backend is chosen for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvlink import _C
from kvlink._arguments import (
    UNEXPLAINED,
    Check,
    a,
    array,
    array_or_integers,
    each,
    explain,
    flag,
    integer,
    number,
    optional,
    text,
    wrong,
)  # fmt: skip
from kvlink._arrays import (
    as_int32,
    as_page_table,
    as_reference,
    dtype_of,
    empty_like,
    from_reference,
    writable_or_copy,
)  # fmt: skip
from kvlink._attention_choice import choose_after_cuda, choose_for, with_implied
from kvlink._cuda_part import cuda_ops, stream_of
from kvlink._readiness import ready_feature, ready_items, waitable
from kvlink.backends import (
    FLOATS,
    STORED,
    TRITON_DEVICES,
    TRITON_PACKAGES,
    Capabilities,
    Choice,
    choose,
)
from kvlink.errors import InvalidArgument, Unsupported
from kvlink.pool import KVPool

_FEATURES = frozenset(
    {
        "decode", "extend", "ragged", "bidirectional", "window", "softcap", "sinks",
        "alibi_slopes", "lse", "out", "csr_page_table", "head_dim_v", "latent", "ready",
        "mixed_dtypes", "any_head_dim", "large_head_dim", "any_strides", "unaligned_rows",
        "scaled_floats",
    }
)  # fmt: skip
_SELECTING = {"mask", "q_positions", "generations"}
_ON_CUDA = (_FEATURES | _SELECTING | {"ready_counters"}) - {
    "ready", "any_head_dim", "large_head_dim", "any_strides", "unaligned_rows", "scaled_floats",
}  # fmt: skip
_ON_TRITON = (_FEATURES - {"ready", "large_head_dim"}) | _SELECTING
_CUDA_PART = ("kvlink._cuda",)
_INTEGERS = optional(array_or_integers)

# In order of preference.
BACKENDS = (
    Capabilities(
        "cpu", frozenset({"cpu"}), FLOATS, STORED, _FEATURES | _SELECTING | {"plan", "cascade"}
    ),
    Capabilities("cuda", frozenset({"cuda"}), FLOATS, STORED, _ON_CUDA, packages=_CUDA_PART),
    Capabilities("triton", TRITON_DEVICES, FLOATS, STORED, _ON_TRITON, packages=TRITON_PACKAGES),
    Capabilities(
        "reference", frozenset({"cpu"}), FLOATS, STORED, _FEATURES | _SELECTING, automatic=False
    ),
)

# Of what no other check has refused.
_CHECKS: dict[str, Check] = {
    "q": array, "pool": a(KVPool), "layer": integer, "page_table": array_or_integers,
    "seq_lens": array_or_integers, "q_indptr": _INTEGERS, "page_indptr": _INTEGERS, "causal": flag,
    "scale": optional(number), "window": optional(integer), "softcap": optional(number),
    "page_generations": optional(array), "expected_generations": optional(array),
    "ready_timeout": number, "backend": text, "ready": optional(waitable),
    "stream": optional(integer),
}  # fmt: skip


def choose_backend(
    q_dtype: str, pool: KVPool, features: Sequence[str] = (), backend: str = "auto"
) -> Choice:
    """(name, why) of the backend that `paged_attention` takes for such a call.

    `features` names what the call needs beyond plain causal decode: "extend", "window", "sinks",
    "mask", ... Raises Unsupported naming what is missing when no backend (or not the one asked
    for) can do it, InvalidArgument when there is no such backend.
    """
    text("q_dtype", q_dtype)
    a(KVPool)("pool", pool)
    each(text)("features", features)
    features = with_implied(features, pool, q_dtype)
    return choose(BACKENDS, backend, pool.device, q_dtype, pool.layout.dtype, features)


def paged_attention(
    q: Any,
    pool: KVPool,
    layer: int,
    page_table: Any,
    seq_lens: Any,
    *,
    q_indptr: Any = None,
    page_indptr: Any = None,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Any = None,
    alibi_slopes: Any = None,
    mask: Any = None,
    mask_starts: Any = None,
    q_positions: Any = None,
    page_generations: Any = None,
    expected_generations: Any = None,
    out: Any = None,
    return_lse: bool = False,
    plan: _C.AttentionPlan | None = None,
    backend: str = "auto",
    ready: Any = None,
    ready_timeout: float = 1.0,
    stream: int | None = None,
) -> Any:
    """Attention of new tokens over their sequences' pages: decode, extend, or both in one batch.

    `q` [T, Hq, head_dim] float32, float16 or bfloat16 of any DLPack library, dim contiguous.
    Without `q_indptr` every sequence has one row (decode, T = B); with it (int32 [B + 1]) sequence
    b owns rows q_indptr[b] to q_indptr[b + 1]. `seq_lens` int32 [B] counts the new tokens, which
    are the last of their sequence and whose K and V are in the pool already; 0 marks an idle place.
    `page_table` int32 [B, max_pages], or CSR: int32 [n] with `page_indptr` int32 [B + 1]. Lists
    are taken for the int32 arguments, too. Entries that are not read may hold anything.

    Scores are scale * q.k (`scale` defaults to head_dim ** -0.5), then softcap * tanh(s / softcap),
    then + alibi_slopes[head] * (kv_pos - q_pos). `causal` hides later positions; `window=w` hides
    all but the last w up to the query's own (later ones are the business of `causal`). `sinks`
    float32 [Hq] are one more logit per head, without a value. `alibi_slopes` float32 [Hq].

    `q_positions` int32 [T]: the rows are not the last tokens, but those at these positions, rising
    within a sequence (a later layer that only some new tokens enter). `mask` uint8 [T, n]: what a
    row sees of the positions from `mask_starts[b]` on (int32 [B]; default: its first new token, so
    that a tree of drafts needs a bit per draft): bit j % 8 of byte j // 8 stands for the j-th of
    them. It hides more than `causal` and `window` do, and shows nothing that they hide.
    `expected_generations` (uint32, shaped as `page_table`): every page that is read must still be
    of that generation in `page_generations` uint32 [num_pages] (`PageAllocator.generations`).

    Returns out [T, Hq, head_dim_v] in q's dtype and library, written into `out` if given; with
    `return_lse=True` (out, lse), lse float32 [T, Hq]: natural log of the softmax denominator, sink
    included. A row that sees nothing gives zeros and -inf. Sums are float32; weights may be rounded
    to q's dtype before they meet V (docs/architecture.md says by which kernels). Slots past seq_len
    never matter, whatever they hold; a row's bits depend neither on the rest of the batch nor on
    the number of threads. Sequences whose page tables begin with the same pages read those
    together; that, and `plan` (`plan_attention`), changes no bit, either.

    `ready`: what must have landed before a page of the layer is read: a Readiness
    (`Grant.readiness(layer)`), or several of them. The call waits for it without the GIL, at most
    `ready_timeout` seconds. What has landed is not verified yet: drop the result if the grant then
    fails.

    On a CUDA pool all arrays are on its device, nothing is waited for, and the work is queued on
    `stream` as for `append_kv`. "cuda" takes no lists; a CUDA graph may capture its call; an entry
    of the page table that names no page, a wrong length or a wrong indptr is never used there, and
    raised by a later call; a row's bits depend on whether `q_indptr` is given, too. `ready` is a
    list of (counter, target) there: the device waits until each counter, int64 [1] on it or in
    page-locked host memory, has reached its target; when `ready_timeout` passes first, rows get
    zeros and -inf, and a later call raises NotReady.

    `backend` is "auto" or the name of one in BACKENDS; see `choose_backend`. Raises
    InvalidArgument, PageTableError (an entry that would be read is unmapped, names no page, or a
    page of another generation), Unsupported, NotReady (`ready_timeout` has passed), NeverReady (the
    transfer has failed). Nothing is written then.
    """
    try:
        q_dtype, layout = dtype_of(q, "q"), pool.layout
        asked = (
            q_dtype, backend, None if ready is None else ready_feature(ready),
            mask is None, plan is None, sinks is None, alibi_slopes is None, window is None,
            softcap is None, page_indptr is None, q_positions is None, expected_generations is None,
        )  # fmt: skip
        chosen = pool.choices.get(asked) or choose_for(BACKENDS, pool, asked)
        if window is not None and window < 1:
            raise InvalidArgument(f"window: expected >= 1 or None; got {window}")
        if softcap is not None and not softcap > 0:
            raise InvalidArgument(f"softcap: expected > 0 or None; got {softcap}")
        q_shape = q.shape
        if len(q_shape) != 3:
            raise InvalidArgument(f"q: expected shape [T, Hq, head_dim]; got {tuple(q_shape)}")
        if (page_generations is None) != (expected_generations is None):
            raise InvalidArgument(
                "expected_generations: comes with page_generations, and vice versa"
            )
        if mask is None and mask_starts is not None:
            raise InvalidArgument("mask_starts: expected None without a mask")
        if mask is not None and mask_starts is None and q_positions is not None:
            raise InvalidArgument("mask_starts: expected, since q_positions are given")
        if plan is not None and not isinstance(plan, _C.AttentionPlan):
            raise wrong("plan", "what plan_attention returns", plan)
        if return_lse is not False and return_lse is not True:
            flag("return_lse", return_lse)
        if out is None:
            out = empty_like(q, (q_shape[0], q_shape[1], layout.head_dim_v))
        lse = empty_like(q, (q_shape[0], q_shape[1]), "float32") if return_lse else None
        if expected_generations is not None:
            page_generations = writable_or_copy(page_generations)
            expected_generations = writable_or_copy(expected_generations)
        # NOTE: by position, which is twice as fast into C++ as by name.
        arguments = (
            q, pool.view, layer, as_page_table(page_table),
            as_int32(seq_lens, "seq_lens"),
            None if q_indptr is None else as_int32(q_indptr, "q_indptr"),
            None if page_indptr is None else as_int32(page_indptr, "page_indptr"),
            causal, layout.head_dim**-0.5 if scale is None else scale, window or 0, softcap or 0.0,
            sinks, alibi_slopes, out, lse,
        )  # fmt: skip
        selecting = (None, None, None, None, None)
        if q_positions is not None or mask is not None or expected_generations is not None:
            selecting = (
                as_int32(q_positions, "q_positions"), mask, as_int32(mask_starts, "mask_starts"),
                page_generations, expected_generations,
            )  # fmt: skip
        if chosen == "cuda":
            counters = [] if ready is None else list(ready)
            on_stream = stream_of(pool.device, stream)
            try:
                cuda_ops().paged_attention(
                    *arguments, *selecting, counters, ready_timeout, on_stream
                )
                return (out, lse) if return_lse else out
            except Unsupported as error:
                chosen = choose_after_cuda(BACKENDS, pool, asked, error)
        if chosen == "triton":
            _triton_ops().paged_attention(
                q, pool, layer, page_table, seq_lens, q_indptr=q_indptr, page_indptr=page_indptr,
                causal=causal, scale=scale, window=window, softcap=softcap, sinks=sinks,
                alibi_slopes=alibi_slopes, q_positions=q_positions, mask=mask,
                mask_starts=mask_starts, page_generations=page_generations,
                expected_generations=expected_generations, out=out, lse=lse, stream=stream,
            )  # fmt: skip
            return (out, lse) if return_lse else out
        awaited = [] if ready is None else ready_items(ready)
        if chosen == "reference":
            _C.wait_ready(awaited, ready_timeout)
            _run_reference(pool, arguments, selecting)
        else:
            _C.paged_attention(*arguments, awaited, ready_timeout, *selecting, plan)
        return (out, lse) if return_lse else out
    except UNEXPLAINED as error:
        explain(error, _CHECKS, locals())
        raise


def _run_reference(pool: KVPool, arguments: tuple[Any, ...], selecting: tuple[Any, ...]) -> None:
    from kvlink.reference.paged_attention import paged_attention as reference

    q, _, layer, page_table, seq_lens, q_indptr, page_indptr, causal, scale, window = arguments[:10]
    softcap, sinks, alibi_slopes, out, lse = arguments[10:]
    names = (
        "q_positions", "mask", "mask_starts", "page_generations", "expected_generations",
    )  # fmt: skip
    result, result_lse = reference(
        as_reference(q), pool, layer, as_reference(page_table), as_reference(seq_lens),
        q_indptr=as_reference(q_indptr), page_indptr=as_reference(page_indptr), causal=causal,
        scale=scale, window=window or None, softcap=softcap or None, sinks=as_reference(sinks),
        alibi_slopes=as_reference(alibi_slopes),
        **{name: as_reference(array) for name, array in zip(names, selecting, strict=True)},
    )  # fmt: skip
    from_reference(result, out)
    if lse is not None:
        from_reference(result_lse, lse)


def _triton_ops() -> Any:
    import kvlink.triton

    return kvlink.triton
