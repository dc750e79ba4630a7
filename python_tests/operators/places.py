"""Where the operator tests run: every backend that this process has, and the memory it works on.

An ordinary process has the CPU backend and, with a GPU, those on the device, else the CUDA kernels
in emulation; one with TRITON_INTERPRET=1 (python_tests/test_triton.py starts it) has the Triton
kernels on host memory.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any, NamedTuple

import torch
from emulated import DeviceArray, emulation, pool_on_device

from kvlink import KVPool
from kvlink.testing.pools import Filled

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Place(NamedTuple):
    """A backend, and whose memory it works on: "cpu", "cuda" or "emulated", which is the host's."""

    backend: str
    device: str

    def __str__(self) -> str:
        return self.backend if self.device != "emulated" else "cuda-emulated"

    def put(self, value: Any) -> Any:
        """Tensors, pools and containers of them, in memory of the device."""
        if isinstance(value, torch.Tensor):
            return DeviceArray(value) if self.device == "emulated" else value.to(self.device)
        if isinstance(value, KVPool) and self.device == "emulated":
            return pool_on_device(value)
        if isinstance(value, KVPool):
            return value if self.device == "cpu" else twin(value, self.device)
        if isinstance(value, dict):
            return {key: self.put(each) for key, each in value.items()}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self.put(each) for each in value))
        if isinstance(value, list | tuple):
            return type(value)(self.put(each) for each in value)
        return value

    def take(self, array: Any) -> torch.Tensor:
        """An operator's result as a tensor in host memory."""
        found: torch.Tensor = array.tensor if self.device == "emulated" else array.cpu()
        return found

    def settle(self) -> None:
        """Waits for what is queued on the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        elif self.device == "emulated":
            emulation().check_errors()


def places() -> list[Place]:
    """What this machine and process have."""
    if INTERPRETED:
        return [Place("triton", "cpu")]
    found = [Place("cpu", "cpu")]
    if torch.cuda.is_available():
        if importlib.util.find_spec("kvlink._cuda") is not None:
            found.append(Place("cuda", "cuda"))
        found.append(Place("triton", "cuda"))
    else:
        found.append(Place("cuda", "emulated"))
    return found


def twin(pool: KVPool, device: str) -> KVPool:
    """A pool of the same layout on the device, plane by plane, without what lies between rows."""
    layout, tensors, planes = pool.layout, [], []
    names = ["k", *(["v"] if layout.has_v_plane else [])]
    names += [f"{name}_scale" for name in names] if layout.has_scales else []
    for stored in range(pool.num_stored_layers):
        layer = pool.layer_map.index(stored)
        at = {}
        for name in names:
            here = torch.from_dlpack(getattr(pool, name)(layer))
            there = torch.empty_strided(here.shape, here.stride(), dtype=here.dtype, device=device)
            raw = here.dtype if here.element_size() > 1 else torch.uint8
            there.view(raw).copy_(here.view(raw))
            tensors.append(there)
            at[name] = there.data_ptr()
        if layout.form == "latent":
            at |= {name.replace("k", "v", 1): address for name, address in at.items()}
        planes.append(tuple(at.get(each, 0) for each in ("k", "v", "k_scale", "v_scale")))
    index = tensors[0].device.index or 0
    return KVPool(layout, pool.num_pages, planes, pool.layer_map, (2, index), tensors)


def assert_same_bytes(place: Place, pool: KVPool, ours: Filled, expected: Filled) -> None:
    """`pool` is place.put(ours.pool). On the host every byte is compared, padding included."""
    place.settle()
    if place.device != "cuda":
        assert ours.bytes() == expected.bytes()
        return
    layout = pool.layout
    for layer in range(pool.num_layers):
        for name in ("k", "v", "k_scale", "v_scale"):
            if "scale" in name and not layout.has_scales:
                continue
            if name == "v" and not layout.has_v_plane:
                continue
            here = torch.from_dlpack(getattr(expected.pool, name)(layer)).contiguous()
            there = torch.from_dlpack(getattr(pool, name)(layer)).cpu().contiguous()
            assert torch.equal(here.view(torch.uint8), there.view(torch.uint8)), name
