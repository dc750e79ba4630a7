"""paged_attention and merge_states on a CUDA device against their meaning. Needs a device."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from cuda_attention_cases import BFLOAT16, every_case

import kvlink
from kvlink.errors import PageTableError
from kvlink.reference.merge_states import merge_states as merge_reference
from kvlink.reference.paged_attention import paged_attention as reference
from kvlink.testing.cases import AttentionCase, AttentionInputs, make_attention
from kvlink.testing.tolerances import assert_close, assert_same_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("kvlink._cuda") is None, reason="no kvlink._cuda"),
]


def on_device(inputs: AttentionInputs) -> tuple[list[Any], dict[str, Any]]:
    """The arguments on the device; the one layer of the pool there has K and V of their own."""
    q, pool, layer, page_table, seq_lens = inputs.args
    planes = tuple(torch.from_dlpack(each(layer)).cuda() for each in (pool.k, pool.v))
    device_pool = kvlink.KVPool.wrap([planes], "page slot head dim")
    kwargs = {
        name: value.cuda() if isinstance(value, torch.Tensor) else value
        for name, value in inputs.kwargs.items()
    }
    kwargs["backend"] = "cuda"
    return [q.cuda(), device_pool, 0, page_table.cuda(), seq_lens.cuda()], kwargs


@every_case
def test_against_the_reference(case: AttentionCase) -> None:
    from kvlink import _cuda

    inputs = make_attention(case)
    expected, expected_lse = reference(*inputs.args, **inputs.kwargs)
    args, kwargs = on_device(inputs)
    results = [kvlink.paged_attention(*args, **kwargs, return_lse=True) for _ in range(3)]
    _cuda.check_errors(0)
    out, lse = (each.cpu() for each in results[0])
    assert_close(out, expected)
    assert_close(lse, expected_lse, "lse")
    for again, again_lse in results[1:]:
        assert_same_bits(again.cpu(), out)
        assert_same_bits(again_lse.cpu(), lse, "lse")


@pytest.mark.parametrize("q_len", [1, 5])
def test_a_graph_is_replayed_with_other_lengths(q_len: int) -> None:
    case = AttentionCase(
        q_lens=(q_len,) * 3, seq_lens=(1030, 530, 600), softcap=8.0, sinks=True, csr=True,
        **BFLOAT16,
    )  # fmt: skip
    inputs = make_attention(case)
    (q, pool, layer, page_table, seq_lens), kwargs = on_device(inputs)
    out = torch.empty_like(q)

    def run() -> None:
        kvlink.paged_attention(q, pool, layer, page_table, seq_lens, out=out, **kwargs)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for lengths in ((1030, 530, 600), (1029, 500, 7), (1000, 530, 590)):
        seq_lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        replayed = out.clone()
        run()
        torch.cuda.synchronize()
        assert_same_bits(replayed.cpu(), out.cpu())
        assert bool(out.isfinite().all())


def test_bad_ids_are_reported_later() -> None:
    from kvlink import _cuda

    inputs = make_attention(AttentionCase(**BFLOAT16))
    args, kwargs = on_device(inputs)
    args[3] = args[3].clone()
    args[3][1, 1] = -1
    out = kvlink.paged_attention(*args, **kwargs)
    with pytest.raises(PageTableError, match=r"page_table\[\d+\].*got -1"):
        _cuda.check_errors(0)
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_merge_states(dtype: torch.dtype) -> None:
    outs = [torch.randn(70, 3, 40).to(dtype) for _ in range(3)]
    lses = [torch.randn(70, 3) * 5 for _ in range(3)]
    lses[1][:9] = float("-inf")
    outs[1][:9] = float("nan")
    merged, lse = kvlink.merge_states(
        [out.cuda() for out in outs], [lse.cuda() for lse in lses], backend="cuda"
    )
    expected, expected_lse = merge_reference(outs, lses)
    assert_close(merged.cpu(), expected)
    assert_close(lse.cpu(), expected_lse, "lse")
