"""`Party`: an endpoint with watched pools, and each step of a transfer as one call.

The survivor and its peer are both one; the peer's calls come through a pipe (`peer.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from kvlink import _C
from kvlink.testing.faults.watched import SPECS, TOKENS, WatchedPool, eventually, holds
from kvlink.testing.transfer_peer import SECRET
from kvlink.transfer import (
    Endpoint,
    Grant,
    Lease,
    Link,
    Offer,
    Transfer,
    TransferTimeout,
)
from kvlink.transfer.errors import status_error

NUM_SLOTS = 16
RELEASE_BOUND = 20.0  # s, for everything to be back once no peer is stopped


@dataclass
class Job:
    """One request at one party."""

    shape: str
    request: int
    pages: Any
    lent: Grant | Offer | None = None
    transfer: Transfer | None = None
    lease: Lease | None = None
    pulls: bool = False
    posted: int = 0  # layers
    arrived: bool = False  # verified: the pages hold the request
    returned: int = 0  # how often the pages came back


class Party:
    """Not thread-safe, but for the pages that come back on the endpoint's own thread."""

    def __init__(self, name: str, path: str, **options: Any) -> None:
        self.endpoint = Endpoint(
            name, secret=SECRET, paths=(path,), num_slots=NUM_SLOTS, num_page_entries=512, **options
        )
        self.pools = {shape: WatchedPool(spec, self.endpoint) for shape, spec in SPECS.items()}
        self.link: Link | None = None
        self.job: Job | None = None
        self.problems: list[str] = []

    # --- the link -----------------------------------------------------------------------------

    def address(self) -> bytes:
        return self.endpoint.address

    def connect(self, address: bytes | Callable[[], bytes], timeout: float) -> None:
        self.close_link()
        self.link = self.endpoint.connect(address, timeout=timeout)

    def accept(self, timeout: float) -> None:
        """The newest link; older ones are what earlier faults left."""
        self.close_link()
        self.link = self.endpoint.accept(timeout)
        with contextlib.suppress(TransferTimeout):
            while True:
                newer = self.endpoint.accept(0)
                self.link.close()
                self.link = newer

    def register(self) -> None:
        """One more region for a moment while the link is up, and a question to the peer."""
        region = self.endpoint.register(replace(SPECS["same"], num_pages=1).build())
        try:
            self.open_link.query(bytes(16), timeout=1.0)
        finally:
            self.endpoint.unregister(region)

    def close_link(self) -> None:
        if self.link is not None:
            self.link.close()
            self.link = None

    @property
    def open_link(self) -> Link:
        if self.link is None:
            raise TransferTimeout("no link was made")
        return self.link

    # --- lending ------------------------------------------------------------------------------

    def grant(self, shape: str, request: int, ttl: float) -> bytes:
        pool = self.pools[shape]
        job = self.job = Job(shape, request, pool.take(TOKENS[shape]))
        try:
            job.lent = self.endpoint.grant(
                job.pages, TOKENS[shape], ttl, region=pool.region,
                on_release=lambda _: self._back(job),
            )  # fmt: skip
        except BaseException:
            self._back(job)
            raise
        return job.lent.to_bytes()

    def offer(self, shape: str, request: int, ttl: float) -> bytes:
        pool = self.pools[shape]
        job = self.job = Job(shape, request, pool.take(TOKENS[shape]))
        pool.put(job.pages, TOKENS[shape], request)
        try:
            job.lent = self.endpoint.offer(
                job.pages, TOKENS[shape], ttl, region=pool.region,
                on_release=lambda _: self._back(job),
            )  # fmt: skip
        except BaseException:
            self._back(job)
            raise
        return job.lent.to_bytes()

    def wait(self, timeout: float) -> None:
        """A grant: until it is verified here."""
        job = self._job
        assert isinstance(job.lent, Grant)
        arrival = job.lent.wait(timeout)
        if list(arrival.pages) != list(job.pages) or not arrival.digest_verified:
            self.problems.append("the arrival names other pages, or was not verified")
        self._arrived(job)

    def released(self, timeout: float) -> None:
        """An offer: until its pages are back. Raises how it ended."""
        job = self._job
        assert job.lent is not None
        job.lent.wait_released(timeout)
        if job.lent.status != _C.TransferStatus.OK:
            raise status_error(job.lent.status, "what was lent")

    def revoke(self) -> None:
        job = self._job
        assert job.lent is not None
        job.lent.revoke()

    def reuse(self) -> None:
        """The pages are freed and taken again although they are lent."""
        job = self._job
        if job.returned:
            raise TransferTimeout("the pages are back already")
        allocator = self.pools[job.shape].allocator
        allocator.free(job.pages)
        again = allocator.allocate(len(job.pages))
        assert list(again) == list(job.pages)

    # --- moving -------------------------------------------------------------------------------

    def begin(self, token: bytes, shape: str, request: int) -> int:
        """A push; the number of layers to post."""
        pool, link = self.pools[shape], self.open_link
        job = self.job = Job(shape, request, pool.take(TOKENS[shape]))
        pool.put(job.pages, TOKENS[shape], request)
        job.transfer = link.begin(job.pages, token, region=pool.region)
        return len(job.transfer.plan.parts_of_layer)

    def begin_pull(self, token: bytes, shape: str, request: int) -> int:
        pool, link = self.pools[shape], self.open_link
        job = self.job = Job(shape, request, pool.take(TOKENS[shape]), pulls=True)
        job.transfer = link._start(_C.SlotKind.OFFER, token, job.pages, pool.region)
        return len(job.transfer.plan.parts)

    def layer(self, layer: int) -> None:
        self._transfer.push_layer(layer)
        self._job.posted += 1

    def part(self, part: int) -> None:
        self._transfer.post_part(part)
        self._job.posted += 1

    def finish(self) -> None:
        self._transfer.finish()

    def cancel(self) -> None:
        self._transfer.cancel()

    def reusable(self, timeout: float) -> None:
        self._transfer.wait_source_reusable(timeout)

    def arrived(self, timeout: float) -> None:
        """The mover's outcome; of a pull, the KV is here now."""
        self._transfer.wait_arrived(timeout)
        if self._job.pulls:
            self._arrived(self._job)

    def adopt(self, token: bytes, shape: str, request: int) -> None:
        lease = self.open_link.adopt(token)
        self.job = Job(shape, request, lease.pages, lease=lease)

    def read(self) -> None:
        """Reads the adopted KV, and tells whether it may be used."""
        job = self._job
        assert job.lease is not None
        lease, spec = job.lease, SPECS[job.shape]
        same = holds(lease.pool, lease.pages, spec, TOKENS[job.shape], job.request)
        lease.check()
        if not same:
            self.problems.append("wrong KV: adopted pages hold other bytes")

    def release(self) -> None:
        job = self._job
        assert job.lease is not None
        job.lease.release()

    # --- the end ------------------------------------------------------------------------------

    def give_up(self) -> None:
        """This side's own part ends; nothing here waits for the peer."""
        self.close_link()
        job = self.job
        if job is not None and job.lent is not None:
            job.lent.revoke()
        if job is not None and job.lease is not None:
            job.lease.release()
        self.drain()

    def drain(self) -> None:
        """Links that a peer made and nobody asked for."""
        with contextlib.suppress(TransferTimeout):
            while True:
                self.endpoint.accept(0).close()

    def end_job(self) -> None:
        """The pages that nobody else gives back."""
        job = self.job
        if job is not None and job.transfer is not None:
            try:
                job.transfer.wait_source_reusable(RELEASE_BOUND)
            except TransferTimeout:
                self.problems.append("hang: the source never became reusable")
        if job is not None and job.lease is None and (job.lent is None or job.arrived):
            self._back(job)

    def settle(self) -> list[str]:
        """Ends everything, waits until it has ended, and audits the pools; what was wrong."""
        self.give_up()
        self.end_job()
        if not eventually(lambda: not any(pool.num_out for pool in self.pools.values())):
            self.problems.append("leak: pages are not back")
        if not eventually(lambda: not self.endpoint.links):
            self.problems.append("leak: links are still open")
        found, self.job = self.audit(), None
        return found

    def audit(self) -> list[str]:
        """What is not as it must be, by now."""
        for shape, pool in self.pools.items():
            if num := pool.wrong():
                self.problems.append(f"wrong KV: {num} bytes of pool {shape!r} are not its own")
                pool.resync()
        if self.job is not None and self.job.returned > 1:
            self.problems.append("pages came back twice")
        found, self.problems = self.problems, []
        return found

    def close(self) -> None:
        self.endpoint.close()

    def _arrived(self, job: Job) -> None:
        if job.arrived:
            return
        job.arrived = True
        self.pools[job.shape].expect(job.pages, TOKENS[job.shape], job.request)
        if num := self.pools[job.shape].wrong():
            self.problems.append(f"wrong KV: {num} bytes of a verified request")

    def _back(self, job: Job) -> None:
        job.returned += 1
        if job.returned == 1:
            self.pools[job.shape].give(job.pages)

    @property
    def _job(self) -> Job:
        if self.job is None:
            raise TransferTimeout("the step before did not happen")
        return self.job

    @property
    def _transfer(self) -> Transfer:
        if self._job.transfer is None:
            raise TransferTimeout("the step before did not happen")
        return self._job.transfer
