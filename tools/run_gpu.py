"""Everything there is to know of a GPU in one go: builds for it, tests, checks memory, measures.

    python tools/run_gpu.py --output DIR [--quick] [--flashinfer WHEEL ...] [--dry-run]

Uses the Python that runs it (torch with CUDA, pybind11, setuptools, pytest) and nvcc; no network.
All together ends within nine minutes, or two with --quick. In this order, a failure of one stopping
no other: the build; tests against the reference; compute-sanitizer on a few; the rows of
benchmarks/gpu_rows.py, the time for which is kept back from what comes before. A test or row that
loses the device, or says nothing for long, costs itself: the next ones get a new process. After two
such of a test function, or of a kind of rows, the others of it are left out.

DIR/gpu-DATE-COMMIT.json (device, versions, outcome of each step, figures) is written anew after
every step and figure, so that it is there however this ends. KVLINK_COMMIT names the commit where
there is no git. --flashinfer installs wheels (of FlashInfer and what it needs) into a folder of its
own; its kernels are compiled beside the tests, and those that are ready by then are measured.
--dry-run needs no device: tests are collected, and every row runs at small sizes on the host. Exits
with 1 when a step failed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import platform
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PYTEST = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts="]
# Collected alone: the other test files need more than such a machine may have.
FILES = (ROOT / "python_tests").glob("test_*_cuda.py")
TESTS = sorted(map(str, FILES), reverse=True)  # those of attention, which may hang, last
GRID = str(ROOT / "python_tests" / "operators")  # each test for each backend
ARCHS = {(8, 0): "80", (9, 0): "90a", (10, 0): "100"}
LIMIT_S, QUICK_LIMIT_S = 530, 130
KEPT_FOR_ROWS_S, QUICK_KEPT_S = 170, 45
SILENCE_S = 40  # of a row
TEST_SILENCE_S = 35
DEVICE_LOST = 70  # told_tests.py ends its process with it
MOST_ENDS = 2  # of processes, by tests of one function or rows of one kind
# A third of the tests, some of each kind.
QUICK_TESTS = (
    "bad_ids or merge or graph or readiness or long_prompts or (twins and (bfloat16 or e4m3)) "
    "or (one_part and (plain or everything or splits or window)) "
    "or (against and (plain or everything or float16 or latent or subset or splits))"
)
# Memory checks run long: a kernel of each kind.
CHECKED = {
    "memcheck": "bad_ids or merge or (one_part and (plain or everything or float16))",
    "synccheck": "one_part and plain",
}
# Compiling Triton kernels takes long: some of each operator.
TRITON = "triton and (feature or group_sizes or latent or copy_pages or rope)"
ROWS_SCRIPT = "benchmarks/gpu_rows.py"
QUICK_ROWS = ["decode_8x4k", "decode_ragged", "prefill_4k", "append_8k", "relayout_1g_fp8_digest",
              "launch_decode"]  # fmt: skip
KINDS = ("decode", "prefill", "mla", "decode_fp8", "append")  # of peers/flashinfer_call.py


class Report:
    """What is known so far, and its file."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        self.found: dict[str, Any] = {
            **about, "steps": [], "failed_tests": [], "limits": [], "figures": [],
        }  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        self.write()

    def write(self) -> None:
        """Replaces the file by what is known now."""
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(self.found, indent=1) + "\n")
        os.replace(beside, self.path)

    def add(self, step: dict[str, Any]) -> dict[str, Any]:
        """A step that has ended."""
        self.found["steps"].append(step)
        self.write()
        print(f"{step['name']}: exit code {step['exit_code']}, {step['seconds']} s", flush=True)
        if step["exit_code"] != 0:
            print(step["output"][-4000:], flush=True)
        return step

    def failed_test(self, step: str, test: str, why: str) -> None:
        """One that has failed, or ended its process."""
        self.found["failed_tests"].append({"step": step, "test": test, "why": why})
        self.write()
        print(f"{step}: {test} failed", flush=True)

    def line(self, text: str) -> dict[str, Any]:
        """A line of gpu_rows.py: kept if it is a figure; as an object, or {}."""
        found = as_object(text)
        if not found:
            return {}
        if "ms" in found:
            self.found["figures"].append(found)
        elif "limits" in found:
            self.found["limits"].append(found["limits"])
        self.write()
        return found

    def failed(self) -> bool:
        """A step failed."""
        return any(step["exit_code"] != 0 for step in self.found["steps"])


