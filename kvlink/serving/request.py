"""`Request`: one line of the input, checked; and what becomes of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from kvlink.errors import InvalidArgument
from kvlink.serving.config import ModelConfig
from kvlink.serving.sampling import Sampling


class Tokenizer(Protocol):
    """The part of `tokenizers.Tokenizer` that serving uses."""

    def encode(self, text: str) -> Any: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it; `index` is its line in the input."""

    index: int
    prompt: list[int]
    max_new_tokens: int
    sampling: Sampling

    @property
    def num_kv_tokens(self) -> int:
        """Tokens whose KV is ever written: all but the last one generated."""
        return len(self.prompt) + self.max_new_tokens - 1

    def to_message(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> Request:
        """Inverse of `to_message`."""
        return cls(**{**message, "sampling": Sampling(**message["sampling"])})


@dataclass(frozen=True)
class Result:
    """What was generated for a request, or why nothing was."""

    index: int
    token_ids: list[int]
    finish_reason: str = ""  # stop or length
    first_token_at: float = 0.0  # seconds, time.monotonic() of this host
    last_token_at: float = 0.0
    error: str | None = None


@dataclass(frozen=True)
class Defaults:
    """What a line that does not say otherwise gets; request `index` samples with seed + index."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int


def parse_line(
    line: bytes,
    index: int,
    defaults: Defaults,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
) -> Request:
    """One input line. Raises InvalidArgument with the reason, meant for the output's error line."""
    try:
        fields = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise InvalidArgument(f"expected a JSON object; got {type(fields).__name__}")
    prompt = _prompt(fields, config, tokenizer)
    room = config.max_context - len(prompt)
    if room < 1:
        raise InvalidArgument(
            f"prompt: too long: {len(prompt)} tokens leave no room in the model's context of "
            f"{config.max_context}"
        )
    max_new_tokens = _integer(fields, "max_new_tokens", defaults.max_new_tokens, 1, 2**31 - 1)
    sampling = Sampling(
        temperature=_number(fields, "temperature", defaults.temperature, 0.0, math.inf),
        top_p=_number(fields, "top_p", defaults.top_p, 0.0, 1.0),
        seed=_integer(fields, "seed", (defaults.seed + index) % 2**64, 0, 2**64 - 1),
    )
    if sampling.top_p == 0:
        raise InvalidArgument("top_p: expected more than 0; got 0")
    return Request(index, prompt, min(max_new_tokens, room), sampling)


def _prompt(
    fields: Mapping[str, Any], config: ModelConfig, tokenizer: Tokenizer | None
) -> list[int]:
    if ("prompt" in fields) == ("prompt_token_ids" in fields):
        raise InvalidArgument("expected either prompt or prompt_token_ids")
    if "prompt" in fields:
        ids = _tokenise(fields["prompt"], tokenizer)
    else:
        ids = fields["prompt_token_ids"]
        if not isinstance(ids, list) or any(type(token) is not int for token in ids):
            raise InvalidArgument(
                f"prompt_token_ids: expected a list of integers; got {_short(ids)}"
            )
    if not ids:
        raise InvalidArgument("prompt: empty")
    for token in ids:
        if not 0 <= token < config.vocab_size:
            raise InvalidArgument(
                f"prompt: expected token ids of 0 to {config.vocab_size - 1}; got {token}"
            )
    return ids


def _tokenise(text: Any, tokenizer: Tokenizer | None) -> list[int]:
    if not isinstance(text, str):
        raise InvalidArgument(f"prompt: expected a string; got {_short(text)}")
    if not text:
        raise InvalidArgument("prompt: empty")
    if tokenizer is None:
        raise InvalidArgument(
            "prompt: the model directory has no tokenizer.json; give prompt_token_ids"
        )
    try:
        text.encode("utf-8")
        return list(tokenizer.encode(text).ids)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise InvalidArgument(f"prompt: cannot be tokenised: {error}") from None


def _integer(fields: Mapping[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = fields.get(name)
    if value is None:
        return default
    if type(value) is not int or not low <= value <= high:
        raise InvalidArgument(
            f"{name}: expected an integer of {low} to {high}; got {_short(value)}"
        )
    return value


def _number(fields: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = fields.get(name)
    if value is None:
        return default
    if type(value) not in (int, float) or not low <= value <= high or not math.isfinite(value):
        limits = f"of {low} to {high}" if math.isfinite(high) else f"of at least {low}"
        raise InvalidArgument(f"{name}: expected a number {limits}; got {_short(value)}")
    return float(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
