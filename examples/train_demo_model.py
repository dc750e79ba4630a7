#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Train the small Llama checkpoint that ``make demo`` serves.

The text is what every Python installation carries: the sources of its standard
library and the topics of the language reference behind ``help()`` (PSF licence).
The script trains a byte-level BPE tokenizer and then a Llama model of less than four
million parameters, and writes a folder in the Hugging Face layout::

    python examples/train_demo_model.py --minutes 46 --compile --out examples/demo_model

Text, initial weights and the order of the batches are fixed, but the schedule follows
the elapsed time: the number of steps, and so the exact weights, depend on the machine.
Needs torch, tokenizers and safetensors; a CPU with native bfloat16 is enough.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import random
import sysconfig
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

EOT = "<|endoftext|>"  # token 0: separates documents, serves as bos and eos
SKIPPED = {  # tests, tables, generated files and the like
    "__phello__", "__pycache__", "encodings", "ensurepip", "idlelib", "pgen2", "pydoc_data",
    "site-packages", "test", "tests", "turtledemo", "_casefix.py", "_compat_pickle.py",
    "_constants.py", "constants.py", "entities.py", "keysyms.py", "locale.py",
    "stringprep.py", "this.py", "tix.py",
}  # fmt: skip
PROSE_WEIGHT = 3  # how often an epoch repeats the topics
LENGTHS = (512,) * 12 + (1024,) * 3 + (2048,)  # of the sequences; one is drawn for each step


@dataclass(frozen=True)
class Config:
    """The shape of the model."""

    vocab_size: int = 2048
    hidden_size: int = 256
    intermediate_size: int = 576
    num_hidden_layers: int = 5
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned scale."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise in float32, whatever the type of the input."""
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embedding, pairing the two halves of each head."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, rows: int = 256) -> Tensor:
    """Causal attention, a block of rows at a time: faster here than the fused CPU kernel."""
    out, mask = [], torch.full((rows, rows), -math.inf, dtype=q.dtype).triu(1)
    for i in range(0, q.shape[2], rows):
        scores = q[:, :, i : i + rows] @ k[:, :, : i + rows].transpose(-1, -2)
        scores = torch.cat((scores[..., :i], scores[..., i:] + mask), dim=-1)
        out.append(scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v[:, :, : i + rows])
    return torch.cat(out, dim=2)


def linears(sizes: dict[str, tuple[int, int]]) -> nn.ModuleDict:
    """Make named linear layers without bias, given as (inputs, outputs)."""
    return nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})


