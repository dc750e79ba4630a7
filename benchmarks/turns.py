"""Calls that take turns, each held against its neighbours.

Memory that is not ours alone changes its speed within fractions of a second. So a limit and what
is held against it follow each other call by call, many times, and a ratio is the median of those of
neighbours.
"""

from __future__ import annotations

import statistics
import time
from bisect import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sides import Side

from kvlink import _C

NUM_TURNS = 60  # a second that the caller asks for
_MIN_TURNS = 5
_SELDOM_TURNS = 8
MAX_SECONDS = 12.0  # a second that the caller asks for, unless the fewest turns take longer


class Turns:
    """Seconds of calls, in the order in which they were made."""

    def __init__(self) -> None:
        self._calls: dict[str, list[tuple[int, float]]] = {}
        self._num_calls = 0

    def add(self, name: str, seconds: float) -> None:
        """The call after all others."""
        self._calls.setdefault(name, []).append((self._num_calls, seconds))
        self._num_calls += 1

    def seconds(self, name: str) -> list[float]:
        return [seconds for _, seconds in self._calls[name]]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds(name))

    def beside(self, name: str, others: Mapping[str, float]) -> float:
        """What the neighbours of a call took, in parts of its own time; the median over all calls.

        Of each of `others` the neighbours are the calls next before it and after it; the mean of
        their times counts as often as the number given.
        """
        return statistics.median(
            sum(factor * self._near(other, at) for other, factor in others.items()) / seconds
            for at, seconds in self._calls[name]
        )

    def quartiles(self, name: str) -> tuple[float, float]:
        times = sorted(self.seconds(name))
        return times[len(times) // 4], times[-1 - len(times) // 4]

    def _near(self, name: str, at: int) -> float:
        calls = self._calls[name]
        after = bisect(calls, at, key=lambda call: call[0])
        return statistics.mean(seconds for _, seconds in calls[max(after - 1, 0) : after + 1])


@dataclass(frozen=True)
class Step:
    """A call that returns the seconds it took, by `sides`: all others are stopped meanwhile.

    `seldom` is for those that take very long. Without a name it is not recorded.
    """

    name: str
    call: Callable[[], float]
    sides: Sequence[Side] = ()
    seldom: bool = False


def timed(work: Callable[[], object]) -> Callable[[], float]:
    """A call of `work` as a step takes it."""

    def call() -> float:
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin

    return call


def take_turns(steps: Sequence[Step], seconds: float, max_seconds: float = MAX_SECONDS) -> Turns:
    """Makes all calls in their order, again and again; the first time unrecorded.

    NUM_TURNS times for each of `seconds`, but not longer than `max_seconds` for each.
    """
    turns = Turns()
    all_sides = {id(side): side for step in steps for side in step.sides}
    running = set(all_sides)
    num_turns = max(_MIN_TURNS, round(NUM_TURNS * seconds))
    each = max(1, num_turns // _SELDOM_TURNS)
    end = time.perf_counter() + max_seconds * seconds
    for turn in range(-1, num_turns):
        if turn >= _MIN_TURNS and time.perf_counter() > end:
            break
        for step in steps:
            if step.seldom and turn >= 0 and turn % each:
                continue
            wanted = {id(side) for side in step.sides}
            for other in running - wanted:
                all_sides[other].pause()
            for own in wanted - running:
                all_sides[own].go_on()
            running = wanted
            taken = step.call()
            if turn >= 0 and step.name:
                turns.add(step.name, taken)
    for side in all_sides.values():
        side.go_on()
    return turns


def copying(probe: _C.MemoryProbe) -> dict[str, Any]:
    """What limit_note tells of it."""
    return {"threads": _C.num_threads(), "copied_by": probe.copied_by}


def limit_note(turns: Turns, name: str, probe: Mapping[str, Any]) -> str:
    """How a copy's limit was obtained, and how much it changed meanwhile."""
    low, high = turns.quartiles(name)
    note = f"by {probe['threads']} threads and {probe['copied_by']}; "
    return f"{note}quartiles {low * 1e3:.2f} and {high * 1e3:.2f} ms"
