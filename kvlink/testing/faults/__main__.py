"""`python -m kvlink.testing.faults`: a campaign on one path."""

from __future__ import annotations

import argparse
import logging
import sys
import time

from kvlink.testing.faults.campaign import run_campaign
from kvlink.testing.faults.lane import Verdict
from kvlink.testing.faults.report import counts, table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kvlink.testing.faults", description=__doc__)
    parser.add_argument("--path", choices=("host_shm", "ucx"), default="host_shm")
    parser.add_argument("--faults", type=int, default=1000, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="the first of N seeds")
    parser.add_argument("--only", type=int, metavar="SEED", help="this seed alone, in detail")
    parser.add_argument("--lanes", type=int, metavar="N", help="default: two per CPU")
    options = parser.parse_args(arguments)
    logging.getLogger("kvlink.transfer").setLevel(logging.CRITICAL)
    seeds = range(options.seed, options.seed + options.faults)
    if options.only is not None:
        seeds = range(options.only, options.only + 1)

    def tell(verdict: Verdict) -> None:
        for problem in verdict.problems:
            print(f"seed {verdict.seed} ({verdict.kind}, {verdict.move}): {problem}", flush=True)
        if verdict.problems or options.only is not None:
            print(f"  {verdict.steps}", flush=True)

    began = time.monotonic()
    verdicts = run_campaign(options.path, seeds, num_lanes=options.lanes, on_verdict=tell)
    seconds = time.monotonic() - began
    print(f"path {options.path}, seeds {seeds.start} to {seeds.stop - 1}")
    print(table(verdicts))
    found = counts(verdicts)
    print(", ".join(f"{name} {number}" for name, number in found.items()))
    print(f"{len(verdicts) / seconds:.1f} faults/s")
    bad = sum(bool(verdict.problems) for verdict in verdicts)
    return int(bad > 0 or len(verdicts) < len(seeds))


if __name__ == "__main__":
    sys.exit(main())
