"""`ModelConfig`: what a checkpoint's config.json says, checked and brought to one form."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvlink.errors import InvalidArgument, Unsupported

# Architecture -> what its config.json leaves to the model code.
_FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"vocab_size": 32000, "max_position_embeddings": 2048},
    "MistralForCausalLM": {
        "vocab_size": 32000,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "Qwen2ForCausalLM": {"vocab_size": 151936, "max_position_embeddings": 32768},
    "Qwen3ForCausalLM": {"vocab_size": 151936, "max_position_embeddings": 32768, "head_dim": 128},
}
_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Rope:
    """Rotary embedding, half-split. `kind` is default, linear or llama3."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 0


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only model of the Llama, Mistral, Qwen2 or Qwen3 family."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context: int
    norm_eps: float
    rope: Rope
    windows: tuple[int | None, ...]  # per layer; None: full attention
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied: bool
    dtype: str  # of the checkpoint, as far as config.json tells

    @classmethod
    def from_dir(cls, model_dir: Path) -> ModelConfig:
        """Reads config.json. Raises InvalidArgument or Unsupported, naming field and value."""
        return cls.from_dict(read_json(model_dir / "config.json"))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """The content of a config.json; see `from_dir`."""
        architecture = _architecture(raw)
        fields = _Fields(raw, _FAMILIES[architecture])
        has_bias_flag = architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM")
        attention_bias = has_bias_flag and fields.flag("attention_bias")
        _refuse_foreign_features(raw)
        num_layers = fields.positive("num_hidden_layers")
        hidden_size = fields.positive("hidden_size")
        num_heads = fields.positive("num_attention_heads")
        num_kv_heads = fields.positive("num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise InvalidArgument(
                f"config.json: num_attention_heads: expected a multiple of num_key_value_heads "
                f"({num_kv_heads}); got {num_heads}"
            )
        max_context = fields.positive("max_position_embeddings")
        return cls(
            architecture=architecture,
            vocab_size=fields.positive("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=fields.positive("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=fields.positive("head_dim", hidden_size // num_heads),
            max_context=max_context,
            norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope=_rope(fields, max_context),
            windows=_windows(fields, architecture, num_layers),
            qkv_bias=attention_bias or architecture == "Qwen2ForCausalLM",
            out_bias=attention_bias,
            mlp_bias=architecture == "LlamaForCausalLM" and fields.flag("mlp_bias"),
            qk_norm=architecture == "Qwen3ForCausalLM",
            tied=fields.flag("tie_word_embeddings"),
            dtype=_dtype(raw),
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises InvalidArgument naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidArgument(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise InvalidArgument(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidArgument(f"{path}: expected a JSON object; got {type(value).__name__}")
    return value


class _Fields:
    """Typed access to config.json; null counts as absent."""

    def __init__(self, raw: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.raw = raw
        self.defaults = defaults

    def get(self, name: str, default: Any = None) -> Any:
        value = self.raw.get(name)
        return self.defaults.get(name, default) if value is None else value

    def positive(self, name: str, default: int | None = None) -> int:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidArgument(f"config.json: {name}: expected an integer >= 1; got {value!r}")
        return value

    def number(self, name: str, default: float) -> float:
        return positive_number(name, self.get(name, default))

    def flag(self, name: str) -> bool:
        value = self.get(name, False)
        if not isinstance(value, bool):
            raise InvalidArgument(f"config.json: {name}: expected true or false; got {value!r}")
        return value


def positive_number(name: str, value: Any) -> float:
    """A finite positive number of config.json as float."""
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not math.isfinite(value) or value <= 0:
        raise InvalidArgument(f"config.json: {name}: expected a positive number; got {value!r}")
    return float(value)


def _architecture(raw: Mapping[str, Any]) -> str:
    names = raw.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in _FAMILIES:
        raise Unsupported(
            f"config.json: architectures: expected one of {', '.join(_FAMILIES)}; got {names!r}"
        )
    return str(names[0])


def _refuse_foreign_features(raw: Mapping[str, Any]) -> None:
    for name in ("quantization_config", "compression_config"):
        if raw.get(name) is not None:
            raise Unsupported(f"config.json: {name}: only unquantised weights are supported")
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise Unsupported(f"config.json: hidden_act: expected silu; got {raw['hidden_act']!r}")


def _dtype(raw: Mapping[str, Any]) -> str:
    value = raw.get("dtype", raw.get("torch_dtype"))
    if value is None:
        return "float32"
    name = str(value).removeprefix("torch.")
    if name not in _DTYPES:
        raise Unsupported(
            f"config.json: dtype: expected one of {', '.join(_DTYPES)}; got {value!r}"
        )
    return name


def _rope(fields: _Fields, max_context: int) -> Rope:
    """From `rope_parameters`, or from the older `rope_theta` and `rope_scaling`."""
    scaling: Any = fields.get("rope_parameters")
    if scaling is None:
        scaling = fields.get("rope_scaling") or {}
    if not isinstance(scaling, dict) or any(isinstance(v, dict) for v in scaling.values()):
        raise Unsupported(
            f"config.json: rope parameters: expected one flat object; got {scaling!r}"
        )
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    theta = positive_number("rope_theta", scaling.get("rope_theta", fields.get("rope_theta", 1e4)))
    for where in (scaling, fields.raw):
        if where.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise Unsupported(
                f"config.json: partial_rotary_factor: expected 1; got "
                f"{where['partial_rotary_factor']!r}"
            )
    if kind == "default":
        return Rope(theta)
    if kind not in ("linear", "llama3"):
        raise Unsupported(
            f"config.json: rope_type: expected default, linear or llama3; got {kind!r}"
        )
    factor = positive_number("rope factor", scaling.get("factor"))
    if kind == "linear":
        return Rope(theta, kind, factor)
    low = positive_number("low_freq_factor", scaling.get("low_freq_factor"))
    high = positive_number("high_freq_factor", scaling.get("high_freq_factor"))
    if high <= low:
        raise InvalidArgument(
            f"config.json: high_freq_factor: expected more than low_freq_factor ({low}); got {high}"
        )
    # The top level wins, as in the models' own code.
    original = fields.get(
        "original_max_position_embeddings",
        scaling.get("original_max_position_embeddings", max_context),
    )
    original = positive_number("original_max_position_embeddings", original)
    return Rope(theta, kind, factor, low, high, int(original))


def _windows(fields: _Fields, architecture: str, num_layers: int) -> tuple[int | None, ...]:
    if architecture == "LlamaForCausalLM":
        return (None,) * num_layers
    if architecture == "MistralForCausalLM":
        # An explicit null means full attention; an absent field the family's default.
        window = fields.raw.get("sliding_window", fields.defaults["sliding_window"])
        if window is None:
            return (None,) * num_layers
        return (_window(window),) * num_layers
    if not fields.flag("use_sliding_window"):
        window = None
    else:
        window = fields.raw.get("sliding_window", 4096)
    kinds = fields.get("layer_types")
    if kinds is None:
        first = fields.get("max_window_layers", 28)
        kinds = [
            "sliding_attention" if window is not None and layer >= first else "full_attention"
            for layer in range(num_layers)
        ]
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise InvalidArgument(
            f"config.json: layer_types: expected {num_layers} names; got {kinds!r}"
        )
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise Unsupported(
                "config.json: layer_types: expected full_attention or sliding_attention; "
                f"got {kind!r}"
            )
    if window is None and "sliding_attention" in kinds:
        raise InvalidArgument(
            "config.json: layer_types: sliding_attention needs use_sliding_window and "
            "sliding_window"
        )
    return tuple(_window(window) if kind == "sliding_attention" else None for kind in kinds)


def _window(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidArgument(
            f"config.json: sliding_window: expected an integer >= 1; got {value!r}"
        )
    return value
