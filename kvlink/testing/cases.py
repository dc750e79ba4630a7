"""Attention problems over pools as serving leaves them: pages anywhere, and poison all around.

Slots that no row may see hold NaN (int8, which has none: its largest value) and NaN scales; page
table entries that are not read hold ids that would crash or corrupt whoever used them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kvlink.layout import KVLayout
from kvlink.pool import KVPool
from kvlink.reference.append_kv import TORCH_DTYPES, plane, scale_plane, store_rows
from kvlink.reference.gather import gather
from kvlink.reference.paged_attention import paged_attention, visible_range

WILD_PAGE_IDS = (2**31 - 1, -7, -1, -(2**31), 10**6)


@dataclass(frozen=True)
class AttentionCase:
    """One call of paged_attention. `form`: nhd, hnd, packed, latent, or strided (dim not last)."""

    q_lens: tuple[int, ...] = (1, 1, 1)
    seq_lens: tuple[int, ...] = (1, 40, 133)
    num_q_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    head_dim_v: int | None = None
    page_size: int = 16
    form: str = "nhd"
    kv_dtype: str = "float32"
    kv_scale: str = "none"
    q_dtype: str = "float32"
    causal: bool = True
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    alibi: bool = False
    csr: bool = False
    mask: str | None = None  # tree (among the new tokens) or any (from any position on)
    subset: bool = False  # query rows at any positions
    shared: int = 0  # leading tokens whose pages all sequences share, page by page
    generations: bool = False
    seed: int = 0


@dataclass
class AttentionInputs:
    """Positional arguments of paged_attention, and the keyword arguments that the case sets."""

    case: AttentionCase
    args: tuple[torch.Tensor, KVPool, int, torch.Tensor, torch.Tensor]
    kwargs: dict[str, Any]

    @property
    def pool(self) -> KVPool:
        """The pool, one layer of which holds the case's K and V."""
        return self.args[1]


def make_layout(case: AttentionCase) -> KVLayout:
    """The case's layout, for forms that KVLayout itself makes."""
    sizes: dict[str, Any] = dict(
        head_dim=case.head_dim, head_dim_v=case.head_dim_v, page_size=case.page_size,
        dtype=case.kv_dtype, scale=case.kv_scale,
    )  # fmt: skip
    if case.form == "latent":
        return KVLayout.latent(**sizes)
    make = {"nhd": KVLayout.nhd, "hnd": KVLayout.hnd, "packed": KVLayout.packed}[case.form]
    return make(num_kv_heads=case.num_kv_heads, **sizes)


def make_pool(case: AttentionCase, num_pages: int, num_layers: int = 2) -> KVPool:
    """A pool of `num_pages` whose every slot and scale per token is poison."""
    if case.form == "strided":  # elements of a row lie num_kv_heads apart
        shape = (2, num_pages, case.page_size, case.head_dim, case.num_kv_heads)
        dtype = TORCH_DTYPES[case.kv_dtype]
        tensors = [torch.empty(shape, dtype=dtype) for _ in range(num_layers)]
        pool = KVPool.wrap(tensors, "kv page slot dim head")
    else:
        pool = KVPool.create(make_layout(case), num_layers=num_layers, num_pages=num_pages)
    for layer in range(num_layers):
        for name in ("k", "v"):
            poison = 127 if case.kv_dtype == "int8" else float("nan")
            plane(pool, layer, name).fill_(poison)
            if case.kv_scale == "token_head":
                scale_plane(pool, layer, name).fill_(float("nan"))
        if case.kv_scale in ("tensor", "head"):
            heads = case.num_kv_heads if case.kv_scale == "head" else 1
            scales = [0.02 + 0.01 * head for head in range(heads)]
            v_scales = scales if case.form == "latent" else [2 * scale for scale in scales]
            pool.set_scales(layer, scales, v_scales)
    return pool


