"""FlashInfer's paged attention on a problem of bench_attention, where the package is."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

WORKSPACE_BYTES = 256 << 20


def prepare(problem: Any) -> Callable[[], object] | None:
    """A call over the problem's own pages, planned outside of the timing; None without FlashInfer,
    or for pools that it has no kernel for. `problem`: bench_attention's Problem on a device."""
    case = problem.case
    if importlib.util.find_spec("flashinfer") is None or case.latent:
        return None
    import flashinfer

    device = problem.q.device
    used = torch.tensor([len(pages) for pages in problem.pages], dtype=torch.int32)
    indptr = torch.zeros(len(used) + 1, dtype=torch.int32)
    indptr[1:] = used.cumsum(0)
    indices = torch.cat(list(problem.pages)).to(device)
    lens = torch.tensor(case.seq_lens, dtype=torch.int32)
    last = (lens - (used - 1) * case.page_size).to(device)
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    planes = tuple(torch.from_dlpack(each(0)) for each in (problem.pool.k, problem.pool.v))
    heads = (case.num_q_heads, case.num_kv_heads, case.head_dim)
    types = {"q_data_type": problem.q.dtype, "kv_data_type": planes[0].dtype}
    if max(case.q_lens) == 1:
        decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_tensor_cores=True
        )
        decode.plan(indptr.to(device), indices, last, *heads, case.page_size, **types)
        return lambda: decode.run(problem.q, planes)
    prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
    starts = torch.tensor(problem.starts, dtype=torch.int32, device=device)
    prefill.plan(
        starts, indptr.to(device), indices, last, *heads, case.page_size, causal=True, **types
    )
    return lambda: prefill.run(problem.q, planes)
