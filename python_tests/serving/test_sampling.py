"""Sampling follows its distribution and depends on the request alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import generate
from tiny import make_prompts, to_jsonl

from kvlink.serving.sampling import Sampling, sample

LOGITS = torch.tensor([1.0, 3.0, -2.0, 2.5, float("-inf"), 0.0])


def test_greedy() -> None:
    assert sample(LOGITS, Sampling(), 0) == 1


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.6])
def test_frequencies(temperature: float, top_p: float) -> None:
    num_draws = 4000
    sampling = [Sampling(temperature, top_p, seed) for seed in range(num_draws)]
    counts = Counter(sample(LOGITS, one, step=3) for one in sampling)
    probabilities = (LOGITS.double() / temperature).softmax(-1)
    kept, total = [], 0.0
    for token in probabilities.argsort(descending=True).tolist():
        if total >= top_p:
            break
        kept.append(token)
        total += float(probabilities[token])
    assert counts.keys() <= set(kept)
    for token in kept:
        share = float(probabilities[token]) / total
        # Five standard deviations; the draws are fixed, so this either always holds or never.
        bound = 5 * (share * (1 - share) / num_draws) ** 0.5
        assert abs(counts[token] / num_draws - share) <= bound


def test_extremes() -> None:
    assert sample(LOGITS, Sampling(1e-310), 0) == 1
    assert sample(LOGITS, Sampling(1.0, 1e-9, 5), 0) == 1
    assert sample(torch.zeros(1), Sampling(1.0), 0) == 0
    draws = {sample(LOGITS, Sampling(1e9, 1.0, 2**64 - 1), step) for step in range(200)}
    assert draws == {0, 1, 2, 3, 5}


def test_steps_and_seeds_differ() -> None:
    flat = torch.zeros(1000)
    by_step = [sample(flat, Sampling(1.0, 1.0, 7), step) for step in range(50)]
    by_seed = [sample(flat, Sampling(1.0, 1.0, seed), 7) for seed in range(50)]
    assert len(set(by_step)) > 40
    assert len(set(by_seed)) > 40
    assert by_step == [sample(flat, Sampling(1.0, 1.0, 7), step) for step in range(50)]


@pytest.mark.two_process
def test_result_depends_on_the_request_alone(
    checkpoint: Callable[[str], tuple[Any, Path]],
) -> None:
    _, path = checkpoint("qwen3")
    lines = make_prompts(20)
    for index, line in enumerate(lines):
        line.update(temperature=0.5 + index / 20, top_p=0.95, seed=index % 3)
    options = ["--dtype=float32", "--ignore-eos", "--decode-layout=packed"]
    together, _ = generate(path, to_jsonl(lines), *options)
    shuffled, _ = generate(
        path, to_jsonl(lines[::-1]), *options, "--max-num-seqs=3", "--max-batch-tokens=40"
    )
    tokens = [record["token_ids"] for record in together]
    assert tokens == [record["token_ids"] for record in shuffled[::-1]]
    assert [len(ids) for ids in tokens] == [line["max_new_tokens"] for line in lines]
    # Seeds count: the same lines under other seeds continue differently.
    for line in lines:
        del line["seed"]
    others, _ = generate(path, to_jsonl(lines), *options, "--seed=100")
    assert [record["token_ids"] for record in others] != tokens
