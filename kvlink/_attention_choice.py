"""Which backend a call of `paged_attention` gets, looked up once for calls of one kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvlink.backends import Capabilities, attention_features, choose_name
from kvlink.errors import Unsupported
from kvlink.pool import KVPool

# What may be absent of a call, in the order that it tells of.
_NAMES = (
    "mask", "plan", "sinks", "alibi_slopes", "window", "softcap", "csr_page_table", "q_positions",
    "generations",
)  # fmt: skip


def with_implied(features: Sequence[str], pool: KVPool, q_dtype: str) -> list[str]:
    """The features, and those that q and the pool bring."""
    implied = attention_features(pool.layout, q_dtype)
    implied["unaligned_rows"] = not implied["any_strides"] and not _rows_are_aligned(pool)
    return [*features, *(name for name, needed in implied.items() if needed)]


def _rows_are_aligned(pool: KVPool) -> bool:
    """Every row of K and V begins at a multiple of 16 bytes."""
    layout = pool.layout
    planes = (layout.k, layout.v) if layout.has_v_plane else (layout.k,)
    return all(
        address % 16 == 0
        and all(
            stride * layout.element_bytes % 16 == 0
            for stride in (plane.stride_page, plane.stride_slot, plane.stride_head)
        )
        for layer in pool._planes
        for address, plane in zip(layer, planes, strict=False)
    )


def choose_for(backends: Sequence[Capabilities], pool: KVPool, asked: tuple[Any, ...]) -> str:
    """The name, which the pool remembers.

    `asked`: q's dtype, `backend`, the feature that `ready` is or None, and of each of _NAMES
    whether it is absent. Raises InvalidArgument, Unsupported.
    """
    pool.choices[asked] = chosen = _choose(backends, pool, asked)
    return chosen


def _choose(backends: Sequence[Capabilities], pool: KVPool, asked: tuple[Any, ...]) -> str:
    q_dtype, backend, ready, *absent = asked
    needed = [name for name, without in zip(_NAMES, absent, strict=True) if not without]
    if ready is not None:
        needed.append(ready)
    needed = with_implied(needed, pool, q_dtype)
    return choose_name(backends, backend, pool.device, q_dtype, pool.layout.dtype, needed)


def choose_after_cuda(
    backends: Sequence[Capabilities], pool: KVPool, asked: tuple[Any, ...], error: Unsupported
) -> str:
    """What takes a call, asked for as in `choose_for`, whose arrays or device "cuda" has refused.

    Raises the refusal where nothing else does.
    """
    if asked[1] != "auto":
        raise error
    others = [each for each in backends if each.name != "cuda"]
    try:
        return _choose(others, pool, asked)
    except Unsupported:
        raise error from None
