"""The receiving side of the fault tests, and a sender for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from kvlink.testing.transfer_peer import Peer, open_endpoint, reachable
from kvlink.testing.transfer_pool import PoolSpec, pool_bytes
from kvlink.transfer import Arrival, Grant

SPEC = PoolSpec()
PAGES = [5, 3, 9]
TOKENS = 40


class Receiver:
    """An endpoint with a pool, and how often each grant gave its pages back."""

    def __init__(self, path: str | None = None) -> None:
        self.path = path
        self.endpoint = open_endpoint("decode", path)
        self.address = reachable(self.endpoint)
        self.pool = SPEC.build()
        self.region = self.endpoint.register(self.pool)
        self.returned: list[bytes] = []

    def grant(self, pages: list[int] | None = None, ttl: float = 30.0) -> Grant:
        def note(released: Grant) -> None:
            self.returned.append(released.transfer_id)

        return self.endpoint.grant(pages or PAGES, TOKENS, ttl, region=self.region, on_release=note)

    def gave_back(self, *grants: Grant) -> None:
        """These alone gave their pages back, once each, in this order. It may be another thread
        that is about to tell so of pages that were released."""
        want = [grant.transfer_id for grant in grants]
        eventually(lambda: len(self.returned) >= len(want))
        assert self.returned == want

    def arrive(self, peer: Peer) -> Arrival:
        """A new request, from the first byte to the last."""
        grant = self.grant()
        peer.call("push", PAGES, grant.to_bytes())
        arrival = grant.wait(10)
        want = SPEC.build()
        SPEC.fill(want, PAGES, TOKENS)
        for layer in range(4):
            got, expected = (np.from_dlpack(p.k(layer))[PAGES] for p in (self.pool, want))
            assert (got.view(np.int32) == expected.view(np.int32)).all()
        return arrival


def new_sender(receiver: Receiver) -> Peer:
    peer = Peer(SPEC, path=receiver.path)
    peer.call("fill", PAGES, TOKENS)
    peer.call("connect", receiver.address)
    return peer


def eventually(condition: Callable[[], Any], timeout: float = 30.0) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def poison(receiver: Receiver) -> bytes:
    pool_bytes(receiver.pool)[:] = 0xEE
    return pool_bytes(receiver.pool).tobytes()
