"""The decode process: grants pages, takes migrated KV over, and generates."""

from __future__ import annotations

import base64
import math
import time
from collections import defaultdict
from functools import partial
from typing import Any

from kvlink.errors import NeverReady, NotReady
from kvlink.serving.batch import Batch
from kvlink.serving.channel import Channel, Message
from kvlink.serving.early import EarlyStep
from kvlink.serving.keeper import GrantKeeper
from kvlink.serving.request import Request
from kvlink.serving.sampling import sample
from kvlink.serving.scheduler import DecodeJob, DecodeScheduler
from kvlink.serving.worker import BUSY_S, IDLE_S, Worker
from kvlink.transfer import TransferError

_MAX_ATTEMPTS = 3
_PROGRESS_S = 0.1
# A step waits at most this long for layers that are still landing.
_ALONE_S = 0.2
_SHARED_S = 0.05  # while there are other requests


class DecodeWorker(Worker):
    """Owns a request from admission to its last token; grants nothing while it is full."""

    def __init__(self, role: str, rank: int, setup: Message, channel: Channel) -> None:
        super().__init__(role, rank, setup, channel)
        # A transfer begins where both sides begin a page.
        sizes = self.options.prefill.page_size, self.options.decode.page_size
        self.scheduler = DecodeScheduler(
            self.allocator, self.options.max_num_seqs, self.cache, math.lcm(*sizes) // sizes[1]
        )
        self.totals: dict[str, float] = defaultdict(int)
        self.progress_at = 0.0  # time.monotonic()
        self.extended_at = 0.0
        self.alive: set[int] = set()  # ranks of prefill that were heard of since then
        self.keeper = GrantKeeper(self.open_grants, self.options.grant_ttl_s)

    def serve(self) -> None:
        """Works until the router says stop."""
        self.keeper.start()
        while not self.stopping:
            self.grant()
            self.collect_arrivals()
            self.run()
            self.receive(self.patience())
        self.keeper.close()

    def patience(self) -> float:
        """Seconds to wait for the router, given what else there is to do."""
        if self.scheduler.running:
            return 0.0
        return BUSY_S if self.scheduler.arriving or self.scheduler.waiting else IDLE_S

    def grant(self) -> None:
        """Promises pages to waiting requests, as far as they go.

        What other prompts have brought here, or are bringing, is not granted again.
        """
        while (job := self.scheduler.admit()) is not None:
            job.attempt += 1
            job.grant = self.endpoint.grant(
                self.scheduler.granted_pages(job),
                num_tokens=len(job.request.prompt) - job.start,
                ttl=self.options.grant_ttl_s,
                on_release=partial(self.take_back, job.pages),
            )
            self.channel.send(
                "granted",
                index=job.request.index,
                attempt=job.attempt,
                start=job.start,
                grant=base64.b64encode(job.grant.to_bytes()).decode(),
            )

    def collect_arrivals(self) -> None:
        """Starts what has arrived and been verified; looks, never waits."""
        for job in list(self.scheduler.arriving.values()):
            try:
                arrival = job.grant.poll()
            except TransferError as error:
                self.retry(job, error)
                continue
            job.landing.verified = arrival is not None
            if job.prefix_lost:
                self.lose_prefix(job)
            elif arrival is not None and job.token_ids and job.prefix_verified:
                self.totals["num_verified"] += 1
                self.totals["num_shared_tokens"] += job.start
                self.scheduler.start(job)
                self.take_early_token(job)
                self.finish_if_done(job)

    def run(self) -> None:
        """One token for every running sequence, and for those whose KV is landing now."""
        early = self.early_step()
        jobs, chunks = self.scheduler.schedule(early.jobs)
        if not jobs:
            return
        try:
            with self.keeper:
                logits = self.model(
                    Batch.of(chunks, self.allocator.page_size),
                    self.pool,
                    awaited=early.awaited if early.jobs else None,
                )
        except (NotReady, NeverReady):
            # No token was taken: the next step computes the same again, without the late ones.
            self.put_off(early)
            return
        early.look()
        self.totals["early_waited_s"] += early.waited_s
        for job, row in zip(jobs, logits, strict=True):
            token = sample(row, job.request.sampling, step=len(job.token_ids))
            if job in early.jobs:
                job.early_token, job.early_hidden_s = token, early.hidden_s(job)
                continue
            job.token_ids.append(token)
            self.totals["num_tokens"] += 1
            self.finish_if_done(job)
        if time.monotonic() - self.progress_at > _PROGRESS_S:
            self.progress_at = time.monotonic()
            self.channel.send("progress", num_tokens=self.totals["num_tokens"])

    def early_step(self) -> EarlyStep:
        """Of the requests that can begin now."""
        shared = len(self.scheduler.running) + len(self.scheduler.arriving) > 1
        jobs = [
            job
            for job in self.scheduler.early()
            if not self.is_done(job) and not (shared and job.early_late)
        ]
        return EarlyStep(jobs, self.pool.num_layers, _SHARED_S if shared else _ALONE_S)

    def put_off(self, early: EarlyStep) -> None:
        """Layers did not land in time: who misses some lets the others go on."""
        for job in early.look():
            job.early_late = True
        self.totals["early_waited_s"] += early.waited_s
        self.totals["num_early_late"] += 1

    def take_early_token(self, job: DecodeJob) -> None:
        """The KV that it was computed from is verified."""
        if job.early_token is not None:
            job.token_ids.append(job.early_token)
            self.totals["num_tokens"] += 1
            self.totals["num_early"] += 1
            self.totals["early_hidden_s"] += job.early_hidden_s

    def is_done(self, job: DecodeJob) -> bool:
        """Its newest token is its last."""
        return job.token_ids[-1] in self.eos or len(job.token_ids) >= job.request.max_new_tokens

    def finish_if_done(self, job: DecodeJob) -> None:
        """Reports a sequence that has ended, and takes its pages back."""
        if not self.is_done(job):
            return
        stopped = job.token_ids[-1] in self.eos
        self.scheduler.end(job)
        self.channel.send(
            "finished",
            index=job.request.index,
            token_ids=job.token_ids,
            finish_reason="stop" if stopped else "length",
            first_token_at=job.first_token_at,
            last_token_at=time.monotonic() if len(job.token_ids) > 1 else job.first_token_at,
        )

    def lose_prefix(self, job: DecodeJob) -> None:
        """The transfer that was to bring the beginning of a prompt has failed; its own has not."""
        if job.landing.verified:
            self.allocator.free(job.pages)
            self.again(job)
        else:
            job.grant.revoke()  # and the next look finds that it failed

    def again(self, job: DecodeJob) -> None:
        """Asks for a request's KV anew."""
        self.scheduler.fail(job)
        self.scheduler.requeue(job)

    def retry(self, job: DecodeJob, error: TransferError) -> None:
        """The KV did not arrive: asks for it again, or gives the request up."""
        if job.early_token is not None:
            self.totals["num_early_dropped"] += 1
        job.num_failed += not job.prefix_lost
        if job.num_failed < _MAX_ATTEMPTS:
            self.again(job)
        else:
            self.scheduler.fail(job)
            reason = job.failure or f"{type(error).__name__}: {error}"
            self.channel.send(
                "gave_up",
                index=job.request.index,
                error=f"KV transfer failed {job.num_failed} times: {reason}",
            )

    def take_back(self, pages: Any, _grant: Any) -> None:
        """A grant has failed and nobody writes to its pages any more; called from any thread."""
        self.allocator.free(pages)

    def extend_grants(self, rank: int) -> None:
        """Prefill is at work, however long its queue is: grants only expire when it is stuck, or
        one of its ranks is."""
        self.alive.add(rank)
        if len(self.alive) < self.options.prefill_ranks:
            return
        if time.monotonic() - self.extended_at > self.options.grant_ttl_s / 8:
            self.extended_at = time.monotonic()
            self.alive.clear()
            for grant in self.open_grants():
                grant.extend(self.options.grant_ttl_s)

    def open_grants(self) -> list[Any]:
        """Those that KV is on its way to; called from any thread."""
        arriving = list(self.scheduler.arriving.values())
        return [job.grant for job in arriving if job.grant is not None]

    def receive(self, timeout: float) -> None:
        """Takes what the router sent; waits up to `timeout` seconds for something."""
        for message in self.channel.take(timeout):
            if message["type"] == "admit":
                self.scheduler.add(DecodeJob(Request.from_message(message["request"])))
            elif message["type"] == "prefilled":
                if (job := self.arriving_job(message)) is not None:
                    job.token_ids.append(message["token"])
                    job.first_token_at = message["at"]
            elif message["type"] == "not_sent":
                if (job := self.arriving_job(message)) is not None:
                    job.failure = message["failure"]
                    job.grant.revoke()
            elif message["type"] == "alive":
                self.extend_grants(message["rank"])
            elif message["type"] == "stop":
                self.stopping = True

    def arriving_job(self, message: Message) -> DecodeJob | None:
        """What a message of prefill is about; None when it is about an earlier attempt."""
        job = self.scheduler.arriving.get(message["index"])
        return job if job is not None and job.attempt == message["attempt"] else None

    def stats(self) -> dict[str, Any]:
        """Totals over all requests."""
        return dict(self.totals)
