"""backend="reference": every operator by its definition, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import kvlink
from kvlink import Rope, append_kv, copy_pages, digest_pages, merge_states, relayout_pages
from kvlink.errors import InvalidArgument, PageTableError, Unsupported
from kvlink.testing.cases import AttentionCase, make_attention
from kvlink.testing.pools import make_pool, model_pool, random_rows
from kvlink.testing.tolerances import assert_close

BACKENDS = ("cpu", "reference")


def test_pages_of_both_are_the_same() -> None:
    rope = Rope(kvlink.rope_table(0.7 ** np.arange(8), 50), np.arange(9), False, 0)
    left = []
    for backend in BACKENDS:
        filled = model_pool(kind="nhd", dtype="int8", scale="token_head")
        target = make_pool("hnd", num_kv_heads=4, num_layers=3, head_dim=16, page_size=5)
        k = random_rows(2, 9, 4, 16).nan_to_num(posinf=300.0)
        slots = torch.tensor([3, -1, 20, 0, 7, 8, 9, 1, 2])
        append_kv(k, k + 1, filled.pool, [2, 0], slots, rope=rope, backend=backend)
        copy_pages(filled.pool, [5, 1], [2, 4], backend=backend)
        moved = relayout_pages(
            filled.pool, range(6), target.pool, [5, 0, 1, 4], num_tokens=15, src_start=3,
            layers=[0, 2], token_position=9, digest=True, backend=backend,
        )  # fmt: skip
        again = digest_pages(
            target.pool, [5, 0, 1, 4], num_tokens=15, layers=[0, 2], token_position=9,
            backend=backend,
        )  # fmt: skip
        assert moved == again
        left.append((filled.bytes(), target.bytes(), moved))
    assert left[0] == left[1]


def test_attention_and_states() -> None:
    inputs = make_attention(AttentionCase(q_lens=(1, 3), seq_lens=(40, 21), sinks=True))
    states: list[Any] = []
    for backend in BACKENDS:
        states.append(
            kvlink.paged_attention(*inputs.args, **inputs.kwargs, return_lse=True, backend=backend)
        )
    for ours, theirs in zip(*states, strict=True):
        assert_close(ours, theirs)
    outs, lses = zip(*states, strict=True)
    merged = [merge_states(outs, lses, backend=backend) for backend in BACKENDS]
    for ours, theirs in zip(*merged, strict=True):
        assert_close(ours, theirs)
    as_numpy = merge_states(
        [each.numpy() for each in outs], [each.numpy() for each in lses], backend="reference"
    )
    assert isinstance(as_numpy[0], np.ndarray)
    assert_close(torch.from_numpy(as_numpy[0]), merged[0][0])


def test_it_is_never_chosen_by_itself_and_refuses_what_others_refuse() -> None:
    filled = model_pool(kind="nhd")
    pool, before, k = filled.pool, filled.bytes(), torch.ones(2, 4, 16)
    run: dict[str, Any] = dict(num_tokens=4, backend="reference")
    with pytest.raises(InvalidArgument, match=r"slots\[1\]: .* \[0, 24\); got 24"):
        append_kv(k, k, pool, 0, torch.tensor([0, 24]), backend="reference")
    with pytest.raises(PageTableError, match=r"src_pages\[0\]: expected a page.*; got -1"):
        relayout_pages(pool, [-1], pool, [0], **run)
    with pytest.raises(InvalidArgument, match="dst_pages: expected distinct pages; got 3 twice"):
        copy_pages(pool, [0, 1], [3, 3], backend="reference")
    with pytest.raises(InvalidArgument, match="no source page of the same pool; got 1"):
        copy_pages(pool, [0, 1], [1, 2], backend="reference")
    with pytest.raises(InvalidArgument, match="pages: expected at least 1 pages for 4 tokens"):
        digest_pages(pool, [], **run)
    with pytest.raises(Unsupported, match="no conversion from separate pages"):
        relayout_pages(pool, [0], make_pool("opaque", num_layers=3).pool, [0], **run)
    for backends in (
        kvlink.attention.BACKENDS,
        kvlink.attention_merge.MERGE_BACKENDS,
        kvlink.cache_ops.APPEND_BACKENDS,
        kvlink.cache_ops.RELAYOUT_BACKENDS,
    ):
        names = [backend.name for backend in backends]
        assert sorted(names) == ["cpu", "cuda", "reference", "triton"]
        assert not next(each for each in backends if each.name == "reference").automatic
    assert filled.bytes() == before
