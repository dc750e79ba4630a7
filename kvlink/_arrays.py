"""Arrays of whichever library the caller uses; none is imported for it."""

from __future__ import annotations

import sys
from typing import Any

from kvlink._planes import dtype_name
from kvlink.errors import InvalidArgument


def library_of(array: Any) -> str:
    """Top-level package an array comes from: "torch", "numpy", "cupy", ..."""
    return type(array).__module__.partition(".")[0]


def dtype_of(array: Any, name: str) -> str:
    """Canonical dtype name of an array."""
    dtype = getattr(array, "dtype", None)
    if dtype is None:
        raise InvalidArgument(f"{name}: expected an array; got {type(array).__name__}")
    return _NAMES.get(dtype) or _remember(dtype)


_NAMES: dict[Any, str] = {}


def _remember(dtype: Any) -> str:
    try:
        name = dtype_name(dtype)
    except InvalidArgument:
        name = str(dtype).removeprefix("torch.")
    _NAMES[dtype] = name
    return name


def device_of(array: Any) -> tuple[int, int]:
    """Its DLPack device, (1, 0) of what has none."""
    ask = getattr(array, "__dlpack_device__", None)
    if ask is None:
        return (1, 0)
    kind, number = ask()
    return int(kind), int(number)


def empty_like(array: Any, shape: tuple[int, ...], dtype: str | None = None) -> Any:
    """An uninitialised array of `array`'s library, device and (unless given) dtype."""
    library = sys.modules.get(library_of(array))
    if library_of(array) == "kvlink":  # a CudaArray
        library = sys.modules.get("torch") or sys.modules.get("cupy")
    if library is None or not hasattr(library, "empty"):
        raise InvalidArgument(
            f"q: expected a torch, numpy or cupy array; got {type(array).__module__}."
            f"{type(array).__name__} (results are made in q's library)"
        )
    wanted = array.dtype if dtype is None else dtype
    if isinstance(wanted, str):
        wanted = getattr(library, wanted)
    if library.__name__ == "torch":
        device = array.device if library_of(array) == "torch" else f"cuda:{array.device[1]}"
        return library.empty(shape, dtype=wanted, device=device)
    return library.empty(shape, wanted)


_SEQUENCES = (list, tuple, range)


def as_int32(values: Any, fill: int = 0) -> Any:
    """Arrays and None as they are; (nested) sequences as numpy int32, short rows padded."""
    if not isinstance(values, _SEQUENCES):
        return values
    import numpy as np

    if not values or not isinstance(values[0], _SEQUENCES):
        return np.asarray(values, dtype=np.int32)
    padded = np.full((len(values), max(map(len, values))), fill, dtype=np.int32)
    for row, entries in zip(padded, values, strict=True):
        row[: len(entries)] = entries
    return padded


def writable_or_copy(array: Any) -> Any:
    """The array, or a copy of a read-only numpy one, which numpy before 2.1 cannot export."""
    if array is not None and library_of(array) == "numpy" and not array.flags.writeable:
        return array.copy()
    return array


def as_reference(array: Any) -> Any:
    """The array as torch sees it, for `kvlink.reference`."""
    if array is None:
        return None
    import torch

    return torch.as_tensor(array)


def from_reference(result: Any, target: Any) -> None:
    """Copies a torch tensor into an array of any library."""
    import torch

    torch.utils.dlpack.from_dlpack(target).copy_(result)
