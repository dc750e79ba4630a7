"""Arrays of whichever library the caller uses; none is imported for it."""

from __future__ import annotations

import sys
from typing import Any

from kvlink._arguments import wrong
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


def device_of(array: Any, name: str) -> tuple[int, int]:
    """Its DLPack device, (1, 0) of what has none."""
    ask = getattr(array, "__dlpack_device__", None)
    if ask is None:
        return (1, 0)
    try:
        kind, number = ask()
    except (ValueError, BufferError, RuntimeError, TypeError) as error:  # torch's meta device, ...
        raise InvalidArgument(f"{name}: the array has no DLPack device: {error}") from None
    return int(kind), int(number)


def empty_like(
    array: Any, shape: tuple[int, ...], dtype: str | None = None, name: str = "q"
) -> Any:
    """An uninitialised array of `array`'s library, device and (unless given) dtype."""
    library = sys.modules.get(library_of(array))
    if library_of(array) == "kvlink":  # a CudaArray
        library = sys.modules.get("torch") or sys.modules.get("cupy")
    if library is None or not hasattr(library, "empty"):
        raise InvalidArgument(
            f"{name}: expected a torch, numpy or cupy array; got {type(array).__module__}."
            f"{type(array).__name__} (results are made in its library)"
        )
    wanted = array.dtype if dtype is None else dtype
    if isinstance(wanted, str):
        wanted = getattr(library, wanted)
    if library.__name__ == "torch":
        device = array.device if library_of(array) == "torch" else f"cuda:{array.device[1]}"
        return library.empty(shape, dtype=wanted, device=device)
    return library.empty(shape, wanted)


_SEQUENCES = (list, tuple, range)


def as_int32(values: Any, name: str) -> Any:
    """Arrays and None as they are; a sequence as numpy int32. Raises InvalidArgument."""
    if not isinstance(values, _SEQUENCES):
        return values
    found, narrow = _narrowed(values, name)
    if (narrow != found).any():
        raise wrong(name, "integers of 32 bits", values)
    return narrow


def as_page_table(values: Any) -> Any:
    """As `as_int32`; of nested sequences the short rows are padded with -1, and an id beyond int32
    is one that no pool has."""
    if not isinstance(values, _SEQUENCES):
        return values
    import numpy as np

    nested = values and isinstance(values[0], _SEQUENCES)
    rows = []
    for i, row in enumerate(values if nested else [values]):
        found, narrow = _narrowed(row, f"page_table[{i}]" if nested else "page_table")
        beyond = narrow != found
        rows.append(np.where(beyond, np.int32(2**31 - 1), narrow) if beyond.any() else narrow)
    if not nested:
        return rows[0]
    padded = np.full((len(rows), max(map(len, rows))), -1, dtype=np.int32)
    for padded_row, row in zip(padded, rows, strict=True):
        padded_row[: len(row)] = row
    return padded


def _narrowed(values: Any, name: str) -> tuple[Any, Any]:
    """Integers as numpy has them, and as int32, whether or not that holds them."""
    import numpy as np

    try:
        found = np.asarray(values)
    except (TypeError, ValueError, RuntimeError):
        raise wrong(name, "integers", values) from None
    if found.ndim != 1 or (found.dtype.kind not in "iu" and found.size):
        raise wrong(name, "integers", values)
    return found, found.astype(np.int32)


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
