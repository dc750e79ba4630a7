"""A slice of the fault campaign: `make faults` runs the whole."""

from __future__ import annotations

import logging
import os
from typing import Any

import pytest

from kvlink.testing.faults import __main__ as command
from kvlink.testing.faults.campaign import run_campaign
from kvlink.testing.faults.lane import Verdict
from kvlink.testing.faults.report import counts, table
from kvlink.testing.faults.scenario import _NOT_ON, KINDS, draw

pytestmark = [pytest.mark.two_process, pytest.mark.timeout(300)]

SANITIZED = "KVLINK_EXPECTED_BUILD" in os.environ  # run_sanitized.py
NUM_FAULTS = 24 if SANITIZED else 60


@pytest.mark.parametrize("path", ["host_shm", "ucx"])
def test_survivors_of_a_slice(path: str) -> None:
    verdicts = run_campaign(path, range(NUM_FAULTS))
    wrong = {verdict.seed: verdict.problems for verdict in verdicts if verdict.problems}
    assert not wrong, f"{table(verdicts)}\n{wrong}"
    assert counts(verdicts)["faults"] == NUM_FAULTS


def test_a_seed_always_draws_the_same() -> None:
    for path in ("host_shm", "ucx"):
        drawn = [draw(seed, path) for seed in range(500)]
        assert drawn == [draw(seed, path) for seed in range(500)]
        kinds = {scenario.kind for scenario in drawn}
        assert kinds >= {kind for kind in KINDS if kind not in _NOT_ON[path]}
        assert {scenario.owner for scenario in drawn} == {"survivor", "peer"}


@pytest.mark.parametrize(
    ("problems", "missing", "status"),
    [
        ([], 0, 0),
        (["wrong KV in layer 1"], 0, 1),
        (["leak: 2 pages"], 0, 1),
        (["hang: no verdict within 150.0 s"], 0, 1),
        ([], 1, 1),
    ],
    ids=["fine", "wrong", "leaked", "hung", "a seed without a verdict"],
)
def test_exit_status_of_the_command(
    problems: list[str],
    missing: int,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def campaign(path: str, seeds: range, **options: Any) -> list[Verdict]:
        assert (path, seeds) == ("ucx", range(5, 8))
        verdicts = [Verdict(seed, "kill", "push", "", 0.1, []) for seed in seeds]
        verdicts[0].problems.extend(problems)
        for verdict in verdicts:
            options["on_verdict"](verdict)
        return verdicts[: len(verdicts) - missing]

    monkeypatch.setattr(command, "run_campaign", campaign)
    logger = logging.getLogger("kvlink.transfer")
    level = logger.level
    try:
        found = command.main(["--path", "ucx", "--seed", "5", "--faults", "3"])
    finally:
        logger.setLevel(level)
    assert found == status
    told = capsys.readouterr().out
    assert all(f"seed 5 (kill, push): {problem}" in told for problem in problems)
