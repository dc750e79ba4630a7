"""`EarlyStep`: the first decode step of requests whose KV is still landing."""

from __future__ import annotations

import time
from collections.abc import Sequence

from kvlink import _C
from kvlink.errors import NeverReady
from kvlink.serving.scheduler import DecodeJob


class EarlyStep:
    """Tells each layer's attention what to wait for, and measures what beginning early gained.

    What the step computes for these jobs may be used once their grants have been verified, and not
    before. All its waits together last at most `budget_s`.
    """

    def __init__(self, jobs: Sequence[DecodeJob], num_layers: int, budget_s: float) -> None:
        self.jobs = list(jobs)
        self.waited_s = 0.0  # so far, of all layers
        self._readiness = [[job.grant.readiness(i) for i in range(num_layers)] for job in jobs]
        self._num_landed = [0] * len(jobs)  # layers known to be there, from the first on
        self._began = self._looked_at = time.monotonic()
        self._end = self._began + budget_s
        self._missing_until = [self._began] * len(jobs)
        self._awaited: list[tuple[int, _C.Readiness, float]] = []  # by the layer under way

    def awaited(self, layer: int) -> tuple[list[_C.Readiness], float]:
        """(what attention waits for before it reads `layer`, seconds it may wait)."""
        self.look()
        items = [readiness[layer] for readiness in self._readiness]
        self._awaited = [(idx, item, item.waited_s) for idx, item in enumerate(items)]
        return items, max(0.0, self._end - time.monotonic())

    def look(self) -> list[DecodeJob]:
        """Notes how far each job's layers are; returns the jobs that miss some, or have failed."""
        for idx, item, before in self._awaited:
            waited_s = item.waited_s - before
            if waited_s > 0:
                self.waited_s += waited_s
                self._missing_until[idx] = self._looked_at + waited_s
        self._awaited = []
        self._looked_at = time.monotonic()
        missing = []
        for idx, readiness in enumerate(self._readiness):
            if not self._all_landed(idx, readiness):
                self._missing_until[idx] = self._looked_at
                missing.append(self.jobs[idx])
        return missing

    def hidden_s(self, job: DecodeJob) -> float:
        """Seconds of the step spent computing while layers of the job had yet to land: at least
        this long, since a layer counts as missing until it was last seen missing."""
        missing_until = self._missing_until[self.jobs.index(job)]
        return max(0.0, missing_until - self._began - self.waited_s)

    def _all_landed(self, idx: int, readiness: list[_C.Readiness]) -> bool:
        try:
            while self._num_landed[idx] < len(readiness):
                if not readiness[self._num_landed[idx]].ready:
                    return False
                self._num_landed[idx] += 1
        except NeverReady:
            return False
        return True
