"""config.json of the supported families, as older and newer transformers write it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvlink.errors import InvalidArgument, KVLinkError
from kvlink.serving.checkpoint import eos_ids, load_model
from kvlink.serving.config import ModelConfig, Rope

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}


def parse(**fields: Any) -> ModelConfig:
    return ModelConfig.from_dict({**LLAMA, **fields})


def test_defaults() -> None:
    config = parse()
    assert (config.num_kv_heads, config.head_dim, config.max_context) == (4, 16, 2048)
    assert (config.norm_eps, config.rope, config.dtype) == (1e-6, Rope(1e4), "float32")
    assert config.windows == (None,) * 4
    assert not any((config.qkv_bias, config.out_bias, config.mlp_bias, config.tied))


def test_nulls_count_as_absent() -> None:
    assert parse(head_dim=None, num_key_value_heads=None, rope_scaling=None) == parse()


LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("fields", "rope"),
    [
        ({"rope_theta": 5e5}, Rope(5e5)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, Rope(5e5)),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}},
            Rope(5e5, "linear", 2.0),
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3_ROPE}},
            Rope(5e5, "llama3", 8.0, 1.0, 4.0, 8192),
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3_ROPE}},
            Rope(5e5, "llama3", 8.0, 1.0, 4.0, 8192),
        ),
    ],
)
def test_rope(fields: dict[str, Any], rope: Rope) -> None:
    assert parse(**fields).rope == rope


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 9}, (9,) * 4),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, (None,) * 4),
        ({"architectures": ["MistralForCausalLM"]}, (4096,) * 4),
        ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 9}, (None,) * 4),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "use_sliding_window": True,
                "sliding_window": 9,
                "max_window_layers": 3,
            },
            (None, None, None, 9),
        ),
        (
            {
                "architectures": ["Qwen3ForCausalLM"],
                "use_sliding_window": True,
                "sliding_window": 9,
                "layer_types": ["full_attention", "sliding_attention"] * 2,
            },
            (None, 9, None, 9),
        ),
    ],
)
def test_windows(fields: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert parse(num_key_value_heads=4, **fields).windows == windows


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures: expected one of LlamaForCausalLM"),
        ({"architectures": None}, "architectures: expected one of"),
        ({"hidden_size": "64"}, "hidden_size: expected an integer >= 1; got '64'"),
        ({"num_hidden_layers": None}, "num_hidden_layers: expected an integer >= 1; got None"),
        ({"num_key_value_heads": 3}, r"multiple of num_key_value_heads \(3\); got 4"),
        ({"rms_norm_eps": 0}, "rms_norm_eps: expected a positive number; got 0"),
        ({"attention_bias": 1}, "attention_bias: expected true or false; got 1"),
        ({"hidden_act": "gelu"}, "hidden_act: expected silu; got 'gelu'"),
        ({"quantization_config": {}}, "only unquantised weights"),
        ({"torch_dtype": "float64"}, "dtype: expected one of"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "default, linear or llama3; got"),
        ({"rope_scaling": {"type": "linear"}}, "rope factor: expected a positive number; got None"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "expected one flat object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1; got 0.5"),
        (
            {
                "architectures": ["MistralForCausalLM"],
                "num_key_value_heads": 4,
                "sliding_window": 0,
            },
            "sliding_window: expected",
        ),
        (
            {"architectures": ["Qwen2ForCausalLM"], "layer_types": ["sliding_attention"] * 4},
            "needs use_sliding_window",
        ),
        (
            {"architectures": ["Qwen3ForCausalLM"], "layer_types": ["linear_attention"] * 4},
            "full_attention or sliding_attention; got 'linear_attention'",
        ),
    ],
)
def test_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(KVLinkError, match=reason):
        parse(**fields)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [2, 3]}, {"eos_token_id": 1}, {2, 3}),
        ({}, {"eos_token_id": 1}, {1}),
        (None, {"eos_token_id": 1}, {1}),
        (None, {"eos_token_id": None}, set()),
    ],
)
def test_eos_ids(
    generation: dict[str, Any] | None, config: dict[str, Any], expected: set[int], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert eos_ids(tmp_path) == expected


def test_bad_eos_id(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(InvalidArgument, match="eos_token_id: expected integers; got '</s>'"):
        eos_ids(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda weights: weights.pop("model.norm.weight"), r"lack model\.norm\.weight"),
        (
            lambda weights: weights.update({"model.extra": weights["model.norm.weight"].clone()}),
            r"LlamaForCausalLM has no weight model\.extra",
        ),
        (
            lambda weights: weights.update(
                {"model.norm.weight": weights["lm_head.weight"].clone()}
            ),
            r"model\.norm\.weight: expected \(128,\); got \(264, 128\)",
        ),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_weights_that_do_not_fit(
    change: Callable[[dict[str, Any]], Any],
    reason: str,
    checkpoint: Callable[[str], tuple[Any, Path]],
    tmp_path: Path,
) -> None:
    from safetensors.torch import load_file, save_file

    _, path = checkpoint("llama2")
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(InvalidArgument, match=reason):
        load_model(tmp_path, ModelConfig.from_dir(path), "float32")
