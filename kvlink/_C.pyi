"""Written by tools/make_stubs.py from the built module; `make stubs` brings it up to date."""

from collections.abc import Sequence
from typing import Any

class ArrayView:
    """Memory of a pool, exported through DLPack."""

    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: Any = None,
        dl_device: Any = None,
        copy: Any = None,
    ) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...
    def __init__(
        self,
        address: int,
        shape: Sequence[int],
        strides: Sequence[int],
        dtype: str,
        device: tuple[int, int],
        owner: Any,
    ) -> None: ...

class Layout:
    """The C++ twin of kvlink.KVLayout."""

    def __init__(self, bytes: bytes) -> None: ...
    def k_offset(self, page: int, slot: int, head: int, dim: int) -> int: ...
    def k_scale_offset(self, page: int, slot: int, head: int) -> int: ...
    def to_bytes(self) -> bytes: ...
    def v_offset(self, page: int, slot: int, head: int, dim: int) -> int: ...
    def v_scale_offset(self, page: int, slot: int, head: int) -> int: ...

class PageIds:
    """Page ids, int32: an array without a copy, or a sequence."""

    def __init__(self, pages: Any, name: str) -> None: ...
    def __len__(self) -> int: ...

class PoolView:
    """A pool as the operators see it."""

    def __init__(
        self,
        layout_bytes: bytes,
        layers: Sequence[Sequence[int]],
        num_pages: int,
        layer_map: Sequence[int],
        device: tuple[int, int],
        owner: Any,
    ) -> None: ...

class Segment:
    """Page-aligned, zeroed memory without a name."""

    @property
    def address(self) -> int: ...
    @staticmethod
    def attach(fd: int, num_bytes: int) -> Segment: ...
    @staticmethod
    def create(num_bytes: int, shared: bool) -> Segment: ...
    @property
    def fd(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...

def append_kv(k: Any, v: Any, pool: PoolView, layer: int, slots: Any) -> None: ...

def convert(src: Any, src_dtype: str, dst: Any, dst_dtype: str) -> None:
    """Converts elements, given as contiguous uint8 arrays, one by one through float32."""

def digest_pages(
    *,
    pool: PoolView,
    pages: PageIds,
    layers: Sequence[int],
    model_layers: Sequence[int],
    num_heads: int,
    head: int,
    model_head: int,
    num_tokens: int,
    start: int,
    token_position: int,
) -> tuple[Any, ...]:
    """(rows, digest). Layers are stored layers."""

def num_threads() -> int:
    """Threads the CPU operators use."""

def relayout_pages(
    *,
    src: PoolView,
    src_pages: PageIds,
    dst: PoolView,
    dst_pages: PageIds,
    src_layers: Sequence[int],
    dst_layers: Sequence[int],
    model_layers: Sequence[int],
    num_heads: int,
    src_head: int,
    dst_head: int,
    model_head: int,
    num_tokens: int,
    src_start: int,
    dst_start: int,
    token_position: int,
    digest: bool,
) -> tuple[Any, ...]:
    """(rows, digest). Layers are stored layers."""

def set_num_threads(count: int) -> None: ...

def set_simd_level(name: str) -> None: ...

def simd_level() -> str:
    """Level of the vector code in use: portable, avx2 or avx512."""

def supported_simd_levels() -> list[str]:
    """Levels that this build has and this CPU runs, lowest first."""

def tensor_info(
    object: Any,
    name: str,
) -> tuple[int, list[int], list[int], str, tuple[int, int], bool]:
    """(address, shape, strides in elements, dtype name, (device type, device id), read_only)."""
