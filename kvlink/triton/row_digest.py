"""The digest of rows, as docs/kv_layout.md defines it, inside kernels."""

from __future__ import annotations

import triton
import triton.language as tl

_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_STEP = tl.constexpr(0xD1B54A32D192ED03)
_FIRST = tl.constexpr(0xBF58476D1CE4E5B9)
_SECOND = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 30)) * _FIRST
    x = (x ^ (x >> 27)) * _SECOND
    return x ^ (x >> 31)


@triton.jit
def lane_sums(bits, first_dim, row_bytes, SIZE: tl.constexpr):
    """(products, words), uint64 [R, 8] each: what elements [R, C] add to the lanes of their rows.

    `bits` are the elements from `first_dim` on, which begin a stripe, as unsigned integers of SIZE
    bytes, 0 past the rows' ends.
    """
    ROWS: tl.constexpr = bits.shape[0]
    IN_WORD: tl.constexpr = 8 // SIZE
    STRIPES: tl.constexpr = bits.shape[1] * SIZE // 64
    parts = tl.reshape(bits.to(tl.uint64), [ROWS, STRIPES * 8, IN_WORD])
    shift = (tl.arange(0, IN_WORD) * (8 * SIZE)).to(tl.uint64)
    word = tl.reshape(tl.sum(parts << shift[None, None, :], 2), [ROWS, STRIPES, 8])
    lane = tl.arange(0, 8).to(tl.uint64)
    stripe = first_dim * SIZE // 64 + tl.arange(0, STRIPES)
    key = _mix((lane + 1) * _GOLDEN)[None, :] + (stripe.to(tl.uint64) * _STEP)[:, None]
    x = word ^ key[None, :, :]
    exists = (stripe * 64 < row_bytes)[None, :, None]
    product = tl.where(exists, (x & 0xFFFFFFFF) * (x >> 32), 0)
    return tl.sum(product, 1), tl.sum(word, 1)


@triton.jit
def row_digests(products, words, layer, head, plane, row_bytes, position, scale_bits,
                PER_TOKEN: tl.constexpr):  # fmt: skip
    """uint64 [R]: the digests of rows whose whole lane sums are known.

    `head` and `position` are integers [R]; `scale_bits` uint32 [R] enter with PER_TOKEN.
    """
    # Word j also adds to lane j ^ 1: a pair's sum without the lane's own.
    pairs = tl.reshape(words, [words.shape[0], 4, 2])
    both = tl.sum(pairs, 2)
    others = tl.reshape(both[:, :, None] - pairs, words.shape)
    lane = tl.arange(0, 8).to(tl.uint64)
    row = (layer.to(tl.uint64) << 32) | head.to(tl.uint64)
    size = tl.full((), 0, tl.uint64) + row_bytes
    place = _mix(row) + tl.full((), plane + 1, tl.uint64) * _STEP + size * _GOLDEN
    start = _mix(_mix(place)[:, None] + _mix((lane + 9) * _GOLDEN)[None, :])
    shift = position.to(tl.uint64) * _GOLDEN
    if PER_TOKEN:
        shift += (scale_bits.to(tl.uint64) | 0x100000000) * _STEP
    return tl.sum(_mix((products + others) ^ (start + shift[:, None])), 1)
