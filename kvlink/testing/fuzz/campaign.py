"""The endpoint under test, its good peer and the clients, each in a process of its own."""

from __future__ import annotations

import multiprocessing as mp
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from kvlink.errors import KVLinkError
from kvlink.testing.faults.peer import PeerDied, PeerFailed, PeerProcess
from kvlink.testing.fuzz.client import run_fuzzer

SILENCE = 60.0  # s without a word of any client: a hang
MAX_GROWTH = 16 << 20  # bytes of resident memory: what is in use, and holes between it
# What is in use: 4096 outcomes remembered (some 15,000 blocks and 1 MB), caches that fill.
MAX_IN_USE = {"malloc bytes": 4 << 20, "Python blocks": 1 << 15}
_SAMPLES = 20  # of memory, on the way
_PAUSE = 0.02  # s between two good transfers
_SETTLE = 10.0  # s, for what the last connections held


@dataclass
class Findings:
    """What came of it. `problems` is empty when everything held."""

    counts: Counter[str] = field(default_factory=Counter)
    refusals: dict[str, int] = field(default_factory=dict)
    before: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)
    num_good: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


def run_fuzz(
    num_frames: int,
    *,
    seed: int = 0,
    num_clients: int = 3,
    max_growth: int | None = MAX_GROWTH,
    tell: Callable[[dict[str, int]], None] = lambda sample: None,
) -> Findings:
    """Sends that many mutated frames, and looks after the endpoint meanwhile. `max_growth` of its
    resident memory, bytes; None where memory says nothing (sanitizers keep what was freed).
    `tell` gets 20 samples of memory on the way."""
    found = Findings()
    began = time.monotonic()
    target, good = PeerProcess("target", "host_shm"), PeerProcess("good", "host_shm")
    clients: list[_Client] = []
    try:
        target.call("watch_log")
        _good_transfers(target, good, 5, found)
        good.call("close_link")
        found.before = _held(target)
        clients = [
            _Client(target.address, seed * 1000 + i, -(-num_frames // num_clients))
            for i in range(num_clients)
        ]
        _watch(target, good, clients, found, num_frames / _SAMPLES, tell)
        good.call("close_link")
        _check_growth(target, found, max_growth)
        _good_transfers(target, good, 5, found)
    except (PeerDied, PeerFailed, KVLinkError) as error:
        found.problems.append(f"{type(error).__name__}: {error}")
    finally:
        for client in clients:
            client.end()
        for name, peer in (("target", target), ("good peer", good)):
            if code := peer.end():
                found.problems.append(f"crash: the {name}'s exit code was {code}")
    found.seconds = time.monotonic() - began
    return found


class _Client:
    """A process that sends frames, and what it said last."""

    def __init__(self, address: bytes, seed: int, num_frames: int) -> None:
        context = mp.get_context("spawn")
        self.connection: Connection
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=run_fuzzer, args=(theirs, address, seed, num_frames), daemon=True
        )
        self.process.start()
        theirs.close()
        self.counts: dict[str, int] = {}
        self.problems: list[str] = []
        self.done = False
        self.since = time.monotonic()

    def take(self) -> None:
        """A word of it."""
        self.since = time.monotonic()
        try:
            message: Any = self.connection.recv()
        except EOFError:
            self.problems.append("a client died")
            self.done = True
            return
        if message is None:
            self.done = True
        else:
            self.counts, self.problems = message

    def end(self) -> None:
        """Waits for it, or ends it."""
        if not self.done:
            self.process.kill()
        self.process.join(10)
        self.connection.close()


def _watch(
    target: PeerProcess, good: PeerProcess, clients: list[_Client], found: Findings,
    step: float, tell: Callable[[dict[str, int]], None],
) -> None:  # fmt: skip
    """Good transfers until the clients are done."""
    began = time.monotonic()
    due = 0.0
    while not all(client.done for client in clients):
        _good_transfers(target, good, 1, found)
        sent = sum(sum(client.counts.values()) for client in clients)
        if sent >= due:
            due = sent + step
            told = {"seconds": round(time.monotonic() - began), "frames": sent}
            told["transfers"] = found.num_good
            tell(told | target.call("memory"))
        busy = [client for client in clients if not client.done]
        ready = wait([client.connection for client in busy], timeout=_PAUSE)
        for client in busy:
            if client.connection in ready:
                client.take()
            elif time.monotonic() - client.since > SILENCE:
                found.problems.append(f"hang: a client said nothing for {SILENCE} s")
                client.done = True
                client.process.kill()
        if found.problems:
            break
    for client in clients:
        found.counts.update(client.counts)
        found.problems += client.problems


def _good_transfers(target: PeerProcess, good: PeerProcess, number: int, found: Findings) -> None:
    """Pushes of the good peer; now and then on a new link."""
    for _ in range(number):
        request = found.num_good
        if request % 20 == 0 or not good.call("has_link"):
            good.call("connect", target.address, 20.0)
        token = target.call("grant", "same", request, 20.0)
        num_layers = good.call("begin", token, "same", request)
        for layer in range(num_layers):
            good.call("layer", layer)
        good.call("finish")
        target.call("wait", 20.0)
        good.call("arrived", 20.0)
        for peer in (target, good):
            peer.call("end_job")
            found.problems += peer.call("audit")
        found.num_good += 1


def _held(target: PeerProcess) -> dict[str, int]:
    held: dict[str, int] = target.call("held")
    return held


def _check_growth(target: PeerProcess, found: Findings, max_growth: int | None) -> None:
    """Once the last connections have ended, the endpoint holds what it held."""
    end = time.monotonic() + _SETTLE
    allowed = {"resident bytes": max_growth or 0, **MAX_IN_USE}
    if max_growth is None:
        allowed = dict.fromkeys(allowed, sys.maxsize)
    while True:
        found.after = _held(target)
        grown = {
            name: f"{number} -> {found.after[name]}"
            for name, number in found.before.items()
            if found.after[name] > number + allowed.get(name, 0)
        }
        if not grown or time.monotonic() > end:
            break
        time.sleep(0.05)
    if grown:
        found.problems.append(f"growth: {grown}")
    logged = target.call("logged")
    found.refusals = logged["refusals"]
    found.problems += [f"the endpoint logged: {line}" for line in logged["unexpected"]]
