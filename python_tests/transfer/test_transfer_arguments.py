"""Pools that do not convert and arguments that are wrong: each is told by name."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from kvlink.errors import InvalidArgument, Unsupported
from kvlink.layout import KVLayout, Shard
from kvlink.pool import KVPool
from kvlink.testing.transfer_peer import SECRET
from kvlink.testing.transfer_pool import PoolSpec
from kvlink.transfer import (
    Endpoint,
    InvalidDescriptor,
    LinkClosed,
    Transfer,
    TransferError,
    UnknownRegion,
)

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def server() -> Iterator[Endpoint]:
    with Endpoint("server", secret=SECRET) as endpoint:
        yield endpoint


@pytest.fixture
def client() -> Iterator[Endpoint]:
    with Endpoint("client", secret=SECRET) as endpoint:
        endpoint.register(PoolSpec().build())
        yield endpoint


UNCONVERTIBLE = {
    "head_dim": (PoolSpec(), PoolSpec(head_dim=8), "head_dim/head_dim_v differ: 16/16 and 8/8"),
    "form": (PoolSpec(), PoolSpec(kind="latent", kv_heads=(0, 1)), "separate pages do not convert"),
    "layers": (PoolSpec(), PoolSpec(layers=(8, 9)), "no layer of the destination"),
    "heads": (PoolSpec(), PoolSpec(kv_heads=(4, 8)), "have no KV head in common"),
    "sharing": (PoolSpec(), PoolSpec(layer_map=(0, 0, 1, 2)), "share memory at the destination"),
}


@pytest.mark.parametrize("name", UNCONVERTIBLE)
def test_pools_that_do_not_convert(
    client: Endpoint, server: Endpoint, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    src, dst, reason = UNCONVERTIBLE[name]
    region = client.register(src.build(), src.shard)
    server.register(dst.build(), dst.shard)
    link = client.connect(server.address)
    grant = server.grant([1, 2, 3], 10)
    for _ in range(2):
        with pytest.raises(TransferError, match=reason) as raised:
            link.begin([1, 2, 3], grant.to_bytes(), region=region)
        assert type(raised.value).__name__ == "Unconvertible"
    (told,) = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert "push refused: Unconvertible: " in told.getMessage()
    assert link.query(bytes(16)) is None
    assert grant.poll() is None  # still open, for who can fill it


@pytest.mark.parametrize("path", ["host_shm", "ucx"])
def test_a_private_pool(client: Endpoint, server: Endpoint, path: str) -> None:
    """Only its owner can map it; over ucx its owner moves what comes."""
    spec = PoolSpec()
    near, far = spec.build(), KVPool.create(spec.build().layout, num_layers=4, num_pages=8)
    spec.fill(near, [1, 2, 3], 40)
    region = client.register(near)
    server.register(far)
    link = client.connect(server.address, require=path)
    grant = server.grant([7, 2, 4], 40)
    if path == "host_shm":
        with pytest.raises(UnknownRegion, match="no region 0 that this link reaches"):
            link.push([1, 2, 3], grant.to_bytes(), region=region)
        return
    link.push([1, 2, 3], grant.to_bytes(), region=region)
    grant.wait(10)
    for layer in range(4):
        sent, got = (np.from_dlpack(pool.k(layer)) for pool in (near, far))
        assert (got[[7, 2]] == sent[[1, 2]]).all()
        assert (got[4, :8] == sent[3, :8]).all()


def test_wrong_arguments_are_named(client: Endpoint, server: Endpoint) -> None:
    pool = PoolSpec().build()
    with pytest.raises(InvalidArgument, match="expected 4 layers, as the pool has; got 3"):
        client.register(pool, Shard(range(3), range(4)))
    with pytest.raises(InvalidArgument, match="expected 4 KV heads, as the layout has; got 2"):
        client.register(pool, Shard(range(4), range(2)))
    with pytest.raises(InvalidArgument, match="0 are registered; register a pool first"):
        server.grant([1], 1)
    server.register(PoolSpec().build())
    for pages, tokens, message in (
        ([1, 1], 20, "each page once"),
        ([1], 17, "at least 2 for 17 tokens of page size 16; got 1"),
        ([32], 1, r"pages\[0\]: expected a page in \[0, 32\); got 32"),
        ([0, -1], 1, r"pages\[1\]: expected a page in \[0, 32\); got -1"),
        ([1], 0, "num_tokens: expected a positive integer; got 0"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            server.grant(pages, tokens)
    for ttl in (0, "1", float("nan")):
        with pytest.raises(InvalidArgument, match="ttl: expected seconds"):
            server.grant([1], 1, ttl=ttl)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="pulls: expected 1 to 64; got '1'"):
        server.offer([1], 1, pulls="1")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="pool: expected a KVPool; got None"):
        server.register(None)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="shard: expected a Shard"):
        server.register(pool, (4, 4))  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="region: expected a Region or its KVPool; got None"):
        server.unregister(None)  # type: ignore[arg-type]
    link = client.connect(server.address)
    with pytest.raises(InvalidDescriptor, match="expected an offer; got a grant"):
        link.pull(server.grant([1], 1).to_bytes(), [1])
    with Endpoint("alone", secret=SECRET, paths=("host_shm",)) as alone:
        alone.register(PoolSpec(shared=False).build())
        with pytest.raises(Unsupported, match="shared=True"):
            alone.grant([1], 1)
    for wrong in (
        {"secret": b"short"}, {"listen": "nowhere"}, {"listen": "0.0.0.0:0"}, {"paths": ("tcp",)},
        {"paths": "ucx"}, {"paths": ()}, {"peer_timeout": 0.1}, {"peer_timeout": "1"},
        {"secret": "text" * 8}, {"listen": 80}, {"num_slots": "1"}, {"num_page_entries": -1},
    ):  # fmt: skip
        with pytest.raises(InvalidArgument, match=next(iter(wrong))):
            Endpoint("x", **{"secret": SECRET, **wrong})  # type: ignore[arg-type]
    for address in (b"tcp://localhost", b"kvlink:2", b"kvlink:2;unix=", "kvlink:2;unix=x"):
        with pytest.raises(InvalidArgument, match="address"):
            client.connect(address)  # type: ignore[arg-type]
    for address in (b"kvlink:2;tcp=here", b"kvlink:2;tcp=example.org:80"):
        with pytest.raises(InvalidArgument, match="address"):
            client.connect(address)


def test_wrong_timeouts_are_named(client: Endpoint, server: Endpoint) -> None:
    server.register(PoolSpec().build())
    link = client.connect(server.address)
    grant = server.grant([1], 1)
    group = server.grant_group([(None, [2], 1)])
    transfer = link.begin([1], grant.to_bytes())
    moving = link.begin_group([(None, [2])], group.to_bytes())
    for call in (
        lambda t: client.connect(server.address, timeout=t),
        lambda t: client.accept(t),
        lambda t: client.unregister(client.register(PoolSpec().build()), t),
        lambda t: client.close(t),
        lambda t: link.query(bytes(16), t),
        lambda t: link.wait_connected(t),
        lambda t: grant.wait(t),
        lambda t: grant.wait_layer(0, t),
        lambda t: grant.wait_released(t),
        lambda t: group.wait(t),
        lambda t: group.wait_released(t),
        lambda t: transfer.wait_arrived(t),
        lambda t: transfer.wait_source_reusable(t),
        lambda t: moving.wait_arrived(t),
        lambda t: moving.wait_source_reusable(t),
    ):
        for wrong in ("1", None, float("nan"), float("inf")):
            with pytest.raises(InvalidArgument, match=rf"timeout: expected .*; got {wrong!r}"):
                call(wrong)
    for layer in (4, -1, "0"):
        with pytest.raises(InvalidArgument, match=f"layer: expected 0 to 3; got {layer!r}"):
            grant.wait_layer(layer, 0.0)  # type: ignore[arg-type]
    transfer.cancel()
    moving.cancel()


def test_a_closed_endpoint_says_so(client: Endpoint) -> None:
    pool = PoolSpec().build()
    client.close()
    for call in (
        lambda: client.register(pool),
        lambda: client.grant([1], 1),
        lambda: client.accept(0.01),
        lambda: client.connect(client.address),
    ):
        with pytest.raises(LinkClosed, match="the endpoint is closed"):
            call()


def test_both_sides_count_the_bytes_that_are_stored_scales_included() -> None:
    layout = KVLayout.hnd(
        num_kv_heads=2, head_dim=64, page_size=10, dtype="int8", scale="token_head"
    )
    src = KVLayout.nhd(num_kv_heads=2, head_dim=64, page_size=16, dtype="float32")
    with Endpoint("a", secret=b"s" * 16) as owner, Endpoint("b", secret=b"s" * 16) as other:
        owner.register(KVPool.create(layout, num_layers=3, num_pages=8, shared=True))
        other.register(KVPool.create(src, num_layers=3, num_pages=8, shared=True))
        link = other.connect(owner.address)
        grant = owner.grant([0, 1, 2], 25)
        transfer = link.push([3, 4], grant)
        grant.wait(30.0)
        transfer.wait_arrived(30.0)
        stored = 3 * 25 * layout.token_bytes()
        assert stored == transfer.plan.describe(25).dst_bytes
        assert transfer.progress().num_bytes == link.metrics()["push"]["bytes"] == stored
        assert owner.metrics()["arrived"]["bytes"] == stored
        for thing, words in (
            (owner, "'a'"),
            (link, "'a' over host_shm: connected"),
            (grant, "25 tokens in 3 pages, OK"),
            (transfer, "to 'a'"),
        ):
            assert words in repr(thing)


def calls_of(work: Callable[[], None]) -> int:
    """Calls that Python makes in this thread, its own functions and others."""
    count = 0

    def note(_frame: Any, event: str, _arg: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    gc.disable()
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


def test_what_python_does_does_not_grow_with_the_request(
    client: Endpoint, server: Endpoint
) -> None:
    """Posting a layer is one call into C++, and beginning a few: for one page, or for a thousand.
    Descriptors name a list of pages, and do not hold it."""
    spec = PoolSpec(num_pages=1000, head_dim=4, layers=(0, 1))
    region = client.register(spec.build(), spec.shard)
    server.register(spec.build(), spec.shard)
    link = client.connect(server.address)
    kept: list[Transfer] = []

    def costs(num_pages: int) -> tuple[int, int, int]:
        pages = np.arange(num_pages)
        grant = server.grant(pages, num_pages * spec.page_size)
        token = grant.to_bytes()
        begun = calls_of(lambda: kept.append(link.begin(pages, token, region=region)))
        posted = calls_of(lambda: kept[-1].push_layer(0))
        kept[-1].push_layer(1)
        kept[-1].finish()
        grant.wait(20)
        kept[-1].wait_arrived(20)
        return begun, posted, len(token)

    # The least of a few: the first one fills caches.
    one, thousand = (
        [min(each) for each in zip(*(costs(num_pages) for _ in range(4)), strict=True)]
        for num_pages in (1, 1000)
    )
    assert one == thousand
    assert one[2] == 116
