"""Moves between two processes, beside the limit of the same moment and other libraries."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial

from harness import Figure
from moves import NUM_BYTES, Kvlink, Peer, Shape, Stream
from perftest import line_rate
from turns import Step, Turns, copying, limit_note, take_turns

from kvlink import _C
from kvlink.testing.two_hosts import ADDRESSES, NotPermitted, TwoHosts

PEERS = {"nixl": "ucx", "mooncake": "tcp"}  # name -> what moves its bytes
LIMIT, MEMCPY = "limit", "memcpy"

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
    `piece_bytes`, and the limit's; all in turns.

    The limit is a copy by the senders of the first of `kvlinks`, or `line`.
    """
    with contextlib.ExitStack() as stack:
        if line:
            stack.enter_context(line)
        own = [stack.enter_context(each) for each in kvlinks.values()]
        peers = []
        for name, python in run.peers if piece_bytes else []:
            try:
                peer = Peer(name, python, piece_bytes, **where)  # type: ignore[arg-type]
                peers.append(stack.enter_context(peer))
            except (RuntimeError, OSError) as error:
                print(f"{case}: {name} is left out: {error}", file=sys.stderr)
        turns = take_turns(steps(own, peers, line), run.seconds)
    what = "line" if line else "copy"
    for idx, text in enumerate(kvlinks):
        yield from figures_of(turns, case, idx, text, own, peers, what)
    for peer in peers:
        made = limit_figure(turns, case, peer.name, what, "write", peer.name)
        yield replace(made, backend=PEERS[peer.name])
    if line:
        yield limit_figure(turns, case, LIMIT, what, "stream", line.name)
    else:
        note = limit_note(turns, LIMIT, own[0].probe)
        yield limit_figure(turns, case, LIMIT, what, "copy", own[0].probe["copied_by"], note)
        yield limit_figure(turns, case, MEMCPY, what, "copy", MEMCPY)


def limit_figure(
    turns: Turns, case: str, name: str, what: str, op: str, peer: str, note: str = ""
) -> Figure:
    """Of a call that moves NUM_BYTES."""
    seconds = turns.median(name)
    return Figure(
        op, case, "host", "uint8", 0, round(seconds * 1e3, 4),
        round(NUM_BYTES / seconds / 1e9, 3), 0.0, what,
        round(turns.beside(name, {LIMIT: 1.0}), 4), peer, note,
    )  # fmt: skip


def steps(own: list[Kvlink], peers: list[Peer], line: Stream | None) -> list[Step]:
    """The limit before all moves of one kind; they are named by kind and index."""
    found = []
    if line:
        limit = Step(LIMIT, line.write, line.all_sides)
    else:
        first = own[0]
        limit = Step(LIMIT, first.copy, first.all_sides)
        # What memcpy leaves in the caches is written back before the next copy counts.
        found = [
            Step(MEMCPY, partial(first.copy, plain=True), first.all_sides),
            replace(limit, name=""),
        ]
    found.append(limit)
    found += [Step(f"moved {idx}", each.moved, each.all_sides) for idx, each in enumerate(own)]
    found.append(limit)
    for idx, each in enumerate(own):
        found.append(Step(f"verified {idx}", each.verified, each.all_sides))
        if each.digest and not line:
            found.append(Step("read", each.read, each.all_sides))
    for peer in peers:
        found += [limit, Step(peer.name, peer.write, peer.all_sides, seldom=True)]
    return found


def figures_of(
    turns: Turns, case: str, idx: int, text: str, own: list[Kvlink], peers: list[Peer], what: str
) -> Iterator[Figure]:
    """Those of own[idx]."""
    each = own[idx]
    undigested = [i for i, other in enumerate(own) if other.like is each and not other.digest]
    moved = sum(shape.num_bytes for shape in each.sources)
    share = (moved + each.target.num_bytes) / 2 / NUM_BYTES
    for kind in ("verified", "moved"):
        name = f"{kind} {idx}"
        notes = [text, each.detail if each.path == "ucx" else ""]
        if what == "copy":
            notes.append(f"{turns.beside(name, {MEMCPY: share}):.0%} of memcpy")
        if kind == "verified" and each.digest and what == "copy":
            read = each.target.num_bytes / NUM_BYTES
            both = turns.beside(name, {LIMIT: share, "read": read})
            notes.append(f"{both:.0%} of copy and read")
        for other in undigested if kind == "moved" else []:
            cost = 1 / turns.beside(name, {f"{kind} {other}": 1.0}) - 1
            notes.append(f"the digest costs {cost:.1%}")
        for peer in peers:
            notes.append(f"{1 / turns.beside(peer.name, {name: 1.0}):.2f} x {peer.name}")
        seconds = turns.median(name)
        yield Figure(
            f"push_{kind}", case, each.path, each.target.dtype, each.target.page_size,
            round(seconds * 1e3, 4), round(moved / seconds / 1e9, 3), 0.0, what,
            round(turns.beside(name, {LIMIT: share}), 4), "kvlink",
            "; ".join(note for note in notes if note),
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
    """By the same processes: those of others have other memory."""
    digested = Kvlink([SAME_64K], SAME_64K, "host_shm")
    sides = {
        "with digest": digested,
        "without digest": replace(digested, digest=False, like=digested),
    }
    yield from moves(run, "digest", sides)


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


def memcpy(run: Run) -> Iterator[Figure]:
    """Of this process alone."""
    probe = _C.MemoryProbe(NUM_BYTES, shared=True)
    copies = [Step(LIMIT, probe.copy), Step(MEMCPY, probe.copy_plain), Step("", probe.copy)]
    turns = take_turns(copies, run.seconds)
    note = limit_note(turns, LIMIT, copying(probe))
    yield limit_figure(turns, "memcpy", LIMIT, "copy", "copy", probe.copied_by, note)
    yield limit_figure(turns, "memcpy", MEMCPY, "copy", "copy", MEMCPY)
