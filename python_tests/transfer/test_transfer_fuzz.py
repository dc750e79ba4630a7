"""A slice of the fuzzing of the control plane: `make fuzz` sends a million frames."""

from __future__ import annotations

import os
import random
import time

import pytest

from kvlink.testing.faults.peer import PeerProcess
from kvlink.testing.faults.tuning import SHORT
from kvlink.testing.fuzz.campaign import MAX_GROWTH, run_fuzz
from kvlink.testing.fuzz.client import STAGES, Fuzzer
from kvlink.testing.fuzz.mutations import MUTATIONS, PLACES, corpus, hard, must_be_refused
from kvlink.transfer import wire
from kvlink.transfer.channel import Channel
from kvlink.transfer.framing import pack_frame

pytestmark = [pytest.mark.two_process, pytest.mark.timeout(200)]

SANITIZED = "KVLINK_EXPECTED_BUILD" in os.environ  # run_sanitized.py
NUM_FRAMES = 2000 if SANITIZED else 5000


def test_an_endpoint_under_mutated_frames() -> None:
    samples: list[dict[str, int]] = []
    growth = None if SANITIZED else MAX_GROWTH
    found = run_fuzz(NUM_FRAMES, max_growth=growth, tell=samples.append)
    assert not found.problems
    assert len(samples) > 1
    assert all({"frames", "resident bytes", "Python blocks"} <= set(each) for each in samples)
    assert found.counts.total() >= NUM_FRAMES
    assert {name.split(",")[0] for name in found.counts} == set(STAGES)
    assert found.refusals["ProtocolError"] > NUM_FRAMES // 50
    assert found.num_good > 10


def test_a_client_that_is_held_up_is_not_refused() -> None:
    """What the campaign calls refused is never a bound that the campaign itself has shortened."""
    target = PeerProcess("target", "host_shm")
    try:
        fuzzer = Fuzzer(target.address, 0)
        sock = fuzzer._knock()
        channel = Channel(sock, fuzzer._credentials.begin(server_side=False))
        channel.shake_until(time.monotonic() + 20, lambda: False)
        time.sleep(SHORT + 0.1)
        assert fuzzer._greet(channel, "session") == 1
        channel.close()
    finally:
        assert target.end() == 0


def test_mutations_reach_every_type_and_many_are_refused() -> None:
    choose = random.Random(1)
    assert {frame.type for frame in corpus(choose)} == set(wire.FrameType)
    refused = {name: 0 for name in MUTATIONS}
    for _ in range(2000):
        name, data = hard(choose, 7)
        refused[name] += must_be_refused(data, 7, "session")
    assert all(refused.values()), refused
    assert sum(refused.values()) > 600
    for stage, places in PLACES.items():
        for frame in corpus(choose):
            refused_here = must_be_refused(pack_frame(frame, 7), 7, stage)
            assert refused_here == (frame.type not in places)
