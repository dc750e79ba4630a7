"""Two network namespaces joined by a veth pair: two hosts, as far as the network can tell. The
wire between them can be cut, slow and lossy.

Nothing has to be removed: a namespace lives as long as the process that holds it, the pair as long
as its namespaces, and the holders end with the process that made them.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import random
import re
import secrets
import select
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from multiprocessing import spawn

ADDRESSES = ("10.111.0.1", "10.111.0.2")  # seen inside the two namespaces alone
# UCX reads /sys to find network devices, so /sys must be that of the namespace. cat ends when our
# end of its stdin does, however we end.
_HOLD = "mount -t sysfs sysfs /sys && echo ready && exec cat"

_CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA
_IFF_TUN_NO_PI = 0x1001


class NotPermitted(RuntimeError):
    """Namespaces cannot be made here; the message tells why."""


class TwoHosts:
    """A context manager; `prefix(idx)` runs a command on host 0 or 1, at `ADDRESSES[idx]`.

    `delay_s` and `loss` (a fraction) are those of one direction. They are tc's netem where the
    kernel has it; otherwise a thread here carries the packets between two tun devices. `gbit_s`
    bounds either direction by tc's tbf, in 10^9 bits a second. `wire` tells which.
    """

    def __init__(self, *, delay_s: float = 0.0, loss: float = 0.0, gbit_s: float = 0.0) -> None:
        if gbit_s and (delay_s or loss):
            raise ValueError("gbit_s: expected without delay_s and loss")
        self._delay_s, self._loss, self._gbit_s = delay_s, loss, gbit_s
        self._relay: SlowWire | None = None
        self.wire = "veth"

    def __enter__(self) -> TwoHosts:
        self._holders: list[subprocess.Popen[bytes]] = []
        try:
            self._make()
        except (OSError, subprocess.SubprocessError) as error:
            self.__exit__()
            output = getattr(error, "stderr", b"") or b""
            raise NotPermitted(f"{error} {output.decode().strip()}".strip()) from error
        return self

    def __exit__(self, *error: object) -> None:
        if self._relay is not None:
            self._relay.close()
        for holder in self._holders:
            assert holder.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                holder.stdin.close()
            holder.wait(10.0)
            for pipe in (holder.stdout, holder.stderr):
                assert pipe is not None
                pipe.close()

    def prefix(self, idx: int) -> list[str]:
        """What to put in front of a command."""
        pid = str(self._holders[idx].pid)
        return ["nsenter", "--target", pid, "--net", "--mount", f"--wd={os.getcwd()}", "--"]

    def _make(self) -> None:
        for _ in ADDRESSES:
            holder = subprocess.Popen(
                ["unshare", "--net", "--mount", "sh", "-c", _HOLD],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip
            self._holders.append(holder)
            _wait_until_ready(holder)
        name = f"kvl{secrets.token_hex(4)}"
        self._ends = (f"{name}a", f"{name}b")
        pids = [str(holder.pid) for holder in self._holders]
        pair = ["ip", "link", "add", self._ends[0], "netns", pids[0], "type", "veth"]
        _run([*pair, "peer", "name", self._ends[1], "netns", pids[1]])
        if self._delay_s or self._loss:
            self._spoil(pids)
        if self._gbit_s:
            self._narrow()
        for idx, (end, address) in enumerate(zip(self._ends, ADDRESSES, strict=True)):
            for command in (
                ["ip", "address", "add", f"{address}/24", "dev", end],
                ["ip", "link", "set", end, "up"],
                ["ip", "link", "set", "lo", "up"],
            ):
                _run([*self.prefix(idx), *command])
        for idx in range(2):
            self._wait_until_up(idx)

    def cut(self) -> None:
        """Nothing gets through from now on, in either direction."""
        _run([*self.prefix(0), "ip", "link", "set", self._ends[0], "down"])

    def restore(self) -> None:
        """The wire carries again."""
        _run([*self.prefix(0), "ip", "link", "set", self._ends[0], "up"])
        for idx in range(2):
            self._wait_until_up(idx)

    def num_lost(self) -> int:
        """Packets that the wire has swallowed so far, of those that `loss` was to take."""
        if self._relay is not None:
            return self._relay.num_lost
        told = [
            _run([*self.prefix(idx), "tc", "-s", "qdisc", "show", "dev", end]).decode()
            for idx, end in enumerate(self._ends)
        ]
        return sum(int(number) for each in told for number in re.findall(r"dropped (\d+)", each))

    @contextlib.contextmanager
    def executable(self, idx: int) -> Iterator[None]:
        """Processes that multiprocessing spawns meanwhile run on that host."""
        command = " ".join([*self.prefix(idx), sys.executable])
        before = spawn.get_executable()
        with tempfile.TemporaryDirectory() as folder:
            script = os.path.join(folder, "python")
            with open(script, "w") as file:
                file.write(f'#!/bin/sh\nexec {command} "$@"\n')
            os.chmod(script, 0o700)
            spawn.set_executable(script)
            try:
                yield
            finally:
                spawn.set_executable(before)

    def _spoil(self, pids: list[str]) -> None:
        netem = ["netem", "delay", f"{self._delay_s * 1e3:g}ms", "loss", f"{self._loss:.2%}"]
        try:
            for idx, end in enumerate(self._ends):
                _run([*self.prefix(idx), "tc", "qdisc", "add", "dev", end, "root", *netem])
            self.wire = "veth with netem"
        except (OSError, subprocess.SubprocessError):  # no tc, or no netem in this kernel
            self._relay = SlowWire(pids, self._delay_s, self._loss)
            self._ends = ("kvwire", "kvwire")
            self.wire = "tun, carried in user space: the kernel has no netem"

    def _narrow(self) -> None:
        # Segments are cut behind the shaper, so they come in 64 KiB.
        bounds = ["rate", f"{self._gbit_s:g}gbit", "burst", "256kb", "limit", "16mb"]
        for idx, end in enumerate(self._ends):
            _run([*self.prefix(idx), "tc", "qdisc", "add", "dev", end, "root", "tbf", *bounds])
        self.wire = f"veth with tbf, {self._gbit_s:g} Gbit/s"

    def _wait_until_up(self, idx: int) -> None:
        end = self._ends[idx]
        give_up = time.monotonic() + 10
        state = [*self.prefix(idx), "cat", f"/sys/class/net/{end}/operstate"]
        while _run(state).strip() not in (b"up", b"unknown"):  # tun devices do not know
            if time.monotonic() > give_up:
                raise OSError(f"{end} does not come up")
            time.sleep(0.01)


class SlowWire:
    """Carries packets between a tun device in each of two network namespaces, late, and not all."""

    def __init__(self, pids: list[str], delay_s: float, loss: float) -> None:
        self._tuns = [_tun_in(pid) for pid in pids]
        self._delay_s, self._loss = delay_s, loss
        self.num_lost = 0
        self._stop_read, self._stop_write = os.pipe()
        self._thread = threading.Thread(target=self._carry, name="slow-wire", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """The wire is gone."""
        os.write(self._stop_write, b"x")
        self._thread.join(10.0)
        for fd in (*self._tuns, self._stop_read, self._stop_write):
            os.close(fd)

    def _carry(self) -> None:
        choose = random.Random(1)
        under_way: deque[tuple[float, int, bytes]] = deque()  # all take equally long
        while True:
            left = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
            ready, _, _ = select.select([*self._tuns, self._stop_read], [], [], left)
            if self._stop_read in ready:
                return
            for idx, tun in enumerate(self._tuns):
                if tun in ready:
                    packet = os.read(tun, 1 << 16)
                    if choose.random() < self._loss:
                        self.num_lost += 1
                        continue
                    due = time.monotonic() + self._delay_s
                    under_way.append((due, self._tuns[1 - idx], packet))
            while under_way and under_way[0][0] <= time.monotonic():
                _, to, packet = under_way.popleft()
                with contextlib.suppress(OSError):  # a device that is down drops it
                    os.write(to, packet)


def _tun_in(pid: str) -> int:
    """A tun device in that process's network namespace; a thread goes there and ends."""
    made: list[int | OSError] = []

    def make() -> None:
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            with open(f"/proc/{pid}/ns/net") as namespace:
                if libc.setns(namespace.fileno(), _CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), "setns")
            fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
            fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", b"kvwire", _IFF_TUN_NO_PI))
            made.append(fd)
        except OSError as error:
            made.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    if isinstance(made[0], OSError):
        raise made[0]
    return made[0]


def _run(command: list[str]) -> bytes:
    return subprocess.run(command, check=True, capture_output=True, timeout=10).stdout


def _wait_until_ready(holder: subprocess.Popen[bytes]) -> None:
    assert holder.stdout is not None
    ready, _, _ = select.select([holder.stdout], [], [], 10.0)
    if not ready or holder.stdout.readline() != b"ready\n":
        assert holder.stderr is not None
        holder.kill()
        raise OSError(f"unshare: {holder.stderr.read().decode().strip() or 'no answer'}")
