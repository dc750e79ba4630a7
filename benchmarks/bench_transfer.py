"""Transfers between two processes: moves by every path, hand-off, the control plane.

    python benchmarks/bench_transfer.py [--case NAME ...] [--json]
                                        [--peer nixl --peer-python PATH] [--peer mooncake ...]

shm_same_4k, shm_same_64k  host_shm, the same layout on both sides, pages of 4 and 64 KiB
shm_relayout               two ranks of TP 4 fill one of TP 2, page 16 -> 64, NHD -> HND
shm_convert                the same, bfloat16 to fp8 and int8
digest                     shm_same_64k with the digest and without
ucx_shm_4k                 ucx over shared memory, the same layout, pages of 4 KiB
ucx_tcp_16k, ucx_tcp_1m    ucx over TCP between two network namespaces, pages of 16 KiB and 1 MiB
ucx_tcp_line               as ucx_tcp_1m, where the wire between them carries 10 and 25 Gbit/s
handoff_16, handoff_32k    `Link.adopt` of so many tokens x 32 layers; and the owner's offer of them
post_layer                 one `Transfer.push_layer` call of a 32k-token transfer
connect                    register a pool of 32 layers x 100k pages, and connect to a peer with one
overlap, overlap_ucx       what a prefill leaves to wait for that pushes layer by layer, or after
memcpy                     the machine's copy bandwidth with two threads

Moves are of 256 MiB, in pages that are scattered on both sides. `verified` is the time from the
sender's call until the receiver, verifying what has landed while the rest moves, has committed.
`moved` is that until the last byte was moved (digested on the way) while the receiver does nothing.
Their limit is a copy of the same memory traffic at memcpy's rate: (bytes read + bytes written) / 2;
`verified` notes what it reaches of that and of reading the arrived bytes once more, in one sum.
Over TCP it is a plain TCP stream's time between the same namespaces, without them over loopback.
GB/s count the bytes at the source once.

A peer's script (peers/) runs in the environment of its own Python. It writes 256 MiB from one
process to another, in pieces of the same size, scattered on both sides; its time ends when its own
call says that all is done. Limits and peers take turns with what is held against them.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import harness
from harness import Figure
from moves import NUM_BYTES, Kvlink, Memcpy, Peer, Shape, Stream, in_turns, median, ratio
from overlap import overlap
from perftest import line_rate
from sides import Side

from kvlink.testing.two_hosts import ADDRESSES, NotPermitted, TwoHosts

PEERS = {"nixl": "ucx", "mooncake": "tcp"}  # name -> what moves its bytes

SAME_4K = Shape(page_size=8, heads=(0, 1), num_tokens=65536)
SAME_64K = Shape()
SAME_16K = Shape(heads=(0, 2), num_tokens=32768)
SAME_1M = Shape(page_size=256)
RANKS = tuple(Shape(heads=(first, first + 2), num_tokens=16384) for first in (0, 2))
DECODE = Shape(order="hnd", page_size=64, heads=(0, 4), num_tokens=16384)
CONVERTED = (("float8_e4m3", "tensor"), ("float8_e4m3", "token_head"), ("int8", "token_head"))


@dataclass
class Run:
    """What the command line asks for. `peers`: [name, its Python]."""

    seconds: float
    peers: list[list[str]] = field(default_factory=list)


def moves(
    run: Run, case: str, kvlinks: dict[str, Kvlink], piece_bytes: int = 0,
    line: Stream | None = None, **where: object,
) -> Iterator[Figure]:  # fmt: skip
    """kvlink's figures by the text that tells them apart, those of the peers that write pieces of
    `piece_bytes`, and the limit's; all in turns."""
    with contextlib.ExitStack() as stack:
        limit = stack.enter_context(line or Memcpy())
        own = [stack.enter_context(each) for each in kvlinks.values()]
        peers = []
        for name, python in run.peers if piece_bytes else []:
            try:
                peer = Peer(name, python, piece_bytes, **where)  # type: ignore[arg-type]
                peers.append(stack.enter_context(peer))
            except (RuntimeError, OSError) as error:
                print(f"{case}: {name} is left out: {error}", file=sys.stderr)
        limits, *times = in_turns([limit, *own, *peers], run.seconds)
    what = "line" if line else "copy"
    of_peers = dict(zip((peer.name for peer in peers), times[len(own) :], strict=True))
    for (text, each), rounds in zip(kvlinks.items(), times, strict=False):
        moved = sum(shape.num_bytes for shape in each.sources)
        share = (moved + each.target.num_bytes) / 2 / NUM_BYTES
        copies = [times["moved"] * share for times in limits]
        for name in rounds[0]:
            notes = [text, each.detail if each.path == "ucx" else ""]
            if name == "verified" and each.digest and "read" in limits[0]:
                reads = [times["read"] * each.target.num_bytes / NUM_BYTES for times in limits]
                both = [sum(pair) for pair in zip(copies, reads, strict=True)]
                notes.append(f"{ratio(rounds, name, both):.0%} of copy and read")
            for peer, turns in of_peers.items():
                reached = ratio(rounds, name, [times["moved"] for times in turns])
                notes.append(f"{reached:.2f} x {peer}")
            seconds = median(rounds, name)
            yield Figure(
                f"push_{name}", case, each.path, each.target.dtype, each.target.page_size,
                round(seconds * 1e3, 4), round(moved / seconds / 1e9, 3), 0.0, what,
                round(ratio(rounds, name, copies), 4), "kvlink",
                "; ".join(note for note in notes if note),
            )  # fmt: skip
    rows = [("write", name, PEERS[name], turns) for name, turns in of_peers.items()]
    rows.append((limit.op, limit.name, "host", limits))
    for op, name, backend, turns in rows:
        seconds = median(turns)
        yield Figure(
            op, case, backend, "uint8", 0, round(seconds * 1e3, 4),
            round(NUM_BYTES / seconds / 1e9, 3), 0.0, what,
            round(ratio(turns, "moved", [times["moved"] for times in limits]), 4), name,
        )  # fmt: skip


