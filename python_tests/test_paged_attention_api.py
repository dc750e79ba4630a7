"""paged_attention as a call: arrays of any library, refusals, backends."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

import kvlink
from kvlink import attention
from kvlink.errors import InvalidArgument, PageTableError, Unsupported
from kvlink.testing.cases import AttentionCase, make_attention
from kvlink.testing.tolerances import assert_close, assert_same_bits

CASE = AttentionCase(q_lens=(2, 3), seq_lens=(40, 21))


def call(**changes: Any) -> Any:
    """The case's call with some of its arguments replaced."""
    inputs = make_attention(CASE)
    names = ("q", "pool", "layer", "page_table", "seq_lens")
    arguments = {**dict(zip(names, inputs.args, strict=True)), **inputs.kwargs, **changes}
    positional = [arguments.pop(name) for name in names]
    return kvlink.paged_attention(*positional, **arguments)


def test_a_plain_call_returns_out_alone() -> None:
    out = call()
    assert isinstance(out, torch.Tensor)
    assert_same_bits(call(return_lse=True)[0], out)


def test_numpy_arrays_give_numpy_arrays() -> None:
    q, _, _, page_table, seq_lens = make_attention(CASE).args
    out, lse = call(
        q=q.numpy(), page_table=page_table.numpy(), seq_lens=seq_lens.numpy(), return_lse=True
    )
    assert isinstance(out, np.ndarray)
    assert isinstance(lse, np.ndarray)
    assert (out.dtype, lse.dtype) == (np.float32, np.float32)
    assert_same_bits(torch.from_numpy(out), call())


def test_lists_are_taken_for_the_small_arrays() -> None:
    page_table = make_attention(CASE).args[3]
    pages = [page_table[0, :3].tolist(), page_table[1, :2].tolist()]
    assert_same_bits(call(page_table=pages, seq_lens=[40, 21], q_indptr=[0, 2, 5]), call())
    entries = [*pages[0], *pages[1]]
    with pytest.raises(InvalidArgument, match=r"page_indptr\[2\]"):
        call(page_table=entries, page_indptr=[0, 3, 4])
    assert_same_bits(call(page_table=entries, page_indptr=[0, 3, 5]), call())


def test_out_is_written_and_returned() -> None:
    out = torch.empty(5, 4, 64)[:, :, 16:48]
    assert call(out=out) is out
    assert_same_bits(out, call())
    with pytest.raises(InvalidArgument, match=r"out: expected .*head_dim_v"):
        call(out=torch.empty(5, 4, 31))
    with pytest.raises(InvalidArgument, match="out: expected dtype float32; got float16"):
        call(out=torch.empty(5, 4, 32, dtype=torch.float16))


def test_q_may_be_a_slice() -> None:
    q = make_attention(CASE).args[0]
    wide = torch.full((5, 9, 40), float("nan"))
    wide[:, 2:6, 4:36] = q
    assert_same_bits(call(q=wide[:, 2:6, 4:36]), call())


def test_an_idle_place_gives_zeros() -> None:
    out, lse = call(seq_lens=torch.tensor([0, 21], dtype=torch.int32), return_lse=True,
                    sinks=torch.ones(4))  # fmt: skip
    assert torch.equal(out[:2], torch.zeros(2, 4, 32))
    assert bool((lse[:2] == float("-inf")).all())
    assert bool((out[2:] != 0).any(dim=-1).all())


def test_an_empty_batch_is_fine() -> None:
    empty = torch.empty(0, dtype=torch.int32)
    out = call(q=torch.empty(0, 4, 32), page_table=empty.view(0, 0), seq_lens=empty, q_indptr=None)
    assert out.shape == (0, 4, 32)


