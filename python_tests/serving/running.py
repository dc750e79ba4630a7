"""A `kvlink generate` that is at work, and the processes that it started."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from pathlib import Path

from command import command
from tiny import CONTEXT, to_jsonl

SECONDS = 60.0  # bound of every wait here; far above what anything takes


def jsonl(count: int, max_new_tokens: int) -> bytes:
    return to_jsonl(
        [{"prompt_token_ids": [i], "max_new_tokens": max_new_tokens} for i in range(count)]
    )


LINES = jsonl(200, CONTEXT)


class Running:
    """A command that is generating, and its workers."""

    def __init__(
        self, model: Path, *options: str, lines: bytes = LINES, num_ranks: int = 1
    ) -> None:
        self.process = subprocess.Popen(
            command(
                model, "--ignore-eos", "--max-num-seqs=2", *options, f"--prefill-ranks={num_ranks}"
            ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # What a shell runs in the background ignores SIGINT, and so would the command.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert self.process.stdin is not None
        self.process.stdin.write(lines)
        self.process.stdin.close()
        self.process.stdin = None
        assert self.process.stdout is not None
        assert self.process.stdout.readline()  # a first request has ended: both are at work
        ranks = [f"prefill-{rank}" for rank in range(num_ranks)] if num_ranks > 1 else ["prefill"]
        self.workers = {name: self._find(name) for name in (*ranks, "decode")}

    def _find(self, name: str) -> int:
        role, _, rank = name.partition("-")
        call = re.compile(rf"main\('{role}', \d+, \d+, {rank or 0}\)")
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                arguments = (entry / "cmdline").read_text(errors="replace")
            except OSError:
                continue
            if parent == self.process.pid and call.search(arguments):
                return int(entry.name)
        raise AssertionError(f"no {name} worker")

    def finish(self) -> tuple[int, str]:
        """Exit status and standard error of the command."""
        _, errors = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, errors.decode()


def alive(pid: int) -> bool:
    """The process exists and has not ended (a zombie has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + SECONDS
    while any(map(alive, pids)):
        assert time.monotonic() < deadline, "a worker is left behind"
        time.sleep(0.01)
