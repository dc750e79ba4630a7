"""What every benchmark shares: options, timing, the machine's limits, and the output lines.

A benchmark measures its own machine's limits in the same run, with the same number of threads, and
prints each figure as a fraction of the limit that binds it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from turns import Step, take_turns, timed

from kvlink import _C
from kvlink.doctor import pools_are_huge

_PROBE_BYTES = 256 << 20
_PROBE_SECONDS = 0.5
_DEVICE_PROBE_BYTES = 1 << 30
_READ_BETWEEN_BYTES = 512 << 20  # many times a device's L2


@dataclass(frozen=True)
class Figure:
    """One measurement: one JSON object on a line of stdout with --json.

    `GBps` and `GFLOPs` count what the operation must at least move and compute (10^9 a second);
    `limit_fraction` is the part of `limit` that was reached; `peer` names whose figure it is,
    `note` what else is to be known about it.
    """

    op: str
    case: str
    backend: str
    dtype: str
    page_size: int
    ms: float
    GBps: float
    GFLOPs: float
    limit: str
    limit_fraction: float
    peer: str = "kvlink"
    note: str = ""


@cache
def limits(device: str) -> dict[str, float]:
    """Rates of this machine, in 10^9 a second, measured once.

    "read" and "copy" (bytes; a copied byte counts once), "fma" (float32 operations), on the CPU
    "bf16 dot" (operations on pairs of bfloat16 with float32 sums; 0 where there are none). On the
    CPU with num_threads() threads. A CUDA device's copy is torch's, reads count as fast as its
    reads and writes together, and its "fma" is a torch product of two bfloat16 matrices.
    """
    if device == "cuda":
        import torch

        source = torch.ones(_DEVICE_PROBE_BYTES, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        taken = measure(lambda: target.copy_(source), _PROBE_SECONDS, device=device)
        copied = _DEVICE_PROBE_BYTES / taken / 1e9
        size = 8192
        left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
        taken = measure(lambda: left @ right, _PROBE_SECONDS, device=device)
        product = 2 * size**3 / taken / 1e9
        return {"copy": copied, "read": 2 * copied, "fma": product}
    return {
        "read": _C.probe_read_bandwidth(_PROBE_BYTES, _PROBE_SECONDS) / 1e9,
        "copy": _C.probe_copy_bandwidth(_PROBE_BYTES, _PROBE_SECONDS) / 1e9,
        "fma": _C.probe_fma_peak(_PROBE_SECONDS) / 1e9,
        "bf16 dot": _C.probe_dot_peak(_PROBE_SECONDS) / 1e9,
    }


def limit_fraction(
    seconds: float,
    needs: dict[str, float],
    device: str = "cpu",
    rates: dict[str, float] | None = None,
) -> tuple[str, float]:
    """(limit, fraction) of the limit that binds: the one that alone would take longest.

    `needs` gives the bytes or operations that the work asks of each limit; `rates` the limits that
    were measured beside it, instead of those of the run.
    """
    rates = limits(device) | (rates or {})
    times = {name: amount / (rates[name] * 1e9) for name, amount in needs.items() if amount}
    name = max(times, key=lambda each: times[each])
    return name, times[name] / seconds


def measure(
    work: Callable[[], object], seconds: float = 1.0, min_rounds: int = 5, device: str = "cpu"
) -> float:
    """Median seconds of a call, over at least `min_rounds` calls and about `seconds` in all.

    On a CUDA device a call lasts until the device has done it, timed by events of its stream.
    Before each the device reads so much else that its L2 has nothing of the call's; meanwhile the
    host queues the call, so that what it takes there does not count.
    """
    time_once = _time_on_device if device == "cuda" else _time_on_host
    time_once(work)  # fills caches and thread pools
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < min_rounds or time.perf_counter() < end:
        times.append(time_once(work))
    return sorted(times)[len(times) // 2]


def measure_beside_reads(
    work: Callable[[], object], seconds: float = 1.0
) -> tuple[float, dict[str, float]]:
    """Median seconds of a call on the CPU, and the read rate beside it, as limit_fraction takes it.

    In turns, call by call; so what a call reads is not in the caches. The rate is the one that
    gives the median of the fractions of neighbours.
    """
    steps = [Step("read", _probe().read), Step("work", timed(work))]
    turns = take_turns(steps, seconds, max_seconds=2.0)
    taken = turns.median("work")
    return taken, {"read": _PROBE_BYTES / (turns.beside("work", {"read": 1.0}) * taken) / 1e9}


@cache
def _probe() -> _C.MemoryProbe:
    return _C.MemoryProbe(_PROBE_BYTES)


def _time_on_host(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _time_on_device(work: Callable[[], object]) -> float:
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _other_memory().sum()
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


@cache
def _other_memory() -> Any:
    import torch

    return torch.ones(_READ_BETWEEN_BYTES // 4, device="cuda")


def figure(
    op: str, case: str, backend: str, dtype: str, page_size: int, seconds: float,
    needs: dict[str, float], peer: str = "kvlink", device: str = "cpu",
    rates: dict[str, float] | None = None,
) -> Figure:  # fmt: skip
    """A figure from a time and what the work needs of the limits that limits() names."""
    limit, fraction = limit_fraction(seconds, needs, device, rates)
    num_bytes = needs.get("read", 0.0) + needs.get("copy", 0.0)
    operations = needs.get("fma", 0.0) + needs.get("bf16 dot", 0.0)
    return Figure(
        op, case, backend, dtype, page_size, round(seconds * 1e3, 4),
        round(num_bytes / seconds / 1e9, 3), round(operations / seconds / 1e9, 3),
        limit, round(fraction, 4), peer,
    )  # fmt: skip


def arguments(
    family: str, cases: Sequence[str], dtypes: Sequence[str], devices: Sequence[str] = ("cpu",),
    more: Callable[[argparse.ArgumentParser], None] | None = None,
) -> argparse.Namespace:  # fmt: skip
    """The command line that all benchmarks have: device, case, dtype, threads, seconds, json; and
    what `more` adds to it."""
    parser = argparse.ArgumentParser(description=f"Benchmarks of {family}.")
    parser.add_argument("--device", choices=devices, default=devices[0])
    parser.add_argument("--case", nargs="+", choices=cases, default=list(cases), metavar="NAME",
                        help=f"of: {', '.join(cases)}")  # fmt: skip
    parser.add_argument("--dtype", nargs="+", choices=dtypes, default=list(dtypes[:1]))
    parser.add_argument("--threads", type=int, help="default: kvlink's own choice")
    parser.add_argument("--seconds", type=float, default=1.0, help="about, per figure")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    if more:
        more(parser)
    options = parser.parse_args()
    if options.threads:
        _C.set_num_threads(options.threads)
    return options


def report(figures: Iterable[Figure], as_json: bool, device: str = "cpu") -> None:
    """Prints figures as they come: JSON lines, or a table with the limits above it."""
    if not as_json:
        rates = ", ".join(f"{name} {rate:.1f}" for name, rate in limits(device).items())
        where = f"{_C.num_threads()} threads, {_C.simd_level()}" if device == "cpu" else device
        print(f"{where}; limits in 10^9/s: {rates}")
        if device == "cpu":
            huge = [name for name, shared in (("private", False), ("shared", True))
                    if pools_are_huge(shared)]  # fmt: skip
            print(f"pools in huge pages: {', '.join(huge) or 'none'}")
        print(f"{'op':<18}{'case':<29}{'dtype':<13}{'peer':<12}{'ms':>10}{'GB/s':>9}"
              f"{'GFLOP/s':>9}  of limit")  # fmt: skip
    for each in figures:
        if as_json:
            print(json.dumps(asdict(each)), flush=True)
        else:
            names = f"{each.op:<18}{each.case:<29}{each.dtype:<13}{each.peer:<12}"
            rates = f"{each.ms:>10.3f}{each.GBps:>9.2f}{each.GFLOPs:>9.1f}"
            part = "-" if each.limit == "none" else f"{each.limit_fraction:.0%} of {each.limit}"
            print(f"{names}{rates}  {part:<17}{each.note}".rstrip(), flush=True)
    sys.stdout.flush()
