"""Calls into kvlink._cuda: whether they are meant, where they are, and on which stream."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from kvlink.errors import Unsupported

_DEVICE_CUDA = 2  # as in DLPack
NO_STREAMS, LEGACY_STREAM = -1, 1  # of `__dlpack__`; 2 is the per-thread default stream


def on_cuda(device: tuple[int, int]) -> bool:
    """The DLPack device is a CUDA device's memory."""
    return device[0] == _DEVICE_CUDA


def cuda_ops() -> Any:
    """The module. Raises Unsupported where it was not built."""
    loaded = sys.modules.get("kvlink._cuda")
    if loaded is not None:
        return loaded
    try:
        return importlib.import_module("kvlink._cuda")
    except ImportError as error:
        raise Unsupported(
            f"the pool is on CUDA, but kvlink has no CUDA part here: {error}"
        ) from None


def stream_of(device: tuple[int, int], stream: int | None) -> int:
    """The handle given, else torch's current stream if torch is there, else the default stream."""
    if stream is not None:
        return stream
    torch = sys.modules.get("torch")
    if torch is None:
        return 0
    if torch.cuda.is_initialized():  # the short way, without an object
        return int(torch._C._cuda_getCurrentRawStream(device[1]))
    if not torch.cuda.is_available():
        return 0
    return int(torch.cuda.current_stream(device[1]).cuda_stream)


def order_streams(device: int, first: int, then: int) -> None:
    """What is queued on `then` from now on waits for what is queued on `first`, on the device.

    Handles, or numbers as DLPack has them. By kvlink's CUDA part, else by torch.
    """
    first, then = first or LEGACY_STREAM, then or LEGACY_STREAM
    if first == then:
        return
    try:
        ops = cuda_ops()
    except Unsupported:
        import torch

        stream: Any = torch.cuda.ExternalStream
        stream(then, f"cuda:{device}").wait_stream(stream(first, f"cuda:{device}"))
    else:
        ops.order_streams(device, first, then)
