"""Arrays that know only `__cuda_array_interface__` (numba's, for one) as DLPack arrays."""

from __future__ import annotations

import ctypes
import itertools
from typing import Any

from kvlink._cuda_part import LEGACY_STREAM, NO_STREAMS, on_cuda, order_streams
from kvlink.errors import InvalidArgument

_CODES = {"i": 0, "u": 1, "f": 2}  # DLPack's, of typestr's kinds
_BYTES = (1, 2, 4, 8)


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]  # fmt: skip


class _Managed(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Managed))
_Managed._fields_ = [("tensor", _Tensor), ("manager", ctypes.c_void_p), ("deleter", _Deleter)]

_exported: dict[int, tuple[Any, ...]] = {}  # what lives until a consumer is done
_numbers = itertools.count(1)


def _forget(managed: Any) -> None:
    _exported.pop(managed.contents.manager, None)


_release = _Deleter(_forget)


class CudaArray:
    """What `from_cuda_array` returns: a DLPack producer, of the attributes that operators ask for.

    `stream` is the handle that the data is written on, or None if nobody writes it any more. Each
    export makes the consumer's stream wait for it, as the interface's version 3 asks.
    """

    def __init__(self, array: Any, device: tuple[int, int], name: str = "array") -> None:
        found = getattr(array, "__cuda_array_interface__", None)
        if found is None:
            raise InvalidArgument(
                f"{name}: expected an array with __cuda_array_interface__; got {type(array)}"
            )
        if found.get("version", 0) < 2 or found.get("mask") is not None:
            raise InvalidArgument(
                f"{name}: expected __cuda_array_interface__ of version 2 or 3 without a mask; "
                f"got version {found.get('version')}"
            )
        kind, size = found["typestr"][1], int(found["typestr"][2:])
        if kind not in _CODES or size not in _BYTES or found["typestr"][0] not in "<|":
            raise InvalidArgument(
                f"{name}: expected little-endian integers or floats; got {found['typestr']!r}"
            )
        self.shape = tuple(int(n) for n in found["shape"])
        strides = found.get("strides")
        if strides is None:
            strides = [size] * len(self.shape)
            for axis in range(len(self.shape) - 1, 0, -1):
                strides[axis - 1] = strides[axis] * self.shape[axis]
        if any(stride % size for stride in strides):
            raise InvalidArgument(f"{name}: expected strides of whole elements; got {strides}")
        self.dtype = f"{ {'i': 'int', 'u': 'uint', 'f': 'float'}[kind] }{8 * size}"
        self.device = device
        self.stream = found.get("stream")
        if self.stream == 0:
            raise InvalidArgument(f"{name}: the interface forbids stream 0; 1 is the default one")
        self._strides = tuple(stride // size for stride in strides)
        self._type = _CODES[kind], 8 * size
        self._address = int(found["data"][0])
        self._owner = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, *, stream: Any = None, max_version: Any = None, **_: Any) -> Any:
        if self.stream is not None and stream != NO_STREAMS and on_cuda(self.device):
            order_streams(self.device[1], self.stream, LEGACY_STREAM if stream is None else stream)
        sizes = ctypes.c_int64 * len(self.shape)
        shape, strides = sizes(*self.shape), sizes(*self._strides)
        number = next(_numbers)
        tensor = _Tensor(
            self._address, *self.device, len(self.shape), *self._type, 1, shape, strides, 0
        )
        managed = _Managed(tensor, number, _release)
        _exported[number] = managed, shape, strides, self._owner
        make = ctypes.pythonapi.PyCapsule_New
        make.restype = ctypes.py_object
        make.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return make(ctypes.addressof(managed), b"dltensor", None)


def from_cuda_array(array: Any, *, device: int = 0) -> CudaArray:
    """An array that knows only `__cuda_array_interface__` (2 or 3) as one that operators take.

    Nothing is copied; the array lives as long as it is used. `device` is the number of its device,
    which the interface does not tell. Where the interface names a stream (the result's `stream`),
    the stream of an operator that takes the array waits, on the device, for what is queued there;
    the host does not. Results of operators whose `q` it is are made by torch or cupy, whichever is
    loaded. Raises InvalidArgument for what DLPack cannot say: masks, big-endian or other types,
    strides that cut elements.
    """
    return CudaArray(array, (2, device))
