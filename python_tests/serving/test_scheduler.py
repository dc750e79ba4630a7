"""What runs next: budgets, order, pages."""

from __future__ import annotations

import numpy as np

from kvlink.pages import PageAllocator
from kvlink.serving.batch import Batch, Chunk
from kvlink.serving.request import Request
from kvlink.serving.sampling import Sampling
from kvlink.serving.scheduler import DecodeJob, DecodeScheduler, PrefillJob, PrefillScheduler

PAGE_SIZE = 4


def request(index: int, length: int, max_new_tokens: int = 3) -> Request:
    return Request(index, list(range(100, 100 + length)), max_new_tokens, Sampling())


def prefill(
    num_pages: int, budget: int, lengths: list[int], max_num_seqs: int = 9
) -> PrefillScheduler:
    scheduler = PrefillScheduler(PageAllocator(num_pages, PAGE_SIZE), budget, max_num_seqs)
    for index, length in enumerate(lengths):
        scheduler.add(PrefillJob(request(index, length), 1, b""))
    return scheduler


def steps(scheduler: PrefillScheduler) -> list[list[tuple[int, int, int, bool]]]:
    """(request, start, tokens, ends) of every chunk of every step, pages given back at once."""
    seen = []
    while step := scheduler.schedule():
        seen.append(
            [
                (job.request.index, chunk.start, len(chunk.token_ids), chunk.wants_logits)
                for job, chunk in step
            ]
        )
        for job, chunk in step:
            prompt = job.request.prompt
            assert chunk.token_ids == prompt[chunk.start : chunk.start + len(chunk.token_ids)]
            if chunk.wants_logits:
                scheduler.release(job)
    return seen


def test_a_later_attempt_takes_the_place_of_one_that_waits() -> None:
    scheduler = prefill(10, 100, [3, 2])
    scheduler.add(PrefillJob(request(0, 3), 2, b""))
    assert [(job.request.index, job.attempt) for job, _ in scheduler.schedule()] == [(1, 1), (0, 2)]
    assert not scheduler.waiting


def test_prompts_share_a_step() -> None:
    assert steps(prefill(10, 100, [3, 9, 1])) == [
        [(0, 0, 3, True), (1, 0, 9, True), (2, 0, 1, True)]
    ]


def test_long_prompts_go_in_chunks() -> None:
    assert steps(prefill(20, 8, [3, 12, 2])) == [
        [(0, 0, 3, True), (1, 0, 5, False)],
        [(1, 5, 7, True), (2, 0, 1, False)],
        [(2, 1, 1, True)],
    ]


def test_prefill_waits_for_pages_in_order() -> None:
    # 3 pages of 4: the second prompt needs all of them, and the short third does not overtake it.
    assert steps(prefill(3, 100, [5, 12, 1])) == [
        [(0, 0, 5, True)],
        [(1, 0, 12, True)],
        [(2, 0, 1, True)],
    ]


def test_sequences_in_a_step_are_bounded() -> None:
    scheduler = prefill(10, 100, [1, 1, 1], max_num_seqs=2)
    assert [len(step) for step in steps(scheduler)] == [2, 1]
    assert scheduler.allocator.num_free == 10


def test_decode_reserves_for_the_whole_request() -> None:
    scheduler = DecodeScheduler(PageAllocator(4, PAGE_SIZE), max_num_seqs=9)
    for index in range(3):
        scheduler.add(DecodeJob(request(index, length=4, max_new_tokens=5)))  # 8 tokens of KV
    first, second = scheduler.admit(), scheduler.admit()
    assert first is not None
    assert second is not None
    assert scheduler.admit() is None
    assert (len(first.pages), len(scheduler.granted_pages(first))) == (2, 1)
    first.token_ids.append(7)
    scheduler.start(first)
    jobs, chunks = scheduler.schedule()
    assert jobs == [first]
    assert (chunks[0].token_ids, chunks[0].start) == ([7], 4)
    scheduler.end(first)
    third = scheduler.admit()
    assert third is not None
    assert third.request.index == 2


def test_decode_bounds_sequences_and_requeues_in_front() -> None:
    scheduler = DecodeScheduler(PageAllocator(99, PAGE_SIZE), max_num_seqs=1)
    for index in range(2):
        scheduler.add(DecodeJob(request(index, 4)))
    job = scheduler.admit()
    assert job is not None
    assert scheduler.admit() is None
    job.token_ids.append(1)
    scheduler.fail(job)
    scheduler.requeue(job)
    assert scheduler.admit() is job
    assert job.token_ids == []


def test_batch() -> None:
    pages = np.array([5, 2, 9], np.int32)
    batch = Batch.of(
        [Chunk([1, 2, 3], 6, pages, True), Chunk([4], 0, pages[2:], False)], page_size=PAGE_SIZE
    )
    assert batch.token_ids.tolist() == [1, 2, 3, 4]
    assert batch.positions.tolist() == [6, 7, 8, 0]
    assert batch.slots.tolist() == [2 * 4 + 2, 2 * 4 + 3, 9 * 4, 9 * 4]
    assert batch.q_indptr.tolist() == [0, 3, 4]
    assert batch.seq_lens.tolist() == [9, 1]
    assert batch.page_table.tolist() == [[5, 2, 9], [9, -1, -1]]
    assert batch.logit_rows.tolist() == [2]
