"""`Product` beside the plain product, packed or not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from kvlink.serving import linear
from kvlink.serving.linear import Product

# Sums of 96 terms in another order: a few units of 2^-24 (2^-8 when rounded to bfloat16).
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_layers_side_by_side(
    dtype: torch.dtype, has_bias: bool, packs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not packs:
        monkeypatch.setattr(linear, "_pack", lambda weight: None)
    torch.manual_seed(1)
    layers = [nn.Linear(96, size, bias=has_bias, dtype=dtype) for size in (40, 7, 64)]
    weights = [(layer.weight.float(), layer.bias) for layer in layers]
    product = Product(*layers)
    assert all(layer.weight is None for layer in layers)
    for rows in (0, 1, 5, 300):
        x = torch.randn(rows, 96, dtype=dtype)
        with torch.inference_mode():
            parts = product.parts(x)
        for part, (weight, bias) in zip(parts, weights, strict=True):
            expected = functional.linear(x.float(), weight, None if bias is None else bias.float())
            torch.testing.assert_close(
                part.float(), expected, rtol=BOUNDS[dtype], atol=BOUNDS[dtype]
            )


def test_shared_weights_stay() -> None:
    layer = nn.Linear(8, 16, bias=False)
    Product(layer, keep=True)
    assert layer.weight.shape == (16, 8)
