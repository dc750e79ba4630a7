"""The table of a campaign."""

from __future__ import annotations

from collections import Counter, defaultdict

from kvlink.testing.faults.lane import Verdict


def table(verdicts: list[Verdict]) -> str:
    """Kinds of faults, how often each, and how the transfers ended for the survivor."""
    ends: dict[str, Counter[str]] = defaultdict(Counter)
    slowest: dict[str, float] = defaultdict(float)
    for verdict in verdicts:
        ends[verdict.kind][verdict.outcome or "-"] += 1
        slowest[verdict.kind] = max(slowest[verdict.kind], verdict.seconds)
    lines = [f"{'fault':<16}{'number':>7}{'slowest':>9}  outcomes at the survivor"]
    for kind in sorted(ends):
        told = ", ".join(f"{name} {count}" for name, count in ends[kind].most_common())
        number = sum(ends[kind].values())
        lines.append(f"{kind:<16}{number:>7}{slowest[kind]:>8.2f}s  {told}")
    return "\n".join(lines)


def counts(verdicts: list[Verdict]) -> dict[str, int]:
    """How many faults, and how many of them had something wrong, by what it was."""
    found: dict[str, int] = {"faults": len(verdicts)}
    for name in ("wrong KV", "leak", "hang", "crash"):
        found[name] = sum(any(name in p for p in verdict.problems) for verdict in verdicts)
    found["other"] = sum(
        any(not any(name in p for name in found) for p in verdict.problems) for verdict in verdicts
    )
    return found
