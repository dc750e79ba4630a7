"""Attention over a range of positions of one sequence, tile by tile: the inside of every kernel.

Scores are in base 2: they carry a factor of log2(e), and so do alibi slopes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvlink.triton.values import dot, to_operand

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
UNSEEN = tl.constexpr(float("-inf"))
NO_POSITION = tl.constexpr(2**31 - 1)


@triton.jit
def attend(
    acc,  # float32 [M, DIMS_V]
    largest,  # float32 [M]: of the scores so far
    total,  # float32 [M]: of exp2(score - largest)
    bad_position,  # int32 [N]: first position on an entry outside the pool, NO_POSITION if none
    q_main,  # [M, MAIN]
    q_rest,  # [M, REST]; any if REST is 0
    q_position,  # int32 [M]
    slopes,  # float32 [M]; any without HAS_ALIBI
    begin,  # a multiple of N
    end,
    seen_from,  # first position that is read, with HAS_WINDOW: it may lie inside a tile
    table,  # the sequence's page ids
    expected,  # and their generations, or None
    generations,  # [num_pages] or None
    num_entries,
    num_pages,
    mask,  # bits, or None
    at_mask,  # int64 [M]: where the rows' bits begin
    mask_start,  # the position that bit 0 stands for
    mask_bytes,
    k,  # of one head: [page, slot, dim]
    v,
    k_scale,  # of one head: [page, slot]; read if PER_TOKEN
    v_scale,
    k_strides,  # of page, slot, head, dim
    v_strides,
    k_scale_strides,  # of page, slot, head
    v_scale_strides,
    score_scale,
    softcap,
    window,
    MASKED: tl.constexpr,  # False: every row sees every position of the range
    APART: tl.constexpr,  # with MASKED: a row may see what another does not
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    KIND: tl.constexpr,
    OPERAND: tl.constexpr,
    OPERAND_V: tl.constexpr,
    ROUNDED: tl.constexpr,  # weights, to OPERAND_V; else they are two numbers of it
    NATIVE_FP8: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    DIMS_V: tl.constexpr,
    V_IS_MAIN: tl.constexpr,
    N: tl.constexpr,
):
    """(acc, largest, total, bad_position) with positions [begin, end) added, in order."""
    main = tl.arange(0, MAIN)
    dim_v = tl.arange(0, DIMS_V)
    for first in range(begin, end, N):
        # --- which rows of the pages -----------------------------------------------------------
        position = first + tl.arange(0, N)
        within = position < end
        if HAS_WINDOW:
            within = within & (position >= seen_from)
        entry = position // PAGE_SIZE
        slot = position % PAGE_SIZE
        page = tl.load(table + entry, mask=within & (entry < num_entries), other=-1)
        mapped = (page >= 0) & (page < num_pages)
        if generations is not None:
            now = tl.load(generations + page, mask=within & mapped, other=0)
            mapped = mapped & (now == tl.load(expected + entry, mask=within & mapped, other=0))
        bad = within & (mapped == 0)
        bad_position = tl.minimum(bad_position, tl.where(bad, position, NO_POSITION))
        readable = within & mapped
        if mask is not None and MASKED:
            # --- the bits, of one row for all if they are query heads of one token ---------------
            bit = tl.maximum(position - mask_start, 0)
            read = within & (position >= mask_start) & (bit // 8 < mask_bytes)
            beyond = tl.where(position >= mask_start, 0, 255)
            if APART:
                at = at_mask[:, None] + (bit // 8)[None, :]
                byte = tl.load(mask + at, mask=read[None, :], other=0).to(tl.int32)
                shown = (((byte | beyond[None, :]) >> (bit % 8)[None, :]) & 1) != 0
            else:
                byte = tl.load(mask + tl.max(at_mask, 0) + bit // 8, mask=read, other=0)
                shown = (((byte.to(tl.int32) | beyond) >> (bit % 8)) & 1) != 0
                within = within & shown
                readable = readable & shown
        page = page.to(tl.int64)

        # --- scores ----------------------------------------------------------------------------
        k_row = k + page * k_strides[0] + slot * k_strides[1]
        inside = readable[:, None]
        if MAIN > HEAD_DIM:
            inside = inside & (main < HEAD_DIM)[None, :]
        k_main = tl.load(k_row[:, None] + main[None, :] * k_strides[3], mask=inside, other=0)
        k_main = to_operand(k_main, KIND, OPERAND, NATIVE_FP8)
        scores = tl.zeros([q_main.shape[0], N], tl.float32)
        scores = dot(q_main, tl.trans(k_main), scores)
        if REST > 0:
            rest = MAIN + tl.arange(0, REST)
            inside = readable[:, None]
            if MAIN + REST > HEAD_DIM:
                inside = inside & (rest < HEAD_DIM)[None, :]
            k_rest = tl.load(k_row[:, None] + rest[None, :] * k_strides[3], mask=inside, other=0)
            k_rest = to_operand(k_rest, KIND, OPERAND, NATIVE_FP8)
            scores = dot(q_rest, tl.trans(k_rest), scores)
        scores *= score_scale
        if PER_TOKEN:
            at = page * k_scale_strides[0] + slot * k_scale_strides[1]
            scores *= tl.load(k_scale + at, mask=readable, other=0.0)[None, :]
        if HAS_SOFTCAP:
            # tanh(x) = 1 - 2 / (exp(2 x) + 1)
            power = tl.exp2(scores * (2 * LOG2_E) / softcap)
            scores = softcap * LOG2_E * (1 - 2 / (power + 1))
        if HAS_ALIBI:
            scores += slopes[:, None] * (position[None, :] - q_position[:, None]).to(tl.float32)
        if MASKED:
            visible = within[None, :]
            if CAUSAL:
                visible = visible & (position[None, :] <= q_position[:, None])
            if HAS_WINDOW:
                visible = visible & (position[None, :] > q_position[:, None] - window)
            if mask is not None and APART:
                visible = visible & shown
            visible = tl.broadcast_to(visible, scores.shape)
            scores = tl.where(visible, scores, UNSEEN)

        # --- softmax so far --------------------------------------------------------------------
        now_largest = tl.maximum(largest, tl.max(scores, 1))
        shift = tl.where(now_largest == UNSEEN, 0.0, now_largest)
        shrink = tl.exp2(largest - shift)
        weights = tl.exp2(scores - shift[:, None])
        total = total * shrink + tl.sum(weights, 1)
        largest = now_largest

        # --- values ----------------------------------------------------------------------------
        if V_IS_MAIN:
            values = k_main.to(OPERAND_V)
        else:
            v_row = v + page * v_strides[0] + slot * v_strides[1]
            inside = readable[:, None]
            if DIMS_V > HEAD_DIM_V:
                inside = inside & (dim_v < HEAD_DIM_V)[None, :]
            values = tl.load(v_row[:, None] + dim_v[None, :] * v_strides[3], mask=inside, other=0)
            values = to_operand(values, KIND, OPERAND_V, NATIVE_FP8)
        if PER_TOKEN:
            at = page * v_scale_strides[0] + slot * v_scale_strides[1]
            weights *= tl.load(v_scale + at, mask=readable, other=0.0)[None, :]
            if MASKED:
                weights = tl.where(visible, weights, 0.0)
        acc *= shrink[:, None]
        if MASKED and APART and KIND != "int8":
            # A product has every row times every value, and 0 times NaN is NaN: so values that are
            # no numbers stay out, and rows that see one are NaN.
            magnitude = tl.abs(values.to(tl.float32))
            wrong = tl.max((magnitude < -UNSEEN).to(tl.int32) ^ 1, 1)
            values = tl.where((wrong != 0)[:, None], 0.0, values.to(tl.float32)).to(OPERAND_V)
            met = tl.max(tl.where(visible, wrong[None, :], 0), 1)
            acc = tl.where((met != 0)[:, None], float("nan"), acc)
        if tl.float32 == OPERAND_V:
            acc = dot(weights, values, acc)
        else:
            high = weights.to(OPERAND_V)
            acc = dot(high, values, acc)
            if not ROUNDED:
                acc = dot((weights - high.to(tl.float32)).to(OPERAND_V), values, acc)
    return acc, largest, total, bad_position


@triton.jit
def find_sequence(unit, indptr, num_seqs, FACTOR: tl.constexpr, DIVISOR: tl.constexpr):
    """The sequence that a unit of work belongs to, when sequence b's units begin at
    indptr[b] * FACTOR // DIVISOR + b: at least as many as it fills, whatever the others do.
    """
    low = tl.full((), 0, tl.int32)
    high = low + num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(indptr + middle) * FACTOR // DIVISOR + middle <= unit:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def add_sink(out, lse, sink):
    """out [M, D] and base-2 lse [M] with one more logit without a value, sink [M] (natural).

    Rows that see nothing stay as they are.
    """
    sink = tl.where(lse == UNSEEN, UNSEEN, sink * LOG2_E)
    largest = tl.maximum(lse, sink)
    shift = tl.where(largest == UNSEEN, 0.0, largest)
    with_sink = shift + tl.log2(tl.exp2(lse - shift) + tl.exp2(sink - shift))
    weight = tl.where(lse == UNSEEN, 0.0, tl.exp2(lse - with_sink))
    return out * weight[:, None], with_sink
