"""The command's files, its progress bar, and what it says when it cannot start."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import TIMEOUT_S, command, generate
from tiny import to_jsonl

from kvlink.cli import main

REPOSITORY = Path(__file__).parents[2]
LINES = to_jsonl([{"prompt_token_ids": [i + 1], "max_new_tokens": 4} for i in range(5)])


@pytest.mark.two_process
def test_files_and_progress_on_a_terminal(
    checkpoint: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    _, path = checkpoint("llama2")
    (tmp_path / "in.jsonl").write_bytes(LINES)
    options = [f"--input={tmp_path / 'in.jsonl'}", f"--output={tmp_path / 'out.jsonl'}"]
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 30, 100, 0, 0))
    process = subprocess.Popen(
        command(path, *options, "--report=-"), stdout=subprocess.PIPE, stderr=theirs
    )
    os.close(theirs)
    shown = b""
    while chunk := read(ours):
        shown += chunk
    os.close(ours)
    printed, _ = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, printed) == (0, b"")
    assert b"5/5" in shown
    for word in (b"TTFT", b"TPOT", b"host_shm", b"early", b"5 transfers by digest"):
        assert word in shown
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [record["index"] for record in records] == list(range(5))


def read(fd: int) -> bytes:
    try:
        return os.read(fd, 65536)
    except OSError:  # how a terminal ends
        return b""


@pytest.mark.two_process
def test_demo() -> None:
    done = subprocess.run(
        [sys.executable, REPOSITORY / "examples" / "demo.py", "--max-new-tokens=8"],
        capture_output=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    text = done.stdout.decode()
    assert done.returncode == 0, done.stderr.decode()
    prompts = (REPOSITORY / "examples" / "demo_prompts.jsonl").read_text().splitlines()
    assert text.count("--- prompt of ") == len(prompts)
    assert f"{len(prompts)} served, 0 refused or failed" in text
    assert f"{len(prompts)} transfers by digest" in text


def test_what_is_missing_is_named(
    checkpoint: Callable[[str], tuple[Any, Path]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, path = checkpoint("llama2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("sys.stdin", open(os.devnull, "rb"))  # noqa: SIM115
    assert main(["generate", "--model", str(path), "--input", os.devnull]) == 2
    assert "generate needs torch: pip install 'kvlink[serving]'" in capsys.readouterr().err


def test_files_that_cannot_be_opened(
    checkpoint: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    _, path = checkpoint("llama2")
    nowhere = tmp_path / "no" / "where"
    for option in ("input", "output", "report"):
        _, errors = generate(path, LINES, f"--{option}={nowhere}", status=2)
        assert errors.splitlines()[-1].startswith("kvlink generate: ")
        assert str(nowhere) in errors
        assert len(errors.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--top-p=0"], "expected more than 0"),
        (["--temperature=nan"], "expected a number of 0.0 to inf; got nan"),
        (["--max-new-tokens=0"], "expected 1 to"),
        (["--decode-layout=dhn"], "invalid choice: 'dhn'"),
        (["--seed=-1"], "expected 0 to"),
    ],
)
def test_wrong_options(options: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["generate", "--model=.", *options])
    assert exit_info.value.code == 2
    assert reason in capsys.readouterr().err


def test_pool_larger_than_the_memory(checkpoint: Callable[[str], tuple[Any, Path]]) -> None:
    _, path = checkpoint("llama2")
    _, errors = generate(path, LINES, "--num-pages=2000000000", status=2)
    assert errors.startswith("kvlink generate: num_pages: 2000000000 pages take ")


def test_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "generate" in capsys.readouterr().out
    assert main([]) == 2
    assert main(["frobnicate"]) == 2
    assert "no command 'frobnicate'" in capsys.readouterr().err
