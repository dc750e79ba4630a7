"""append_kv, relayout_pages and digest_pages beside the machine's copy bandwidth.

    python benchmarks/bench_cache_ops.py [--device cpu|cuda] [--case NAME ...] [--json]

Bytes counted: (bytes read + bytes written) / 2, as a copied byte counts once. The limit is a copy
of 256 MiB with as many threads, in order, by streaming stores or the C library's memcpy, whichever
is faster here; for a digest alone, bytes read, against reading 256 MiB. On the CPU pools are memory
of the library's own, as is what the limit copies; both take turns call by call (turns.py).

same_*    the same layout in shuffled pages of 4 KiB, 64 KiB and 32 KiB
relayout  heads 4 to 8 of 8, page 16 -> 64, NHD -> HND; to_*: the same, converted on the way
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import harness
import torch
from turns import Step, copying, limit_note, take_turns, timed

from kvlink import _C, KVLayout, KVPool, Shard, append_kv, digest_pages, relayout_pages

NUM_BYTES = 256 << 20  # of bfloat16, at the destination
NUM_LAYERS = 4
HEAD_DIM = 128


@dataclass(frozen=True)
class Case:
    """Moves a request from `src` to `dst`: (order, page size, dtype, scale, heads).

    A destination of fewer heads than the source holds the last of them.
    """

    src: tuple[str, int, str, str, int] = ("nhd", 16, "bfloat16", "none", 8)
    dst: tuple[str, int, str, str, int] = ("nhd", 16, "bfloat16", "none", 8)
    op: str = "relayout_pages"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return NUM_BYTES // (NUM_LAYERS * 2 * self.dst[4] * HEAD_DIM * 2)

    @property
    def num_rows(self) -> int:
        return self.num_tokens * NUM_LAYERS * 2 * self.dst[4]


def same(page_size: int, num_heads: int) -> Case:
    shape = ("nhd", page_size, "bfloat16", "none", num_heads)
    return Case(src=shape, dst=shape)


def relayout(dtype: str = "bfloat16", scale: str = "none") -> Case:
    return Case(dst=("hnd", 64, dtype, scale, 4))


DIGEST = {"digest": True}
MOVES = {
    "same_4k": same(8, 1),
    "same_64k": same(16, 8),
    "same_32k": same(16, 4),
    "relayout": relayout(),
    "to_fp8_head": relayout("float8_e4m3", "head"),
    "to_fp8_token": relayout("float8_e4m3", "token_head"),
    "to_int8_head": relayout("int8", "head"),
    "to_int8_token": relayout("int8", "token_head"),
    "from_fp8_token": Case(src=("nhd", 16, "float8_e4m3", "token_head", 8)),
}
CASES = {
    "append": Case(op="append_kv"),
    "append_fp32": Case(src=("nhd", 16, "float32", "none", 8), op="append_kv"),
    **MOVES,
    **{f"{name}_digest": replace(case, options=DIGEST) for name, case in MOVES.items()},
    "digest": Case(op="digest_pages"),
}


DEVICES = ("cpu", "cuda")


def main() -> None:
    """Runs the cases named on the command line."""
    options = harness.arguments("the cache operators", list(CASES), ("bfloat16",), DEVICES)
    figures = (f for name in options.case for f in run(name, options.device, options.seconds))
    harness.report(figures, options.json, options.device)


def make_pool(
    order: str, page_size: int, dtype: str, scale: str, num_heads: int, num_tokens: int, device: str
) -> KVPool:
    """On the CPU a pool of its own memory, on others one over tensors, as engines have them."""
    num_pages = num_tokens // page_size
    if device == "cpu":
        layout = getattr(KVLayout, order)(
            num_kv_heads=num_heads, head_dim=HEAD_DIM, page_size=page_size, dtype=dtype, scale=scale
        )
        pool = KVPool.create(layout, num_layers=NUM_LAYERS, num_pages=num_pages)
        if scale == "head":
            for layer in range(NUM_LAYERS):
                pool.set_scales(layer, *[[0.05] * num_heads] * 2)
        return pool
    size = {"slot": page_size, "head": num_heads}
    inner = ("slot", "head") if order == "nhd" else ("head", "slot")
    shape = [num_pages, 2, *(size[axis] for axis in inner), HEAD_DIM]
    storage = {"bfloat16": torch.bfloat16, "int8": torch.int8}.get(dtype, torch.uint8)
    scale_shapes = {"head": [num_heads], "token_head": [num_pages, page_size, num_heads]}
    scales = None
    if scale in scale_shapes:
        scales = [
            tuple(torch.full(scale_shapes[scale], 0.05, device=device) for _ in range(2))
            for _ in range(NUM_LAYERS)
        ]
    layers = [torch.zeros(shape, dtype=storage, device=device) for _ in range(NUM_LAYERS)]
    axes = f"page kv {inner[0]} {inner[1]} dim"
    return KVPool.wrap(layers, axes, dtype=dtype, scale=scale, scales=scales)


def row_bytes(side: tuple[str, int, str, str, int]) -> int:
    """A row's bytes and those of its own scale."""
    size = {"float32": 4, "bfloat16": 2}.get(side[2], 1)
    return HEAD_DIM * size + (4 if side[3] == "token_head" else 0)


