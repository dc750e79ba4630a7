"""PageAllocator against a plain model, and its errors."""

from __future__ import annotations

import threading
from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvlink import PageAllocator
from kvlink.errors import DoubleFree, ForeignPage, InvalidArgument, NotAllocated, OutOfPages

NUM_PAGES = 12
PAGE_SIZE = 3


class AllocatorMachine(RuleBasedStateMachine):
    """Sequences with their tokens, the pages that should hold them, and what the pages hold."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = PageAllocator(NUM_PAGES, PAGE_SIZE)
        self.free_stack = list(reversed(range(NUM_PAGES)))
        self.sequences: list[tuple[list[int], list[int]]] = []  # tokens, pages
        self.memory = np.full((NUM_PAGES, PAGE_SIZE), -1)
        self.generations = np.ones(NUM_PAGES, np.uint32)
        self.next_token = 0

    def references(self) -> Counter[int]:
        return Counter(page for _, pages in self.sequences for page in pages)

    def drop(self, pages: list[int]) -> None:
        """The model's free, called after the sequences have let go of `pages`."""
        left = self.references()
        gone = [page for page in dict.fromkeys(pages) if left[page] == 0]
        self.free_stack.extend(reversed(gone))
        for page in gone:
            self.generations[page] += 1
            self.memory[page] = -1

    @rule(num=st.integers(0, NUM_PAGES + 2))
    def start(self, num: int) -> None:
        if num > len(self.free_stack):
            with pytest.raises(OutOfPages, match=f"{num} pages; {len(self.free_stack)} are free"):
                self.allocator.allocate(num)
            return
        pages = self.allocator.allocate(num)
        assert pages.dtype == np.int32
        assert pages.tolist() == [self.free_stack.pop() for _ in range(num)]
        self.sequences.append(([], pages.tolist()))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        """Overwrites from some position on, and appends."""
        index = data.draw(st.integers(0, len(self.sequences) - 1))
        tokens, pages = self.sequences[index]
        start = data.draw(st.integers(0, len(tokens)))
        stop = start + data.draw(st.integers(0, 2 * PAGE_SIZE + 1))
        touched = pages[start // PAGE_SIZE : -(-stop // PAGE_SIZE)] if stop > start else []
        shared = [page for page in touched if self.references()[page] > 1]
        added = max(0, -(-stop // PAGE_SIZE) - len(pages))
        if len(shared) + added > len(self.free_stack):
            with pytest.raises(OutOfPages):
                self.allocator.prepare_write(pages, start, stop)
            return
        writable, src, dst = self.allocator.prepare_write(pages, start, stop)
        fresh = [self.free_stack.pop() for _ in range(len(shared) + added)]
        expected = list(pages)
        for old, new in zip(shared, fresh, strict=False):
            expected[expected.index(old)] = new
        expected += fresh[len(shared) :]
        assert writable.tolist() == expected
        assert set(src.tolist()) <= set(shared)
        self.memory[dst] = self.memory[src]
        tokens = tokens[:start]
        for slot in self.allocator.slots(writable, start, stop):
            self.memory[slot // PAGE_SIZE, slot % PAGE_SIZE] = self.next_token
            tokens.append(self.next_token)
            self.next_token += 1
        self.sequences[index] = (tokens, writable.tolist())

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        tokens, pages = data.draw(st.sampled_from(self.sequences))
        num_tokens = data.draw(st.integers(0, len(tokens)))
        forked = self.allocator.fork(pages, num_tokens)
        assert forked.tolist() == pages[: -(-num_tokens // PAGE_SIZE)]
        self.sequences.append((tokens[:num_tokens], forked.tolist()))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.sequences) - 1))
        _, pages = self.sequences.pop(index)
        self.allocator.free(pages)
        self.drop(pages)

    @precondition(lambda self: len(self.sequences) > 1)
    @rule()
    def end_all_at_once(self) -> None:
        pages = [page for _, held in self.sequences for page in held]
        self.sequences = []
        self.allocator.free(pages)
        self.drop(pages)

    @rule(data=st.data())
    def free_too_much(self, data: st.DataObject) -> None:
        page = data.draw(st.integers(0, NUM_PAGES - 1))
        others = [page for _, pages in self.sequences for page in pages]
        with pytest.raises(DoubleFree, match=f"page {page}: "):
            self.allocator.free([page] * (self.references()[page] + 1) + others)

    @invariant()
    def agrees(self) -> None:
        references = self.references()
        assert self.allocator.num_free == len(self.free_stack)
        counts = self.allocator.refcount(range(NUM_PAGES))
        assert counts.tolist() == [references[page] for page in range(NUM_PAGES)]
        assert (self.allocator.generations == self.generations).all()
        for tokens, pages in self.sequences:
            slots = self.allocator.slots(pages, 0, len(tokens))
            assert self.memory.reshape(-1)[slots].tolist() == tokens


AllocatorMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None
)
TestAllocatorModel = AllocatorMachine.TestCase


def test_order_is_that_of_a_stack() -> None:
    allocator = PageAllocator(6, 4)
    assert allocator.allocate(4).tolist() == [0, 1, 2, 3]
    allocator.free([2, 0])
    assert allocator.allocate(3).tolist() == [2, 0, 4]


def test_generation_tells_a_reused_page() -> None:
    allocator = PageAllocator(2, 4)
    pages = allocator.allocate(1)
    before = allocator.generations[pages]
    allocator.retain(pages)
    allocator.free(pages)
    assert (allocator.generations[pages] == before).all()  # still held once
    allocator.free(pages)
    assert (allocator.generations[pages] != before).all()
    with pytest.raises(ValueError, match="read-only"):
        allocator.generations[0] = 7


def test_generations_wrap() -> None:
    allocator = PageAllocator(1, 4)
    allocator._generations[:] = 2**32 - 1
    allocator.free(allocator.allocate(1))
    assert allocator.generations[0] == 0


def test_page_that_is_overwritten_whole_is_not_copied() -> None:
    allocator = PageAllocator(8, 4)
    pages = allocator.allocate(2)
    fork = allocator.fork(pages, 8)
    write = allocator.prepare_write(fork, 4, 8)
    assert write.pages.tolist() == [0, 2]
    assert len(write.src) == len(write.dst) == 0
    again = allocator.prepare_write(write.pages, 3, 9)
    assert again.pages.tolist() == [3, 2, 4]
    assert (again.src.tolist(), again.dst.tolist()) == ([0], [3])


def test_last_holder_writes_in_place() -> None:
    allocator = PageAllocator(4, 4)
    pages = allocator.allocate(1)
    fork = allocator.fork(pages, 2)
    allocator.free(pages)
    write = allocator.prepare_write(fork, 2, 3)
    assert write.pages.tolist() == [0]
    assert len(write.src) == 0


@pytest.mark.parametrize("bad", [[4], [-1], [0, 99], np.array([2**40])])
@pytest.mark.parametrize("call", ["free", "retain", "refcount", "fork", "prepare_write"])
def test_foreign_page(call: str, bad: list[int]) -> None:
    allocator = PageAllocator(4, 4)
    allocator.allocate(4)
    more = {"fork": (1,), "prepare_write": (0, 1)}.get(call, ())
    with pytest.raises(ForeignPage, match=r"expected 0 to 3; got -?\d+"):
        getattr(allocator, call)(bad, *more)
    assert allocator.refcount(range(4)).tolist() == [1] * 4


@pytest.mark.parametrize("call", ["retain", "fork", "prepare_write"])
def test_free_page_is_not_used(call: str) -> None:
    allocator = PageAllocator(4, 4)
    allocator.allocate(2)
    more = {"fork": (5,), "prepare_write": (4, 5)}.get(call, ())
    with pytest.raises(NotAllocated, match="page 3 is free"):
        getattr(allocator, call)([0, 3], *more)
    assert allocator.refcount(range(4)).tolist() == [1, 1, 0, 0]
    assert allocator.num_free == 2


@pytest.mark.parametrize("bad", [[0.5], ["a"], [[0]], [True], 3, [2**70]])
def test_pages_must_be_integers(bad: object) -> None:
    allocator = PageAllocator(4, 4)
    with pytest.raises(InvalidArgument, match="pages: expected a flat list of integers"):
        allocator.free(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("num_pages", "page_size"), [(0, 1), (1, 0), (2**31, 1), (1.0, 1), (True, 1)]
)
def test_sizes_are_checked(num_pages: int, page_size: int) -> None:
    with pytest.raises(InvalidArgument, match=r"num_pages|page_size"):
        PageAllocator(num_pages, page_size)


def test_ranges_are_checked() -> None:
    allocator = PageAllocator(4, 4)
    pages = allocator.allocate(2)
    with pytest.raises(InvalidArgument, match="num_pages: expected an integer >= 0; got -1"):
        allocator.allocate(-1)
    with pytest.raises(InvalidArgument, match=r"num_tokens: expected 0 to 8.*got 9"):
        allocator.fork(pages, 9)
    with pytest.raises(InvalidArgument, match=r"start <= 8.*got 9, 10"):
        allocator.prepare_write(pages, 9, 10)
    with pytest.raises(InvalidArgument, match="got 3, 2"):
        allocator.prepare_write(pages, 3, 2)
    with pytest.raises(InvalidArgument, match=r"stop <= 8.*got 0, 9"):
        allocator.slots(pages, 0, 9)
    allocator.retain([0])
    with pytest.raises(InvalidArgument, match="expected each page once"):
        allocator.prepare_write([0, 0], 0, 8)
    assert allocator.num_free == 2


def test_threads_share_one_allocator() -> None:
    allocator = PageAllocator(64, 4)
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        held: list[np.ndarray] = []
        try:
            for _ in range(300):
                if held and rng.random() < 0.5:
                    allocator.free(held.pop(int(rng.integers(len(held)))))
                else:
                    pages = allocator.allocate(int(rng.integers(1, 4)))
                    assert (allocator.refcount(pages) == 1).all()
                    held.append(pages)
                    if len(held) == 5:
                        allocator.free(held.pop())
        except BaseException as error:
            errors.append(error)
        for pages in held:
            allocator.free(pages)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert not errors
    assert allocator.num_free == 64
    assert sorted(allocator.allocate(64).tolist()) == list(range(64))
