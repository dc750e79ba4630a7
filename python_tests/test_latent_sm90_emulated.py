"""The sm_90a kernel for latent pages, run by emulation, against the reference. Which kernel a call
takes is told by _cuda.last_prefill()."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cuda_attention_cases import BFLOAT16, EVERYTHING, MANY_HEADS, SMALL_HEADS, SOME_HEADS, SPLIT
from emulated import SEEDS, Emulation, emulated_cuda
from test_attention_emulated import attend, check_bad_entries

from kvlink.reference.append_kv import plane
from kvlink.reference.paged_attention import paged_attention as reference
from kvlink.testing.cases import AttentionCase, make_attention, rounded_weights
from kvlink.testing.tolerances import assert_close, assert_same_bits

__all__ = ["emulated_cuda"]


@pytest.mark.parametrize("name", MANY_HEADS)
def test_against_the_reference(emulated_cuda: Emulation, name: str) -> None:
    case = MANY_HEADS[name]
    inputs = make_attention(case)
    expected, expected_lse = reference(*inputs.args, **inputs.kwargs)
    assert bool(expected.isfinite().all()), "the case leaks poison"
    emulated_cuda.seed(len(name))
    emulated_cuda.module.set_prefill("wgmma")
    out, lse = attend(inputs.args, inputs.kwargs)
    emulated_cuda.check_errors()
    assert emulated_cuda.module.last_prefill() == "wgmma"
    assert_close(out, expected, slack=rounded_weights(case))
    assert_close(lse, expected_lse, "lse")


def test_the_schedule_does_not_matter(emulated_cuda: Emulation) -> None:
    for more in (
        SOME_HEADS,
        SMALL_HEADS | EVERYTHING,
        SMALL_HEADS | {"seq_lens": (SPLIT + 70, 64, 129, 9)},
    ):
        inputs = make_attention(AttentionCase(**(BFLOAT16 | more)))
        results = []
        for seed in (*SEEDS, 3, 4):
            emulated_cuda.seed(seed)
            results.append(attend(inputs.args, inputs.kwargs))
        assert emulated_cuda.module.last_prefill() == "wgmma"
        for out, lse in results[1:]:
            assert_same_bits(out, results[0][0])
            assert_same_bits(lse, results[0][1], "lse")


def test_the_batch_does_not_matter(emulated_cuda: Emulation) -> None:
    """Nor whether a sequence's splits are walked, as in a large batch, or folded later."""
    lens = (SPLIT + 70, 64, 129, 5, 2 * SPLIT + 1, 700)
    case = AttentionCase(**(BFLOAT16 | SMALL_HEADS | {"seq_lens": lens, "q_lens": (1,) * 6}))
    inputs = make_attention(case)
    q, pool, layer, page_table, seq_lens = inputs.args
    out, lse = attend(inputs.args, inputs.kwargs)
    for order in ([0], [4], [2, 0], [5, 4, 3], [0, 0, 0, 0, 0, 0, 0, 0], [4, 1] * 5):
        again = attend((q[order], pool, layer, page_table[order], seq_lens[order]), inputs.kwargs)
        assert_same_bits(again[0], out[order])
        assert_same_bits(again[1], lse[order], "lse")


def test_what_the_kernel_lacks_is_told(emulated_cuda: Emulation) -> None:
    def told(**case: Any) -> str:
        inputs = make_attention(AttentionCase(**(BFLOAT16 | SMALL_HEADS | case)))
        out, _ = attend(inputs.args, inputs.kwargs)
        slack = rounded_weights(inputs.case)
        assert_close(out, reference(*inputs.args, **inputs.kwargs)[0], slack=slack)
        return str(emulated_cuda.module.last_prefill())

    assert told() == "wgmma"
    assert told(num_q_heads=32) == "mma.sync: few query heads"
    assert told(page_size=12) == "mma.sync: page_size is no multiple of 8"
    assert told(kv_dtype="float16") == "mma.sync: q and KV differ in dtype"
    assert told(kv_dtype="float8_e4m3") == "mma.sync: q and KV differ in dtype"
    for asked in ({"mask": "any"}, {"subset": True}, {"generations": True}):
        assert told(**asked).startswith("mma.sync: mask, q_positions, generations")
    emulated_cuda.module.set_prefill("wgmma, two parts")
    assert told() == "mma.sync: weights of latent pages are in one part"
    emulated_cuda.module.set_prefill("auto")
    emulated_cuda.major_version(8)
    assert told() == "mma.sync: the device is not of sm_90"


def test_bad_entries_are_never_used_and_reported_later(emulated_cuda: Emulation) -> None:
    case = AttentionCase(**(BFLOAT16 | SMALL_HEADS | {"q_lens": (1, 1), "seq_lens": (70, 40)}))
    check_bad_entries(emulated_cuda, case)


def test_a_sequences_values_stay_with_it(emulated_cuda: Emulation) -> None:
    """NaN in K and V of one sequence makes all of its rows NaN, and nobody else's."""
    case = AttentionCase(**(BFLOAT16 | SMALL_HEADS))
    inputs = make_attention(case)
    _, pool, layer, page_table, _ = inputs.args
    clean, _ = attend(inputs.args, inputs.kwargs)
    torch.from_dlpack(plane(pool, layer, "v"))[int(page_table[1, 2]), 3, :, 5] = float("nan")
    out, _ = attend(inputs.args, inputs.kwargs)
    assert bool(out[1].isnan().any())
    others = [0, 2, 3]
    assert_same_bits(out[others], clean[others])


def test_other_seeds(emulated_cuda: Emulation) -> None:
    for seed in range(3):
        case = replace(MANY_HEADS["everything"], seed=seed, seq_lens=(100 + seed * 37, 0, 64, 9))
        inputs = make_attention(case)
        emulated_cuda.seed(seed + 7)
        out, _ = attend(inputs.args, inputs.kwargs)
        expected = reference(*inputs.args, **inputs.kwargs)[0]
        assert_close(out, expected, slack=rounded_weights(case))
