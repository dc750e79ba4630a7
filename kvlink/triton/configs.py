"""Tile shapes and launch parameters, checked in: nothing is searched for when a kernel runs.

Chosen by reasoning for an H200 (132 SMs, 228 KiB of shared memory each) and for the shared memory
of other devices, not measured on any yet. `python_tests/test_triton_compiled.py` holds that what it
compiles has enough of that, and spills no registers.
"""

from __future__ import annotations

from typing import NamedTuple

MIN_CAPABILITY = 80  # Triton's own
# KiB of shared memory that one program may have, by compute capability.
_SHARED_KIB = {
    80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99
}  # fmt: skip


def shared_bytes(capability: int) -> int:
    """That a program may have; of a device that is not known yet, the least of all."""
    return _SHARED_KIB.get(capability, min(_SHARED_KIB.values())) << 10


class RowsConfig(NamedTuple):
    """Rows of `dims` elements (a power of two) that one program takes."""

    rows: int
    dims: int
    num_warps: int


def rows(head_dim: int) -> RowsConfig:
    """For kernels that pass over rows once: 2048 elements a program, 8 a thread."""
    dims = 1 << max(0, head_dim - 1).bit_length()
    return RowsConfig(max(1, 2048 // dims), dims, 8)


# Of a thread of relayout_pages: without a bound ptxas keeps to 48 for sm_80, and spills.
MOVING_REGISTERS = 128


def moved_rows(dims: int, element_bytes: int) -> RowsConfig:
    """For relayout_pages, whose digest takes stripes of 64 bytes; longer rows go in chunks."""
    chunk = max(64 // element_bytes, 1 << max(0, min(dims, 1024) - 1).bit_length())
    return RowsConfig(max(1, 2048 // chunk), chunk, 8)


class AttentionConfig(NamedTuple):
    """One program of attention: `m` rows (query heads of tokens) by tiles of `n` positions."""

    m: int
    n: int
    num_warps: int
    num_stages: int


# Positions that one program of decode takes: 32k tokens of 8 KV heads make 512 programs, about two
# rounds of four on each SM. Results depend on it, so it does not depend on anything.
SPLIT = 512
STATES = 16  # that are joined at once

# For programs of so many rows and dims, of K and V in "16-bit" or "8-bit", or of products in
# "float32": the first line that covers a call.
# num_stages counts both steps of a page's way here, its id and its rows: 5 are two tiles in flight.
_Lines = tuple[tuple[int, int, str, AttentionConfig], ...]
_DECODE: _Lines = (
    # memory alone counts: tiles of 16 to 32 KiB of K, and as much of V
    (16, 128, "8-bit 16-bit", AttentionConfig(16, 64, 4, 5)),
    (16, 256, "8-bit 16-bit", AttentionConfig(16, 32, 4, 5)),
    (16, 576, "8-bit 16-bit", AttentionConfig(16, 32, 8, 5)),
    # MLA: 32 of 128 query heads share a tile
    (64, 128, "8-bit 16-bit", AttentionConfig(64, 64, 4, 5)),
    (64, 256, "8-bit 16-bit", AttentionConfig(64, 32, 8, 3)),
    (64, 576, "8-bit 16-bit", AttentionConfig(32, 32, 8, 3)),
)
_DECODE_SMALL: _Lines = (  # where two tiles of 512 dims are too much
    (16, 128, "8-bit 16-bit", AttentionConfig(16, 64, 4, 5)),
    (16, 256, "8-bit 16-bit", AttentionConfig(16, 32, 4, 5)),
    (16, 576, "8-bit 16-bit", AttentionConfig(16, 16, 8, 5)),
    (64, 256, "8-bit 16-bit", AttentionConfig(64, 32, 8, 3)),
    (64, 576, "8-bit 16-bit", AttentionConfig(32, 16, 8, 3)),
)
_FLOAT32: _Lines = (
    (128, 128, "float32", AttentionConfig(16, 32, 8, 1)),
    (128, 576, "float32", AttentionConfig(16, 16, 8, 1)),
)
_EXTEND_WIDE: _Lines = (
    # a tile is read once for 128 rows
    (128, 128, "8-bit 16-bit", AttentionConfig(128, 32, 8, 3)),
    (128, 576, "8-bit 16-bit", AttentionConfig(32, 32, 8, 3)),
)
_EXTEND_NARROW: _Lines = (  # where 128 rows spill
    (128, 128, "8-bit 16-bit", AttentionConfig(32, 32, 4, 3)),
    (128, 256, "8-bit 16-bit", AttentionConfig(32, 32, 8, 3)),
    (128, 576, "8-bit 16-bit", AttentionConfig(16, 16, 8, 3)),
)
_ATTENTION: dict[int, _Lines] = {  # from so many KiB of shared memory on
    227: (*_DECODE, *_EXTEND_WIDE, *_FLOAT32),
    163: (*_DECODE, *_EXTEND_NARROW, *_FLOAT32),
    99: (*_DECODE_SMALL, *_EXTEND_NARROW, *_FLOAT32),
}
_WIDTHS = {"float32": "float32", "float16": "16-bit", "bfloat16": "16-bit"}


def attention(capability: int, max_rows: int, dims: int, dtype: str) -> AttentionConfig:
    """For so many rows of a unit (a decode's group of query heads; 128 or more: extend).

    `dtype`: that of K and V, or float32 if products are.
    """
    wanted = 16 if max_rows <= 16 else 64 if max_rows <= 64 else 128
    width = _WIDTHS.get(dtype, "8-bit")
    available = shared_bytes(capability) >> 10
    lines = next(lines for least, lines in _ATTENTION.items() if available >= least)
    for rows, up_to, widths, config in lines:
        if wanted <= rows and dims <= up_to and width in widths.split():
            return config
    raise ValueError(f"no configuration for rows of {dims} elements")  # checked by the caller
