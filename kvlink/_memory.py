"""How much memory this process may still take: the machine's, and that of its control groups."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")
# By controller: the mount below /sys/fs/cgroup, and the files that have limit and use.
_FILES = {
    "": ("", "memory.max", "memory.current"),  # version 2
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
}
_RECLAIMABLE = ("inactive_file", "total_inactive_file")  # counted as used, given back when needed


def available_memory(root: Path = _ROOT) -> int:
    """Bytes that new allocations could get. `root`: where /proc and /sys are, for tests."""
    found = [limit - used for limit, used in _groups(root)]
    lines = _read(root / "proc/meminfo").splitlines()
    free = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    found.append(int(free[0]) * 1024 if free else physical_memory())
    return max(0, min(found))


def group_limit(root: Path = _ROOT) -> int | None:
    """Bytes that the tightest control group of this process may have; None where none has less
    than the machine."""
    limits = [limit for limit, _ in _groups(root)]
    return min(limits) if limits else None


def physical_memory() -> int:
    """Bytes of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _groups(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, bytes in use that cannot be reclaimed) of each group above this process that has a
    limit. In a container the path may lead beyond what is mounted there: then its root is ours."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for controller in controllers.split(","):
            if controller not in _FILES:
                continue
            mount, limit_name, used_name = _FILES[controller]
            base = root / "sys/fs/cgroup" / mount
            group = base / path.lstrip("/")
            for folder in (group, *group.parents):
                if base not in (folder, *folder.parents):
                    break
                limit, used = _read(folder / limit_name).strip(), _read(folder / used_name).strip()
                if limit.isdigit() and used.isdigit() and int(limit) < physical_memory():
                    stat = dict(each.split() for each in _read(folder / "memory.stat").splitlines())
                    cache = max(int(stat.get(name, 0)) for name in _RECLAIMABLE)
                    yield int(limit), max(0, int(used) - cache)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return ""
