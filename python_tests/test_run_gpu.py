"""tools/run_gpu.py as far as it goes without a device."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_dry_run(tmp_path: Path) -> None:
    command = [sys.executable, "tools/run_gpu.py", "--output", str(tmp_path), "--dry-run"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("gpu-*.json")
    report = json.loads(path.read_text())
    names = [each["name"] for each in report["steps"]]
    assert names == ["tests", "memcheck", "benchmarks of attention", "benchmarks of cache_ops"]
    for each in report["steps"][:2]:
        assert "test_attention_cuda.py" in each["output"]
    assert "prefill_1x16k_cuda" in report["steps"][2]["output"]
