"""The CUDA operators against the CPU's, byte for byte. Needs a device."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from kvlink import KVPool, append_kv, digest_pages, relayout_pages
from kvlink.errors import InvalidArgument, PageTableError
from kvlink.reference.append_kv import TORCH_DTYPES
from kvlink.testing.pools import DTYPES, SCALES, random_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("kvlink._cuda") is None, reason="no kvlink._cuda"),
]
HEADS, DIM, PAGES, SLOTS = 3, 40, 8, 5
AXES = {
    "nhd": "kv page slot head dim",
    "hnd": "kv page head slot dim",
    "strided": "dim kv head page slot",
}


class Twins:
    """A pool on the host and its copy on the device, with the same static scales."""

    def __init__(self, kind: str, dtype: str, scale: str) -> None:
        sizes = dict(kv=2, page=PAGES, slot=SLOTS, head=HEADS, dim=DIM)
        axes = AXES[kind]
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[TORCH_DTYPES[dtype].itemsize]
        shape = [sizes[axis] for axis in axes.split()]
        poison = 255 if bits == torch.uint8 else -1
        self.host = torch.full(shape, poison, dtype=bits).view(TORCH_DTYPES[dtype])
        scale_shapes = dict(none=[], tensor=[1], head=[HEADS], token_head=[PAGES, SLOTS, HEADS])
        shape = scale_shapes[scale]
        self.host_scales = [torch.rand(shape) + 0.1 for _ in range(2)] if shape else []
        self.device = self.host.cuda()
        self.device_scales = [scales.cuda() for scales in self.host_scales]
        self.pools = [
            KVPool.wrap([tensor], axes, scale=scale, scales=[tuple(scales)] if scales else None)
            for tensor, scales in (
                (self.host, self.host_scales),
                (self.device, self.device_scales),
            )
        ]

    def equal(self) -> bool:
        pairs = [(self.host, self.device), *zip(self.host_scales, self.device_scales, strict=True)]
        return all(
            torch.equal(a.contiguous().view(torch.uint8), b.cpu().contiguous().view(torch.uint8))
            for a, b in pairs
        )


@pytest.mark.parametrize("dst_dtype", DTYPES)
@pytest.mark.parametrize("src_dtype", DTYPES)
def test_twins_stay_equal(src_dtype: str, dst_dtype: str) -> None:
    kinds = list(AXES)
    for i, (src_scale, dst_scale) in enumerate((a, b) for a in SCALES for b in SCALES):
        torch.manual_seed(i)
        src = Twins(kinds[i % 3], src_dtype, src_scale)
        dst = Twins(kinds[i // 3 % 3], dst_dtype, dst_scale)
        k, v = (random_rows(40, HEADS, DIM, seed=i + n) for n in range(2))
        slots = torch.randperm(PAGES * SLOTS)
        slots[::7] = -1
        append_kv(k, v, src.pools[0], 0, slots)
        append_kv(k.cuda(), v.cuda(), src.pools[1], 0, slots.cuda())
        torch.cuda.synchronize()
        assert src.equal()
        pages = torch.randperm(PAGES).int(), torch.randperm(PAGES).int()
        run = dict(num_tokens=29, src_start=3, dst_start=6, token_position=5, digest=True)
        on_host = relayout_pages(src.pools[0], pages[0], dst.pools[0], pages[1], **run)  # type: ignore[arg-type]
        on_device = relayout_pages(
            src.pools[1], pages[0].cuda(), dst.pools[1], pages[1].tolist(), **run
        )  # type: ignore[arg-type]
        assert on_host == on_device
        assert dst.equal()
        assert on_device == digest_pages(
            dst.pools[1], pages[1].cuda(), num_tokens=29, start=6, token_position=5
        )


def test_bad_ids_are_skipped_and_reported_later() -> None:
    from kvlink import _cuda

    pool = Twins("nhd", "bfloat16", "none").pools[1]
    k = torch.ones(3, HEADS, DIM, device="cuda")
    append_kv(k, k, pool, 0, torch.tensor([0, 10**9, 1], device="cuda"))
    with pytest.raises(InvalidArgument, match=r"slots\[1\].*got 1000000000"):
        _cuda.check_errors(0)
    relayout_pages(pool, [0, -1], pool, [2, 3], num_tokens=2 * SLOTS)
    with pytest.raises(PageTableError, match=r"src_pages\[1\].*got -1"):
        _cuda.check_errors(0)
    _cuda.check_errors(0)
