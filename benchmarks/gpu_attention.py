"""The rows of gpu_rows.py that are paged attention, and the time that a call takes on the host."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import harness
import torch
from bench_attention import Case, Problem, decode
from peers import flashinfer_call

from kvlink import KVPool
from kvlink.reference.append_kv import TORCH_DTYPES

PREFILLS = ("mma.sync", "wgmma, two parts")  # beside what the call chooses by itself
ZIPF = tuple(max(65536 // rank, 1) for rank in range(1, 33))
LAUNCHES = 50


def mla(length: int) -> Case:
    """128 sequences of a latent cache."""
    return Case((1,) * 128, (length,) * 128, 128, 1, 576, 512, 64, latent=True)


def prefill(length: int) -> Case:
    """One prompt."""
    return Case((length,), (length,))


CASES = {
    "decode_1x32k": decode(1, 32768),
    "decode_8x4k": decode(8, 4096),
    "decode_16x4k": decode(16, 4096),
    "decode_8x16k": decode(8, 16384),
    "decode_8x32k": decode(8, 32768),
    "decode_ragged": Case((1,) * 4, (4641, 45118, 1730, 1696)),
    "decode_zipf": Case((1,) * len(ZIPF), ZIPF),
    "decode_mha_page8_16x4000": dataclasses.replace(decode(16, 4000), num_kv_heads=32, page_size=8),
    **{f"prefill_{n}k": prefill(n * 1024) for n in (2, 4, 8, 16)},
    "extend_4x512of8k": Case((512,) * 4, (8192,) * 4),
    **{f"mla_decode_128x{n}k": mla(n * 1024) for n in (4, 8, 16, 32)},
}


def shrunk(case: Case) -> Case:
    """The same kind of case, small enough for a test."""
    pairs = list(zip(case.q_lens, case.seq_lens, strict=True))[:3]
    seq_lens = tuple(max(length // 512, 5) for _, length in pairs)
    q_lens = tuple(
        short if q_len == length else min(q_len, 3)
        for (q_len, length), short in zip(pairs, seq_lens, strict=True)
    )
    heads = case.num_q_heads // case.num_kv_heads
    kv_heads = min(case.num_kv_heads, 2)
    return dataclasses.replace(
        case, q_lens=q_lens, seq_lens=seq_lens, num_kv_heads=kv_heads,
        num_q_heads=min(heads, 4) * kv_heads,
    )  # fmt: skip


def make_problem(case: Case, dtype: str, device: str) -> Problem:
    """Over torch tensors on `device`, as engines have their cache; without scales."""
    pages, kind = sum(case.num_pages()), TORCH_DTYPES[dtype]
    if case.latent:
        memory = torch.empty(pages, case.page_size, 1, case.head_dim, dtype=kind, device=device)
        pool = KVPool.wrap(
            [memory], "page slot head dim", form="latent", head_dim_v=case.head_dim_v
        )
    else:
        shape = (2, pages, case.page_size, case.num_kv_heads, case.head_dim)
        memory = torch.empty(shape, dtype=kind, device=device)
        pool = KVPool.wrap([memory], "kv page slot head dim")
    return Problem(case, dtype, device, pool)


def sdpa(problem: Problem) -> Callable[[], object]:
    """torch on contiguous K and V, sequences of one shape in one call. A latent cache's query
    heads are the rows of one head, so that nothing is repeated for them."""
    case, problems = problem.case, problem.dense(repeated=False)
    if case.latent:
        problems = [(q.transpose(1, 2), k, v) for q, k, v in problems]
    if len(set(zip(case.q_lens, case.seq_lens, strict=True))) == 1:
        problems = [tuple(torch.cat(parts) for parts in zip(*problems, strict=True))]
    calls: list[tuple[tuple[torch.Tensor, ...], dict[str, Any]]] = []
    for parts, q_len, seq_len in zip(problems, case.q_lens, case.seq_lens, strict=False):
        grouped = parts[0].shape[1] != parts[1].shape[1]
        options: dict[str, Any] = {"enable_gqa": True} if grouped else {}
        if q_len > 1 and q_len == seq_len:
            options["is_causal"] = True
        elif q_len > 1:
            ones = torch.ones(q_len, seq_len, dtype=torch.bool, device=parts[0].device)
            options["attn_mask"] = ones.tril(seq_len - q_len)
        calls.append((parts, options))
    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda: [attend(*parts, **options) for parts, options in calls]


def peers(problem: Problem) -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call) of whatever else does the problem."""
    flashinfer = flashinfer_call.attention(problem)
    if flashinfer is not None:
        yield "flashinfer", flashinfer
    yield "torch_sdpa", sdpa(problem)
    if problem.case.latent:
        return  # heads of 576 dims are beyond cuDNN
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
        try:
            work = sdpa(problem)
            work()
        except RuntimeError:
            return  # it does not do such a case, or not here
        yield "torch_cudnn", work


