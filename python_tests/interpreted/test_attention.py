"""What paged_attention of kvlink.triton does beyond operators/test_every_attention.py."""

from __future__ import annotations

import contextlib
import itertools
import sys
from typing import Any

import pytest
import torch

import kvlink
from kvlink.errors import InvalidArgument, PageTableError, Unsupported
from kvlink.testing.cases import AttentionCase, make_attention, starts
from kvlink.testing.tolerances import assert_close, assert_same_bits
from kvlink.triton import TensorPool, configs, paged_attention

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
    rows = configs.attention(80, 128, 32, "float32").m
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
        (
            dict(q_positions=int32(38, 40, 1, 2, 3)),
            r"q_positions\[1\]: expected 38 to 39.*; got 40",
        ),
        (
            dict(q_positions=int32(38, 37, 1, 2, 3)),
            r"q_positions\[1\]: expected 38 to 39.*; got 37",
        ),
        (dict(mask=torch.zeros(5, 1)), "mask: expected dtype uint8; got float32"),
        (dict(mask=torch.zeros(4, 1).byte()), "mask: expected num_tokens = 5 as in q; got 4"),
        (dict(mask=torch.zeros(5, 1).byte(), mask_starts=int32(0, 20)), "mask: sequence 0 needs a"),
        (
            dict(mask=torch.zeros(5, 9).byte(), mask_starts=int32(0, 22)),
            r"mask_starts\[1\]: exp.*22",
        ),
        (dict(mask_starts=int32(0, 0)), "mask_starts: expected None without a mask"),
        (dict(page_generations=int32(*range(8))), "expected_generations: comes with"),
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


def test_a_page_of_another_generation_on_a_device_is_not_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvlink.triton.attention_arguments._check_values", lambda *_: None)
    case = AttentionCase(q_lens=(2, 3), seq_lens=(40, 21), generations=True)
    clean = call(case)
    expected = make_attention(case).kwargs["expected_generations"].clone()
    page = int(make_attention(case).args[3][1, 1])
    expected[1, 1] += 1
    assert_same_bits(call(case, expected_generations=expected)[:2], clean[:2])
    match = rf"sequence 1, index 1 lies outside .* another generation .*; got {page}$"
    with pytest.raises(PageTableError, match=match):
        call(case)
    assert_same_bits(call(case), clean)


def test_what_is_missing_is_named() -> None:
    inputs = make_attention(AttentionCase(q_lens=(1,), seq_lens=(1,)))
    for name in ("plan", "ready"):
        with pytest.raises(Unsupported, match=f"triton lacks feature '{name}'"):
            call(**{name: torch.ones(1)})
        with pytest.raises(Unsupported, match=f"{name}: expected None, as triton .*; got <class"):
            paged_attention(*inputs.args, **{name: torch.ones(1)})
    for sizes in (dict(head_dim=640, head_dim_v=64), dict(head_dim=64, head_dim_v=520)):
        case = AttentionCase(**sizes, q_lens=(1,), seq_lens=(1,))
        with pytest.raises(Unsupported, match=r"triton lacks feature 'large_head_dim' .*576"):
            call(case)
        inputs = make_attention(case)
        choice = kvlink.attention.choose_backend("float32", inputs.pool)
        assert choice.name == "cpu"
        with pytest.raises(Unsupported, match=r"head_dim: triton supports up to 576 .*; got"):
            paged_attention(*inputs.args)
    with pytest.raises(Unsupported, match="triton lacks feature 'cascade'"):
        kvlink.attention.choose_backend("float32", inputs.pool, ["cascade"], "triton")


def test_every_operator_has_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int | None] = []

    def on_stream(_: torch.device, stream: int | None) -> Any:
        seen.append(stream)
        return contextlib.nullcontext()

    for name in ("append_kv", "apply_rope", "merge_states", "paged_attention", "relayout_pages"):
        monkeypatch.setattr(sys.modules[f"kvlink.triton.{name}"], "on_stream", on_stream)
    how: dict[str, Any] = dict(backend="triton", stream=5)
    inputs = make_attention(AttentionCase(seq_lens=(9,), q_lens=(1,)))
    q, pool, *_ = inputs.args
    out, lse = kvlink.paged_attention(*inputs.args, return_lse=True, **how)
    kvlink.merge_states([out], [lse], **how)
    kvlink.relayout_pages(pool, [0], pool, [1], num_tokens=2, **how)
    kvlink.digest_pages(pool, [0], num_tokens=2, **how)
    kvlink.copy_pages(pool, [0], [1], **how)
    rope = kvlink.Rope(torch.ones(1, 8), torch.zeros(1).long())
    kvlink.apply_rope(q, rope, **how)
    kvlink.append_kv(q[:, :2], q[:, :2], pool, 0, torch.zeros(1).long(), **how)
    assert seen == [5] * 7


def test_configurations_cover_what_is_accepted() -> None:
    for capability, rows, dims in itertools.product(
        (80, 86, 89, 90, 100, 103, 120, 199), (1, 16, 17, 64, 128), (16, 32, 256, 576)
    ):
        for dtype in ("float32", "float16", "bfloat16", "int8", "float8_e4m3"):
            assert configs.attention(capability, rows, dims, dtype).n % 16 == 0