@pytest.mark.parametrize("bad", [2**31 - 1, -7, -1, 10])
def test_a_page_that_would_be_read_is_checked(bad: int) -> None:
    page_table = make_attention(CASE).args[3].clone()
    pool_pages = make_attention(CASE).pool.num_pages
    page_table[1, 1] = pool_pages if bad == 10 else bad
    out = torch.full((5, 4, 32), 7.0)
    message = r"page_table: sequence 1, index 1: .*8 pages"
    with pytest.raises(PageTableError, match=message) as error:
        call(page_table=page_table, out=out)
    assert ("unmapped" in str(error.value)) == (bad == -1)
    assert bool((out == 7.0).all()), "something was written"


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(q=torch.zeros(5, 4, 31)), r"q: expected head_dim = 32 as in pool; got 31"),
        (dict(q=torch.zeros(5, 128)), r"q: expected shape \[T, Hq, head_dim\]; got \(5, 128\)"),
        (dict(q=torch.zeros(5, 3, 32)), "q: expected .* multiple of the 2 KV heads; got 3"),
        (dict(q=[1.0]), "q: expected an array; got list"),
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
        (
            dict(backend="gpu"),
            "backend: expected auto or one of cpu, cuda, triton, reference; got 'gpu'",
        ),
    ],
)
def test_wrong_values_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        call(**changes)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(Unsupported, match="cpu lacks feature 'sorting'"):
        attention.choose_backend("float32", make_attention(CASE).pool, ["sorting"])
    with pytest.raises(Unsupported, match="reference lacks feature 'plan'"):
        call(plan=object(), backend="reference")
    with pytest.raises(Unsupported, match="q dtype float64"):
        call(q=torch.zeros(5, 4, 32, dtype=torch.float64))
    opaque = kvlink.KVPool.create(kvlink.KVLayout.opaque([64], "uint8"), num_layers=1, num_pages=1)
    with pytest.raises(Unsupported, match="KV dtype uint8"):
        call(pool=opaque)


def test_backends_say_why() -> None:
    pool = make_attention(CASE).pool
    assert attention.choose_backend("float32", pool, ["window"]).name == "cpu"
    assert "cpu" in attention.choose_backend("float32", pool).why
    assert attention.choose_backend("float32", pool, backend="reference").why == "asked for"


def test_the_reference_is_a_backend() -> None:
    out, lse = call(return_lse=True, backend="reference", softcap=4.0, window=9)
    expected, expected_lse = call(return_lse=True, softcap=4.0, window=9)
    assert_close(out, expected)
    assert_close(lse, expected_lse, "lse")
    q = make_attention(CASE).args[0].numpy()
    assert_close(torch.from_numpy(call(q=q, backend="reference", softcap=4.0, window=9)), expected)


NUMPY_ONLY = """
import sys
sys.modules["torch"] = None  # importing it fails
import numpy as np
import kvlink
layout = kvlink.KVLayout.nhd(num_kv_heads=1, head_dim=8, page_size=4, dtype="float32")
pool = kvlink.KVPool.create(layout, num_layers=1, num_pages=2)
np.from_dlpack(pool.v(0))[1, :3] = np.array([1.0, 2.0, 6.0])[:, None, None]
out, lse = kvlink.paged_attention(
    np.ones((1, 2, 8), np.float32), pool, 0, np.array([[1]], np.int32), np.array([3], np.int32),
    return_lse=True)
np.testing.assert_allclose(out, 3.0, rtol=1e-6)
np.testing.assert_allclose(lse, np.log(3.0), rtol=1e-6)
merged, _ = kvlink.merge_states(out, lse, out, lse)
np.testing.assert_allclose(merged, 3.0, rtol=1e-6)
"""


def run_python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **variables}, capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip


def test_numpy_is_enough() -> None:
    result = run_python(NUMPY_ONLY)
    assert result.returncode == 0, result.stderr


def test_a_simd_level_that_does_not_exist_is_refused() -> None:
    result = run_python(NUMPY_ONLY, KVLINK_SIMD="sse9")
    assert result.returncode == 1
    assert "KVLINK_SIMD: expected a level that this CPU runs (portable" in result.stderr
    assert run_python(NUMPY_ONLY, KVLINK_SIMD="portable").returncode == 0
