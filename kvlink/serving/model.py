"""The decoder in plain torch, inference only; its KV lives in a `KVPool`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import kvlink
from kvlink.pool import KVPool
from kvlink.serving.batch import Batch
from kvlink.serving.config import ModelConfig, Rope
from kvlink.serving.linear import Product


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
        self._cos_sin = kvlink.rope_table(self.inv_freq, 0)
        # Layers share a plan whatever their windows; it is balanced for the widest.
        self._window = None if None in config.windows else max(filter(None, config.windows))

    def pack(self) -> Decoder:
        """The weights are loaded: brings them into the form that the forward pass uses."""
        for module in self.modules():
            if isinstance(module, _Attention | _MLP):
                module.pack()
        self.logits = Product(self.lm_head, keep=self.config.tied)
        return self

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
        step = Step(batch, pool, self._rope(batch.positions), on_layer, awaited)
        queries = self._queries(step, batch.q_indptr)
        *layers, last = self.model.layers
        for layer in layers:
            hidden = layer(hidden, step, queries)
        # All tokens leave their K and V in the last layer; only some are asked what comes next.
        if len(batch.logit_rows) < len(batch.positions):
            queries = self._queries(step, batch.logit_indptr, batch.logit_rows)
        return self.logits(self.model.norm(last(hidden, step, queries))).float()

    def _rope(self, positions: Any) -> kvlink.Rope:
        """The angles of a step's tokens; the table grows with the positions seen."""
        needed = int(positions.max()) + 1
        if needed > len(self._cos_sin):
            self._cos_sin = kvlink.rope_table(self.inv_freq, 2 * needed)
        return kvlink.Rope(self._cos_sin, positions)

    def _queries(self, step: Step, q_indptr: Any, rows: Any = None) -> Queries:
        """Of all tokens, or of `rows`."""
        positions = step.batch.positions if rows is None else step.batch.positions[rows]
        plan = kvlink.plan_attention(
            step.pool,
            step.batch.page_table,
            step.batch.seq_lens,
            num_q_heads=self.config.num_heads,
            q_indptr=q_indptr,
            window=self._window,
        )
        return Queries(
            None if rows is None else torch.from_numpy(rows),
            q_indptr,
            None if rows is None else positions.astype(np.int32),
            step.rope._replace(positions=positions),
            plan,
        )


class Step(NamedTuple):
    """What all layers of a forward pass have in common; see `Decoder.forward`."""

    batch: Batch
    pool: KVPool
    rope: kvlink.Rope
    on_layer: Callable[[int], None] | None
    awaited: Callable[[int], tuple[Any, float]] | None


class Queries(NamedTuple):
    """The tokens that attend, and how: their plan serves every layer that they enter."""

    rows: Tensor | None  # of the step's; None: all of them
    q_indptr: Any
    positions: Any  # int32, where they are not the last ones of their sequence
    rope: kvlink.Rope
    plan: Any


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

    def forward(self, hidden: Tensor, step: Step, queries: Queries) -> Tensor:
        attended = self.self_attn(self.input_layernorm(hidden), step, queries)
        hidden = (hidden if queries.rows is None else hidden[queries.rows]) + attended
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

    def pack(self) -> None:
        """See `Decoder.pack`."""
        self.qkv, self.output = Product(self.q_proj, self.k_proj, self.v_proj), Product(self.o_proj)

    def forward(self, hidden: Tensor, step: Step, queries: Queries) -> Tensor:
        by_head = (hidden.shape[0], -1, self.head_dim)
        q, k, v = (x.view(by_head) for x in self.qkv.parts(hidden))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)

        kvlink.append_kv(k, v, step.pool, self.index, step.batch.slots, rope=step.rope)
        if step.on_layer is not None:
            step.on_layer(self.index)
        q = q if queries.rows is None else q[queries.rows]
        if len(q) == 0:
            return hidden[:0]
        q = kvlink.apply_rope(q, queries.rope, out=q)
        ready, ready_timeout = (None, 0.0) if step.awaited is None else step.awaited(self.index)
        out = kvlink.paged_attention(
            q,
            step.pool,
            self.index,
            step.batch.page_table,
            step.batch.seq_lens,
            q_indptr=queries.q_indptr,
            q_positions=queries.positions,
            window=self.window,
            plan=queries.plan,
            ready=ready,
            ready_timeout=ready_timeout,
        )
        return self.output(out.view(len(q), -1))


class _MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        outer, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(outer, inner, bias=bias)
        self.up_proj = nn.Linear(outer, inner, bias=bias)
        self.down_proj = nn.Linear(inner, outer, bias=bias)

    def pack(self) -> None:
        """See `Decoder.pack`."""
        self.gate_up, self.down = Product(self.gate_proj, self.up_proj), Product(self.down_proj)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_up.parts(hidden)
        return self.down(functional.silu(gate, inplace=True).mul_(up))


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
