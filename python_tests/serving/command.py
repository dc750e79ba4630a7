"""Runs `kvlink generate` as a user would."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

TIMEOUT_S = 120.0


def command(model: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "kvlink.cli", "generate", "--model", str(model), *options]


def generate(
    model: Path, lines: bytes, *options: str, status: int = 0
) -> tuple[list[dict[str, Any]], str]:
    """Output records and standard error, after checking the exit status."""
    done = subprocess.run(
        command(model, *options), input=lines, capture_output=True, timeout=TIMEOUT_S, check=False
    )
    errors = done.stderr.decode()
    assert done.returncode == status, errors
    return [json.loads(line) for line in done.stdout.splitlines()], errors
