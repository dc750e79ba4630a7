"""A campaign: lanes side by side, seeds handed out one by one, a watchdog over all of them."""

from __future__ import annotations

import contextlib
import multiprocessing as mp
import os
import signal
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, wait
from typing import Any

from kvlink.testing.faults.lane import Verdict, run_lane
from kvlink.testing.faults.scenario import draw, world_of

HANG = 150.0  # s without a verdict


class _LaneProcess:
    """A lane, and the seed it is at."""

    def __init__(self, path: str, world: int) -> None:
        context = mp.get_context("spawn")
        self.world = world
        self.connection: Connection
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=run_lane, args=(theirs, path, world))
        self.process.start()
        theirs.close()
        self.seed: int | None = None
        self.ready = False
        self.since = time.monotonic()

    def give(self, seed: int | None) -> None:
        """The next seed; None ends the lane."""
        self.seed, self.since = seed, time.monotonic()
        self.connection.send(seed)

    def kill(self) -> str:
        """Ends a lane that hangs or crashed, after its stacks went to stderr; what it was."""
        hangs = self.process.is_alive()
        if hangs:
            assert self.process.pid is not None
            os.kill(self.process.pid, signal.SIGUSR1)
            time.sleep(0.5)
            self.process.kill()
        self.process.join(10)
        self.connection.close()
        if hangs:
            return f"hang: no verdict within {HANG} s"
        return f"crash: the survivor's exit code was {self.process.exitcode}"


def run_campaign(
    path: str,
    seeds: Iterable[int],
    *,
    num_lanes: int | None = None,
    on_verdict: Callable[[Verdict], Any] = lambda _: None,
) -> list[Verdict]:
    """Runs every seed once and returns the verdicts, in the order in which they came.

    A lane that dies or hangs is a verdict of its seed, and another lane takes its place; one that
    does not even start is a verdict of seed -1, and nobody does.
    """  # fmt: skip
    todo: dict[int, list[int]] = {}
    for seed in list(seeds)[::-1]:
        todo.setdefault(world_of(path, seed), []).append(seed)
    verdicts: list[Verdict] = []
    num_lanes = num_lanes or 2 * len(os.sched_getaffinity(0))
    lanes = [
        _LaneProcess(path, world)
        for world, own in todo.items()
        for _ in range(min(max(1, num_lanes // len(todo)), len(own)))
    ]
    try:
        while lanes:
            # A lane that ended is readable, too.
            ready = wait([lane.connection for lane in lanes], timeout=1.0)
            for lane in list(lanes):
                found: Verdict | None = None
                replace = False
                if lane.connection in ready:
                    try:
                        message = lane.connection.recv()
                    except (EOFError, OSError):
                        lane.process.join(10)
                        found, replace = _broken(lane, path), lane.seed is not None
                    else:
                        found = _take(lane, message, todo[lane.world])
                elif time.monotonic() - lane.since > HANG:
                    found, replace = _broken(lane, path), lane.seed is not None
                if found is not None:
                    verdicts.append(found)
                    on_verdict(found)
                if replace or not lane.process.is_alive():
                    lanes.remove(lane)
                    if replace and todo[lane.world]:
                        lanes.append(_LaneProcess(path, lane.world))
    finally:
        for lane in lanes:
            lane.process.kill()
            lane.process.join(10)
    return verdicts


def _take(lane: _LaneProcess, message: Any, todo: list[int]) -> Verdict | None:
    """A message of a lane that lives: it is ready, a verdict, or its last words."""
    if isinstance(message, list):  # how its end went
        lane.process.join(20)
        with contextlib.suppress(OSError):
            lane.connection.close()
        code = lane.process.exitcode
        problems = message + ([f"crash: the survivor's exit code was {code}"] if code else [])
        return Verdict(-1, "end of lane", "", "", 0.0, problems) if problems else None
    lane.give(todo.pop() if todo else None)
    return message if isinstance(message, Verdict) else None


def _broken(lane: _LaneProcess, path: str) -> Verdict:
    problem = lane.kill()
    if lane.seed is None:
        return Verdict(-1, "start of lane", "", "", 0.0, [problem])
    scenario = draw(lane.seed, path)
    seconds = time.monotonic() - lane.since
    return Verdict(lane.seed, scenario.kind, scenario.move, "", seconds, [problem])
