"""What paged_attention on CUDA is tested with, by emulation and on devices."""

from __future__ import annotations

from typing import Any

import pytest

from kvlink.testing.cases import AttentionCase

BFLOAT16 = dict(kv_dtype="bfloat16", q_dtype="bfloat16")
FLOAT16 = dict(kv_dtype="float16", q_dtype="float16")
RAGGED = dict(q_lens=(1, 7, 30, 40), seq_lens=(150, 65, 300, 40))
EVERYTHING = dict(window=65, softcap=8.0, sinks=True, alibi=True, csr=True, scale=0.2)
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bidirectional": {"causal": False},
    "window-1": {"window": 1},
    "window-33": {"window": 33},
    "window-bidirectional": {"window": 20, "causal": False},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "alibi": {"alibi": True},
    "csr": {"csr": True},
    "everything": EVERYTHING,
}
SHAPES: dict[str, dict[str, Any]] = {
    "hnd": {"form": "hnd"},
    "packed": {"form": "packed"},
    "mha": {"num_q_heads": 3, "num_kv_heads": 3},
    "one-kv-head": {"num_q_heads": 8, "num_kv_heads": 1},
    "more-than-a-tile-of-heads": {"num_q_heads": 40, "num_kv_heads": 2},
    "dim-16": {"head_dim": 16},
    "dim-80": {"head_dim": 80},
    "dim-128": {"head_dim": 128},
    "dim-192-128": {"head_dim": 192, "head_dim_v": 128},
    "dim-256": {"head_dim": 256, "page_size": 33},
    "dim-64-256": {"head_dim": 64, "head_dim_v": 256, "seq_lens": (3, 70, 20)},
    "page-1": {"page_size": 1},
    "page-7": {"page_size": 7},
    "page-100": {"page_size": 100},
    "idle": {"seq_lens": (0, 133, 0)},
    "splits": {"seq_lens": (511, 1025, 513)},
    "splits-window": {"seq_lens": (700, 1100, 5), "window": 600, "sinks": True},
}
DECODE = {
    **{name: AttentionCase(**BFLOAT16, **features) for name, features in FEATURES.items()},
    **{name: AttentionCase(**(BFLOAT16 | shape)) for name, shape in SHAPES.items()},
    "float16": AttentionCase(**FLOAT16, **EVERYTHING),
    "float16-dim-128": AttentionCase(**FLOAT16, head_dim=128),
}
EXTEND = {
    **{name: AttentionCase(**RAGGED, **BFLOAT16, **each) for name, each in FEATURES.items()},
    **{
        name: AttentionCase(**(RAGGED | BFLOAT16 | shape | {"seq_lens": (70, 9, 64, 40)}))
        for name, shape in SHAPES.items()
        if not name.startswith("splits") and name != "idle"
    },
    "idle": AttentionCase(q_lens=(2, 0, 5), seq_lens=(0, 9, 66), **BFLOAT16),
    "float16": AttentionCase(**RAGGED, **FLOAT16, **EVERYTHING),
}
every_case = pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=f"decode-{name}") for name, case in DECODE.items()]
    + [pytest.param(case, id=f"extend-{name}") for name, case in EXTEND.items()],
)
