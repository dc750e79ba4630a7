"""An endpoint in a process of its own, driven call by call, so that tests choose every step.

`Peer` is the handle in the test's process; `Body` runs in the other one. Imports no torch: the
process starts in a fraction of a second.
"""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np

from kvlink import _C
from kvlink.pool import KVPool
from kvlink.testing.transfer_pool import PoolSpec, pool_bytes
from kvlink.testing.waits import wait_outside
from kvlink.transfer import Endpoint, Link, Transfer, errors
from kvlink.transfer.descriptor import Descriptor

SECRET = b"a secret of the transfer tests"
# What an endpoint of a test is given so that its links take a path: ucx is tested as it is between
# processes of one host, and (tcp) as it is between hosts.
PATHS: dict[str, dict[str, Any]] = {
    "host_shm": {"paths": ("host_shm",)},
    "ucx": {"paths": ("ucx",)},
    "ucx_tcp": {"paths": ("ucx",), "listen": "127.0.0.1:0"},
}
CALL_TIMEOUT = 30.0  # s


def open_endpoint(
    name: str, path: str | None, secret: bytes = SECRET, **arguments: Any
) -> Endpoint:
    """An endpoint whose links take one of `PATHS`, or by default whichever peers allow."""
    return Endpoint(name, secret=secret, **(PATHS[path] if path else {}), **arguments)


def reachable(endpoint: Endpoint) -> bytes:
    """Its address, as a peer on another host would use it if it listens for such."""
    head, *parts = endpoint.address.split(b";")
    tcp = [part for part in parts if part.startswith(b"tcp=")]
    return b";".join([head, *(tcp or parts)])


@dataclass
class Body:
    """What runs in the other process. Each method is one command; transfers have numbers."""

    spec: PoolSpec
    secret: bytes
    path: str | None = None
    endpoint: Endpoint = field(init=False)
    pool: KVPool = field(init=False)

    def __post_init__(self) -> None:
        self.endpoint = open_endpoint("peer", self.path, self.secret)
        self.pool = self.spec.build()
        self.endpoint.register(self.pool, self.spec.shard)
        self.link: Link | None = None
        self.transfers: list[Transfer] = []
        self.held: dict[bytes, Any] = {}  # grants, offers and leases, by transfer id

    def address(self) -> bytes:
        return reachable(self.endpoint)

    def connect(self, address: bytes) -> str:
        if self.link is not None:
            self.link.close()
        self.link = self.endpoint.connect(address)
        return self.link.path

    def accept(self) -> None:
        self.link = self.endpoint.accept(20.0)

    def close_link(self) -> None:
        self.open_link.close()

    @property
    def open_link(self) -> Link:
        assert self.link is not None
        return self.link

    def fill(self, pages: list[int], num_tokens: int, seed: int = 0) -> None:
        self.spec.fill(self.pool, pages, num_tokens, seed)

    def content(self) -> bytes:
        return pool_bytes(self.pool).tobytes()

    def begin(self, pages: list[int], grant: bytes) -> int:
        self.transfers.append(self.open_link.begin(pages, grant))
        return len(self.transfers) - 1

    def push(self, pages: list[int], grant: bytes) -> int:
        self.transfers.append(self.open_link.push(pages, grant))
        return len(self.transfers) - 1

    def pull(self, offer: bytes, pages: list[int]) -> int:
        self.transfers.append(self.open_link.pull(offer, pages))
        return len(self.transfers) - 1

    def push_layer(self, idx: int, layer: int, num_tokens: int | None = None) -> None:
        self.transfers[idx].push_layer(layer, num_tokens)

    def finish(self, idx: int) -> None:
        self.transfers[idx].finish()

    def cancel(self, idx: int) -> None:
        self.transfers[idx].cancel()

    def wait_source_reusable(self, idx: int, timeout: float = 10.0) -> None:
        self.transfers[idx].wait_source_reusable(timeout)

    def wait_arrived(self, idx: int, timeout: float = 10.0) -> None:
        self.transfers[idx].wait_arrived(timeout)

    def wait_outside(self, idx: int, timeout: float = 10.0) -> None:
        """Until what was pushed so far is moved and the peer's pages are left."""
        wait_outside(self.transfers[idx], timeout)

    def offer(self, pages: list[int], num_tokens: int, ttl: float = 30.0, pulls: int = 1) -> bytes:
        offer = self.endpoint.offer(pages, num_tokens, ttl, pulls=pulls)
        self.held[offer.transfer_id] = offer
        return offer.to_bytes()

    def grant(self, pages: list[int], num_tokens: int, ttl: float = 30.0) -> bytes:
        grant = self.endpoint.grant(pages, num_tokens, ttl)
        self.held[grant.transfer_id] = grant
        return grant.to_bytes()

    def wait(self, grant: bytes, timeout: float = 10.0) -> list[int]:
        pages: list[int] = self.held[grant[24:40]].wait(timeout).pages.tolist()
        return pages

    def wait_released(self, token: bytes, timeout: float = 10.0) -> str:
        held = self.held[token[24:40]]
        held.wait_released(timeout)
        return str(held.status.name)

    def adopt(self, offer: bytes) -> bytes:
        """The first layer's K of the offered pages, as bytes."""
        lease = self.open_link.adopt(offer)
        self.held[offer[24:40]] = lease
        return np.from_dlpack(lease.pool.k(0))[lease.pages].tobytes()

    def release(self, offer: bytes) -> None:
        self.held[offer[24:40]].release()

    def check_lease(self, offer: bytes) -> None:
        self.held[offer[24:40]].check()

    def enter(self, token: bytes) -> str:
        """Pins the pages and stays inside: what a writer is between two instructions."""
        link = self.open_link
        kind = _C.SlotKind.GRANT if token[6] == 1 else _C.SlotKind.OFFER
        self.inside = Descriptor.from_bytes(token, self.endpoint.descriptor_key, kind)
        return str(link.path_link.enter(self.inside))

    def leave(self) -> None:
        self.open_link.path_link.leave(self.inside)

    def inject(self, fault: str, count: int) -> None:
        """ucx: drops, doubles, delays or damages the next messages that this side sends."""
        self.open_link.path_link.inject(fault, count)

    def counters(self) -> dict[str, int]:
        """ucx: how chunks went."""
        return dict(self.open_link.path_link.counters())

    def settle(self, idx: int, timeout: float = 0.1) -> None:
        """Until everything that was posted has been moved, or has had the time."""
        end = time.monotonic() + timeout
        rows = -1
        while time.monotonic() < end or rows != self.transfers[idx].progress().num_rows:
            rows = self.transfers[idx].progress().num_rows
            time.sleep(0.01)

    def num_fds(self) -> int:
        """Descriptors open once nothing of earlier links is used any more."""
        for link in self.endpoint.links:
            link.close()
        self.link = None
        self.transfers.clear()
        self.held.clear()
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    def close(self) -> None:
        self.endpoint.close()


