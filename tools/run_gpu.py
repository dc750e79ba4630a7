"""Everything there is to know of a GPU in one go: builds for it, tests, checks memory, measures.

    python tools/run_gpu.py --output DIR [--quick] [--flashinfer WHEEL ...] [--dry-run]

Uses the Python that runs it (torch with CUDA, pybind11, setuptools, pytest) and nvcc; no network.
Writes DIR/gpu-DATE-COMMIT.json: device, versions, outcome of each step, and the figures.
KVLINK_COMMIT names the commit where there is no git. All steps together end within nine minutes,
or two with --quick: a step has what is left. --flashinfer installs wheels (of FlashInfer and what
it needs) into a folder of its own for the benchmarks. --dry-run needs no device: tests are
collected and benchmarks list their options, which shows that the commands are right. Exits with 1
when a step failed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Collected alone: the other test files need more than such a machine may have.
TEST_FILES = sorted(str(path) for path in (ROOT / "python_tests").glob("test_*_cuda.py"))
TESTS = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *TEST_FILES]
ARCHS = {(8, 0): "80", (9, 0): "90a", (10, 0): "100"}
LIMIT_S, QUICK_LIMIT_S = 530, 115
# Memory checks run long: a kernel of each kind.
CHECKED = "bad_ids or merge or (one_part and (plain or everything or float16))"
QUICK_CASES = {
    "attention": ["decode_8x4k_cuda", "decode_ragged_cuda", "prefill_1x4k_cuda"],
    "cache_ops": ["append", "relayout", "to_fp8_head_digest"],
}


def main() -> int:
    """Runs the steps; the later ones only if the build succeeded."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--quick", action="store_true", help="no compute-sanitizer, short figures")
    parser.add_argument("--flashinfer", nargs="+", default=[], metavar="WHEEL")
    parser.add_argument("--dry-run", action="store_true", help="without a device")
    arguments = parser.parse_args()
    end = time.monotonic() + (QUICK_LIMIT_S if arguments.quick else LIMIT_S)
    import torch

    if not torch.cuda.is_available() and not arguments.dry_run:
        print("run_gpu: torch sees no CUDA device here", file=sys.stderr)
        return 1
    capability = (9, 0) if arguments.dry_run else torch.cuda.get_device_capability()
    report: dict[str, Any] = {
        "device": "none" if arguments.dry_run else torch.cuda.get_device_name(),
        "capability": list(capability),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "steps": [],
        "figures": [],
    }
    arch = ARCHS.get(capability, "{}{}".format(*capability))
    steps = report["steps"]

    def add(name: str, command: list[str], **environment: str) -> str:
        steps.append(step(name, command, end - time.monotonic(), **environment))
        return str(steps[-1]["output"])

    if arguments.dry_run:
        add("tests", [sys.executable, *TESTS, "--collect-only"])
        add("memcheck", [sys.executable, *TESTS, "--collect-only", "-k", CHECKED])
    else:
        add("build", [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
            KVLINK_CUDA="1", KVLINK_CUDA_ARCHS=arch)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        if arguments.flashinfer:
            pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
            add("flashinfer", [*pip, "--target", folder, *arguments.flashinfer])
        path = os.pathsep.join([str(ROOT), folder])
        if steps[0]["exit_code"] == 0:
            if not arguments.dry_run:
                add("tests", [sys.executable, *TESTS])
            for family in ("attention", "cache_ops"):
                bench = [sys.executable, f"benchmarks/bench_{family}.py", "--device", "cuda"]
                bench += ["--json", "--seconds", "0.2" if arguments.quick else "0.5"]
                if arguments.quick:
                    bench += ["--case", *QUICK_CASES[family]]
                if arguments.dry_run:
                    bench.append("--help")
                output = add(f"benchmarks of {family}", bench, PYTHONPATH=path)
                lines = output.splitlines()
                report["figures"] += [json.loads(line) for line in lines if line.startswith("{")]
            sanitizer = shutil.which("compute-sanitizer")
            if sanitizer and not arguments.quick and not arguments.dry_run:
                small = [sys.executable, *TESTS, "-k", CHECKED]
                add("memcheck", [sanitizer, "--error-exitcode", "9", *small])
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"gpu-{report['date']}-{report['commit'][:12]}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    for each in steps:
        print(f"{each['name']}: exit code {each['exit_code']}, {each['seconds']} s")
    for each in report["figures"]:
        print(json.dumps(each))
    print(path)
    return 0 if all(each["exit_code"] == 0 for each in steps) else 1


def commit() -> str:
    """The commit that is measured; "unknown" where nothing tells."""
    given = os.environ.get("KVLINK_COMMIT")
    if given:
        return given
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return git.stdout.strip() or "unknown"


def step(name: str, command: list[str], limit_s: float, **environment: str) -> dict[str, Any]:
    """Runs one command with a bound; keeps the end of what it printed."""
    print(f"== {name}: {' '.join(command)}", flush=True)
    begin = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=max(limit_s, 1),
            check=False,
        )  # fmt: skip
        exit_code, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        exit_code, output = 124, (error.stdout or b"").decode(errors="replace")
    if exit_code != 0:
        print(output[-4000:], flush=True)
    seconds = round(time.monotonic() - begin, 1)
    return {"name": name, "exit_code": exit_code, "seconds": seconds, "output": output[-20000:]}


if __name__ == "__main__":
    sys.exit(main())
