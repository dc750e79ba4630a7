"""Moves of 256 MiB between two processes, measured in turns: kvlink's, its peers', the limits.

Every participant has one turn a round, so that whatever disturbs the machine disturbs all of them;
times and ratios of times are medians over the rounds, each a median of its own. Who has no turn is
stopped.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from sides import Side

from kvlink import _C

NUM_BYTES = 256 << 20
NUM_ROUNDS = 8
_MAX_REPEATS = 50

Round = dict[str, float]  # median seconds of a turn, by what was timed


@dataclass(frozen=True)
class Shape:
    """A pool that holds `num_tokens` tokens of the model's KV heads `heads` (first, past last)."""

    order: str = "nhd"
    page_size: int = 16
    num_layers: int = 8
    num_tokens: int = 8192
    heads: tuple[int, int] = (0, 8)
    head_dim: int = 128
    dtype: str = "bfloat16"
    scale: str = "none"
    touched: bool = True

    @property
    def num_rows(self) -> int:
        return self.num_layers * self.num_tokens * (self.heads[1] - self.heads[0]) * 2

    @property
    def num_bytes(self) -> int:
        """Of the values and of scales that belong to a token and head."""
        value_bytes = {"bfloat16": 2, "float8_e4m3": 1, "int8": 1}[self.dtype]
        scale_bytes = 4 if self.scale == "token_head" else 0
        return self.num_rows * (self.head_dim * value_bytes + scale_bytes)


