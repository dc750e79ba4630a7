"""Two network namespaces joined by a veth pair: two hosts, as far as the network can tell.

Nothing has to be removed: a namespace lives as long as the process that holds it, the pair as long
as its namespaces, and the holders end with the process that made them.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import subprocess
import time

ADDRESSES = ("10.111.0.1", "10.111.0.2")  # seen inside the two namespaces alone
# UCX reads /sys to find network devices, so /sys must be that of the namespace. cat ends when our
# end of its stdin does, however we end.
_HOLD = "mount -t sysfs sysfs /sys && echo ready && exec cat"


class NotPermitted(RuntimeError):
    """Namespaces cannot be made here; the message tells why."""


class TwoHosts:
    """A context manager; `prefix(idx)` runs a command on host 0 or 1, at `ADDRESSES[idx]`."""

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
        ends = (f"{name}a", f"{name}b")
        pids = [str(holder.pid) for holder in self._holders]
        _run(
            ["ip", "link", "add", ends[0], "netns", pids[0], "type", "veth",
             "peer", "name", ends[1], "netns", pids[1]]
        )  # fmt: skip
        for idx, (end, address) in enumerate(zip(ends, ADDRESSES, strict=True)):
            for command in (
                ["ip", "address", "add", f"{address}/24", "dev", end],
                ["ip", "link", "set", end, "up"],
                ["ip", "link", "set", "lo", "up"],
            ):
                _run([*self.prefix(idx), *command])
        for idx, end in enumerate(ends):
            self._wait_until_up(idx, end)

    def _wait_until_up(self, idx: int, end: str) -> None:
        give_up = time.monotonic() + 10
        state = [*self.prefix(idx), "cat", f"/sys/class/net/{end}/operstate"]
        while _run(state).strip() != b"up":
            if time.monotonic() > give_up:
                raise OSError(f"{end} does not come up")
            time.sleep(0.01)


def _run(command: list[str]) -> bytes:
    return subprocess.run(command, check=True, capture_output=True, timeout=10).stdout


def _wait_until_ready(holder: subprocess.Popen[bytes]) -> None:
    assert holder.stdout is not None
    ready, _, _ = select.select([holder.stdout], [], [], 10.0)
    if not ready or holder.stdout.readline() != b"ready\n":
        assert holder.stderr is not None
        holder.kill()
        raise OSError(f"unshare: {holder.stderr.read().decode().strip() or 'no answer'}")
