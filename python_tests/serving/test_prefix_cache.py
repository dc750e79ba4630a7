"""Which pages prompts share, what is copied, and what is given up when room is needed."""

from __future__ import annotations

import random

import numpy as np
import pytest

from kvlink.pages import PageAllocator
from kvlink.serving.prefix_cache import Landing, PrefixCache
from kvlink.serving.request import Request
from kvlink.serving.sampling import Sampling
from kvlink.serving.scheduler import DecodeScheduler, PrefillJob, PrefillScheduler

SIZE = 4


def make(num_pages: int = 32, root: bytes = b"") -> PrefixCache:
    return PrefixCache(PageAllocator(num_pages, SIZE), root)


def put(cache: PrefixCache, prompt: list[int], landing: Landing | None = None) -> list[int]:
    """A sequence with the KV of `prompt`; its pages, which the caller holds."""
    reserved = cache.reserve(cache.match(prompt, cache.keys(prompt)), len(prompt))
    assert reserved is not None
    pages = reserved[1].pages
    cache.add(prompt, cache.keys(prompt), pages, landing)
    cache.step += 1
    return list(pages)


def found(cache: PrefixCache, prompt: list[int], multiple: int = 0) -> tuple[list[int], int]:
    match = cache.match(prompt, cache.keys(prompt), multiple=multiple)
    return [entry.page for entry in match.entries], match.num_tokens


def test_whole_pages_and_the_first_tokens_of_one_more() -> None:
    cache = make()
    first = put(cache, list(range(14)))
    assert found(cache, [*range(9), 50, 51]) == (first[:2], 9)
    assert found(cache, [*range(9), 50, 51], multiple=1) == (first[:2], 8)
    assert found(cache, list(range(30))) == (first[:3], 12)
    assert found(cache, list(range(30)), multiple=2) == (first[:2], 8)
    # The last token is computed always, for its logits.
    assert found(cache, list(range(12))) == (first[:2], 11)
    assert found(cache, list(range(12)), multiple=1) == (first[:2], 8)
    # The same tokens elsewhere, or after others, are something else.
    assert found(cache, [9, *range(1, 14)]) == ([], 0)
    assert found(cache, list(range(4, 14))) == ([], 0)


def test_what_the_kv_depends_on_beside_tokens() -> None:
    allocator = PageAllocator(8, SIZE)
    prompt = list(range(9))
    assert not set(PrefixCache(allocator, b"a").keys(prompt)) & set(
        PrefixCache(allocator, b"b").keys(prompt)
    )
    assert PrefixCache(allocator, b"a", enabled=False).keys(prompt) == []


def test_a_page_that_fits_in_part_is_copied() -> None:
    cache = make()
    first = put(cache, list(range(12)))
    prompt = [*range(6), 50, 51, 52]
    reserved = cache.reserve(cache.match(prompt, cache.keys(prompt)), 9)
    assert reserved is not None
    match, (pages, src, dst) = reserved
    assert match.num_tokens == 6
    assert (list(src), list(dst)) == ([first[1]], [pages[1]])
    assert pages[0] == first[0]
    assert not set(pages[1:]) & set(first)
    assert cache.allocator.refcount(first).tolist() == [3, 2, 2]


def test_a_copy_is_given_up_where_it_would_not_fit() -> None:
    cache = make(num_pages=3)
    cache.allocator.free(put(cache, list(range(8))))
    prompt = [*range(6), 50, 51, 52]
    reserved = cache.reserve(cache.match(prompt, cache.keys(prompt)), 9)
    assert reserved is not None
    assert (reserved[0].num_tokens, len(reserved[1].src)) == (4, 0)
    assert len(set(reserved[1].pages)) == 3


def test_a_page_that_is_not_written_yet_is_not_copied() -> None:
    cache = make()
    pages = put(cache, list(range(8)))
    cache.step -= 1
    assert found(cache, [*range(6), 9, 9]) == (pages[:1], 4)
    cache.step += 1
    assert found(cache, [*range(6), 9, 9]) == (pages[:1], 6)


