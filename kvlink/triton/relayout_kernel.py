"""The kernel that moves rows of any layout to any other, and digests them as they are stored."""

from __future__ import annotations

import triton
import triton.language as tl

from kvlink.triton.error_record import record_error
from kvlink.triton.row_digest import lane_sums, row_digests
from kvlink.triton.values import (
    from_bits,
    from_float32,
    largest_finite,
    row_scales,
    to_bits,
    to_float32,
)


@triton.jit
def _locate(pages, token, wanted, start, num_pages, num_rows, errors, PAGE_SIZE: tl.constexpr,
            ARGUMENT: tl.constexpr):  # fmt: skip
    """(page, slot, whether there is such a page) of tokens of a run."""
    at = start + token
    entry = at // PAGE_SIZE
    page = tl.load(pages + entry, mask=wanted, other=0)
    bad = wanted & ((page < 0) | (page >= num_pages))
    if tl.max(bad.to(tl.int32), 0) != 0:
        first = tl.min(tl.where(bad, entry, 2**62), 0)
        found = tl.max(tl.where(bad & (entry == first), page, -(2**31)), 0)
        record_error(errors, ARGUMENT, -1, first, found)
    return page.to(tl.int64), at % PAGE_SIZE, wanted & (bad == 0)


@triton.jit
def _bits(rows, first, dims, stride, wanted, CHUNK: tl.constexpr):
    """Elements [R, CHUNK] from dim `first` on, of rows that begin at pointers [R]."""
    dim = first + tl.arange(0, CHUNK)
    at = dim.to(tl.int64) * stride
    inside = wanted[:, None] & (dim < dims)[None, :]
    return tl.load(rows[:, None] + at[None, :], mask=inside, other=0)


@triton.jit
def _converted(bits, src_scale, dst_scale, SRC_KIND: tl.constexpr, DST_KIND: tl.constexpr,
               SRC_SCALE: tl.constexpr, DST_SCALE: tl.constexpr):  # fmt: skip
    """The destination's bits; rows of one dtype whose static scales are equal keep theirs."""
    value = to_float32(from_bits(bits, SRC_KIND), SRC_KIND)
    if SRC_SCALE != "none":
        value = value * src_scale[:, None]
    if DST_SCALE != "none":
        value = tl.div_rn(value, tl.broadcast_to(dst_scale[:, None], value.shape))
    stored = to_bits(from_float32(value, DST_KIND), DST_KIND)
    if SRC_KIND == DST_KIND and SRC_SCALE != "token_head" and DST_SCALE != "token_head":
        stored = tl.where((src_scale == dst_scale)[:, None], bits, stored)
    return stored


# Counts that differ from call to call: no kernels of their own for those that are 1 or even.
_COUNTS = ["num_rows", "num_heads", "src_head", "dst_head", "model_head", "token_position",
           "src_start", "dst_start", "src_num_pages", "dst_num_pages"]  # fmt: skip


