"""Many threads on two endpoints of one process: what a thread sanitizer can look at."""

from __future__ import annotations

import random
import threading
from collections import Counter

import pytest
from receiving import SPEC, eventually

from kvlink.pages import PageAllocator
from kvlink.testing.faults.watched import holds, write_kv
from kvlink.testing.transfer_peer import SECRET
from kvlink.transfer import Endpoint, Link, TransferError

pytestmark = pytest.mark.timeout(120)

NUM_THREADS = 4
NUM_ROUNDS = 15
TOKENS = 40


class Site:
    """Both endpoints, with what their threads share."""

    def __init__(self) -> None:
        self.prefill = Endpoint("prefill", secret=SECRET)
        self.decode = Endpoint("decode", secret=SECRET)
        self.sources, self.pool = SPEC.build(), SPEC.build()
        self.prefill.register(self.sources, SPEC.shard)
        self.allocator = PageAllocator(SPEC.num_pages, SPEC.page_size)
        self.region = self.decode.register(
            self.pool, SPEC.shard, generations=self.allocator.generations
        )
        self.link: Link = self.prefill.connect(self.decode.address)

    def one(self, thread: int, choose: random.Random) -> str:
        """One request, and how it ended."""
        request = choose.randrange(2**30)
        src = list(range(3 * thread, 3 * thread + 3))
        write_kv(self.sources, SPEC, src, TOKENS, request)
        pages = self.allocator.allocate(3)
        grant = self.decode.grant(pages, TOKENS, on_release=lambda _: self.allocator.free(pages))
        how = choose.choice(("push", "push", "revoke", "cancel", "query"))
        transfer = self.link.begin(src, grant.to_bytes())
        for layer in choose.sample(range(4), 4):
            transfer.push_layer(layer)
        transfer.finish()
        if how == "revoke":
            grant.revoke()
        elif how == "cancel":
            transfer.cancel()
        elif how == "query":
            self.link.query(grant.transfer_id)
        try:
            arrival = grant.wait(10)
        except TransferError as error:
            grant.wait_released(10)
            return f"{how} {type(error).__name__}"
        finally:
            transfer.wait_source_reusable(10)
        assert holds(self.pool, arrival.pages, SPEC, TOKENS, request)
        self.allocator.free(pages)
        return f"{how} OK"


def test_threads_share_a_link() -> None:
    site = Site()
    ends: Counter[str] = Counter()
    errors: list[BaseException] = []

    def work(thread: int) -> None:
        choose = random.Random(thread)
        try:
            for _ in range(NUM_ROUNDS):
                ends[site.one(thread, choose)] += 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(NUM_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    site.prefill.close()
    assert not errors, errors
    eventually(lambda: site.allocator.num_free == SPEC.num_pages)
    site.decode.close()
    assert sum(ends.values()) == NUM_THREADS * NUM_ROUNDS
    assert ends["push OK"]
    assert not ends.keys() - {
        "push OK",
        "query OK",
        "revoke OK",
        "revoke GrantRevoked",
        "cancel OK",
        "cancel TransferCancelled",
    }
