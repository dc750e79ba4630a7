"""How much memory a pool may take, as files of a made-up machine have it."""

import pytest

from kvlink._memory import available_memory, group_limit, physical_memory

MIB = 1 << 20


@pytest.fixture
def machine(tmp_path):
    """A machine with 800 MiB free; `write(path, text)` adds a file."""

    def write(path, text):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    write("proc/meminfo", f"MemTotal: 9 kB\nMemAvailable: {800 * 1024} kB\n")
    return tmp_path, write


def test_without_groups_the_machine_decides(machine):
    root, write = machine
    assert available_memory(root) == 800 * MIB
    write("proc/self/cgroup", "0::/a\n")
    write("sys/fs/cgroup/a/memory.max", "max\n")
    write("sys/fs/cgroup/a/memory.current", f"{MIB}\n")
    assert available_memory(root) == 800 * MIB
    assert group_limit(root) is None


def test_the_tightest_group_above_decides(machine):
    root, write = machine
    write("proc/self/cgroup", "0::/a/b\n")
    for folder, limit, used in (("a/b", 700, 100), ("a", 500, 120), ("", 750, 10)):
        write(f"sys/fs/cgroup/{folder}/memory.max", f"{limit * MIB}\n")
        write(f"sys/fs/cgroup/{folder}/memory.current", f"{used * MIB}\n")
    write("sys/fs/cgroup/a/memory.stat", f"anon 5\ninactive_file {20 * MIB}\n")
    assert available_memory(root) == 400 * MIB  # 500 less 120, of which 20 can be reclaimed
    assert group_limit(root) == 500 * MIB


def test_groups_of_the_first_version(machine):
    root, write = machine
    write("proc/self/cgroup", "5:cpu,cpuacct:/x\n4:memory:/x\n0::/x\n")
    write("sys/fs/cgroup/memory/x/memory.limit_in_bytes", f"{300 * MIB}\n")
    write("sys/fs/cgroup/memory/x/memory.usage_in_bytes", f"{350 * MIB}\n")
    assert available_memory(root) == 0
    # No limit is a number there, larger than any machine.
    write("sys/fs/cgroup/memory/x/memory.limit_in_bytes", "9223372036854771712\n")
    assert available_memory(root) == 800 * MIB


def test_a_container_sees_its_group_as_the_root(machine):
    root, write = machine
    write("proc/self/cgroup", "0::/docker/123\n")
    write("sys/fs/cgroup/memory.max", f"{200 * MIB}\n")
    write("sys/fs/cgroup/memory.current", f"{50 * MIB}\n")
    assert available_memory(root) == 150 * MIB


def test_this_machine():
    assert 0 < available_memory() <= physical_memory()
