"""paged_attention on the CPU against its meaning, over pools full of poison."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvlink
from kvlink import _C
from kvlink.reference.paged_attention import paged_attention as reference
from kvlink.testing.cases import AttentionCase, cpu_slack, make_attention
from kvlink.testing.pools import DTYPES, SCALES
from kvlink.testing.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("restored_settings")

EXAMPLES = int(
    os.environ.get("KVLINK_HYPOTHESIS_EXAMPLES", 0) or min(50, settings.default.max_examples)
)
LEVELS = _C.supported_simd_levels()
FORMS = ("nhd", "hnd", "packed", "latent")
MIXED = dict(q_lens=(1, 7, 30, 40), seq_lens=(150, 65, 300, 40))


def attend(case: AttentionCase) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = make_attention(case)
    out, lse = kvlink.paged_attention(*inputs.args, **inputs.kwargs, return_lse=True)
    return out, lse


def check(case: AttentionCase) -> None:
    out, lse = attend(case)
    inputs = make_attention(case)
    expected, expected_lse = reference(*inputs.args, **inputs.kwargs)
    assert bool(expected.isfinite().all()), "the case leaks poison"
    assert_close(out, expected, slack=cpu_slack(case))
    assert_close(lse, expected_lse, "lse")


# --- the grid ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kv_dtype", "kv_scale"),
    [(dtype, scale) for dtype in DTYPES for scale in SCALES],
)
@pytest.mark.parametrize(
    ("level", "form"),
    [(level, "nhd") for level in LEVELS] + [(LEVELS[-1], form) for form in FORMS[1:]],
)
def test_every_form_and_storage(level: str, form: str, kv_dtype: str, kv_scale: str) -> None:
    _C.set_simd_level(level)
    heads = dict(num_q_heads=3, num_kv_heads=1) if form == "latent" else {}
    check(
        AttentionCase(
            q_lens=(1, 5), seq_lens=(70, 133), head_dim=40, head_dim_v=24, form=form,
            kv_dtype=kv_dtype, kv_scale=kv_scale, page_size=7, **heads,
        )
    )  # fmt: skip


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "features",
    [
        {},
        {"causal": False},
        {"scale": 0.3},
        {"window": 1},
        {"window": 33},
        {"window": 20, "causal": False},
        {"softcap": 3.0},
        {"sinks": True},
        {"alibi": True},
        {"csr": True},
        {"window": 65, "softcap": 8.0, "sinks": True, "alibi": True, "csr": True, "scale": 0.2},
    ],
    ids=lambda features: "-".join(features) or "plain",
)
def test_every_feature_in_a_ragged_batch(level: str, features: dict[str, Any]) -> None:
    _C.set_simd_level(level)
    check(AttentionCase(**MIXED, **features))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("q_dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kv_dtype", ["float32", "float16", "bfloat16"])
def test_query_dtypes(level: str, q_dtype: str, kv_dtype: str) -> None:
    _C.set_simd_level(level)
    check(AttentionCase(**MIXED, q_dtype=q_dtype, kv_dtype=kv_dtype, sinks=True))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kv_dtype", ["float32", "float16", "bfloat16", "float8_e5m2", "int8"])
@pytest.mark.parametrize("form", ["nhd", "hnd", "latent"])
@pytest.mark.parametrize(
    ("num_q_heads", "num_kv_heads", "head_dim"),
    [(3, 3, 20), (14, 2, 33), (12, 1, 72), (32, 8, 128), (64, 4, 48)],
)
def test_few_rows_read_in_place(
    level: str, kv_dtype: str, form: str, num_q_heads: int, num_kv_heads: int, head_dim: int
) -> None:
    """Every block of rows and vectors, and their remainders: 1 to 16 rows a KV head."""
    _C.set_simd_level(level)
    case = AttentionCase(
        q_lens=(1, 2, 1), seq_lens=(70, 600, 7), num_q_heads=num_q_heads, form=form,
        num_kv_heads=1 if form == "latent" else num_kv_heads, head_dim=head_dim,
        kv_dtype=kv_dtype, kv_scale="none", q_dtype="bfloat16", page_size=12,
    )  # fmt: skip
    check(case)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("head_dim", [*range(8, 264, 8), 576])
@pytest.mark.parametrize(
    ("q_dtype", "kv_dtype"),
    [("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("bfloat16", "int8")],
)
def test_head_dims(level: str, head_dim: int, q_dtype: str, kv_dtype: str) -> None:
    """In place and in panels."""
    _C.set_simd_level(level)
    dtypes = dict(q_dtype=q_dtype, kv_dtype=kv_dtype)
    check(AttentionCase(head_dim=head_dim, q_lens=(1, 3, 20), seq_lens=(90, 70, 40), **dtypes))


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "form"),
    [(192, 128, "nhd"), (64, 256, "hnd"), (24, 8, "packed"), (7, 5, "nhd"), (1, 1, "nhd")],
)
def test_v_of_another_size(head_dim: int, head_dim_v: int, form: str) -> None:
    for level in LEVELS:
        _C.set_simd_level(level)
        check(AttentionCase(head_dim=head_dim, head_dim_v=head_dim_v, form=form, kv_dtype="int8",
                            kv_scale="token_head"))  # fmt: skip


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("q_dtype", "kv_dtype", "kv_scale"),
    [
        ("bfloat16", "bfloat16", "none"), ("bfloat16", "float8_e4m3", "token_head"),
        ("float32", "float32", "none"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("num_q_heads", [1, 16, 100, 128])
def test_latent_with_many_query_heads(
    level: str, num_q_heads: int, q_dtype: str, kv_dtype: str, kv_scale: str
) -> None:
    _C.set_simd_level(level)
    check(
        AttentionCase(
            q_lens=(1, 2), seq_lens=(200, 64), num_q_heads=num_q_heads, num_kv_heads=1,
            head_dim=576, head_dim_v=512, form="latent", q_dtype=q_dtype, kv_dtype=kv_dtype,
            kv_scale=kv_scale,
        )
    )  # fmt: skip


@pytest.mark.parametrize("page_size", [1, 2, 3, 16, 33, 64, 100, 256])
@pytest.mark.parametrize("window", [None, 40])
def test_page_sizes(page_size: int, window: int | None) -> None:
    check(AttentionCase(**MIXED, page_size=page_size, window=window))


@pytest.mark.parametrize(("num_q_heads", "num_kv_heads"), [(4, 4), (8, 1), (10, 2), (7, 7), (1, 1)])
def test_group_sizes(num_q_heads: int, num_kv_heads: int) -> None:
    check(AttentionCase(**MIXED, num_q_heads=num_q_heads, num_kv_heads=num_kv_heads))


@pytest.mark.parametrize("kv_dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("level", LEVELS)
def test_rows_whose_elements_are_not_contiguous(level: str, kv_dtype: str) -> None:
    _C.set_simd_level(level)
    check(AttentionCase(**MIXED, form="strided", kv_dtype=kv_dtype, num_kv_heads=2, head_dim=24))


@pytest.mark.parametrize("length", [511, 512, 513, 1024, 1500, 2049])
@pytest.mark.parametrize("window", [None, 600])
def test_long_contexts(length: int, window: int | None) -> None:
    check(
        AttentionCase(q_lens=(1, 3, 1), seq_lens=(length, length, 9), window=window, sinks=True,
                      kv_dtype="bfloat16")
    )  # fmt: skip


@given(data=st.data())
@settings(max_examples=EXAMPLES)
def test_any_case(data: st.DataObject) -> None:
    draw = data.draw
    form = draw(st.sampled_from(["nhd", "hnd", "packed", "latent", "strided"]))
    kv_dtype = draw(st.sampled_from(DTYPES))
    kv_scale = "none" if form == "strided" else draw(st.sampled_from(SCALES))
    if form == "strided" and kv_dtype.startswith("float8"):
        kv_dtype = "bfloat16"
    num_kv_heads = 1 if form == "latent" else draw(st.integers(1, 3))
    head_dim = 8 * draw(st.integers(1, 20))
    head_dim_v = None if form == "strided" else 8 * draw(st.integers(1, head_dim // 8))
    q_lens = draw(st.lists(st.integers(0, 20), min_size=1, max_size=4))
    if draw(st.booleans()):
        q_lens = [1] * len(q_lens)
    seq_lens = [
        draw(st.one_of(st.just(0), st.integers(max(1, q_len), q_len + 300))) for q_len in q_lens
    ]
    _C.set_simd_level(draw(st.sampled_from(LEVELS)))
    check(
        AttentionCase(
            q_lens=tuple(q_lens),
            seq_lens=tuple(seq_lens),
            num_q_heads=num_kv_heads * draw(st.integers(1, 9)),
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            head_dim_v=head_dim_v if head_dim_v or form != "latent" else head_dim,
            page_size=draw(st.integers(1, 70)),
            form=form,
            kv_dtype=kv_dtype,
            kv_scale=kv_scale,
            q_dtype=draw(st.sampled_from(["float32", "float16", "bfloat16"])),
            causal=draw(st.booleans()),
            scale=draw(st.sampled_from([None, 0.1])),
            window=draw(st.sampled_from([None, 1, 5, 64, 100])),
            softcap=draw(st.sampled_from([None, 4.0, 30.0])),
            sinks=draw(st.booleans()),
            alibi=draw(st.booleans()),
            csr=draw(st.booleans()),
            seed=draw(st.integers(0, 3)),
        )
    )


# --- the reference itself -----------------------------------------------------------------------


def test_the_reference_agrees_with_torch() -> None:
    case = AttentionCase(q_lens=(40,), seq_lens=(40,), num_q_heads=2, num_kv_heads=2, page_size=40)
    inputs = make_attention(case)
    q, pool, layer, page_table, _ = inputs.args
    page = int(page_table[0, 0])
    k, v = (torch.from_dlpack(plane)[page] for plane in (pool.k(layer), pool.v(layer)))
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), is_causal=True
    )
    assert_close(reference(*inputs.args, **inputs.kwargs)[0], expected.transpose(0, 1))


def test_window_softcap_alibi_and_sinks_mean_what_they_say() -> None:
    layout = kvlink.KVLayout.nhd(num_kv_heads=1, head_dim=8, page_size=4, dtype="float32")
    pool = kvlink.KVPool.create(layout, num_layers=1, num_pages=1)
    torch.from_dlpack(pool.k(0))[0, :, 0, 0] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    torch.from_dlpack(pool.v(0))[0, :, 0, 0] = torch.tensor([10.0, 20.0, 30.0, 40.0])
    q = torch.zeros(1, 1, 8)
    q[0, 0, 0] = 1.0
    scores = 2.0 * torch.tanh(torch.tensor([1.5, 2.0]) / 2.0) + 0.25 * torch.tensor([-1.0, 0.0])
    logits = torch.cat([scores, torch.tensor([0.7])])
    out, lse = kvlink.paged_attention(
        q, pool, 0, [[0]], [4], scale=0.5, softcap=2.0, window=2, return_lse=True,
        alibi_slopes=torch.tensor([0.25]), sinks=torch.tensor([0.7]),
    )  # fmt: skip
    assert_close(lse[0, 0], logits.logsumexp(0))
    assert_close(out[0, 0, 0], logits.softmax(0)[:2] @ torch.tensor([30.0, 40.0]))
