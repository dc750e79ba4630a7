"""`plan_attention`: the division of attention work, made once and used by many calls."""

from __future__ import annotations

from typing import Any

from kvlink import _C
from kvlink._arguments import a, array_or_integers, checked, flag, integer, optional, within, wrong
from kvlink._arrays import as_int32, as_page_table
from kvlink._cuda_part import on_cuda
from kvlink.errors import InvalidArgument, Unsupported
from kvlink.pool import KVPool

_INTEGERS = optional(array_or_integers)


@checked(pool=a(KVPool), page_table=array_or_integers, seq_lens=array_or_integers,
         num_q_heads=within(1, 2**31 - 1), q_indptr=_INTEGERS, page_indptr=_INTEGERS, causal=flag,
         window=optional(integer), max_seq_lens=_INTEGERS)  # fmt: skip
def plan_attention(
    pool: KVPool,
    page_table: Any,
    seq_lens: Any,
    *,
    num_q_heads: int,
    q_indptr: Any = None,
    page_indptr: Any = None,
    causal: bool = True,
    window: int | None = None,
    max_seq_lens: Any = None,
) -> _C.AttentionPlan:
    """Divides the work of `paged_attention` calls once, for all layers of a step or many steps.

    Arguments as there. The plan serves any call of the CPU backend with as many sequences, the same
    `q_indptr`, head counts, head dims and page size, and lengths up to `max_seq_lens` (int32 [B];
    default: `seq_lens`), whatever its window, its mask, its pages and its dtypes; others raise
    InvalidArgument. Results are the same bits with any plan and without one: a plan decides who
    computes what, and is balanced for the lengths, window and threads that it was made with.
    Leading pages that sequences share are found here, and looked at again in every call.

    Attributes: `num_tasks`; `shared_prefixes`: (sequences, leading tokens that are read once).
    Raises InvalidArgument, Unsupported (a pool on a CUDA device).
    """
    if on_cuda(pool.device):
        raise Unsupported(
            "plan_attention: cuda and triton lack feature 'plan'; they divide the work on the "
            "device, call by call: leave `plan` out"
        )
    if window is not None and window < 1:
        raise InvalidArgument(f"window: expected >= 1 or None; got {window}")
    if num_q_heads < 1 or num_q_heads % pool.layout.num_kv_heads:
        expected = f"a multiple of the {pool.layout.num_kv_heads} KV heads"
        raise wrong("num_q_heads", expected, num_q_heads)
    return _C.plan_attention(
        pool.view, as_page_table(page_table), as_int32(seq_lens, "seq_lens"),
        as_int32(q_indptr, "q_indptr"), as_int32(page_indptr, "page_indptr"), num_q_heads, causal,
        window or 0, as_int32(max_seq_lens, "max_seq_lens"),
    )  # fmt: skip