class Block(nn.Module):
    """One decoder layer; the names of the parameters are those of the checkpoint."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        d, f = c.hidden_size, c.intermediate_size
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.input_layernorm = RMSNorm(d, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(d, c.rms_norm_eps)
        sizes = {"q_proj": (d, q), "k_proj": (d, kv), "v_proj": (d, kv), "o_proj": (q, d)}
        self.self_attn = linears(sizes)
        self.mlp = linears({"gate_proj": (d, f), "up_proj": (d, f), "down_proj": (f, d)})

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Apply attention and MLP to (batch, length, hidden) input."""
        batch, length, _ = x.shape
        h = self.input_layernorm(x)
        q, k, v = (
            self.self_attn[name](h).view(batch, length, -1, self.c.head_dim).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        group = self.c.num_attention_heads // self.c.num_key_value_heads
        q = (rotate(q, cos, sin) * self.c.head_dim**-0.5).to(v.dtype)
        k = rotate(k, cos, sin).to(v.dtype).repeat_interleave(group, dim=1)
        v = v.repeat_interleave(group, dim=1)
        h = attend(q, k, v)
        x = x + self.self_attn["o_proj"](h.transpose(1, 2).reshape(batch, length, -1))
        h = self.post_attention_layernorm(x)
        h = F.silu(self.mlp["gate_proj"](h)) * self.mlp["up_proj"](h)
        return torch.add(x, self.mlp["down_proj"](h))


class Llama(nn.Module):
    """A Llama decoder with tied embeddings."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        freq = c.rope_theta ** -(torch.arange(0, c.head_dim, 2) / c.head_dim)
        angle = torch.outer(torch.arange(c.max_position_embeddings), freq)
        self.cos, self.sin = angle.cos(), angle.sin()
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                out = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * len(self.layers) if out else 1))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the summed next-token loss."""
        x = self.embed_tokens(tokens)
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin)
        logits = F.linear(self.norm(x), self.embed_tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")


def collect() -> tuple[list[str], list[str], list[str]]:
    """Return the training sources, the training topics and the held-out documents."""
    root = Path(sysconfig.get_path("stdlib"))
    named: list[tuple[str, str]] = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if SKIPPED.intersection(parts) or parts[0].startswith(("_sysconfigdata", "config-")):
            continue
        text = path.read_text(encoding="utf-8", errors="replace").strip()
        if len(text) > 200:
            named.append(("/".join(parts), text.expandtabs(8) + "\n"))
    tree = ast.parse((root / "pydoc_data" / "topics.py").read_text(encoding="utf-8"))
    table = next(node.value for node in tree.body if isinstance(node, ast.Assign))
    topics: dict[str, str] = {}  # by text, since some are stored under two names
    for name, text in ast.literal_eval(table).items():
        topics.setdefault(text.strip() + "\n", f"topic:{name}")

    def held_out(name: str) -> bool:
        return zlib.crc32(name.encode()) % 32 == 0

    sources = [text for name, text in named if not held_out(name)]
    prose = [text for text, name in topics.items() if not held_out(name)]
    named += [(name, text) for text, name in topics.items()]
    return sources, prose, [text for name, text in named if held_out(name)]


def train_tokenizer(texts: list[str], size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer; it adds no special tokens by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    bytes_ = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[EOT], initial_alphabet=bytes_)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def batches(pool: list[Tensor], size: int, seed: int) -> Iterator[Tensor]:
    """Yield (rows, length + 1) windows without end; shuffles the documents every epoch."""
    rng = random.Random(seed)
    stream = torch.empty(0, dtype=torch.long)
    while True:
        rng.shuffle(pool)
        stream = torch.cat([stream, *pool])
        while len(stream) > size + max(LENGTHS):
            length = rng.choice(LENGTHS)
            yield stream[: size + 1].unfold(0, length + 1, length)
            stream = stream[size:]


def evaluate(model: Llama, tokens: Tensor, length: int = 512) -> float:
    """Return the mean loss, in nats a token, over consecutive windows of the tokens."""
    rows = tokens.unfold(0, length + 1, length)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        losses = [model(r[:, :-1], r[:, 1:]) for r in torch.split(rows, 8)]
    return float(sum(losses)) / (len(rows) * length)


def save(model: Llama, tokenizer: Tokenizer, c: Config, out: Path) -> None:
    """Write the checkpoint folder: weights (bfloat16), configuration and tokenizer."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {f"model.{k}": v.to(torch.bfloat16) for k, v in model.state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"))
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
        **vars(c), **ids, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
        "rope_scaling": None, "initializer_range": 0.02, "tie_word_embeddings": True,
    }  # fmt: skip
    kind: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": EOT}
    kind |= {"eos_token": EOT, "model_max_length": c.max_position_embeddings}
    sampling = {**ids, "do_sample": True, "temperature": 0.7, "top_p": 0.9}
    files = {"config": config, "generation_config": sampling, "tokenizer_config": kind}
    for name, content in files.items():
        (out / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    """Collect the text, train tokenizer and model for the given time, and save them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    out = Path(__file__).parent / "demo_model"
    parser.add_argument("--out", type=Path, default=out, help="checkpoint folder")
    parser.add_argument("--minutes", type=float, default=46.0, help="time for the training loop")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens-per-step", type=int, default=4096, help="multiple of 2048")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument("--save-every", type=float, default=5.0, help="minutes between saves")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    c = Config()
    sources, prose, held_out = collect()
    tokenizer = train_tokenizer(sources + prose, c.vocab_size)
    encoded = [tokenizer.encode_batch(texts) for texts in (sources, prose, held_out)]
    docs = [[torch.tensor([0, *e.ids]) for e in group] for group in encoded]
    counts = [sum(len(doc) for doc in group) for group in docs]
    n_bytes = sum(len(text.encode()) for text in held_out)
    print(f"tokens: {counts[0]} source + {counts[1]} prose, {counts[2]} held out ({n_bytes} bytes)")

    model = Llama(c)
    print(f"parameters: {sum(p.numel() for p in model.parameters())}")
    loss_sum = torch.compile(model, dynamic=False) if args.compile else model
    matrices = [p for p in model.parameters() if p.dim() == 2]
    scales = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": scales, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.99), fused=True)

    start = time.monotonic()
    budget, saved_at, running = args.minutes * 60, 0.0, 0.0
    data = batches(docs[0] + PROSE_WEIGHT * docs[1], args.tokens_per_step, args.seed)
    for step, rows in enumerate(data):
        elapsed = time.monotonic() - start
        done = min(elapsed / budget, 1.0)
        if done >= 1.0 or elapsed - saved_at >= args.save_every * 60:
            saved_at = elapsed
            save(model, tokenizer, c, args.out)
            nats = evaluate(model, torch.cat(docs[2]))
            bits = nats * counts[2] / n_bytes / math.log(2)
            print(f"  held out: loss {nats:.4f}, {bits:.4f} bits per byte", flush=True)
        if done >= 1.0:
            break
        lr = args.lr * min((step + 1) / 200, 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_sum(rows[:, :-1], rows[:, 1:]) / args.tokens_per_step
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running += loss.item()
        if step % 50 == 49:
            clock = f"{elapsed / 60:6.2f} min, step {step + 1}, lr {lr:.2e}"
            print(f"{clock}, loss {running / 50:.4f}", flush=True)
            running = 0.0


if __name__ == "__main__":
    main()
