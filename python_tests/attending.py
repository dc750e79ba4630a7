"""Calls of paged_attention on the CPU, compared with the reference and with each other."""

from __future__ import annotations

from typing import Any

import torch

import kvlink
from kvlink import _C
from kvlink.reference.paged_attention import paged_attention as reference
from kvlink.testing.cases import AttentionCase, AttentionInputs, cpu_slack, make_attention
from kvlink.testing.tolerances import assert_close, assert_same_bits

LEVELS = _C.supported_simd_levels()


def make_plan(inputs: AttentionInputs, growth: int = 0, **changes: Any) -> _C.AttentionPlan:
    """A plan for the case's call, or for longer sequences."""
    q, pool, _, page_table, seq_lens = inputs.args
    arguments: dict[str, Any] = dict(
        num_q_heads=q.shape[1],
        causal=inputs.kwargs["causal"],
        window=inputs.kwargs["window"],
        q_indptr=inputs.kwargs.get("q_indptr"),
        page_indptr=inputs.kwargs.get("page_indptr"),
        max_seq_lens=seq_lens + growth,
    )
    arguments.update(changes)
    return kvlink.plan_attention(pool, page_table, seq_lens, **arguments)


def attend(inputs: AttentionInputs, **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = kvlink.paged_attention(*inputs.args, **{**inputs.kwargs, **changes}, return_lse=True)
    return out, lse


def check(case: AttentionCase, plans: tuple[Any, ...] = ()) -> None:
    """Against the reference; then with the plans, and without what is shared, bit for bit."""
    inputs = make_attention(case)
    out, lse = attend(inputs)
    expected, expected_lse = reference(*inputs.args, **inputs.kwargs)
    assert bool(expected.isfinite().all()), "the case leaks poison"
    assert_close(out, expected, slack=cpu_slack(case))
    assert_close(lse, expected_lse, "lse")
    for plan in plans:
        planned, planned_lse = attend(inputs, plan=plan(inputs))
        assert_same_bits(planned, out)
        assert_same_bits(planned_lse, lse, "lse")
    if case.shared:
        check_alone(inputs, out)


def check_alone(inputs: AttentionInputs, out: torch.Tensor) -> None:
    """Every sequence by itself, which shares nothing with anybody: the same bits."""
    q, pool, layer, page_table, seq_lens = inputs.args
    kwargs = dict(inputs.kwargs)
    q_starts = kwargs.pop("q_indptr", torch.arange(len(seq_lens) + 1))
    if kwargs.pop("page_indptr", None) is not None:
        return
    for seq in range(len(seq_lens)):
        rows = slice(int(q_starts[seq]), int(q_starts[seq + 1]))
        own = {
            name: value[rows] if name in ("mask", "q_positions")
            else value[seq : seq + 1] if name in ("mask_starts", "expected_generations")
            else value
            for name, value in kwargs.items()
        }  # fmt: skip
        alone = kvlink.paged_attention(
            q[rows], pool, layer, page_table[seq : seq + 1], seq_lens[seq : seq + 1],
            q_indptr=[0, rows.stop - rows.start], **own,
        )  # fmt: skip
        assert_same_bits(alone, out[rows])
