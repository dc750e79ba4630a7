"""The type stubs say what the built extension says."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("module", ["kvlink._C", "kvlink._cuda"])
def test_stub_is_that_of_the_built_module(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        assert module == "kvlink._cuda"
        pytest.skip("kvlink._cuda is not built")
    result = subprocess.run(
        [sys.executable, "tools/make_stubs.py", "--check", module],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 0, f"run `make stubs`\n{result.stdout}{result.stderr}"


def test_a_stub_that_differs_is_noticed(tmp_path: Path) -> None:
    script = tmp_path / "tools" / "make_stubs.py"
    script.parent.mkdir()
    script.write_text((ROOT / "tools" / "make_stubs.py").read_text())
    stub = (ROOT / "kvlink" / "_C.pyi").read_text()
    (tmp_path / "kvlink").mkdir()
    (tmp_path / "kvlink" / "_C.pyi").write_text(stub.replace("count: int", "number: int"))
    result = subprocess.run(
        [sys.executable, str(script), "--check", "kvlink._C"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 1, result.stderr
    assert "-def set_num_threads(number: int)" in result.stdout
