"""merge_states against its meaning, and against attention over the whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvlink
from kvlink import _C
from kvlink.errors import InvalidArgument, Unsupported
from kvlink.reference.merge_states import merge_states as reference
from kvlink.testing.cases import AttentionCase, make_attention
from kvlink.testing.tolerances import assert_close, assert_same_bits

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@given(
    shape=st.tuples(st.integers(0, 70), st.integers(1, 5), st.integers(1, 70)),
    num_states=st.integers(1, 5),
    dtype=st.sampled_from(list(DTYPES)),
    level=st.sampled_from(_C.supported_simd_levels()),
    seed=st.integers(0, 100),
)
def test_any_states(
    shape: tuple[int, int, int], num_states: int, dtype: str, level: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    outs, lses = [], []
    for _ in range(num_states):
        out = torch.randn(shape, generator=generator)
        lse = torch.randn(shape[:2], generator=generator) * 5
        unseen = torch.rand(shape[:2], generator=generator) < 0.3
        lses.append(lse.masked_fill(unseen, float("-inf")))
        # A state that has seen nothing may hold anything.
        outs.append(out.masked_fill(unseen.unsqueeze(-1), float("nan")).to(DTYPES[dtype]))
    before = _C.simd_level()
    _C.set_simd_level(level)
    try:
        merged, merged_lse = kvlink.merge_states(outs, lses)
    finally:
        _C.set_simd_level(before)
    expected, expected_lse = reference(outs, lses)
    assert_close(merged, expected)
    assert_close(merged_lse, expected_lse, "lse")


def test_two_states_and_a_list_of_two_are_the_same() -> None:
    outs = torch.randn(2, 6, 3, 16)
    lses = torch.randn(2, 6, 3)
    merged = kvlink.merge_states(outs[0], lses[0], outs[1], lses[1])
    as_list = kvlink.merge_states([outs[0], outs[1]], [lses[0], lses[1]])
    assert_same_bits(merged[0], as_list[0])
    assert_same_bits(merged[1], as_list[1], "lse")


@pytest.mark.usefixtures("restored_settings")
@pytest.mark.parametrize("level", _C.supported_simd_levels())
def test_threads_change_no_bit_and_order_only_the_last(level: str) -> None:
    _C.set_simd_level(level)
    generator = torch.Generator().manual_seed(0)
    outs = list(torch.randn(5, 300, 3, 40, generator=generator))
    lses = list(torch.randn(5, 300, 3, generator=generator) * 5)
    results = []
    for threads in (1, 2, 5):
        _C.set_num_threads(threads)
        results.append(kvlink.merge_states(outs, lses))
    for merged, lse in results[1:]:
        assert_same_bits(merged, results[0][0])
        assert_same_bits(lse, results[0][1], "lse")
    turned, turned_lse = kvlink.merge_states(outs[::-1], lses[::-1])
    assert_close(turned, results[0][0])
    assert_close(turned_lse, results[0][1], "lse")


@pytest.mark.parametrize("split", [1, 3, 5])
def test_parts_of_a_context_merge_to_the_whole(split: int) -> None:
    case = AttentionCase(q_lens=(1,), seq_lens=(96,), kv_dtype="bfloat16", causal=False)
    q, pool, layer, page_table, seq_lens = make_attention(case).args
    whole = kvlink.paged_attention(q, pool, layer, page_table, seq_lens, return_lse=True)
    parts = [
        kvlink.paged_attention(
            q, pool, layer, page_table[:, begin:].contiguous(), [16 * (end - begin)],
            causal=False, return_lse=True,
        )
        for begin, end in ((0, split), (split, 6))
    ]  # fmt: skip
    merged, lse = kvlink.merge_states(*parts[0], *parts[1])
    assert_close(merged, whole[0])
    assert_close(lse, whole[1], "lse")


def test_wrong_states_are_named() -> None:
    out, lse = torch.zeros(2, 3, 8), torch.zeros(2, 3)
    with pytest.raises(InvalidArgument, match=r"out_b: expected head_dim = 8.*; got 9"):
        kvlink.merge_states(out, lse, torch.zeros(2, 3, 9), lse)
    with pytest.raises(InvalidArgument, match=r"out_b: expected dtype float32; got float16"):
        kvlink.merge_states(out, lse, out.half(), lse)
    with pytest.raises(InvalidArgument, match=r"lse_a: expected dtype float32; got float64"):
        kvlink.merge_states(out, lse.double(), out, lse)
    with pytest.raises(InvalidArgument, match="2 outs and 1 lses"):
        kvlink.merge_states([out, out], [lse])
    with pytest.raises(InvalidArgument, match="at least one"):
        kvlink.merge_states([], [])
    with pytest.raises((InvalidArgument, Unsupported), match="float64"):
        kvlink.merge_states(out.double(), lse, out.double(), lse)
