"""What runs next, on either side: continuous batching over pages that are reserved up front.

Prompts that begin alike share pages on either side: see `PrefixCache`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kvlink.pages import PageAllocator
from kvlink.serving.batch import Chunk
from kvlink.serving.prefix_cache import Landing, PrefixCache
from kvlink.serving.request import Request


@dataclass(eq=False)
class PrefillJob:
    """A prompt on its way through prefill. `grant` are the bytes that say where its KV goes, that
    of its first `start` tokens excepted, which decode has already."""

    request: Request
    attempt: int
    grant: bytes
    start: int = 0
    keys: Sequence[bytes] = ()  # of its whole pages
    pages: Any = None  # int32 page ids, once admitted
    num_cached: int = 0  # prompt tokens whose KV was here
    num_done: int = 0  # prompt tokens whose KV is written or being written

    @property
    def complete(self) -> bool:
        """Nothing of the prompt is left to schedule."""
        return self.num_done == len(self.request.prompt)


class PrefillScheduler:
    """First come, first served, in steps of at most `max_batch_tokens` prompt tokens.

    `copies`: pages to copy before the step that was scheduled last runs, one after the other.
    """

    def __init__(
        self,
        allocator: PageAllocator,
        max_batch_tokens: int,
        max_num_seqs: int,
        cache: PrefixCache | None = None,
    ) -> None:
        self.allocator = allocator
        self.cache = PrefixCache(allocator, enabled=False) if cache is None else cache
        self.copies: list[tuple[Any, Any]] = []
        self.max_batch_tokens = max_batch_tokens
        self.max_num_seqs = max_num_seqs
        self.waiting: deque[PrefillJob] = deque()
        self.running: list[PrefillJob] = []  # admitted, prompt not complete

    def add(self, job: PrefillJob) -> None:
        """Queues a job, in place of an earlier attempt that still waits: nobody waits for that."""
        earlier = [each for each in self.waiting if each.request.index == job.request.index]
        for each in earlier:
            self.waiting.remove(each)
        job.keys = self.cache.keys(job.request.prompt)
        self.waiting.append(job)

    def schedule(self) -> list[tuple[PrefillJob, Chunk]]:
        """The chunks of the next step, marked as done; empty when there is nothing to do."""
        step: list[tuple[PrefillJob, Chunk]] = []
        self.cache.step += 1
        self.copies = []
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
            # Layer by layer, a step writes all that is new before any of it is read: those after
            # this one may begin with it in the same step.
            whole = job.keys[: job.num_done // self.allocator.page_size]
            self.cache.add(prompt, whole, job.pages)
        self.running = [job for job in self.running if not job.complete]
        return step

    def release(self, job: PrefillJob) -> None:
        """Gives back the pages of a job, once nobody reads them."""
        self.allocator.free(job.pages)

    def _admit(self) -> bool:
        if not self.waiting:
            return False
        job = self.waiting[0]
        match = self.cache.match(job.request.prompt, job.keys)
        reserved = self.cache.reserve(match, len(job.request.prompt))
        if reserved is None:
            return False
        match, writable = reserved
        if len(writable.src):
            self.copies.append((writable.src, writable.dst))
        job.pages = writable.pages
        job.num_cached = job.num_done = match.num_tokens
        self.running.append(self.waiting.popleft())
        return True


@dataclass(eq=False)
class DecodeJob:
    """A sequence that decode answers for, from its admission to its last token."""

    request: Request
    keys: Sequence[bytes] = ()  # of its prompt's whole pages
    attempt: int = 0  # grants made for it so far
    num_failed: int = 0  # of them, by a fault of their own
    pages: Any = None  # int32 page ids, for the prompt and every new token
    start: int = 0  # tokens of the prompt in pages that it shares; the others are granted
    grant: Any = None
    landing: Landing = field(default_factory=Landing)
    awaited: list[Landing] = field(default_factory=list)  # that the shared pages come with
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

    @property
    def prefix_verified(self) -> bool:
        """The digests of all that it shares have held."""
        return all(landing.verified for landing in self.awaited)

    @property
    def prefix_lost(self) -> bool:
        """Some of what it shares did not arrive."""
        return any(landing.failed for landing in self.awaited)


class DecodeScheduler:
    """Reserves a request's pages for its whole life on admission: no request is ever evicted.

    Prompts share multiples of `shared_pages` pages, so that what is left begins a page on the other
    side, too.
    """

    def __init__(
        self,
        allocator: PageAllocator,
        max_num_seqs: int,
        cache: PrefixCache | None = None,
        shared_pages: int = 1,
    ) -> None:
        self.allocator = allocator
        self.cache = PrefixCache(allocator, enabled=False) if cache is None else cache
        self.shared_pages = shared_pages
        self.max_num_seqs = max_num_seqs
        self.waiting: deque[DecodeJob] = deque()
        self.arriving: dict[int, DecodeJob] = {}  # by request index; granted, KV on its way
        self.running: list[DecodeJob] = []

    def add(self, job: DecodeJob) -> None:
        """Queues a job."""
        job.keys = self.cache.keys(job.request.prompt)
        self.waiting.append(job)

    def admit(self) -> DecodeJob | None:
        """Reserves pages for the job that waits longest, if it fits now."""
        if not self.waiting or len(self.arriving) + len(self.running) >= self.max_num_seqs:
            return None
        job = self.waiting[0]
        prompt = job.request.prompt
        match = self.cache.match(prompt, job.keys, multiple=self.shared_pages)
        reserved = self.cache.reserve(match, job.request.num_kv_tokens)
        if reserved is None:
            return None
        job.pages, job.start, job.landing = reserved[1].pages, match.num_tokens, Landing()
        job.awaited = list({entry.landing for entry in match.entries if entry.landing is not None})
        self.cache.add(prompt, job.keys, job.pages, job.landing)
        self.arriving[job.request.index] = self.waiting.popleft()
        return job

    def granted_pages(self, job: DecodeJob) -> Any:
        """Those of the job's pages that the rest of its prompt fills."""
        size = self.allocator.page_size
        return job.pages[job.start // size : -(-len(job.request.prompt) // size)]

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
            if job.prefix_verified
        ]

    def fail(self, job: DecodeJob) -> None:
        """The KV of a job, or what it was to share, did not arrive."""
        if not job.landing.verified:
            job.landing.failed = True
            self.cache.drop(job.landing)
        del self.arriving[job.request.index]

    def requeue(self, job: DecodeJob) -> None:
        """A job that failed is first to be admitted again, to other pages."""
        job.token_ids.clear()
        job.failure = job.early_token = None
        job.early_late = False
        self.waiting.appendleft(job)

    def end(self, job: DecodeJob) -> None:
        """A running job has its last token: its pages are free."""
        self.running.remove(job)
        self.allocator.free(job.pages)
