"""merge_states of every backend against its meaning."""

from __future__ import annotations

import pytest
import torch
from places import Place

from kvlink import merge_states
from kvlink.reference.merge_states import merge_states as reference
from kvlink.testing.tolerances import assert_close, assert_same_bits

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def states(
    count: int, rows: int, heads: int, dim: int, dtype: torch.dtype
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Some have seen nothing, and hold whatever."""
    torch.manual_seed(count)
    outs = [torch.randn(rows, heads, dim).to(dtype) for _ in range(count)]
    lses = [torch.randn(rows, heads) * 4 for _ in range(count)]
    lses[0][rows // 2] = lses[-1][rows // 2] = float("-inf")
    outs[0][rows // 2] = float("nan")
    return outs, lses


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 5, 64])
def test_any_number_of_states(place: Place, count: int, dtype: torch.dtype) -> None:
    outs, lses = states(count, 5, 3, 40, dtype)
    expected, expected_lse = reference([each.float() for each in outs], lses)
    out, lse = merge_states(place.put(outs), place.put(lses), backend=place.backend)
    place.settle()
    merged = place.take(out)
    assert merged.dtype == dtype
    assert_close(merged, expected.to(dtype))
    assert_close(place.take(lse), expected_lse, "lse")
    again, _ = merge_states(place.put(outs), place.put(lses), backend=place.backend)
    assert_same_bits(place.take(again), merged)


@pytest.mark.parametrize("dim", [1, 7, 128, 300])
def test_two_states_of_any_head_dim(place: Place, dim: int) -> None:
    outs, lses = states(2, 3, 2, dim, torch.float32)
    expected, expected_lse = reference(outs, lses)
    arguments = place.put([outs[0], lses[0], outs[1], lses[1]])
    out, lse = merge_states(*arguments, backend=place.backend)
    assert_close(place.take(out), expected)
    assert_close(place.take(lse), expected_lse, "lse")
