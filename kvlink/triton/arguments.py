"""Checks of tensor arguments, declared: what is wrong is named as the other backends name it."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

from kvlink.errors import InvalidArgument

FLOATS = ("float32", "float16", "bfloat16")


class Sizes:
    """Sizes bound by name on first use; every later use must agree."""

    def __init__(self, used_by: str = "the pool", **sizes: int) -> None:
        self._sizes = {name: (size, used_by) for name, size in sizes.items()}

    def __getitem__(self, name: str) -> int:
        return self._sizes[name][0]

    def match(self, name: str, size: int, used_by: str) -> None:
        """Binds `name`, or raises InvalidArgument if it is bound to another size."""
        expected, bound_by = self._sizes.setdefault(name, (size, used_by))
        if expected != size:
            raise InvalidArgument(
                f"{used_by}: expected {name} = {expected} as in {bound_by}; got {size}"
            )


def short_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def as_tensor(array: Any, name: str) -> torch.Tensor:
    """The array of any DLPack library as a torch tensor that shares its memory."""
    if isinstance(array, torch.Tensor):
        return array
    if not hasattr(array, "__dlpack__"):
        raise InvalidArgument(
            f"{name}: expected an array with __dlpack__ (torch, numpy, cupy, ...); "
            f"got {type(array)}"
        )
    tensor: torch.Tensor = from_dlpack(array)
    return tensor


def check(
    array: Any,
    name: str,
    axes: tuple[str, ...],
    dtypes: tuple[str, ...],
    sizes: Sizes,
    device: torch.device,
    *,
    contiguous: bool = False,
) -> torch.Tensor:
    """The array as a tensor on `device`, of that shape and dtype, last axis contiguous."""
    tensor = as_tensor(array, name)
    if tensor.ndim != len(axes):
        raise InvalidArgument(
            f"{name}: expected shape [{', '.join(axes)}]; got {list(tensor.shape)}"
        )
    dtype = short_name(tensor.dtype)
    if dtype not in dtypes:
        raise InvalidArgument(f"{name}: expected dtype {' or '.join(dtypes)}; got {dtype}")
    if tensor.device != device:
        raise InvalidArgument(
            f"{name}: expected an array on the pool's device, {device}; got {tensor.device}"
        )
    for axis, size in zip(axes, tensor.shape, strict=True):
        sizes.match(axis, size, name)
    if contiguous and not tensor.is_contiguous():
        raise InvalidArgument(
            f"{name}: expected a contiguous array; got strides {list(tensor.stride())}"
        )
    if axes and tensor.shape[-1] > 1 and tensor.stride(-1) != 1 and tensor.numel():
        raise InvalidArgument(
            f"{name}: expected a contiguous last axis; got strides {list(tensor.stride())}"
        )
    return tensor
