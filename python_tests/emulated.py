"""kvlink's CUDA kernels without a GPU: `emulated_cuda` builds them for the host and makes kvlink
use them; a `DeviceArray` is host memory that looks like a device's. What this can show, and what it
cannot, is in csrc/emulation/grid.hpp."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch

from kvlink.pool import KVPool

float32 = torch.float32  # kvlink makes results in the library of q: of a DeviceArray, this module
ROOT = Path(__file__).parents[1]
SEEDS = (0, 1, 2)  # of the schedule; 0 takes threads in their order


class Emulation:
    """kvlink._cuda_emulated, which stands for kvlink._cuda, and the seed of its next launches."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self._library = ctypes.CDLL(str(module.__file__))

    def seed(self, value: int) -> None:
        self._library.kvlink_emulation_seed(ctypes.c_uint64(value))

    def probe(self, kernel: str, values: int, out: int) -> str | None:
        """Runs a kernel of csrc/emulation/probe.cu on addresses of floats; its complaint."""
        run = self._library.kvlink_emulation_probe
        run.argtypes, run.restype = (
            [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p],
            ctypes.c_char_p,
        )
        error = run(kernel.encode(), values, out)
        return None if error is None else error.decode()

    def probe_sm90(self, kernel: str, values: int, size: tuple[int, int], out: int) -> str | None:
        """The same of csrc/emulation/probe_sm90.cu, which has what the addresses are of."""
        run = self._library.kvlink_emulation_probe_sm90
        integer, pointer = ctypes.c_int, ctypes.c_void_p
        run.argtypes = [ctypes.c_char_p, pointer, integer, integer, pointer]
        run.restype = ctypes.c_char_p
        error = run(kernel.encode(), values, *size, out)
        return None if error is None else error.decode()

    def major_version(self, value: int) -> None:
        """Of the device's compute capability: 9 at first."""
        self._library.kvlink_emulation_major_version(value)

    def lock_pages(self, tensor: torch.Tensor) -> None:
        """Its memory, and no other, is page-locked and mapped."""
        self._library.kvlink_emulation_lock_pages(ctypes.c_void_p(tensor.data_ptr()))

    def busy(self, stream: int, is_busy: bool) -> None:
        """What is queued on the stream does not end, as far as events tell."""
        self._library.kvlink_emulation_set_busy(ctypes.c_uint64(stream), ctypes.c_int(is_busy))

    def allocations(self) -> tuple[int, int]:
        """Of device memory: (how many there were, how many of them there still are)."""
        made, freed = ctypes.c_int64(), ctypes.c_int64()
        self._library.kvlink_emulation_allocations(ctypes.byref(made), ctypes.byref(freed))
        return made.value, made.value - freed.value

    def check_errors(self) -> None:
        """Raises what kernels recorded."""
        self.module.check_errors(0)


@cache
def emulation() -> Emulation:
    """Builds what has changed (seconds), and loads it."""
    folder = os.environ.get("KVLINK_EXPECTED_BUILD")
    if folder is None:  # else run_sanitized.py has built it
        folder = str(ROOT / "build")
        command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "build/emulation"]
        built = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"KVLINK_EMULATION": "1"}, timeout=1200,
            check=False, capture_output=True, text=True,
        )  # fmt: skip
        assert built.returncode == 0, built.stdout + built.stderr
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    path = Path(folder) / "emulation" / "kvlink" / f"_cuda_emulated{suffix}"
    spec = importlib.util.spec_from_file_location("kvlink._cuda_emulated", path)
    assert spec, path
    assert spec.loader, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Emulation(module)


@pytest.fixture
def emulated_cuda(monkeypatch: pytest.MonkeyPatch) -> Emulation:
    """kvlink's CUDA part, emulated, for one test."""
    found = emulation()
    monkeypatch.setitem(sys.modules, "kvlink._cuda", found.module)
    found.seed(0)
    found.major_version(9)
    found.module.set_prefill("auto")
    return found


class DeviceArray:
    """A torch tensor in host memory that says it is on CUDA device 0."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.dtype, self.shape = tensor.dtype, tensor.shape

    def __len__(self) -> int:
        return len(self.tensor)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(self, **_options: object) -> object:
        capsule = self.tensor.__dlpack__()
        get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
        get_pointer.restype, get_pointer.argtypes = (
            ctypes.c_void_p,
            (ctypes.py_object, ctypes.c_char_p),
        )
        managed = get_pointer(capsule, b"dltensor")
        assert managed
        ctypes.c_int32.from_address(managed + 8).value = 2  # the type of the device: kDLCUDA
        return capsule


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> DeviceArray:
    """Whatever is not written stays NaN."""
    return DeviceArray(torch.full(shape, float("nan"), dtype=dtype))


def pool_on_device(pool: KVPool) -> KVPool:
    """The same memory as a pool of CUDA device 0."""
    layer_map = list(pool.layer_map)
    return KVPool(pool.layout, pool.num_pages, pool._planes, layer_map, (2, 0), pool)
