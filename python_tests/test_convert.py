"""base/convert.hpp against torch's conversions, exhaustively where that is possible."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvlink import _C

TORCH = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "int8": torch.int8,
}
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
LARGEST = {"float8_e4m3": 448.0, "float8_e5m2": 57344.0, "int8": 127.0}


def convert(values: torch.Tensor, src: str, dst: str) -> torch.Tensor:
    out = torch.empty(values.numel(), dtype=TORCH[dst])
    _C.convert(values.view(torch.uint8), src, out.view(torch.uint8), dst)
    return out


def every_encoding(name: str) -> torch.Tensor:
    size = TORCH[name].itemsize
    bits = np.arange(2 ** (8 * size), dtype=np.uint32).astype(f"<u{size}")
    return torch.from_numpy(bits.view(np.uint8)).view(TORCH[name])


def many_floats() -> torch.Tensor:
    """Every sign and exponent with mantissas at, and just beside, each type's ties; and random."""
    exponents = np.arange(512, dtype=np.uint32)[:, None] << 23
    edges = [m << shift for shift in range(10, 23) for m in range(2 ** (23 - shift)) if m < 64]
    ties = np.array(sorted({e + d for e in edges for d in (-1, 0, 1)}), dtype=np.int64)
    ties = ties[(ties >= 0) & (ties < 2**23)].astype(np.uint32)
    random = np.random.default_rng(0).integers(0, 2**32, 500_000, dtype=np.uint32)
    bits = np.concatenate([(exponents | ties[None]).ravel(), random])
    return torch.from_numpy(bits.view(np.float32))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits, or both NaN."""
    bits = BITS[a.element_size()]
    equal = a.view(bits) == b.view(bits)
    if a.is_floating_point():
        equal |= torch.isnan(a.float()) & torch.isnan(b.float())
    return bool(equal.all())


@pytest.mark.parametrize("name", [n for n in TORCH if n != "float32"])
def test_every_encoding_to_float32(name: str) -> None:
    values = every_encoding(name)
    assert same(convert(values, name, "float32"), values.to(torch.float32))


@pytest.mark.parametrize("name", [n for n in TORCH if n != "float32"])
def test_round_trip_is_the_identity(name: str) -> None:
    values = every_encoding(name)
    if name == "int8":
        values = values[values != -128]
    elif name == "float8_e5m2":
        values = values[~torch.isinf(values.float())]
    assert same(convert(convert(values, name, "float32"), "float32", name), values)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_rounding_to_16_bits(name: str) -> None:
    values = many_floats()
    assert same(convert(values, "float32", name), values.to(TORCH[name]))


@pytest.mark.parametrize("name", ["float8_e4m3", "float8_e5m2"])
def test_rounding_to_float8(name: str) -> None:
    values = many_floats()
    bounded = values.clamp(-LARGEST[name], LARGEST[name])  # keeps NaN
    assert same(convert(values, "float32", name), bounded.to(TORCH[name]))


def test_rounding_to_int8() -> None:
    values = many_floats()
    expected = torch.round(values).clamp(-127, 127).nan_to_num(0.0).to(torch.int8)
    assert same(convert(values, "float32", "int8"), expected)


@pytest.mark.parametrize("name", ["float8_e4m3", "float8_e5m2", "int8"])
def test_saturation_and_nan(name: str) -> None:
    values = torch.tensor([float("inf"), float("-inf"), 1e30, -1e30, 3e38, float("nan")])
    out = convert(values, "float32", name).float()
    assert out[:5].tolist() == [s * LARGEST[name] for s in (1, -1, 1, -1, 1)]
    assert out[5] == 0 if name == "int8" else torch.isnan(out[5])


def test_nan_keeps_its_sign() -> None:
    bits = np.array([0xFFC00001, 0x7FC00001], dtype=np.uint32)
    values = torch.from_numpy(bits.view(np.float32))
    for name in ("float16", "bfloat16", "float8_e4m3", "float8_e5m2"):
        out = convert(values, "float32", name).view(torch.uint8).numpy()
        size = TORCH[name].itemsize
        signs = [bool(out[size * i + size - 1] & 0x80) for i in range(2)]
        assert signs == [True, False], name


@pytest.mark.parametrize("pair", [("float16", "bfloat16"), ("bfloat16", "float8_e4m3")])
def test_between_small_types_goes_through_float32(pair: tuple[str, str]) -> None:
    src, dst = pair
    values = every_encoding(src)
    through = convert(convert(values, src, "float32"), "float32", dst)
    assert same(convert(values, src, dst), through)


def test_refusals() -> None:
    data = torch.zeros(4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="expected 4 elements; got 4 bytes"):
        _C.convert(data, "int8", data, "float16")
    with pytest.raises(ValueError, match="unknown name 'float64'"):
        _C.convert(data, "float64", data, "int8")
    with pytest.raises(ValueError, match="uint8"):
        _C.convert(data, "uint8", data, "int8")
