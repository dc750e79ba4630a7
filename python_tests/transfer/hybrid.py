"""A hybrid model's pools: attention and sliding-window KV, convolution and SSM states, embeddings.

`HybridBody` holds them in a process of its own, `hold` in the test's. A request is a list of
(pool, pages, num_tokens).
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
from receiving import eventually

from kvlink import KVPool
from kvlink.testing.transfer_peer import SECRET, Peer
from kvlink.testing.transfer_pool import PoolSpec, pool_bytes
from kvlink.testing.waits import wait_outside
from kvlink.transfer import Endpoint, GrantGroup, GroupTransfer, Link, OfferGroup, Region

_STATE = PoolSpec(kind="opaque", page_size=1, num_pages=6, kv_heads=(0, 1))
PREFILL = {
    "attention": PoolSpec(dtype="float16", layers=(3, 7)),
    "window": PoolSpec(dtype="float16", layers=(1, 5), page_size=8),
    "conv": replace(_STATE, head_dim=4 * 24, layers=(0, 2, 4, 6)),
    "ssm": replace(_STATE, head_dim=2 * 16 * 8, layers=(0, 2, 4, 6)),
}
DECODE = PREFILL | {
    "attention": replace(PREFILL["attention"], kind="hnd", page_size=24),
    "window": replace(PREFILL["window"], page_size=16),
}
EMBEDDINGS = {"embeddings": replace(_STATE, dtype="bfloat16", head_dim=64 * 3584, layers=(0,))}

# 45 tokens, the last 16 of them in the window, and the states behind the last token.
SENT = [("attention", [9, 2, 5], 45), ("window", [7, 1], 16), ("conv", [3], 1), ("ssm", [4], 1)]
RECEIVED = [("attention", [8, 6], 45), ("window", [11], 16), ("conv", [0], 1), ("ssm", [5], 1)]

Request = list[tuple[str, list[int], int]]


class Held:
    """An endpoint with the pools of `specs` registered."""

    def __init__(
        self, name: str, specs: dict[str, PoolSpec], secret: bytes, **arguments: Any
    ) -> None:
        self.specs = specs
        self.endpoint = Endpoint(name, secret=secret, **arguments)
        self.pools: dict[str, KVPool] = {}
        self.regions: dict[str, Region] = {}
        for each, spec in specs.items():
            self.pools[each] = spec.build()
            self.regions[each] = self.endpoint.register(self.pools[each], spec.shard)

    def fill(self, request: Request, seed: int = 0) -> None:
        for name, pages, num_tokens in request:
            fill(self.specs[name], self.pools[name], pages, num_tokens, seed)

    def members(self, request: Request) -> list[Any]:
        return [(self.regions[name], pages, count) for name, pages, count in request]

    def content(self, name: str) -> bytes:
        return pool_bytes(self.pools[name]).tobytes()


def fill(spec: PoolSpec, pool: KVPool, pages: list[int], num_tokens: int, seed: int) -> None:
    if spec.dtype == "bfloat16":  # numpy has no such type: random bits
        of_page = pool_bytes(pool).reshape(spec.num_pages, -1)
        for idx, page in enumerate(pages):
            of_page[page] = np.random.default_rng([seed, idx]).integers(0, 256, of_page.shape[1])
        return
    spec.fill(pool, pages, num_tokens, seed)


def expected(specs: dict[str, PoolSpec], request: Request, seed: int = 0) -> dict[str, bytes]:
    """The pools' memory with that request in it and nothing else."""
    wanted = {}
    for name, pages, num_tokens in request:
        pool = specs[name].build()
        fill(specs[name], pool, pages, num_tokens, seed)
        wanted[name] = pool_bytes(pool).tobytes()
    return wanted


