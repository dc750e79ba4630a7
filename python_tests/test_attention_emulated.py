"""The CUDA kernels of paged_attention and merge_states, run by emulation, against the reference.
test_attention_cuda.py has the same on a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_attention_cases import BFLOAT16, EVERYTHING, RAGGED, every_case
from emulated import SEEDS, DeviceArray, Emulation, emulated_cuda, pool_on_device

import kvlink
from kvlink.errors import InvalidArgument, PageTableError, Unsupported
from kvlink.reference.merge_states import merge_states as merge_reference
from kvlink.reference.paged_attention import paged_attention as reference
from kvlink.testing.cases import AttentionCase, make_attention, starts
from kvlink.testing.tolerances import assert_close, assert_same_bits

__all__ = ["emulated_cuda"]


def on_device(value: Any) -> Any:
    return DeviceArray(value) if isinstance(value, torch.Tensor) else value


def attend(args: Any, kwargs: dict[str, Any], **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    q, pool, layer, page_table, seq_lens = args
    arrays = [DeviceArray(each) for each in (page_table.contiguous(), seq_lens)]
    out, lse = kvlink.paged_attention(
        DeviceArray(q), pool_on_device(pool), layer, *arrays, return_lse=True, backend="cuda",
        **more, **{name: on_device(value) for name, value in kwargs.items()},
    )  # fmt: skip
    return out.tensor, lse.tensor


@every_case
def test_against_the_reference(emulated_cuda: Emulation, case: AttentionCase) -> None:
    inputs = make_attention(case)
    expected, expected_lse = reference(*inputs.args, **inputs.kwargs)
    assert bool(expected.isfinite().all()), "the case leaks poison"
    emulated_cuda.seed(1 + case.head_dim)
    out, lse = attend(inputs.args, inputs.kwargs)
    emulated_cuda.check_errors()
    assert_close(out, expected)
    assert_close(lse, expected_lse, "lse")


@pytest.mark.parametrize("q_lens", [(1, 1, 1), (3, 1, 20)])
def test_the_schedule_does_not_matter(emulated_cuda: Emulation, q_lens: tuple[int, ...]) -> None:
    inputs = make_attention(
        AttentionCase(q_lens=q_lens, seq_lens=(530, 40, 133), **BFLOAT16, **EVERYTHING)
    )
    results = []
    for seed in SEEDS:
        emulated_cuda.seed(seed)
        results.append(attend(inputs.args, inputs.kwargs))
    for out, lse in results[1:]:
        assert_same_bits(out, results[0][0])
        assert_same_bits(lse, results[0][1], "lse")


def test_the_batch_does_not_matter(emulated_cuda: Emulation) -> None:
    for q_lens, seq_lens in (((1, 1, 1), (1100, 65, 700)), ((1, 7, 30), (300, 65, 100))):
        inputs = make_attention(AttentionCase(q_lens=q_lens, seq_lens=seq_lens, **BFLOAT16))
        q, pool, layer, page_table, lens = inputs.args
        out, lse = attend(inputs.args, inputs.kwargs)
        indptr = starts(q_lens).tolist()
        for order in ([1], [2, 0], [2, 1, 0, 1]):
            rows = torch.cat([torch.arange(indptr[seq], indptr[seq + 1]) for seq in order])
            kwargs = dict(inputs.kwargs)
            if "q_indptr" in kwargs:
                kwargs["q_indptr"] = starts([q_lens[seq] for seq in order])
            again = attend((q[rows], pool, layer, page_table[order], lens[order]), kwargs)
            assert_same_bits(again[0], out[rows])
            assert_same_bits(again[1], lse[rows], "lse")


def test_bad_entries_are_never_used_and_reported_later(emulated_cuda: Emulation) -> None:
    for q_lens in ((1, 1, 1), (2, 1, 1)):
        case = AttentionCase(q_lens=q_lens, seq_lens=(20, 40, 33), csr=False, **BFLOAT16)
        inputs = make_attention(case)
        q, pool, layer, page_table, seq_lens = inputs.args
        good, _ = attend(inputs.args, inputs.kwargs)
        for bad in (-1, pool.num_pages, 2**31 - 1):
            table = page_table.clone()
            table[1, 1] = bad
            out, _ = attend((q, pool, layer, table, seq_lens), inputs.kwargs)
            entry = page_table.shape[1] + 1
            with pytest.raises(PageTableError, match=rf"page_table\[{entry}\].*got {bad}"):
                emulated_cuda.check_errors()
            assert bool(out.isfinite().all())
            others = [row for row in range(len(q)) if row != q_lens[0]]
            assert_same_bits(out[others], good[others])
        for bad in (-5, 16 * page_table.shape[1] + 1):
            lens = seq_lens.clone()
            lens[1] = bad
            out, lse = attend((q, pool, layer, page_table, lens), inputs.kwargs)
            with pytest.raises(InvalidArgument, match=rf"seq_lens\[1\].*got {bad}"):
                emulated_cuda.check_errors()
            assert bool((out[q_lens[0]] == 0).all())
            assert bool((lse[q_lens[0]] == float("-inf")).all())
    inputs = make_attention(AttentionCase(**RAGGED, csr=True, **BFLOAT16))
    for name, bad in (("page_indptr", 10**6), ("q_indptr", -3)):
        kwargs = {**inputs.kwargs, name: inputs.kwargs[name].clone()}
        kwargs[name][2] = bad
        attend(inputs.args, kwargs)
        with pytest.raises(InvalidArgument, match=rf"q_indptr or page_indptr\[2\].*got {bad}"):
            emulated_cuda.check_errors()


def test_what_is_not_covered_is_told(emulated_cuda: Emulation) -> None:
    def refused(match: str, **case: Any) -> None:
        inputs = make_attention(AttentionCase(**(BFLOAT16 | case)))
        with pytest.raises(Unsupported, match=match):
            attend(inputs.args, inputs.kwargs)

    refused("cuda lacks q dtype float32", q_dtype="float32", kv_dtype="float32")
    refused("cuda lacks feature 'mixed_dtypes'", q_dtype="float16")
    refused("cuda lacks.*KV dtype int8", kv_dtype="int8", kv_scale="head")
    refused("cuda lacks feature 'latent'", form="latent", num_kv_heads=1)
    refused("cuda lacks feature 'any_head_dim'", head_dim=24)
    refused("cuda lacks feature 'any_head_dim'", head_dim=512)
    refused("cuda lacks feature 'any_strides'", form="strided")
    inputs = make_attention(AttentionCase(**BFLOAT16))
    with pytest.raises(Unsupported, match="cuda lacks feature 'ready'"):
        attend(inputs.args, inputs.kwargs, ready=[])
    with pytest.raises(InvalidArgument, match="seq_lens: expected an array on CUDA device 0"):
        kvlink.paged_attention(
            DeviceArray(inputs.args[0]),
            pool_on_device(inputs.pool),
            0,
            *inputs.args[3:],
            backend="cuda",
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_states", [1, 2, 5])
def test_merge_states(emulated_cuda: Emulation, dtype: torch.dtype, num_states: int) -> None:
    torch.manual_seed(num_states)
    outs, lses = [], []
    for _ in range(num_states):
        out, lse = torch.randn(7, 3, 40), torch.randn(7, 3) * 5
        unseen = torch.rand(7, 3) < 0.3
        lses.append(lse.masked_fill(unseen, float("-inf")))
        outs.append(out.masked_fill(unseen.unsqueeze(-1), float("nan")).to(dtype))
    expected, expected_lse = merge_reference(outs, lses)
    results = []
    for seed in SEEDS:
        emulated_cuda.seed(seed)
        merged, lse = kvlink.merge_states(
            [DeviceArray(out) for out in outs],
            [DeviceArray(lse) for lse in lses],
            backend="cuda",
        )
        results.append(merged.tensor)
        assert_close(merged.tensor, expected)
        assert_close(lse.tensor, expected_lse, "lse")
        assert_same_bits(merged.tensor, results[0])
