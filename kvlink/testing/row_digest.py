"""A second implementation of the row digest, from its specification in docs/kv_layout.md."""

from __future__ import annotations

import numpy as np

from kvlink.layout import Shard
from kvlink.pool import KVPool
from kvlink.reference.append_kv import scale_plane
from kvlink.testing.pools import rows_of

_GOLDEN = 0x9E3779B97F4A7C15
_STEP = 0xD1B54A32D192ED03
_MASK = 2**64 - 1


def mix(x: int) -> int:
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


def run_digest(
    pool: KVPool, pages: list[int], num_tokens: int, start: int, shard: Shard, position: int = 0
) -> int:
    """Sum of the row digests of a run in a pool whose layers are all stored ones."""
    layout = pool.layout
    total = 0
    for layer, model_layer in enumerate(shard.layers):
        for plane, name in enumerate(("k", "v") if layout.has_v_plane else ("k",)):
            rows = rows_of(pool, layer, name).numpy()
            for t in range(num_tokens):
                page, slot = pages[(start + t) // layout.page_size], (start + t) % layout.page_size
                for head, model_head in enumerate(shard.kv_heads):
                    scale = None
                    if layout.scale == "token_head":
                        value = scale_plane(pool, layer, name).numpy()[page, slot, head]
                        scale = int(np.float32(value).view(np.uint32))
                    data = np.ascontiguousarray(rows[page, slot, head]).tobytes()
                    total += row_digest(data, model_layer, model_head, plane, position + t, scale)
    return total & _MASK
