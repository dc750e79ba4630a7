"""The Triton twins: in the interpreter, in a process of its own; what needs no kernel."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

import kvlink
from kvlink import attention
from kvlink.backends import TRITON_DEVICES
from kvlink.errors import Unsupported

HERE = Path(__file__).parent
FILES = sorted([*HERE.glob("interpreted/test_*.py"), *HERE.glob("operators/test_*.py")])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_interpreted(file: Path) -> None:
    """TRITON_INTERPRET is read when kernels are defined, and must not leak into other tests."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(file)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert re.search(r"\d+ passed", result.stdout)
    assert not re.search(r"skipped|deselected", result.stdout)


def test_on_the_cpu_the_device_is_what_is_missing() -> None:
    assert {"cuda"} == TRITON_DEVICES
    layout = kvlink.KVLayout.nhd(num_kv_heads=1, head_dim=8, page_size=4, dtype="float32")
    pool = kvlink.KVPool.create(layout, num_layers=1, num_pages=1)
    q = k = torch.zeros(1, 1, 8)
    for call in (
        lambda: kvlink.paged_attention(q, pool, 0, [[0]], [1], backend="triton"),
        lambda: kvlink.append_kv(k, k, pool, 0, torch.zeros(1).long(), backend="triton"),
        lambda: kvlink.digest_pages(pool, [0], num_tokens=1, backend="triton"),
        lambda: kvlink.relayout_pages(pool, [0], pool, [0], num_tokens=1, backend="triton"),
        lambda: kvlink.merge_states([q], [q[..., 0].contiguous()], backend="triton"),
    ):
        with pytest.raises(Unsupported, match=r"triton lacks device cpu \(it has cuda\)"):
            call()


# An editable install would find kvlink._C for the copy, too.
ALONE = """
import sys
sys.meta_path[:] = [each for each in sys.meta_path if "__editable__" not in repr(each)]
import torch
import kvlink
import kvlink.triton as ops

rows = torch.randn(8, 1, 16)
k, v = torch.zeros(2, 3, 4, 1, 16)
pool = ops.TensorPool([k], [v])
slots = torch.tensor([4, 5, 6, 7, 0, 1, 2, -1])
ops.append_kv(rows, rows + 1, pool, 0, slots)
table, lens = torch.tensor([[1, 0]]).int(), torch.tensor([7]).int()
out, lse = ops.paged_attention(rows[:1], pool, 0, table, lens, return_lse=True)
scores = (rows[:7, 0] @ rows[0, 0]) * 0.25
wanted = scores.softmax(0) @ (rows[:7, 0] + 1)
assert torch.allclose(out[0, 0], wanted, atol=1e-5), (out, wanted)
merged, _ = ops.merge_states(out, lse, out, lse)
assert torch.allclose(merged, out, atol=1e-6)
half = torch.zeros(2, 3, 7, 1, 16, dtype=torch.bfloat16)
other = ops.TensorPool([half[0]], [half[1]])
moved = ops.relayout_pages(pool, [1, 0], other, [2], num_tokens=7, digest=True)
assert torch.equal(half[1, 2], (rows[:7] + 1).bfloat16())
assert moved == ops.digest_pages(other, [2], num_tokens=7), moved
ops.copy_pages(other, [2], [0])
assert torch.equal(half[:, 0], half[:, 2])
rope = (torch.tensor([[0.0] * 8 + [1.0] * 8]), torch.zeros(8).long(), False, 0)  # a quarter turn
turned = ops.apply_rope(rows, rope)
assert torch.equal(turned, torch.cat([-rows[..., 8:], rows[..., :8]], -1))
ops.append_kv(rows, rows, pool, 0, slots, rope=rope)
assert torch.equal(k[1, :, 0], turned[:4, 0])
assert "kvlink._C" not in sys.modules
assert kvlink.KVLayout.nhd(num_kv_heads=1, head_dim=16, page_size=4, dtype="int8").page_size == 4
try:
    kvlink.append_kv
except ImportError as error:
    print(error)
"""


def test_without_anything_compiled(tmp_path: Path) -> None:
    shutil.copytree(
        Path(kvlink.__file__).parent, tmp_path / "kvlink", ignore=shutil.ignore_patterns("*.so")
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", ALONE], env=environment, cwd=tmp_path, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("kvlink.append_kv needs kvlink._C, which is not built here")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    backend = next(each for each in attention.BACKENDS if each.name == "triton")
    assert backend.missing("cuda", "float16", "int8", ()) == ["package 'triton'"]


def test_an_older_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(triton, "knobs")
    file = Path(kvlink.__file__).parent / "triton" / "values.py"
    with pytest.raises(ImportError, match=r"kvlink.triton needs triton 3.4 or later; got \d"):
        runpy.run_path(str(file))
