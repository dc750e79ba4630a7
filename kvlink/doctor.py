"""`kvlink doctor`: what this build and this machine can do, and why not more. Needs no torch."""

from __future__ import annotations

import argparse
import array
import ctypes
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import secrets
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any

from kvlink._memory import available_memory, group_limit, physical_memory

_LIBRARIES = ("numpy", "torch", "triton", "safetensors", "tokenizers", "transformers")


def report() -> dict[str, Any]:
    """Everything `kvlink doctor --json` prints. A part that cannot be found out has an "error"."""
    return {
        name: _guarded(section)
        for name, section in (
            ("kvlink", _package),
            ("machine", _machine),
            ("simd", _simd),
            ("threads", _threads),
            ("parts", _parts),
            ("libraries", _libraries),
            ("memory", _memory),
            ("paths", _paths),
        )
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser("kvlink doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    peer = parser.add_argument_group(
        "asking a peer", "connects to an endpoint, and tells which path a link to it uses and why"
    )
    peer.add_argument("--peer", metavar="ADDRESS", help="its address as text, or a file with it")
    peer.add_argument(
        "--secret-file", metavar="FILE", help="the secret that it was made with, byte for byte"
    )
    peer.add_argument("--require", metavar="PATH", help="refuse any other path (host_shm, ucx)")
    peer.add_argument("--timeout", type=float, default=5.0, metavar="S", help="default: 5")
    arguments = parser.parse_args(argv)
    if arguments.peer is not None:
        if arguments.secret_file is None:
            parser.error("--peer: name the --secret-file, too")
        from kvlink import doctor_peer

        return doctor_peer.main(
            arguments.peer, arguments.secret_file, arguments.require, arguments.timeout,
            arguments.json,
        )  # fmt: skip
    if arguments.secret_file is not None or arguments.require is not None:
        parser.error("--secret-file, --require: name the --peer, too")
    found = report()
    print(json.dumps(found, indent=2) if arguments.json else _text(found))
    return 0


def _guarded(probe: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return probe()
    except Exception as error:  # a doctor that falls ill helps nobody
        return {"error": f"{type(error).__name__}: {error}"}


def _package() -> dict[str, Any]:
    try:
        version = importlib.metadata.version("kvlink")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed (run from its source)"
    return {"version": version, "location": os.path.dirname(os.path.abspath(__file__))}


def _machine() -> dict[str, Any]:
    found = {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {platform.release()}",
        "libc": " ".join(platform.libc_ver()),
        "architecture": platform.machine(),
        "cpu": platform.processor() or "unknown",
        "cpus": os.cpu_count(),
        "cpus_allowed": len(os.sched_getaffinity(0)),
    }
    try:
        with open("/proc/cpuinfo") as lines:
            models = [line.partition(":")[2].strip() for line in lines if "model name" in line]
        found["cpu"] = models[0] if models else found["cpu"]
    except OSError:
        pass
    return found


def _simd() -> dict[str, Any]:
    from kvlink import _C

    wanted = os.environ.get("KVLINK_SIMD")
    supported = _C.supported_simd_levels()
    why = f"KVLINK_SIMD={wanted}" if wanted else "the highest that this build has and this CPU runs"
    return {"level": _C.simd_level(), "supported": supported, "why": why}


def _threads() -> dict[str, Any]:
    from kvlink import _C

    names = [name for name in ("KVLINK_NUM_THREADS", "OMP_NUM_THREADS") if os.environ.get(name)]
    why = f"{names[0]}={os.environ[names[0]]}" if names else "the CPUs this process may run on"
    return {"count": _C.num_threads(), "why": why}


def _parts() -> dict[str, Any]:
    from kvlink import _C

    return {"_C": {"built": True, "file": _C.__file__}, "_cuda": _guarded(_cuda)}


def _cuda() -> dict[str, Any]:
    if importlib.util.find_spec("kvlink._cuda") is None:
        return {"built": False, "why": "nvcc was not found, or not wanted, when kvlink was built"}
    module = importlib.import_module("kvlink._cuda")
    archs, runtime = module.architectures.split(";"), module.runtime_version
    return {
        "built": True,
        "file": module.__file__,
        "architectures": [f"sm_{arch}" for arch in archs],
        "runtime": f"{runtime // 1000}.{runtime % 1000 // 10}",
        "devices": module.device_count() or f"none ({module.unavailable_reason()})",
    }


def _libraries() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _memory() -> dict[str, Any]:
    soft, hard = (
        "unlimited" if limit == resource.RLIM_INFINITY else limit
        for limit in resource.getrlimit(resource.RLIMIT_MEMLOCK)
    )
    found: dict[str, Any] = {
        "page_bytes": os.sysconf("SC_PAGE_SIZE"),
        "physical_bytes": physical_memory(),
        "control_group_bytes": group_limit() or "no limit",
        "available_bytes": available_memory(),
        "lockable_bytes": soft,
        "lockable_bytes_hard": hard,
    }
    for name in ("enabled", "shmem_enabled"):
        try:
            with open(f"/sys/kernel/mm/transparent_hugepage/{name}") as setting:
                found[f"transparent_hugepage_{name}"] = setting.read().strip()
        except OSError:
            found[f"transparent_hugepage_{name}"] = "unknown"
    for kind, shared in (("private", False), ("shared", True)):
        try:
            found[f"{kind}_pools_in_huge_pages"] = "yes" if pools_are_huge(shared) else "no"
        except Exception as error:
            found[f"{kind}_pools_in_huge_pages"] = f"unknown: {type(error).__name__}: {error}"
    return found


def pools_are_huge(shared: bool) -> bool:
    """Whether the host gives huge pages to pools: makes some memory as pools do, and looks."""
    from kvlink import _C

    num_bytes = 8 << 20
    segment = _C.Segment.create(num_bytes, shared)
    ctypes.memset(segment.address, 1, num_bytes)
    with open("/proc/self/smaps") as smaps:
        mapping = smaps.read().partition(f"{segment.address:x}-")[2].partition("VmFlags")[0]
    field = "ShmemPmdMapped" if shared else "AnonHugePages"
    return int(mapping.partition(f"{field}:")[2].split()[0]) > 0


def _paths() -> dict[str, Any]:
    return {
        "host_shm": _guarded(_host_shm),
        "cuda_ipc": {"available": False, "why": "this version of kvlink has no such path"},
        "ucx": _guarded(_ucx),
        "nccl": {"available": False, "why": "this version of kvlink has no such path"},
    }


def _host_shm() -> dict[str, Any]:
    """Tries what the path is made of."""
    for what, probe in (
        ("shared memory without a name (memfd)", _try_segment),
        ("abstract UNIX sockets that carry descriptors", _try_socket),
    ):
        try:
            probe()
        except Exception as error:
            return {"available": False, "why": f"{what}: {type(error).__name__}: {error}"}
    if importlib.util.find_spec("kvlink.transfer") is None:
        return {"available": False, "why": "kvlink.transfer is missing from this installation"}
    return {"available": True, "why": "memfd and abstract UNIX sockets work"}


def _ucx() -> dict[str, Any]:
    return dict(importlib.import_module("kvlink.transfer.paths.ucx").report())


def _try_segment() -> None:
    from kvlink import _C

    segment = _C.Segment.create(4096, True)
    peer = _C.Segment.attach(segment.fd, 4096)
    ctypes.memset(segment.address, 7, 1)
    if ctypes.string_at(peer.address, 1) != b"\x07":
        raise OSError("a second mapping does not show what the first one wrote")


def _try_socket() -> None:
    name = f"\0kvlink-doctor-{secrets.token_hex(8)}"
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        for each in (server, client):
            each.settimeout(2.0)
        server.bind(name)
        server.listen(1)
        client.connect(name)
        peer, _ = server.accept()
        with peer:
            peer.settimeout(2.0)
            rights = array.array("i", [client.fileno()])
            client.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
            data, fds, _, _ = socket.recv_fds(peer, 1, 1)
            for fd in fds:
                os.close(fd)
            if data != b"x" or len(fds) != 1:
                raise OSError("a descriptor sent through a socket did not arrive")


def _text(found: dict[str, Any]) -> str:
    lines = []
    for section, values in found.items():
        lines.append(section)
        width = max(len(key) for key in values)
        for key, value in values.items():
            lines.append(f"  {key:<{width}}  {_value(value)}")
    return "\n".join(lines)


def _value(value: Any) -> str:
    if value is None:
        return "not installed"
    if isinstance(value, list):
        return ", ".join(str(each) for each in value)
    if not isinstance(value, dict):
        return str(value)
    flag = next((key for key in ("available", "built") if key in value), None)
    if flag is None:
        return "; ".join(f"{key}: {_value(each)}" for key, each in value.items())
    rest = [
        str(each) if key in ("why", "file") else f"{key} {_value(each)}"
        for key, each in value.items()
        if key != flag
    ]
    return f"{flag if value[flag] else f'not {flag}'}: {'; '.join(rest)}"


if __name__ == "__main__":
    sys.exit(main())
