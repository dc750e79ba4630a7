"""The emulation of CUDA itself: what it computes, and that it notices what it says it notices."""

from __future__ import annotations

import pytest
import torch
from emulated import Emulation, emulated_cuda

__all__ = ["emulated_cuda"]


def probe(emulation: Emulation, kernel: str, values: torch.Tensor) -> torch.Tensor:
    """out [128] of a kernel of csrc/emulation/probe.cu. Raises RuntimeError with its complaint."""
    padded, out = torch.zeros(512), torch.full((128,), -1.0)
    padded[: values.numel()] = values.flatten()
    error = emulation.probe(kernel, padded.data_ptr(), out.data_ptr())
    if error is not None:
        raise RuntimeError(error)
    return out


def test_a_missing_barrier_shows_between_seeds(emulated_cuda: Emulation) -> None:
    values = torch.arange(64.0)
    results = {}
    for kernel in ("swap", "swap, no barrier"):
        results[kernel] = []
        for seed in range(8):
            emulated_cuda.seed(seed)
            results[kernel].append(probe(emulated_cuda, kernel, values)[:64])
    assert all(torch.equal(result, values.flip(0)) for result in results["swap"])
    assert not all(torch.equal(result, values.flip(0)) for result in results["swap, no barrier"])
    drawn = [tuple(result.tolist()) for result in results["swap, no barrier"][1:]]
    assert len(set(drawn)) > 1


def test_a_missing_wait_for_copies_reads_nan(emulated_cuda: Emulation) -> None:
    values = torch.arange(64.0)
    assert torch.equal(probe(emulated_cuda, "copy", values)[:64], values)
    assert probe(emulated_cuda, "copy, no wait", values)[:64].isnan().any()


def test_what_cannot_go_on_is_told(emulated_cuda: Emulation) -> None:
    for seed in range(4):
        emulated_cuda.seed(seed)
        with pytest.raises(RuntimeError, match=r"no thread can go on.*1 of 32 lanes at __shfl_xor"):
            probe(emulated_cuda, "half at the barrier", torch.zeros(1))
        with pytest.raises(RuntimeError, match="row of ldmatrix outside of shared memory"):
            probe(emulated_cuda, "past the end", torch.zeros(1))


@pytest.mark.parametrize("transposes", [False, True])
def test_products_of_matrices(emulated_cuda: Emulation, transposes: bool) -> None:
    a, b = (torch.randn(shape).bfloat16().float() for shape in ((16, 16), (16, 8)))
    stored = b if transposes else b.T.contiguous()
    name = "product, transposes" if transposes else "product"
    emulated_cuda.seed(3)
    out = probe(emulated_cuda, name, torch.cat([a.flatten(), stored.flatten()]))
    torch.testing.assert_close(out.view(16, 8), a @ b, rtol=1e-5, atol=1e-5)
