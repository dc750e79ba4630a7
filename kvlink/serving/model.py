"""The decoder in plain torch, inference only; its KV lives in a `KVPool`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import kvlink
from kvlink.pool import KVPool
from kvlink.serving.batch import Batch
from kvlink.serving.config import ModelConfig, Rope


class Decoder(nn.Module):
    """Token ids to logits. Parameter names are those of Hugging Face checkpoints."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = _Body(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight
        # Computed where it is used, so that it survives construction on the meta device.
        self.inv_freq = inverse_frequencies(config.rope, config.head_dim)

    @torch.inference_mode()
    def forward(
        self,
        batch: Batch,
        pool: KVPool,
        on_layer: Callable[[int], None] | None = None,
        awaited: Callable[[int], tuple[Any, float]] | None = None,
    ) -> Tensor:
        """Logits float32 [num_logits, vocab_size] of the rows `batch.logit_rows`.

        Writes the KV of the batch's tokens into `pool`; `on_layer(i)` is called as soon as layer
        i's is complete there. `awaited(i)` gives what attention waits for before it reads layer i,
        and for how long (`ready` and `ready_timeout` of `kvlink.paged_attention`). Raises NotReady,
        NeverReady: the same call may then be made again.
        """
        hidden = self.model.embed_tokens(torch.from_numpy(batch.token_ids))
        rope = _step_rope(self.inv_freq, torch.from_numpy(batch.positions))
        for layer in self.model.layers:
            hidden = layer(hidden, rope, batch, pool, on_layer, awaited)
        hidden = hidden[torch.from_numpy(batch.logit_rows)]
        return self.lm_head(self.model.norm(hidden)).float()  # type: ignore[no-any-return]


class _Body(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_Layer(config, index) for index in range(config.num_layers))
        self.norm = _RMSNorm(config.hidden_size, config.norm_eps)


class _Layer(nn.Module):
    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = _RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = _Attention(config, index)
        self.post_attention_layernorm = _RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = _MLP(config)

    def forward(self, hidden: Tensor, *args: Any) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), *args)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))  # type: ignore[no-any-return]


class _Attention(nn.Module):
    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.head_dim = config.head_dim
        self.window = config.windows[index]
        q_size, kv_size = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=config.out_bias)
        self.q_norm = _RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = _RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(
        self,
        hidden: Tensor,
        rope: kvlink.Rope,
        batch: Batch,
        pool: KVPool,
        on_layer: Callable[[int], None] | None,
        awaited: Callable[[int], tuple[Any, float]] | None,
    ) -> Tensor:
        by_head = (hidden.shape[0], -1, self.head_dim)
        q = self.q_proj(hidden).view(by_head)
        k = self.k_proj(hidden).view(by_head)
        v = self.v_proj(hidden).view(by_head)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)

        q = kvlink.apply_rope(q, rope, out=q)
        kvlink.append_kv(k, v, pool, self.index, batch.slots, rope=rope)
        if on_layer is not None:
            on_layer(self.index)
        ready, ready_timeout = (None, 0.0) if awaited is None else awaited(self.index)
        out = kvlink.paged_attention(
            q,
            pool,
            self.index,
            batch.page_table,
            batch.seq_lens,
            q_indptr=batch.q_indptr,
            window=self.window,
            ready=ready,
            ready_timeout=ready_timeout,
        )
        return self.o_proj(out.view(hidden.shape[0], -1))  # type: ignore[no-any-return]


class _MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        outer, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(outer, inner, bias=bias)
        self.up_proj = nn.Linear(outer, inner, bias=bias)
        self.down_proj = nn.Linear(inner, outer, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        gated = functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden)
        return self.down_proj(gated)  # type: ignore[no-any-return]


class _RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        exact = x.float()
        scale = torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (exact * scale).to(x.dtype)


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Radians per position of each pair of dims, float32 [head_dim / 2]."""
    with torch.device("cpu"):
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        plain: Tensor = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        # Long wavelengths are slowed down, short ones kept, those between interpolated.
        turns = rope.original_context / (2 * math.pi / plain)
        low, high = rope.low_freq_factor, rope.high_freq_factor
        keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        return (1 - keep) * plain / rope.factor + keep * plain
    return plain


def _step_rope(inv_freq: Tensor, positions: Tensor) -> kvlink.Rope:
    """The angles of a step's tokens, a row of the table each."""
    angles = positions.float()[:, None] * inv_freq
    table = torch.cat((angles.cos(), angles.sin()), dim=-1)
    return kvlink.Rope(table, torch.arange(len(positions)))
