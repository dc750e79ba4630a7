"""What the operators are to reach on one CUDA device, row by row, beside FlashInfer and torch.

    python benchmarks/gpu_rows.py [--row NAME ...] [--seconds S] [--dry-run] [--warm KIND]

Prints JSON lines, each as soon as it is known: {"limits": ...} of the device, {"row": name} when a
row begins, its figures (as in harness.py: `limit_fraction` is the part of this device's own copy
bandwidth or product rate), and {"failed": name, "why": text} for one that raised; others go on,
unless the device is lost. The note of kvlink's first figure says what was to be reached, and how
much of it was. `flashinfer` is there where its package is; `torch_sdpa` and `torch_cudnn` get K and
V contiguous, made outside the timing; `torch_index` moves by torch's indexing. --dry-run needs no
device: every row runs on host memory at small sizes, which shows that the code is right and
measures nothing. --warm KIND compiles FlashInfer's kernels of one kind, and ends.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import gpu_attention
import gpu_cache_ops
import harness
import torch
from peers import flashinfer_call

Rows = Iterator[harness.Figure]
MLA_TFLOPS = 660.0
MLA = f"GB/s or {MLA_TFLOPS:g} TFLOP/s"


@dataclasses.dataclass(frozen=True)
class Row:
    """What is measured, of (name, device, seconds), and what is to be reached: `unit` of `value`.

    Units: us (at most), of limit (its fraction), TFLOP/s, MLA (GB/s, or 660 TFLOP/s if that is
    nearer), times (as in the note), none.
    """

    run: Callable[[str, str, float], Rows]
    dry: Callable[[str, str, float], Rows]
    unit: str = "none"
    value: float = 0.0

    def reached(self, figure: harness.Figure) -> float:
        """1 or more: it was."""
        if self.unit == "us":
            return self.value / (figure.ms * 1e3)
        if self.unit == "of limit":
            return figure.limit_fraction / self.value
        if self.unit == "times":
            return float(figure.note.split()[0]) / self.value
        rate = figure.GFLOPs / 1e3
        if self.unit == MLA:
            return max(figure.GBps / self.value, rate / MLA_TFLOPS)
        return rate / self.value


def attention(name: str, unit: str = "none", value: float = 0.0) -> Row:
    """A case of gpu_attention."""
    case = gpu_attention.CASES[name]
    small = gpu_attention.shrunk(case)
    return Row(
        lambda name, device, seconds: gpu_attention.run_case(name, case, device, seconds),
        lambda name, device, seconds: gpu_attention.run_case(name, small, device, seconds),
        unit, value,
    )  # fmt: skip


def fp8(name: str, value: float) -> Row:
    """The same with float8 pages."""
    case = gpu_attention.CASES[name]
    small, run = gpu_attention.shrunk(case), gpu_attention.against_bfloat16
    return Row(
        lambda name, device, seconds: run(name, case, device, seconds),
        lambda name, device, seconds: run(name, small, device, seconds),
        "times", value,
    )  # fmt: skip


def relayout(**options: object) -> Row:
    """1 GiB of bfloat16 rows."""
    run = partial(gpu_cache_ops.relayout, **options)  # type: ignore[arg-type]
    return Row(partial(run, num_bytes=1 << 30), partial(run, num_bytes=1 << 20), "of limit", 0.9)


def append(unit: str = "none", value: float = 0.0, **options: object) -> Row:
    """8192 tokens a layer."""
    run = partial(gpu_cache_ops.append, **options)  # type: ignore[arg-type]
    small = partial(gpu_cache_ops.append, **{**options, "num_layers": 2})  # type: ignore[arg-type]
    return Row(partial(run, num_tokens=8192), partial(small, num_tokens=40), unit, value)


ROWS = {
    "decode_1x32k": attention("decode_1x32k", "us", 43),
    "decode_8x4k": attention("decode_8x4k", "us", 41),
    "decode_16x4k": attention("decode_16x4k", "us", 68),
    "decode_8x16k": attention("decode_8x16k", "us", 130),
    "decode_8x32k": attention("decode_8x32k", "us", 250),
    "decode_ragged": attention("decode_ragged", "of limit", 0.85),
    "decode_zipf": attention("decode_zipf", "of limit", 0.85),
    "decode_mha_page8_16x4000": attention("decode_mha_page8_16x4000", "of limit", 0.85),
    "launch_decode": Row(gpu_attention.launch, gpu_attention.launch, "us", 6),
    "append_8k": append("of limit", 0.85),
    "relayout_1g": relayout(),
    "relayout_1g_fp8_digest": relayout(dtype="float8_e4m3", digest=True),
    "prefill_2k": attention("prefill_2k", "TFLOP/s", 480),
    "prefill_4k": attention("prefill_4k", "TFLOP/s", 610),
    "prefill_8k": attention("prefill_8k", "TFLOP/s", 690),
    "prefill_16k": attention("prefill_16k", "TFLOP/s", 710),
    "decode_8x32k_fp8": fp8("decode_8x32k", 1.7),
    "mla_decode_128x4k": attention("mla_decode_128x4k", MLA, 3300),
    "mla_decode_128x8k": attention("mla_decode_128x8k", MLA, 3300),
    "mla_decode_128x16k": attention("mla_decode_128x16k", MLA, 3300),
    "mla_decode_128x32k": attention("mla_decode_128x32k", MLA, 3300),
    "append_8k_1_layer": append(num_layers=1),
    "append_8k_rope": append(turned=True),
    "extend_4x512of8k": attention("extend_4x512of8k"),
}
WARM = {
    "decode": "decode_8x4k", "prefill": "prefill_2k", "mla": "mla_decode_128x4k",
    "decode_fp8": "decode_8x32k_fp8", "append": "append_8k_1_layer",
}  # fmt: skip


def figures(names: Iterable[str], device: str, seconds: float) -> Iterator[dict[str, object]]:
    """The lines of the rows. Device "cpu": small sizes on host memory."""
    yield {"limits": harness.limits(device)}
    for name in names:
        row = ROWS[name]
        yield {"row": name}
        try:
            run = row.run if device == "cuda" else row.dry
            for count, figure in enumerate(run(name, device, seconds)):
                if count == 0 and row.unit != "none":
                    part = row.reached(figure)
                    goal = f"{part:.2f} of the goal, {row.value:g} {row.unit}"
                    figure = dataclasses.replace(
                        figure, note="; ".join(filter(None, (figure.note, goal)))
                    )
                yield dataclasses.asdict(figure)
        except Exception as error:  # the next rows are still to be had
            yield {"failed": name, "why": f"{type(error).__name__}: {error}"[:2000]}
            if device == "cuda":
                torch.cuda.synchronize()  # raises what has lost the device
        if device == "cuda":
            torch.cuda.empty_cache()


def warm(kind: str) -> None:
    """Compiles what FlashInfer needs for the rows of one kind."""
    name = WARM[kind]
    if kind == "append":
        for _ in gpu_cache_ops.append(name, "cuda", 0, 64, 1):
            pass
        return
    dtype = "float8_e4m3" if kind == "decode_fp8" else "bfloat16"
    case = gpu_attention.CASES[name.removesuffix("_fp8")]
    small = dataclasses.replace(
        case, q_lens=tuple(min(n, 64) for n in case.q_lens[:1]),
        seq_lens=tuple(min(n, 64) for n in case.seq_lens[:1]),
    )  # fmt: skip
    call = flashinfer_call.attention(gpu_attention.make_problem(small, dtype, "cuda"))
    if call is None:
        raise SystemExit("there is no flashinfer here")
    call()
    torch.cuda.synchronize()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the rows named on the command line; 1 when one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--row", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="NAME",
                        help=f"of: {', '.join(ROWS)}")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=0.5, help="about, per figure")
    parser.add_argument("--dry-run", action="store_true", help="small, on host memory")
    parser.add_argument("--list", action="store_true", help="print the names of the rows")
    parser.add_argument("--warm", choices=flashinfer_call.KINDS, metavar="KIND")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(ROWS))
        return 0
    if options.warm:
        warm(options.warm)
        return 0
    device = "cpu" if options.dry_run else "cuda"
    failed = 0
    for line in figures(options.row, device, 0.0 if options.dry_run else options.seconds):
        failed += "failed" in line
        print(json.dumps(line), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
