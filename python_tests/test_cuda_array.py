"""from_cuda_array: the interface, field by field, and operators (emulated) that take the result."""

from __future__ import annotations

import gc
import sys
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from emulated import DeviceArray, Emulation, emulated_cuda

from kvlink import KVPool, append_kv, from_cuda_array
from kvlink.cuda_array import CudaArray
from kvlink.errors import InvalidArgument

__all__ = ["emulated_cuda"]


class Fake:
    """Host memory that claims, by the interface alone, to be a device's."""

    def __init__(self, array: np.ndarray, **changes: Any) -> None:
        self.array = array
        self.__cuda_array_interface__ = array.__array_interface__ | {"version": 3} | changes


def seen(array: np.ndarray, **changes: Any) -> torch.Tensor:
    """What a consumer of DLPack makes of it, told that it is the host's memory that it is."""
    return torch.from_dlpack(CudaArray(Fake(array, **changes), (1, 0)))


@pytest.mark.parametrize("dtype", ["float32", "float16", "int32", "int64", "uint8", "int8"])
def test_every_type_and_stride(dtype: str) -> None:
    array = np.arange(60).reshape(3, 4, 5).astype(dtype)
    for view in (array, array[:, ::2], array.transpose(2, 0, 1), array[1], array[2:2]):
        tensor = seen(view)
        assert torch.equal(tensor, torch.from_numpy(np.ascontiguousarray(view)))
        if view.size:
            assert tensor.data_ptr() == view.ctypes.data
    made = from_cuda_array(Fake(array), device=3)
    assert (made.dtype, made.shape, made.__dlpack_device__()) == (dtype, (3, 4, 5), (2, 3))


def test_it_lives_as_long_as_it_is_used() -> None:
    fake = Fake(np.ones(3, np.float32))
    alive = weakref.ref(fake)
    tensor = torch.from_dlpack(CudaArray(fake, (1, 0)))
    del fake
    gc.collect()
    assert alive() is not None
    assert tensor.tolist() == [1, 1, 1]
    del tensor
    gc.collect()
    assert alive() is None


def test_streams_are_told() -> None:
    array = np.ones(3, np.float32)
    assert from_cuda_array(Fake(array)).stream is None
    assert from_cuda_array(Fake(array, stream=7)).stream == 7


@pytest.fixture
def ordered(emulated_cuda: Emulation, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """(device, first, then) of each order of two streams."""
    calls: list[tuple[int, ...]] = []
    monkeypatch.setattr(emulated_cuda.module, "order_streams", lambda *call: calls.append(call))
    return calls


@pytest.mark.parametrize(
    ("written_on", "stream", "expected"),
    [
        (None, 9, []), (7, 9, [(0, 7, 9)]), (7, 7, []),
        (1, 0, []), (2, 0, [(0, 2, 1)]), (1, 9, [(0, 1, 9)]), (2, 2, []), (7, None, [(0, 7, 1)]),
    ],
)  # fmt: skip
def test_the_operators_stream_waits_for_the_arrays(
    ordered: list[tuple[int, ...]], written_on: int | None, stream: int | None,
    expected: list[tuple[int, ...]],
) -> None:  # fmt: skip
    memory, rows = np.zeros((2, 4, 4, 2, 8), np.float32), np.ones((3, 2, 8), np.float32)
    slots = DeviceArray(torch.tensor([5, -1, 15]))
    pool = KVPool.wrap([from_cuda_array(Fake(memory, stream=33))], "kv page slot head dim")
    assert ordered == []  # an address alone
    k = from_cuda_array(Fake(rows, **({} if written_on is None else {"stream": written_on})))
    append_kv(k, DeviceArray(torch.from_numpy(rows)), pool, 0, slots, stream=stream)
    assert ordered == expected
    assert (memory[0, 1, 1] == 1).all()


def test_torch_orders_streams_without_the_cuda_part(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Stream:
        def __init__(self, handle: int, device: str) -> None:
            self.name = handle, device

        def wait_stream(self, other: Stream) -> None:
            calls.append((self.name, other.name))

    monkeypatch.setitem(sys.modules, "kvlink._cuda", None)
    monkeypatch.setattr(torch.cuda, "ExternalStream", Stream)
    array = from_cuda_array(Fake(np.ones(3, np.float32), stream=7), device=3)
    array.__dlpack__(stream=9)
    assert calls == [((9, "cuda:3"), (7, "cuda:3"))]
    array.__dlpack__(stream=7)
    array.__dlpack__(stream=-1)
    assert len(calls) == 1
    array.__dlpack__()  # no stream: the legacy default one
    assert calls[1:] == [((1, "cuda:3"), (7, "cuda:3"))]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stream": 0}, "forbids stream 0"),
        ({"mask": Fake(np.ones(3, np.uint8))}, "without a mask"),
        ({"version": 1}, "version 2 or 3.*; got version 1"),
        ({"typestr": ">f4"}, "little-endian integers or floats; got '>f4'"),
        ({"typestr": "|V2"}, r"got '\|V2'"),
        ({"strides": (6,)}, r"strides of whole elements; got \(6,\)"),
    ],
)
def test_what_dlpack_cannot_say_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        from_cuda_array(Fake(np.ones(3, np.float32), **changes))
    with pytest.raises(InvalidArgument, match=r"array: expected .*__cuda_array_interface__; got"):
        from_cuda_array([1.0])


def test_operators_take_it(emulated_cuda: Emulation) -> None:
    """Rows, slots and the pool itself."""
    memory = np.zeros((2, 4, 4, 2, 8), np.float32)
    pool = KVPool.wrap([from_cuda_array(Fake(memory))], "kv page slot head dim")
    rows = np.random.default_rng(0).standard_normal((3, 2, 8)).astype(np.float32)
    slots = np.array([5, -1, 15])
    k, at = from_cuda_array(Fake(rows)), from_cuda_array(Fake(slots))
    append_kv(k, DeviceArray(torch.from_numpy(rows + 1)), pool, 0, at)
    emulated_cuda.check_errors()
    assert (memory[0, 1, 1] == rows[0]).all()
    assert (memory[1, 3, 3] == rows[2] + 1).all()
    assert np.count_nonzero(memory) == 4 * rows[0].size
