"""`python -m kvlink.testing.fuzz`: a live endpoint under mutated frames."""

from __future__ import annotations

import argparse
import sys

from kvlink.testing.fuzz.campaign import run_fuzz


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kvlink.testing.fuzz", description=__doc__)
    parser.add_argument("--frames", type=int, default=1_000_000, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clients", type=int, default=3, metavar="N")
    options = parser.parse_args(arguments)
    found = run_fuzz(options.frames, seed=options.seed, num_clients=options.clients, tell=_tell)
    for name in sorted(found.counts):
        print(f"{found.counts[name]:>9}  {name}")
    print(
        f"{found.counts.total()} frames in {found.seconds:.0f} s, {found.num_good} good transfers"
    )
    print(f"refusals logged: {found.refusals}")
    print(f"the endpoint held {found.before}, then {found.after}")
    for problem in found.problems:
        print(f"problem: {problem}")
    return int(bool(found.problems))


def _tell(sample: dict[str, int]) -> None:
    print("; ".join(f"{name} {number}" for name, number in sample.items()), flush=True)


if __name__ == "__main__":
    sys.exit(main())
