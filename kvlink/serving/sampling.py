"""Greedy and temperature/top-p sampling, drawn per request and not per batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """`temperature` 0 is greedy; `top_p` keeps the likeliest tokens of that joint probability."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def sample(logits: Tensor, sampling: Sampling, step: int) -> int:
    """Token `step` of a request from its logits, float32 [vocab_size].

    The draw depends on the logits, the seed and the step alone: no state is kept, so the process
    that samples the first token and the one that samples the rest need not share any.
    NOTE: logits carry the rounding of torch's matrix products, whose last bits may depend on how
    many rows a step has; a token at the very edge of its interval may then fall the other way.
    """
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits = (logits.double() - logits.max()) / sampling.temperature
    probabilities, order = logits.softmax(-1).sort(descending=True, stable=True)
    reached = probabilities.cumsum(-1)
    # Kept: the tokens before the sum reaches top_p, and the one that reaches it.
    num_kept = min(int((reached < sampling.top_p).sum()) + 1, reached.numel())
    reached = reached[:num_kept]
    point = _uniform(sampling.seed, step) * float(reached[-1])
    return int(order[min(int((reached <= point).sum()), num_kept - 1)])


def _uniform(seed: int, step: int) -> float:
    """In [0, 1), from a counter-based generator (Philox)."""
    generator = np.random.Philox(key=seed, counter=step)
    return float(np.random.Generator(generator).random())