def _main(connection: Any, make: Callable[[Any, bytes], Any], spec: Any, secret: bytes) -> None:
    body = make(spec, secret)
    connection.send(("ok", body.address()))
    while True:
        try:
            name, args = connection.recv()
        except EOFError:
            break
        try:
            connection.send(("ok", getattr(body, name)(*args)))
        except Exception as error:
            connection.send(("error", type(error).__name__, str(error)))
        if name == "close":
            break
    body.close()


class Peer:
    """The other process. A context manager: at its end the process has gone.

    `make(spec, secret)` gives what runs there: a `Body`, or something else with `address`, `close`
    and commands of its own. `path`: one of `PATHS`, for a `Body`; by default any.
    """

    def __init__(
        self,
        spec: Any = None,
        secret: bytes = SECRET,
        make: Callable[[Any, bytes], Any] | None = None,
        path: str | None = None,
    ) -> None:
        context = mp.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_main,
            args=(theirs, make or partial(Body, path=path), spec or PoolSpec(), secret),
            daemon=True,
        )
        self.process.start()
        theirs.close()
        self.address: bytes = self.result()

    def start(self, name: str, *args: Any) -> None:
        """Sends a command without waiting for its result."""
        self._connection.send((name, args))

    def result(self) -> Any:
        """The result of the oldest command; an error there is raised here."""
        if not self._connection.poll(CALL_TIMEOUT):
            raise AssertionError(f"the peer did not answer within {CALL_TIMEOUT} s")
        kind, *content = self._connection.recv()
        if kind == "ok":
            return content[0]
        name, message = content
        raise getattr(errors, name, AssertionError)(f"{name} at the peer: {message}")

    def call(self, name: str, *args: Any) -> Any:
        """Runs a command there."""
        self.start(name, *args)
        return self.result()

    def signal(self, number: int) -> None:
        """Sends a signal to that process alone."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """SIGKILL, and waits until it is gone."""
        self.process.kill()
        self.process.join(CALL_TIMEOUT)
        assert self.process.exitcode == -signal.SIGKILL

    def close(self) -> None:
        """An orderly end: its exit code must be 0."""
        self.call("close")
        self.process.join(CALL_TIMEOUT)
        assert self.process.exitcode == 0

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process.is_alive() and kind is None:
            self.close()
        if self.process.is_alive():
            self.signal(signal.SIGCONT)
            self.process.kill()
            self.process.join(CALL_TIMEOUT)
        self._connection.close()
