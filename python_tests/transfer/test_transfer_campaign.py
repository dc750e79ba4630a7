"""A slice of the fault campaign: `make faults` runs the whole."""

from __future__ import annotations

import os

import pytest

from kvlink.testing.faults.campaign import run_campaign
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
