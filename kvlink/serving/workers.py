"""`WorkerProcess`: one child of the router, which never outlives it."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from kvlink.errors import KVLinkError
from kvlink.serving.channel import Message, receive, send

_EXIT_S = 30.0  # for a worker that ends to be gone: it may have much memory to give back
_SEND_S = 600.0  # for a worker to take a message
_CHILD = "import sys; sys.path[:] = {path!r}; from kvlink.serving.worker import main; main({args})"


class WorkerFailed(KVLinkError):
    """A worker died or reported that it cannot go on; the message names it."""


class WorkerProcess:
    """Started on construction. `connection` is the router's end of its channel; `name` tells
    several of one role apart."""

    def __init__(self, role: str, num_threads: int, rank: int = 0, name: str = "") -> None:
        self.role = role
        self.name = name or role
        ours, theirs = socket.socketpair()
        with theirs:
            args = f"{role!r}, {theirs.fileno()}, {os.getpid()}, {rank}"
            # A session of its own: Ctrl-C goes to the router alone, which then ends its workers.
            # Standard output belongs to the results.
            self.process = subprocess.Popen(
                [sys.executable, "-c", _CHILD.format(path=sys.path, args=args)],
                pass_fds=(theirs.fileno(),),
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": str(num_threads),
                    "KVLINK_NUM_THREADS": str(num_threads),
                    # Sides share the CPUs: a thread that waits must not spin on one.
                    "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
                },
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno() if _has_fd(sys.stderr) else subprocess.DEVNULL,
                start_new_session=True,
            )
        seconds, part = divmod(_SEND_S, 1)
        timeout = struct.pack("ll", int(seconds), int(part * 1e6))
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
        self.connection = Connection(ours.detach())

    @property
    def pid(self) -> int:
        """Process id."""
        return self.process.pid

    def send(self, kind: str, **fields: Any) -> None:
        """Sends a message. Raises WorkerFailed."""
        try:
            send(self.connection, kind, **fields)
        except BlockingIOError:
            raise WorkerFailed(
                f"{self.name} worker (pid {self.pid}) took no message for {_SEND_S:g} s"
            ) from None
        except OSError:
            raise self._gone() from None

    def receive(self) -> Message:
        """Reads a message. Raises WorkerFailed when the worker is gone or reports a failure."""
        try:
            message = receive(self.connection)
        except (EOFError, OSError):
            raise self._gone() from None
        if message["type"] == "failed":
            raise WorkerFailed(f"{self.name} worker (pid {self.pid}) failed: {message['error']}")
        return message

    def end(self, grace: float = 0.0) -> None:
        """Waits up to `grace` seconds for the process to exit, then kills it."""
        try:
            self.process.wait(grace)
        except subprocess.TimeoutExpired:
            self.process.kill()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(_EXIT_S)
        self.connection.close()

    def _gone(self) -> WorkerFailed:
        try:
            status = self.process.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            how = "closed its channel"
        else:
            ended = f"exited with status {status}"
            how = ended if status >= 0 else f"was killed by {_name(-status)}"
        return WorkerFailed(f"{self.name} worker (pid {self.pid}) {how}")


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _has_fd(stream: Any) -> bool:
    try:
        stream.fileno()
    except (AttributeError, OSError, ValueError):
        return False
    return True
