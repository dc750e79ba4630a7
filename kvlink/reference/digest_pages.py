"""The digest of rows, from its specification in docs/kv_layout.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from kvlink.errors import InvalidArgument, PageTableError
from kvlink.layout import Shard
from kvlink.reference.append_kv import plane, scale_plane

_GOLDEN = 0x9E3779B97F4A7C15
_STEP = 0xD1B54A32D192ED03
_MASK = 2**64 - 1
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def mix(x: int) -> int:
    """Spreads every bit of 64 over all of them."""
    x &= _MASK
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)


KEYS = [mix(_GOLDEN * (j + 1)) for j in range(16)]


def row_digest(
    data: bytes, layer: int, head: int, plane: int, position: int, scale_bits: int | None
) -> int:
    """Of one row; `scale_bits` is the row's own scale, if it has one."""
    padded = data + bytes(-len(data) % 64)
    acc = [0] * 8
    for i, word in enumerate(np.frombuffer(padded, dtype="<u8").tolist()):
        stripe, j = divmod(i, 8)
        x = word ^ ((KEYS[j] + stripe * _STEP) & _MASK)
        acc[j] += (x & 0xFFFFFFFF) * (x >> 32)
        acc[j ^ 1] += word
    base = mix(mix(layer << 32 | head) + (plane + 1) * _STEP + len(data) * _GOLDEN)
    shift = position * _GOLDEN
    if scale_bits is not None:
        shift += (1 << 32 | scale_bits) * _STEP
    starts = [mix(base + KEYS[8 + j]) for j in range(8)]
    return sum(mix((acc[j] & _MASK) ^ (starts[j] + shift & _MASK)) for j in range(8)) & _MASK


def locate(
    pool: Any, pages: Any, start: int, num_tokens: int, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Page and slot of each token of a run that begins at slot `start` of pages[0].

    Raises InvalidArgument, PageTableError; `name` is the argument the pages came in.
    """
    page_size = pool.layout.page_size
    listed = [int(page) for page in (pages.tolist() if hasattr(pages, "tolist") else pages)]
    if start < 0:
        raise InvalidArgument(f"{name}: expected a first slot >= 0; got {start}")
    if num_tokens < 0:
        raise InvalidArgument(f"num_tokens: expected >= 0; got {num_tokens}")
    end = -(-(start + num_tokens) // page_size)
    if num_tokens and end > len(listed):
        raise InvalidArgument(
            f"{name}: expected at least {end} pages for {num_tokens} tokens from slot {start}; "
            f"got {len(listed)}"
        )
    for i in range(start // page_size, end if num_tokens else 0):
        if not 0 <= listed[i] < pool.num_pages:
            raise PageTableError(
                f"{name}[{i}]: expected a page in [0, {pool.num_pages}); got {listed[i]}"
            )
    at = torch.arange(start, start + num_tokens)
    return torch.tensor(listed, dtype=torch.long)[at // page_size], at % page_size


def digest_rows(
    pool: Any,
    pages: Any,
    *,
    layers: Sequence[int],
    model_layers: Sequence[int],
    num_heads: int,
    head: int,
    model_head: int,
    num_tokens: int,
    start: int,
    token_position: int,
) -> tuple[int, int]:
    """(rows, digest) of a run: `layers` are stored layers, heads are from `head` on."""
    page, slot = locate(pool, pages, start, num_tokens, "pages")
    at = (page, slot, slice(head, head + num_heads))
    rows = total = 0
    for stored, model_layer in zip(layers, model_layers, strict=True):
        layer = pool.layer_map.index(stored)
        for number, name in enumerate(("k", "v") if pool.layout.has_v_plane else ("k",)):
            elements = plane(pool, layer, name)
            data = elements.view(BITS[elements.element_size()])[at].numpy()
            scales = None
            if pool.layout.scale == "token_head":
                scales = scale_plane(pool, layer, name)[at].view(torch.int32).numpy()
            for t, h in np.ndindex(num_tokens, num_heads):
                bits = None if scales is None else int(scales[t, h]) & 0xFFFFFFFF
                total += row_digest(
                    data[t, h].tobytes(), model_layer, model_head + h, number,
                    token_position + t, bits,
                )  # fmt: skip
                rows += 1
    return rows, total & _MASK


def run_digest(
    pool: Any, pages: list[int], num_tokens: int, start: int, shard: Shard, position: int = 0
) -> int:
    """Digest of a run in a pool whose layers are all stored ones."""
    return digest_rows(
        pool, pages, layers=range(len(shard.layers)), model_layers=shard.layers,
        num_heads=len(shard.kv_heads), head=0, model_head=shard.kv_heads.start,
        num_tokens=num_tokens, start=start, token_position=position,
    )[1]  # fmt: skip
