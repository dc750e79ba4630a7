"""append_kv against the reference, byte for byte, over whole pools."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlink import _C, KVPool, append_kv
from kvlink.errors import InvalidArgument, Unsupported
from kvlink.reference.append_kv import append_kv as reference_append_kv
from kvlink.testing.pools import DTYPES, KINDS, SCALES, make_pool, random_rows

EXAMPLES = int(os.environ.get("KVLINK_HYPOTHESIS_EXAMPLES", "60"))
INPUTS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def random_slots(num_tokens: int, num_slots: int, seed: int) -> torch.Tensor:
    """Distinct slots, partly consecutive, some skipped."""
    random = np.random.default_rng(seed)
    slots = np.concatenate(
        [np.arange(num_slots // 2), num_slots // 2 + random.permutation(num_slots - num_slots // 2)]
    )[-num_tokens:].copy()
    slots[random.random(num_tokens) < 0.15] = -1
    return torch.from_numpy(slots).long()


def check_against_reference(kind: str, source: torch.dtype, seed: int = 0, **shape: object) -> None:
    ours, expected = (make_pool(kind, seed=seed, **shape) for _ in range(2))  # type: ignore[arg-type]
    layout = ours.pool.layout
    num_tokens = min(19, ours.pool.num_pages * layout.page_size)
    slots = random_slots(num_tokens, ours.pool.num_pages * layout.page_size, seed)
    rows = (num_tokens, layout.num_kv_heads)
    k = random_rows(*rows, layout.head_dim, dtype=source, seed=seed)
    v = random_rows(*rows, layout.head_dim_v, dtype=source, seed=seed + 1)
    values = v if layout.has_v_plane else None
    append_kv(k, values, ours.pool, 0, slots)
    reference_append_kv(k, values, expected.pool, 0, slots)
    assert ours.bytes() == expected.bytes()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_scale(simd_level: str, dtype: str, scale: str) -> None:
    for i, (source, kind) in enumerate((s, k) for s in INPUTS for k in KINDS):
        check_against_reference(kind, INPUTS[source], seed=i, dtype=dtype, scale=scale)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_latent(dtype: str, scale: str) -> None:
    shape = dict(dtype=dtype, scale=scale, head_dim=24, head_dim_v=16)
    check_against_reference("latent", torch.bfloat16, **shape)


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.data())
def test_any_geometry(data: st.DataObject) -> None:
    draw = data.draw
    check_against_reference(
        draw(st.sampled_from((*KINDS, "latent"))),
        INPUTS[draw(st.sampled_from(sorted(INPUTS)))],
        seed=draw(st.integers(0, 99)),
        dtype=draw(st.sampled_from(DTYPES)),
        scale=draw(st.sampled_from(SCALES)),
        num_kv_heads=draw(st.integers(1, 5)),
        head_dim=(dim := draw(st.sampled_from([1, 7, 64, 80, 130, 1025]))),
        head_dim_v=min(dim, draw(st.sampled_from([1, 64, 1025]))),
        page_size=draw(st.integers(1, 9)),
        num_pages=draw(st.integers(1, 5)),
    )


def test_any_strides_of_tokens_and_heads() -> None:
    ours, expected = make_pool("nhd"), make_pool("nhd")
    k = random_rows(2, 24, 8).transpose(0, 1)  # heads outermost
    wide = random_rows(24, 2, 40, seed=1)
    v = wide[:, :, 16:24]  # part of a fused projection
    slots = torch.arange(24)
    append_kv(k, v, ours.pool, 0, slots)
    reference_append_kv(k, v, expected.pool, 0, slots)
    assert ours.bytes() == expected.bytes()
    append_kv(k[:1].expand(24, 2, 8), v, ours.pool, 0, slots)  # stride 0
    reference_append_kv(k[:1].expand(24, 2, 8), v, expected.pool, 0, slots)
    assert ours.bytes() == expected.bytes()


def test_nan_stays_nan_and_leaves_its_row_alone() -> None:
    for dtype, scale in (("float8_e4m3", "token_head"), ("bfloat16", "none"), ("int8", "head")):
        filled = make_pool("hnd", dtype=dtype, scale=scale)
        k = torch.ones(1, 2, 8)
        k[0, 0, 3] = float("nan")
        append_kv(k, k, filled.pool, 0, torch.tensor([5]))
        row = torch.from_dlpack(filled.pool.k(0))[1, 1, 0].float()
        if dtype == "int8":
            assert row[3] == 0
        else:
            assert torch.isnan(row[3])
        rest = row[[0, 1, 2, 4, 5, 6, 7]]
        assert not torch.isnan(rest).any()
        assert (rest == rest[0]).all()
        assert rest[0] > 0


def test_layers_are_apart() -> None:
    filled = make_pool("nhd", num_layers=2)
    before = filled.bytes()
    append_kv(torch.ones(1, 2, 8), torch.ones(1, 2, 8), filled.pool, 1, torch.tensor([0]))
    half = len(before) // 2
    assert filled.bytes()[:half] == before[:half]
    assert filled.bytes()[half:] != before[half:]


def test_any_number_of_threads() -> None:
    k = random_rows(2000, 2, 64)
    slots = torch.from_numpy(np.random.default_rng(0).permutation(2048)[:2000])
    threads = _C.num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            _C.set_num_threads(count)
            filled = make_pool(
                "nhd", dtype="int8", scale="token_head", head_dim=64, page_size=16, num_pages=128
            )
            append_kv(k, k, filled.pool, 0, slots)
            results.append(filled.bytes())
    finally:
        _C.set_num_threads(threads)
    assert results[0] == results[1] == results[2]


def test_no_tokens_and_all_skipped() -> None:
    filled = make_pool("nhd")
    before = filled.bytes()
    append_kv(torch.ones(0, 2, 8), torch.ones(0, 2, 8), filled.pool, 0, torch.ones(0).long())
    append_kv(torch.ones(3, 2, 8), torch.ones(3, 2, 8), filled.pool, 0, torch.full((3,), -1))
    assert filled.bytes() == before


@pytest.mark.parametrize("slot", [-2, 24, 2**40, -(2**63)])
def test_a_bad_slot_writes_nothing(slot: int) -> None:
    filled = make_pool("nhd")
    before = filled.bytes()
    k = torch.ones(3, 2, 8)
    with pytest.raises(InvalidArgument, match=rf"slots\[2\].*\[0, 24\); got {slot}$"):
        append_kv(k, k, filled.pool, 0, torch.tensor([0, 1, slot]))
    assert filled.bytes() == before


def test_refusals() -> None:
    pool = make_pool("nhd").pool
    k, slots = torch.ones(3, 2, 8), torch.arange(3)

    def refuses(match: str, *args: object, error: type[Exception] = InvalidArgument) -> None:
        with pytest.raises(error, match=match):
            append_kv(*args)  # type: ignore[arg-type]

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
    refuses("opaque", k[:, :1], None, make_pool("opaque").pool, 0, slots, error=Unsupported)


def test_numpy_and_read_only_inputs() -> None:
    filled, expected = make_pool("nhd"), make_pool("nhd")
    k = np.arange(48, dtype=np.float32).reshape(3, 2, 8)
    slots = np.array([7, 8, 2])
    append_kv(k, k, filled.pool, 0, slots)
    assert isinstance(filled.pool, KVPool)
    k_torch = torch.from_numpy(k)
    reference_append_kv(k_torch, k_torch, expected.pool, 0, torch.from_numpy(slots))
    assert filled.bytes() == expected.bytes()
