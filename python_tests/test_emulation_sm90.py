"""The emulation of sm_90a's instructions: barriers, bulk copies, products of warp groups."""

from __future__ import annotations

import pytest
import torch
from emulated import Emulation, emulated_cuda

__all__ = ["emulated_cuda"]

SEEDS = range(6)
MATRICES = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()


def probe(
    emulation: Emulation, kernel: str, seed: int, size: tuple[int, int] = (64, 64)
) -> torch.Tensor:
    """What a kernel of csrc/emulation/probe_sm90.cu makes of MATRICES, of whose second the first
    `size` rows and columns are there. Raises RuntimeError with its complaint."""
    out = torch.full((64, 64), -1.0)
    emulation.seed(seed)
    error = emulation.probe_sm90(kernel, MATRICES.data_ptr(), size, out.data_ptr())
    if error is not None:
        raise RuntimeError(error)
    return out


def product(kernel: str, size: tuple[int, int] = (64, 64)) -> torch.Tensor:
    a, b = MATRICES[0].float(), torch.zeros(64, 64)
    b[: size[0], : size[1]] = MATRICES[1, : size[0], : size[1]].float()
    return a @ (b.T if kernel.startswith("rows") else b)


@pytest.mark.parametrize("kernel", ["rows", "columns"])
@pytest.mark.parametrize("size", [(64, 64), (50, 40)])
def test_products(emulated_cuda: Emulation, kernel: str, size: tuple[int, int]) -> None:
    for seed in SEEDS:
        out = probe(emulated_cuda, kernel, seed, size)
        torch.testing.assert_close(out, product(kernel, size), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kernel", ["rows, reuses shared memory", "columns, touches rows"])
def test_operands_are_read_until_the_wait(emulated_cuda: Emulation, kernel: str) -> None:
    results = [probe(emulated_cuda, kernel, seed) for seed in SEEDS]
    assert any(not torch.allclose(out, product(kernel), atol=1e-4) for out in results)


def test_sums_are_there_after_the_wait(emulated_cuda: Emulation) -> None:
    for seed in SEEDS:
        assert bool(probe(emulated_cuda, "rows, no wait", seed).isnan().all())
        with pytest.raises(RuntimeError, match="products without begin_products"):
            probe(emulated_cuda, "rows, no begin", seed)


def test_bulk_copies_are_there_after_their_barrier(emulated_cuda: Emulation) -> None:
    rows = MATRICES[1, :56, :32].float().view(7, 8, 32).sum(1)
    expected = sum(rows[i % 7] for i in range(12))
    wrong = []
    for seed in SEEDS:
        out = probe(emulated_cuda, "ring", seed)[0, :32]
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)
        try:
            out = probe(emulated_cuda, "ring, no wait", seed)[0, :32]
            wrong.append(not torch.allclose(out, expected, atol=1e-4))
        except RuntimeError as error:
            wrong.append("barrier" in str(error) or "no thread can go on" in str(error))
    assert any(wrong)
    with pytest.raises(RuntimeError, match="a block ends before its bulk copies"):
        probe(emulated_cuda, "rows, no barrier", 0)


def test_named_barriers_order_warps(emulated_cuda: Emulation) -> None:
    number = 0
    for _ in range(5):
        number = (number * 2 + 1) * 2 + 2
    for seed in SEEDS:
        assert bool((probe(emulated_cuda, "turns", seed)[0, :32] == number).all())


def test_barriers_that_cannot_be_passed_are_told(emulated_cuda: Emulation) -> None:
    for seed in SEEDS:
        with pytest.raises(RuntimeError, match=r"no thread can go on.*128 at barriers in shared"):
            probe(emulated_cuda, "never full", seed)
        with pytest.raises(RuntimeError, match="before init_barrier"):
            probe(emulated_cuda, "not initialised", seed)
