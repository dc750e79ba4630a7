"""What a process does to its endpoints: it forks, may open only few files, or has little shared
memory."""

import shutil
import subprocess
import sys

import pytest

PATHS = ["host_shm", "ucx"]

COMMON = """
import gc, os, resource, sys
import kvlink
from kvlink.transfer import Endpoint, LinkClosed, PathUnavailable, TransferError

path = sys.argv[1]
layout = kvlink.KVLayout.nhd(num_kv_heads=2, head_dim=64, page_size=16, dtype="float32")

def pair():
    ends = [Endpoint(name, secret=b"s" * 32) for name in ("owner", "sender")]
    for end in ends:
        end.register(kvlink.KVPool.create(layout, num_layers=2, num_pages=16, shared=True))
    return ends

def move(owner, link):
    grant = owner.grant([0, 1], 20)
    transfer = link.push([3, 4], grant.to_bytes())
    assert grant.wait(30.0).rows == 160
    transfer.wait_arrived(30.0)
"""

FORK = """
def refuses(call):
    try:
        call()
    except LinkClosed:
        return
    raise AssertionError(call)

def in_child():
    global link, transfer, grant, lease, owner, sender
    for call in (
        lambda: owner.grant([9], 5), lambda: owner.accept(1.0), lambda: owner.metrics(),
        lambda: sender.connect(owner.address), lambda: sender.unregister(pool),
        lambda: link.push([3, 4], token), lambda: link.query(grant.transfer_id),
        lambda: link.wait_connected(1.0), lambda: link.metrics(),
        lambda: transfer.push_layer(1), lambda: transfer.wait_arrived(1.0), transfer.cancel,
        lambda: grant.wait(1.0), grant.revoke, lambda: grant.wait_released(1.0),
    ):
        refuses(call)
    if lease is not None:
        refuses(lease.check)
        lease.release()
    link.close()
    owner.close()
    sender.close()
    del link, transfer, grant, lease, owner, sender
    gc.collect()

owner, sender = pair()
link = sender.connect(owner.address, require=path)
pool = next(iter(sender._regions.all().values())).pool
offer = sender.offer([8], 10)
lease = owner.connect(sender.address).adopt(offer.to_bytes()) if path == "host_shm" else None
grant = owner.grant([5, 6], 20)
token = grant.to_bytes()
transfer = link.begin([3, 4], token)
transfer.push_layer(0)
pid = os.fork()
if pid == 0:
    try:
        in_child()
        if path == "host_shm":  # UCX's threads are in the parent alone
            owner, sender = pair()
            move(owner, sender.connect(owner.address, require=path))
        else:
            assert "fork" in pair()[0]._peers.missing("ucx")
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(1)
    if sys.argv[2] == "exit":
        sys.exit(0)
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
transfer.push_layer(1)
transfer.finish()
assert grant.wait(30.0).rows == 160
transfer.wait_arrived(30.0)
if lease is not None:
    lease.check()
    lease.release()
    offer.wait_released(30.0)
move(owner, link)
sender.close()
owner.close()
"""

FEW = """
owner, sender = pair()
link = sender.connect(owner.address, require=path)
move(owner, link)
in_use = len(os.listdir("/proc/self/fd")) - 1
for spare in range(0, 14, 2):
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + spare, 4096))
    links = []
    try:
        while len(links) < 20:
            links.append(sender.connect(owner.address, require=path, timeout=3.0))
        raise AssertionError("no limit was met")
    except TransferError as error:
        print(type(error).__name__, error)
    move(owner, link)
    while links:
        links.pop().close()
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
move(owner, sender.connect(owner.address, require=path))
sender.close()
owner.close()
"""

LITTLE = """
links = []
for _ in range(8):
    owner, sender = pair()
    links.append((owner, sender, sender.connect(owner.address, require=path)))
    move(owner, links[-1][2])
"""

FULL = """
owner, sender = pair()
link = sender.connect(owner.address, require=path)
found = os.statvfs("/dev/shm")
with open("/dev/shm/other", "wb") as other:
    os.posix_fallocate(other.fileno(), 0, found.f_bavail * found.f_frsize - (41 << 19))
    try:
        sender.connect(owner.address, require=path)
        raise AssertionError("a link was made")
    except TransferError as error:
        assert "needs 64 MiB free in /dev/shm, there are 20" in str(error), error
    move(owner, link)
    other.truncate(0)
    move(owner, sender.connect(owner.address, require=path))
"""

MOUNT = 'mount -t tmpfs -o size="$0" tmpfs /dev/shm && exec "$@"'


def run(script: str, *arguments: str, before: tuple[str, ...] = ()) -> str:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", COMMON + script]
    done = subprocess.run(
        [*before, *command, *arguments], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


@pytest.mark.two_process
@pytest.mark.parametrize("how", ["_exit", "exit"])
@pytest.mark.parametrize("path", PATHS)
def test_a_forked_child_is_told_whose_the_endpoints_are_and_changes_nothing(path, how):
    run(FORK, path, how)


@pytest.mark.parametrize("path", PATHS)
def test_a_link_for_which_there_are_too_few_descriptors_is_refused_and_others_go_on(path):
    assert run(FEW, path)


@pytest.mark.two_process
@pytest.mark.parametrize(
    ("size", "script"), [("16m", LITTLE), ("20m", LITTLE), ("35m", LITTLE), ("600m", FULL)]
)
def test_little_shared_memory_ends_nobody(size, script):
    """UCX 1.22 itself ends the process where a worker's memory only just does not fit."""
    mount = ("unshare", "--mount", "sh", "-c", MOUNT, size)
    if not shutil.which("unshare") or subprocess.run([*mount, "true"], check=False).returncode:
        pytest.skip("a file system of its own cannot be mounted here")
    run(script, "ucx", before=mount)
