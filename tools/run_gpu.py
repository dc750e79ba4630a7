"""Everything there is to know of a GPU in one go: builds for it, tests, checks memory, measures.

    python tools/run_gpu.py --output DIR [--quick] [--flashinfer WHEEL ...] [--dry-run]

Uses the Python that runs it (torch with CUDA, pybind11, setuptools, pytest) and nvcc; no network.
All together ends within nine minutes, or two with --quick. In this order, a failure of one stopping
no other: the build; tests against the reference; compute-sanitizer on a few; the rows of
benchmarks/gpu_rows.py, the time for which is kept back from what comes before. A row that loses the
device, or says nothing for long, costs itself: the next ones get a new process.

DIR/gpu-DATE-COMMIT.json (device, versions, outcome of each step, figures) is written anew after
every step and figure, so that it is there however this ends. KVLINK_COMMIT names the commit where
there is no git. --flashinfer installs wheels (of FlashInfer and what it needs) into a folder of its
own; its kernels are compiled beside the tests, and those that are ready by then are measured.
--dry-run needs no device: tests are collected, and every row runs at small sizes on the host. Exits
with 1 when a step failed.
"""

from __future__ import annotations

import argparse
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PYTEST = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts="]
# Collected alone: the other test files need more than such a machine may have.
TESTS = sorted(str(path) for path in (ROOT / "python_tests").glob("test_*_cuda.py"))
GRID = str(ROOT / "python_tests" / "operators")  # each test for each backend
ARCHS = {(8, 0): "80", (9, 0): "90a", (10, 0): "100"}
LIMIT_S, QUICK_LIMIT_S = 530, 115
KEPT_FOR_ROWS_S, QUICK_KEPT_S = 170, 45
SILENCE_S = 60  # of a row
# Memory checks run long: a kernel of each kind.
CHECKED = "bad_ids or merge or (one_part and (plain or everything or float16))"
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
        self.found: dict[str, Any] = {**about, "steps": [], "limits": [], "figures": []}
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

    def line(self, text: str) -> dict[str, Any]:
        """A line of gpu_rows.py: kept if it is a figure; as an object, or {}."""
        if not text.startswith("{"):
            return {}
        try:
            found: dict[str, Any] = json.loads(text)
        except ValueError:
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
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
                exit_code = 124
        seconds = round(time.monotonic() - self.begin, 1)
        output = "".join(self.output)[-20000:]
        return {"name": self.name, "exit_code": exit_code, "seconds": seconds, "output": output}


def main() -> int:
    """Runs the steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--quick", action="store_true", help="no compute-sanitizer, a few rows")
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
            skipped = {"name": name, "exit_code": 124, "seconds": 0.0, "output": "no time left\n"}
            return int(self.report.add(skipped)["exit_code"])
        done = Command(name, [sys.executable, *command], **self.path, **environment)
        return int(self.report.add(done.finish(limit_s))["exit_code"])

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
        self.step("tests", [*PYTEST, "-m", "gpu", *TESTS, *extra], 120)
        if quick:
            return
        on_cuda = [] if dry else ["-k", "cuda"]
        on_triton = [] if dry else ["-k", TRITON]
        self.step("grid on cuda", [*PYTEST, GRID, *on_cuda, *extra], 90)
        self.step("grid on triton", [*PYTEST, GRID, *on_triton, *many, *extra], 70)
        sanitizer = shutil.which("compute-sanitizer", path=search_path())
        small = [*PYTEST, "-m", "gpu", *TESTS, "-k", CHECKED, *extra]
        if dry:
            self.step("memcheck", small, 60)
        elif sanitizer:
            tool = [sanitizer, "--error-exitcode", "9", sys.executable, *small]
            limit_s = min(80.0, self.end_of_tests - time.monotonic())
            # Each tensor an allocation of its own, so that its end is one, too.
            apart = {**self.path, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            if limit_s > 1:
                self.report.add(Command("memcheck", tool, **apart).finish(limit_s))

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
        while rows and time.monotonic() < self.end - 5:
            begun: list[str] = []

            def each(line: str, begun: list[str] = begun) -> None:
                found = self.report.line(line)
                if "row" in found:
                    begun.append(found["row"])

            command = Command(f"rows from {rows[0]}", [*script, "--row", *rows], **environment)
            self.report.add(command.finish(self.end - time.monotonic(), SILENCE_S, each))
            if not begun:
                break  # it does not even start
            rows = rows[len(begun) :]
        if rows:
            left = {"name": "rows left out", "exit_code": 124, "seconds": 0.0, "output": str(rows)}
            self.report.add(left)

    def all_rows(self) -> list[str]:
        """Their names, in order."""
        command = [sys.executable, ROWS_SCRIPT, "--list"]
        found = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **self.path}, capture_output=True, text=True,
            timeout=60, check=True,
        )  # fmt: skip
        return found.stdout.split()


def search_path() -> str:
    """Where programs are, those of the toolkit included."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return os.pathsep.join([os.environ.get("PATH", ""), os.path.join(home, "bin")])


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
