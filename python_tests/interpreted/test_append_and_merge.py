"""append_kv and merge_states of kvlink.triton against the reference, byte for byte."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import torch

import kvlink
from kvlink import Rope, rope_table
from kvlink.errors import InvalidArgument, Unsupported
from kvlink.reference.append_kv import append_kv as reference_append_kv
from kvlink.reference.merge_states import merge_states as reference_merge_states
from kvlink.testing.pools import DTYPES, KINDS, SCALES, make_pool, random_rows
from kvlink.testing.tolerances import assert_close, assert_same_bits
from kvlink.triton import TensorPool, append_kv, merge_states

SOURCES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def make_rope(num_tokens: int, rotary_dim: int, interleaved: bool, first_dim: int) -> Rope:
    table = rope_table(0.7 ** np.arange(rotary_dim // 2), 50, factor=1.1)
    positions = np.random.default_rng(0).integers(0, 50, num_tokens)
    return Rope(torch.from_numpy(table), torch.from_numpy(positions), interleaved, first_dim)


def check_append(
    kind: str, source: torch.dtype, seed: int = 0, rope: object = None, **shape: object
) -> None:
    shape = dict(head_dim=24, head_dim_v=16) | shape
    ours, expected = (make_pool(kind, seed=seed, **shape) for _ in range(2))  # type: ignore[arg-type]
    layout = ours.pool.layout
    slots = torch.from_numpy(np.random.default_rng(seed).permutation(24)[:19]).long()
    slots[3] = -1
    # NOTE: in a rope, inf - inf is a NaN of either sign.
    k = random_rows(19, layout.num_kv_heads, layout.head_dim, dtype=source, seed=seed)
    k = k if rope is None else k.nan_to_num(posinf=300.0)
    v = random_rows(19, layout.num_kv_heads, layout.head_dim_v, dtype=source, seed=seed + 1)
    values = v if layout.has_v_plane else None
    kvlink.append_kv(k, values, ours.pool, 0, slots, rope=rope, backend="triton")  # type: ignore[arg-type]
    reference_append_kv(k, values, expected.pool, 0, slots, rope=rope)
    assert ours.bytes() == expected.bytes()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_scale(dtype: str, scale: str) -> None:
    for i, kind in enumerate((*KINDS, "latent")):
        source = list(SOURCES.values())[i % 3]
        check_append(kind, source, seed=i, dtype=dtype, scale=scale)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim", "first_dim"),
    [(128, 128, 0), (80, 32, 0), (36, 34, 2), (8, 2, 3), (576, 64, 512), (2, 2, 0)],
)
def test_rope(head_dim: int, rotary_dim: int, first_dim: int, interleaved: bool) -> None:
    rope = make_rope(19, rotary_dim, interleaved, first_dim)
    for kind, source in (("hnd", torch.bfloat16), ("latent", torch.float16)):
        check_append(
            kind, source, rope=rope, head_dim=head_dim, head_dim_v=head_dim // 2, dtype="bfloat16"
        )


def test_many_layers_and_any_strides() -> None:
    ours, expected = make_pool("nhd", num_layers=3), make_pool("nhd", num_layers=3)
    k = random_rows(2, 2, 24, 8).transpose(1, 2)  # heads outside tokens
    v = random_rows(2, 24, 2, 40, seed=1)[..., 16:24]  # part of a fused projection
    slots = torch.arange(24)
    append_kv(k, v, ours.pool, [2, 0], slots)
    reference_append_kv(k, v, expected.pool, [2, 0], slots)
    assert ours.bytes() == expected.bytes()


def test_nan_stays_nan_and_leaves_its_row_alone() -> None:
    for dtype, scale in (
        ("float8_e4m3", "token_head"), ("float8_e5m2", "none"), ("bfloat16", "none"),
        ("float16", "none"), ("int8", "head"),
    ):  # fmt: skip
        filled = make_pool("hnd", dtype=dtype, scale=scale)
        k = torch.ones(1, 2, 8)
        k[0, 0, 3] = float("nan")
        append_kv(k, k, filled.pool, 0, torch.tensor([5]))
        row = torch.from_dlpack(filled.pool.k(0))[1, 1, 0].float()
        assert row[3] == 0 if dtype == "int8" else row[3].isnan()
        rest = row[[0, 1, 2, 4, 5, 6, 7]]
        assert bool((rest == rest[0]).all())
        assert rest[0] > 0


def test_every_value_is_rounded_as_the_reference_rounds_it() -> None:
    values = torch.randint(
        -(2**31), 2**31, (400, 1, 64), generator=torch.Generator().manual_seed(1)
    )
    k = values.int().view(torch.float32)
    k = torch.where(k.isnan(), 1.0, k)
    k[:40] = torch.linspace(-600, 600, 40 * 64).view(40, 1, 64)  # ties and saturation
    k[40:60] *= torch.tensor(2.0**-100)  # subnormals
    k[60:80] = torch.randn(20, 1, 64) * 0.01
    for dtype in DTYPES:
        ours, expected = (
            make_pool("nhd", dtype=dtype, num_kv_heads=1, head_dim=64, page_size=16, num_pages=25)
            for _ in range(2)
        )
        append_kv(k, k, ours.pool, 0, torch.arange(400))
        reference_append_kv(k, k, expected.pool, 0, torch.arange(400))
        assert ours.bytes() == expected.bytes(), dtype


def test_an_engines_own_tensors() -> None:
    """Paged by heads, as [page, head, slot, dim], and no KVPool."""
    tensors = torch.zeros(2, 5, 2, 4, 8)
    k, v = tensors.permute(0, 1, 3, 2, 4)
    rows = torch.randn(3, 2, 8)
    append_kv(rows, rows + 1, TensorPool([k], [v]), 0, torch.tensor([2, -1, 19]))
    assert torch.equal(k[0, 2], rows[0])
    assert torch.equal(v[4, 3], rows[2] + 1)
    assert int((tensors != 0).sum()) == 2 * 2 * 2 * 8


def test_refusals() -> None:
    filled = make_pool("nhd")
    before = filled.bytes()
    pool, k, slots = filled.pool, torch.ones(3, 2, 8), torch.arange(3)
    rope = make_rope(3, 8, False, 0)

    def refuses(match: str, *args: object, **kwargs: object) -> None:
        with pytest.raises(InvalidArgument, match=match):
            append_kv(*args, **kwargs)  # type: ignore[arg-type]

    refuses(
        "k: expected num_kv_heads = 2 as in the pool; got 3", torch.ones(3, 3, 8), k, pool, 0, slots
    )
    refuses("v: expected head_dim_v = 8", k, torch.ones(3, 2, 9), pool, 0, slots)
    refuses("slots: expected num_tokens = 3", k, k, pool, 0, torch.arange(2))
    refuses("slots: expected dtype int64; got int32", k, k, pool, 0, slots.int())
    refuses("k: expected dtype .*; got float64", k.double(), k.double(), pool, 0, slots)
    refuses("v: expected dtype float32 as in k; got float16", k, k.half(), pool, 0, slots)
    refuses("layer: expected 0 to 0; got 1", k, k, pool, 1, slots)
    refuses("contiguous last axis", torch.ones(3, 8, 2).transpose(1, 2), k, pool, 0, slots)
    refuses("v: expected an array", k, None, pool, 0, slots)
    refuses("v: expected None", k[:, :1], k[:, :1], make_pool("latent").pool, 0, slots)
    refuses(r"slots\[1\].*\[0, 24\); got 24", k, k, pool, 0, torch.tensor([0, 24, 1]))
    bad = rope._replace(positions=torch.tensor([0, 50, 1]))
    refuses(r"positions\[1\]: .* 0 to 49; got 50", k, k, pool, 0, slots, rope=bad)
    bad = rope._replace(first_dim=1)
    refuses("within the 8 of a head; got 1 to 8", k, k, pool, 0, slots, rope=bad)
    assert filled.bytes() == before


def test_what_only_a_kernel_sees_is_skipped_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device: the values are not looked at before the launch."""
    module = sys.modules["kvlink.triton.append_kv"]  # the name itself is the operator's
    monkeypatch.setattr(module, "_check_values", lambda *_: None)
    filled, expected = make_pool("nhd"), make_pool("nhd")
    k = torch.ones(3, 2, 8)
    append_kv(k, k, filled.pool, 0, torch.tensor([1, 2**40, 4]))
    reference_append_kv(k, k, expected.pool, 0, torch.tensor([1, -1, 4]))
    assert filled.bytes() == expected.bytes()
    with pytest.raises(InvalidArgument, match=rf"slots\[1\] lies outside .*; got {2**40}"):
        append_kv(k, k, filled.pool, 0, torch.tensor([1, 2, 4]))
    append_kv(k, k, filled.pool, 0, torch.tensor([1, 2, 4]))  # reported once


