"""Which backend a call of `paged_attention` gets, looked up once for calls of one kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvlink.backends import Capabilities, attention_features, choose_name
from kvlink.pool import KVPool

# What may be absent of a call, in the order that it tells of.
_NAMES = (
    "mask", "plan", "sinks", "alibi_slopes", "window", "softcap", "csr_page_table", "q_positions",
    "generations",
)  # fmt: skip


def with_implied(features: Sequence[str], pool: KVPool, q_dtype: str) -> list[str]:
    """The features, and those that q and the pool bring."""
    implied = attention_features(pool.layout, q_dtype)
    return [*features, *(name for name, needed in implied.items() if needed)]


def choose_for(backends: Sequence[Capabilities], pool: KVPool, asked: tuple[Any, ...]) -> str:
    """The name, which the pool remembers.

    `asked`: q's dtype, `backend`, the feature that `ready` is or None, and of each of _NAMES
    whether it is absent. Raises InvalidArgument, Unsupported.
    """
    q_dtype, backend, ready, *absent = asked
    needed = [name for name, without in zip(_NAMES, absent, strict=True) if not without]
    if ready is not None:
        needed.append(ready)
    needed = with_implied(needed, pool, q_dtype)
    chosen = choose_name(backends, backend, pool.device, q_dtype, pool.layout.dtype, needed)
    pool.choices[asked] = chosen
    return chosen
