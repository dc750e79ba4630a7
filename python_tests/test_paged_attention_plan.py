"""Shared prefixes and plans of paged_attention on the CPU: they change no bit."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from attending import LEVELS, attend, check, make_plan

import kvlink
from kvlink import _C
from kvlink.errors import InvalidArgument
from kvlink.testing.cases import AttentionCase, AttentionInputs, make_attention, starts
from kvlink.testing.tolerances import assert_same_bits

pytestmark = pytest.mark.usefixtures("restored_settings")

DECODE = dict(q_lens=(1,) * 6, seq_lens=(1100, 1537, 700, 1024, 1030, 2100), page_size=16)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(
    "features",
    [
        {},
        {"kv_dtype": "int8", "kv_scale": "token_head"},
        {"num_q_heads": 3, "num_kv_heads": 1, "form": "latent", "head_dim_v": 16},
        {"alibi": True, "softcap": 5.0, "sinks": True},
        {"window": 600},
        {"mask": "any"},
        {"q_lens": (3, 1, 0, 5, 2, 7)},
        {"q_lens": (2, 1, 4, 5, 2, 7), "subset": True, "mask": "tree"},
        {"num_q_heads": 64},
    ],
    ids=lambda features: "-".join(features) or "plain",
)
def test_shared_prefixes(level: str, threads: int, features: dict[str, Any]) -> None:
    _C.set_simd_level(level)
    _C.set_num_threads(threads)
    case = AttentionCase(**{**DECODE, "shared": 1040, "seed": 1, **features})
    check(case, (make_plan, lambda inputs: make_plan(inputs, growth=900)))


def test_a_plan_tells_what_is_shared() -> None:
    inputs = make_attention(AttentionCase(**DECODE, shared=1040))
    plan = make_plan(inputs)
    assert plan.shared_prefixes == [([0, 1, 3, 4, 5], 1024)]  # saves more than 512 of all six
    assert plan.num_tasks > 0
    page_table = inputs.args[3].clone()
    page_table[[1, 4], 1] = page_table[4, 66]
    assert _prefixes(inputs, page_table) == [([0, 3, 5], 1024), ([1, 4], 1024)]
    page_table[4, 40] = page_table[4, 66]  # 1 and 4 part after the first 512 tokens
    assert _prefixes(inputs, page_table) == [([0, 3, 5], 1024), ([1, 4], 512)]
    assert make_plan(make_attention(AttentionCase(**DECODE, shared=500))).shared_prefixes == []


def _prefixes(inputs: AttentionInputs, page_table: torch.Tensor) -> list[tuple[list[int], int]]:
    q, pool, _, _, seq_lens = inputs.args
    plan = kvlink.plan_attention(pool, page_table, seq_lens, num_q_heads=q.shape[1])
    return list(plan.shared_prefixes)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_plan_outlives_growth_and_other_pages(threads: int) -> None:
    """One plan for many steps, layers with other windows, pages that are no longer shared."""
    _C.set_num_threads(threads)
    case = AttentionCase(**DECODE, shared=1040, num_q_heads=8)
    first = make_attention(case)
    plan = make_plan(first, growth=700)
    for grown in (0, 1, 411, 512, 700):
        lens = tuple(length + grown for length in case.seq_lens)
        for changes in ({}, {"window": 300}, {"causal": False}, {"shared": 520}, {"shared": 0}):
            inputs = make_attention(dataclasses.replace(case, seq_lens=lens, **changes))
            out, lse = attend(inputs)
            planned, planned_lse = attend(inputs, plan=plan)
            assert_same_bits(planned, out)
            assert_same_bits(planned_lse, lse, "lse")
    shorter = make_attention(dataclasses.replace(case, seq_lens=(1, 0, 30, 513, 2, 1029)))
    assert_same_bits(attend(shorter, plan=plan)[0], attend(shorter)[0])


def test_a_plan_for_a_window_serves_layers_without() -> None:
    _C.set_num_threads(2)
    inputs = make_attention(AttentionCase(**DECODE, shared=1040))
    plan = make_plan(inputs, window=20)
    assert_same_bits(attend(inputs, plan=plan)[0], attend(inputs)[0])


def test_a_plan_for_something_else_is_refused() -> None:
    inputs = make_attention(AttentionCase(q_lens=(2, 3), seq_lens=(40, 21)))

    def refuses(match: str, plan: Any) -> None:
        with pytest.raises(InvalidArgument, match=match):
            attend(inputs, plan=plan)

    def other(**changes: Any) -> _C.AttentionPlan:
        return make_plan(make_attention(AttentionCase(**{**plain, **changes})))

    plain: dict[str, Any] = dict(q_lens=(2, 3), seq_lens=(40, 21))
    refuses("plan: made for sequence 1 up to length 20; got 21", other(seq_lens=(40, 20)))
    refuses("plan: made for 3 sequences; got 2",
            other(q_lens=(2, 2, 1), seq_lens=(40, 20, 9)))  # fmt: skip
    refuses("plan: made for another q_indptr", other(q_lens=(3, 2)))
    refuses("plan: made for 6 query rows; got 5", other(q_lens=(3, 3)))
    refuses("plan: made for 8 query heads and 2 KV heads; got 4 and 2", other(num_q_heads=8))
    refuses("plan: made for head_dim 64 and head_dim_v 64; got 32 and 32", other(head_dim=64))
    refuses("plan: made for pages of 8; got 16", other(page_size=8))
    refuses("plan: expected what plan_attention returns; got 3", 3)
    decode = make_attention(AttentionCase(q_lens=(1, 1), seq_lens=(40, 21)))
    with pytest.raises(InvalidArgument, match="plan: made without q_indptr"):
        attend(decode, plan=make_plan(decode), q_indptr=[0, 1, 2])
    with pytest.raises(InvalidArgument, match=r"max_seq_lens\[1\]: expected at least 21"):
        make_plan(inputs, max_seq_lens=[40, 20])
    with pytest.raises(InvalidArgument, match="multiple of the 2 KV heads; got 3"):
        make_plan(inputs, num_q_heads=3)
    with pytest.raises(InvalidArgument, match=r"window: expected >= 1 or None; got 0"):
        make_plan(inputs, window=0)


def test_indptr_of_a_plan_without_sequences() -> None:
    inputs = make_attention(AttentionCase())
    pool = inputs.pool
    empty = torch.empty(0, dtype=torch.int32)
    plan = kvlink.plan_attention(pool, empty.view(0, 0), empty, num_q_heads=4)
    out = kvlink.paged_attention(torch.empty(0, 4, 32), pool, 0, empty.view(0, 0), empty, plan=plan)
    assert out.shape == (0, 4, 32)
    assert starts([]).tolist() == [0]