def make_attention(case: AttentionCase) -> AttentionInputs:
    """Random inputs for a case; the same case gives the same bits."""
    generator = torch.Generator().manual_seed(case.seed)
    used = [-(-length // case.page_size) for length in case.seq_lens]
    pool = make_pool(case, sum(used) + 3)
    order = torch.randperm(pool.num_pages, generator=generator).int()
    page_rows = [pages.clone() for pages in torch.split(order[: sum(used)], used)]
    positions = make_positions(case, generator) if case.subset else None
    layer = 1
    common = [min(case.shared, n, case.seq_lens[0]) // case.page_size for n in case.seq_lens]
    for pages, num_pages in zip(page_rows, common, strict=True):
        pages[:num_pages] = page_rows[0][:num_pages]
    fill_positions(pool, layer, page_rows[0], 0, max(common) * case.page_size, generator)
    for seq, length in enumerate(case.seq_lens):
        begin = seen_from(case, seq, positions)
        own = max(begin, common[seq] * case.page_size)
        fill_positions(pool, layer, page_rows[seq], own, max(own, length), generator)
        hidden_pages = begin // case.page_size
        page_rows[seq][:hidden_pages] = torch.tensor(
            [WILD_PAGE_IDS[i % len(WILD_PAGE_IDS)] for i in range(hidden_pages)]
        )
    q_shape = (sum(case.q_lens), case.num_q_heads, case.head_dim)
    q = torch.randn(q_shape, generator=generator).to(TORCH_DTYPES[case.q_dtype])
    kwargs: dict[str, Any] = dict(
        causal=case.causal, scale=case.scale, window=case.window, softcap=case.softcap
    )
    if set(case.q_lens) != {1}:
        kwargs["q_indptr"] = starts(case.q_lens)
    if case.csr:
        page_table = torch.cat(page_rows)
        kwargs["page_indptr"] = starts(used)
    else:
        wild = torch.tensor(WILD_PAGE_IDS, dtype=torch.int64).int()
        width = max(used) + 2
        page_table = wild.repeat(len(used) * width)[: len(used) * width].view(len(used), width)
        for table_row, pages in zip(page_table, page_rows, strict=True):
            table_row[: len(pages)] = pages
    if case.sinks:
        kwargs["sinks"] = torch.randn(case.num_q_heads, generator=generator)
    if case.alibi:
        kwargs["alibi_slopes"] = 0.5 ** torch.arange(1, case.num_q_heads + 1).float()
    if case.mask:
        kwargs["mask"], kwargs["mask_starts"] = make_mask(case, generator)
        if case.mask == "tree" and positions is None:
            del kwargs["mask_starts"]
    if positions is not None:
        kwargs["q_positions"] = positions
    if case.generations:
        now = torch.randint(1, 9, (pool.num_pages,), generator=generator).int()
        known = (page_table >= 0) & (page_table < pool.num_pages)
        kwargs["page_generations"] = now
        kwargs["expected_generations"] = torch.where(
            known, now[page_table.clamp(0, pool.num_pages - 1).long()], -3
        ).int()
    seq_lens = torch.tensor(case.seq_lens, dtype=torch.int32)
    return AttentionInputs(case, (q, pool, layer, page_table, seq_lens), kwargs)


def make_positions(case: AttentionCase, generator: torch.Generator) -> torch.Tensor:
    """int32 [T]: positions of the query rows, rising within each sequence."""
    rows = [
        torch.randint(0, max(1, length), (q_len,), generator=generator).sort().values
        for q_len, length in zip(case.q_lens, case.seq_lens, strict=True)
    ]
    return torch.cat(rows).int()


def make_mask(case: AttentionCase, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Random bits uint8 [T, mask_bytes], some rows all 0 or 1, and mask_starts int32 [B]."""
    starts = []
    for q_len, length in zip(case.q_lens, case.seq_lens, strict=True):
        first = max(0, length - q_len)
        if case.mask == "any":
            first = int(torch.randint(0, length + 1, (1,), generator=generator))
        starts.append(first)
    num_bits = max(length - start for length, start in zip(case.seq_lens, starts, strict=True))
    shape = (sum(case.q_lens), -(-num_bits // 8) + 1)
    bits = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    bits |= torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    kinds = torch.randint(0, 6, (shape[0], 1), generator=generator)
    bits = torch.where(kinds == 0, 255, torch.where(kinds == 1, 0, bits)).to(torch.uint8)
    return bits, torch.tensor(starts, dtype=torch.int32)


def seen_from(case: AttentionCase, seq: int, positions: torch.Tensor | None) -> int:
    """First position that any query row of a sequence sees, its mask left out."""
    q_len, length = case.q_lens[seq], case.seq_lens[seq]
    first = max(0, length - q_len)
    if positions is not None and q_len:
        first = int(positions[sum(case.q_lens[:seq])])
    return min(visible_range(first, length, case.causal, case.window)[0], length)


def fill_positions(
    pool: KVPool, layer: int, pages: torch.Tensor, begin: int, end: int, generator: torch.Generator
) -> None:
    """Random K and V at positions [begin, end) of a sequence, quantised as the pool does."""
    layout = pool.layout
    at = torch.arange(begin, end)
    page, slot = pages.long()[at // layout.page_size], at % layout.page_size
    for name, dims in (("k", layout.head_dim), ("v", layout.head_dim_v)):
        if name == "v" and not layout.has_v_plane:
            continue
        values = torch.randn(len(at), layout.num_kv_heads, dims, generator=generator)
        store_rows(pool, layer, name, page, slot, slice(None), values)


def rounded_weights(case: AttentionCase) -> torch.Tensor:
    """float32 [T, Hq, head_dim_v]: how far results may be off where weights are rounded to q's
    dtype before they meet V: by half a unit of it of each weight, at most, whatever their signs."""
    inputs = make_attention(case)
    q, pool, layer, page_table, seq_lens = inputs.args
    layout = KVLayout.nhd(
        num_kv_heads=pool.layout.num_kv_heads, head_dim=case.head_dim, page_size=case.page_size,
        head_dim_v=pool.layout.head_dim_v, dtype="float32",
    )  # fmt: skip
    magnitudes = KVPool.create(layout, num_layers=1, num_pages=pool.num_pages)
    k, v = gather(pool, layer, torch.arange(pool.num_pages), 0, pool.num_pages * case.page_size)
    for name, values in (("k", k), ("v", v.abs())):
        target = plane(magnitudes, 0, name)
        target.copy_(values.view(target.shape))
    sums, _ = paged_attention(q.float(), magnitudes, 0, page_table, seq_lens, **inputs.kwargs)
    return sums * (torch.finfo(q.dtype).eps / 2)


def cpu_slack(case: AttentionCase) -> torch.Tensor | None:
    """What rounded weights cost on the CPU, or None where they are not rounded."""
    may_round = case.kv_dtype not in ("float32", "float16")
    return rounded_weights(case) if case.q_dtype == "bfloat16" and may_round else None


def device_slack(case: AttentionCase, backend: str = "cuda") -> torch.Tensor | None:
    """The same on a device, by CUDA or Triton: weights are rounded where q is of the dtype that
    products of V are; over latent rows not by Triton, nor where these are float8_e5m2 or int8."""
    products = {"float32": "", "float16": "float16"}.get(case.kv_dtype, "bfloat16")
    latents = backend == "cuda" and case.kv_dtype not in ("float8_e5m2", "int8")
    rounds = case.q_dtype == products and (latents or case.form != "latent")
    return rounded_weights(case) if rounds else None


def starts(lengths: tuple[int, ...] | list[int]) -> torch.Tensor:
    """int32 [n + 1]: where each of n runs of the given lengths begins, and the last ends."""
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
