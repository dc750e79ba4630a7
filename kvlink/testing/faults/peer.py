"""The party that a fault may kill: a process of its own, driven call by call."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing as mp
import os
import signal
import time
from typing import Any

from kvlink.errors import KVLinkError

CALL_TIMEOUT = 60.0  # s
_PR_SET_PDEATHSIG = 1


class PeerDied(Exception):
    """The process ended, or is stopped, before it answered."""


class PeerFailed(Exception):
    """A call raised what no caller may see: not one of kvlink's own errors."""


class Remote(KVLinkError):
    """A typed error of the peer; `name` is its class."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name = name


def _serve(connection: Any, name: str, path: str, options: dict[str, Any]) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # also ends one that is stopped
    from kvlink.testing.faults.mishaps import FaultyParty
    from kvlink.testing.faults.tuning import tune

    tune()
    party = FaultyParty(name, path, **options)
    connection.send(("ok", party.address()))
    while True:
        try:
            call, args = connection.recv()
        except EOFError:
            os._exit(3)  # the lane is gone
        try:
            connection.send(("ok", getattr(party, call)(*args)))
        except KVLinkError as error:
            connection.send(("error", type(error).__name__, str(error)))
        except Exception as error:
            connection.send(("failed", type(error).__name__, str(error)))
        if call == "close":
            return


class PeerProcess:
    """A handle in the lane. Not thread-safe."""

    def __init__(self, name: str, path: str, *, fork: bool = True, **options: Any) -> None:
        """`fork`: from a server that has everything imported; without, by multiprocessing's
        executable. `options`: for the endpoint."""
        context: Any = mp.get_context("forkserver" if fork else "spawn")
        if fork:
            context.set_forkserver_preload(["kvlink.testing.faults.mishaps"])
        self._connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(theirs, name, path, options), daemon=True
        )
        self.process.start()
        theirs.close()
        self.stopped = False
        self.address: bytes = self.result()

    def start(self, call: str, *args: Any) -> None:
        """Makes a call without waiting for its result."""
        try:
            self._connection.send((call, args))
        except OSError as error:
            raise PeerDied(str(error)) from error

    def result(self, timeout: float = CALL_TIMEOUT) -> Any:
        """Of the oldest call. Raises Remote, PeerDied, PeerFailed."""
        try:
            if not self._connection.poll(timeout):
                raise PeerDied(f"no answer within {timeout} s")
            kind, *content = self._connection.recv()
        except (EOFError, OSError) as error:
            raise PeerDied(str(error)) from error
        if kind == "ok":
            return content[0]
        if kind == "error":
            raise Remote(*content)
        raise PeerFailed(": ".join(content))

    def call(self, call: str, *args: Any) -> Any:
        """Makes a call and waits."""
        self.start(call, *args)
        return self.result()

    def kill(self) -> None:
        """SIGKILL. Does not wait."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def stop(self) -> None:
        """SIGSTOP; when this returns, no thread of it runs any more."""
        os.kill(self.pid, signal.SIGSTOP)
        self.stopped = True
        end = time.monotonic() + 5
        while any(state not in "Tt" for state in self._states()) and time.monotonic() < end:
            time.sleep(0.0005)

    def resume(self) -> None:
        """SIGCONT."""
        if self.stopped:
            self.stopped = False
            os.kill(self.pid, signal.SIGCONT)

    @property
    def pid(self) -> int:
        return int(self.process.pid)

    @property
    def alive(self) -> bool:
        """Has not ended."""
        return bool(self.process.is_alive())

    def end(self) -> int:
        """Orderly when it can, by SIGKILL otherwise; its exit code."""
        with contextlib.suppress(PeerDied, Remote, PeerFailed):
            if self.alive:
                self.resume()
                self.call("close")
                self.process.join(CALL_TIMEOUT)
        if self.alive:
            self.kill()
        return self.bury()

    def bury(self) -> int:
        """Takes away what is left of one that ended; its exit code."""
        self.process.join(CALL_TIMEOUT)
        code = self.process.exitcode
        self._connection.close()
        self.process.close()
        return -1000 if code is None else code

    def _states(self) -> list[str]:
        states = []
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{self.pid}/task"):
                with open(f"/proc/{self.pid}/task/{task}/stat") as stat:
                    states.append(stat.read().rpartition(")")[2].split()[0])
        return states