@triton.jit(do_not_specialize=_COUNTS)
def relayout_kernel(
    layers,  # int32 [num_layers, 3]: the stored layer of the source and of the destination, model's
    src_rows, dst_rows,  # int64 [stored layer]: addresses of a plane; src_rows is None to digest
    src_scales, dst_scales,  # the same of its scales; any if there are none
    src_pages, dst_pages,  # int32
    digest,  # int64 [1], added to, or None
    errors,
    num_rows, num_heads, dims,
    src_head, dst_head, model_head, token_position, src_start, dst_start,
    src_num_pages, dst_num_pages,  # of the pools
    src_strides, dst_strides,  # of page, slot, head, dim
    src_scale_strides, dst_scale_strides,  # of page, slot, head
    PLANE: tl.constexpr, SRC_ARGUMENT: tl.constexpr, DST_ARGUMENT: tl.constexpr,
    SRC_PAGE_SIZE: tl.constexpr, DST_PAGE_SIZE: tl.constexpr,
    SRC_KIND: tl.constexpr, DST_KIND: tl.constexpr,
    SRC_SCALE: tl.constexpr, DST_SCALE: tl.constexpr, VERBATIM: tl.constexpr,
    SRC_BITS: tl.constexpr, DST_BITS: tl.constexpr, DST_BYTES: tl.constexpr,
    ALIGNMENT: tl.constexpr,  # bytes, of all addresses
    ROWS: tl.constexpr, CHUNK: tl.constexpr,
    WHOLE: tl.constexpr,  # a chunk holds a row
):  # fmt: skip
    """Grid: blocks of ROWS rows (a row is a head of a token), then layers."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    layer = layers + tl.program_id(1) * 3
    token, head = row // num_heads, row % num_heads
    wanted = row < num_rows
    MOVING: tl.constexpr = src_rows is not None

    # --- where the rows are ---------------------------------------------------------------------
    dst_page, dst_slot, wanted = _locate(
        dst_pages, token, wanted, dst_start, dst_num_pages, num_rows, errors, DST_PAGE_SIZE,
        DST_ARGUMENT,
    )  # fmt: skip
    stored = tl.load(layer + 1)
    base = tl.load(dst_rows + stored).to(tl.pointer_type(DST_BITS))
    at = dst_page * dst_strides[0] + dst_slot * dst_strides[1] + (dst_head + head) * dst_strides[2]
    dst = tl.multiple_of(base, ALIGNMENT) + at
    if DST_SCALE != "none":
        at = dst_page * dst_scale_strides[0] + dst_slot * dst_scale_strides[1]
        at += (dst_head + head) * dst_scale_strides[2]
        to_scale = tl.load(dst_scales + stored).to(tl.pointer_type(tl.float32)) + at
    if MOVING:
        src_page, src_slot, wanted = _locate(
            src_pages, token, wanted, src_start, src_num_pages, num_rows, errors, SRC_PAGE_SIZE,
            SRC_ARGUMENT,
        )  # fmt: skip
        stored = tl.load(layer)
        base = tl.load(src_rows + stored).to(tl.pointer_type(SRC_BITS))
        at = src_page * src_strides[0] + src_slot * src_strides[1]
        at += (src_head + head) * src_strides[2]
        src = tl.multiple_of(base, ALIGNMENT) + at
        src_scale = tl.full([ROWS], 1.0, tl.float32)
        if SRC_SCALE != "none":
            at = src_page * src_scale_strides[0] + src_slot * src_scale_strides[1]
            at += (src_head + head) * src_scale_strides[2]
            from_scale = tl.load(src_scales + stored).to(tl.pointer_type(tl.float32))
            src_scale = tl.load(from_scale + at, mask=wanted, other=1.0)

    # --- the rows' own scales -------------------------------------------------------------------
    scale = tl.full([ROWS], 1.0, tl.float32)
    if DST_SCALE == "token_head" and MOVING:
        scale = src_scale
        if not VERBATIM:
            largest = tl.zeros([ROWS], tl.float32)
            for first in range(0, CHUNK if WHOLE else dims, CHUNK):
                bits = _bits(src, first, dims, src_strides[3], wanted, CHUNK)
                value = to_float32(from_bits(bits, SRC_KIND), SRC_KIND)
                if SRC_SCALE != "none":
                    value = value * src_scale[:, None]
                largest = tl.maximum(largest, largest_finite(value))
            scale = row_scales(largest, DST_KIND)
        tl.store(to_scale, scale, mask=wanted)
    elif DST_SCALE != "none":
        scale = tl.load(to_scale, mask=wanted, other=1.0)

    # --- their elements -------------------------------------------------------------------------
    products = tl.zeros([ROWS, 8], tl.uint64)
    words = tl.zeros([ROWS, 8], tl.uint64)
    for first in range(0, CHUNK if WHOLE else dims, CHUNK):
        if MOVING:
            bits = _bits(src, first, dims, src_strides[3], wanted, CHUNK)
            if not VERBATIM:
                bits = _converted(
                    bits, src_scale, scale, SRC_KIND, DST_KIND, SRC_SCALE, DST_SCALE
                )  # fmt: skip
            dim = first + tl.arange(0, CHUNK)
            inside = wanted[:, None] & (dim < dims)[None, :]
            tl.store(dst[:, None] + (dim.to(tl.int64) * dst_strides[3])[None, :], bits, mask=inside)
            bits = tl.where((dim < dims)[None, :], bits, 0)  # a 0 may have become another code
        else:
            bits = _bits(dst, first, dims, dst_strides[3], wanted, CHUNK)
        if digest is not None:
            more_products, more_words = lane_sums(bits, first, dims * DST_BYTES, DST_BYTES)
            products += more_products
            words += more_words
    if digest is not None:
        each = row_digests(
            products, words, tl.load(layer + 2), model_head + head, PLANE, dims * DST_BYTES,
            token_position + token, scale.to(tl.uint32, bitcast=True), DST_SCALE == "token_head",
        )  # fmt: skip
        total = tl.sum(tl.where(wanted, each, 0), 0)
        tl.atomic_add(digest, total.to(tl.int64, bitcast=True))
