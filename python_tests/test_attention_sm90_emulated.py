"""The sm_90a kernel of paged_attention, run by emulation, against the reference. Which kernel a
call takes is told by _cuda.last_prefill()."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cuda_attention_cases import BFLOAT16, EVERYTHING, EXTEND, FLOAT16
from emulated import SEEDS, Emulation, emulated_cuda
from test_attention_emulated import attend, check_bad_entries

from kvlink.errors import InvalidArgument
from kvlink.reference.paged_attention import paged_attention as reference
from kvlink.testing.cases import AttentionCase, make_attention, rounded_weights, starts
from kvlink.testing.tolerances import assert_close, assert_same_bits

__all__ = ["emulated_cuda"]

MANY_ROWS: dict[str, Any] = dict(q_lens=(70, 3, 131), seq_lens=(300, 40, 131))


def covered(case: AttentionCase) -> bool:
    return (
        case.kv_dtype == case.q_dtype != "float32"
        and case.form != "latent"
        and case.page_size % 8 == 0
        and not (case.mask or case.subset or case.generations)
    )


CASES = {
    **{
        name: case
        for name, case in EXTEND.items()
        if covered(case) and name not in ("dim-16", "dim-192-128", "mha")
    },
    "dim-128": AttentionCase(**BFLOAT16, **MANY_ROWS, head_dim=128),
    "dim-96-256": AttentionCase(
        **BFLOAT16, q_lens=(40,), seq_lens=(90,), head_dim=96, head_dim_v=256, softcap=4.0
    ),
    "page-8": AttentionCase(**BFLOAT16, **MANY_ROWS, page_size=8, window=100),
    "page-24": AttentionCase(**BFLOAT16, **MANY_ROWS, page_size=24, form="hnd"),
    "page-256": AttentionCase(**FLOAT16, **MANY_ROWS, page_size=256, head_dim=128),
    "negative-scale": AttentionCase(**BFLOAT16, **MANY_ROWS, scale=-0.2),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("parts", ["wgmma", "wgmma, two parts"])
def test_against_the_reference(emulated_cuda: Emulation, name: str, parts: str) -> None:
    inputs = make_attention(CASES[name])
    expected, expected_lse = reference(*inputs.args, **inputs.kwargs)
    emulated_cuda.seed(len(name))
    emulated_cuda.module.set_prefill(parts)
    out, lse = attend(inputs.args, inputs.kwargs)
    emulated_cuda.check_errors()
    assert emulated_cuda.module.last_prefill() == "wgmma"
    slack = rounded_weights(CASES[name]) if parts == "wgmma" else None
    assert_close(out, expected, slack=slack)
    assert_close(lse, expected_lse, "lse")


def test_the_schedule_does_not_matter(emulated_cuda: Emulation) -> None:
    emulated_cuda.module.set_prefill("wgmma")
    for more in ({}, EVERYTHING):
        inputs = make_attention(AttentionCase(**MANY_ROWS, **BFLOAT16, **more))
        results = []
        for seed in (*SEEDS, 3, 4):
            emulated_cuda.seed(seed)
            results.append(attend(inputs.args, inputs.kwargs))
        for out, lse in results[1:]:
            assert_same_bits(out, results[0][0])
            assert_same_bits(lse, results[0][1], "lse")


def test_the_batch_does_not_matter(emulated_cuda: Emulation) -> None:
    q_lens = (70, 3, 131)
    inputs = make_attention(AttentionCase(**MANY_ROWS, **BFLOAT16))
    q, pool, layer, page_table, lens = inputs.args
    out, lse = attend(inputs.args, inputs.kwargs)
    indptr = starts(q_lens).tolist()
    for order in ([1], [2, 0], [2, 1, 0, 1]):
        rows = torch.cat([torch.arange(indptr[seq], indptr[seq + 1]) for seq in order])
        kwargs = inputs.kwargs | {"q_indptr": starts([q_lens[seq] for seq in order])}
        again = attend((q[rows], pool, layer, page_table[order], lens[order]), kwargs)
        assert_same_bits(again[0], out[rows])
        assert_same_bits(again[1], lse[rows], "lse")


def test_sequences_of_few_rows_have_the_other_kernel(emulated_cuda: Emulation) -> None:
    case = AttentionCase(q_lens=(20, 40), seq_lens=(64, 64), **BFLOAT16)
    inputs = make_attention(case)
    results = {}
    for name in ("auto", "mma.sync", "wgmma"):
        emulated_cuda.module.set_prefill(name)
        results[name], _ = attend(inputs.args, inputs.kwargs)
    assert_same_bits(results["auto"][:20], results["mma.sync"][:20])
    assert_same_bits(results["auto"][20:], results["wgmma"][20:])
    assert not torch.equal(results["wgmma"], results["mma.sync"])


def test_what_the_kernel_lacks_is_told(emulated_cuda: Emulation) -> None:
    def told(**case: Any) -> str:
        few = dict(q_lens=(9,), seq_lens=(9,))
        inputs = make_attention(AttentionCase(**(BFLOAT16 | few | case)))
        out, _ = attend(inputs.args, inputs.kwargs)
        assert_close(
            out, reference(*inputs.args, **inputs.kwargs)[0], slack=rounded_weights(inputs.case)
        )
        return str(emulated_cuda.module.last_prefill())

    assert told() == "wgmma"  # although 18 rows are few for it
    assert told(page_size=12) == "mma.sync: page_size is no multiple of 8"
    emulated_cuda.major_version(8)
    assert told() == "mma.sync: the device is not of sm_90"
    emulated_cuda.module.set_prefill("mma.sync")
    assert told() == "mma.sync: it was asked for"
    with pytest.raises(InvalidArgument, match=r"name: expected auto.*got fast"):
        emulated_cuda.module.set_prefill("fast")


def test_bad_entries_are_never_used_and_reported_later(emulated_cuda: Emulation) -> None:
    case = AttentionCase(q_lens=(70, 33), seq_lens=(70, 40), csr=False, **BFLOAT16)
    check_bad_entries(emulated_cuda, case)


def test_masks_are_those_of_other_seeds(emulated_cuda: Emulation) -> None:
    emulated_cuda.module.set_prefill("wgmma, two parts")
    for seed in range(3):
        case = replace(CASES["everything"], seed=seed, q_lens=(90,), seq_lens=(200 + seed * 37,))
        inputs = make_attention(case)
        out, _ = attend(inputs.args, inputs.kwargs)
        assert_close(
            out, reference(*inputs.args, **inputs.kwargs)[0], slack=rounded_weights(inputs.case)
        )
