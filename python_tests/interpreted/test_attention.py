"""paged_attention of kvlink.triton against its meaning, over pools full of poison."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kvlink
from kvlink.errors import InvalidArgument, PageTableError, Unsupported
from kvlink.reference.paged_attention import paged_attention as reference
from kvlink.testing.cases import AttentionCase, make_attention, starts
from kvlink.testing.tolerances import assert_close, assert_same_bits
from kvlink.triton import TensorPool, configs, paged_attention

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


def check(case: AttentionCase) -> None:
    inputs = make_attention(case)
    out, lse = kvlink.paged_attention(
        *inputs.args, **inputs.kwargs, return_lse=True, backend="triton"
    )
    expected, expected_lse = reference(*inputs.args, **inputs.kwargs)
    assert bool(expected.isfinite().all()), "the case leaks poison"
    assert_close(out, expected)
    assert_close(lse, expected_lse, "lse")


@pytest.mark.parametrize("form", ["nhd", "hnd", "packed", "latent"])
@pytest.mark.parametrize(("kv_dtype", "kv_scale"), STORAGE)
def test_every_form_and_storage(form: str, kv_dtype: str, kv_scale: str) -> None:
    heads = dict(num_q_heads=3, num_kv_heads=1) if form == "latent" else {}
    sizes = dict(head_dim=40, head_dim_v=24, page_size=7, form=form, **heads)
    queries = (("float32", (1, 5)), ("bfloat16", (1, 1)), ("float16", (1, 1)))
    for q_dtype, q_lens in queries if form == "nhd" else queries[:1]:
        check(
            AttentionCase(
                q_lens=q_lens, seq_lens=(20, 75), kv_dtype=kv_dtype, kv_scale=kv_scale,
                q_dtype=q_dtype, **sizes,
            )
        )  # fmt: skip


@pytest.mark.parametrize("features", FEATURES, ids=lambda features: "-".join(features) or "plain")
def test_every_feature(features: dict[str, Any]) -> None:
    check(AttentionCase(**MIXED, **features))
    check(AttentionCase(q_lens=(1, 1), seq_lens=(70, 600), **features))


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v"), [(8, 8), (24, 40), (64, 64), (80, 16), (192, 128), (1, 1), (7, 5)]
)
def test_head_dims(head_dim: int, head_dim_v: int) -> None:
    sizes = dict(head_dim=head_dim, head_dim_v=head_dim_v)
    check(AttentionCase(q_lens=(1, 3), seq_lens=(90, 70), kv_dtype="bfloat16", **sizes))
    check(AttentionCase(seq_lens=(3, 90, 70), kv_dtype="float16", q_dtype="float16", **sizes))


@pytest.mark.parametrize("q_lens", [(1, 1), (1, 2)])
@pytest.mark.parametrize("kv_scale", ["none", "token_head"])
def test_latent_with_many_query_heads(q_lens: tuple[int, int], kv_scale: str) -> None:
    check(
        AttentionCase(
            q_lens=q_lens, seq_lens=(100, 64), num_q_heads=70, num_kv_heads=1, head_dim=576,
            head_dim_v=512, form="latent", q_dtype="bfloat16", kv_scale=kv_scale,
            kv_dtype="bfloat16" if kv_scale == "none" else "float8_e4m3",
        )
    )  # fmt: skip


@pytest.mark.parametrize("page_size", [1, 3, 64, 100, 256])
@pytest.mark.parametrize("window", [None, 40])
def test_page_sizes(page_size: int, window: int | None) -> None:
    case = dict(page_size=page_size, window=window, seq_lens=(130, 5))
    check(AttentionCase(q_lens=(20, 3), **case))
    check(AttentionCase(q_lens=(1, 1), **case))


@pytest.mark.parametrize(("num_q_heads", "num_kv_heads"), [(4, 4), (40, 1), (10, 2), (1, 1)])
def test_group_sizes(num_q_heads: int, num_kv_heads: int) -> None:
    heads = dict(num_q_heads=num_q_heads, num_kv_heads=num_kv_heads, head_dim=16)
    check(AttentionCase(q_lens=(1, 9), seq_lens=(70, 30), **heads))
    check(AttentionCase(q_lens=(1, 1), seq_lens=(70, 30), **heads))


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
def test_rows_whose_elements_are_not_contiguous(kv_dtype: str) -> None:
    check(AttentionCase(**MIXED, form="strided", kv_dtype=kv_dtype, head_dim=24))


@pytest.mark.parametrize("length", [512, 513, 1100])
@pytest.mark.parametrize("window", [None, 600])
@pytest.mark.parametrize("csr", [False, True])
def test_splits(length: int, window: int | None, csr: bool) -> None:
    sizes = dict(head_dim=16, num_q_heads=2, num_kv_heads=1)
    check(AttentionCase(seq_lens=(length, 9, length), window=window, csr=csr, sinks=True, **sizes))


# --- what never matters -----------------------------------------------------------------------


def test_the_batch_does_not_matter() -> None:
    case = AttentionCase(seq_lens=(1100, 65, 530), head_dim=16, kv_dtype="bfloat16", sinks=True)
    inputs = make_attention(case)
    q, pool, layer, page_table, seq_lens = inputs.args
    sinks = inputs.kwargs["sinks"]
    out, lse = paged_attention(*inputs.args, sinks=sinks, return_lse=True)
    for order in ([0], [1], [2, 1], [1, 0, 2, 1]):
        width = -(-max(seq_lens[order].tolist()) // case.page_size)  # so the number of splits, too
        table = page_table[order, :width]
        again, again_lse = paged_attention(
            q[order], pool, layer, table, seq_lens[order], sinks=sinks, return_lse=True
        )
        assert_same_bits(again, out[order])
        assert_same_bits(again_lse, lse[order], "lse")


def test_chunks_of_the_new_tokens_do_not_matter() -> None:
    """Bit for bit where a chunk begins with a tile: numpy multiplies a matrix row by its place."""
    case = AttentionCase(q_lens=(52,), seq_lens=(200,), num_q_heads=2, kv_dtype="bfloat16")
    q, pool, layer, page_table, _ = make_attention(case).args
    whole = paged_attention(q, pool, layer, page_table, [200], q_indptr=[0, 52])
    rows = configs.attention(128, 32, wide=True).m
    for begin, end in ((0, rows), (rows, 3 * rows), (3 * rows, 52), (5, 6), (7, 50)):
        part = paged_attention(
            q[begin:end], pool, layer, page_table, [148 + end], q_indptr=[0, end - begin]
        )
        assert_close(part, whole[begin:end])
        if begin % rows == 0:
            assert_same_bits(part, whole[begin:end])


def test_the_batch_of_chunks_does_not_matter() -> None:
    case = AttentionCase(q_lens=(1, 7, 30), seq_lens=(150, 65, 100), kv_dtype="bfloat16")
    inputs = make_attention(case)
    q, pool, layer, page_table, seq_lens = inputs.args
    out = paged_attention(*inputs.args, **inputs.kwargs)
    indptr = inputs.kwargs["q_indptr"].tolist()
    for order in ([1], [2, 0], [1, 2, 1, 0]):
        rows = torch.cat([torch.arange(indptr[seq], indptr[seq + 1]) for seq in order])
        again = paged_attention(
            q[rows], pool, layer, page_table[order], seq_lens[order],
            q_indptr=starts([case.q_lens[seq] for seq in order]),
        )  # fmt: skip
        assert_same_bits(again, out[rows])


# --- the call -----------------------------------------------------------------------------------


def call(case: AttentionCase | None = None, **changes: Any) -> Any:
    inputs = make_attention(case or AttentionCase(q_lens=(2, 3), seq_lens=(40, 21)))
    names = ("q", "pool", "layer", "page_table", "seq_lens")
    arguments = {**dict(zip(names, inputs.args, strict=True)), **inputs.kwargs, **changes}
    positional = [arguments.pop(name) for name in names]
    return kvlink.paged_attention(*positional, backend="triton", **arguments)


def test_an_idle_place_gives_zeros() -> None:
    for case in (
        AttentionCase(q_lens=(2, 3), seq_lens=(40, 21)),
        AttentionCase(seq_lens=(40, 21, 9)),
    ):
        lens = torch.tensor([0, *case.seq_lens[1:]], dtype=torch.int32)
        out, lse = call(case, seq_lens=lens, return_lse=True, sinks=torch.ones(4))
        idle = case.q_lens[0]
        assert torch.equal(out[:idle], torch.zeros(idle, 4, 32))
        assert bool((lse[:idle] == float("-inf")).all())
        assert bool((out[idle:] != 0).any(dim=-1).all())


def test_an_empty_batch_is_fine() -> None:
    empty = torch.empty(0, dtype=torch.int32)
    out = call(q=torch.empty(0, 4, 32), page_table=empty.view(0, 0), seq_lens=empty, q_indptr=None)
    assert out.shape == (0, 4, 32)


def test_out_lists_numpy_and_slices() -> None:
    expected = call()
    out = torch.empty(5, 4, 64)[:, :, 16:48]
    assert call(out=out) is out
    assert_same_bits(out, expected)
    inputs = make_attention(AttentionCase(q_lens=(2, 3), seq_lens=(40, 21)))
    q, _, _, page_table, _ = inputs.args
    pages = [page_table[0, :3].tolist(), page_table[1, :2].tolist()]
    assert_same_bits(call(page_table=pages, seq_lens=[40, 21], q_indptr=[0, 2, 5]), expected)
    entries = [*pages[0], *pages[1]]
    assert_same_bits(call(page_table=entries, page_indptr=[0, 3, 5]), expected)
    wide = torch.full((5, 9, 40), float("nan"))
    wide[:, 2:6, 4:36] = q
    assert_same_bits(call(q=wide[:, 2:6, 4:36]), expected)
    assert_same_bits(torch.from_numpy(call(q=q.numpy())), expected)


def test_an_engines_own_tensors() -> None:
    case = AttentionCase(seq_lens=(30, 70, 1), form="hnd")
    q, pool, layer, page_table, seq_lens = make_attention(case).args
    k, v = (torch.from_dlpack(plane(layer)) for plane in (pool.k, pool.v))
    out = paged_attention(q, TensorPool([k], [v]), 0, page_table, seq_lens)
    assert_same_bits(out, paged_attention(q, pool, layer, page_table, seq_lens))


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(q=torch.zeros(5, 4, 31)), r"q: expected head_dim = 32 as in pool; got 31"),
        (dict(q=torch.zeros(5, 128)), r"q: expected shape \[T, Hq, head_dim\]; got \(5, 128\)"),
        (dict(q=torch.zeros(5, 3, 32)), "q: expected .* multiple of the 2 KV heads; got 3"),
        (dict(layer=2), "layer: expected 0 to 1; got 2"),
        (dict(seq_lens=int32(40, 81)), "sequence 1 of length 81 needs 6 pages of 16; got 5"),
        (dict(seq_lens=int32(40, -1)), r"seq_lens\[1\]: expected >= 0; got -1"),
        (dict(seq_lens=int32(1, 21)), r"seq_lens\[0\]: expected at least 2.*; got 1"),
        (dict(seq_lens=int32(40)), "num_seqs"),
        (dict(seq_lens=torch.tensor([40, 21])), "seq_lens: expected dtype int32; got int64"),
        (dict(q_indptr=int32(0, 2, 4)), r"q_indptr\[2\]: expected 5.*; got 4"),
        (dict(q_indptr=int32(0, 6, 5)), r"q_indptr\[2\]: expected at least 6.*; got 5"),
        (dict(q_indptr=int32(1, 2, 5)), r"q_indptr\[0\]: expected 0; got 1"),
        (dict(q_indptr=None), "q: expected one row for each of the 2 sequences.*; got 5"),
        (dict(window=0), "window: expected >= 1 or None; got 0"),
        (dict(softcap=-1.0), "softcap: expected > 0 or None; got -1.0"),
        (dict(sinks=torch.zeros(3)), "sinks: expected num_q_heads = 4 as in q; got 3"),
        (dict(alibi_slopes=torch.zeros(4).double()), "alibi_slopes: expected dtype float32"),
        (dict(out=torch.empty(5, 4, 31)), r"out: expected .*head_dim_v"),
    ],
)
def test_wrong_values_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        call(**changes)


@pytest.mark.parametrize("bad", [2**31 - 1, -7, -1, 10])
def test_a_page_that_would_be_read_is_checked(bad: int) -> None:
    inputs = make_attention(AttentionCase(q_lens=(2, 3), seq_lens=(40, 21)))
    page_table = inputs.args[3].clone()
    page_table[1, 1] = inputs.pool.num_pages if bad == 10 else bad
    out = torch.full((5, 4, 32), 7.0)
    with pytest.raises(PageTableError, match=r"page_table: sequence 1, index 1: .*8 pages"):
        call(page_table=page_table, out=out)
    assert bool((out == 7.0).all()), "something was written"


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("bad", [2**31 - 1, -7, -(2**31)])
def test_a_bad_page_on_a_device_is_not_read(
    bad: int, decode: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There nobody looks before the launch: the kernel skips, a later call tells."""
    monkeypatch.setattr("kvlink.triton.attention_arguments._check_values", lambda *_: None)
    q_lens = (1, 1) if decode else (2, 3)
    case = AttentionCase(q_lens=q_lens, seq_lens=(40, 21))
    page_table = make_attention(case).args[3].clone()
    page_table[1, 1] = bad
    clean = call(case)
    out = call(case, page_table=page_table)
    assert_same_bits(out[: q_lens[0]], clean[: q_lens[0]])  # the other sequence
    assert bool(out.isfinite().all())
    with pytest.raises(PageTableError, match=rf"sequence 1, index 1 lies outside .*; got {bad}$"):
        call(case)
    lens = torch.tensor([40, 2000], dtype=torch.int32)  # more than the table has
    call(case, seq_lens=lens)
    with pytest.raises(PageTableError, match="sequence 1, index"):
        call(case)
    assert_same_bits(call(case), clean)  # told once


def test_what_is_missing_is_named() -> None:
    for name in ("mask", "plan", "ready"):
        with pytest.raises(Unsupported, match=f"triton lacks feature '{name}'"):
            call(**{name: torch.ones(1)})
    with pytest.raises(Unsupported, match=r"head_dim: triton supports up to 576 .*; got 640"):
        call(AttentionCase(head_dim=640, q_lens=(1,), seq_lens=(1,)))


def test_configurations_cover_what_is_accepted() -> None:
    for rows in (1, 16, 17, 64, 128):
        for dims in (16, 32, 576):
            for wide in (False, True):
                assert configs.attention(rows, dims, wide).n % 16 == 0