def as_object(line: str) -> dict[str, Any]:
    """What a line of JSON says; {} of others."""
    if not line.startswith("{"):
        return {}
    try:
        found: dict[str, Any] = json.loads(line)
    except ValueError:
        return {}
    return found


class ToldTests:
    """What told_tests.py says of the tests of a step."""

    def __init__(self, report: Report, step: str) -> None:
        self._report, self._step = report, step
        self._running: list[str] = []
        self._ends: Counter[str] = Counter()  # of processes, by a function's tests
        self.done: list[str] = []  # tests; functions of which no more are wanted
        self.more = True

    def line(self, text: str) -> None:
        """One of a process's."""
        found = as_object(text)
        test = found.get("test", "")
        if "session" in found:
            self.more = False
        elif test and "outcome" not in found:
            self._running.append(test)
        elif test:
            if test in self._running:
                self._running.remove(test)
            self.done.append(test)
            if found["outcome"] == "failed":
                self._report.failed_test(self._step, test, found["why"])

    def process_ended(self, exit_code: int) -> None:
        """Before a session's end that is the fault of what was running, or has just failed."""
        if not self.more:
            return
        for test in self._running:
            why = "hung, or had no more time" if exit_code == 124 else f"ended with {exit_code}"
            self._report.failed_test(self._step, test, f"its process {why}")
        guilty = self._running or (self.done[-1:] if exit_code == DEVICE_LOST else [])
        self.done += self._running
        self._running = []
        self.more = bool(guilty)
        for function in {test.partition("[")[0] for test in guilty}:
            self._ends[function] += 1
            if self._ends[function] == MOST_ENDS:
                self.done.append(function)


class Command:
    """A command in a process group of its own; its lines as they come."""

    def __init__(self, name: str, command: list[str], **environment: str) -> None:
        self.name, self.begin = name, time.monotonic()
        self.output: list[str] = []
        self.process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def finish(
        self, limit_s: float, silence_s: float = 1e9, each: Callable[[str], object] = len
    ) -> dict[str, Any]:
        """Waits at most so long, in all and for a line, and ends it then; gives lines to `each`."""
        end = time.monotonic() + limit_s
        exit_code = None
        while exit_code is None:
            try:
                wait = min(end - time.monotonic(), silence_s)
                line = self._lines.get(timeout=max(wait, 0.01))
                if line is None:
                    exit_code = self.process.wait(timeout=30)
                else:
                    self.output.append(line)
                    each(line)
            except (queue.Empty, subprocess.TimeoutExpired):
                exit_code = 124
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(timeout=20)  # a device may hold it for long
        seconds = round(time.monotonic() - self.begin, 1)
        output = "".join(self.output)[-20000:]
        return {"name": self.name, "exit_code": exit_code, "seconds": seconds, "output": output}