class Decode(Held):
    """The receiver, and the groups that gave their pages back."""

    path = "host_shm"

    def __init__(self, **arguments: Any) -> None:
        super().__init__("decode", DECODE, SECRET, **arguments)
        self.returned: list[GrantGroup] = []

    def grant(self, ttl: float = 30.0) -> GrantGroup:
        return self.endpoint.grant_group(
            self.members(RECEIVED), ttl, on_release=self.returned.append
        )

    def check_arrived(self, seed: int = 0) -> None:
        wanted = expected(DECODE, RECEIVED, seed)
        for name in DECODE:
            assert self.content(name) == wanted[name]

    def check_returned(self, group: GrantGroup) -> None:
        """Once, and nobody is inside any page; the pages serve another request."""
        eventually(lambda: group.released and self.returned)
        time.sleep(0.05)  # more than two looks of the reaper
        assert self.returned == [group]
        assert not group.revoke()
        assert not group.extend(30)
        assert all(member.released for member in group.members)

    def clear(self) -> None:
        for name, pool in self.pools.items():
            pool_bytes(pool)[:] = pool_bytes(DECODE[name].build())


def serves(decode: Decode, prefill: Peer) -> None:
    """One more request, over the same pages."""
    decode.clear()
    group = decode.grant()
    idx = prefill.call("push_group", SENT, group.to_bytes())
    assert len(group.wait(10)) == 4
    prefill.call("wait_arrived", idx)
    decode.check_arrived()


class HybridBody(Held):
    """The other process; see `kvlink.testing.transfer_peer`."""

    def __init__(self, specs: dict[str, PoolSpec], secret: bytes) -> None:
        super().__init__("peer", specs, secret)
        self.link: Link | None = None
        self.moving: list[GroupTransfer] = []
        self.open: dict[bytes, GrantGroup | OfferGroup] = {}

    def address(self) -> bytes:
        return self.endpoint.address

    def connect(self, address: bytes) -> str:
        self.link = self.endpoint.connect(address)
        return self.link.path

    def sides(self, request: list[Any]) -> list[Any]:
        return [each and (self.regions[each[0]], each[1]) for each in request]

    def push_group(self, request: list[Any], grants: bytes) -> int:
        assert self.link is not None
        self.moving.append(self.link.push_group(self.sides(request), grants))
        return len(self.moving) - 1

    def begin_group(self, request: list[Any], grants: bytes) -> int:
        assert self.link is not None
        self.moving.append(self.link.begin_group(self.sides(request), grants))
        return len(self.moving) - 1

    def push_layer(self, idx: int, member: int, layer: int) -> None:
        transfer = self.moving[idx].members[member]
        assert transfer is not None
        transfer.push_layer(layer)

    def finish(self, idx: int) -> None:
        self.moving[idx].finish()

    def cancel(self, idx: int) -> None:
        self.moving[idx].cancel()

    def wait_outside(self, idx: int) -> None:
        for transfer in self.moving[idx].members:
            if transfer is not None:
                wait_outside(transfer, 10)

    def wait_source_reusable(self, idx: int) -> None:
        self.moving[idx].wait_source_reusable(10)

    def wait_arrived(self, idx: int) -> None:
        self.moving[idx].wait_arrived(10)

    def offer_group(self, request: Request, ttl: float = 30.0) -> bytes:
        group = self.endpoint.offer_group(self.members(request), ttl)
        self.open[group.to_bytes()] = group
        return group.to_bytes()

    def extend(self, token: bytes, ttl: float) -> bool:
        return self.open[token].extend(ttl)

    def adopt_group(self, offers: bytes) -> list[tuple[list[int], bytes]]:
        """Pages of each member, and the memory of the pool they lie in."""
        assert self.link is not None
        self.lease = self.link.adopt_group(offers)
        return [
            (each.pages.tolist(), pool_bytes(each.pool).tobytes()) for each in self.lease.members
        ]

    def check_lease(self) -> None:
        self.lease.check()

    def release(self) -> None:
        self.lease.release()

    def revoke_member(self, token: bytes, idx: int) -> bool:
        return self.open[token].members[idx].revoke()

    def wait_released(self, token: bytes) -> str:
        self.open[token].wait_released(10)
        return str(self.open[token].status.name)

    def flip_bit(self, name: str, page: int) -> None:
        flip_bit(self.pools[name], self.specs[name], page)

    def close(self) -> None:
        self.endpoint.close()


def flip_bit(pool: KVPool, spec: PoolSpec, page: int) -> None:
    """In the first layer's K of a page."""
    pool_bytes(pool)[pool.layout.k.offset_bytes + page * page_bytes(pool)] ^= 1


def page_bytes(pool: KVPool) -> int:
    return pool.layout.k.stride_page * pool.layout.element_bytes
