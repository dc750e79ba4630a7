"""Paged attention beside torch's scaled_dot_product_attention on the same numbers.

    python benchmarks/bench_attention.py [--device cpu|cuda] [--case NAME ...] [--dtype NAME ...]
                                         [--json]

The peer gets K and V gathered out of the pages and, on the CPU, repeated for its query heads, both
outside the timing. A device runs the cases that are meant for it, of those named.
Bytes counted: K and V once per sequence, q and out once. Operations: 4 * head_dim per visible pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import harness
import torch

import kvlink
from kvlink import KVLayout, KVPool
from kvlink.reference.append_kv import TORCH_DTYPES
from kvlink.reference.gather import gather


@dataclass(frozen=True)
class Case:
    """`num_seqs` sequences of `seq_len` tokens, of which the last `q_len` are new."""

    num_seqs: int
    q_len: int
    seq_len: int
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16

    def num_pairs(self) -> int:
        """Visible (query row, position) pairs, over all query heads."""
        hidden = self.q_len * (self.q_len - 1) // 2
        return self.num_seqs * self.num_q_heads * (self.q_len * self.seq_len - hidden)


CASES = {
    "decode_8x4k": Case(8, 1, 4096),
    "decode_1x32k": Case(1, 1, 32768),
    "decode_32x512": Case(32, 1, 512),
    "decode_mha_8x1k": Case(8, 1, 1024, num_kv_heads=32),
    "prefill_1x2k": Case(1, 2048, 2048),
    "prefill_8x256": Case(8, 256, 256),
    "extend_1x256of8k": Case(1, 256, 8192),
}
CUDA_CASES = {
    "decode_1x32k_cuda": Case(1, 1, 32768),
    "decode_8x4k_cuda": Case(8, 1, 4096),
    "decode_16x4k_cuda": Case(16, 1, 4096),
    "decode_8x16k_cuda": Case(8, 1, 16384),
    "decode_8x32k_cuda": Case(8, 1, 32768),
    "decode_mha_16x4k_cuda": Case(16, 1, 4096, num_kv_heads=32, page_size=8),
    "prefill_1x2k_cuda": Case(1, 2048, 2048),
    "prefill_1x8k_cuda": Case(1, 8192, 8192),
}
DTYPES = ("bfloat16", "float32", "float16", "float8_e4m3", "float8_e5m2", "int8")


def main() -> None:
    """Runs the cases named on the command line."""
    options = harness.arguments(
        "paged attention", [*CASES, *CUDA_CASES], DTYPES, devices=("cpu", "cuda")
    )
    cases = CUDA_CASES if options.device == "cuda" else CASES
    torch.set_num_threads(kvlink._C.num_threads())
    harness.report(
        (
            figure
            for dtype in options.dtype
            for name in options.case
            if name in cases
            for figure in run_case(name, cases[name], dtype, options.seconds, options.device)
        ),
        options.json,
        options.device,
    )


def run_case(
    name: str, case: Case, dtype: str, seconds: float, device: str
) -> Iterator[harness.Figure]:
    """kvlink's figure, then the peer's."""
    quantised = dtype in ("float8_e4m3", "float8_e5m2", "int8")
    layout = KVLayout.nhd(
        num_kv_heads=case.num_kv_heads, head_dim=case.head_dim, page_size=case.page_size,
        dtype=dtype, scale="head" if quantised else "none",
    )  # fmt: skip
    pages_each = -(-case.seq_len // case.page_size)
    num_pages = case.num_seqs * pages_each
    if device == "cpu":
        pool = KVPool.create(layout, num_layers=1, num_pages=num_pages)
    else:
        shape = (2, num_pages, case.page_size, case.num_kv_heads, case.head_dim)
        memory = torch.empty(shape, dtype=TORCH_DTYPES[dtype], device=device)
        pool = KVPool.wrap([memory], "kv page slot head dim")
    fill(pool)
    generator = torch.Generator().manual_seed(1)
    pages = torch.randperm(pool.num_pages, generator=generator).int().view(case.num_seqs, -1)
    q_dtype = torch.float32 if dtype == "float32" else torch.bfloat16
    q_shape = (case.num_seqs * case.q_len, case.num_q_heads, case.head_dim)
    q = torch.randn(q_shape, generator=generator).to(q_dtype)
    seq_lens = torch.full((case.num_seqs,), case.seq_len, dtype=torch.int32)
    q_indptr = None
    if device == "cpu" or case.q_len > 1:
        q_indptr = torch.arange(0, q_shape[0] + 1, case.q_len, dtype=torch.int32).to(device)
    q, pages, seq_lens = q.to(device), pages.to(device), seq_lens.to(device)
    out = torch.empty_like(q)

    def ours() -> object:
        return kvlink.paged_attention(q, pool, 0, pages, seq_lens, q_indptr=q_indptr, out=out)

    kv_rows = case.num_seqs * case.seq_len
    needs = {
        "read": float(kv_rows * layout.token_bytes() + 2 * q.nbytes),
        "fma": float(4 * case.head_dim * case.num_pairs()),
    }
    for peer, work in (("kvlink", ours), ("torch_sdpa", torch_sdpa(case, pool, pages, q))):
        taken = harness.measure(work, seconds, device=device)
        yield harness.figure(
            "paged_attention", name, device, dtype, case.page_size, taken, needs, peer, device
        )


def fill(pool: KVPool) -> None:
    """Random values in every slot."""
    for plane in (pool.k(0), pool.v(0)):
        tensor = torch.from_dlpack(plane)
        generator = torch.Generator(tensor.device).manual_seed(0)
        values = torch.randn(tensor.shape, generator=generator, device=tensor.device)
        tensor.copy_(values * 16 if tensor.dtype == torch.int8 else values)


def torch_sdpa(
    case: Case, pool: KVPool, pages: torch.Tensor, q: torch.Tensor
) -> Callable[[], object]:
    """The peer: dense K and V [B, Hq, S, D] in q's dtype, the mask that causality needs."""
    on_cpu = q.device.type == "cpu"
    group = case.num_q_heads // case.num_kv_heads if on_cpu else 1
    dense = []
    for which in (0, 1):
        rows = [gather(pool, 0, page_row, 0, case.seq_len)[which] for page_row in pages.cpu()]
        stacked = torch.stack(rows).transpose(1, 2).to(q.dtype)
        dense.append(stacked.repeat_interleave(group, dim=1).contiguous())
    queries = q.view(case.num_seqs, case.q_len, case.num_q_heads, case.head_dim)
    queries = queries.transpose(1, 2).contiguous()
    whole = case.q_len == case.seq_len
    mask = None
    if case.q_len > 1 and not whole:
        ones = torch.ones(case.q_len, case.seq_len, dtype=torch.bool)
        mask = ones.tril(case.seq_len - case.q_len)
    return lambda: torch.nn.functional.scaled_dot_product_attention(
        queries, *dense, attn_mask=mask, is_causal=whole, enable_gqa=not on_cpu
    )


if __name__ == "__main__":
    main()
