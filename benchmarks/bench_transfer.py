"""Hand-off, copied moves and the control plane of host_shm, between two processes.

    python benchmarks/bench_transfer.py [--case NAME ...] [--json]

handoff_16, handoff_32k   `Link.adopt` of a 32-layer request of that many tokens: no byte moves
offer_16, offer_32k       the owner's `Endpoint.offer` of the same (it names every page once)
copy_same, copy_relayout  `Link.push` of 256 MiB until the receiver has verified it: the same
                          layout, and page 16 -> 64 with NHD -> HND
*_move                    of the same, from the first layer posted to the last one moved: without
                          the receiver's verification
*_nodigest                the same without digest
post_layer                one `Transfer.push_layer` call of a 32k-token transfer
connect                   register a pool of 32 layers x 100k pages, and connect to a peer with one
memcpy                    the machine's copy bandwidth: the limit of the copied moves

A copied byte counts once. Rows without a limit report time alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import harness
from harness import Figure

from kvlink.layout import KVLayout
from kvlink.pool import KVPool
from kvlink.testing.transfer_peer import SECRET, Peer
from kvlink.testing.transfer_pool import PoolSpec
from kvlink.transfer import Endpoint

MOVES = {
    "copy_same": ("nhd", 16, True),
    "copy_same_nodigest": ("nhd", 16, False),
    "copy_relayout": ("hnd", 64, True),
    "copy_relayout_nodigest": ("hnd", 64, False),
}
HANDOFFS = {"16": 16, "32k": 32768}
CASES = ("handoff", *MOVES, "post_layer", "connect", "memcpy")
HEADS, HEAD_DIM = 8, 128


@dataclass(frozen=True)
class BenchSpec(PoolSpec):
    """A pool whose memory is not touched before it is used."""

    def build(self) -> KVPool:
        layout = getattr(KVLayout, self.kind)(
            num_kv_heads=len(self.shard.kv_heads), head_dim=self.head_dim,
            page_size=self.page_size, dtype=self.dtype,
        )  # fmt: skip
        return KVPool.create(
            layout, num_layers=len(self.layers), num_pages=self.num_pages, shared=True
        )


def spec(num_layers: int, num_tokens: int, **changes: object) -> BenchSpec:
    base = BenchSpec(
        dtype="bfloat16", head_dim=HEAD_DIM, layers=tuple(range(num_layers)),
        kv_heads=(0, HEADS), num_pages=num_tokens // 16,
    )  # fmt: skip
    return replace(base, **changes)  # type: ignore[arg-type]


def plain(op: str, case: str, dtype: str, seconds: float) -> Figure:
    """A figure that no limit binds."""
    return Figure(op, case, "host_shm", dtype, 16, round(seconds * 1e3, 5), 0.0, 0.0, "none", 0.0)


def handoff(seconds: float) -> Iterator[Figure]:
    """Sizes take turns, so that whatever disturbs one disturbs the other."""
    shape = spec(32, 32768)
    adopt_s: dict[str, list[float]] = {name: [] for name in HANDOFFS}
    offer_s: dict[str, list[float]] = {name: [] for name in HANDOFFS}
    with Endpoint("owner", secret=SECRET) as owner, Peer(shape) as peer:
        link = owner.connect(peer.address)
        owner.register(shape.build())
        end = time.perf_counter() + 2 * seconds
        while time.perf_counter() < end:
            for name, num_tokens in HANDOFFS.items():
                pages = list(range(num_tokens // 16))
                offer = peer.call("offer", pages, num_tokens)
                begin = time.perf_counter()
                lease = link.adopt(offer)
                adopt_s[name].append(time.perf_counter() - begin)
                assert len(lease.pages) == len(pages)
                lease.release()
                begin = time.perf_counter()
                own = owner.offer(pages, num_tokens)
                offer_s[name].append(time.perf_counter() - begin)
                own.revoke()
    for op, times in (("handoff", adopt_s), ("offer", offer_s)):
        for name, values in times.items():
            yield plain(op, f"{op}_{name}", "bfloat16", statistics.median(values))


def move(name: str, seconds: float) -> Iterator[Figure]:
    kind, page_size, digest = MOVES[name]
    num_layers, num_tokens = 8, 8192  # 256 MiB
    src = spec(num_layers, num_tokens)
    dst = replace(src, kind=kind, page_size=page_size, num_pages=num_tokens // page_size)
    num_bytes = num_layers * num_tokens * HEADS * HEAD_DIM * 2 * 2
    pages = list(range(src.num_pages))[::-1]  # no two neighbours in order
    dst_pages = [page ^ 1 for page in range(dst.num_pages)]
    moved_s: list[float] = []
    with Endpoint("decode", secret=SECRET) as endpoint, Peer(src) as peer:
        endpoint.register(dst.build())
        peer.call("fill", pages, num_tokens)
        peer.call("connect", endpoint.address)

        def once() -> None:
            grant = endpoint.grant(dst_pages, num_tokens, digest=digest)
            begin = time.perf_counter()
            transfer = peer.call("push", pages, grant.to_bytes())
            peer.start("wait_source_reusable", transfer)
            grant.wait(60)
            peer.result()
            whole_s.append(time.perf_counter() - begin)
            times = peer.call("span", transfer)
            moved_s.append(times)

        whole_s: list[float] = []
        harness.measure(once, seconds)
    for case, times in ((name, whole_s[1:]), (f"{name}_move", moved_s[1:])):
        yield harness.figure(
            "push", case, "host_shm", "bfloat16", page_size, statistics.median(times),
            {"copy": float(num_bytes)},
        )  # fmt: skip


def post_layer(seconds: float) -> Iterator[Figure]:
    num_tokens = 32768
    shape = spec(8, num_tokens, kv_heads=(0, 1), head_dim=64)
    times: list[float] = []
    with Endpoint("prefill", secret=SECRET) as endpoint, Peer(shape) as peer:
        endpoint.register(shape.build())
        link = endpoint.connect(peer.address)
        pages = list(range(shape.num_pages))
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            token = peer.call("grant", pages, num_tokens)
            transfer = link.begin(pages, token)
            for layer in range(8):
                begin = time.perf_counter()
                transfer.push_layer(layer)
                times.append(time.perf_counter() - begin)
            transfer.finish()
            peer.call("wait", token)
    yield plain("push_layer", "post_layer", "bfloat16", statistics.median(times))


def connect(seconds: float) -> Iterator[Figure]:
    shape = spec(32, 1_600_000, kv_heads=(0, 1), head_dim=64)
    times: list[float] = []
    pool = shape.build()
    with Peer(shape) as peer:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            with Endpoint("prefill", secret=SECRET) as endpoint:
                begin = time.perf_counter()
                endpoint.register(pool)
                link = endpoint.connect(peer.address)
                times.append(time.perf_counter() - begin)
                assert link.path == "host_shm"
    yield plain("connect", "connect", "bfloat16", statistics.median(times))


def memcpy() -> Iterator[Figure]:
    num_bytes = float(256 << 20)
    seconds = num_bytes / (harness.limits("cpu")["copy"] * 1e9)
    yield harness.figure(
        "copy", "memcpy", "host", "uint8", 0, seconds, {"copy": num_bytes}, peer="memcpy"
    )


def run(options: object) -> Iterator[Figure]:
    cases, seconds = options.case, options.seconds  # type: ignore[attr-defined]
    for case in cases:
        if case in MOVES:
            yield from move(case, seconds)
        elif case == "memcpy":
            yield from memcpy()
        else:
            yield from {"handoff": handoff, "post_layer": post_layer, "connect": connect}[case](
                seconds
            )


def main() -> None:
    """Runs the cases named on the command line."""
    options = harness.arguments("transfers", CASES, ["bfloat16"])
    harness.report(run(options), options.json)


if __name__ == "__main__":
    main()
