"""`import kvlink`: quick, and without the heavy libraries."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import kvlink

LIMIT_S = 0.3
LIMIT_BYTES = 6 << 20  # of kvlink._C, all types and SIMD levels: 4.2 MB in November 2026


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    return result.stdout


def start_cpu_s(code: str) -> float:
    """CPU time of a start, so that a loaded machine does not count; the least of several."""
    times = []
    for _ in range(8):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run(code)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    return min(times)


def test_import_is_quick() -> None:
    extra = start_cpu_s("import kvlink") - start_cpu_s("pass")
    assert extra < LIMIT_S, f"import kvlink takes {extra:.3f} s of CPU time"


def test_the_extension_stays_small() -> None:
    """Another type or level must not cost another copy of everything."""
    assert Path(kvlink._C.__file__).stat().st_size < LIMIT_BYTES


def test_import_loads_no_heavy_library() -> None:
    code = "import json, sys, kvlink; print(json.dumps(sorted(sys.modules)))"
    loaded = set(json.loads(run(code)))
    assert "kvlink._C" in loaded
    heavy = {"torch", "numpy", "cupy", "triton", "transformers", "cryptography", "kvlink._cuda"}
    assert not loaded & heavy


def test_import_loads_no_cuda_library() -> None:
    maps = run("import kvlink; print(open('/proc/self/maps').read())")
    assert "/_C." in maps
    assert "libcuda" not in maps
    assert "libtorch" not in maps


@pytest.mark.parametrize("name", kvlink.__all__)
def test_every_public_name_can_be_had_without_torch(name: str) -> None:
    run(f"import sys; sys.modules['torch'] = None; from kvlink import {name}")


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="'kvlink' has no attribute 'nothing'"):
        kvlink.nothing  # type: ignore[attr-defined] # noqa: B018


def test_operators_work_without_torch() -> None:
    code = """
import sys
sys.modules["torch"] = None
import numpy as np
import kvlink
layout = kvlink.KVLayout.nhd(num_kv_heads=1, head_dim=32, page_size=4, dtype="float32")
pool = kvlink.KVPool.create(layout, num_layers=1, num_pages=2)
k = np.random.default_rng(0).standard_normal((5, 1, 32), np.float32)
kvlink.append_kv(k, k, pool, 0, np.arange(5))
assert (np.from_dlpack(pool.k(0)).reshape(8, 1, 32)[:5] == k).all()
"""
    run(code)
