"""paged_attention as Triton kernels. See `kvlink.paged_attention`.

Decode (one row per sequence) is cut at fixed positions into splits that run side by side and are
joined by a second kernel; with `q_indptr` a program goes through all that its rows see.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kvlink.errors import Unsupported
from kvlink.triton import configs
from kvlink.triton.arguments import short_name
from kvlink.triton.attention_arguments import AttentionArguments, read_arguments
from kvlink.triton.error_record import record, report_errors
from kvlink.triton.paged_attention_kernels import attention_kernel, join_splits_kernel
from kvlink.triton.tensor_pool import TensorPool, as_tensor_pool, on_stream, strides_of

_DTYPES = {"float32": tl.float32, "float16": tl.float16, "bfloat16": tl.bfloat16}
_DECODE_ROWS = 64  # of a group of query heads that one program takes at most


def paged_attention(
    q: Any,
    pool: Any,
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
    plan: Any = None,
    ready: Any = None,
    out: Any = None,
    lse: Any = None,
    return_lse: bool = False,
    stream: int | None = None,
) -> Any:
    """See `kvlink.paged_attention`; `pool` is a TensorPool or a KVPool. Returns torch tensors.

    All arrays are on the pool's device (lists are copied there) and the work is queued on `stream`,
    by default torch's current one. Page ids, lengths and starts that are on a device are not waited
    for: entries outside the pool are skipped, and raised as PageTableError by a later call. `lse`
    is written to if given. Raises Unsupported for `plan` and `ready`, for rows beyond 576 (K) or
    512 (V) elements, and on devices before compute capability 8.0.
    """
    for name, value in (("plan", plan), ("ready", ready)):
        if value is not None:
            raise Unsupported(
                f"{name}: expected None, as triton lacks feature {name!r}; got {type(value)}"
            )
    report_errors()
    cache = as_tensor_pool(pool)
    index = cache.stored(layer)
    with on_stream(cache.device, stream):
        if return_lse and lse is None:
            lse = torch.empty(tuple(q.shape)[:2], dtype=torch.float32, device=cache.device)
        arguments = read_arguments(
            cache, q, page_table, seq_lens, q_indptr, page_indptr, sinks, alibi_slopes, out, lse,
            causal, window, softcap, q_positions, mask, mask_starts, page_generations,
            expected_generations,
        )  # fmt: skip
        if arguments.q.numel():
            scale = cache.head_dim**-0.5 if scale is None else scale
            _launch(arguments, cache, index, causal, scale, window or 0, softcap or 0.0)
    return (arguments.out, arguments.lse) if return_lse else arguments.out


def _launch(
    a: AttentionArguments, cache: TensorPool, index: int, causal: bool, scale: float, window: int,
    softcap: float,
) -> None:  # fmt: skip
    num_tokens, num_q_heads, _ = a.q.shape
    group = num_q_heads // cache.num_kv_heads
    num_seqs = len(a.seq_lens)
    shape = tile_shape(cache, short_name(a.q.dtype))
    decode = a.q_indptr is None
    wide = tl.float32 in (shape["OPERAND"], shape["OPERAND_V"])
    capability = _capability(cache.device)
    max_rows = min(group, _DECODE_ROWS) if decode else 128
    config = configs.attention(
        capability, max_rows, shape["MAIN"] + shape["REST"], "float32" if wide else cache.dtype
    )
    m = config.m
    num_splits, num_states = 1, 0
    out, lse, out_strides = a.out, a.lse, a.out.stride()[:2]
    if decode:
        num_entries = a.page_table.shape[-1]
        num_splits = max(1, triton.cdiv(num_entries * cache.page_size, configs.SPLIT))
        num_states = num_seqs * num_splits
        if a.page_indptr is not None:  # the table's entries are all sequences' together
            num_states = num_entries * cache.page_size // configs.SPLIT + num_seqs
        units = num_states * triton.cdiv(group, m)
        if num_splits > 1:
            sizes = (num_states, num_q_heads)
            out = torch.empty((*sizes, cache.head_dim_v), dtype=torch.float32, device=a.q.device)
            lse = torch.empty(sizes, dtype=torch.float32, device=a.q.device)
    else:
        units = num_tokens * group // m + num_seqs
    k_scale, v_scale = cache.scales_of(index)
    attention_kernel[(units, cache.num_kv_heads)](
        a.q, out, lse, a.q_indptr, a.seq_lens, a.page_table, a.page_indptr,
        cache.k[index], cache.v[index], k_scale, v_scale, a.sinks, a.alibi_slopes,
        a.q_positions, a.mask, a.mask_starts, a.generations, a.expected_generations, record(),
        a.q.stride()[:2], out_strides, cache.k[index].stride(), cache.v[index].stride(),
        strides_of(k_scale), strides_of(v_scale),
        a.page_table.stride(0), _stride(a.expected_generations), _stride(a.mask),
        0 if a.mask is None else a.mask.shape[1], a.page_table.shape[-1], cache.num_pages,
        num_seqs, num_tokens, num_splits, scale, softcap, window,
        CAUSAL=causal, HAS_WINDOW=window > 0, HAS_SOFTCAP=softcap > 0,
        PER_TOKEN=cache.scale == "token_head", KIND=cache.dtype,
        OUT_KIND=short_name(a.q.dtype), NATIVE_FP8=capability >= 89,
        PAGE_SIZE=cache.page_size, NUM_KV_HEADS=cache.num_kv_heads, GROUP=group,
        SPLIT=configs.SPLIT, IN_SPLITS=num_splits > 1, M=m, N=config.n, **shape,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=False,
    )  # fmt: skip
    if num_splits > 1:
        assert lse is not None
        join_splits_kernel[(num_seqs, num_q_heads)](
            out, lse, a.out, a.lse, a.seq_lens, a.page_indptr, a.sinks, a.q_positions, out_strides,
            a.page_table.shape[-1], num_splits, window,
            CAUSAL=causal, HAS_WINDOW=window > 0, OUT_KIND=short_name(a.q.dtype),
            NUM_Q_HEADS=num_q_heads, HEAD_DIM_V=cache.head_dim_v, DIMS_V=shape["DIMS_V"],
            PAGE_SIZE=cache.page_size,
            SPLIT=configs.SPLIT, STATES=configs.STATES,
            num_warps=4 if shape["DIMS_V"] <= 128 else 8, enable_fp_fusion=False,
        )  # fmt: skip


def _stride(rows: torch.Tensor | None) -> int:
    return 0 if rows is None else rows.stride(0)


def tile_shape(pool: TensorPool, q_dtype: str) -> dict[str, Any]:
    """The constants of `attention_kernel` that follow from the pool and q's dtype.

    A row of K is a power of two of elements, MAIN, and the REST up to another one: 576 are 512 and
    64. Products are of q's dtype where that holds K's values exactly, else of float32; those of V
    of V's own, bfloat16 if it is one byte wide. Weights are rounded to that if q is of it, but not
    over latent rows, where a kernel of one product spills on sm_80.
    """
    main = max(16, 1 << (pool.head_dim.bit_length() - 1))
    left = pool.head_dim - main
    narrow = pool.dtype in ("float8_e4m3", "float8_e5m2", "int8")
    operand_v = "bfloat16" if narrow else pool.dtype
    if pool.dtype == "float16" and pool.scale == "token_head":
        operand_v = "float32"  # a weight times a scale may leave float16's range
    dims_v = max(16, 1 << (pool.head_dim_v - 1).bit_length())
    return dict(
        OPERAND=_DTYPES[q_dtype if narrow or q_dtype == pool.dtype else "float32"],
        OPERAND_V=_DTYPES[operand_v],
        ROUNDED=q_dtype == operand_v and pool.has_v_plane,
        HEAD_DIM=pool.head_dim,
        HEAD_DIM_V=pool.head_dim_v,
        MAIN=main,
        REST=0 if left <= 0 else max(16, 1 << (left - 1).bit_length()),
        DIMS_V=dims_v,
        V_IS_MAIN=not pool.has_v_plane and pool.head_dim_v == main == dims_v,
    )


def _capability(device: torch.device) -> int:
    """80, 90, ...; from 89 on devices convert float8_e4m3 by themselves."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    if 10 * major + minor < configs.MIN_CAPABILITY:
        raise Unsupported(
            f"device: triton supports compute capability 8.0 and above; got {major}.{minor}"
        )
    return 10 * major + minor
