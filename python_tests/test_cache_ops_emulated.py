"""The CUDA kernels of append_kv, relayout_pages and digest_pages, run by the emulation, against the
CPU's, byte for byte. test_cache_ops_cuda.py has the same on a device."""

from __future__ import annotations

import pytest
import torch
from emulated import SEEDS, DeviceArray, Emulation, emulated_cuda, pool_on_device

from kvlink import KVLayout, KVPool, Rope, append_kv, copy_pages, digest_pages, relayout_pages
from kvlink.errors import InvalidArgument, NotReady, PageTableError, Unsupported
from kvlink.reference.append_kv import TORCH_DTYPES, plane, scale_plane
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


@pytest.mark.parametrize("dst_dtype", DTYPES)
def test_append_turns_many_layers_in_one_launch(emulated_cuda: Emulation, dst_dtype: str) -> None:
    for i, (dim, rotary, first, interleaved) in enumerate(
        [(40, 40, 0, False), (40, 24, 8, True), (36, 14, 3, True), (128, 34, 5, False)]
    ):
        emulated_cuda.seed(i)
        twins = [many_layers(dst_dtype, SCALES[i], 3 if i else 43, dim) for _ in range(2)]
        layers = [2, 0] if i else list(range(43))
        k, v = (
            random_rows(len(layers), 6, HEADS, dim, seed=i + n, dtype=torch.bfloat16)
            .nan_to_num(posinf=300.0) for n in range(2)
        )  # fmt: skip
        slots = torch.tensor([7, -1, 0, 12, 3, 9])
        table = torch.rand(30, rotary) * 2 - 1
        positions = torch.tensor([3, 999, 0, 29, 3, 11])
        append_kv(k, v, twins[0], layers, slots, rope=Rope(table, positions, interleaved, first))
        device = Rope(DeviceArray(table), DeviceArray(positions), interleaved, first)
        arrays = [DeviceArray(each) for each in (k, v, slots)]
        pool = pool_on_device(twins[1])
        append_kv(arrays[0], arrays[1], pool, layers, arrays[2], rope=device)
        emulated_cuda.check_errors()
        assert stored_bytes(twins[0]) == stored_bytes(twins[1])
        positions[2] = 30
        append_kv(arrays[0], arrays[1], pool, layers, arrays[2], rope=device)
        with pytest.raises(InvalidArgument, match=r"rope.positions\[2\] is no row.*got 30"):
            emulated_cuda.check_errors()
        assert stored_bytes(twins[0]) == stored_bytes(twins[1])
    with pytest.raises(InvalidArgument, match="rope: expected arrays on the pool's device"):
        append_kv(
            arrays[0], arrays[1], pool, layers, arrays[2], rope=device._replace(cos_sin=table)
        )


def many_layers(dtype: str, scale: str, num_layers: int, dim: int) -> KVPool:
    layout = KVLayout.nhd(
        num_kv_heads=HEADS, head_dim=dim, page_size=SLOTS, dtype=dtype, scale=scale
    )
    pool = KVPool.create(layout, num_layers=num_layers, num_pages=4)
    for layer in range(num_layers):
        if scale in ("tensor", "head"):
            scales = [0.5 + head for head in range(HEADS if scale == "head" else 1)]
            pool.set_scales(layer, scales, scales)
    return pool


def stored_bytes(pool: KVPool) -> list[bytes]:
    planes = [plane(pool, layer, name) for layer in range(pool.num_layers) for name in ("k", "v")]
    if pool.layout.scale == "token_head":
        planes += [scale_plane(pool, layer, "k") for layer in range(pool.num_layers)]
    return [bytes(each.contiguous().view(torch.uint8).numpy()) for each in planes]


def test_a_digest_on_the_device_and_readiness(emulated_cuda: Emulation) -> None:
    src, dst = (Twins("nhd", "bfloat16", "none") for _ in range(2))
    k = torch.randn(9, HEADS, 40)
    for pool, wrap in ((src.pools[0], torch.as_tensor), (src.pools[1], DeviceArray)):
        append_kv(wrap(k), wrap(k), pool, 0, wrap(torch.arange(9)))
    run = dict(num_tokens=9, token_position=2)
    expected = relayout_pages(src.pools[0], [0, 1], dst.pools[0], [5, 3], **run, digest=True)  # type: ignore[arg-type]
    total, counter = torch.tensor([5]), torch.tensor([0])
    pages = [DeviceArray(torch.tensor(ids).int()) for ids in ([0, 1], [5, 3])]
    options = dict(digest_into=DeviceArray(total), ready=[(DeviceArray(counter), 4)])
    before = [pair[1].clone() for pair in dst.memory]
    relayout_pages(src.pools[1], pages[0], dst.pools[1], pages[1], **run, **options,
                   ready_timeout=0.01)  # type: ignore[arg-type]  # fmt: skip
    with pytest.raises(NotReady, match=r"ready\[0\] had not reached its target.*got 0"):
        emulated_cuda.check_errors()
    assert int(total) == 5
    for pair, kept in zip(dst.memory, before, strict=True):
        assert torch.equal(pair[1].view(torch.uint8), kept.view(torch.uint8))
    counter.fill_(4)
    moved = relayout_pages(src.pools[1], pages[0], dst.pools[1], pages[1], **run, **options)  # type: ignore[arg-type]
    emulated_cuda.check_errors()
    assert moved == (expected.rows, 0)
    assert (int(total) - 5) % 2**64 == expected.digest
    assert dst.equal()
    assert digest_pages(dst.pools[1], pages[1], **run, **options).digest == 0  # type: ignore[arg-type]
    assert (int(total) - 5) % 2**64 == 2 * expected.digest % 2**64
    with pytest.raises(InvalidArgument, match="digest_into: expected one int64 on the pool's"):
        digest_pages(dst.pools[1], pages[1], **run, digest_into=total)  # type: ignore[arg-type]
    with pytest.raises(Unsupported, match="cpu lacks feature 'digest_into'"):
        digest_pages(dst.pools[0], [5, 3], **run, digest_into=total)  # type: ignore[arg-type]