def run(name: str, device: str, seconds: float) -> Iterator[harness.Figure]:
    case = CASES[name]
    dst = make_pool(*case.dst, case.num_tokens, device)
    random = torch.Generator().manual_seed(0)
    dst_pages = shuffled(dst, random, device)
    num_bytes = case.num_rows * (row_bytes(case.src) + row_bytes(case.dst)) / 2
    if case.op == "append_kv":
        rows = torch.randn(case.num_tokens, case.dst[4], HEAD_DIM, device=device)
        rows = rows.to(getattr(torch, case.src[2]))
        work = partial(append, rows, dst)
    elif case.op == "digest_pages":
        append(torch.randn(case.num_tokens, case.dst[4], HEAD_DIM, device=device), dst)
        work = partial(digest_pages, dst, dst_pages, num_tokens=case.num_tokens)
    else:
        src = make_pool(*case.src, case.num_tokens, device)
        append(torch.randn(case.num_tokens, case.src[4], HEAD_DIM, device=device), src)
        src_pages = shuffled(src, random, device)
        layers, heads = range(NUM_LAYERS), range(case.src[4])
        shards = dict(
            src_shard=Shard(layers, heads), dst_shard=Shard(layers, heads[-case.dst[4] :])
        )
        work = partial(
            relayout_pages, src, src_pages, dst, dst_pages, num_tokens=case.num_tokens, **shards,
            **case.options,
        )  # fmt: skip
    limit = "read" if case.op == "digest_pages" else "copy"
    if device == "cpu":
        yield beside_limit(name, case, work, limit, num_bytes, seconds)
        return
    elapsed = harness.measure(work, seconds, device=device)
    yield harness.figure(
        case.op, name, device, case.dst[2], case.dst[1], elapsed, {limit: num_bytes},
        device=device,
    )  # fmt: skip


def beside_limit(
    name: str, case: Case, work: Callable[[], object], limit: str, num_bytes: float, seconds: float
) -> harness.Figure:
    """The figure of `work` on the CPU, which takes turns with its limit."""
    probe = _C.MemoryProbe(NUM_BYTES)
    steps = [Step("limit", getattr(probe, limit)), Step("work", timed(work))]
    if limit == "copy":
        # What memcpy leaves in the caches is written back before the next copy counts.
        steps = [Step("memcpy", probe.copy_plain), Step("", probe.copy), *steps]
    turns = take_turns(steps, seconds)
    elapsed = turns.median("work")
    figure = harness.figure(
        case.op, name, "cpu", case.dst[2], case.dst[1], elapsed, {limit: num_bytes},
        rates={limit: num_bytes / elapsed / 1e9},
    )  # fmt: skip
    note = f"{limit} of 256 MiB {turns.median('limit') * 1e3:.2f} ms"
    if limit == "copy":
        of_memcpy = turns.beside("work", {"memcpy": num_bytes / NUM_BYTES})
        how = limit_note(turns, "limit", copying(probe))
        note = f"{of_memcpy:.0%} of memcpy; {note} {how}"
    fraction = turns.beside("work", {"limit": num_bytes / NUM_BYTES})
    return replace(figure, limit_fraction=round(fraction, 4), note=note)


def append(rows: torch.Tensor, pool: KVPool) -> None:
    """The same rows as K and V of every layer."""
    slots = torch.arange(len(rows), device=rows.device)
    for layer in range(NUM_LAYERS):
        append_kv(rows, rows, pool, layer, slots)


def shuffled(pool: KVPool, random: torch.Generator, device: str) -> torch.Tensor:
    """All pages of a pool in random order."""
    pages = torch.randperm(pool.num_pages, generator=random, dtype=torch.int32)
    return pages.to(device)


if __name__ == "__main__":
    main()
