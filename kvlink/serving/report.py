"""The report of a run: latencies, what migrated, and how much of that was hidden."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from kvlink.serving.request import Result


def ttft_s(result: Result, started_at: float) -> float:
    """Seconds from the submission of the input to the request's first token."""
    return result.first_token_at - started_at


def tpot_s(result: Result) -> float | None:
    """Seconds per token after the first; None when there is only one."""
    num_more = len(result.token_ids) - 1
    if num_more < 1:
        return None
    return (result.last_token_at - result.first_token_at) / num_more


def make_report(
    results: Sequence[Result],
    num_errors: int,
    started_at: float,
    path: tuple[str, str],
    stats: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Plain values, for JSON; times in seconds. `path` is its name and detail."""
    prefill, decode = stats.get("prefill", {}), stats.get("decode", {})
    moving_s = prefill.get("moving_s", 0.0)
    tpots = [value for value in map(tpot_s, results) if value is not None]
    return {
        "requests": len(results),
        "errors": num_errors,
        "tokens": sum(len(result.token_ids) for result in results),
        "ttft_s": _spread([ttft_s(result, started_at) for result in results]),
        "tpot_s": _spread(tpots),
        "migration": {
            "path": path[0],
            "path_detail": path[1],
            "bytes": int(prefill.get("num_bytes", 0)),
            "moving_s": moving_s,
            "hidden_share": prefill.get("hidden_s", 0.0) / moving_s if moving_s > 0 else None,
            "verified": int(decode.get("num_verified", 0)),
        },
        # Tokens of prompts, those that prefill had and those that decode had already.
        "prefix_cache": {
            "prompt_tokens": int(prefill.get("num_prompt_tokens", 0)),
            "not_computed": int(prefill.get("num_cached_tokens", 0)),
            "not_sent": int(decode.get("num_shared_tokens", 0)),
        },
        # First steps of decode that began while layers were still landing.
        "early_decode": {
            "requests": int(decode.get("num_early", 0)),
            "hidden_s": decode.get("early_hidden_s", 0.0),
            "waited_s": decode.get("early_waited_s", 0.0),
            "late_steps": int(decode.get("num_early_late", 0)),
            "dropped": int(decode.get("num_early_dropped", 0)),
        },
    }


def format_report(report: Mapping[str, Any]) -> str:
    """A few readable lines."""
    migration = report["migration"]
    hidden, early = migration["hidden_share"], report["early_decode"]
    shared = report["prefix_cache"]
    lines = [
        ("requests", f"{report['requests']} served, {report['errors']} refused or failed"),
        ("tokens", f"{report['tokens']} generated"),
        ("TTFT", _format_spread(report["ttft_s"])),
        ("TPOT", _format_spread(report["tpot_s"])),
        ("migrated", f"{_format_bytes(migration['bytes'])} over {_format_path(migration)}"),
        (
            "hidden",
            "-"
            if hidden is None
            else f"{hidden:.0%} of {migration['moving_s'] * 1e3:.1f} ms of migration ran "
            "while prefill still computed",
        ),
        (
            "early",
            f"{early['requests']} requests began decode before their last layer had landed: "
            f"{early['hidden_s'] * 1e3:.1f} ms computed, {early['waited_s'] * 1e3:.1f} ms waited",
        ),
        (
            "shared",
            f"of {shared['prompt_tokens']} prompt tokens {shared['not_computed']} were not "
            f"computed again, {shared['not_sent']} not sent again",
        ),
        ("verified", f"{migration['verified']} transfers by digest"),
    ]
    return "\n".join(f"{name:<9} {text}" for name, text in lines)


def _format_path(migration: Mapping[str, Any]) -> str:
    path, detail = migration["path"], migration["path_detail"]
    return f"{path} ({detail})" if detail else path or "no link"


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    ordered = sorted(values)
    p95 = ordered[min(len(ordered) - 1, -(-95 * len(ordered) // 100) - 1)]
    return {"median": statistics.median(ordered), "p95": p95}


def _format_spread(spread: Mapping[str, float] | None) -> str:
    if spread is None:
        return "-"
    return f"median {spread['median'] * 1e3:.1f} ms, p95 {spread['p95'] * 1e3:.1f} ms"


def _format_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
