"""The short examples run as they are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.two_process
@pytest.mark.timeout(90)
def test_reshard() -> None:
    run = subprocess.run(
        [sys.executable, ROOT / "examples" / "reshard.py"],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "100 tokens arrived, verified, at both decode ranks (exit 0)" in run.stdout
    assert "num_parts=4, num_heads=2, rows=1600" in run.stdout
