"""Reads a Hugging Face checkpoint directory: weights, tokenizer, end-of-sequence ids."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvlink.errors import InvalidArgument
from kvlink.serving.config import ModelConfig, read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from kvlink.serving.model import Decoder


def weight_files(model_dir: Path) -> list[Path]:
    """The safetensors files, from the index when sharded. Raises InvalidArgument."""
    index = model_dir / "model.safetensors.index.json"
    if index.exists():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise InvalidArgument(f"{index}: weight_map: expected an object; got {names!r:.60}")
        files = [model_dir / str(name) for name in sorted(set(names.values()))]
    else:
        files = [model_dir / "model.safetensors"]
    for path in files:
        if path.parent != model_dir or not path.is_file():
            raise InvalidArgument(f"{path}: no such file")
    return files


def load_tokenizer(model_dir: Path) -> Tokenizer | None:
    """tokenizer.json, or None where there is none. Raises InvalidArgument."""
    from tokenizers import Tokenizer

    path = model_dir / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise InvalidArgument(f"{path}: not a tokenizer: {error}") from None
    # Prompts are served as they are: neither cut nor filled up.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def eos_ids(model_dir: Path) -> frozenset[int]:
    """Ids that end a sequence: generation_config.json's, else config.json's, else none."""
    for name in ("generation_config.json", "config.json"):
        path = model_dir / name
        if not path.is_file():
            continue
        value = read_json(path).get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(token) is not int for token in ids):
            raise InvalidArgument(f"{path}: eos_token_id: expected integers; got {value!r}")
        if ids:
            return frozenset(ids)
    return frozenset()


def load_model(model_dir: Path, config: ModelConfig, dtype: str) -> Decoder:
    """The model with its weights in `dtype`. Raises InvalidArgument naming the tensor."""
    import torch

    from kvlink.serving.model import Decoder

    with torch.device("meta"):
        model = Decoder(config)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    weights = _read_weights(model_dir, config, getattr(torch, dtype))
    for name in sorted(expected.keys() - weights.keys()):
        raise InvalidArgument(f"{model_dir}: the weights lack {name}")
    for name, weight in weights.items():
        if name not in expected:
            raise InvalidArgument(f"{model_dir}: {config.architecture} has no weight {name}")
        if tuple(weight.shape) != expected[name]:
            raise InvalidArgument(
                f"{model_dir}: {name}: expected {expected[name]}; got {tuple(weight.shape)}"
            )
    model.load_state_dict(weights, strict=False, assign=True)
    if config.tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.requires_grad_(False).eval().pack()


def _read_weights(model_dir: Path, config: ModelConfig, dtype: Any) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    weights = {}
    for path in weight_files(model_dir):
        try:
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    # Older checkpoints store a buffer, tied ones their head twice.
                    if name.endswith(".rotary_emb.inv_freq") or (
                        config.tied and name == "lm_head.weight"
                    ):
                        continue
                    weights[name] = tensors.get_tensor(name).to(dtype)
        except (SafetensorError, OSError) as error:
            raise InvalidArgument(f"{path}: cannot be read: {error}") from None
    return weights
