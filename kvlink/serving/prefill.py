"""The prefill process: runs prompts and sends their KV to decode, layer by layer."""

from __future__ import annotations

import base64
import time
from collections import Counter
from typing import Any

import kvlink
from kvlink.serving.batch import Batch, Chunk
from kvlink.serving.channel import Channel, Message
from kvlink.serving.migration import Migration
from kvlink.serving.request import Request
from kvlink.serving.sampling import sample
from kvlink.serving.scheduler import PrefillJob, PrefillScheduler
from kvlink.serving.worker import BUSY_S, IDLE_S, Worker

Step = list[tuple[PrefillJob, Chunk]]
_ALIVE_S = 10.0  # between two signs of life, at most
_LAST_ANSWERS_S = 5.0  # for what the report counts; nobody's tokens depend on it


class PrefillWorker(Worker):
    """Sees only requests that decode has granted pages to; that is the backpressure."""

    def __init__(self, role: str, rank: int, setup: Message, channel: Channel) -> None:
        super().__init__(role, rank, setup, channel)
        self.scheduler = PrefillScheduler(
            self.allocator, self.options.max_batch_tokens, self.options.max_num_seqs, self.cache
        )
        self.link: Any = None
        self.migrations: list[Migration] = []  # whose source pages may still be read
        self.totals: Counter[str] = Counter()
        self.alive_at = 0.0  # time.monotonic() of the last sign of life
        self.num_moved = 0.0  # bytes of `migrations` by then

    def serve(self) -> None:
        """Works until the router says stop."""
        while not self.stopping:
            step = self.scheduler.schedule()
            started = self.run_and_migrate(step) if step else []
            self.collect(started)
            self.receive(0.0 if step else BUSY_S if self.migrations else IDLE_S)

    def run_and_migrate(self, step: Step) -> list[Migration]:
        """One forward pass. The prompts that it completes migrate while it goes on."""
        size = self.allocator.page_size
        migrations = [Migration(self.link, job, size) for job, chunk in step if chunk.wants_logits]
        for src, dst in self.scheduler.copies:
            kvlink.copy_pages(self.pool, src, dst)

        def push_layer(layer: int) -> None:
            for migration in migrations:
                migration.push_layer(layer)
            self.tell_alive()

        batch = Batch.of([chunk for _, chunk in step], size)
        logits = self.model(batch, self.pool, on_layer=push_layer)
        computed_ns = time.monotonic_ns()
        for migration, row in zip(migrations, logits, strict=True):
            migration.finish(computed_ns)
            job = migration.job
            names = {"index": job.request.index, "attempt": job.attempt}
            if self.rank == 0:
                self.totals["num_prompt_tokens"] += len(job.request.prompt)
                self.totals["num_cached_tokens"] += job.num_cached
                token = sample(row, job.request.sampling, step=0)
                self.channel.send("prefilled", **names, token=token, at=time.monotonic())
            if migration.failure is not None:
                self.channel.send("not_sent", **names, failure=migration.failure)
        return migrations

    def tell_alive(self) -> None:
        """Often enough that no grant expires during a step, however long that takes."""
        if self.alive_is_due():
            self.alive_at = time.monotonic()
            self.channel.send("alive", rank=self.rank)

    def alive_is_due(self) -> bool:
        """The last sign of life is not new."""
        every_s = min(_ALIVE_S, self.options.grant_ttl_s / 16)
        return time.monotonic() - self.alive_at > every_s

    def collect(self, started: list[Migration]) -> None:
        """Frees the pages that migrations no longer read."""
        pending = []
        for migration in self.migrations + started:
            if migration.source_reusable():
                self.scheduler.release(migration.job)
                self.totals.update(migration.account())
            else:
                pending.append(migration)
        self.migrations = pending
        if pending and self.alive_is_due():
            # Transfers that go on after the step are a sign of life, too, as long as they move.
            num_moved = sum(migration.account()["num_bytes"] for migration in pending)
            if num_moved != self.num_moved:
                self.num_moved = num_moved
                self.tell_alive()

    def receive(self, timeout: float) -> None:
        """Takes what the router sent; waits up to `timeout` seconds for something."""
        for message in self.channel.take(timeout):
            if message["type"] == "prefill":
                request = Request.from_message(message["request"])
                grant = base64.b64decode(message["grant"])
                self.scheduler.add(PrefillJob(request, message["attempt"], grant, message["start"]))
            elif message["type"] == "connect":
                address = bytes.fromhex(message["address"])
                self.link = self.endpoint.connect(address, require=self.options.path)
                detail = str(self.link.path_detail)
                self.channel.send("linked", path=str(self.link.path), detail=detail)
            elif message["type"] == "stop":
                self.stopping = True

    def stats(self) -> dict[str, Any]:
        """Totals over all migrations. Decode may have finished before it has answered for all it
        took: what is missing is waited for."""
        end = time.monotonic() + _LAST_ANSWERS_S
        for migration in self.migrations:
            migration.wait(max(0.0, end - time.monotonic()))
            self.totals.update(migration.account())
        return dict(self.totals)
