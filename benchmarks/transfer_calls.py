"""The single calls of transfers: hand-off, posting, connecting. No limit binds them."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator

from harness import Figure
from moves import Shape
from sides import Side


def plain(op: str, case: str, seconds: float, note: str = "") -> Figure:
    """A figure that no limit binds."""
    ms = round(seconds * 1e3, 5)
    return Figure(op, case, "host_shm", "bfloat16", 16, ms, 0, 0, "none", 0, "kvlink", note)


@contextlib.contextmanager
def linked(sender: Shape, receiver: Shape) -> Iterator[tuple[Side, Side]]:
    """Two kvlink sides; the first has connected to the second."""
    with Side("kvlink_side") as first, Side("kvlink_side") as second:
        first.call("open", vars(sender))
        first.call("connect", second.call("open", vars(receiver)), "host_shm")
        yield first, second


def handoff(seconds: float, case: str, num_tokens: int) -> Iterator[Figure]:
    shape = Shape(num_layers=32, num_tokens=32768, touched=False)
    offers, adoptions = [], []
    with linked(shape, shape) as (adopter, owner):
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(adoptions) < 20:
            offer, seconds = owner.call("offer", num_tokens)
            offers.append(seconds)
            adoptions.append(adopter.call("adopt", offer))
            owner.call("released")
    yield plain("handoff", case, statistics.median(adoptions), "no byte moves")
    pages = -(-num_tokens // shape.page_size)
    yield plain("offer", case, statistics.median(offers), f"names {pages} pages")


def post_layer(seconds: float) -> Iterator[Figure]:
    shape = Shape(heads=(0, 1), num_tokens=32768, head_dim=64)
    times: list[float] = []
    with linked(shape, shape) as (sender, receiver):
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            grant = receiver.call("grant")
            receiver.start("wait")
            times += sender.call("post_layers", grant)
            receiver.result()
    yield plain("push_layer", "post_layer", statistics.median(times))


def connect(seconds: float) -> Iterator[Figure]:
    """Pools of 100k and of 1k pages in turns."""
    sizes = (100_000, 1_000)
    times: dict[int, list[float]] = {num_pages: [] for num_pages in sizes}
    with contextlib.ExitStack() as stack:
        sides = {}
        for num_pages in sizes:
            shape = Shape(
                num_layers=32, num_tokens=num_pages * 16, heads=(0, 1), head_dim=64, touched=False
            )
            sides[num_pages] = [stack.enter_context(Side("kvlink_side")) for _ in range(2)]
            addresses = [side.call("open", vars(shape)) for side in sides[num_pages]]
            sides[num_pages].append(addresses[1])
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(times[sizes[0]]) < 5:
            for num_pages, (side, _, address) in sides.items():
                times[num_pages].append(side.call("reconnect", address))
    most, least = (statistics.median(times[num_pages]) for num_pages in sizes)
    yield plain("connect", "connect", most, f"with 1k pages: {least * 1e3:.3f} ms")
