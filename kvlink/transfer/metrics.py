"""What an endpoint and its links count. `Endpoint.metrics()` and `Link.metrics()` are snapshots:
plain nested dicts of numbers and text, ready for JSON. Counters only grow; gauges say so.

Counting happens where things end (a transfer's bytes when its outcome is known); posting a layer
costs a fraction of a microsecond more.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

from kvlink import _C
from kvlink.transfer.errors import outcome_name

_OK = _C.TransferStatus.OK
_PENDING = _C.TransferStatus.PENDING

POST_BOUNDS = (1e-6, 2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 1e-3, 1e-2, 0.1)  # s
WAIT_BOUNDS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # s
KINDS = ("push", "pull")
_COUNTERS = ("_begun", "_ended", "_amounts", "_refused", "_events", "_path_events")
_HISTOGRAMS = ("_post_s", "_wait_s", "_source_wait_s", "_moving_s")
_MAX_POSTS = 4096
_AMOUNTS = ("bytes", "rows", "pages", "layers")


class Histogram:
    """Counts of values up to each bound, and their sum. Not thread-safe."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """One more value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def merge(self, other: Histogram) -> None:
        """Everything that the other one counted, too."""
        self._counts = [a + b for a, b in zip(self._counts, other._counts, strict=True)]
        self._sum += other._sum

    def snapshot(self) -> dict[str, Any]:
        """`count`, `sum`, and `buckets`: [upper bound, values up to it], the last bound "+Inf"."""
        buckets: list[list[Any]] = []
        total = 0
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            total += count
            buckets.append([bound, total])
        return {"count": total, "sum": self._sum, "buckets": buckets}


@dataclass(eq=False)
class Moving:
    """A transfer that this side moves, until its outcome is known."""

    kind: str
    transfer_id: bytes
    moving: Any  # the path's
    num_pages: int


