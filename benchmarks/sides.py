"""The processes between which moves are measured: started, asked, stopped while others measure.

Each runs a script of peers/ in the environment (and the network namespace) it is given.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_SCRIPTS = Path(__file__).parent / "peers"
_REPLY_TIMEOUT = 120.0  # s


class Side:
    """A process that runs `peers/<script>.py`. A context manager: at its end the process has gone.

    `prefix`: a command in front of it (`TwoHosts.prefix`). `environment` is added to our own.
    """

    def __init__(
        self,
        script: str,
        *,
        python: str = sys.executable,
        prefix: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = script
        inherited = {**os.environ, **(environment or {})}
        if script == "kvlink_side":
            inherited["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        else:
            inherited.pop("PYTHONPATH", None)
        # A file: a pipe that nobody reads would stop whoever fills it.
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [*prefix, python, str(_SCRIPTS / f"{script}.py")], env=inherited,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            start_new_session=True,
        )  # fmt: skip

    def start(self, command: str, *arguments: Any) -> None:
        """Asks, without waiting for the reply."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([command, *arguments]) + "\n")
        self._process.stdin.flush()

    def result(self) -> Any:
        """The reply to the oldest request; an error there is raised here."""
        stdout = self._process.stdout
        assert stdout is not None
        ready, _, _ = select.select([stdout], [], [], _REPLY_TIMEOUT)
        line = stdout.readline() if ready else ""
        if not line:
            what = "ended" if ready else f"did not answer within {_REPLY_TIMEOUT} s"
            raise RuntimeError(f"{self.name} {what}: {self._log_tail()}")
        reply = json.loads(line)
        if "error" in reply:
            raise RuntimeError(f"{self.name}: {reply['error']}")
        return reply["ok"]

    def call(self, command: str, *arguments: Any) -> Any:
        """Asks, and waits for the reply."""
        self.start(command, *arguments)
        return self.result()

    def pause(self) -> None:
        """Stops it, so that its idle threads take no time from what is measured."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """The end of `pause`."""
        os.killpg(self._process.pid, signal.SIGCONT)

    def close(self) -> None:
        """Ends the process: its stdin ends first, and it is killed only if that does not do."""
        with contextlib.suppress(ProcessLookupError):
            self.go_on()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _log_tail(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        self._log.seek(0)
        return " | ".join(self._log.read().strip().splitlines()[-5:]) or "it said nothing"
