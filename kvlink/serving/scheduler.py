"""What runs next, on either side: continuous batching over pages that are reserved up front."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kvlink.pages import PageAllocator
from kvlink.serving.batch import Chunk
from kvlink.serving.request import Request


@dataclass(eq=False)
class PrefillJob:
    """A prompt on its way through prefill. `grant` are the bytes that say where its KV goes."""

    request: Request
    attempt: int
    grant: bytes
    pages: Any = None  # int32 page ids, once admitted
    num_done: int = 0  # prompt tokens whose KV is written or being written

    @property
    def complete(self) -> bool:
        """Nothing of the prompt is left to schedule."""
        return self.num_done == len(self.request.prompt)


class PrefillScheduler:
    """First come, first served, in steps of at most `max_batch_tokens` prompt tokens."""

    def __init__(self, allocator: PageAllocator, max_batch_tokens: int, max_num_seqs: int) -> None:
        self.allocator = allocator
        self.max_batch_tokens = max_batch_tokens
        self.max_num_seqs = max_num_seqs
        self.waiting: deque[PrefillJob] = deque()
        self.running: list[PrefillJob] = []  # admitted, prompt not complete

    def add(self, job: PrefillJob) -> None:
        """Queues a job."""
        self.waiting.append(job)

    def schedule(self) -> list[tuple[PrefillJob, Chunk]]:
        """The chunks of the next step, marked as done; empty when there is nothing to do."""
        step: list[tuple[PrefillJob, Chunk]] = []
        budget = self.max_batch_tokens
        while budget > 0 and len(step) < self.max_num_seqs:
            if len(step) == len(self.running) and not self._admit():
                break
            job = self.running[len(step)]
            start, prompt = job.num_done, job.request.prompt
            tokens = prompt[start : start + budget]
            budget -= len(tokens)
            job.num_done += len(tokens)
            step.append((job, Chunk(tokens, start, job.pages, wants_logits=job.complete)))
        self.running = [job for job in self.running if not job.complete]
        return step

    def release(self, job: PrefillJob) -> None:
        """Gives back the pages of a job, once nobody reads them."""
        self.allocator.free(job.pages)

    def _admit(self) -> bool:
        if not self.waiting:
            return False
        num_pages = -(-len(self.waiting[0].request.prompt) // self.allocator.page_size)
        if num_pages > self.allocator.num_free:
            return False
        job = self.waiting.popleft()
        job.pages = self.allocator.allocate(num_pages)
        self.running.append(job)
        return True


@dataclass(eq=False)
class DecodeJob:
    """A sequence that decode answers for, from its admission to its last token."""

    request: Request
    attempt: int = 0  # grants made for it so far
    pages: Any = None  # int32 page ids, for the prompt and every new token
    grant: Any = None
    token_ids: list[int] = field(default_factory=list)
    first_token_at: float = 0.0
    failure: str | None = None  # why prefill could not send the KV, if it told
    early_token: int | None = None  # computed from KV that is not verified yet
    early_hidden_s: float = 0.0
    early_late: bool = False  # its layers were too late for a step while there were others

    @property
    def num_kv_tokens(self) -> int:
        """Tokens whose KV is in the pages before the next step: all but the newest."""
        return len(self.request.prompt) + len(self.token_ids) - 1


class DecodeScheduler:
    """Reserves a request's pages for its whole life on admission: nothing is ever evicted."""

    def __init__(self, allocator: PageAllocator, max_num_seqs: int) -> None:
        self.allocator = allocator
        self.max_num_seqs = max_num_seqs
        self.waiting: deque[DecodeJob] = deque()
        self.arriving: dict[int, DecodeJob] = {}  # by request index; granted, KV on its way
        self.running: list[DecodeJob] = []

    def add(self, job: DecodeJob) -> None:
        """Queues a job."""
        self.waiting.append(job)

    def admit(self) -> DecodeJob | None:
        """Reserves pages for the job that waits longest, if it fits now."""
        if not self.waiting or len(self.arriving) + len(self.running) >= self.max_num_seqs:
            return None
        num_pages = -(-self.waiting[0].request.num_kv_tokens // self.allocator.page_size)
        if num_pages > self.allocator.num_free:
            return None
        job = self.waiting.popleft()
        job.pages = self.allocator.allocate(num_pages)
        self.arriving[job.request.index] = job
        return job

    def prompt_pages(self, job: DecodeJob) -> Any:
        """Those of the job's pages that its prompt fills."""
        return job.pages[: -(-len(job.request.prompt) // self.allocator.page_size)]

    def start(self, job: DecodeJob) -> None:
        """The KV of a job has arrived."""
        del self.arriving[job.request.index]
        self.running.append(job)

    def schedule(
        self, early: Sequence[DecodeJob] = ()
    ) -> tuple[Sequence[DecodeJob], Sequence[Chunk]]:
        """Every running sequence and the early ones, with their newest tokens."""
        jobs = [*self.running, *early]
        chunks = [Chunk(j.token_ids[-1:], j.num_kv_tokens, j.pages, True) for j in jobs]
        return jobs, chunks

    def early(self) -> list[DecodeJob]:
        """Jobs whose first token is known while their KV is on its way, and that may go on."""
        return [
            job
            for job in self.arriving.values()
            if job.token_ids and job.early_token is None and job.failure is None
        ]

    def requeue(self, job: DecodeJob) -> None:
        """The KV of a job did not arrive: it is first to be admitted again, to other pages."""
        del self.arriving[job.request.index]
        job.token_ids.clear()
        job.failure = job.early_token = None
        job.early_late = False
        self.waiting.appendleft(job)

    def end(self, job: DecodeJob) -> None:
        """A running job has its last token: its pages are free."""
        self.running.remove(job)
        self.allocator.free(job.pages)