def test_what_was_used_longest_ago_goes_first_and_nothing_that_is_held() -> None:
    cache = make(num_pages=7)
    old, held, new = list(range(8)), list(range(20, 28)), list(range(40, 48))
    pages = {name: put(cache, prompt) for name, prompt in (("old", old), ("held", held))}
    cache.allocator.free(pages["old"])
    cache.allocator.free(put(cache, new))
    cache.match(old, cache.keys(old))  # looking is not using
    assert len(put(cache, [90, 91, 92, 93, 94])) == 2  # one page was free, one had to go
    assert found(cache, [*old, 1])[0] == pages["old"][:1]  # the beginning is given up last
    assert found(cache, [*new, 1])[1] == 8
    assert cache.reserve(cache.match([5] * 17, []), 17) is None  # 5 pages: only 3 could go
    assert found(cache, [*new, 1])[1] == 8  # and then none does
    assert found(cache, [*held, 1])[0] == pages["held"]


def test_what_did_not_arrive_is_not_here() -> None:
    cache = make()
    landing = Landing()
    pages = put(cache, list(range(8)), landing)
    other = put(cache, [*range(4), 7, 7, 7, 7], Landing())
    assert found(cache, list(range(9)), multiple=1) == (pages, 8)
    cache.drop(landing)
    assert found(cache, list(range(9)), multiple=1) == ([], 0)
    assert len(cache) == 1
    cache.allocator.free(pages)
    assert cache.allocator.num_free == 32 - len(set(other))  # the first page is still shared


@pytest.mark.parametrize("seed", range(20))
def test_every_sequence_has_its_own_tokens(seed: int) -> None:
    """Prompts of few tokens in a small pool, chunked; what pages hold is kept beside."""
    draw = random.Random(seed)
    allocator = PageAllocator(24, SIZE)
    cache = PrefixCache(allocator, b"root")
    scheduler = PrefillScheduler(allocator, draw.choice((3, 9, 40)), 5, cache)
    content = np.full((24, SIZE), -1)
    held: list[PrefillJob] = []
    num_served = num_reused = 0
    beginnings = [[draw.randrange(2) for _ in range(draw.randrange(20))] for _ in range(4)]
    for index in range(60):
        prompt = draw.choice(beginnings) + [draw.randrange(3) for _ in range(draw.randrange(1, 12))]
        scheduler.add(PrefillJob(Request(index, prompt, 1, Sampling()), 1, b""))
    while scheduler.waiting or scheduler.running:
        while held and (draw.random() < 0.4 or allocator.num_free < 8):
            scheduler.release(held.pop(draw.randrange(len(held))))
        step = scheduler.schedule()
        for src, dst in scheduler.copies:
            content[dst] = content[src]
        for _, chunk in step:
            for at, token in enumerate(chunk.token_ids, chunk.start):
                content[chunk.pages[at // SIZE], at % SIZE] = token
        for job, chunk in step:
            prompt, end = job.request.prompt, chunk.start + len(chunk.token_ids)
            assert content[job.pages].reshape(-1)[:end].tolist() == prompt[:end]
            if chunk.wants_logits:
                held.append(job)
                num_served += 1
                num_reused += job.num_cached
        # Nothing is written over while anybody holds it.
        for job in held:
            prompt = job.request.prompt
            assert content[job.pages].reshape(-1)[: len(prompt)].tolist() == prompt
    assert num_served == 60
    assert num_reused > 0
    for job in held:
        scheduler.release(job)
    assert allocator.num_free + len(cache) == 24
    assert allocator.refcount(np.arange(24)).max() <= 1


def test_decode_shares_what_begins_a_page_on_both_sides() -> None:
    allocator = PageAllocator(64, 24)
    cache = PrefixCache(allocator)
    scheduler = DecodeScheduler(allocator, 9, cache, shared_pages=2)  # 48: pages of 16 and of 24
    from kvlink.serving.scheduler import DecodeJob

    jobs = [
        DecodeJob(Request(index, [*range(130), index, *range(tail)], 5, Sampling()))
        for index, tail in enumerate((30, 3, 100))
    ]
    for job in jobs:
        scheduler.add(job)
        assert scheduler.admit() is job
    assert [job.start for job in jobs] == [0, 96, 96]
    assert [len(scheduler.granted_pages(job)) for job in jobs] == [7, 2, 6]
    assert jobs[1].pages[:4].tolist() == jobs[2].pages[:4].tolist() == jobs[0].pages[:4].tolist()
    assert jobs[1].awaited == jobs[2].awaited == [jobs[0].landing]
    assert not jobs[1].prefix_verified
    jobs[0].landing.verified = True
    assert jobs[1].prefix_verified
    late = DecodeJob(Request(7, list(range(140)), 5, Sampling()))
    scheduler.add(late)
    assert scheduler.admit() is late
    assert late.start == 96
    assert late.prefix_verified
