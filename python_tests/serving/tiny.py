"""Tiny random checkpoints of every supported family, written like transformers writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BOS, EOS = 256, (257, 77)  # 77 is a byte, so that greedy sequences do end now and then
VOCAB_SIZE = 264
CONTEXT = 192

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": BOS,
    "eos_token_id": list(EOS),
    "pad_token_id": 258,
    "attn_implementation": "eager",
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 50000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 48,
}

# Name -> (transformers' class, what differs from _COMMON).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("Llama", {"num_key_value_heads": 4}),
    "llama3": (
        "Llama",
        {
            "num_key_value_heads": 2,
            "rope_parameters": _LLAMA3_ROPE,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "llama_linear_tied": (
        "Llama",
        {
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
            "tie_word_embeddings": True,
        },
    ),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 21, "head_dim": 40}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2_sliding": (
        "Qwen2",
        {
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": 13,
            "max_window_layers": 1,
        },
    ),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 48}),
}


def make_model(family: str, seed: int = 0) -> Any:
    """The transformers model with random weights; greedy choices are well separated."""
    import torch
    import transformers

    name, fields = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**_COMMON, **fields})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if key.endswith("norm.weight"):
                parameter.copy_(1 + 0.2 * noise)  # not 1, or a forgotten weight would not show
            elif key.endswith("bias"):
                parameter.copy_(0.3 * noise)
            elif "embed" in key:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(1.3 * noise / parameter.shape[-1] ** 0.5)
    return model


def write_checkpoint(model: Any, path: Path, shard_size: str = "1GB") -> Path:
    """config.json, generation_config.json, safetensors and tokenizer.json."""
    model.generation_config.eos_token_id = list(EOS)
    model.save_pretrained(path, max_shard_size=shard_size)
    make_tokenizer().save(str(path / "tokenizer.json"))
    return path


def make_tokenizer() -> Any:
    """One token per byte, with a beginning-of-sequence token in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    return tokenizer


def make_prompts(count: int = 24, longest: int = 120, seed: int = 1) -> list[dict[str, Any]]:
    """Input lines of mixed lengths, every other one as text; max_new_tokens differ."""
    import random

    draw = random.Random(seed)
    words = ["page", "slot", "head", "layer", "grant", "link", "pool", "token", "é", "→"]
    lines: list[dict[str, Any]] = []
    for index in range(count):
        length = 1 + round((longest - 1) * (index * 7 % count) / (count - 1))
        line: dict[str, Any] = {"max_new_tokens": draw.randint(8, 20)}
        if index % 2:
            text = " ".join(draw.choice(words) for _ in range(length))
            line["prompt"] = text.encode()[:length].decode(errors="ignore") or "p"
        else:
            line["prompt_token_ids"] = [draw.randrange(256) for _ in range(length)]
        lines.append(line)
    return lines


def token_ids(line: dict[str, Any]) -> list[int]:
    """What the line's prompt is for the model."""
    if "prompt" in line:
        return list(make_tokenizer().encode(line["prompt"]).ids)
    return list(line["prompt_token_ids"])


def greedy(model: Any, line: dict[str, Any]) -> list[int]:
    """transformers' own continuation."""
    import torch

    prompt = torch.tensor([token_ids(line)])
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=line["max_new_tokens"],
    )
    return list(out[0, prompt.shape[1] :].tolist())


def to_jsonl(lines: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)
