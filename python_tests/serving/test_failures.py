"""A worker or the command dies: a clear error within seconds, and nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command import generate
from running import LINES, SECONDS, Running, alive, jsonl, wait_until_gone
from tiny import CONTEXT

pytestmark = pytest.mark.two_process


@pytest.fixture
def running(checkpoint: Callable[[str], tuple[Any, Path]]) -> Iterator[Running]:
    run = Running(checkpoint("llama2")[1])
    yield run
    for pid in (run.process.pid, *run.workers.values()):
        if alive(pid):
            os.kill(pid, signal.SIGKILL)
    run.process.communicate(timeout=SECONDS)


def shared_memory() -> set[str]:
    """Named shared memory of this machine; kvlink's is to have no name."""
    return {entry.name for entry in Path("/dev/shm").iterdir() if "kvlink" in entry.name}


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_killed_worker(running: Running, role: str) -> None:
    before = shared_memory()
    os.kill(running.workers[role], signal.SIGKILL)
    status, errors = running.finish()
    assert status == 1
    pid = running.workers[role]
    assert errors.strip() == f"kvlink generate: {role} worker (pid {pid}) was killed by SIGKILL"
    wait_until_gone(list(running.workers.values()))
    assert shared_memory() <= before


def test_interrupted(running: Running) -> None:
    os.kill(running.process.pid, signal.SIGINT)
    status, errors = running.finish()
    assert status == 130
    assert errors.strip() == "kvlink generate: interrupted"
    wait_until_gone(list(running.workers.values()))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_command(running: Running, number: signal.Signals) -> None:
    os.kill(running.process.pid, number)
    status, _ = running.finish()
    assert status == -number
    wait_until_gone(list(running.workers.values()))


def test_grants_that_expire(checkpoint: Callable[[str], tuple[Any, Path]]) -> None:
    """Pages come back to decode, which grants anew, and gives up in the end."""
    _, path = checkpoint("llama2")
    records, _ = generate(path, jsonl(30, max_new_tokens=2), "--grant-ttl=0.001", "--ignore-eos")
    assert len(records) == 30
    for record in records:
        # A fast machine may still deliver some in time; none is lost, none is wrong.
        failed = "KV transfer failed 3 times: GrantExpired"
        assert len(record.get("token_ids", ())) == 2 or record["error"].startswith(failed)


def test_prefill_that_stands_still_for_a_while(
    checkpoint: Callable[[str], tuple[Any, Path]],
) -> None:
    lines = jsonl(20, CONTEXT)
    run = Running(checkpoint("llama2")[1], "--grant-ttl=2", lines=lines)
    os.kill(run.workers["prefill"], signal.SIGSTOP)
    time.sleep(2.4)  # its grants expire, and decode grants anew
    os.kill(run.workers["prefill"], signal.SIGCONT)
    assert run.process.stdout is not None
    records = [json.loads(line) for line in run.process.stdout.read().splitlines()]
    status, errors = run.finish()
    assert (status, errors) == (0, "")
    assert [len(record["token_ids"]) for record in records] == [CONTEXT - 1] * 19
    wait_until_gone(list(run.workers.values()))


def test_worker_that_cannot_start(
    checkpoint: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    _, path = checkpoint("llama2")
    for source in path.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    _, errors = generate(tmp_path, LINES, status=1)
    assert "worker (pid" in errors
    assert "model.safetensors: cannot be read" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (lambda path: (path / "config.json").unlink(), "config.json: cannot be read"),
        (lambda path: (path / "config.json").write_text("{"), "config.json: not valid JSON"),
        (lambda path: (path / "config.json").write_text("{}"), "architectures: expected one of"),
        (lambda path: (path / "model.safetensors").unlink(), "model.safetensors: no such file"),
        (
            lambda path: (path / "tokenizer.json").write_text("{}"),
            "tokenizer.json: not a tokenizer",
        ),
    ],
    ids=["no config", "bad config", "no architecture", "no weights", "bad tokenizer"],
)
def test_bad_model_directory(
    break_it: Callable[[Path], Any],
    reason: str,
    checkpoint: Callable[[str], tuple[Any, Path]],
    tmp_path: Path,
) -> None:
    _, path = checkpoint("llama2")
    for source in path.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    break_it(tmp_path)
    _, errors = generate(tmp_path, LINES, status=2)
    assert len(errors.splitlines()) == 1
    assert reason in errors


def test_no_model_directory(tmp_path: Path) -> None:
    _, errors = generate(tmp_path / "nowhere", LINES, status=2)
    assert errors.strip().endswith("no such directory")
