"""append_kv, relayout_pages and digest_pages beside the machine's copy bandwidth.

    python benchmarks/bench_cache_ops.py [--device cpu|cuda] [--case NAME ...] [--json]

Bytes counted: the larger of what is read and what is written (the smaller one overlaps with it),
against the copy limit; for a digest alone, what is read, against the read limit. `torch_copy`
copies the same bytes from one tensor to another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import harness
import torch

from kvlink import KVPool, append_kv, digest_pages, relayout_pages

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


DEVICES = ("cpu", "cuda")


def main() -> None:
    """Runs the cases named on the command line."""
    options = harness.arguments("the cache operators", list(CASES), ("bfloat16",), DEVICES)
    figures = (f for name in options.case for f in run(name, options.device, options.seconds))
    harness.report(figures, options.json, options.device)


def make_pool(order: str, page_size: int, dtype: str, scale: str, device: str) -> KVPool:
    """A pool over tensors on `device`, as an engine would have them."""
    num_pages = NUM_TOKENS // page_size
    size = {"slot": page_size, "head": NUM_KV_HEADS}
    inner = ("slot", "head") if order == "nhd" else ("head", "slot")
    shape = [num_pages, 2, *(size[axis] for axis in inner), HEAD_DIM]
    storage = {"bfloat16": torch.bfloat16, "int8": torch.int8}.get(dtype, torch.uint8)
    scale_shapes = {"tensor": [1], "token_head": [num_pages, page_size, NUM_KV_HEADS]}
    scales = None
    if scale in scale_shapes:
        scales = [
            tuple(torch.full(scale_shapes[scale], 0.05, device=device) for _ in range(2))
            for _ in range(NUM_LAYERS)
        ]
    layers = [torch.zeros(shape, dtype=storage, device=device) for _ in range(NUM_LAYERS)]
    axes = f"page kv {inner[0]} {inner[1]} dim"
    return KVPool.wrap(layers, axes, dtype=dtype, scale=scale, scales=scales)


def run(name: str, device: str, seconds: float) -> Iterator[harness.Figure]:
    """One case, and a copy of as many bytes where the case only copies."""
    case = CASES[name]
    dst = make_pool(*case.dst, device)
    random = torch.Generator().manual_seed(0)
    dst_pages = shuffled(dst, random, device)
    written = NUM_TOKENS * dst.layout.token_bytes() * NUM_LAYERS
    limit, num_bytes = "copy", written
    if case.op == "append_kv":
        rows = torch.randn(NUM_TOKENS, NUM_KV_HEADS, HEAD_DIM, device=device)
        rows = rows.to(getattr(torch, case.src[2]))
        num_bytes = max(written, NUM_LAYERS * 2 * rows.nbytes)
        work = partial(append, rows, dst)
    elif case.op == "digest_pages":
        limit = "read"
        work = partial(digest_pages, dst, dst_pages, num_tokens=NUM_TOKENS)
    else:
        src = make_pool(*case.src, device)
        append(torch.randn(NUM_TOKENS, NUM_KV_HEADS, HEAD_DIM, device=device), src)
        src_pages = shuffled(src, random, device)
        num_bytes = max(written, NUM_TOKENS * src.layout.token_bytes() * NUM_LAYERS)
        work = partial(
            relayout_pages, src, src_pages, dst, dst_pages, num_tokens=NUM_TOKENS, **case.options
        )
    dtype, page_size = case.dst[2], case.dst[1]
    needs = {limit: float(num_bytes)}

    def figure(work: Callable[[], object], peer: str) -> harness.Figure:
        elapsed = harness.measure(work, seconds, device=device)
        return harness.figure(case.op, name, device, dtype, page_size, elapsed, needs, peer, device)

    yield figure(work, "kvlink")
    if name in ("append", "same"):
        a, b = (torch.ones(num_bytes, dtype=torch.uint8, device=device) for _ in range(2))
        yield figure(lambda: a.copy_(b), "torch_copy")


def append(rows: torch.Tensor, pool: KVPool) -> None:
    """The same rows as K and V of every layer."""
    slots = torch.arange(NUM_TOKENS, device=rows.device)
    for layer in range(NUM_LAYERS):
        append_kv(rows, rows, pool, layer, slots)


def shuffled(pool: KVPool, random: torch.Generator, device: str) -> torch.Tensor:
    """All pages of a pool in random order."""
    pages = torch.randperm(pool.num_pages, generator=random, dtype=torch.int32)
    return pages.to(device)


if __name__ == "__main__":
    main()
