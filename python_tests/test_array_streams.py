"""What producers of arrays are told about streams, and the short way to torch's arrays."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from emulated import DeviceArray, Emulation, emulated_cuda, pool_on_device

from kvlink import (
    _C,
    KVPool,
    Rope,
    append_kv,
    apply_rope,
    merge_states,
    paged_attention,
    relayout_pages,
)
from kvlink._cuda_part import stream_of
from kvlink.errors import InvalidArgument
from kvlink.testing.pools import make_pool
from kvlink.triton.tensor_pool import on_stream

__all__ = ["emulated_cuda"]

CSRC = Path(__file__).parents[1] / "csrc"
NOT_TOLD = "not told"


class Recorded(DeviceArray):
    """A device's array that remembers for which stream it was exported."""

    told: list[Any]

    def __init__(self, tensor: torch.Tensor, told: list[Any]) -> None:
        super().__init__(tensor)
        self.told = told

    def __dlpack__(self, *, stream: Any = NOT_TOLD, max_version: Any = None) -> Any:
        self.told.append(stream)
        return super().__dlpack__()


class OldRecorded(Recorded):
    """One from before DLPack 1.0."""

    def __dlpack__(self, *, stream: Any = NOT_TOLD) -> Any:  # type: ignore[override]
        self.told.append(stream)
        return DeviceArray.__dlpack__(self)


