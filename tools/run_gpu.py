"""Everything there is to know of a GPU in one go: builds for it, tests, checks memory, measures.

    python tools/run_gpu.py --output DIR [--quick]

Uses the Python that runs it (torch with CUDA, pybind11, setuptools, pytest) and nvcc; no network.
Writes DIR/gpu-DATE-COMMIT.json: device, versions, outcome of each step, and the figures.
KVLINK_COMMIT names the commit where there is no git. Exits with 1 when a step failed.
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
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Collected alone: the other test files need more than such a machine may have.
TEST_FILES = sorted(str(path) for path in (ROOT / "python_tests").glob("test_*_cuda.py"))
TESTS = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *TEST_FILES]
ARCHS = {(8, 0): "80", (9, 0): "90a", (10, 0): "100"}
STEP_LIMIT_S = 400


def main() -> int:
    """Runs the steps; the later ones only if the build succeeded."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--quick", action="store_true", help="no compute-sanitizer, short figures")
    arguments = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("run_gpu: torch sees no CUDA device here", file=sys.stderr)
        return 1
    capability = torch.cuda.get_device_capability()
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
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
    steps.append(step("build", [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
                      KVLINK_CUDA="1", KVLINK_CUDA_ARCHS=arch))  # fmt: skip
    if steps[0]["exit_code"] == 0:
        steps.append(step("tests", [sys.executable, *TESTS]))
        sanitizer = shutil.which("compute-sanitizer")
        if sanitizer and not arguments.quick:
            small = [*TESTS, "-k", "bad_ids or float16 or merge"]
            steps.append(
                step("memcheck", [sanitizer, "--error-exitcode", "9", sys.executable, *small])
            )
        seconds = "0.2" if arguments.quick else "1"
        for family in ("cache_ops", "attention"):
            bench = [sys.executable, f"benchmarks/bench_{family}.py", "--device", "cuda", "--json"]
            steps.append(step(f"benchmarks of {family}", [*bench, "--seconds", seconds]))
            lines = steps[-1]["output"].splitlines()
            report["figures"] += [json.loads(line) for line in lines if line.startswith("{")]
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


def step(name: str, command: list[str], **environment: str) -> dict[str, Any]:
    """Runs one command with a bound; keeps the end of what it printed."""
    print(f"== {name}: {' '.join(command)}", flush=True)
    begin = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=STEP_LIMIT_S,
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