class LinkMetrics:
    """Of one link, or the sum of several."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watched: set[Moving] = set()
        self._begun: Counter[str] = Counter()  # by kind
        self._ended: Counter[tuple[str, str]] = Counter()  # by kind and outcome
        self._amounts: Counter[tuple[str, str]] = Counter()  # by kind and what
        self._refused: Counter[str] = Counter()  # by error
        self._events: Counter[str] = Counter()
        self._path_events: Counter[str] = Counter()  # of sessions that have ended
        self._posts: deque[int] = deque()  # ns, not in the histogram yet: appending needs no lock
        self._post_s = Histogram(POST_BOUNDS)
        self._wait_s = Histogram(WAIT_BOUNDS)
        self._source_wait_s = Histogram(WAIT_BOUNDS)
        self._moving_s = Histogram(WAIT_BOUNDS)

    # --- what is told ---------------------------------------------------------------------------

    def begun(self, kind: str) -> None:
        """A transfer of `kind` ("push" or "pull")."""
        with self._lock:
            self._begun[kind] += 1

    def posted(self, nanoseconds: int) -> None:
        """A layer was posted, which took that long."""
        self._posts.append(nanoseconds)
        if len(self._posts) >= _MAX_POSTS:
            with self._lock:
                self._fold_posts()

    def waited(self, nanoseconds: int, source: bool = False) -> None:
        """A caller waited for an arrival, or for the source to be reusable."""
        with self._lock:
            (self._source_wait_s if source else self._wait_s).add(nanoseconds * 1e-9)

    def refused(self, error: Exception) -> None:
        """A transfer or an adoption did not begin."""
        with self._lock:
            self._refused[type(error).__name__] += 1

    def count(self, event: str) -> None:
        """One more of "adopted", "reconnects", "lost"."""
        with self._lock:
            self._events[event] += 1

    def watch(self, moving: Moving) -> None:
        """Everything of it was posted, or it was cancelled: its outcome will be known."""
        with self._lock:
            self._watched.add(moving)

    def settle(self, moving: Moving, status: Any) -> bool:
        """Counts a transfer with its outcome, once; False when that had been done."""
        raw = moving.moving.progress()
        parts_done = sum(1 for _, _, done_ns in raw["parts"] if done_ns)
        amounts = (raw["num_bytes"], raw["num_rows"], moving.num_pages, parts_done)
        with self._lock:
            if moving not in self._watched:
                return False
            self._watched.discard(moving)
            self._ended[moving.kind, outcome_name(status)] += 1
            if status != _OK:
                amounts = (*amounts[:2], 0, parts_done)
            for what, amount in zip(_AMOUNTS, amounts, strict=True):
                self._amounts[moving.kind, what] += amount
            self._moving_s.add(raw["moving_ns"] * 1e-9)
        return True

    def sweep(self) -> list[tuple[Moving, Any]]:
        """Counts the transfers whose outcome is known by now; gives them with their status."""
        with self._lock:
            watched = list(self._watched)
        known = ((each, each.moving.wait_arrived(0)) for each in watched)
        return [(each, status) for each, status in known
                if status != _PENDING and self.settle(each, status)]  # fmt: skip

    # --- what is asked --------------------------------------------------------------------------

    def add(self, other: LinkMetrics, path_events: dict[str, int] | None = None) -> None:
        """Everything that another link counted, too; `path_events` of its session, if any."""
        with other._lock:
            other._fold_posts()
            for name in _COUNTERS:
                getattr(self, name).update(getattr(other, name))
            for name in _HISTOGRAMS:
                getattr(self, name).merge(getattr(other, name))
        self._path_events.update(path_events or {})

    def inherit(self, other: LinkMetrics, path_events: dict[str, int]) -> None:
        """As `add`, from a link that has ended; transfers without an outcome yet come along."""
        with self._lock:
            self.add(other, path_events)
            with other._lock:
                self._watched |= other._watched
                other._watched = set()

    def path_ended(self, events: dict[str, int]) -> None:
        """What the path of a session counted, which has ended."""
        with self._lock:
            self._path_events.update(events)

    def snapshot(self) -> dict[str, Any]:
        """See docs/transfer_contract.md, Observability."""
        with self._lock:
            self._fold_posts()
            return {
                **{kind: self._kind(kind) for kind in KINDS},
                "adopted": self._events["adopted"],
                "refused": dict(self._refused),
                "lost": self._events["lost"],
                "reconnects": self._events["reconnects"],
                "path_events": dict(self._path_events),
                "post_s": self._post_s.snapshot(),
                "wait_s": self._wait_s.snapshot(),
                "source_wait_s": self._source_wait_s.snapshot(),
                "moving_s": self._moving_s.snapshot(),
            }

    def _fold_posts(self) -> None:
        for _ in range(len(self._posts)):
            self._post_s.add(self._posts.popleft() * 1e-9)

    def _kind(self, kind: str) -> dict[str, Any]:
        return {
            "begun": self._begun[kind],
            "ended": {name: n for (of, name), n in self._ended.items() if of == kind},
            **{what: self._amounts[kind, what] for what in _AMOUNTS},
        }


class EndpointMetrics:
    """Of an endpoint's grants and offers, and of who was turned away."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._opened: Counter[str] = Counter()  # by kind: "grant", "offer"
        self._ended: Counter[tuple[str, str]] = Counter()  # by kind and outcome
        self._arrived: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._unconnected: Counter[str] = Counter()
        self._wait_s = Histogram(WAIT_BOUNDS)
        self._verify_s = Histogram(WAIT_BOUNDS)

    def opened(self, kind: str) -> None:
        """A grant or an offer was made."""
        with self._lock:
            self._opened[kind] += 1

    def ended(self, kind: str, status: Any) -> None:
        """It has its outcome."""
        with self._lock:
            self._ended[kind, outcome_name(status)] += 1

    def arrived(self, verify_s: float, **amounts: int) -> None:
        """A grant was verified and committed; bytes, rows, pages, layers and tokens that came."""
        with self._lock:
            self._arrived.update(amounts)
            self._verify_s.add(verify_s)

    def waited(self, nanoseconds: int) -> None:
        """A caller of Grant.wait waited, whatever came of it."""
        with self._lock:
            self._wait_s.add(nanoseconds * 1e-9)

    def refused(self, error: Exception) -> None:
        """A peer that wanted to connect was turned away."""
        with self._lock:
            self._refused[type(error).__name__] += 1

    def unconnected(self, error: Exception) -> None:
        """`Endpoint.connect`, or a link that connects again, failed."""
        with self._lock:
            self._unconnected[type(error).__name__] += 1

    def snapshot(self, gauges: dict[str, dict[str, int]]) -> dict[str, Any]:
        """`gauges`: what is open now, by kind."""
        with self._lock:
            return {
                **{f"{kind}s": self._kind(kind, gauges[kind]) for kind in ("grant", "offer")},
                "arrived": {
                    what: self._arrived[what] for what in (*_AMOUNTS, "tokens")
                },
                "wait_s": self._wait_s.snapshot(),
                "verify_s": self._verify_s.snapshot(),
                "refused": dict(self._refused),
                "connect_failed": dict(self._unconnected),
            }  # fmt: skip

    def _kind(self, kind: str, gauges: dict[str, int]) -> dict[str, Any]:
        ended = {name: n for (of, name), n in self._ended.items() if of == kind}
        return {"opened": self._opened[kind], "ended": ended, **gauges}