class OnHost(Recorded):
    """The host's own memory."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)

    def __dlpack__(self, *, stream: Any = NOT_TOLD, max_version: Any = None) -> Any:
        self.told.append(stream)
        return self.tensor.__dlpack__()


@pytest.mark.parametrize("kind", [Recorded, OldRecorded])
@pytest.mark.parametrize(
    ("stream", "expected"), [(None, 1), (0, 1), (1, 1), (2, 2), (0x7F00DEAD0000, 0x7F00DEAD0000)]
)
def test_producers_hear_of_the_operators_stream(
    emulated_cuda: Emulation, kind: type[Recorded], stream: int | None, expected: int
) -> None:
    """0 is the legacy default stream, which DLPack calls 1."""
    told: list[Any] = []
    filled = make_pool("nhd")
    pool = pool_on_device(filled.pool)
    rows = torch.randn(3, 2, 8)
    append_kv(
        kind(rows, told), kind(rows, told), pool, 0, kind(torch.tensor([1, 2, 3]), told),
        stream=stream,
    )  # fmt: skip
    assert told == [expected] * 3
    told.clear()
    relayout_pages(
        pool, kind(torch.tensor([0, 1], dtype=torch.int32), told), pool, [2, 3], num_tokens=8,
        stream=stream,
    )  # fmt: skip
    assert told == [expected]
    told.clear()
    q = torch.randn(2, 4, 16).bfloat16()
    cache = torch.zeros(2, 4, 16, 2, 16).bfloat16()
    attended = KVPool.wrap([DeviceArray(cache)], "kv page slot head dim")
    paged_attention(
        DeviceArray(q), attended, 0, kind(torch.tensor([[0], [1]], dtype=torch.int32), told),
        kind(torch.tensor([3, 4], dtype=torch.int32), told), stream=stream, backend="cuda",
    )  # fmt: skip
    assert told == [expected] * 2
    told.clear()
    outs = [DeviceArray(q), kind(q, told)]
    lses = [kind(torch.zeros(2, 4), told) for _ in outs]
    merge_states(outs, lses, stream=stream)
    assert told == [expected] * 3
    told.clear()
    rope = Rope(kind(torch.ones(9, 8), told), kind(torch.tensor([2, 3]), told))
    apply_rope(kind(q.float(), told), rope, out=DeviceArray(q.float()), stream=stream)
    assert told == [expected] * 3


def test_a_pool_takes_addresses_alone(emulated_cuda: Emulation) -> None:
    """Nothing is ordered when a pool is made; its operators' streams are the callers' business."""
    told: list[Any] = []
    memory = torch.zeros(2, 4, 4, 2, 8)
    pool = KVPool.wrap([Recorded(memory, told)], "kv page slot head dim")
    assert told == [-1]
    pages = OnHost(torch.tensor([0], dtype=torch.int32), told)
    relayout_pages(pool, pages, pool, [2], num_tokens=4, stream=5)
    assert NOT_TOLD in told  # host memory has no streams
    assert set(told[1:]) == {NOT_TOLD}


def test_a_scope_ends(emulated_cuda: Emulation) -> None:
    """After a call that failed, host operators tell nothing of streams, either."""
    told: list[Any] = []
    filled = make_pool("nhd")
    rows = torch.randn(3, 2, 8)
    with pytest.raises(InvalidArgument, match="slots"):
        append_kv(DeviceArray(rows), DeviceArray(rows), pool_on_device(filled.pool), 0,
                  DeviceArray(torch.zeros(3)), stream=5)  # fmt: skip
    append_kv(OnHost(rows, told), rows, filled.pool, 0, torch.tensor([1, 2, 3]))
    assert told == [NOT_TOLD]


def test_torchs_current_stream_is_found_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    assert stream_of((2, 1), 9) == 9
    assert stream_of((2, 1), None) == 0  # no device here
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(
        torch._C, "_cuda_getCurrentRawStream", lambda device: 70 + device, raising=False
    )
    assert stream_of((2, 1), None) == 71


@pytest.mark.parametrize("stream", [None, 5, 9])
def test_triton_kernels_wait_for_the_current_stream(
    stream: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Theirs is the stream that is given, if it is another one."""
    seen: list[Any] = []

    class Stream:
        def __init__(self, handle: int, _device: Any = None) -> None:
            self.cuda_stream = handle

        def wait_stream(self, other: Stream) -> None:
            seen.append((self.cuda_stream, "waits for", other.cuda_stream))

    monkeypatch.setattr(torch.cuda, "ExternalStream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: Stream(5))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: seen.append(stream.cuda_stream))
    monkeypatch.setattr(torch.cuda, "device", lambda device: seen.append(str(device)))
    on_stream(torch.device("cuda", 0), stream)
    assert seen == ([(9, "waits for", 5), 9] if stream == 9 else ["cuda:0"])


def test_two_places_wait_for_a_device() -> None:
    """A digest that is returned, and check_errors: everything else may be captured by a graph."""
    waits = re.compile(r"\bcuda(?:Stream|Device|Event)Synchronize\b|\bcuda(?:Memcpy|Malloc|Free)\(")
    sources = [*CSRC.glob("kvlink/cuda/*"), *CSRC.glob("bindings/cuda_*")]
    found = {(path.name, call) for path in sources for call in waits.findall(path.read_text())}
    assert found == {
        ("cuda_module.cpp", "cudaDeviceSynchronize"),
        ("relayout_pages.cu", "cudaStreamSynchronize"),
    }


# --- torch's C API --------------------------------------------------------------------------------


class Subclass(torch.Tensor):
    """Python is asked for what a subclass is."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        raise BufferError("of no use")


@pytest.mark.skipif(not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="torch is older")
def test_torch_arrays_come_without_python(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_args: Any, **_kwargs: Any) -> Any:
        raise AssertionError("asked")

    arrays = [
        torch.arange(24).reshape(2, 3, 4)[:, ::2].to(dtype)
        for dtype in (torch.float32, torch.int64, torch.bfloat16, torch.bool, torch.uint8)
    ]
    arrays += [torch.zeros(3, 0), torch.tensor(2.5), torch.zeros(3).to(torch.float8_e4m3fn)]
    arrays += [torch.arange(24.0).reshape(4, 6).T]
    monkeypatch.setattr(torch.Tensor, "__dlpack__", never)
    for array in arrays:
        address, shape, strides, name, device, read_only = _C.tensor_info(array, "array")
        assert tuple(shape) == tuple(array.shape)
        assert device == (1, 0)
        assert name.replace("e4m3", "e4m3fn") == str(array.dtype).removeprefix("torch.")
        assert read_only is False
        if array.numel():
            assert address == array.data_ptr()
            assert [s for s, n in zip(strides, shape, strict=True) if n > 1] == [
                s for s, n in zip(array.stride(), shape, strict=True) if n > 1
            ]


def test_what_the_c_api_does_not_check_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"the array could not be exported: .*gradient"):
        _C.tensor_info(torch.ones(3, requires_grad=True), "array")
    with pytest.raises(InvalidArgument, match="array: the array could not be exported: of no use"):
        _C.tensor_info(torch.ones(3).as_subclass(Subclass), "array")
    parameter = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    assert _C.tensor_info(parameter, "array")[0] == parameter.data_ptr()
    with pytest.raises(InvalidArgument, match="array: the array could not be exported"):
        _C.tensor_info(torch.ones(3, 3).to_sparse(), "array")
    assert _C.tensor_info(np.ones(3, np.float32), "array")[1] == [3]