@dataclass
class Kvlink:
    """Pushes from `sources` into a grant of `target`; times "verified" and "moved".

    "verified" lasts from the call of the (first) sender until the receiver, which verifies layers
    as they land, has committed. "moved" is another push, whose receiver does not look before all
    has landed: until the last byte was moved. Paths other than `path` are refused.

    With `like` the processes and pools are those of another one, which has been entered before.
    """

    sources: Sequence[Shape]
    target: Shape
    path: str
    digest: bool = True
    prefixes: Sequence[Sequence[str]] = ((), ())
    environment: Mapping[str, str] = field(default_factory=dict)
    hosts: Sequence[str] = ()
    name: str = "kvlink"
    detail: str = ""
    like: Kvlink | None = None

    def __enter__(self) -> Kvlink:
        self._stack = contextlib.ExitStack()
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def once(self) -> dict[str, float]:
        """One move of each kind."""
        if self.like:
            _for_all(self, Side.go_on)
        begin, _, verified = self._push(verify_along=True)
        began, moved, _ = self._push(verify_along=False)
        return {"verified": (verified - begin) * 1e-9, "moved": (moved - began) * 1e-9}

    def _push(self, verify_along: bool) -> tuple[int, int, int]:
        """When it began, when the last byte was moved, when the receiver had committed."""
        grant = self.receiver.call("grant", self.digest)
        if verify_along:
            self.receiver.start("wait")
        for sender in self.senders:
            sender.start("push", grant)
        spans = [sender.result() for sender in self.senders]
        if not verify_along:
            self.receiver.start("wait")
        verified = self.receiver.result()
        for sender in self.senders:
            sender.call("arrived")
        return min(first for first, _ in spans), max(last for _, last in spans), verified

    @property
    def all_sides(self) -> list[Side]:
        return [self.receiver, *self.senders]

    def _start(self) -> None:
        if self.like:
            self.receiver, self.senders = self.like.receiver, self.like.senders
            self.detail = self.like.detail
            return
        # A path is asked for only where there are others, so that host_shm needs nothing.
        options: dict[str, Any] = {} if self.path == "host_shm" else {"paths": [self.path]}
        threads = max(1, _C.num_threads() // len(self.sources))
        self.receiver, *self.senders = (
            self._stack.enter_context(
                Side("kvlink_side", prefix=self.prefixes[min(idx, 1)], environment=self.environment)
            )
            for idx in range(1 + len(self.sources))
        )
        listen = {"listen": f"{self.hosts[0]}:0"} if self.hosts else {}
        address = self.receiver.call("open", vars(self.target), None, {**options, **listen})
        for sender, shape in zip(self.senders, self.sources, strict=True):
            sender.call("open", vars(shape), threads, options)
            path, self.detail = sender.call("connect", address, self.path)
            assert path == self.path, f"expected {self.path}; the link says {path}"


@dataclass
class Peer:
    """Another library's write of pieces of `piece_bytes`, by its script in peers/."""

    name: str
    python: str
    piece_bytes: int
    prefixes: Sequence[Sequence[str]] = ((), ())
    environment: Mapping[str, str] = field(default_factory=dict)
    hosts: Sequence[str] = ()

    def __enter__(self) -> Peer:
        self._stack = contextlib.ExitStack()
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                arrived = self.target.call("sum")
                assert arrived == self._sum, f"{self.name}: other bytes arrived than were written"
        finally:
            self._stack.close()

    def once(self) -> dict[str, float]:
        """One write."""
        return {"moved": self.initiator.call("write")}

    @property
    def all_sides(self) -> list[Side]:
        return [self.target, self.initiator]

    def _start(self) -> None:
        self.target, self.initiator = (
            self._stack.enter_context(
                Side(
                    f"{self.name}_side", python=self.python, prefix=prefix,
                    environment=self.environment,
                )
            )
            for prefix in self.prefixes
        )  # fmt: skip
        # NIXL's metadata holds its addresses; Mooncake is told where to listen.
        hosts = self.hosts if self.name == "mooncake" else ()
        exposed = self.target.call("expose", NUM_BYTES, *hosts[:1])
        self._sum = self.initiator.call("attach", NUM_BYTES, *exposed, *hosts[1:])
        self.initiator.call("prepare", self.piece_bytes)


@dataclass
class Stream:
    """A plain TCP stream of as many bytes: the rate of the line."""

    prefixes: Sequence[Sequence[str]]
    hosts: Sequence[str]
    name: str = "socket"
    op: str = "stream"

    def __enter__(self) -> Stream:
        self._stack = contextlib.ExitStack()
        try:
            self.target, self.initiator = (
                self._stack.enter_context(Side("socket_side", prefix=prefix))
                for prefix in self.prefixes
            )
            exposed = self.target.call("expose", NUM_BYTES, self.hosts[0])
            self.initiator.call("attach", NUM_BYTES, *exposed)
            self.target.call("accept")
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def once(self) -> dict[str, float]:
        """One stream."""
        self.target.start("take")
        seconds = self.initiator.call("write")
        self.target.result()
        return {"moved": seconds}

    @property
    def all_sides(self) -> list[Side]:
        return [self.target, self.initiator]


class Memcpy:
    """memcpy of as many bytes with two threads (num_threads()) here, and reading them."""

    name, op = "memcpy", "copy"
    all_sides: tuple[Side, ...] = ()

    def __enter__(self) -> Memcpy:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def once(self) -> dict[str, float]:
        """The medians of a few."""
        return {
            "moved": NUM_BYTES / _C.probe_copy_bandwidth(NUM_BYTES, 0.1),
            "read": NUM_BYTES / _C.probe_read_bandwidth(NUM_BYTES, 0.05),
        }


Participant = Kvlink | Peer | Stream | Memcpy


def in_turns(participants: Sequence[Participant], seconds: float) -> list[list[Round]]:
    """Runs every participant's `once` in turns of about seconds / NUM_ROUNDS each, the first time
    unrecorded; [participants][rounds]."""
    recorded: list[list[Round]] = [[] for _ in participants]
    for each in participants:
        each.once()
        _for_all(each, Side.pause)
    for _ in range(NUM_ROUNDS):
        for each, rounds in zip(participants, recorded, strict=True):
            _for_all(each, Side.go_on)
            times: dict[str, list[float]] = {}
            end = time.perf_counter() + seconds / NUM_ROUNDS
            for _ in range(_MAX_REPEATS):
                for what, value in each.once().items():
                    times.setdefault(what, []).append(value)
                if time.perf_counter() > end:
                    break
            rounds.append({what: statistics.median(values) for what, values in times.items()})
            _for_all(each, Side.pause)
    for each in participants:
        _for_all(each, Side.go_on)
    return recorded


def median(rounds: Sequence[Round], what: str = "moved") -> float:
    """Seconds."""
    return statistics.median(times[what] for times in rounds)


def ratio(rounds: Sequence[Round], what: str, limits: Sequence[float]) -> float:
    """How much of each round's limit (seconds) is reached."""
    return statistics.median(
        limit / times[what] for limit, times in zip(limits, rounds, strict=True)
    )


def _for_all(participant: Participant, act: Callable[[Side], None]) -> None:
    for side in participant.all_sides:
        act(side)
