"""FlashInfer's paged attention and append on the problems of gpu_rows.py, where the package is.

What it is asked for is planned outside of the timing. It compiles its kernels when they are first
used: `KINDS` names them, and KVLINK_FLASHINFER, if set, those of them that may be used.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

WORKSPACE_BYTES = 256 << 20
KINDS = ("decode", "prefill", "mla", "decode_fp8", "append")


def usable(kind: str) -> bool:
    """The package is there, and nobody forbids its kernels of that kind."""
    allowed = os.environ.get("KVLINK_FLASHINFER", ",".join(KINDS)).split(",")
    return kind in allowed and importlib.util.find_spec("flashinfer") is not None


def kind_of(problem: Any) -> str:
    """The kernels that attention over the problem takes."""
    if problem.case.latent:
        return "mla"
    if max(problem.case.q_lens) > 1:
        return "prefill"
    return "decode" if problem.pool.layout.dtype == "bfloat16" else "decode_fp8"


class _Pages:
    """The pages of sequences as FlashInfer has them."""

    def __init__(self, pages: Any, lens: Any, page_size: int, device: torch.device) -> None:
        used = torch.tensor([len(each) for each in pages], dtype=torch.int32)
        indptr = torch.zeros(len(used) + 1, dtype=torch.int32)
        indptr[1:] = used.cumsum(0)
        host_lens = torch.tensor(lens, dtype=torch.int32)
        self.indptr, self.lens = indptr.to(device), host_lens.to(device)
        self.indices = torch.cat(list(pages)).to(device)
        self.last = (host_lens - (used - 1) * page_size).to(device)


def attention(problem: Any) -> Callable[[], object] | None:
    """A call over the problem's own pages; None where it cannot be had. A Problem on a device."""
    if not usable(kind_of(problem)):
        return None
    import flashinfer

    case, q = problem.case, problem.q
    pages = _Pages(problem.pages, case.seq_lens, case.page_size, q.device)
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
    starts = torch.tensor(problem.starts, dtype=torch.int32, device=q.device)
    if case.latent:
        return _latent(flashinfer, problem, pages, workspace, starts)
    planes = tuple(torch.from_dlpack(each(0)) for each in (problem.pool.k, problem.pool.v))
    heads = (case.num_q_heads, case.num_kv_heads, case.head_dim)
    types = {"q_data_type": q.dtype, "kv_data_type": planes[0].dtype}
    if max(case.q_lens) == 1:
        decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, kv_layout="NHD", use_tensor_cores=True
        )
        decode.plan(
            pages.indptr, pages.indices, pages.last, *heads, case.page_size, o_data_type=q.dtype,
            **types,
        )  # fmt: skip
        return lambda: decode.run(q, planes, out=problem.out)
    prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, kv_layout="NHD")
    prefill.plan(
        starts, pages.indptr, pages.indices, pages.last, *heads, case.page_size, causal=True,
        **types,
    )  # fmt: skip
    return lambda: prefill.run(q, planes, out=problem.out)


def _latent(
    flashinfer: Any, problem: Any, pages: _Pages, workspace: torch.Tensor, starts: torch.Tensor
) -> Callable[[], object]:
    case, dims_v = problem.case, problem.case.head_dim_v
    rows = torch.from_dlpack(problem.pool.k(0))[:, :, 0]  # [page, slot, dim]
    parts = [(each[..., :dims_v], each[..., dims_v:]) for each in (problem.q, rows)]
    (q_nope, q_pe), (ckv, kpe) = parts
    mla = flashinfer.mla.BatchMLAPagedAttentionWrapper(workspace, backend="auto")
    mla.plan(
        starts, pages.indptr, pages.indices, pages.lens, case.num_q_heads, dims_v,
        case.head_dim - dims_v, case.page_size, True, case.head_dim**-0.5, problem.q.dtype,
        rows.dtype,
    )  # fmt: skip
    return lambda: mla.run(q_nope, q_pe, ckv, kpe, out=problem.out)


def append(
    k: torch.Tensor, v: torch.Tensor, planes: list[tuple[torch.Tensor, torch.Tensor]],
    page_size: int,
) -> Callable[[], object] | None:  # fmt: skip
    """Writes k and v [token, head, dim], a sequence, into the first pages of each layer's planes
    [page, slot, head, dim]; None where it cannot be had."""
    if not usable("append"):
        return None
    import flashinfer

    num_tokens, device = len(k), k.device
    used = torch.arange(-(-num_tokens // page_size), dtype=torch.int32)
    pages = _Pages([used], [num_tokens], page_size, device)
    sequence = torch.zeros(num_tokens, dtype=torch.int32, device=device)
    positions = torch.arange(num_tokens, dtype=torch.int32, device=device)

    def call() -> None:
        for plane in planes:
            flashinfer.append_paged_kv_cache(
                k, v, sequence, positions, plane, pages.indices, pages.indptr, pages.last,
                kv_layout="NHD",
            )  # fmt: skip

    return call
