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
Their limit is a copy of the same memory traffic at memcpy's rate: (bytes read + bytes written) / 2.
The sending processes copy, with as many threads, in shared memory of their own as pools have it,
in order, by streaming stores or the C library's memcpy, whichever is faster here. Limit and moves
take turns call by call, and ratios are those of neighbours (turns.py). `verified` notes what it
reaches of the limit and of reading the arrived bytes once more, in one sum.
Over TCP it is a plain TCP stream's time between the same namespaces, without them over loopback.
GB/s count the bytes at the source once.

A peer's script (peers/) runs in the environment of its own Python. It writes 256 MiB from one
process to another, in pieces of the same size, scattered on both sides; its time ends when its own
call says that all is done. Peers take a turn of every few, since one of theirs takes long.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence

import harness
import transfer_calls as calls
import transfer_moves as moves
from harness import Figure
from overlap import overlap
from transfer_moves import PEERS, Run

CASES: dict[str, Callable[[Run], Iterator[Figure]]] = {
    "shm_same_4k": lambda run: moves.shm_same(run, "shm_same_4k", moves.SAME_4K, 4 << 10),
    "shm_same_64k": lambda run: moves.shm_same(run, "shm_same_64k", moves.SAME_64K, 64 << 10),
    "shm_relayout": moves.shm_relayout,
    "shm_convert": moves.shm_convert,
    "digest": moves.digest,
    "handoff_16": lambda run: calls.handoff(run.seconds, "handoff_16", 16),
    "handoff_32k": lambda run: calls.handoff(run.seconds, "handoff_32k", 32768),
    "ucx_shm_4k": moves.ucx_shm_4k,
    "ucx_tcp_16k": lambda run: moves.ucx_tcp(run, "ucx_tcp_16k", moves.SAME_16K, 16 << 10),
    "ucx_tcp_1m": lambda run: moves.ucx_tcp(run, "ucx_tcp_1m", moves.SAME_1M, 1 << 20),
    "ucx_tcp_line": moves.ucx_tcp_line,
    "post_layer": lambda run: calls.post_layer(run.seconds),
    "connect": lambda run: calls.connect(run.seconds),
    "overlap": lambda run: overlap(run.seconds),
    "overlap_ucx": lambda run: overlap(run.seconds, "ucx"),
    "memcpy": moves.memcpy,
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
