"""Pools of which every byte is accounted for, and KV that tells whose it is."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from kvlink.cache_ops import append_kv
from kvlink.pages import PageAllocator
from kvlink.pool import KVPool
from kvlink.testing.transfer_pool import PoolSpec, pool_bytes
from kvlink.transfer import Endpoint

_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)

SAME = PoolSpec(num_pages=48)
SPECS = {
    "same": SAME,
    "relayout": replace(SAME, kind="hnd", page_size=7, num_pages=96),
    "large": replace(SAME, head_dim=64, page_size=64, num_pages=24),  # runs of 64 KiB
}
TOKENS = {"same": 40, "relayout": 40, "large": 500}


def kv_of(request: int, spec: PoolSpec, layer: int, num_tokens: int) -> list[Any]:
    """K and V of a request: float32 [tokens, heads, head_dim] in [0.5, 1), other ones for every
    request, layer, plane and row."""
    shape = (num_tokens, len(spec.shard.kv_heads), spec.head_dim)
    idx = np.arange(np.prod(shape), dtype=np.uint32)
    planes = []
    for plane in (0, 1):
        seed = np.random.default_rng([request, layer, plane]).integers(2**32, dtype=np.uint32)
        x = idx * np.uint32(0x9E3779B1) + seed
        x = (x ^ (x >> np.uint32(15))) * np.uint32(0x85EBCA6B)
        x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
        bits = np.uint32(0x3F000000) | (x >> np.uint32(9))
        planes.append(bits.view(np.float32).reshape(shape))
    return planes


def write_kv(pool: Any, spec: PoolSpec, pages: Any, num_tokens: int, request: int) -> None:
    """Puts a request's KV into pages of a pool."""
    at = np.arange(num_tokens)
    slots = np.asarray(pages, np.int64)[at // spec.page_size] * spec.page_size + at % spec.page_size
    for layer, model_layer in enumerate(spec.layers):
        k, v = kv_of(request, spec, model_layer, num_tokens)
        append_kv(k, v, pool, layer, slots)


class WatchedPool:
    """A registered pool, its allocator, and a twin that says what each byte must be.

    The twin changes only by what was verified and by what this side wrote itself, so that any
    other write, whoever made it and whenever it landed, shows in `wrong`.
    """

    def __init__(self, spec: PoolSpec, endpoint: Endpoint) -> None:
        self.spec = spec
        self.pool, self.twin = spec.build(), replace(spec, shared=False).build()
        self.allocator = PageAllocator(spec.num_pages, spec.page_size)
        self.region = endpoint.register(
            self.pool, spec.shard, generations=self.allocator.generations
        )
        self._bytes, self._want = pool_bytes(self.pool), pool_bytes(self.twin)
        self._fills = 0

    def take(self, num_tokens: int) -> npt.NDArray[np.int32]:
        """Pages for that many tokens."""
        return self.allocator.allocate(-(-num_tokens // self.spec.page_size))

    def put(self, pages: Any, num_tokens: int, request: int) -> None:
        """Writes a request here: it is there, and it must stay."""
        write_kv(self.pool, self.spec, pages, num_tokens, request)
        self.expect(pages, num_tokens, request)

    def expect(self, pages: Any, num_tokens: int, request: int) -> None:
        """A request was verified in these pages."""
        write_kv(self.twin, self.spec, pages, num_tokens, request)

    def give(self, pages: Any) -> None:
        """The pages are this side's alone again: they go to somebody else, who writes at once."""
        self._fills += 1
        fill = np.float32(-1 - self._fills % 1000)
        for layer in range(len(self.spec.layers)):
            for plane in ("k", "v"):
                for pool in (self.pool, self.twin):
                    view = np.from_dlpack(getattr(pool, plane)(layer))
                    view[np.asarray(pages)] = fill
        self.allocator.free(pages)

    @property
    def num_out(self) -> int:
        """Pages that somebody holds."""
        return self.spec.num_pages - self.allocator.num_free

    def flip(self, page: int, random: Any) -> None:
        """One bit of a page, as a failing memory would."""
        layer, plane = random.randrange(len(self.spec.layers)), random.choice(("k", "v"))
        values = np.from_dlpack(getattr(self.pool, plane)(layer)).view(np.uint32)
        values[page, 0, 0, 0] ^= np.uint32(1 << random.randrange(32))

    def wrong(self) -> int:
        """Bytes that are not what they must be."""
        # Without a copy: this runs in processes that must not grow.
        if not _memcmp(self._bytes.ctypes.data, self._want.ctypes.data, self._bytes.nbytes):
            return 0
        return int(np.count_nonzero(self._bytes != self._want))

    def resync(self) -> None:
        """Goes on from what is there, so that one finding is reported once."""
        self._want[:] = self._bytes


def holds(pool: KVPool, pages: Any, spec: PoolSpec, num_tokens: int, request: int) -> bool:
    """The pages hold that request."""
    at = np.arange(num_tokens)
    at_page, at_slot = np.asarray(pages)[at // spec.page_size], at % spec.page_size
    for layer, model_layer in enumerate(spec.layers):
        planes = kv_of(request, spec, model_layer, num_tokens)
        for plane, want in zip(("k", "v"), planes, strict=True):
            view = np.from_dlpack(getattr(pool, plane)(layer))
            if not np.array_equal(view[at_page, at_slot], want):
                return False
    return True


def holdings() -> dict[str, int]:
    """What this process holds of the things that must not grow."""
    with open("/proc/self/maps") as maps:
        mapped = sum("memfd:" in line for line in maps)
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "mapped segments": mapped,
    }


class _Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd",
                     "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    ]  # fmt: skip


def memory() -> dict[str, int]:
    """Resident bytes of this process, and what is in use: bytes of `malloc` (glibc tells) and
    Python's own blocks. Resident memory has holes between what is in use, too."""
    with open("/proc/self/statm") as statm:
        resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE")
    found = {"resident bytes": resident, "Python blocks": sys.getallocatedblocks()}
    with contextlib.suppress(AttributeError):
        mallinfo = ctypes.CDLL(None).mallinfo2
        mallinfo.restype = _Mallinfo
        info = mallinfo()
        found["malloc bytes"] = info.uordblks + info.hblkhd
    return found


def eventually(condition: Callable[[], bool], bound: float = 20.0) -> bool:
    """Whether it came true in time."""
    end = time.monotonic() + bound
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True