def run_case(
    name: str, case: Case, device: str, seconds: float, dtype: str = "bfloat16"
) -> Iterator[harness.Figure]:
    """kvlink's figure, its other kernels' for long prompts, then the peers'."""
    problem = make_problem(case, dtype, device)

    def measured(peer: str, work: Callable[[], object], part: float, note: str = "") -> Any:
        taken = harness.measure(work, seconds * part, 3, device)
        made = harness.figure(
            "paged_attention", name, device, dtype, case.page_size, taken, problem.needs(), peer,
            device,
        )  # fmt: skip
        return dataclasses.replace(made, note=note)

    yield measured("kvlink", problem.kvlink, 1.0)
    if max(case.q_lens) > 1:
        for kernel, which in prefills():
            yield measured("kvlink", problem.kvlink, 0.5, f"{kernel}: {which()}")
    for peer, work in peers(problem):
        yield measured(peer, work, 0.5)


def prefills() -> Iterator[tuple[str, Callable[[], str]]]:
    """Each of kvlink's kernels for long prompts in turn, where there is a CUDA part: its name, and
    what tells which one the last call took."""
    with contextlib.suppress(ImportError):
        from kvlink import _cuda

        try:
            for name in PREFILLS:
                _cuda.set_prefill(name)
                yield name, _cuda.last_prefill
        finally:
            _cuda.set_prefill("auto")


def against_bfloat16(
    name: str, case: Case, device: str, seconds: float
) -> Iterator[harness.Figure]:
    """float8_e4m3 pages: kvlink's time beside its own on bfloat16 ones, then the peers."""
    before = harness.measure(make_problem(case, "bfloat16", device).kvlink, seconds, 3, device)
    for figure in run_case(name, case, device, seconds, "float8_e4m3"):
        if figure.peer == "kvlink":
            ratio = before * 1e3 / figure.ms
            figure = dataclasses.replace(figure, note=f"{ratio:.2f} times bfloat16's speed")
        yield figure


def launch(name: str, device: str, seconds: float) -> Iterator[harness.Figure]:
    """Host time from a decode call to its return, when the device keeps up: of kvlink, FlashInfer's
    `run` and torch's SDPA."""
    problem = make_problem(decode(1, 64), "bfloat16", device)
    calls: list[tuple[str, Callable[[], object] | None]] = [
        ("kvlink", problem.kvlink), ("flashinfer", flashinfer_call.attention(problem)),
        ("torch_sdpa", sdpa(problem)),
    ]  # fmt: skip
    for peer, work in calls:
        if work is None:
            continue
        taken = host_time(work, device, seconds / 2)
        yield harness.Figure(
            "paged_attention", name, device, "bfloat16", problem.case.page_size,
            round(taken * 1e3, 5), 0, 0, "none", 0, peer, "host time of a call",
        )  # fmt: skip


def host_time(work: Callable[[], object], device: str, seconds: float) -> float:
    """Median seconds of a call, over rounds of LAUNCHES calls that the device then ends."""
    settle = torch.cuda.synchronize if device == "cuda" else lambda: None
    times: list[float] = []
    work()
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        settle()
        begin = time.perf_counter()
        for _ in range(LAUNCHES):
            work()
        times.append((time.perf_counter() - begin) / LAUNCHES)
    settle()
    return sorted(times)[len(times) // 2]
