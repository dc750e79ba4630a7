"""What results of paged_attention do not depend on, bit for bit; how values are converted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attending import LEVELS, attend, make_plan

import kvlink
from kvlink import _C
from kvlink.testing.cases import AttentionCase, make_attention, starts
from kvlink.testing.tolerances import assert_same_bits

pytestmark = pytest.mark.usefixtures("restored_settings")

# Every kind of work: rows in place, divided at splits or not, in panels, together, over latents.
WORK: dict[str, dict[str, Any]] = {
    "decode": dict(q_lens=(1,) * 5, seq_lens=(40, 300, 7, 511, 130), num_q_heads=6),
    "split_kv": dict(q_lens=(1, 1), seq_lens=(3000, 1400)),
    "prefill": dict(q_lens=(90, 150), seq_lens=(90, 1400), num_q_heads=6),
    "mixed": dict(q_lens=(1, 40, 4), seq_lens=(1100, 500, 40), num_q_heads=10),
    "cascade": dict(q_lens=(1,) * 4, seq_lens=(1100, 1537, 700, 1030), shared=1040),
    "latent": dict(
        q_lens=(1, 2), seq_lens=(1700, 600), num_q_heads=20, num_kv_heads=1, head_dim=96,
        head_dim_v=64, form="latent",
    ),
    "latent_cascade": dict(
        q_lens=(1,) * 3, seq_lens=(1100, 1537, 1030), num_q_heads=20, num_kv_heads=1, head_dim=96,
        head_dim_v=64, form="latent", shared=1040,
    ),
}  # fmt: skip


# --- what never matters -------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("q_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8"])
def test_the_batch_does_not_matter(level: str, q_dtype: str, kv_dtype: str) -> None:
    _C.set_simd_level(level)
    case = AttentionCase(
        q_lens=(1, 7, 30, 1), seq_lens=(1600, 65, 700, 530), q_dtype=q_dtype, kv_dtype=kv_dtype,
        kv_scale="token_head" if kv_dtype == "int8" else "none",
    )  # fmt: skip
    inputs = make_attention(case)
    q, pool, layer, page_table, seq_lens = inputs.args
    out, lse = kvlink.paged_attention(*inputs.args, **inputs.kwargs, return_lse=True)
    indptr = inputs.kwargs["q_indptr"].tolist()
    for order in ([0], [1], [2], [3], [3, 1], [2, 0, 1, 3, 2]):
        rows = torch.cat([torch.arange(indptr[seq], indptr[seq + 1]) for seq in order])
        again, again_lse = kvlink.paged_attention(
            q[rows], pool, layer, page_table[order], seq_lens[order], return_lse=True,
            q_indptr=starts([case.q_lens[seq] for seq in order]),
        )  # fmt: skip
        assert_same_bits(again, out[rows])
        assert_same_bits(again_lse, lse[rows], "lse")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("q_dtype", "kv_dtype"),
    [
        ("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("float32", "float32"),
        ("float32", "float16"), ("bfloat16", "float8_e4m3"), ("bfloat16", "float8_e5m2"),
        ("bfloat16", "int8"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(6, 2, 32, None), (10, 2, 72, 40), (5, 5, 128, None)])
def test_chunks_of_the_new_tokens_do_not_matter(
    level: str, q_dtype: str, kv_dtype: str, shape: tuple[int, int, int, int | None]
) -> None:
    """Few rows read K and V in place, many widen them first: in the same order."""
    _C.set_simd_level(level)
    num_q_heads, num_kv_heads, head_dim, window = shape
    case = AttentionCase(
        q_lens=(60,), seq_lens=(700,), num_q_heads=num_q_heads, num_kv_heads=num_kv_heads,
        head_dim=head_dim, q_dtype=q_dtype, kv_dtype=kv_dtype, window=window,
        kv_scale="token_head" if kv_dtype in ("float8_e4m3", "float8_e5m2", "int8") else "none",
    )  # fmt: skip
    q, pool, layer, page_table, _ = make_attention(case).args
    whole = kvlink.paged_attention(
        q, pool, layer, page_table, [700], q_indptr=[0, 60], window=window
    )
    row = 0
    for size in (1, 2, 5, 20, 32):
        part = kvlink.paged_attention(
            q[row : row + size], pool, layer, page_table, [640 + row + size], q_indptr=[0, size],
            window=window,
        )  # fmt: skip
        assert_same_bits(part, whole[row : row + size])
        row += size


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("q_dtype", "kv_dtype", "kv_scale"),
    [
        ("float32", "float32", "none"), ("float32", "float16", "none"),
        ("bfloat16", "bfloat16", "none"), ("bfloat16", "int8", "token_head"),
        ("bfloat16", "float8_e4m3", "head"), ("float16", "float8_e5m2", "tensor"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("work", list(WORK))
def test_the_number_of_threads_does_not_matter(
    level: str, work: str, q_dtype: str, kv_dtype: str, kv_scale: str
) -> None:
    """Whatever threads compute, and whatever threads the plan was made for."""
    _C.set_simd_level(level)
    dtypes = dict(q_dtype=q_dtype, kv_dtype=kv_dtype, kv_scale=kv_scale)
    inputs = make_attention(AttentionCase(**WORK[work], **dtypes))
    results, plans = [], []
    for threads in (1, 2, 3, 16):
        _C.set_num_threads(threads)
        results.append(attend(inputs))
        plans.append(make_plan(inputs))
    for plan in plans:
        results.append(attend(inputs, plan=plan))
    for out, lse in results[1:]:
        assert_same_bits(out, results[0][0])
        assert_same_bits(lse, results[0][1], "lse")
    assert bool(plans[0].shared_prefixes) == ("shared" in WORK[work])
    if work in ("split_kv", "latent"):
        assert plans[-1].num_tasks > plans[0].num_tasks  # or they all did the same


@pytest.mark.parametrize("q_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "float8_e4m3"])
@pytest.mark.parametrize("num_q_heads", [2, 4])
def test_nan_in_a_later_new_token_stays_there(
    q_dtype: str, kv_dtype: str, num_q_heads: int
) -> None:
    """In place and in panels. Position 71 is the second of a pair."""
    case = AttentionCase(
        q_lens=(16,), seq_lens=(80,), kv_dtype=kv_dtype, q_dtype=q_dtype, page_size=80,
        num_q_heads=num_q_heads,
    )  # fmt: skip
    inputs = make_attention(case)
    clean, _ = kvlink.paged_attention(*inputs.args, **inputs.kwargs, return_lse=True)
    _, pool, layer, page_table, _ = inputs.args
    for plane in (pool.k(layer), pool.v(layer)):
        torch.from_dlpack(plane)[int(page_table[0, 0]), 71] = torch.tensor(float("nan"))
    out, _ = kvlink.paged_attention(*inputs.args, **inputs.kwargs, return_lse=True)
    assert_same_bits(out[:7], clean[:7])
    assert bool(out[7:].isnan().all())


# --- conversions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3", "float8_e5m2", "int8"])
def test_every_stored_code_becomes_its_value(level: str, dtype: str) -> None:
    """A row that sees one position returns that position's V as it is."""
    _C.set_simd_level(level)
    code_bits = 16 if dtype in ("float16", "bfloat16") else 8
    num_seqs, dims = (64, 1024) if code_bits == 16 else (1, 256)
    layout = kvlink.KVLayout.nhd(
        num_kv_heads=1, head_dim=8, head_dim_v=dims, page_size=1, dtype=dtype
    )
    pool = kvlink.KVPool.create(layout, num_layers=1, num_pages=num_seqs)
    v = torch.from_dlpack(pool.v(0))
    codes = torch.arange(2**code_bits).to(torch.int16 if code_bits == 16 else torch.uint8)
    v.view(codes.dtype).copy_(codes.view(v.shape))
    out = kvlink.paged_attention(
        torch.zeros(num_seqs, 1, 8), pool, 0, [[seq] for seq in range(num_seqs)], [1] * num_seqs
    )
    expected = v.view(codes.dtype).view(v.dtype).float().view(out.shape)
    same = (out == expected) | (out.isnan() & expected.isnan())
    assert bool(same.all())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3", "float8_e5m2", "int8"])
