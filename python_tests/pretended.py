"""A CUDA device that is not there: torch tensors in host memory that say they are on it.

Within `pretended_cuda`, what is made with device="cuda", or moved there, is a `DeviceTensor`, and
so is what torch computes from one; kvlink takes it as an array of device 0, on which emulated.py's
kernels run. Events, generators and streams do nothing much. It shows that code which needs a device
is right as Python: names, shapes, arguments.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

CUDA = torch.device("cuda", 0)


def _set_device(capsule: Any, kind: int) -> Any:
    """A capsule "dltensor" whose memory is of another type of device."""
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype = ctypes.c_void_p
    get_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
    managed = get_pointer(capsule, b"dltensor")
    assert managed
    ctypes.c_int32.from_address(managed + 8).value = kind
    return capsule


class DeviceTensor(torch.Tensor):
    """A tensor that says it is on CUDA device 0."""

    device = property(lambda _self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda _self: True)  # type: ignore[assignment]

    def __dlpack_device__(self) -> Any:
        return (2, 0)

    def __dlpack__(self, **_options: Any) -> Any:
        return _set_device(plain(self).__dlpack__(), 2)


DeviceTensor.__module__ = "torch"  # so results are made by torch


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor of the host."""
    with torch._C.DisableTorchFunction():
        return torch.Tensor.as_subclass(tensor, torch.Tensor)


def _on_device(value: Any) -> Any:
    return value.as_subclass(DeviceTensor) if isinstance(value, torch.Tensor) else value


def _is_cuda(value: Any) -> bool:
    return isinstance(value, str | torch.device) and torch.device(value).type == "cuda"


class _Pretending(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return _on_device(plain(args[0]).clone())
        if func is torch.Tensor.cpu:
            return plain(args[0]).clone()
        there = _is_cuda(kwargs.get("device"))
        if there:
            kwargs["device"] = "cpu"
        if func is torch.Tensor.to and any(map(_is_cuda, args[1:])):
            there, args = True, [each for each in args if not _is_cuda(each)]
        result = func(*args, **kwargs) if len(args) != 1 or func is not torch.Tensor.to else args[0]
        return tree_map(_on_device, result) if there else result


class _Event:
    def __init__(self, **_options: Any) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _Event) -> float:
        return (end.at - self.at) * 1e3


class _LegacyStream:
    def __call__(self, _device: int) -> int:
        return 0


@contextmanager
def pretended_cuda() -> Iterator[None]:
    """torch seems to have a device; kvlink._cuda is the caller's business."""
    make, from_dlpack = torch.Generator, torch.from_dlpack

    def generator(device: Any = "cpu") -> torch.Generator:
        return make("cpu" if _is_cuda(device) else device)

    def imported(array: Any, **options: Any) -> Any:
        if array.__dlpack_device__()[0] != 2:
            return from_dlpack(array, **options)
        return _on_device(from_dlpack(_set_device(array.__dlpack__(), 1)))

    with (
        mock.patch.multiple(
            torch.cuda, is_available=lambda: True, is_initialized=lambda: True,
            synchronize=lambda *_: None, empty_cache=lambda: None, Event=_Event,
        ),
        mock.patch.object(
            torch._C, "_cuda_getCurrentRawStream", create=True, new_callable=_LegacyStream
        ),
        mock.patch.object(torch, "Generator", generator),
        mock.patch.object(torch, "from_dlpack", imported),
        mock.patch.object(torch.utils.dlpack, "from_dlpack", imported),
        mock.patch("kvlink.reference.append_kv.from_dlpack", imported),
        _Pretending(),
    ):  # fmt: skip
        yield
