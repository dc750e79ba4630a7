"""Calls into kvlink._cuda: whether they are meant, where they are, and on which stream."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from kvlink.errors import Unsupported

_DEVICE_CUDA = 2  # as in DLPack


def on_cuda(device: tuple[int, int]) -> bool:
    """The DLPack device is a CUDA device's memory."""
    return device[0] == _DEVICE_CUDA


def cuda_ops() -> Any:
    """The module. Raises Unsupported where it was not built."""
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
    if torch is None or not torch.cuda.is_available():
        return 0
    return int(torch.cuda.current_stream(device[1]).cuda_stream)
