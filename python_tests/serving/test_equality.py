"""`kvlink generate` and transformers agree, token by token, for every family."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import generate
from tiny import EOS, FAMILIES, greedy, make_prompts, make_tokenizer, to_jsonl, token_ids

pytestmark = pytest.mark.two_process
REPOSITORY = Path(__file__).parents[2]
DEMO_MODEL = REPOSITORY / "examples" / "demo_model"

# Family -> the layouts of the two sides: (prefill page size, layout), (decode page size, layout).
LAYOUTS: dict[str, tuple[tuple[int, str], tuple[int, str]]] = {
    "llama2": ((16, "nhd"), (16, "nhd")),
    "llama3": ((16, "nhd"), (7, "hnd")),
    "llama_linear_tied": ((5, "packed"), (16, "nhd")),
    "mistral": ((8, "hnd"), (8, "packed")),
    "qwen2": ((1, "nhd"), (32, "hnd")),
    "qwen2_sliding": ((3, "hnd"), (3, "nhd")),
    "qwen3": ((64, "packed"), (16, "packed")),
}


def side_options(sides: tuple[tuple[int, str], tuple[int, str]]) -> list[str]:
    options = []
    for side, (page_size, layout) in zip(("prefill", "decode"), sides, strict=True):
        options += [f"--{side}-page-size={page_size}", f"--{side}-layout={layout}"]
    return options


def test_every_family_has_layouts() -> None:
    assert LAYOUTS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens(
    family: str, checkpoint: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    model, path = checkpoint(family)
    lines = make_prompts(24)
    report = tmp_path / "report.json"
    records, errors = generate(
        path,
        to_jsonl(lines),
        "--dtype=float32",
        "--max-batch-tokens=100",  # so that the longer prompts are chunked
        f"--report={report}",
        *side_options(LAYOUTS[family]),
    )
    assert errors == ""  # quiet where there is no terminal
    expected = [greedy(model, line) for line in lines]
    assert [record["token_ids"] for record in records] == expected
    assert [record["index"] for record in records] == list(range(len(lines)))
    tokenizer = make_tokenizer()
    for record, line, tokens in zip(records, lines, expected, strict=True):
        assert record["finish_reason"] == ("stop" if tokens[-1] in EOS else "length")
        assert len(tokens) == line["max_new_tokens"] or tokens[-1] in EOS
        assert record["text"] == tokenizer.decode(tokens)
        assert record["ttft_s"] > 0
        assert (record["tpot_s"] is None) == (len(tokens) == 1)
    figures = json.loads(report.read_text())
    assert figures["requests"] == figures["migration"]["verified"] == len(lines)
    assert figures["errors"] == 0
    assert figures["tokens"] == sum(map(len, expected))
    layers, heads = model.config.num_hidden_layers, model.config.num_key_value_heads
    head_dim = getattr(model.config, "head_dim", None) or 32
    num_tokens = sum(len(token_ids(line)) for line in lines)
    num_sent = num_tokens - figures["prefix_cache"]["not_sent"]  # small pages are often alike
    assert figures["migration"]["bytes"] == num_sent * layers * heads * head_dim * 2 * 4
    assert 0 <= figures["migration"]["hidden_share"] <= 1


def test_greedy_tokens_of_the_demo_model(tmp_path: Path) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype="float32").eval()
    content = (DEMO_MODEL.parent / "demo_prompts.jsonl").read_bytes().splitlines()
    texts = [json.loads(line)["prompt"] for line in content]
    texts += [text[: 5 + 11 * i] for i, text in enumerate(texts * 3)]
    lines = [{"prompt": text, "max_new_tokens": 12} for text in texts]
    assert len(lines) >= 20
    records, _ = generate(
        DEMO_MODEL, to_jsonl(lines), "--dtype=float32", *side_options(((16, "nhd"), (24, "hnd")))
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO_MODEL)
    for record, line in zip(records, lines, strict=True):
        prompt = tokenizer(line["prompt"], return_tensors="pt")
        out = model.generate(**prompt, do_sample=False, max_new_tokens=12)
        assert record["token_ids"] == out[0, prompt["input_ids"].shape[1] :].tolist()
