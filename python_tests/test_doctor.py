"""`kvlink doctor`: complete, right about this machine, and never ill itself."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from kvlink import _C, doctor

SECTIONS = ["kvlink", "machine", "simd", "threads", "parts", "libraries", "memory", "paths"]
WITHOUT_TORCH = """
import sys
for name in ("torch", "numpy", "triton"):
    sys.modules[name] = None
from kvlink.doctor import main
sys.exit(main(sys.argv[1:]))
"""


def run(*arguments: str, **variables: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in doctor_variables()} | variables
    command = [sys.executable, "-c", WITHOUT_TORCH, *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    return result.stdout


def doctor_variables() -> tuple[str, ...]:
    return ("KVLINK_SIMD", "KVLINK_NUM_THREADS", "OMP_NUM_THREADS")


def test_json_needs_neither_torch_nor_numpy() -> None:
    found = json.loads(run("--json"))
    assert list(found) == SECTIONS
    assert not [name for name in SECTIONS if "error" in found[name]]
    assert found["simd"]["level"] == found["simd"]["supported"][-1]
    assert found["simd"]["supported"] == _C.supported_simd_levels()
    assert found["threads"] == {
        "count": len(os.sched_getaffinity(0)),
        "why": "the CPUs this process may run on",
    }
    assert found["parts"]["_C"]["file"] == _C.__file__
    cuda = found["parts"]["_cuda"]
    assert cuda["built"] == (importlib.util.find_spec("kvlink._cuda") is not None)
    assert cuda["architectures"] if cuda["built"] else cuda["why"]
    assert found["libraries"]["numpy"]
    assert found["paths"]["host_shm"]["available"]
    for path in ("cuda_ipc", "ucx", "nccl"):
        assert found["paths"][path]["available"] or found["paths"][path]["why"]


def test_pools_ask_for_huge_pages() -> None:
    """The host decides: with "never" there are none, else it gives them as long as it has some."""
    memory = json.loads(run("--json"))["memory"]
    for kind, setting in (("private", "enabled"), ("shared", "shmem_enabled")):
        given = memory[f"{kind}_pools_in_huge_pages"]
        assert given in ("yes", "no")
        segment = _C.Segment.create(8 << 20, kind == "shared")
        with open("/proc/self/smaps") as smaps:
            mapping = smaps.read().partition(f"{segment.address:x}-")[2]
        asked = "hg" in mapping.partition("VmFlags:")[2].split("\n")[0].split()
        assert asked == os.path.exists("/sys/kernel/mm/transparent_hugepage")
        if "[never]" in memory[f"transparent_hugepage_{setting}"]:
            assert given == "no"


def test_settings_are_told() -> None:
    found = json.loads(run("--json", KVLINK_SIMD="portable", OMP_NUM_THREADS="3,1"))
    assert (found["simd"]["level"], found["simd"]["why"]) == ("portable", "KVLINK_SIMD=portable")
    assert found["threads"] == {"count": 3, "why": "OMP_NUM_THREADS=3,1"}
    found = json.loads(run("--json", KVLINK_NUM_THREADS="5", OMP_NUM_THREADS="3"))
    assert found["threads"] == {"count": 5, "why": "KVLINK_NUM_THREADS=5"}


def test_bad_settings_are_reported_not_raised() -> None:
    found = json.loads(run("--json", KVLINK_SIMD="mmx", KVLINK_NUM_THREADS="many"))
    assert "KVLINK_SIMD: expected" in found["simd"]["error"]
    assert "got 'many'" in found["threads"]["error"]
    assert found["paths"]["host_shm"]["available"]


def test_text_has_every_section() -> None:
    lines = run().splitlines()
    assert [line for line in lines if not line.startswith(" ")] == SECTIONS
    text = "\n".join(lines)
    assert "host_shm  available: " in text
    assert "nccl      not available: " in text


def test_a_probe_that_fails_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(doctor, "_try_socket", refuse)
    monkeypatch.setattr(doctor, "_simd", refuse)
    found = doctor.report()
    assert found["simd"] == {"error": "PermissionError: [Errno 1] Operation not permitted"}
    assert not found["paths"]["host_shm"]["available"]
    assert found["paths"]["host_shm"]["why"].startswith("abstract UNIX sockets")
    assert "not available: abstract UNIX sockets" in doctor._text(found)
