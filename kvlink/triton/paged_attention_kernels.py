"""The kernels of paged_attention: sequences in one go, or in splits that are joined."""

from __future__ import annotations

import triton
import triton.language as tl

from kvlink.triton.attention_tile import (
    LN_2,
    LOG2_E,
    NO_POSITION,
    UNSEEN,
    add_sink,
    attend,
    find_sequence,
)
from kvlink.triton.error_record import PAGE_TABLE, record_error
from kvlink.triton.values import from_float32

# Counts that differ from call to call: no kernels of their own for those that are 1 or even.
_COUNTS = ["table_stride", "expected_stride", "mask_stride", "mask_bytes", "num_entries",
           "num_pages", "num_seqs", "num_tokens", "num_splits", "window"]  # fmt: skip


@triton.jit(do_not_specialize=_COUNTS)
def attention_kernel(
    q,  # [num_tokens, num_q_heads, head_dim]
    out,  # [num_tokens, num_q_heads, head_dim_v]; in splits: float32 [state, ...]
    lse,  # [num_tokens, num_q_heads] or None; in splits: base 2, [state, num_q_heads]
    q_indptr,  # [num_seqs + 1], or None: one row per sequence
    seq_lens,  # [num_seqs]
    page_table,  # [num_seqs, num_entries]; with page_indptr [num_entries]
    page_indptr,  # [num_seqs + 1] or None
    k, v,  # [page, slot, head, dim]
    k_scale, v_scale,  # [page, slot, head] or None
    sinks, alibi_slopes,  # [num_q_heads] or None
    q_positions,  # [num_tokens], or None: the last ones of the sequence
    mask,  # uint8 [num_tokens, mask_bytes] or None
    mask_starts,  # [num_seqs], or None: the first new token
    generations,  # [num_pages] or None
    expected_generations,  # as page_table, or None
    errors,
    q_strides, out_strides,  # of token (state) and head
    k_strides, v_strides, k_scale_strides, v_scale_strides,
    table_stride, expected_stride, mask_stride, mask_bytes,
    num_entries, num_pages, num_seqs, num_tokens, num_splits, scale, softcap, window,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    PER_TOKEN: tl.constexpr, KIND: tl.constexpr, OUT_KIND: tl.constexpr,
    OPERAND: tl.constexpr, OPERAND_V: tl.constexpr, ROUNDED: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    PAGE_SIZE: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    MAIN: tl.constexpr, REST: tl.constexpr, DIMS_V: tl.constexpr, V_IS_MAIN: tl.constexpr,
    SPLIT: tl.constexpr, IN_SPLITS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Grid: units of work, then KV heads.

    A unit is M rows (a row is a query head of a token) of one sequence and, without q_indptr, SPLIT
    positions of it. With IN_SPLITS what is stored are states that `join_splits_kernel` joins.
    """
    unit = tl.program_id(0)
    kv_head = tl.program_id(1)

    # --- the sequence, and which of its rows and positions --------------------------------------
    if q_indptr is None:
        BLOCKS: tl.constexpr = (GROUP + M - 1) // M
        state = unit // BLOCKS
        first_row = (unit % BLOCKS) * M
        if page_indptr is None:
            seq = state // num_splits
            split = state % num_splits
        else:
            seq = find_sequence(state, page_indptr, num_seqs, PAGE_SIZE, SPLIT)
            split = state - (tl.load(page_indptr + seq) * PAGE_SIZE // SPLIT + seq)
        first_token = seq
        num_rows = 1
    else:
        seq = find_sequence(unit, q_indptr, num_seqs, GROUP, M)
        first_token = tl.load(q_indptr + seq)
        num_rows = tl.minimum(tl.load(q_indptr + seq + 1), num_tokens) - first_token
        first_row = (unit - (first_token * GROUP // M + seq)) * M
        state = unit
        split = 0
    if first_row >= num_rows * GROUP:
        return
    seq_len = tl.load(seq_lens + seq)
    first_position = seq_len - num_rows
    expected = expected_generations
    if page_indptr is None:
        table = page_table + seq.to(tl.int64) * table_stride
        if expected_generations is not None:
            expected = expected_generations + seq.to(tl.int64) * expected_stride
    else:
        entries_begin = tl.load(page_indptr + seq)
        table = page_table + entries_begin
        if expected_generations is not None:
            expected = expected_generations + entries_begin
        num_entries = tl.load(page_indptr + seq + 1) - entries_begin
    seq_end = tl.minimum(seq_len, num_entries * PAGE_SIZE)

    row = first_row + tl.arange(0, M)
    row_exists = row < num_rows * GROUP
    token = row // GROUP
    last_token = tl.minimum((first_row + M - 1) // GROUP, num_rows - 1)
    if q_positions is None:
        q_position = tl.minimum(first_position + token, seq_len - 1)
        low = first_position + first_row // GROUP  # the first and the last query's position
        high = tl.minimum(first_position + last_token, seq_len - 1)
    else:
        own = q_positions + first_token
        q_position = tl.load(own + tl.minimum(token, last_token))
        low = tl.load(own + first_row // GROUP)
        high = tl.minimum(tl.load(own + last_token), seq_len - 1)
    begin = tl.full((), 0, tl.int32)
    wanted_end = seq_len
    if CAUSAL:
        wanted_end = tl.minimum(seq_len, high + 1)
    end = tl.minimum(seq_end, wanted_end)
    if HAS_WINDOW:
        begin = tl.maximum(begin, low - window + 1)
    if q_indptr is None:
        end = tl.minimum(end, split * SPLIT + SPLIT)
        begin = tl.maximum(begin, split * SPLIT)
    if IN_SPLITS and begin >= end:
        return  # nobody reads this state
    seen_from = begin
    begin = begin // N * N

    # --- what all tiles share -------------------------------------------------------------------
    head = kv_head * GROUP + row % GROUP
    kv_head = kv_head.to(tl.int64)  # heads may lie as far apart as a pool is large
    main = tl.arange(0, MAIN)
    inside = row_exists[:, None] & (main < HEAD_DIM)[None, :]
    at_q = (first_token + token).to(tl.int64) * q_strides[0] + head * q_strides[1]
    q_main = tl.load(q + at_q[:, None] + main[None, :], mask=inside, other=0.0).to(OPERAND)
    if REST > 0:
        rest = MAIN + tl.arange(0, REST)
        inside = row_exists[:, None] & (rest < HEAD_DIM)[None, :]
        q_rest = tl.load(q + at_q[:, None] + rest[None, :], mask=inside, other=0.0).to(OPERAND)
    else:
        q_rest = q_main
    if alibi_slopes is not None:
        slopes = tl.load(alibi_slopes + head, mask=row_exists, other=0.0) * LOG2_E
    else:
        slopes = tl.zeros([M], tl.float32)
    score_scale = scale
    out_scale = 1.0
    if k_scale is not None:
        if PER_TOKEN:
            k_scale += kv_head * k_scale_strides[2]
            v_scale += kv_head * v_scale_strides[2]
        else:
            score_scale = scale * tl.load(k_scale + kv_head * k_scale_strides[2])
            out_scale = tl.load(v_scale + kv_head * v_scale_strides[2])
    if not HAS_SOFTCAP:
        score_scale = score_scale * LOG2_E

    mask_start = first_position
    at_mask = tl.zeros([M], tl.int64)
    if mask is not None:
        at_mask = (first_token + tl.minimum(token, last_token)).to(tl.int64) * mask_stride
        if mask_starts is not None:
            mask_start = tl.load(mask_starts + seq)
    APART: tl.constexpr = q_indptr is not None

    acc = tl.zeros([M, DIMS_V], tl.float32)
    largest = tl.full([M], UNSEEN, tl.float32)
    total = tl.zeros([M], tl.float32)
    bad_position = tl.full([N], NO_POSITION, tl.int32)

    # --- tiles that every row sees whole, then the rest ------------------------------------------
    whole_end = begin
    if q_indptr is not None and not HAS_WINDOW:
        whole_end = end // N * N
        if CAUSAL:
            whole_end = tl.maximum(begin, tl.minimum(whole_end, (low + 1) // N * N))
        if mask is not None:
            whole_end = tl.maximum(begin, tl.minimum(whole_end, mask_start // N * N))
        acc, largest, total, bad_position = attend(
            acc, largest, total, bad_position, q_main, q_rest, q_position, slopes,
            begin, whole_end, seen_from, table, expected, generations, num_entries, num_pages,
            mask, at_mask, mask_start, mask_bytes,
            k + kv_head * k_strides[2], v + kv_head * v_strides[2], k_scale, v_scale,
            k_strides, v_strides, k_scale_strides, v_scale_strides, score_scale, softcap, window,
            False, APART, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, alibi_slopes is not None, PER_TOKEN,
            KIND, OPERAND, OPERAND_V, ROUNDED, NATIVE_FP8, PAGE_SIZE, HEAD_DIM, HEAD_DIM_V, MAIN,
            REST, DIMS_V, V_IS_MAIN, N,
        )  # fmt: skip
    acc, largest, total, bad_position = attend(
        acc, largest, total, bad_position, q_main, q_rest, q_position, slopes,
        whole_end, end, seen_from, table, expected, generations, num_entries, num_pages,
        mask, at_mask, mask_start, mask_bytes,
        k + kv_head * k_strides[2], v + kv_head * v_strides[2], k_scale, v_scale,
        k_strides, v_strides, k_scale_strides, v_scale_strides, score_scale, softcap, window,
        True, APART, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, alibi_slopes is not None, PER_TOKEN, KIND,
        OPERAND, OPERAND_V, ROUNDED, NATIVE_FP8, PAGE_SIZE, HEAD_DIM, HEAD_DIM_V, MAIN, REST,
        DIMS_V, V_IS_MAIN, N,
    )  # fmt: skip

    # --- results ---------------------------------------------------------------------------------
    bad = tl.min(bad_position, 0)
    if (bad != NO_POSITION) | (wanted_end > seq_end):
        entry = tl.minimum(bad // PAGE_SIZE, num_entries)
        found = tl.load(table + entry, mask=entry < num_entries, other=-1)
        record_error(errors, PAGE_TABLE, seq, entry, found)
    divisor = tl.where(total == 0.0, 1.0, total)
    result = acc * (out_scale / divisor)[:, None]
    lse2 = tl.where(total == 0.0, UNSEEN, largest + tl.log2(total))
    dim_v = tl.arange(0, DIMS_V)
    inside = row_exists[:, None] & (dim_v < HEAD_DIM_V)[None, :]
    NUM_Q_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP
    if IN_SPLITS:
        at = state.to(tl.int64) * NUM_Q_HEADS + head
        tl.store(out + at[:, None] * HEAD_DIM_V + dim_v[None, :], result, mask=inside)
        tl.store(lse + at, lse2, mask=row_exists)
    else:
        if sinks is not None:
            sink = tl.load(sinks + head, mask=row_exists, other=0.0)
            result, lse2 = add_sink(result, lse2, sink)
        out_row = (first_token + token).to(tl.int64)
        at = out_row * out_strides[0] + head * out_strides[1]
        tl.store(out + at[:, None] + dim_v[None, :], from_float32(result, OUT_KIND), mask=inside)
        if lse is not None:
            tl.store(lse + out_row * NUM_Q_HEADS + head, lse2 * LN_2, mask=row_exists)


@triton.jit(do_not_specialize=["num_entries", "num_splits", "window"])
def join_splits_kernel(
    states,  # float32 [state, num_q_heads, head_dim_v]
    state_lses,  # float32 [state, num_q_heads], base 2
    out,  # [num_seqs, num_q_heads, head_dim_v]
    lse,  # [num_seqs, num_q_heads] or None
    seq_lens,  # [num_seqs]
    page_indptr,  # [num_seqs + 1] or None
    sinks,  # [num_q_heads] or None
    q_positions,  # [num_seqs] or None
    out_strides,  # of token and head
    num_entries, num_splits, window,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, OUT_KIND: tl.constexpr,
    NUM_Q_HEADS: tl.constexpr, HEAD_DIM_V: tl.constexpr, DIMS_V: tl.constexpr,
    PAGE_SIZE: tl.constexpr, SPLIT: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """Grid: sequences, query heads. Joined in blocks of STATES, counted from position 0."""
    seq = tl.program_id(0)
    head = tl.program_id(1)
    seq_len = tl.load(seq_lens + seq)
    if page_indptr is None:
        first_state = seq * num_splits
    else:
        entries_begin = tl.load(page_indptr + seq)
        num_entries = tl.load(page_indptr + seq + 1) - entries_begin
        first_state = entries_begin * PAGE_SIZE // SPLIT + seq
    position = seq_len - 1
    if q_positions is not None:
        position = tl.load(q_positions + seq)
    end = tl.minimum(seq_len, num_entries * PAGE_SIZE)
    if CAUSAL:
        end = tl.minimum(end, position + 1)
    begin = tl.full((), 0, tl.int32)
    if HAS_WINDOW:
        begin = tl.maximum(begin, position - window + 1)

    dim_v = tl.arange(0, DIMS_V)
    acc = tl.zeros([DIMS_V], tl.float32)
    largest = tl.full((), UNSEEN, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for first in range(begin // (SPLIT * STATES) * STATES, (end + SPLIT - 1) // SPLIT, STATES):
        split = first + tl.arange(0, STATES)
        written = (split * SPLIT < end) & ((split + 1) * SPLIT > begin)
        at = (first_state + split).to(tl.int64) * NUM_Q_HEADS + head
        part = tl.load(state_lses + at, mask=written, other=UNSEEN)
        now_largest = tl.maximum(largest, tl.max(part, 0))
        shift = tl.where(now_largest == UNSEEN, 0.0, now_largest)
        shrink = tl.exp2(largest - shift)
        weight = tl.exp2(part - shift)
        inside = written[:, None] & (dim_v < HEAD_DIM_V)[None, :]
        state = tl.load(states + at[:, None] * HEAD_DIM_V + dim_v[None, :], mask=inside, other=0.0)
        acc = acc * shrink + tl.sum(weight[:, None] * state, 0)
        total = total * shrink + tl.sum(weight, 0)
        largest = now_largest
    result = (acc / tl.where(total == 0.0, 1.0, total))[None, :]
    lse2 = tl.where(total == 0.0, UNSEEN, largest + tl.log2(total)) + tl.zeros([1], tl.float32)
    if sinks is not None:
        result, lse2 = add_sink(result, lse2, tl.load(sinks + head + tl.zeros([1], tl.int32)))
    at = seq.to(tl.int64) * out_strides[0] + head * out_strides[1]
    inside = (dim_v < HEAD_DIM_V)[None, :]
    tl.store(out + at + dim_v[None, :], from_float32(result, OUT_KIND), mask=inside)
    if lse is not None:
        at = seq * NUM_Q_HEADS + head + tl.zeros([1], tl.int32)
        tl.store(lse + at, lse2 * LN_2)
