"""What paged_attention on CUDA is tested with, by emulation and on devices."""

from __future__ import annotations

from typing import Any

import pytest

from kvlink.testing.cases import AttentionCase

BFLOAT16 = dict(kv_dtype="bfloat16", q_dtype="bfloat16")
FLOAT16 = dict(kv_dtype="float16", q_dtype="float16")
FLOAT32 = dict(kv_dtype="float32", q_dtype="float32")
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
# Stored dtypes and scales, and queries of another dtype than K and V.
STORED: dict[str, dict[str, Any]] = {
    **{
        f"{kv_dtype}-{scale}": {"kv_dtype": kv_dtype, "kv_scale": scale}
        for kv_dtype in ("float8_e4m3", "float8_e5m2", "int8")
        for scale in ("none", "tensor", "head", "token_head")
        if (kv_dtype, scale) != ("int8", "none")
    },
    "int8-dim-80": {"kv_dtype": "int8", "kv_scale": "token_head", "head_dim": 80},
    "float8-dim-256": {"kv_dtype": "float8_e4m3", "head_dim": 256, "head_dim_v": 144},
    "float8-float32": {"kv_dtype": "float8_e4m3", "q_dtype": "float32"},
    "float8-float16": {"kv_dtype": "float8_e5m2", "kv_scale": "head", "q_dtype": "float16"},
    "int8-packed": {"kv_dtype": "int8", "kv_scale": "token_head", "form": "packed"},
    "bfloat16-float32": {"q_dtype": "float32"},
    "bfloat16-float16": {"q_dtype": "float16", "head_dim": 192, "head_dim_v": 128},
    "float16-bfloat16": {"kv_dtype": "float16"},
    "float16-float32": {"kv_dtype": "float16", "q_dtype": "float32", "head_dim": 144},
    "float32": FLOAT32,
    "float32-dim-256": FLOAT32 | {"head_dim": 256, "head_dim_v": 80, "form": "packed"},
    "float32-dim-16": FLOAT32 | {"head_dim": 16, "num_q_heads": 40, "num_kv_heads": 2},
    "float32-bfloat16": {"kv_dtype": "float32", "page_size": 1, **EVERYTHING},
    "float32-float16": {"kv_dtype": "float32", "q_dtype": "float16", "head_dim": 128},
}
LATENT: dict[str, dict[str, Any]] = {
    "bfloat16": {"num_q_heads": 70},
    "float16": {"kv_dtype": "float16", "q_dtype": "float16", "num_q_heads": 3, "page_size": 7},
    "float32-queries": {"q_dtype": "float32"},
    "float16-float32": {"kv_dtype": "float16", "q_dtype": "float32", "num_q_heads": 33},
    "float8": {"kv_dtype": "float8_e4m3", "kv_scale": "token_head", "page_size": 64},
    "float8-float16": {"kv_dtype": "float8_e4m3", "q_dtype": "float16", "kv_scale": "tensor"},
    "float8-e5m2": {"kv_dtype": "float8_e5m2", "kv_scale": "head"},
    "int8": {"kv_dtype": "int8", "kv_scale": "token_head", "page_size": 1},
    "all-float32": FLOAT32 | {"num_q_heads": 20},
    "float32-bfloat16": {"kv_dtype": "float32", "head_dim": 96, "head_dim_v": 80, "page_size": 7},
    "small": {"head_dim": 80, "head_dim_v": 48, "num_q_heads": 5, **EVERYTHING},
    "splits": {"head_dim": 96, "head_dim_v": 64, "seq_lens": (513, 1030, 40)},
}
ROWS: dict[str, dict[str, Any]] = {
    "tree": {"mask": "tree"},
    "mask": {"mask": "any"},
    "mask-float8": {"mask": "any", "kv_dtype": "float8_e4m3", "kv_scale": "token_head"},
    "mask-float32": FLOAT32 | {"mask": "any", "window": 50, "subset": True},
    "mask-window": {"mask": "any", "window": 33, "causal": False},
    "subset": {"subset": True},
    "subset-mask": {"subset": True, "mask": "any", "alibi": True, "csr": True},
    "subset-latent": {"subset": True, "form": "latent", "num_kv_heads": 1, "mask": "any"},
    "generations": {"generations": True, "window": 40},
    "generations-csr": {"generations": True, "csr": True},
}
LATENT_SIZES: dict[str, Any] = dict(
    form="latent", num_kv_heads=1, head_dim=576, head_dim_v=512, seq_lens=(1, 70, 0)
)
# Of the sm_90a kernel for latent pages, which takes calls of many query heads.
SPLIT = 2048  # positions
SOME_HEADS: dict[str, Any] = LATENT_SIZES | dict(
    num_q_heads=40, seq_lens=(1, 70, 0, 131), q_lens=(1,) * 4
)
SMALL_HEADS: dict[str, Any] = SOME_HEADS | dict(head_dim=96, head_dim_v=80)
MANY_HEADS = {
    name: AttentionCase(**(BFLOAT16 | each))
    for name, each in {
        "plain": SOME_HEADS | {"num_q_heads": 128, "page_size": 64, "seq_lens": (1, 70, 0, 330)},
        "float16": SOME_HEADS | FLOAT16 | {"page_size": 8},
        "ragged": SMALL_HEADS
        | {"seq_lens": (5, 0, 200, 1, 64, 127), "q_lens": (1,) * 6, "page_size": 48},
        "everything": SMALL_HEADS | EVERYTHING | {"num_q_heads": 70},
        "window": SMALL_HEADS
        | {"window": 67, "page_size": 64, "csr": True, "seq_lens": (9, 70, 131, 300)},
        "negative-scale": SMALL_HEADS | {"scale": -0.2, "page_size": 24},
        "extend": SMALL_HEADS | {"q_lens": (3, 0, 7, 20), "seq_lens": (70, 9, 7, 150)},
        "extend-bidirectional": SMALL_HEADS
        | {"q_lens": (3, 5), "seq_lens": (70, 130), "causal": False},
        "extend-window": SMALL_HEADS | {"q_lens": (9, 5), "seq_lens": (200, 130), "window": 40},
        "few-heads": SMALL_HEADS | {"num_q_heads": 3},
        "splits": SMALL_HEADS | {"seq_lens": (SPLIT, SPLIT + 1, 5, 2 * SPLIT + 130)},
    }.items()
}
SHORT: dict[str, Any] = dict(q_lens=(1, 7, 30, 40), seq_lens=(70, 9, 64, 40))
DECODE = {
    **{name: AttentionCase(**BFLOAT16, **features) for name, features in FEATURES.items()},
    **{name: AttentionCase(**(BFLOAT16 | shape)) for name, shape in SHAPES.items()},
    **{name: AttentionCase(**(BFLOAT16 | stored)) for name, stored in STORED.items()},
    **{name: AttentionCase(**(BFLOAT16 | rows)) for name, rows in ROWS.items()},
    **{
        f"latent-{name}": AttentionCase(**(BFLOAT16 | LATENT_SIZES | each))
        for name, each in LATENT.items()
    },
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
    **{name: AttentionCase(**(BFLOAT16 | stored | SHORT)) for name, stored in STORED.items()},
    **{name: AttentionCase(**(RAGGED | BFLOAT16 | rows)) for name, rows in ROWS.items()},
    "latent": AttentionCase(
        **(BFLOAT16 | LATENT_SIZES | {"q_lens": (3, 20), "seq_lens": (40, 70)})
    ),
    "splits": AttentionCase(
        **(BFLOAT16 | {"q_lens": (3, 5, 1), "seq_lens": (1025, 2100, 3), "sinks": True})
    ),
    "splits-float32": AttentionCase(**(FLOAT32 | {"q_lens": (3, 7), "seq_lens": (1100, 513)})),
    "splits-window": AttentionCase(
        **(BFLOAT16 | {"q_lens": (3, 9), "seq_lens": (2100, 1500), "window": 1030, "csr": True})
    ),
    "idle": AttentionCase(q_lens=(2, 0, 5), seq_lens=(0, 9, 66), **BFLOAT16),
    "float16": AttentionCase(**RAGGED, **FLOAT16, **EVERYTHING),
}
every_case = pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=f"decode-{name}") for name, case in DECODE.items()]
    + [pytest.param(case, id=f"extend-{name}") for name, case in EXTEND.items()],
)
