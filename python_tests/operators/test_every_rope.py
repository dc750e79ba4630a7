"""apply_rope of every backend, bit for bit the reference's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from places import Place

from kvlink import Rope, apply_rope, rope_table
from kvlink.errors import InvalidArgument, Unsupported
from kvlink.reference.rope import apply_rope as reference
from kvlink.testing.tolerances import assert_same_bits

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def make_rope(num_tokens: int, rotary_dim: int, interleaved: bool, first_dim: int) -> Rope:
    table = torch.from_numpy(rope_table(0.7 ** np.arange(rotary_dim // 2), 50, factor=1.1))
    positions = np.random.default_rng(0).integers(0, 50, num_tokens)
    return Rope(table, torch.from_numpy(positions), interleaved, first_dim)


def on_host(array: Any) -> torch.Tensor:
    """A result, in host memory."""
    return array.cpu() if isinstance(array, torch.Tensor) else array.tensor


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim", "first_dim"),
    [(128, 128, 0), (80, 32, 0), (70, 44, 26), (36, 34, 2), (8, 2, 3), (576, 64, 512), (2, 2, 0)],
)
def test_every_shape_and_dtype(
    place: Place, head_dim: int, rotary_dim: int, first_dim: int, interleaved: bool
) -> None:
    for dtype, num_tokens in zip(DTYPES, (5, 0, 33), strict=True):
        rope = make_rope(num_tokens, rotary_dim, interleaved, first_dim)
        x = torch.randn(num_tokens, 3, head_dim).to(dtype)
        expected = reference(x.float(), rope).to(dtype)
        there = place.put(rope)
        result = apply_rope(place.put(x), there, backend=place.backend)
        place.settle()
        assert_same_bits(on_host(result), expected)
        apart = torch.full((num_tokens, 5, head_dim + 3), 7.0, dtype=dtype)
        view = place.put(apart)
        inner = (slice(None), slice(1, 4), slice(head_dim))
        view = view[inner] if isinstance(view, torch.Tensor) else place.put(apart[inner])
        assert apply_rope(place.put(x), there, out=view, backend=place.backend) is view
        place.settle()
        assert_same_bits(on_host(view), expected)
        inside = place.put(x.clone())
        apply_rope(inside, there, out=inside, backend=place.backend)
        place.settle()
        assert_same_bits(on_host(inside), expected)


def test_heads_outside_tokens(place: Place) -> None:
    rope = make_rope(9, 16, False, 0)
    x = torch.randn(4, 9, 16)
    expected = reference(x.transpose(0, 1), rope)
    there = place.put(x)
    turned = (
        there.transpose(0, 1) if isinstance(there, torch.Tensor) else place.put(x.transpose(0, 1))
    )
    result = apply_rope(turned, place.put(rope), backend=place.backend)
    place.settle()
    assert_same_bits(on_host(result), expected)


def test_refusals(place: Place) -> None:
    rope, x = make_rope(3, 8, False, 0), torch.ones(3, 2, 8)

    def refuses(match: str, **changes: Any) -> None:
        with pytest.raises(InvalidArgument, match=match):
            apply_rope(place.put(x), place.put(rope._replace(**changes)), backend=place.backend)

    refuses("even number of columns; got 7", cos_sin=torch.zeros(50, 7))
    refuses(r"within the 8 of a head; got 2 to 9", first_dim=2)
    refuses(r"within the 8 of a head; got -1 to 6", first_dim=-1)
    refuses("rope.positions: expected num_tokens = 3", positions=torch.tensor([0]))
    refuses("rope.positions: expected dtype int64", positions=torch.zeros(3).int())
    refuses("rope.cos_sin: expected dtype float32", cos_sin=torch.zeros(50, 8).double())
    out = place.put(torch.ones(3, 2, 8).bfloat16())
    with pytest.raises(InvalidArgument, match="out: expected dtype float32; got bfloat16"):
        apply_rope(place.put(x), place.put(rope), out=out, backend=place.backend)
    with pytest.raises(Unsupported, match="float64"):
        apply_rope(place.put(x.double()), place.put(rope), backend=place.backend)


def test_a_position_outside_the_table(place: Place) -> None:
    """On the host nothing is written; on a device its token is not, and a later call tells."""
    rope, x = make_rope(3, 8, False, 0), torch.ones(3, 2, 8)
    bad = rope._replace(positions=torch.tensor([4, 50, 7]))
    out = place.put(torch.full((3, 2, 8), 7.0))

    def run() -> None:
        apply_rope(place.put(x), place.put(bad), out=out, backend=place.backend)
        place.settle()
        apply_rope(place.put(x), place.put(rope), backend=place.backend)

    with pytest.raises(InvalidArgument, match=r"rope.positions\[1\].*got 50"):
        run()
    result = on_host(out)
    assert bool((result[1] == 7.0).all())
    if place.device == "cpu":
        assert bool((result == 7.0).all())
    else:
        assert_same_bits(
            result[::2], reference(x, rope._replace(positions=bad.positions.clamp(max=49)))[::2]
        )
