"""Masks, query subsets and generations of paged_attention on the CPU, and all features at once.

KVLINK_ATTENTION_CASES sets how many random combinations of everything are tried.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from attending import LEVELS, attend, check, make_plan
from hypothesis import given, settings
from hypothesis import strategies as st

import kvlink
from kvlink import _C
from kvlink.errors import InvalidArgument, PageTableError
from kvlink.testing.cases import AttentionCase, make_attention
from kvlink.testing.pools import DTYPES, SCALES
from kvlink.testing.tolerances import assert_close, assert_same_bits

pytestmark = pytest.mark.usefixtures("restored_settings")

CASES = int(os.environ.get("KVLINK_ATTENTION_CASES", 0) or settings.default.max_examples)


# --- masks and subsets ----------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("mask", ["tree", "any"])
@pytest.mark.parametrize("subset", [False, True])
@pytest.mark.parametrize("form", ["nhd", "strided", "latent"])
def test_masks_and_subsets(level: str, mask: str, subset: bool, form: str) -> None:
    _C.set_simd_level(level)
    heads = dict(num_q_heads=5, num_kv_heads=1) if form == "latent" else {}
    for causal, window in ((True, None), (False, None), (True, 40)):
        check(
            AttentionCase(
                q_lens=(1, 7, 33), seq_lens=(150, 65, 90), causal=causal, window=window,
                mask=mask, subset=subset, form=form, sinks=True, **heads,
            )
        )  # fmt: skip


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("q_len", [3, 40])
def test_a_mask_of_ones_changes_no_bit(level: str, q_len: int) -> None:
    _C.set_simd_level(level)
    inputs = make_attention(AttentionCase(q_lens=(q_len, 1), seq_lens=(700, 90)))
    ones = torch.full((q_len + 1, 6), 255, dtype=torch.uint8)
    for mask_starts in (None, [660, 48]):
        out, lse = attend(inputs, mask=ones, mask_starts=mask_starts)
        assert_same_bits(out, attend(inputs)[0])
        assert_same_bits(lse, attend(inputs)[1], "lse")


@pytest.mark.parametrize("num_q_heads", [4, 48])
def test_a_tree_of_drafts_is_its_branches(num_q_heads: int) -> None:
    """Each node sees its ancestors: what a sequence of these alone would see. NaN in the others."""
    parents = [-1, 0, 0, 1, 2, 2]
    case = AttentionCase(
        q_lens=(6,), seq_lens=(76,), page_size=80, num_q_heads=num_q_heads, alibi=False
    )
    q, pool, layer, page_table, seq_lens = make_attention(case).args
    page = int(page_table[0, 0])
    k, v = torch.from_dlpack(pool.k(layer)), torch.from_dlpack(pool.v(layer))
    mask = np.zeros((6, 1), np.uint8)
    for node, parent in enumerate(parents):
        mask[node] = 1 << node | (mask[parent] if parent >= 0 else 0)
    tree = kvlink.paged_attention(
        q, pool, layer, page_table, seq_lens, q_indptr=[0, 6], mask=torch.from_numpy(mask)
    )
    kept_k, kept_v = k[page, 70:76].clone(), v[page, 70:76].clone()
    for node in range(6):
        path = [n for n in range(6) if mask[node, 0] >> n & 1]
        k[page, 70:76] = float("nan")
        v[page, 70:76] = float("nan")
        for at in path:
            k[page, 70 + at], v[page, 70 + at] = kept_k[at], kept_v[at]
        again = kvlink.paged_attention(
            q, pool, layer, page_table, seq_lens, q_indptr=[0, 6], mask=torch.from_numpy(mask)
        )
        assert_same_bits(again[node], tree[node])  # whatever the other branches hold
        for slot, at in enumerate(path):
            k[page, 70 + slot], v[page, 70 + slot] = kept_k[at], kept_v[at]
        chain = kvlink.paged_attention(
            q[node : node + 1], pool, layer, page_table, [70 + len(path)]
        )
        assert_close(chain[0], tree[node])


@pytest.mark.parametrize("level", LEVELS)
def test_a_subset_of_the_rows_gives_their_bits(level: str) -> None:
    _C.set_simd_level(level)
    case = AttentionCase(q_lens=(60, 9), seq_lens=(700, 40), num_q_heads=6, kv_dtype="bfloat16")
    inputs = make_attention(case)
    out, lse = attend(inputs)
    rows = torch.tensor([0, 3, 4, 59, 60, 68])
    positions = torch.tensor([640, 643, 644, 699, 31, 39], dtype=torch.int32)
    q, *rest = inputs.args
    part, part_lse = kvlink.paged_attention(
        q[rows], *rest, q_indptr=[0, 4, 6], q_positions=positions, return_lse=True
    )
    assert_same_bits(part, out[rows])
    assert_same_bits(part_lse, lse[rows], "lse")


# --- generations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("csr", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_page_of_another_generation_is_refused(csr: bool, backend: str) -> None:
    inputs = make_attention(
        AttentionCase(q_lens=(2, 3), seq_lens=(40, 21), csr=csr, window=8, generations=True)
    )
    out = torch.full((5, 4, 32), 7.0)
    expected = attend(inputs, backend=backend)[0]
    generations = inputs.kwargs["page_generations"]
    page_table = inputs.args[3]
    read = int(page_table[3 + 1] if csr else page_table[1, 1])
    generations[read] += 1
    with pytest.raises(PageTableError, match=r"sequence 1.*generation"):
        attend(inputs, backend=backend, out=out)
    assert bool((out == 7.0).all()), "something was written"
    generations[read] -= 1
    not_read = next(
        page for page in range(len(generations)) if page not in page_table.flatten().tolist()
    )
    generations[not_read] += 1
    assert_same_bits(attend(inputs, backend=backend)[0], expected)


def test_the_allocators_generations() -> None:
    allocator = kvlink.PageAllocator(num_pages=4, page_size=16)
    layout = kvlink.KVLayout.nhd(num_kv_heads=1, head_dim=8, page_size=16, dtype="float32")
    pool = kvlink.KVPool.create(layout, num_layers=1, num_pages=4)
    pages = allocator.allocate(2)
    known = allocator.generations[pages].copy()
    q = np.ones((1, 1, 8), np.float32)

    def call() -> Any:
        return kvlink.paged_attention(
            q, pool, 0, pages[None], [20], page_generations=allocator.generations,
            expected_generations=known[None],
        )  # fmt: skip

    assert call().shape == (1, 1, 8)
    allocator.free(pages[1:])
    with pytest.raises(PageTableError, match="sequence 0, index 1: page 1 is of generation 2; exp"):
        call()


def test_wrong_values_are_named() -> None:
    inputs = make_attention(AttentionCase(q_lens=(2, 3), seq_lens=(40, 21)))
    table = torch.zeros(2, 5, dtype=torch.int32)
    mask = torch.zeros(5, 1, dtype=torch.uint8)
    positions = torch.tensor([3, 9, 4, 4, 20], dtype=torch.int32)
    cases: list[tuple[dict[str, Any], str]] = [
        (dict(mask=mask[:4]), "mask: expected num_tokens = 5 as in q; got 4"),
        (dict(mask=mask.int()), "mask: expected dtype uint8; got int32"),
        (dict(mask=mask, mask_starts=[30, 18]), "mask: sequence 0 needs a bit .* 30 to 39"),
        (dict(mask=mask, mask_starts=[35, 22]), r"mask_starts\[1\]: expected 0 to 21; got 22"),
        (dict(mask=mask, mask_starts=[35]), "mask_starts: expected num_seqs = 2"),
        (dict(mask_starts=[35, 20]), "mask_starts: expected None without a mask"),
        (dict(mask=mask, q_positions=positions), "mask_starts: expected, since q_positions are"),
        (dict(q_positions=positions[:4]), "q_positions: expected num_tokens = 5"),
        (dict(q_positions=positions + 12), r"q_positions\[4\]: expected 16 to 20, .*; got 32"),
        (dict(q_positions=positions.flip(0)), r"q_positions\[1\]: expected 20 to 39.*; got 4"),
        (dict(q_positions=positions - 4), r"q_positions\[0\]: expected 0 to 39.*; got -1"),
        (dict(page_generations=torch.zeros(8).int()), "expected_generations: comes with"),
        (dict(expected_generations=table), "expected_generations: comes with"),
        (dict(expected_generations=table, page_generations=torch.zeros(3).int()),
         "page_generations: expected num_pages = 8 as in pool; got 3"),
        (dict(expected_generations=table[:, :4], page_generations=torch.zeros(8).int()),
         "expected_generations: expected max_pages = 5 as in page_table; got 4"),
    ]  # fmt: skip
    for changes, message in cases:
        with pytest.raises(InvalidArgument, match=message):
            attend(inputs, **changes)


# --- everything together --------------------------------------------------------------------------


@st.composite
def any_case(draw: st.DrawFn) -> AttentionCase:
    """All features at once, over every layout and dtype."""
    form = draw(st.sampled_from(["nhd", "hnd", "packed", "latent", "strided"]))
    kv_dtype = draw(st.sampled_from(DTYPES))
    if form == "strided" and kv_dtype.startswith("float8"):
        kv_dtype = "bfloat16"
    num_kv_heads = 1 if form == "latent" else draw(st.integers(1, 3))
    head_dim = 8 * draw(st.integers(4, 32) if draw(st.booleans()) else st.integers(1, 8))
    head_dim_v = head_dim if form == "strided" else 8 * draw(st.integers(1, head_dim // 8))
    num_seqs = draw(st.integers(1, 5))
    q_lens = draw(st.lists(st.integers(0, 12), min_size=num_seqs, max_size=num_seqs))
    if draw(st.booleans()):
        q_lens = [1] * num_seqs
    elif draw(st.integers(0, 3)) == 0:
        q_lens[0] = draw(st.integers(20, 70))
    longest = draw(st.sampled_from([30, 130, 700, 1200]))
    # A subset may have more rows than its sequence has positions.
    subset = draw(st.booleans())
    lengths = [
        draw(st.one_of(st.just(0), st.integers(1 if subset else max(1, n), n + longest)))
        for n in q_lens
    ]
    return AttentionCase(
        q_lens=tuple(q_lens),
        seq_lens=tuple(lengths),
        num_q_heads=num_kv_heads * draw(st.integers(1, 9)),
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        page_size=draw(st.sampled_from([1, 3, 16, 64, 100, 256])),
        form=form,
        kv_dtype=kv_dtype,
        kv_scale="none" if form == "strided" else draw(st.sampled_from(SCALES)),
        q_dtype=draw(st.sampled_from(["float32", "float16", "bfloat16"])),
        causal=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 0.1])),
        window=draw(st.sampled_from([None, None, 1, 5, 64, 600])),
        softcap=draw(st.sampled_from([None, 4.0])),
        sinks=draw(st.booleans()),
        alibi=draw(st.booleans()),
        csr=draw(st.booleans()),
        mask=draw(st.sampled_from([None, "tree", "any"])),
        subset=subset,
        shared=draw(st.sampled_from([0, 0, 100, 600, 1100])),
        generations=draw(st.booleans()),
        seed=draw(st.integers(0, 3)),
    )


@given(case=any_case(), data=st.data())
@settings(max_examples=CASES)
def test_any_combination(case: AttentionCase, data: st.DataObject) -> None:
    _C.set_simd_level(data.draw(st.sampled_from(LEVELS)))
    _C.set_num_threads(data.draw(st.sampled_from([1, 2, 3])))
    growth = data.draw(st.sampled_from([None, 0, 1, 700]))
    plans = () if growth is None else (lambda inputs: make_plan(inputs, growth),)
    check(case, plans)