def shm_same(run: Run, case: str, shape: Shape, piece_bytes: int) -> Iterator[Figure]:
    yield from moves(run, case, {"": Kvlink([shape], shape, "host_shm")}, piece_bytes)


def shm_relayout(run: Run) -> Iterator[Figure]:
    yield from moves(run, "shm_relayout", {"": Kvlink(RANKS, DECODE, "host_shm")})


def shm_convert(run: Run) -> Iterator[Figure]:
    for dtype, scale in CONVERTED:
        text = {"tensor": "one scale", "token_head": "a scale per token and head"}[scale]
        target = replace(DECODE, dtype=dtype, scale=scale)
        yield from moves(run, "shm_convert", {text: Kvlink(RANKS, target, "host_shm")})


def digest(run: Run) -> Iterator[Figure]:
    # By the same processes: those of others have other memory.
    digested = Kvlink([SAME_64K], SAME_64K, "host_shm")
    sides = {
        "with digest": digested,
        "without digest": replace(digested, digest=False, like=digested),
    }
    found = list(moves(run, "digest", sides))
    without = {figure.op: figure.ms for figure in found if figure.note == "without digest"}
    for figure in found:
        if figure.note.startswith("with digest"):
            cost = figure.ms / without[figure.op] - 1
            note = figure.note.replace("with digest", f"with digest, which costs {cost:.1%}")
            figure = replace(figure, note=note)
        yield figure


def ucx_shm_4k(run: Run) -> Iterator[Figure]:
    yield from moves(run, "ucx_shm_4k", {"": Kvlink([SAME_4K], SAME_4K, "ucx")}, 4 << 10)


def ucx_tcp(run: Run, case: str, shape: Shape, piece_bytes: int) -> Iterator[Figure]:
    with contextlib.ExitStack() as stack:
        where = {"prefixes": ((), ()), "hosts": ("127.0.0.1", "127.0.0.1")}
        note = ""
        try:
            hosts = stack.enter_context(TwoHosts())
            where = {"prefixes": (hosts.prefix(0), hosts.prefix(1)), "hosts": ADDRESSES}
        except NotPermitted as error:
            note = f"over loopback: {error}"
        line = Stream(**where)  # type: ignore[arg-type]
        where["environment"] = {"UCX_TLS": "tcp"}
        own = Kvlink([shape], shape, "ucx", **where)  # type: ignore[arg-type]
        for figure in moves(run, case, {note: own}, piece_bytes, line, **where):
            yield replace(figure, note=note) if figure.peer == "socket" else figure
        yield from line_rate(case, piece_bytes, note, **where)  # type: ignore[arg-type]


def ucx_tcp_line(run: Run) -> Iterator[Figure]:
    """Wires that are slower than the processors of this machine, as those between hosts are."""
    for rate in (10.0, 25.0):
        try:
            with TwoHosts(gbit_s=rate) as hosts:
                where = {"prefixes": (hosts.prefix(0), hosts.prefix(1)), "hosts": ADDRESSES}
                line = Stream(**where)  # type: ignore[arg-type]
                own = Kvlink(
                    [SAME_1M], SAME_1M, "ucx", environment={"UCX_TLS": "tcp"},
                    **where,  # type: ignore[arg-type]
                )  # fmt: skip
                note = f"{rate:g} Gbit/s"
                for figure in moves(run, "ucx_tcp_line", {note: own}, line=line):
                    yield replace(figure, note=note) if figure.peer == "socket" else figure
        except NotPermitted as error:
            print(f"ucx_tcp_line: left out: {error}", file=sys.stderr)
            return


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