# --- merge_states -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", SOURCES.values())
@pytest.mark.parametrize(
    ("shape", "num_states"), list(itertools.product([(7, 3, 40), (1, 1, 1)], [1, 2, 5]))
)
def test_any_states(shape: tuple[int, int, int], num_states: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(num_states)
    outs, lses = [], []
    for _ in range(num_states):
        lse = torch.randn(shape[:2], generator=generator) * 5
        unseen = torch.rand(shape[:2], generator=generator) < 0.3
        lses.append(lse.masked_fill(unseen, float("-inf")))
        # A state that has seen nothing may hold anything.
        out = torch.randn(shape, generator=generator).masked_fill(
            unseen.unsqueeze(-1), float("nan")
        )
        outs.append(out.to(dtype))
    merged, lse = kvlink.merge_states(outs, lses, backend="triton")
    expected, expected_lse = reference_merge_states(outs, lses)
    assert_close(merged, expected)
    assert_close(lse, expected_lse, "lse")
    again, _ = kvlink.merge_states(outs, lses, backend="triton")
    assert_same_bits(again, merged)


def test_wrong_states_are_named() -> None:
    out, lse = torch.zeros(2, 3, 8), torch.zeros(2, 3)

    def refuses(match: str, *states: object) -> None:
        with pytest.raises(InvalidArgument, match=match):
            merge_states(*states)  # type: ignore[arg-type]

    refuses(r"outs\[1\]: expected head_dim = 8.*; got 9", out, lse, torch.zeros(2, 3, 9), lse)
    refuses(r"outs\[1\]: expected dtype float32; got float16", out, lse, out.half(), lse)
    refuses(r"lses\[0\]: expected dtype float32; got float64", out, lse.double(), out, lse)
    refuses("2 outs and 1 lses", [out, out], [lse])
    refuses("at least one", [], [])
    with pytest.raises(Unsupported, match="triton supports up to 64 states; got 65"):
        kvlink.merge_states([out] * 65, [lse] * 65, backend="triton")
    refuses("contiguous", out.transpose(0, 1), lse.transpose(0, 1), out, lse)


def test_no_rows() -> None:
    out, lse = kvlink.merge_states([torch.zeros(0, 3, 8)], [torch.zeros(0, 3)], backend="triton")
    assert (out.shape, lse.shape) == ((0, 3, 8), (0, 3))
