"""Rows between dtypes: the vectors of every level agree with the scalars of base/convert.hpp."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvlink import _C, relayout_pages
from kvlink.reference.append_kv import QUANT_MAX, TORCH_DTYPES, scale_plane
from kvlink.testing.pools import DTYPES, make_pool, rows_of

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
SCALES = (1.0, 0.3, 7e-3, 1e30, 1e-30)


def encodings(dtype: str) -> torch.Tensor:
    """Every encoding; of float32 those around the ties of all types, and random ones."""
    if dtype != "float32":
        size = TORCH_DTYPES[dtype].itemsize
        bits = np.arange(2 ** (8 * size), dtype=np.uint32).astype(f"<u{size}")
        return torch.from_numpy(bits.view(np.uint8)).view(TORCH_DTYPES[dtype])
    exponents = np.arange(512, dtype=np.uint32)[:, None] << 23
    halves = np.arange(64, dtype=np.uint32) << 17
    near = (halves[:, None] + np.array([-1, 0, 1])).ravel() & 0x7FFFFF
    random = np.random.default_rng(0).integers(0, 2**32, 50_000, dtype=np.uint32)
    bits = np.concatenate([(exponents | near[None].astype(np.uint32)).ravel(), random])
    return torch.from_numpy(bits.view(np.float32))


def converted(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """Float32 to the bits of another dtype, one by one."""
    out = torch.empty(values.shape, dtype=TORCH_DTYPES[dtype])
    flat = values.contiguous().view(-1)
    _C.convert(flat.view(torch.uint8), "float32", out.view(-1).view(torch.uint8), dtype)
    return out.view(BITS[out.element_size()])


def to_float(values: torch.Tensor, dtype: str) -> torch.Tensor:
    out = torch.empty(values.shape, dtype=torch.float32)
    _C.convert(
        values.contiguous().view(-1).view(torch.uint8), dtype, out.view(-1).view(torch.uint8),
        "float32",
    )  # fmt: skip
    return out


@pytest.mark.parametrize("dst_dtype", DTYPES)
@pytest.mark.parametrize("src_dtype", DTYPES)
def test_every_encoding(simd_level: str, src_dtype: str, dst_dtype: str) -> None:
    values = encodings(src_dtype)
    dims = 200  # whole stripes and a part of one, of any dtype
    num_rows = -(-values.numel() // dims)
    rows = torch.zeros(num_rows * dims, dtype=values.dtype)
    rows[: values.numel()] = values
    shape = dict(head_dim=dims, head_dim_v=1, page_size=num_rows, num_pages=1)
    src = make_pool("latent", dtype=src_dtype, **shape)  # type: ignore[arg-type]
    stored = rows_of(src.pool, 0, "k")
    stored.copy_(rows.view(stored.dtype).view(stored.shape))
    floats = to_float(rows, src_dtype)
    for scale in SCALES:
        dst = make_pool("latent", dtype=dst_dtype, scale="tensor", **shape)  # type: ignore[arg-type]
        scale_plane(dst.pool, 0, "k").fill_(scale)
        relayout_pages(src.pool, [0], dst.pool, [0], num_tokens=num_rows)
        if scale == 1.0 and src_dtype == dst_dtype:
            expected = rows.view(stored.dtype)
        else:
            expected = converted(floats if scale == 1.0 else floats / scale, dst_dtype)
        found = rows_of(dst.pool, 0, "k").reshape(-1)
        different = (found != expected).nonzero()[:, 0]
        assert not len(different), (scale, floats[different[0]], found[different[0]])


@pytest.mark.parametrize("dst_dtype", QUANT_MAX)
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf"), 0.0])
def test_special_values_do_not_disturb_their_row(
    simd_level: str, dst_dtype: str, special: float
) -> None:
    dims = 192
    values = torch.randn(dims, generator=torch.Generator().manual_seed(0)).bfloat16()
    shape = dict(head_dim=dims, head_dim_v=1, page_size=dims + 1, num_pages=1)
    src = make_pool("latent", dtype="bfloat16", **shape)  # type: ignore[arg-type]
    dst = make_pool("latent", dtype=dst_dtype, scale="token_head", **shape)  # type: ignore[arg-type]
    rows = values.repeat(dims + 1, 1)
    rows[range(dims), range(dims)] = special  # another place in each row, none in the last
    stored = rows_of(src.pool, 0, "k")
    stored.copy_(rows.view(stored.dtype).view(stored.shape))
    relayout_pages(src.pool, [0], dst.pool, [0], num_tokens=dims + 1)
    finite = rows.float().abs()
    finite[~finite.isfinite()] = 0
    scales = finite.amax(-1) / torch.tensor(QUANT_MAX[dst_dtype])
    assert torch.equal(scale_plane(dst.pool, 0, "k").reshape(-1), scales)
    expected = converted(rows.float() / scales[:, None], dst_dtype)
    assert torch.equal(rows_of(dst.pool, 0, "k").reshape(expected.shape), expected)


@pytest.mark.parametrize("dst_dtype", QUANT_MAX)
def test_every_mantissa_by_every_scale_of_an_amax(simd_level: str, dst_dtype: str) -> None:
    """Quotients that a reciprocal misses by one unit, next to where rounding turns."""
    largest = np.float32(QUANT_MAX[dst_dtype])
    mantissas = np.arange(128, 256, dtype=np.float32)
    odd = np.array([0x3FD0AB43, 0x3FE1368B, 0x3FFE01FF, 0x3FFFFFFF], np.uint32).view(np.float32)
    # By these a value's quotient is next to half an integer.
    rng = np.random.default_rng(0)
    halves = rng.choice(mantissas, 504) / (rng.integers(0, 127, 504).astype(np.float32) + 0.5)
    bits = halves.astype(np.float32).view(np.int32) + rng.integers(-3, 4, 504, dtype=np.int32)
    scales = np.concatenate([mantissas / largest, odd, 1 / odd, bits.view(np.float32)])
    exponents = np.arange(-24, 12, dtype=np.int32)
    rows = torch.from_numpy(np.ldexp(mantissas, exponents[:, None]))
    shape = dict(num_kv_heads=len(scales), head_dim=128, page_size=len(rows), num_pages=1)
    src = make_pool("nhd", dtype="bfloat16", **shape)  # type: ignore[arg-type]
    dst = make_pool("nhd", dtype=dst_dtype, scale="head", **shape)  # type: ignore[arg-type]
    for name in ("k", "v"):
        values = rows if name == "k" else -rows
        rows_of(src.pool, 0, name).copy_(values.bfloat16().view(torch.int16)[None, :, None])
    dst.pool.set_scales(0, scales.tolist(), scales.tolist())
    relayout_pages(src.pool, [0], dst.pool, [0], num_tokens=len(rows))
    for name in ("k", "v"):
        values = rows if name == "k" else -rows
        quotients = values[None, :, None] / torch.from_numpy(scales)[:, None]
        assert torch.equal(rows_of(dst.pool, 0, name), converted(quotients, dst_dtype))


@pytest.mark.parametrize("dst_dtype", QUANT_MAX)
def test_every_mantissa_beside_every_largest_value(simd_level: str, dst_dtype: str) -> None:
    """Rows with scales of their own, down to quotients that are zero."""
    mantissas = np.arange(128, 256, dtype=np.float32)
    scaled = np.ldexp(mantissas, np.arange(0, -21, -1, dtype=np.int32)[:, None])
    most = torch.from_numpy(mantissas)[:, None, None]
    rows = torch.minimum(torch.from_numpy(scaled), most)  # [most, exponent, mantissa]
    ends = torch.stack((most, -most / 2), -1).flatten(2).expand(-1, rows.shape[1], -1)
    k = torch.cat((rows, ends.repeat(1, 1, 32)), 2).flatten(0, 1)
    v = torch.cat((most.expand(-1, rows.shape[1], -1), -rows[:, :, 1:]), 2).flatten(0, 1)
    powers = torch.tensor([0, 40, -50, -80, -120, 110])[torch.arange(len(k)) % 6, None]
    shape = dict(num_kv_heads=1, head_dim=192, head_dim_v=128, page_size=len(k), num_pages=1)
    src = make_pool("nhd", dtype="bfloat16", **shape)  # type: ignore[arg-type]
    dst = make_pool("hnd", dtype=dst_dtype, scale="token_head", **shape)  # type: ignore[arg-type]
    planes = {"k": torch.ldexp(k, powers).bfloat16(), "v": torch.ldexp(v, powers).bfloat16()}
    for name, values in planes.items():
        stored = rows_of(src.pool, 0, name)
        stored.copy_(values.view(torch.int16).view(stored.shape))
    relayout_pages(src.pool, [0], dst.pool, [0], num_tokens=len(k))
    for name, values in planes.items():
        scales = values.float().abs().amax(-1) / torch.tensor(QUANT_MAX[dst_dtype])
        scales[scales < torch.finfo(torch.float32).tiny] = 1
        assert torch.equal(scale_plane(dst.pool, 0, name).reshape(-1), scales)
        found, expected = rows_of(dst.pool, 0, name), values.float() / scales[:, None]
        assert torch.equal(found.reshape(expected.shape), converted(expected, dst_dtype))


@pytest.mark.parametrize("num_tokens", [1, 7, 8, 9, 63, 65])
@pytest.mark.parametrize("dst_dtype", QUANT_MAX)
def test_few_rows_with_scales_of_their_own(
    simd_level: str, dst_dtype: str, num_tokens: int
) -> None:
    shape = dict(num_kv_heads=3, head_dim=128, page_size=7, num_pages=10)
    src = make_pool("nhd", dtype="bfloat16", **shape)  # type: ignore[arg-type]
    dst = make_pool("hnd", dtype=dst_dtype, scale="token_head", **shape)  # type: ignore[arg-type]
    values = torch.randn(70, 3, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    stored = rows_of(src.pool, 0, "k")
    stored.copy_(values.view(torch.int16).view(stored.shape))
    pages = list(range(10))
    relayout_pages(src.pool, pages, dst.pool, pages, num_tokens=num_tokens)
    scales = values.float().abs().amax(-1) / torch.tensor(QUANT_MAX[dst_dtype])
    expected = converted(values.float() / scales[..., None], dst_dtype)[:num_tokens]
    found = rows_of(dst.pool, 0, "k").reshape(70, 3, 128)[:num_tokens]
    assert torch.equal(found, expected)
    found_scales = scale_plane(dst.pool, 0, "k").reshape(70, 3)[:num_tokens]
    assert torch.equal(found_scales, scales[:num_tokens])