def handoff(run: Run, case: str, num_tokens: int) -> Iterator[Figure]:
    shape = Shape(num_layers=32, num_tokens=32768, touched=False)
    offers, adoptions = [], []
    with linked(shape, shape) as (adopter, owner):
        end = time.perf_counter() + run.seconds
        while time.perf_counter() < end or len(adoptions) < 20:
            offer, seconds = owner.call("offer", num_tokens)
            offers.append(seconds)
            adoptions.append(adopter.call("adopt", offer))
            owner.call("released")
    yield plain("handoff", case, statistics.median(adoptions), "no byte moves")
    pages = -(-num_tokens // shape.page_size)
    yield plain("offer", case, statistics.median(offers), f"names {pages} pages")


def post_layer(run: Run) -> Iterator[Figure]:
    shape = Shape(heads=(0, 1), num_tokens=32768, head_dim=64)
    times: list[float] = []
    with linked(shape, shape) as (sender, receiver):
        end = time.perf_counter() + run.seconds
        while time.perf_counter() < end:
            grant = receiver.call("grant")
            receiver.start("wait")
            times += sender.call("post_layers", grant)
            receiver.result()
    yield plain("push_layer", "post_layer", statistics.median(times))


def connect(run: Run) -> Iterator[Figure]:
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
        end = time.perf_counter() + run.seconds
        while time.perf_counter() < end or len(times[sizes[0]]) < 5:
            for num_pages, (side, _, address) in sides.items():
                times[num_pages].append(side.call("reconnect", address))
    most, least = (statistics.median(times[num_pages]) for num_pages in sizes)
    yield plain("connect", "connect", most, f"with 1k pages: {least * 1e3:.3f} ms")


def memcpy(run: Run) -> Iterator[Figure]:
    (rounds,) = in_turns([Memcpy()], run.seconds)
    seconds = median(rounds)
    yield Figure(
        "copy", "memcpy", "host", "uint8", 0, round(seconds * 1e3, 4),
        round(NUM_BYTES / seconds / 1e9, 3), 0.0, "copy", 1.0, "memcpy",
    )  # fmt: skip


CASES: dict[str, Callable[[Run], Iterator[Figure]]] = {
    "shm_same_4k": lambda run: shm_same(run, "shm_same_4k", SAME_4K, 4 << 10),
    "shm_same_64k": lambda run: shm_same(run, "shm_same_64k", SAME_64K, 64 << 10),
    "shm_relayout": shm_relayout,
    "shm_convert": shm_convert,
    "digest": digest,
    "handoff_16": lambda run: handoff(run, "handoff_16", 16),
    "handoff_32k": lambda run: handoff(run, "handoff_32k", 32768),
    "ucx_shm_4k": ucx_shm_4k,
    "ucx_tcp_16k": lambda run: ucx_tcp(run, "ucx_tcp_16k", SAME_16K, 16 << 10),
    "ucx_tcp_1m": lambda run: ucx_tcp(run, "ucx_tcp_1m", SAME_1M, 1 << 20),
    "ucx_tcp_line": ucx_tcp_line,
    "post_layer": post_layer,
    "connect": connect,
    "overlap": lambda run: overlap(run.seconds),
    "overlap_ucx": lambda run: overlap(run.seconds, "ucx"),
    "memcpy": memcpy,
}


class PeerPython(argparse.Action):
    """Names the Python of the peer before it."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: object,
        option: str | None = None,
    ) -> None:  # fmt: skip
        if not namespace.peer:
            parser.error(f"{option}: name its --peer first")
        namespace.peer[-1][1] = str(value)


def more_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--peer", action="append", default=[], choices=[[name, sys.executable] for name in PEERS],
        type=lambda name: [name, sys.executable], metavar="NAME",
        help=f"measured in the same run; of: {', '.join(PEERS)}",
    )  # fmt: skip
    parser.add_argument(
        "--peer-python", action=PeerPython, metavar="PATH",
        help="the Python that has the --peer before it (default: this one)",
    )  # fmt: skip


def figures(cases: Sequence[str], run: Run, failed: list[str]) -> Iterator[Figure]:
    """A case whose path is missing here is told of; one that failed otherwise is in `failed`."""
    for case in cases:
        try:
            yield from CASES[case](run)
        except RuntimeError as error:
            print(f"{case}: {error}", file=sys.stderr)
            if "PathUnavailable" not in str(error):
                failed.append(case)


def main() -> int:
    """Runs the cases named on the command line; 1 when one of them failed."""
    options = harness.arguments("transfers", list(CASES), ["bfloat16"], more=more_arguments)
    failed: list[str] = []
    run = Run(options.seconds, options.peer)
    harness.report(figures(options.case, run, failed), options.json)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
