"""The decode process: grants pages, takes migrated KV over, and generates."""

from __future__ import annotations

import base64
import time
from collections import Counter
from functools import partial
from typing import Any

from kvlink.serving.batch import Batch
from kvlink.serving.channel import Channel, Message
from kvlink.serving.request import Request
from kvlink.serving.sampling import sample
from kvlink.serving.scheduler import DecodeJob, DecodeScheduler
from kvlink.serving.worker import BUSY_S, IDLE_S, Worker
from kvlink.transfer import TransferError

_MAX_ATTEMPTS = 3
_PROGRESS_S = 0.1


class DecodeWorker(Worker):
    """Owns a request from admission to its last token; grants nothing while it is full."""

    def __init__(self, role: str, setup: Message, channel: Channel) -> None:
        super().__init__(role, setup, channel)
        self.scheduler = DecodeScheduler(self.allocator, self.options.max_num_seqs)
        self.totals: Counter[str] = Counter()
        self.progress_at = 0.0  # time.monotonic()
        self.extended_at = 0.0

    def serve(self) -> None:
        """Works until the router says stop."""
        while not self.stopping:
            self.grant()
            self.collect_arrivals()
            if self.scheduler.running:
                self.run()
            self.receive(self.patience())

    def patience(self) -> float:
        """Seconds to wait for the router, given what else there is to do."""
        if self.scheduler.running:
            return 0.0
        return BUSY_S if self.scheduler.arriving or self.scheduler.waiting else IDLE_S

    def grant(self) -> None:
        """Promises pages to waiting requests, as far as they go."""
        while (job := self.scheduler.admit()) is not None:
            job.attempt += 1
            job.grant = self.endpoint.grant(
                self.scheduler.prompt_pages(job),
                num_tokens=len(job.request.prompt),
                ttl=self.options.grant_ttl_s,
                on_release=partial(self.take_back, job.pages),
            )
            self.channel.send(
                "granted",
                index=job.request.index,
                attempt=job.attempt,
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
            if arrival is not None and job.token_ids:
                self.totals["num_verified"] += 1
                self.scheduler.start(job)
                self.finish_if_done(job)

    def run(self) -> None:
        """One token for every running sequence."""
        jobs, chunks = self.scheduler.schedule()
        logits = self.model(Batch.of(chunks, self.allocator.page_size), self.pool)
        for job, row in zip(jobs, logits, strict=True):
            job.token_ids.append(sample(row, job.request.sampling, step=len(job.token_ids)))
            self.finish_if_done(job)
        self.totals["num_tokens"] += len(jobs)
        if time.monotonic() - self.progress_at > _PROGRESS_S:
            self.progress_at = time.monotonic()
            self.channel.send("progress", num_tokens=self.totals["num_tokens"])

    def finish_if_done(self, job: DecodeJob) -> None:
        """Reports a sequence that has ended, and takes its pages back."""
        stopped = job.token_ids[-1] in self.eos
        if not stopped and len(job.token_ids) < job.request.max_new_tokens:
            return
        self.scheduler.end(job)
        self.channel.send(
            "finished",
            index=job.request.index,
            token_ids=job.token_ids,
            finish_reason="stop" if stopped else "length",
            first_token_at=job.first_token_at,
            last_token_at=time.monotonic() if len(job.token_ids) > 1 else job.first_token_at,
        )

    def retry(self, job: DecodeJob, error: TransferError) -> None:
        """The KV did not arrive: asks for it again, or gives the request up."""
        if job.attempt < _MAX_ATTEMPTS:
            self.scheduler.requeue(job)
        else:
            del self.scheduler.arriving[job.request.index]
            reason = job.failure or f"{type(error).__name__}: {error}"
            self.channel.send(
                "gave_up",
                index=job.request.index,
                error=f"KV transfer failed {job.attempt} times: {reason}",
            )

    def take_back(self, pages: Any, _grant: Any) -> None:
        """A grant has failed and nobody writes to its pages any more; called from any thread."""
        self.allocator.free(pages)

    def extend_grants(self) -> None:
        """Prefill is at work, however long its queue is: grants only expire when it is stuck."""
        if time.monotonic() - self.extended_at > self.options.grant_ttl_s / 8:
            self.extended_at = time.monotonic()
            for job in self.scheduler.arriving.values():
                job.grant.extend(self.options.grant_ttl_s)

    def receive(self, timeout: float) -> None:
        """Takes what the router sent; waits up to `timeout` seconds for something."""
        for message in self.channel.take(timeout):
            if message["type"] == "admit":
                self.scheduler.add(DecodeJob(Request.from_message(message["request"])))
            elif message["type"] == "prefilled":
                job = self.scheduler.arriving.get(message["index"])
                if job is None or job.attempt != message["attempt"]:
                    continue  # of an earlier attempt
                job.token_ids.append(message["token"])
                job.first_token_at = message["at"]
                job.failure = message["failure"]
                if job.failure is not None:
                    job.grant.revoke()
            elif message["type"] == "alive":
                self.extend_grants()
            elif message["type"] == "stop":
                self.stopping = True

    def stats(self) -> dict[str, Any]:
        """Totals over all requests."""
        return dict(self.totals)
