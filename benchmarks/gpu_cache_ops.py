"""The rows of gpu_rows.py that move rows of the cache: relayout_pages and append_kv."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import harness
import torch
from bench_cache_ops import HEAD_DIM, NUM_LAYERS, make_pool, row_bytes, shuffled
from peers import flashinfer_call

from kvlink import KVPool, Rope, Shard, append_kv, relayout_pages, rope_table

SRC_HEADS, DST_HEADS, SRC_PAGE, DST_PAGE = 8, 4, 16, 64
APPEND_LAYERS = 16


def relayout(
    name: str, device: str, seconds: float, num_bytes: int, dtype: str = "bfloat16",
    digest: bool = False,
) -> Iterator[harness.Figure]:  # fmt: skip
    """Heads 4 to 8 of 8, pages of 16 to 64, NHD to HND: `num_bytes` of bfloat16 rows, stored as
    `dtype`. Beside torch's indexing without digest, and without scales where there are some."""
    scale = "none" if dtype == "bfloat16" else "head"
    sides = [("nhd", SRC_PAGE, "bfloat16", "none", SRC_HEADS),
             ("hnd", DST_PAGE, dtype, scale, DST_HEADS)]  # fmt: skip
    num_rows = num_bytes // (2 * HEAD_DIM)
    num_tokens = num_rows // (NUM_LAYERS * 2 * DST_HEADS) // DST_PAGE * DST_PAGE
    num_rows = num_tokens * NUM_LAYERS * 2 * DST_HEADS
    src, dst = (make_pool(*side, num_tokens, device) for side in sides)
    for layer in range(NUM_LAYERS):
        for plane in (src.k(layer), src.v(layer)):
            torch.from_dlpack(plane).normal_()
    random = torch.Generator().manual_seed(0)
    src_pages, dst_pages = (shuffled(pool, random, device) for pool in (src, dst))
    layers, heads = range(NUM_LAYERS), range(SRC_HEADS)
    shards = dict(src_shard=Shard(layers, heads), dst_shard=Shard(layers, heads[-DST_HEADS:]))
    needs = {"copy": num_rows * sum(row_bytes(side) for side in sides) / 2}

    def ours() -> object:
        return relayout_pages(
            src, src_pages, dst, dst_pages, num_tokens=num_tokens, digest=digest, **shards
        )

    def theirs() -> None:
        relayout_by_torch(src, src_pages.long(), dst, dst_pages.long())

    for peer, work, note in (
        ("kvlink", ours, ""),
        ("torch_index", theirs, "without scales and digest" if digest else ""),
    ):
        taken = harness.measure(work, seconds, 3, device)
        made = harness.figure(
            "relayout_pages", name, device, dtype, DST_PAGE, taken, needs, peer, device
        )
        yield dataclasses.replace(made, note=note)


def relayout_by_torch(src: KVPool, src_pages: Any, dst: KVPool, dst_pages: Any) -> None:
    """What an engine without a kernel for it does, layer by layer."""
    for layer in range(NUM_LAYERS):
        for a, b in ((src.k(layer), dst.k(layer)), (src.v(layer), dst.v(layer))):
            rows = torch.from_dlpack(a)[src_pages][:, :, -DST_HEADS:]  # [page, slot, head, dim]
            rows = rows.reshape(-1, DST_PAGE, DST_HEADS, HEAD_DIM)
            target = torch.from_dlpack(b)
            stored = rows.to(target.dtype)
            if target.element_size() == 1:  # indexing of float8 is not implemented
                stored, target = stored.view(torch.uint8), target.view(torch.uint8)
            target[dst_pages] = stored


def append(
    name: str, device: str, seconds: float, num_tokens: int, num_layers: int = APPEND_LAYERS,
    turned: bool = False,
) -> Iterator[harness.Figure]:  # fmt: skip
    """`num_tokens` of bfloat16 K and V into each layer, all in one call, K `turned` on the way;
    beside FlashInfer's append (to successive slots, of K as it is), and torch's arithmetic and
    indexing, a layer a call."""
    heads, page_size = 8, 16
    rows = torch.randn(num_layers, 2, num_tokens, heads, HEAD_DIM, device=device).bfloat16()
    shape = (2, -(-num_tokens // page_size), page_size, heads, HEAD_DIM)
    memory = [rows.new_zeros(shape) for _ in range(num_layers)]
    pool = KVPool.wrap(memory, "kv page slot head dim")
    random = torch.Generator().manual_seed(0)
    pages = shuffled(pool, random, "cpu").long()
    slots = (pages[:, None] * page_size + torch.arange(page_size)).flatten()[:num_tokens]
    slots = slots.to(device)
    rope, note = None, ""
    if turned:
        note = "without rope"
        table = rope_table(
            10000.0 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM).numpy(), num_tokens
        )
        positions = torch.arange(num_tokens, device=device)
        rope = Rope(torch.from_numpy(table).to(device), positions)
    needs = {"copy": float(rows.nbytes)}

    def ours() -> None:
        append_kv(rows[:, 0], rows[:, 1], pool, range(num_layers), slots, rope=rope)

    def theirs() -> None:
        for layer, cache in enumerate(memory):
            keys = rows[layer, 0] if rope is None else turned_by_torch(rows[layer, 0], rope)
            for plane, values in zip(cache, (keys, rows[layer, 1]), strict=True):
                plane.view(-1, heads, HEAD_DIM)[slots] = values

    planes = [(cache[0], cache[1]) for cache in memory]
    flashinfer = flashinfer_call.append(rows[0, 0], rows[0, 1], planes, page_size)
    works: list[tuple[str, Callable[[], object] | None, str]] = [
        ("kvlink", ours, ""), ("flashinfer", flashinfer, note), ("torch_index", theirs, ""),
    ]  # fmt: skip
    for peer, work, note in works:
        if work is not None:
            taken = harness.measure(work, seconds, 3, device)
            made = harness.figure(
                "append_kv", name, device, "bfloat16", page_size, taken, needs, peer, device
            )
            yield dataclasses.replace(made, note=note)


def turned_by_torch(keys: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Rows [token, head, dim] of which dim i and its half's partner turn, in float32."""
    angles = rope.cos_sin[rope.positions][:, None]
    cos, sin = angles.chunk(2, -1)
    first, second = keys.float().chunk(2, -1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return turned.to(keys.dtype)