@pytest.mark.parametrize("position", [0, 1])
def test_every_code_becomes_its_value_in_bfloat16(level: str, dtype: str, position: int) -> None:
    """With q of bfloat16, two positions may be added at once: here one of them weighs nothing."""
    _C.set_simd_level(level)
    codes = torch.arange(2**16 if dtype == "bfloat16" else 2**8)
    codes = codes.to(torch.int16 if dtype == "bfloat16" else torch.uint8)
    num_seqs = len(codes) // 256
    layout = kvlink.KVLayout.nhd(
        num_kv_heads=1, head_dim=8, head_dim_v=256, page_size=2, dtype=dtype
    )
    pool = kvlink.KVPool.create(layout, num_layers=1, num_pages=num_seqs)
    k, v = torch.from_dlpack(pool.k(0)), torch.from_dlpack(pool.v(0))
    k.view(codes.dtype).fill_(0)
    v.view(codes.dtype).fill_(0)
    v.view(codes.dtype)[:, position, 0] = codes.view(num_seqs, 256)
    out = kvlink.paged_attention(
        torch.zeros(num_seqs, 1, 8, dtype=torch.bfloat16), pool, 0,
        [[seq] for seq in range(num_seqs)], [2] * num_seqs, window=1 if position else None,
        mask=None if position else torch.ones(num_seqs, 1, dtype=torch.uint8),
        mask_starts=None if position else [0] * num_seqs,
    )  # fmt: skip
    expected = v[:, position, 0].to(torch.bfloat16).view(out.shape)
    tiny = expected.abs() < torch.finfo(torch.bfloat16).tiny  # products of these may be 0
    same = (out == expected) | (out.isnan() & expected.isnan()) | (tiny & (out == 0))
    assert bool(same.all())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_results_are_rounded_to_nearest_even(level: str, dtype: torch.dtype) -> None:
    _C.set_simd_level(level)
    layout = kvlink.KVLayout.nhd(
        num_kv_heads=1, head_dim=8, head_dim_v=1000, page_size=1, dtype="float32"
    )
    pool = kvlink.KVPool.create(layout, num_layers=1, num_pages=20)
    v = torch.from_dlpack(pool.v(0))
    generator = torch.Generator().manual_seed(5)
    v.copy_(torch.randn(v.shape, generator=generator) * 10 ** torch.linspace(-9, 5, 1000))
    ties = torch.arange(1000).float() * (1 + 1 / 256 if dtype == torch.bfloat16 else 1 + 1 / 2048)
    v[0, 0, 0] = ties
    q = torch.zeros(20, 1, 8, dtype=dtype)
    out = kvlink.paged_attention(q, pool, 0, [[page] for page in range(20)], [1] * 20)
    assert torch.equal(out, v.view(out.shape).to(dtype))
