"""Bad lines get an error each; the others are served."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import generate
from tiny import CONTEXT, VOCAB_SIZE, greedy, make_tokenizer

from kvlink.errors import InvalidArgument
from kvlink.serving.config import ModelConfig
from kvlink.serving.request import Defaults, Request, parse_line

GOOD: dict[str, Any] = {"prompt_token_ids": [1, 2, 3], "max_new_tokens": 4}
# Line -> a part of its error.
BAD: list[tuple[bytes, str]] = [
    (b"{", "not valid JSON"),
    (b"", "not valid JSON"),
    (b"\xff\xfe", "not valid JSON"),
    (b"[" * 100000, "not valid JSON"),
    (b"[1, 2]", "expected a JSON object; got list"),
    (b"{}", "either prompt or prompt_token_ids"),
    (b'{"prompt": "a", "prompt_token_ids": [1]}', "either prompt or prompt_token_ids"),
    (b'{"prompt": ""}', "empty"),
    (b'{"prompt_token_ids": []}', "empty"),
    (b'{"prompt": 7}', "expected a string; got 7"),
    (b'{"prompt": null}', "expected a string; got None"),
    (rb'{"prompt": "\ud800"}', "cannot be tokenised"),
    (b'{"prompt_token_ids": "abc"}', "expected a list of integers"),
    (b'{"prompt_token_ids": [1, 2.5]}', "expected a list of integers"),
    (b'{"prompt_token_ids": [true]}', "expected a list of integers"),
    (b'{"prompt_token_ids": [-1]}', f"0 to {VOCAB_SIZE - 1}; got -1"),
    (b'{"prompt_token_ids": [%d]}' % VOCAB_SIZE, f"0 to {VOCAB_SIZE - 1}; got {VOCAB_SIZE}"),
    (json.dumps({"prompt": "x" * CONTEXT}).encode(), "too long"),
    (json.dumps({"prompt_token_ids": [1] * CONTEXT}).encode(), "too long"),
    (b'{"prompt": "a", "max_new_tokens": 0}', "max_new_tokens: expected an integer"),
    (b'{"prompt": "a", "max_new_tokens": 1.5}', "max_new_tokens: expected an integer"),
    (b'{"prompt": "a", "temperature": -1}', "temperature: expected a number"),
    (b'{"prompt": "a", "temperature": NaN}', "temperature: expected a number"),
    (b'{"prompt": "a", "temperature": Infinity}', "temperature: expected a number"),
    (b'{"prompt": "a", "temperature": "hot"}', "temperature: expected a number"),
    (b'{"prompt": "a", "top_p": 0}', "top_p: expected more than 0"),
    (b'{"prompt": "a", "top_p": 1.1}', "top_p: expected a number"),
    (b'{"prompt": "a", "seed": -1}', "seed: expected an integer"),
    (b'{"prompt": "a", "seed": 18446744073709551616}', "seed: expected an integer"),
]
DEFAULTS = Defaults(max_new_tokens=8, temperature=0.0, top_p=1.0, seed=5)


@pytest.fixture(scope="module")
def parse(checkpoint: Callable[[str], tuple[Any, Path]]) -> Callable[[bytes], Request]:
    config = ModelConfig.from_dir(checkpoint("llama2")[1])
    tokenizer = make_tokenizer()
    return lambda line: parse_line(line, 3, DEFAULTS, config, tokenizer)


@pytest.mark.parametrize(("line", "reason"), BAD, ids=lambda part: repr(part)[:40])
def test_bad_line(parse: Callable[[bytes], Request], line: bytes, reason: str) -> None:
    with pytest.raises(InvalidArgument, match=reason.replace("(", r"\(")):
        parse(line)


def test_defaults_and_overrides(parse: Callable[[bytes], Request]) -> None:
    plain = parse(b'{"prompt": "a"}')
    assert (plain.index, plain.max_new_tokens) == (3, 8)
    assert (plain.sampling.temperature, plain.sampling.top_p, plain.sampling.seed) == (0, 1, 8)
    line = (
        b'{"prompt_token_ids": [9], "max_new_tokens": 2, "temperature": 1, "top_p": 0.5, "seed":7}'
    )
    own = parse(line)
    assert (own.prompt, own.max_new_tokens) == ([9], 2)
    assert (own.sampling.temperature, own.sampling.top_p, own.sampling.seed) == (1.0, 0.5, 7)


def test_new_tokens_end_with_the_context(parse: Callable[[bytes], Request]) -> None:
    line = {"prompt_token_ids": [1] * (CONTEXT - 3), "max_new_tokens": 50}
    assert parse(json.dumps(line).encode()).max_new_tokens == 3


def test_no_tokenizer(checkpoint: Callable[[str], tuple[Any, Path]]) -> None:
    config = ModelConfig.from_dir(checkpoint("llama2")[1])
    with pytest.raises(InvalidArgument, match=r"no tokenizer\.json"):
        parse_line(b'{"prompt": "a"}', 0, DEFAULTS, config, None)


@pytest.mark.two_process
def test_bad_lines_among_good_ones(checkpoint: Callable[[str], tuple[Any, Path]]) -> None:
    model, path = checkpoint("llama2")
    good = json.dumps(GOOD).encode()
    content = b"\n".join(part for line, _ in BAD for part in (line, good)) + b"\n\n"
    records, _ = generate(path, content, "--dtype=float32", "--decode-layout=hnd")
    assert [record["index"] for record in records] == list(range(2 * len(BAD)))
    expected = greedy(model, GOOD)
    for (_, reason), bad, served in zip(BAD, records[::2], records[1::2], strict=True):
        assert reason in bad["error"]
        assert bad.keys() == {"index", "error"}
        assert served["token_ids"] == expected


def test_only_bad_lines_start_nothing(checkpoint: Callable[[str], tuple[Any, Path]]) -> None:
    _, path = checkpoint("llama2")
    records, _ = generate(path, b"nonsense\n")
    assert len(records) == 1
    assert "not valid JSON" in records[0]["error"]


def test_no_lines(checkpoint: Callable[[str], tuple[Any, Path]]) -> None:
    _, path = checkpoint("llama2")
    assert generate(path, b"\n")[0] == []
