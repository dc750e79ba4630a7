"""Moves of 256 MiB between two processes: kvlink's, its peers', a plain stream's.

Each has calls that return the seconds they took, for steps of turns.py.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from sides import Side

from kvlink import _C

NUM_BYTES = 256 << 20
_AHEAD_NS = 500_000  # by when several senders have been asked to begin


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
    """Pushes from `sources` into a grant of `target`. Paths other than `path` are refused.

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
    probe: dict[str, Any] = field(default_factory=dict)  # how the senders copy

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

    def moved(self) -> float:
        """From the (first) sender's call until the last byte was moved; the receiver, which does
        nothing meanwhile, verifies afterwards."""
        begin, moved, _ = self._push(verify_along=False)
        return (moved - begin) * 1e-9

    def verified(self) -> float:
        """From the (first) sender's call until the receiver, which verifies layers as they land,
        has committed."""
        begin, _, verified = self._push(verify_along=True)
        return (verified - begin) * 1e-9

    def copy(self, plain: bool = False) -> float:
        """A copy of NUM_BYTES by the senders, all together, each with its own threads.

        The fastest one or, with `plain`, the C library's memcpy.
        """
        spans = self._all_senders("copy", plain)
        return (max(last for _, last in spans) - min(first for first, _ in spans)) * 1e-9

    def read(self) -> float:
        """The receiver's reading of NUM_BYTES."""
        return float(self.receiver.call("read"))

    def _push(self, verify_along: bool) -> tuple[int, int, int]:
        """When it began, when the last byte was moved, when the receiver had committed."""
        grant = self.receiver.call("grant", self.digest)
        if verify_along:
            self.receiver.start("wait")
        spans = self._all_senders("push", grant)
        if not verify_along:
            self.receiver.start("wait")
        verified = self.receiver.result()
        for sender in self.senders:
            sender.call("arrived")
        return min(first for first, _ in spans), max(last for _, last in spans), verified

    def _all_senders(self, command: str, *arguments: Any) -> list[list[int]]:
        """The replies of all; several senders begin at one time."""
        at = time.monotonic_ns() + _AHEAD_NS if len(self.senders) > 1 else 0
        for sender in self.senders:
            sender.start(command, *arguments, at)
        return [sender.result() for sender in self.senders]

    @property
    def all_sides(self) -> list[Side]:
        return [self.receiver, *self.senders]

    def _start(self) -> None:
        if self.like:
            self.receiver, self.senders = self.like.receiver, self.like.senders
            self.detail, self.probe = self.like.detail, self.like.probe
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
            # The limit is that of the processes that move, in memory like that of their pools.
            self.probe = sender.call("make_probe", NUM_BYTES // len(self.senders))
            self.probe["threads"] *= len(self.senders)
        self.receiver.call("make_probe", NUM_BYTES)


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

    def write(self) -> float:
        """One write."""
        return float(self.initiator.call("write"))

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

    def write(self) -> float:
        """One stream."""
        self.target.start("take")
        seconds = float(self.initiator.call("write"))
        self.target.result()
        return seconds

    @property
    def all_sides(self) -> list[Side]:
        return [self.target, self.initiator]
