"""append_kv, relayout_pages and digest_pages beside the machine's copy bandwidth.

    python benchmarks/bench_cache_ops.py [--case NAME ...] [--json]

Bytes counted: the larger of what is read and what is written (the smaller one overlaps with it),
against the copy limit; for a digest alone, what is read, against the read limit. `memcpy` copies
the same bytes in one call on one thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import harness
import numpy as np
import torch

from kvlink import KVLayout, KVPool, append_kv, digest_pages, relayout_pages

NUM_TOKENS = 8192
NUM_LAYERS = 4
NUM_KV_HEADS = 8
HEAD_DIM = 128


@dataclass(frozen=True)
class Case:
    """Moves a request from `src` to `dst`: (order, page size, dtype, scale)."""

    src: tuple[str, int, str, str] = ("nhd", 16, "bfloat16", "none")
    dst: tuple[str, int, str, str] = ("nhd", 16, "bfloat16", "none")
    op: str = "relayout_pages"
    options: dict[str, Any] = field(default_factory=dict)


DIGEST = {"digest": True}
CASES = {
    "append": Case(op="append_kv"),
    "append_fp32": Case(src=("nhd", 16, "float32", "none"), op="append_kv"),
    "same": Case(),
    "same_digest": Case(options=DIGEST),
    "nhd16_hnd64": Case(dst=("hnd", 64, "bfloat16", "none")),
    "nhd16_hnd64_digest": Case(dst=("hnd", 64, "bfloat16", "none"), options=DIGEST),
    "to_fp8_tensor": Case(dst=("nhd", 16, "float8_e4m3", "tensor")),
    "to_fp8_token": Case(dst=("nhd", 16, "float8_e4m3", "token_head")),
    "to_int8_token": Case(dst=("nhd", 16, "int8", "token_head")),
    "from_fp8_token": Case(src=("nhd", 16, "float8_e4m3", "token_head")),
    "digest": Case(op="digest_pages"),
}


def main() -> None:
    """Runs the cases named on the command line."""
    options = harness.arguments("the cache operators", list(CASES), ("bfloat16",))
    harness.report((f for name in options.case for f in run(name, options.seconds)), options.json)


def make_pool(order: str, page_size: int, dtype: str, scale: str) -> KVPool:
    make = KVLayout.nhd if order == "nhd" else KVLayout.hnd
    layout = make(num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM, page_size=page_size, dtype=dtype,
                  scale=scale)  # fmt: skip
    return KVPool.create(layout, num_layers=NUM_LAYERS, num_pages=NUM_TOKENS // page_size)


def run(name: str, seconds: float) -> Iterator[harness.Figure]:
    """One case, and memcpy of as many bytes where the case only copies."""
    case = CASES[name]
    dst = make_pool(*case.dst)
    random = np.random.default_rng(0)
    dst_pages = random.permutation(dst.num_pages).astype(np.int32)
    written = NUM_TOKENS * dst.layout.token_bytes() * NUM_LAYERS
    limit, num_bytes = "copy", written
    if case.op == "append_kv":
        rows = torch.randn(NUM_TOKENS, NUM_KV_HEADS, HEAD_DIM)
        rows = rows.to(getattr(torch, case.src[2]))
        slots = torch.arange(NUM_TOKENS)
        num_bytes = max(written, NUM_LAYERS * 2 * rows.nbytes)

        def append() -> None:
            for layer in range(NUM_LAYERS):
                append_kv(rows, rows, dst, layer, slots)

        elapsed = harness.measure(append, seconds)
    elif case.op == "digest_pages":
        limit = "read"
        elapsed = harness.measure(
            lambda: digest_pages(dst, dst_pages, num_tokens=NUM_TOKENS), seconds
        )
    else:
        src = make_pool(*case.src)
        fill(src)
        src_pages = random.permutation(src.num_pages).astype(np.int32)
        num_bytes = max(written, NUM_TOKENS * src.layout.token_bytes() * NUM_LAYERS)
        elapsed = harness.measure(
            lambda: relayout_pages(
                src, src_pages, dst, dst_pages, num_tokens=NUM_TOKENS, **case.options
            ),
            seconds,
        )
    dtype, page_size = case.dst[2], case.dst[1]
    needs = {limit: float(num_bytes)}
    yield harness.figure(case.op, name, "cpu", dtype, page_size, elapsed, needs)
    if name in ("append", "same"):
        a, b = (np.ones(num_bytes, np.uint8) for _ in range(2))
        copied = harness.measure(lambda: np.copyto(a, b), seconds)
        yield harness.figure(case.op, name, "cpu", dtype, page_size, copied, needs, "memcpy")


def fill(pool: KVPool) -> None:
    rows = torch.randn(NUM_TOKENS, NUM_KV_HEADS, HEAD_DIM)
    for layer in range(pool.num_layers):
        append_kv(rows, rows, pool, layer, torch.arange(NUM_TOKENS))


if __name__ == "__main__":
    main()
