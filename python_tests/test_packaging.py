"""The wheel and the sdist hold what they must, and work where there is only numpy. They are built
where there is only a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
# What is packed matters here, not its speed. A C++ compiler is enough: no CUDA, no headers of UCX.
QUICK_BUILD = {"KVLINK_CUDA": "0", "KVLINK_UCX_HOME": "0", "CXXFLAGS": "-O0"}
USE = """
import sys
import numpy as np
import kvlink
assert not any(part.startswith("torch") for part in sys.modules)
assert sys.prefix in kvlink.__file__, kvlink.__file__
layout = kvlink.KVLayout.hnd(num_kv_heads=2, head_dim=32, page_size=4, dtype="float16")
pool = kvlink.KVPool.create(layout, num_layers=1, num_pages=4, shared=True)
pages = kvlink.PageAllocator(4, 4).allocate(2)
rng = np.random.default_rng(0)
k, v = rng.standard_normal((2, 5, 2, 32), np.float32)
kvlink.append_kv(k, v, pool, 0, kvlink.PageAllocator(4, 4).slots(pages, 0, 5))
q = rng.standard_normal((1, 2, 32), np.float32)
out = kvlink.paged_attention(q, pool, 0, pages[None], np.array([5], np.int32))
weights = np.exp(np.einsum("hd,thd->ht", q[0], k) * 32**-0.5)
weights /= weights.sum(1, keepdims=True)
assert np.abs(out[0] - np.einsum("ht,thd->hd", weights, v)).max() < 5e-3
print("works with numpy", np.__version__)
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def run(*command: object, **options: object) -> str:
    result = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=900, **options
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that is built from it and nothing else."""
    folder = tmp_path_factory.mktemp("dist")
    environment = os.environ | QUICK_BUILD
    run(
        sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT,
        env=environment, cwd=folder,
    )  # fmt: skip
    return folder


def files_of(archive: Path) -> set[str]:
    if archive.suffix == ".whl":
        return set(zipfile.ZipFile(archive).namelist())
    with tarfile.open(archive) as tar:
        return {name.partition("/")[2] for name in tar.getnames()}


def empty_environment(folder: Path) -> Path:
    """A new environment that sees this one's numpy, and nothing else of it; its Python."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    for source in Path(np.__file__).parents[1].iterdir():
        if source.name.startswith("numpy"):
            (Path(site) / source.name).symlink_to(source)
    return python


def test_wheel_and_sdist_hold_what_they_must(dist: Path) -> None:
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    packaged = {
        str(path.relative_to(ROOT))
        for pattern in ("*.py", "*.pyi", "py.typed")
        for path in (ROOT / "kvlink").rglob(pattern)
    }
    assert packaged <= files_of(wheel)
    assert [name for name in files_of(wheel) if name.startswith("kvlink/_C.")]
    assert not [name for name in files_of(wheel) if name.startswith(("python_tests", "csrc"))]
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert packaged | sources | {"LICENSE", "README.md", "setup.py"} <= files_of(sdist)
    assert not [name for name in files_of(sdist) if name.endswith((".so", ".o"))]


def test_the_wheel_installs_into_an_empty_environment(dist: Path, tmp_path: Path) -> None:
    python = empty_environment(tmp_path / "venv")
    (wheel,) = dist.glob("*.whl")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    install = ("pip", "install", "--no-deps", "--no-index", wheel)
    run(python, "-m", *install, env=environment, cwd=tmp_path)
    assert "works with numpy" in run(python, "-c", USE, env=environment, cwd=tmp_path)
    command = tmp_path / "venv" / "bin" / "kvlink"
    told = run(command, "doctor", env=environment, cwd=tmp_path)
    assert "host_shm  available" in told
    assert "ucx       not available: kvlink was built without UCX's headers" in told
