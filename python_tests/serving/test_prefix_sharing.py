"""Prompts that begin alike: the same tokens, sent once, and never before the digest held."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from alone import Alone
from command import generate
from running import Running, wait_until_gone
from stepping import Serving
from tiny import to_jsonl

Checkpoints = Callable[[str], tuple[Any, Path]]

PROMPT = list(range(10, 50))
FOLLOWER = [*PROMPT[:35], *range(90, 103)]


def lines_alike(max_new_tokens: int = 9) -> list[dict[str, Any]]:
    """Two families of prompts with 100 and 61 tokens in common, and some that are the same."""
    lines: list[dict[str, Any]] = []
    for index in range(6):
        own = [200 + index] * (1 + 5 * index)
        lines.append({"prompt_token_ids": [*range(100), *own]})
        lines.append({"prompt_token_ids": [*range(120, 181), *own]})
    lines += [{"prompt_token_ids": list(range(96))}] * 2
    for line in lines:
        line["max_new_tokens"] = max_new_tokens
    return lines


def not_sent(lines: list[dict[str, Any]], multiple: int) -> int:
    """Tokens of prompts that an earlier one has brought, in multiples of so many."""
    seen: set[tuple[int, ...]] = set()
    total = 0
    for line in lines:
        prompt = line["prompt_token_ids"]
        parts = [tuple(prompt[:end]) for end in range(multiple, len(prompt) + 1, multiple)]
        total += max((len(part) for part in parts if part in seen and part != tuple(prompt)),
                     default=0)  # fmt: skip
        seen.update(parts)
    return total


@pytest.mark.two_process
@pytest.mark.parametrize(
    ("path", "num_ranks", "sizes", "more"),
    [
        ("host_shm", 1, (16, 24), ()),
        ("ucx", 2, (16, 24), ("--decode-layout=hnd", "--max-batch-tokens=50")),
        ("host_shm", 2, (8, 8), ("--prefill-num-pages=20", "--decode-num-pages=22")),
    ],
    ids=["other page sizes", "ucx and two ranks", "few pages"],
)
def test_tokens_are_those_of_a_single_process(
    path: str,
    num_ranks: int,
    sizes: tuple[int, int],
    more: tuple[str, ...],
    checkpoint: Checkpoints,
    tmp_path: Path,
) -> None:
    _, model = checkpoint("llama3")
    lines = lines_alike()
    alone = Alone(model)
    expected = [alone.generate(line) for line in lines]
    num_tokens = sum(len(line["prompt_token_ids"]) for line in lines)
    row = alone.config.num_layers * alone.config.num_kv_heads * alone.config.head_dim * 2 * 4
    for switch in ("enable", "no-enable"):
        report = tmp_path / f"{switch}.json"
        records, _ = generate(
            model,
            to_jsonl(lines),
            "--dtype=float32",
            f"--path={path}",
            f"--prefill-ranks={num_ranks}",
            f"--prefill-page-size={sizes[0]}",
            f"--decode-page-size={sizes[1]}",
            f"--report={report}",
            f"--{switch}-prefix-caching",
            *more,
        )
        assert [record["token_ids"] for record in records] == expected
        figures = json.loads(report.read_text())
        shared = figures["prefix_cache"]
        assert shared["prompt_tokens"] == num_tokens
        assert figures["migration"]["verified"] == len(lines)
        assert figures["migration"]["bytes"] == (num_tokens - shared["not_sent"]) * row
        if switch == "no-enable":
            assert (shared["not_computed"], shared["not_sent"]) == (0, 0)
        elif "--decode-num-pages=22" in more:  # and so not all at once
            assert shared["not_computed"] > 0
        else:
            assert shared["not_sent"] == not_sent(lines, math.lcm(*sizes)) > 0
            # Prefill does not depend on decode's pages, and copies what fits in part.
            assert shared["not_computed"] > shared["not_sent"]


@pytest.mark.two_process
def test_quantised_pages_are_shared(checkpoint: Checkpoints) -> None:
    _, model = checkpoint("llama2")
    options = ["--dtype=float32", "--decode-kv-dtype=int8", "--prefill-layout=packed"]
    lines = to_jsonl(lines_alike())
    shared, _ = generate(model, lines, *options)
    alone, _ = generate(model, lines, *options, "--no-enable-prefix-caching")
    assert [r["token_ids"] for r in shared] == [r["token_ids"] for r in alone]


@pytest.mark.two_process
def test_prefill_that_stands_still_for_a_while(checkpoint: Checkpoints) -> None:
    """Grants expire, of prompts that others wait for, too."""
    _, model = checkpoint("llama2")
    lines = lines_alike(max_new_tokens=60)
    run = Running(model, "--dtype=float32", "--grant-ttl=2", "--max-num-seqs=5",
                  lines=to_jsonl(lines))  # fmt: skip
    os.kill(run.workers["prefill"], signal.SIGSTOP)
    time.sleep(2.4)
    os.kill(run.workers["prefill"], signal.SIGCONT)
    assert run.process.stdout is not None
    records = [json.loads(line) for line in run.process.stdout.read().splitlines()]
    assert run.finish() == (0, "")
    alone = Alone(model)
    alone.eos = frozenset()
    assert [r["token_ids"] for r in records] == [alone.generate(line) for line in lines[1:]]
    wait_until_gone(list(run.workers.values()))


@pytest.mark.two_process
def test_after_a_worker_has_died(checkpoint: Checkpoints) -> None:
    """The next run shares nothing with what the dead one held."""
    _, model = checkpoint("llama2")
    lines = lines_alike()
    for role in ("prefill", "decode"):
        run = Running(model, lines=to_jsonl(lines * 20))
        os.kill(run.workers[role], signal.SIGKILL)
        status, errors = run.finish()
        assert status == 1
        assert f"{role} worker (pid {run.workers[role]}) was killed by SIGKILL" in errors
        wait_until_gone(list(run.workers.values()))
    records, _ = generate(model, to_jsonl(lines), "--dtype=float32")
    alone = Alone(model)
    assert [r["token_ids"] for r in records] == [alone.generate(line) for line in lines]


@pytest.fixture
def serving(checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    monkeypatch.setattr("kvlink.serving.decode._ALONE_S", 20.0)
    monkeypatch.setattr("kvlink.serving.decode._SHARED_S", 20.0)
    serving = Serving(checkpoint("llama3")[1])
    yield serving
    serving.close()


def grants(serving: Serving) -> dict[int, dict[str, Any]]:
    """The newest grant of each request."""
    serving.worker.grant()
    return {m["index"]: m for m in serving.wire.sent if m["type"] == "granted"}


def deliver(serving: Serving, grant: dict[str, Any], prompt: list[int]) -> None:
    serving.push_all(serving.prefill(grant, prompt))
    serving.worker.collect_arrivals()


def test_who_shares_waits_for_the_digest(serving: Serving) -> None:
    worker = serving.worker
    serving.admit(0, PROMPT)
    serving.admit(1, FOLLOWER)
    granted = grants(serving)
    assert (granted[0]["start"], granted[1]["start"]) == (0, 32)
    leader, follower = (worker.scheduler.arriving[index] for index in (0, 1))
    assert follower.pages[:2].tolist() == leader.pages[:2].tolist()
    assert not set(follower.pages[2:]) & set(leader.pages)
    deliver(serving, granted[1], FOLLOWER)
    worker.run()  # all of its own is here, and it does not begin, not even early
    assert follower in worker.scheduler.arriving.values()
    assert (follower.early_token, len(follower.token_ids)) == (None, 1)
    deliver(serving, granted[0], PROMPT)
    assert worker.scheduler.running == [leader, follower]
    # One that comes later shares both, and waits for neither.
    late = [*FOLLOWER, 7, 8]
    serving.admit(2, late)
    granted = grants(serving)
    assert granted[2]["start"] == 48
    assert worker.scheduler.arriving[2].prefix_verified
    deliver(serving, granted[2], late)
    prompts = {0: PROMPT, 1: FOLLOWER, 2: late}
    assert serving.finish() == {i: serving.expected(prompt) for i, prompt in prompts.items()}
    assert worker.totals["num_shared_tokens"] == 80
    assert worker.allocator.num_free + len(worker.cache) == 64


@pytest.mark.parametrize("lands", [True, False], ids=["its own landed", "its own did not land"])
@pytest.mark.parametrize("ends", ["altered", "cancelled"])
def test_a_beginning_that_does_not_arrive(ends: str, lands: bool, serving: Serving) -> None:
    """Whoever was to share it is granted anew, and that is no fault of its own."""
    worker = serving.worker
    serving.admit(0, PROMPT)
    serving.admit(1, FOLLOWER)
    granted = grants(serving)
    leader, follower = (worker.scheduler.arriving[index] for index in (0, 1))
    if lands:
        deliver(serving, granted[1], FOLLOWER)
        assert follower.landing.verified
    transfer = serving.prefill(granted[0], PROMPT)
    for layer in range(serving.num_layers):
        transfer.push_layer(layer)
    if ends == "altered":
        for layer in range(serving.num_layers):
            leader.grant.wait_layer(layer, 20.0)
        torch.utils.dlpack.from_dlpack(worker.pool.k(2))[int(leader.pages[1]), 3] += 1
        transfer.finish()
        transfer.wait_source_reusable(10)
    else:
        transfer.cancel()
    deadline = time.monotonic() + 20
    while worker.scheduler.arriving:
        worker.collect_arrivals()
        assert time.monotonic() < deadline
    assert (leader.num_failed, follower.num_failed) == (1, 0)
    assert len(worker.scheduler.waiting) == 2
    granted = grants(serving)
    assert [granted[index]["attempt"] for index in (0, 1)] == [2, 2]
    prompts = {0: PROMPT, 1: FOLLOWER}
    for index in sorted(prompts, key=lambda index: granted[index]["start"]):
        deliver(serving, granted[index], prompts[index])
    assert serving.finish() == {i: serving.expected(prompt) for i, prompt in prompts.items()}
    assert worker.allocator.num_free + len(worker.cache) == 64