def test_counters_are_raised_when_all_rows_are_there(emulated_cuda: Emulation) -> None:
    """Never before, and not when something is missing."""
    first, second, counter = torch.tensor([7]), torch.tensor([0]), torch.tensor([0])
    pages = [DeviceArray(torch.tensor(ids).int()) for ids in ([0, 1], [5, 3])]
    raised = [DeviceArray(first), DeviceArray(second)]
    for seed in SEEDS:
        emulated_cuda.seed(seed)
        src, dst = (Twins("nhd", "bfloat16", "none") for _ in range(2))
        first.fill_(7)
        second.zero_()

        def move(dst_pages: DeviceArray, dst: Twins = dst, src: Twins = src, **how: object) -> None:
            relayout_pages(
                src.pools[1], pages[0], dst.pools[1], dst_pages, num_tokens=9, raises=raised, **how
            )  # type: ignore[arg-type]

        move(pages[1])
        assert (int(first), int(second)) == (8, 1)
        # Whoever waits for the counter finds it raised, and the rows.
        move(pages[1], ready=[(raised[1], 1)])
        emulated_cuda.check_errors()
        assert (int(first), int(second)) == (9, 2)
        move(pages[1], ready=[(DeviceArray(counter), 1)], ready_timeout=0.0)
        with pytest.raises(NotReady):
            emulated_cuda.check_errors()
        move(DeviceArray(torch.tensor([5, PAGES]).int()))
        with pytest.raises(PageTableError, match=r"dst_pages\[1\]"):
            emulated_cuda.check_errors()
        assert (int(first), int(second)) == (9, 2)
    with pytest.raises(InvalidArgument, match="raises: expected at most 16 counters; got 17"):
        relayout_pages(src.pools[1], pages[0], dst.pools[1], pages[1], num_tokens=9,
                       raises=raised[:1] * 17)  # fmt: skip
    with pytest.raises(InvalidArgument, match=r"raises: expected one int64.*1 x float32"):
        relayout_pages(src.pools[1], pages[0], dst.pools[1], pages[1], num_tokens=9,
                       raises=[DeviceArray(torch.zeros(1))])  # fmt: skip
    with pytest.raises(Unsupported, match="cpu lacks feature 'ready_counters'"):
        relayout_pages(src.pools[0], [0], dst.pools[0], [1], num_tokens=1, raises=[first])


CAPTURING = 0xCA9  # the stream of which the emulation says that a graph captures it


def test_what_a_graph_cannot_capture_is_refused(emulated_cuda: Emulation) -> None:
    """Copies from the host, and waiting; the rest runs there as anywhere."""
    src, dst = (Twins("nhd", "bfloat16", "none") for _ in range(2))
    k, slots = torch.randn(9, HEADS, 40), torch.arange(9)
    append_kv(k, k, src.pools[0], 0, slots)
    append_kv(DeviceArray(k), DeviceArray(k), src.pools[1], 0, DeviceArray(slots), stream=CAPTURING)
    assert src.equal()
    ids = [torch.tensor(each).int() for each in ([0, 1], [5, 3])]
    pages, total = [DeviceArray(each) for each in ids], torch.tensor([0])
    expected = relayout_pages(src.pools[0], *(ids[0], dst.pools[0], ids[1]), num_tokens=9,
                              digest=True)  # fmt: skip
    before = dst.memory[0][1].clone()
    for from_, to, name in ((ids[0], pages[1], "src_pages"), (pages[0], [5, 3], "dst_pages")):
        with pytest.raises(InvalidArgument, match=f"{name}: expected an array on the device while"):
            relayout_pages(src.pools[1], from_, dst.pools[1], to, num_tokens=9, stream=CAPTURING)
    with pytest.raises(InvalidArgument, match="digest_into: expected an array while a graph"):
        relayout_pages(src.pools[1], pages[0], dst.pools[1], pages[1], num_tokens=9, digest=True,
                       stream=CAPTURING)  # fmt: skip
    assert torch.equal(before.view(torch.int16), dst.memory[0][1].view(torch.int16))
    run = dict(num_tokens=9, digest_into=DeviceArray(total), stream=CAPTURING)
    relayout_pages(src.pools[1], pages[0], dst.pools[1], pages[1], **run)  # type: ignore[arg-type]
    emulated_cuda.check_errors()
    assert dst.equal()
    assert int(total) % 2**64 == expected.digest


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
