"""tools/run_gpu.py as far as it goes without a device."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from emulated import Emulation, emulated_cuda

__all__ = ["emulated_cuda"]

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tool() -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("run_gpu", ROOT / "tools" / "run_gpu.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_dry_run(tmp_path: Path) -> None:
    command = [sys.executable, "tools/run_gpu.py", "--output", str(tmp_path), "--dry-run"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("gpu-*.json")
    report = json.loads(path.read_text())
    names = [each["name"] for each in report["steps"]]
    assert names == [
        "tests",
        "grid on cuda",
        "grid on triton",
        "memcheck",
        "synccheck",
        "rows from decode_1x32k",
    ]
    for at in (0, 3, 4):
        assert "test_attention_cuda.py" in report["steps"][at]["output"]
    assert "test_every_rope.py" in report["steps"][1]["output"]
    listed = [sys.executable, "benchmarks/gpu_rows.py", "--list"]
    rows = subprocess.run(
        listed, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    ).stdout.split()
    assert sorted({figure["case"] for figure in report["figures"]}) == sorted(rows)
    assert len(report["limits"]) == 1


def test_quick_takes_tests_of_every_kind(tool: Any, tmp_path: Path) -> None:
    report = tool.Report(tmp_path / "report.json", {})
    options = argparse.Namespace(quick=True, dry_run=True, flashinfer=[])
    tool.Run(report, options, time.monotonic(), str(tmp_path)).test()
    (step,) = report.found["steps"]
    assert step["exit_code"] == 0, step["output"]
    listed = Counter(re.findall(r"::(test_\w+)", step["output"]))
    files = (ROOT / "python_tests").glob("test_*_cuda.py")
    every = {name for file in files for name in re.findall(r"def (test_\w+)", file.read_text())}
    assert every - listed.keys() == {"test_large_batches_of_latent_pages"}
    taken, of = map(int, re.findall(r"(\d+)/(\d+) tests collected", step["output"])[0])
    assert taken < of * 0.4


def test_tests_of_a_device_are_right_as_python(emulated_cuda: Emulation) -> None:
    """Some of them, on emulated kernels: what a device would fail at before it computes."""
    some = "bad_ids or merge or (twins and bfloat16-int8) or (one_part and plain)"
    command = [
        sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "pretended_session",
        "-m", "gpu", "-k", some, *map(str, sorted((ROOT / "python_tests").glob("test_*_cuda.py"))),
    ]  # fmt: skip
    path = os.pathsep.join([str(ROOT), str(ROOT / "python_tests")])
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True,
        timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"\b[5-9] passed|\b\d\d passed", done.stdout), done.stdout
    assert "skipped" not in done.stdout


ROWS = """
import os, sys, time
for name in sys.argv[sys.argv.index("--row") + 1 :]:
    print('{"row": "%s"}' % name)
    if name == "dies":
        os._exit(3)
    if name == "hangs":
        time.sleep(1000)
    print('{"case": "%s", "ms": 1}' % name)
"""


def test_a_row_that_ends_its_process_costs_itself(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All figures before and after it are in the file as soon as they are known."""
    script = tmp_path / "rows.py"
    script.write_text(ROWS)
    names = ["first", "dies", "second", "hangs", "third"]
    monkeypatch.setattr(tool, "ROWS_SCRIPT", str(script))
    monkeypatch.setattr(tool, "SILENCE_S", 10)
    monkeypatch.setattr(tool.Run, "all_rows", lambda _self: names)
    report = tool.Report(tmp_path / "report.json", {})
    options = argparse.Namespace(quick=False, dry_run=False, flashinfer=[])
    tool.Run(report, options, time.monotonic(), str(tmp_path)).rows(["mla"])
    found = json.loads((tmp_path / "report.json").read_text())
    assert [figure["case"] for figure in found["figures"]] == ["first", "second", "third"]
    assert [step["exit_code"] for step in found["steps"]] == [3, 124, 0]
    assert [step["name"] for step in found["steps"]] == [
        "rows from first", "rows from second", "rows from third",
    ]  # fmt: skip
    assert report.failed()


TESTS = """
import os, time
import pytest
import told_tests

def test_passes():
    pass

def test_hangs():
    time.sleep(1000)

@pytest.mark.parametrize("n", range(5))
def test_ends(n):
    if n > 0:
        os._exit(3)

def test_fails():
    assert 1 == 2

def test_loses_the_device():
    told_tests._device_is_there = lambda: False
    assert 3 == 4

def test_is_last():
    pass
"""


def test_a_test_that_ends_its_process_costs_itself(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those behind it run in a new process, but for a function that ends one again and again."""
    file = tmp_path / "some_tests.py"
    file.write_text(TESTS)
    monkeypatch.setattr(tool, "TEST_SILENCE_S", 12)
    report = tool.Report(tmp_path / "report.json", {})
    options = argparse.Namespace(quick=False, dry_run=False, flashinfer=[])
    run = tool.Run(report, options, time.monotonic(), str(tmp_path))
    run.tests("some", [str(file)], 200)
    found = json.loads((tmp_path / "report.json").read_text())
    failed = {each["test"].partition("::")[2]: each["why"] for each in found["failed_tests"]}
    assert list(failed) == [
        "test_hangs", "test_ends[1]", "test_ends[2]", "test_fails", "test_loses_the_device",
    ]  # fmt: skip
    assert "hung" in failed["test_hangs"]
    assert "ended with 3" in failed["test_ends[2]"]
    assert "assert 1 == 2" in failed["test_fails"]
    assert "assert 3 == 4" in failed["test_loses_the_device"]
    assert [step["exit_code"] for step in found["steps"]] == [124, 3, 3, tool.DEVICE_LOST, 0]
    assert "1 passed" in found["steps"][-1]["output"]
    assert '{"test"' not in found["steps"][0]["output"]
    run.tests("none", [str(tmp_path / "absent.py")], 200)
    assert [step["exit_code"] for step in report.found["steps"][5:]] == [4]


def test_a_step_without_time_is_said_to_be_one(tool: Any, tmp_path: Path) -> None:
    """Later steps go on, and what a command printed before its end is kept."""
    report = tool.Report(tmp_path / "report.json", {})
    options = argparse.Namespace(quick=False, dry_run=False, flashinfer=[])
    run = tool.Run(report, options, time.monotonic(), str(tmp_path))
    endless = ["-c", "import time; print('begun', flush=True); time.sleep(1000)"]
    assert run.step("endless", endless, 10) == 124
    assert run.step("fails", ["-c", "raise SystemExit(7)"], 60) == 7
    assert run.step("passes", ["-c", "print('{\"no json')"], 60) == 0
    run.end_of_tests = time.monotonic()
    assert run.step("late", ["-c", ""], 60) == 124
    steps = json.loads((tmp_path / "report.json").read_text())["steps"]
    assert steps[0]["output"] == "begun\n"
    assert steps[3]["output"] == "no time left\n"
    assert report.line('{"no json') == {}
