"""paged_attention of every backend against its meaning, over pools full of poison."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from places import Place

import kvlink
from kvlink.errors import PageTableError, Unsupported
from kvlink.reference.paged_attention import paged_attention as reference
from kvlink.testing.cases import (
    AttentionCase,
    AttentionInputs,
    cpu_slack,
    device_slack,
    make_attention,
)
from kvlink.testing.tolerances import assert_close, assert_same_bits

# docs/architecture.md
NOT_ON_CUDA = {"any_head_dim", "any_strides", "scaled_floats", "unaligned_rows"}
MIXED = dict(q_lens=(1, 7, 20), seq_lens=(130, 25, 70))
STORAGE = [(dtype, "none") for dtype in ("float32", "float16", "bfloat16", "float8_e4m3", "int8")]
STORAGE += [
    (dtype, scale)
    for dtype in ("float8_e4m3", "float8_e5m2", "int8")
    for scale in ("tensor", "head", "token_head")
]
FEATURES: list[dict[str, Any]] = [
    {},
    {"causal": False},
    {"window": 1},
    {"window": 33},
    {"window": 20, "causal": False},
    {"softcap": 3.0},
    {"sinks": True},
    {"alibi": True},
    {"csr": True},
    {"window": 65, "softcap": 8.0, "sinks": True, "alibi": True, "csr": True, "scale": 0.2},
]


def attend(place: Place, inputs: AttentionInputs) -> Any:
    """(out, lse) in host memory; None where the backend says that it lacks something."""
    try:
        out, lse = kvlink.paged_attention(
            *place.put(inputs.args), **place.put(inputs.kwargs), return_lse=True,
            backend=place.backend,
        )  # fmt: skip
    except Unsupported as miss:
        lacks = set(re.findall(r"feature '(\w+)'", str(miss)))
        if place.backend != "cuda" or not lacks or not lacks <= NOT_ON_CUDA:
            raise
        return None
    place.settle()
    return place.take(out), place.take(lse)


def check(place: Place, case: AttentionCase) -> None:
    inputs = make_attention(case)
    result = attend(place, inputs)
    if result is None:
        return
    expected, expected_lse = reference(*inputs.args, **inputs.kwargs)
    assert bool(expected.isfinite().all()), "the case leaks poison"
    slack = None
    if place.backend != "reference":
        on_cpu = place.backend == "cpu"
        slack = cpu_slack(case) if on_cpu else device_slack(case, place.backend)
    assert_close(result[0], expected, slack=slack)
    assert_close(result[1], expected_lse, "lse")


@pytest.mark.parametrize("form", ["nhd", "hnd", "packed", "latent"])
@pytest.mark.parametrize(("kv_dtype", "kv_scale"), STORAGE)
def test_every_form_and_storage(place: Place, form: str, kv_dtype: str, kv_scale: str) -> None:
    heads = dict(num_q_heads=3, num_kv_heads=1) if form == "latent" else {}
    sizes = dict(head_dim=40, head_dim_v=24, page_size=7, form=form, **heads)
    queries = (("float32", (1, 5)), ("bfloat16", (1, 1)), ("float16", (1, 1)))
    for q_dtype, q_lens in queries if form == "nhd" else queries[:1]:
        check(
            place, AttentionCase(
                q_lens=q_lens, seq_lens=(20, 75), kv_dtype=kv_dtype, kv_scale=kv_scale,
                q_dtype=q_dtype, **sizes,
            )
        )  # fmt: skip


@pytest.mark.parametrize("features", FEATURES, ids=lambda features: "-".join(features) or "plain")
def test_every_feature(place: Place, features: dict[str, Any]) -> None:
    check(place, AttentionCase(**MIXED, **features))
    check(place, AttentionCase(q_lens=(1, 1), seq_lens=(70, 600), **features))


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v"), [(8, 8), (24, 40), (64, 64), (80, 16), (192, 128), (1, 1), (7, 5)]
)
def test_head_dims(place: Place, head_dim: int, head_dim_v: int) -> None:
    sizes = dict(head_dim=head_dim, head_dim_v=head_dim_v)
    check(place, AttentionCase(q_lens=(1, 3), seq_lens=(90, 70), kv_dtype="bfloat16", **sizes))
    check(
        place, AttentionCase(seq_lens=(3, 90, 70), kv_dtype="float16", q_dtype="float16", **sizes)
    )


@pytest.mark.parametrize("q_lens", [(1, 1), (1, 2)])
@pytest.mark.parametrize("kv_scale", ["none", "token_head"])
def test_latent_with_many_query_heads(place: Place, q_lens: tuple[int, int], kv_scale: str) -> None:
    check(
        place, AttentionCase(
            q_lens=q_lens, seq_lens=(100, 64), num_q_heads=70, num_kv_heads=1, head_dim=576,
            head_dim_v=512, form="latent", q_dtype="bfloat16", kv_scale=kv_scale,
            kv_dtype="bfloat16" if kv_scale == "none" else "float8_e4m3",
        )
    )  # fmt: skip


@pytest.mark.parametrize("page_size", [1, 3, 64, 100, 256])
@pytest.mark.parametrize("window", [None, 40])
def test_page_sizes(place: Place, page_size: int, window: int | None) -> None:
    case = dict(page_size=page_size, window=window, seq_lens=(130, 5))
    check(place, AttentionCase(q_lens=(20, 3), **case))
    check(place, AttentionCase(q_lens=(1, 1), **case))


@pytest.mark.parametrize(("num_q_heads", "num_kv_heads"), [(4, 4), (40, 1), (10, 2), (1, 1)])
def test_group_sizes(place: Place, num_q_heads: int, num_kv_heads: int) -> None:
    heads = dict(num_q_heads=num_q_heads, num_kv_heads=num_kv_heads, head_dim=16)
    check(place, AttentionCase(q_lens=(1, 9), seq_lens=(70, 30), **heads))
    check(place, AttentionCase(q_lens=(1, 1), seq_lens=(70, 30), **heads))


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
def test_rows_whose_elements_are_not_contiguous(place: Place, kv_dtype: str) -> None:
    check(place, AttentionCase(**MIXED, form="strided", kv_dtype=kv_dtype, head_dim=24))


@pytest.mark.parametrize("length", [512, 513, 1100])
@pytest.mark.parametrize("window", [None, 600])
@pytest.mark.parametrize("csr", [False, True])
def test_splits(place: Place, length: int, window: int | None, csr: bool) -> None:
    sizes = dict(head_dim=16, num_q_heads=2, num_kv_heads=1)
    check(
        place,
        AttentionCase(seq_lens=(length, 9, length), window=window, csr=csr, sinks=True, **sizes),
    )


# --- masks, subsets, generations ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "subset", "mask"),
    [("nhd", True, None)]
    + [("nhd", subset, mask) for subset in (False, True) for mask in ("tree", "any")]
    + [(form, *how) for form in ("strided", "latent") for how in ((False, "tree"), (True, "any"))],
)
def test_masks_and_subsets(place: Place, form: str, subset: bool, mask: str | None) -> None:
    heads = dict(num_q_heads=5, num_kv_heads=1) if form == "latent" else {}
    for causal, window in ((True, None), (False, None), (True, 40)):
        for q_lens, seq_lens in (((1, 7, 33), (150, 65, 90)), ((1, 1), (600, 65))):
            check(
                place, AttentionCase(
                    q_lens=q_lens, seq_lens=seq_lens, causal=causal, window=window, mask=mask,
                    subset=subset, form=form, sinks=True, csr=subset and mask == "any", **heads,
                )
            )  # fmt: skip


@pytest.mark.parametrize("csr", [False, True])
@pytest.mark.parametrize("q_lens", [(1, 1), (2, 3)])
def test_generations(place: Place, q_lens: tuple[int, int], csr: bool) -> None:
    case = AttentionCase(q_lens=q_lens, seq_lens=(40, 21), csr=csr, generations=True)
    check(place, case)
    if place.device != "cpu":
        return  # there a later call tells
    inputs = make_attention(case)
    page = int(inputs.args[3].flatten()[0])
    inputs.kwargs["page_generations"][page] += 1
    with pytest.raises(PageTableError, match=rf"sequence 0, index 0: page {page} is of generation"):
        attend(place, inputs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("kv_dtype", "kv_scale"),
    [("float32", "none"), ("bfloat16", "none"), ("float16", "none"), ("float8_e5m2", "token_head")],
)
def test_a_later_tokens_values_stay_there(
    place: Place, kv_dtype: str, kv_scale: str, bad: float
) -> None:
    """Whatever its V or its scale holds: rows that do not see it keep their bits."""
    case = AttentionCase(
        q_lens=(12, 1), seq_lens=(72, 30), page_size=80, kv_dtype=kv_dtype, kv_scale=kv_scale
    )
    inputs = make_attention(case)
    clean = attend(place, inputs)
    if clean is None or place.backend == "cuda":
        return  # docs/architecture.md: not promised on CUDA
    pool, layer, page = inputs.pool, inputs.args[2], int(inputs.args[3][0, 0])
    plane = pool.v(layer) if kv_scale == "none" else pool.v_scale(layer)
    torch.from_dlpack(plane)[page, 71] = torch.tensor(bad)
    out, lse = attend(place, inputs)
    assert_same_bits(out[:11], clean[0][:11])
    assert_same_bits(out[12:], clean[0][12:])
    assert_same_bits(lse, clean[1], "lse")
    assert not bool(out[11].isfinite().any())  # which of NaN and infinity is not promised


def test_a_cascade_by_hand(place: Place) -> None:
    """The pages that all sequences begin with, read for all rows at once."""
    case = AttentionCase(
        q_lens=(1, 1, 1), seq_lens=(49, 60, 130), page_size=16, kv_dtype="bfloat16",
        q_dtype="float32",
    )  # fmt: skip
    inputs = make_attention(case)
    q, pool, layer, table, seq_lens = inputs.args
    table = table.clone()
    table[:, :3] = table[0, :3]
    expected, expected_lse = reference(q, pool, layer, table, seq_lens)

    def call(*args: Any, **kwargs: Any) -> Any:
        return kvlink.paged_attention(
            *place.put((q, pool, layer, *args)), **place.put(kwargs), return_lse=True,
            backend=place.backend,
        )  # fmt: skip

    first = call(
        table[:1, :3].contiguous(), torch.tensor([48]).int(),
        q_indptr=torch.tensor([0, 3]).int(), causal=False,
    )  # fmt: skip
    rest = call(table[:, 3:].contiguous(), (seq_lens - 48).int())
    out, lse = kvlink.merge_states(*first, *rest, backend=place.backend)
    place.settle()
    assert_close(place.take(out), expected)
    assert_close(place.take(lse), expected_lse, "lse")
