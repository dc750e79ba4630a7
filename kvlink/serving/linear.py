"""`Product`: x W^T + b of one linear layer or of several side by side, weights packed if that pays.

oneDNN multiplies by weights that lie in an order of its own. torch has that as operators for its
compiler; on CPUs that are not Intel's it takes less than half the time of torch's float32 `linear`,
and in batches of few rows, as decode has them, less still. Where the operators are missing or
refuse, the plain product is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_TYPICAL_ROWS = 512  # packing asks for a number; others are multiplied as fast


class Product:
    """Takes the weights over: the layers given lose theirs, unless `keep`."""

    def __init__(self, *layers: nn.Linear, keep: bool = False) -> None:
        weights: list[Tensor] = [layer.weight.detach() for layer in layers]
        biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        self._sizes = [layer.out_features for layer in layers]
        self._bias = torch.cat(biases).detach() if biases else None
        self._packed = _pack(weight)
        self._weight = weight if self._packed is None else None
        if not keep:
            for layer in layers:
                layer.weight = layer.bias = None  # type: ignore[assignment]

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, in] to [rows, outs of all layers]."""
        if self._weight is not None:
            return functional.linear(x, self._weight, self._bias)
        return _multiply(x, self._packed, self._bias)

    def parts(self, x: Tensor) -> Sequence[Tensor]:
        """The same, cut into each layer's (views)."""
        return self(x).split_with_sizes(self._sizes, dim=-1)


def _pack(weight: Tensor) -> Any:
    """The weight in oneDNN's order; None where there is no such thing."""
    if weight.dtype not in (torch.float32, torch.bfloat16) or weight.device.type != "cpu":
        return None
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _TYPICAL_ROWS)
        _multiply(torch.zeros(1, weight.shape[1], dtype=weight.dtype), packed, None)
    except (AttributeError, RuntimeError):
        return None
    return packed


def _multiply(x: Tensor, packed: Any, bias: Tensor | None) -> Tensor:
    operator = torch.ops.mkldnn._linear_pointwise
    return operator(x, packed, bias, "none", [], "")  # type: ignore[no-any-return]
