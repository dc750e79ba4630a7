"""The CUDA kernels of append_kv, relayout_pages and digest_pages, run by the emulation, against the
CPU's, byte for byte. test_cache_ops_cuda.py has the same on a device."""

from __future__ import annotations

import pytest
import torch
from emulated import SEEDS, DeviceArray, Emulation, emulated_cuda

from kvlink import KVPool, append_kv, copy_pages, digest_pages, relayout_pages
from kvlink.errors import InvalidArgument, PageTableError
from kvlink.reference.append_kv import TORCH_DTYPES
from kvlink.testing.pools import DTYPES, SCALES, random_rows

__all__ = ["emulated_cuda"]
HEADS, PAGES, SLOTS = 3, 8, 5
AXES = {
    "nhd": "kv page slot head dim",
    "hnd": "kv page head slot dim",
    "strided": "dim kv head page slot",
}


class Twins:
    """Two pools of equal bytes and scales, the second one on the emulated device."""

    def __init__(self, kind: str, dtype: str, scale: str, dim: int = 40) -> None:
        sizes = dict(kv=2, page=PAGES, slot=SLOTS, head=HEADS, dim=dim)
        axes = AXES[kind]
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[TORCH_DTYPES[dtype].itemsize]
        shape = [sizes[axis] for axis in axes.split()]
        poison = 255 if bits == torch.uint8 else -1
        host = torch.full(shape, poison, dtype=bits).view(TORCH_DTYPES[dtype])
        shapes = dict(none=[], tensor=[1], head=[HEADS], token_head=[PAGES, SLOTS, HEADS])
        scales = [torch.rand(shapes[scale]) + 0.1 for _ in range(2)] if shapes[scale] else []
        self.memory = [(host, host.clone()), *((each, each.clone()) for each in scales)]
        planes, *scale_planes = self.memory
        self.pools = [
            KVPool.wrap(
                [place(planes[i])], axes, scale=scale,
                scales=[tuple(place(pair[i]) for pair in scale_planes)] if scale_planes else None,
            )
            for i, place in enumerate((lambda tensor: tensor, DeviceArray))
        ]  # fmt: skip

    def equal(self) -> bool:
        return all(
            torch.equal(*(each.contiguous().view(torch.uint8) for each in pair))
            for pair in self.memory
        )


@pytest.mark.parametrize("dst_dtype", DTYPES)
@pytest.mark.parametrize("src_dtype", DTYPES)
def test_twins_stay_equal(emulated_cuda: Emulation, src_dtype: str, dst_dtype: str) -> None:
    kinds = list(AXES)
    for i, (src_scale, dst_scale) in enumerate((a, b) for a in SCALES for b in SCALES):
        emulated_cuda.seed(i)
        torch.manual_seed(i)
        dim = (40, 7, 128, 300)[i % 4]  # a group of 8, 16 or 32 lanes moves a row
        src = Twins(kinds[i % 3], src_dtype, src_scale, dim)
        dst = Twins(kinds[i // 3 % 3], dst_dtype, dst_scale, dim)
        k, v = (random_rows(20, HEADS, dim, seed=i + n) for n in range(2))
        slots = torch.randperm(PAGES * SLOTS)[:20]
        slots[::7] = -1
        append_kv(k, v, src.pools[0], 0, slots)
        append_kv(DeviceArray(k), DeviceArray(v), src.pools[1], 0, DeviceArray(slots))
        assert src.equal()
        pages = torch.randperm(PAGES).int(), torch.randperm(PAGES).int()
        run = dict(num_tokens=9, src_start=3, dst_start=6, token_position=5, digest=True)
        on_host = relayout_pages(src.pools[0], pages[0], dst.pools[0], pages[1], **run)  # type: ignore[arg-type]
        emulated = relayout_pages(
            src.pools[1], DeviceArray(pages[0]), dst.pools[1], pages[1].tolist(), **run
        )  # type: ignore[arg-type]
        assert on_host == emulated
        assert dst.equal()
        assert emulated == digest_pages(
            dst.pools[1], DeviceArray(pages[1]), num_tokens=9, start=6, token_position=5
        )


def test_bad_ids_are_skipped_and_reported_later(emulated_cuda: Emulation) -> None:
    for seed in SEEDS:
        emulated_cuda.seed(seed)
        twins = Twins("nhd", "bfloat16", "none")
        k = torch.ones(3, HEADS, 40)
        append_kv(k, k, twins.pools[0], 0, torch.tensor([0, -1, 1]))
        arrays = DeviceArray(k), DeviceArray(torch.tensor([0, 10**9, 1]))
        append_kv(arrays[0], arrays[0], twins.pools[1], 0, arrays[1])
        with pytest.raises(InvalidArgument, match=r"slots\[1\].*got 1000000000"):
            emulated_cuda.check_errors()
        pool = twins.pools[1]
        relayout_pages(pool, [0, -1], pool, [2, 3], num_tokens=2 * SLOTS)
        with pytest.raises(PageTableError, match=r"src_pages\[1\].*got -1"):
            emulated_cuda.check_errors()
        copy_pages(pool, [0], [PAGES])
        with pytest.raises(PageTableError, match=rf"dst_pages\[0\].*got {PAGES}"):
            copy_pages(pool, [0], [1])
        emulated_cuda.check_errors()
        copy_pages(twins.pools[0], [0], [2])
        assert twins.equal()
