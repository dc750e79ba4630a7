"""paged_attention and merge_states on a CUDA device against their meaning. Needs a device."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cuda_attention_cases import BFLOAT16, EVERYTHING, EXTEND, MANY_HEADS, every_case

import kvlink
from kvlink.errors import NotReady, PageTableError
from kvlink.reference.append_kv import plane, scale_plane
from kvlink.reference.merge_states import merge_states as merge_reference
from kvlink.reference.paged_attention import paged_attention as reference
from kvlink.testing.cases import (
    AttentionCase,
    AttentionInputs,
    device_slack,
    make_attention,
    rounded_weights,
)
from kvlink.testing.tolerances import assert_close, assert_same_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("kvlink._cuda") is None, reason="no kvlink._cuda"),
]


def pool_on_device(pool: kvlink.KVPool, layer: int, device: str = "cuda") -> kvlink.KVPool:
    """One layer of a pool, with K and V (or latents) in tensors of their own, on the device."""
    layout = pool.layout
    names = ("k", "v") if layout.has_v_plane else ("k",)
    planes = tuple(plane(pool, layer, name).to(device).contiguous() for name in names)
    scales = None
    if layout.scale != "none":
        shown = {"tensor": (0, 0, slice(1)), "head": (0, 0), "token_head": ()}[layout.scale]
        each = [scale_plane(pool, layer, name)[shown].to(device).contiguous() for name in names]
        scales = [(each[0], each[-1])]
    return kvlink.KVPool.wrap(
        [planes if len(planes) > 1 else planes[0]], "page slot head dim",
        form="separate" if layout.has_v_plane else "latent",
        head_dim_v=None if layout.has_v_plane else layout.head_dim_v,
        scale=layout.scale, scales=scales,
    )  # fmt: skip


def on_device(inputs: AttentionInputs) -> tuple[list[Any], dict[str, Any]]:
    """The arguments on the device."""
    q, pool, layer, page_table, seq_lens = inputs.args
    kwargs = {
        name: value.cuda() if isinstance(value, torch.Tensor) else value
        for name, value in inputs.kwargs.items()
    }
    kwargs["backend"] = "cuda"
    arrays = [q.cuda(), pool_on_device(pool, layer), 0, page_table.cuda(), seq_lens.cuda()]
    return arrays, kwargs


@pytest.fixture(autouse=True)
def chosen_prefill() -> Iterator[None]:
    """The kernel of long prompts is chosen by the call, if the test does not choose."""
    yield
    from kvlink import _cuda

    _cuda.set_prefill("auto")


@every_case
@pytest.mark.parametrize("prefill", ["mma.sync", "wgmma, two parts"])
def test_against_the_reference(case: AttentionCase, prefill: str) -> None:
    from kvlink import _cuda

    _cuda.set_prefill(prefill)
    inputs = make_attention(case)
    expected, expected_lse = reference(*inputs.args, **inputs.kwargs)
    args, kwargs = on_device(inputs)
    results = [kvlink.paged_attention(*args, **kwargs, return_lse=True) for _ in range(3)]
    _cuda.check_errors(0)
    out, lse = (each.cpu() for each in results[0])
    assert_close(out, expected, slack=device_slack(case))
    assert_close(lse, expected_lse, "lse")
    for again, again_lse in results[1:]:
        assert_same_bits(again.cpu(), out)
        assert_same_bits(again_lse.cpu(), lse, "lse")


ONE_PART = EXTEND | {f"latent-{name}": case for name, case in MANY_HEADS.items()}


@pytest.mark.parametrize("name", ONE_PART)
def test_weights_in_one_part(name: str) -> None:
    from kvlink import _cuda

    _cuda.set_prefill("wgmma")
    case = ONE_PART[name]
    inputs = make_attention(case)
    expected, expected_lse = reference(*inputs.args, **inputs.kwargs)
    args, kwargs = on_device(inputs)
    results = [kvlink.paged_attention(*args, **kwargs, return_lse=True) for _ in range(3)]
    _cuda.check_errors(0)
    out, lse = (each.cpu() for each in results[0])
    assert_close(out, expected, slack=rounded_weights(case))
    assert_close(lse, expected_lse, "lse")
    for again, again_lse in results[1:]:
        assert_same_bits(again.cpu(), out)
        assert_same_bits(again_lse.cpu(), lse, "lse")


LONG: dict[str, dict[str, Any]] = {
    "causal": {},
    "everything": EVERYTHING,
    "bidirectional-hnd": {"causal": False, "form": "hnd"},
    "dim-64-page-64": {"head_dim": 64, "page_size": 64},
    "dim-256": {"head_dim": 256},
    "float16": {"kv_dtype": "float16", "q_dtype": "float16"},
}


@pytest.mark.parametrize("name", LONG)
def test_long_prompts(name: str) -> None:
    """More tiles than processors, and many blocks to a tile."""
    from kvlink import _cuda

    shape = dict(q_lens=(1500, 3, 700), seq_lens=(1700, 900, 700), head_dim=128, num_q_heads=32)
    case = AttentionCase(**(shape | {"num_kv_heads": 8} | BFLOAT16 | LONG[name]))
    inputs = make_attention(case)
    expected, expected_lse = reference(*inputs.args, **inputs.kwargs)
    args, kwargs = on_device(inputs)
    for prefill in ("mma.sync", "wgmma", "wgmma, two parts"):
        _cuda.set_prefill(prefill)
        out, lse = kvlink.paged_attention(*args, **kwargs, return_lse=True)
        _cuda.check_errors(0)
        slack = rounded_weights(case)
        assert_close(out.cpu(), expected, f"out of {_cuda.last_prefill()}", slack)
        assert_close(lse.cpu(), expected_lse, "lse")


def test_large_batches_of_latent_pages() -> None:
    """More items than processors, of which some walk several splits."""
    from kvlink import _cuda

    lens = tuple(3000 * (seq % 3) + seq for seq in range(1, 81))
    case = AttentionCase(
        q_lens=(1,) * 80, seq_lens=lens, num_q_heads=128, num_kv_heads=1, head_dim=576,
        head_dim_v=512, page_size=64, form="latent", **BFLOAT16,
    )  # fmt: skip
    inputs = make_attention(case)
    (q, pool, layer, page_table, seq_lens), kwargs = on_device(inputs)
    out, lse = kvlink.paged_attention(
        q, pool, layer, page_table, seq_lens, **kwargs, return_lse=True
    )
    _cuda.check_errors(0)
    assert _cuda.last_prefill() in ("wgmma", "mma.sync: the device is not of sm_90")
    for seq in (0, 1, 40, 79):
        own = kvlink.paged_attention(
            q[seq : seq + 1], pool, layer, page_table[seq : seq + 1], seq_lens[seq : seq + 1],
            **kwargs, return_lse=True,
        )  # fmt: skip
        assert_same_bits(own[0].cpu(), out[seq : seq + 1].cpu())
        assert_same_bits(own[1].cpu(), lse[seq : seq + 1].cpu(), "lse")


@pytest.mark.parametrize("q_len", [1, 5, 100])
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
    for lengths in ((1030, 530, 600), (1029, 500, q_len + 2), (1000, 530, 590)):
        seq_lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        replayed = out.clone()
        run()
        torch.cuda.synchronize()
        assert_same_bits(replayed.cpu(), out.cpu())
        assert bool(out.isfinite().all())


def test_graphs_are_replayed_side_by_side() -> None:
    """Each has its own memory between blocks of a row, though one stream captured both."""
    args, kwargs = on_device(make_attention(AttentionCase(seq_lens=(3000, 2500, 70), **BFLOAT16)))
    expected = kvlink.paged_attention(*args, **kwargs)
    outs = [torch.full_like(expected, float("nan")) for _ in range(2)]
    graphs = [torch.cuda.CUDAGraph() for _ in outs]
    for graph, out in zip(graphs, outs, strict=True):
        with torch.cuda.graph(graph):
            kvlink.paged_attention(*args, out=out, **kwargs)
    streams = [torch.cuda.Stream() for _ in outs]
    for _ in range(20):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for out in outs:
        assert_same_bits(out.cpu(), expected.cpu())


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


@pytest.mark.parametrize("kind", ["device", "host"])
def test_readiness_is_waited_for_by_a_kernel(kind: str) -> None:
    from kvlink import _cuda

    inputs = make_attention(AttentionCase(**BFLOAT16))
    args, kwargs = on_device(inputs)
    expected = kvlink.paged_attention(*args, **kwargs)
    counter = torch.zeros(1, dtype=torch.int64)
    counter = counter.cuda() if kind == "device" else counter.pin_memory()
    out = kvlink.paged_attention(*args, **kwargs, ready=[(counter, 3)], ready_timeout=0.01)
    with pytest.raises(NotReady, match=r"ready\[0\] had not reached"):
        _cuda.check_errors(0)
    assert bool((out == 0).all())
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.empty_like(counter).fill_(3)  # CUDA may load no kernel while one waits
    torch.cuda.synchronize()
    out = kvlink.paged_attention(*args, **kwargs, ready=[(counter, 3)], ready_timeout=5.0)
    with torch.cuda.stream(side):
        counter.fill_(3)
    _cuda.check_errors(0)
    assert_same_bits(out.cpu(), expected.cpu())


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
