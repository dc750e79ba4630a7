"""The short examples run as they are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def example(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "examples" / name, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.mark.two_process
@pytest.mark.timeout(90)
def test_reshard() -> None:
    run = example("reshard.py")
    assert run.returncode == 0, run.stderr
    assert "100 tokens arrived, verified, at both decode ranks (exit 0)" in run.stdout
    assert "num_parts=4, num_heads=2, rows=1600" in run.stdout


@pytest.mark.two_process
@pytest.mark.timeout(90)
def test_the_demo_goes_on_behind_lines_that_are_wrong(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt_token_ids": [1, 2]}\nno JSON\n[3]\n{"prompt": 4}\n')
    run = example("demo.py", "--prompts", prompts, "--max-new-tokens", 2)
    assert (run.returncode, run.stderr) == (0, "")
    assert "requests  1 served, 3 refused or failed" in run.stdout
    assert "no JSON|" in run.stdout


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("reshard.py", ["--ranks=4"], "unrecognized arguments: --ranks=4"),
        ("demo.py", ["--promts=x"], "unrecognized arguments: --promts=x"),
        ("demo.py", ["--max-new-tokens=0"], "argument --max-new-tokens"),
        ("demo.py", ["--temperature=-1"], "argument --temperature"),
    ],
)
def test_wrong_arguments_are_named(name: str, arguments: list[str], reason: str) -> None:
    run = example(name, *arguments)
    assert run.returncode == 2
    assert reason in run.stderr
