"""apply_rope's CUDA kernel, emulated, against its meaning."""

from __future__ import annotations

import pytest
import torch
from emulated import SEEDS, DeviceArray, Emulation, emulated_cuda

from kvlink import Rope, apply_rope
from kvlink.errors import InvalidArgument
from kvlink.reference.rope import apply_rope as reference
from kvlink.testing.tolerances import assert_same_bits

__all__ = ["emulated_cuda"]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bits(emulated_cuda: Emulation, dtype: torch.dtype, interleaved: bool) -> None:
    for seed, (num_tokens, head_dim, rotary_dim, first_dim) in zip(
        SEEDS, ((5, 128, 128, 0), (33, 70, 44, 26), (1, 576, 64, 512)), strict=True
    ):
        emulated_cuda.seed(seed)
        table, positions = torch.randn(50, rotary_dim), torch.randint(0, 50, (num_tokens,))
        rope = Rope(table, positions, interleaved, first_dim)
        there = rope._replace(cos_sin=DeviceArray(table), positions=DeviceArray(positions))
        x = torch.randn(num_tokens, 3, head_dim).to(dtype)
        expected = reference(x.float(), rope).to(dtype)
        result = apply_rope(DeviceArray(x), there)
        emulated_cuda.check_errors()
        assert_same_bits(result.tensor, expected)
        apart = torch.full((num_tokens, 5, head_dim + 3), 7.0, dtype=dtype)
        apply_rope(DeviceArray(x), there, out=DeviceArray(apart[:, 1:4, :head_dim]))
        assert_same_bits(apart[:, 1:4, :head_dim], expected)
        assert bool((apart[:, 0] == 7).all())
        assert bool((apart[..., head_dim:] == 7).all())
        apply_rope(DeviceArray(x), there, out=DeviceArray(x))
        emulated_cuda.check_errors()
        assert_same_bits(x, expected)


def test_bad_positions_are_skipped_and_reported_later(emulated_cuda: Emulation) -> None:
    table = torch.randn(50, 8)
    x, out = torch.randn(3, 2, 8), torch.full((3, 2, 8), 7.0)
    for bad in (50, -1):
        positions = torch.tensor([4, bad, 7])
        rope = Rope(DeviceArray(table), DeviceArray(positions))
        apply_rope(DeviceArray(x), rope, out=DeviceArray(out))
        with pytest.raises(InvalidArgument, match=rf"rope.positions\[1\].*got {bad}"):
            emulated_cuda.check_errors()
        expected = reference(x, Rope(table, positions.clamp(0, 49)))
        assert_same_bits(out[::2], expected[::2])
        assert bool((out[1] == 7).all())


def test_refusals(emulated_cuda: Emulation) -> None:
    x, positions = torch.ones(3, 2, 8), torch.tensor([1, 2, 3])
    table = torch.randn(50, 8)
    good = Rope(DeviceArray(table), DeviceArray(positions))
    for match, rope in (
        ("even number of columns; got 7", good._replace(cos_sin=DeviceArray(torch.ones(50, 7)))),
        ("within the 8 of a head; got 2 to 9", good._replace(first_dim=2)),
        ("rope.cos_sin: expected an array on the device of x", good._replace(cos_sin=table)),
        (
            "rope.positions: expected num_tokens",
            good._replace(positions=DeviceArray(positions[:2])),
        ),
    ):
        with pytest.raises(InvalidArgument, match=match):
            apply_rope(DeviceArray(x), rope)
    with pytest.raises(InvalidArgument, match="out: expected dtype float32; got float16"):
        apply_rope(DeviceArray(x), good, out=DeviceArray(x.half()))
