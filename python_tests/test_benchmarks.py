"""Benchmarks run, and print what docs/performance.md says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FIELDS = [
    "op", "case", "backend", "dtype", "page_size", "ms", "GBps", "GFLOPs", "limit",
    "limit_fraction", "peer", "note",
]  # fmt: skip


def run(*arguments: str, family: str = "transfer") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / f"bench_{family}.py"), *arguments],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.two_process
def test_transfer_lines() -> None:
    cases = ["handoff_16", "post_layer", "connect"]
    done = run("--case", *cases, "--seconds", "0.05", "--json")
    assert done.returncode == 0, done.stderr
    figures = [json.loads(line) for line in done.stdout.splitlines()]
    assert {figure["case"] for figure in figures} == set(cases)
    for figure in figures:
        assert list(figure) == FIELDS
        assert figure["ms"] > 0
        assert figure["peer"] == "kvlink"


@pytest.mark.two_process
def test_overlap_lines() -> None:
    done = run("--case", "overlap", "--seconds", "0.05", "--json")
    assert done.returncode == 0, done.stderr
    figures = [json.loads(line) for line in done.stdout.splitlines()]
    assert [figure["op"] for figure in figures] == ["push_layers", "push_after"]
    assert "is hidden" in figures[0]["note"]


def test_attention_lines() -> None:
    cases = ["scaling_1k", "plan_256", "call_overhead"]
    done = run("--case", *cases, "--no-torch", "--seconds", "0.05", "--json", family="attention")
    assert done.returncode == 0, done.stderr
    figures = [json.loads(line) for line in done.stdout.splitlines()]
    assert [figure["case"] for figure in figures] == [
        "scaling_1k", "scaling_1k", "plan_256", "call_overhead", "call_overhead",
    ]  # fmt: skip
    assert [figure["note"] for figure in figures] == ["", "1 thread", "", "a call", "in Python"]
    for figure in figures:
        assert list(figure) == FIELDS
        assert figure["ms"] > 0


def test_peer_python_follows_its_peer() -> None:
    done = run("--peer-python", sys.executable)
    assert done.returncode == 2
    assert "--peer first" in done.stderr