def main() -> int:
    """Runs the steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--quick", action="store_true", help="a third of the tests, a few rows")
    parser.add_argument("--flashinfer", nargs="+", default=[], metavar="WHEEL")
    parser.add_argument("--dry-run", action="store_true", help="without a device")
    options = parser.parse_args()
    begin = time.monotonic()
    import torch

    dry = options.dry_run
    if not torch.cuda.is_available() and not dry:
        print("run_gpu: torch sees no CUDA device here", file=sys.stderr)
        return 1
    capability = (9, 0) if dry else torch.cuda.get_device_capability()
    today, measured = datetime.date.today().isoformat(), commit()
    report = Report(
        options.output / f"gpu-{today}-{measured[:12]}.json",
        {
            "device": "none" if dry else torch.cuda.get_device_name(),
            "capability": list(capability), "date": today, "commit": measured,
            "python": platform.python_version(), "torch": torch.__version__,
            "cuda": torch.version.cuda,
        },
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        run = Run(report, options, begin, folder)
        if not dry:
            run.build(ARCHS.get(capability, "{}{}".format(*capability)))
        compiling = run.start_flashinfer()
        run.test()
        run.rows(run.ready_flashinfer(compiling))
    for each in report.found["figures"]:
        print(json.dumps(each))
    print(report.path)
    return 1 if report.failed() else 0


class Run:
    """The steps of one run, and the time they have."""

    def __init__(
        self, report: Report, options: argparse.Namespace, begin: float, folder: str
    ) -> None:
        self.report, self.options, self.folder = report, options, folder
        limit, kept = LIMIT_S, KEPT_FOR_ROWS_S
        if options.quick:
            limit, kept = QUICK_LIMIT_S, QUICK_KEPT_S
        self.end, self.end_of_tests = begin + limit, begin + limit - kept
        self.path = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python_tests"), folder])}

    def step(self, name: str, command: list[str], limit_s: float, **environment: str) -> int:
        """One of those before the rows; 124: it had no time, or not enough."""
        limit_s = min(limit_s, self.end_of_tests - time.monotonic())
        if limit_s < 1:
            return int(self.report.add(no_time(name))["exit_code"])
        done = Command(name, [sys.executable, *command], **self.path, **environment)
        return int(self.report.add(done.finish(limit_s))["exit_code"])

    def tests(self, name: str, arguments: list[str], limit_s: float) -> None:
        """A run of pytest, in new processes behind tests that hang or lose the device."""
        end = min(time.monotonic() + limit_s, self.end_of_tests)
        told, done = ToldTests(self.report, name), Path(self.folder) / "tests_done"
        command = [sys.executable, *PYTEST, "-p", "told_tests", *arguments]
        while told.more:
            limit_s = end - time.monotonic()
            if limit_s < 1:
                self.report.add(no_time(name))
                return
            done.write_text("\n".join(told.done))
            process = Command(name, command, **self.path, KVLINK_TESTS_DONE=str(done))
            step = process.finish(limit_s, TEST_SILENCE_S, told.line)
            lines = step["output"].splitlines(keepends=True)
            step["output"] = "".join(line for line in lines if line.strip() and not as_object(line))
            self.report.add(step)
            told.process_ended(step["exit_code"])

    def build(self, arch: str) -> None:
        """The extension for the device; without its CUDA part, for the others, where that fails."""
        command = ["setup.py", "-q", "build_ext", "--inplace"]
        jobs = {"MAX_JOBS": os.environ.get("MAX_JOBS", str(os.cpu_count() or 2))}
        if self.step("build", command, 240, KVLINK_CUDA="1", KVLINK_CUDA_ARCHS=arch, **jobs):
            self.step("build without CUDA", command, 90, KVLINK_CUDA="0", **jobs)

    def test(self) -> None:
        """Right results first, then compute-sanitizer."""
        quick, dry = self.options.quick, self.options.dry_run
        extra = ["--collect-only"] if dry else []
        many = ["-n", "8"] if importlib.util.find_spec("xdist") and not dry else []
        some = ["-k", QUICK_TESTS] if quick else []
        self.tests("tests", ["-m", "gpu", *TESTS, *some, *extra], 120)
        if quick:
            return
        on_cuda = [] if dry else ["-k", "cuda"]
        on_triton = [] if dry else ["-k", TRITON]
        self.tests("grid on cuda", [GRID, *on_cuda, *extra], 90)
        self.tests("grid on triton", [GRID, *on_triton, *many, *extra], 70)
        for tool, limit_s in (("memcheck", 80.0), ("synccheck", 45.0)):
            self.sanitize(
                tool, [*PYTEST, "-m", "gpu", *TESTS, "-k", CHECKED[tool], *extra], limit_s
            )

    def sanitize(self, tool: str, tests: list[str], limit_s: float) -> None:
        """One of compute-sanitizer's tools on some tests."""
        if self.options.dry_run:
            self.step(tool, tests, limit_s)
            return
        sanitizer = shutil.which("compute-sanitizer", path=search_path())
        limit_s = min(limit_s, self.end_of_tests - time.monotonic())
        if not sanitizer or limit_s < 1:
            self.report.add(no_time(tool, "no time left\n" if sanitizer else "no program\n"))
            return
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, *tests]
        # Each tensor an allocation of its own, so that its end is one, too.
        apart = {**self.path, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        self.report.add(Command(tool, command, **apart).finish(limit_s))

    def start_flashinfer(self) -> dict[str, Command]:
        """Installs the wheels, and compiles its kernels beside what comes next."""
        if not self.options.flashinfer:
            return {}
        pip = ["-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", self.folder]
        if self.step("flashinfer", [*pip, *self.options.flashinfer], 60) or self.options.dry_run:
            return {}
        self.path["FLASHINFER_WORKSPACE_BASE"] = self.folder
        kinds = ("decode", "prefill") if self.options.quick else KINDS
        rows = [sys.executable, ROWS_SCRIPT, "--warm"]
        return {kind: Command(f"flashinfer {kind}", [*rows, kind], **self.path) for kind in kinds}

    def ready_flashinfer(self, compiling: dict[str, Command]) -> list[str]:
        """The kinds that are compiled by the time that the rows begin."""
        ready = []
        for kind, command in compiling.items():
            done = self.report.add(command.finish(self.end_of_tests - time.monotonic()))
            if done["exit_code"] == 0:
                ready.append(kind)
        return ready

    def rows(self, flashinfer: list[str]) -> None:
        """All rows, those behind one that ends its process in a new one."""
        script = [sys.executable, ROWS_SCRIPT]
        script += ["--seconds", "0.2" if self.options.quick else "0.4"]
        script += ["--dry-run"] if self.options.dry_run else []
        rows = QUICK_ROWS if self.options.quick else self.all_rows()
        environment = {**self.path, "KVLINK_FLASHINFER": ",".join(flashinfer)}
        left_out: list[str] = []
        ends: Counter[str] = Counter()  # of processes, by rows of a kind
        while rows and time.monotonic() < self.end - 5:
            begun: list[str] = []

            def each(line: str, begun: list[str] = begun) -> None:
                found = self.report.line(line)
                if "row" in found:
                    begun.append(found["row"])

            command = Command(f"rows from {rows[0]}", [*script, "--row", *rows], **environment)
            step = self.report.add(command.finish(self.end - time.monotonic(), SILENCE_S, each))
            if not begun:
                break  # it does not even start
            rows = rows[len(begun) :]
            kind = begun[-1].partition("_")[0]
            ends[kind] += step["exit_code"] != 0
            if ends[kind] >= MOST_ENDS:
                left_out += [row for row in rows if row.partition("_")[0] == kind]
                rows = [row for row in rows if row not in left_out]
        if rows or left_out:
            self.report.add(no_time("rows left out", f"{left_out + rows}\n"))

    def all_rows(self) -> list[str]:
        """Their names, in order."""
        command = [sys.executable, ROWS_SCRIPT, "--list"]
        found = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **self.path}, capture_output=True, text=True,
            timeout=60, check=True,
        )  # fmt: skip
        return found.stdout.split()


def no_time(name: str, output: str = "no time left\n") -> dict[str, Any]:
    """A step that was not begun."""
    return {"name": name, "exit_code": 124, "seconds": 0.0, "output": output}


def search_path() -> str:
    """Where programs are, those of the toolkit included."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    nvcc = shutil.which("nvcc")
    if nvcc:
        homes.append(str(Path(nvcc).resolve().parent.parent))
    inside = [os.path.join(home, at) for home in homes if home
              for at in ("bin", "compute-sanitizer")]  # fmt: skip
    return os.pathsep.join([os.environ.get("PATH", ""), *inside])


def commit() -> str:
    """The commit that is measured; "unknown" where nothing tells."""
    given = os.environ.get("KVLINK_COMMIT")
    if given:
        return given
    try:
        git = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return "unknown"
    return git.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
