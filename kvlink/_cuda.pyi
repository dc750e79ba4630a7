"""Written by tools/make_stubs.py from the built module; `make stubs` brings it up to date."""

from collections.abc import Sequence
from typing import Any

from kvlink._C import PoolView

architectures: str
runtime_version: int

def append_kv(
    k: Any,
    v: Any,
    pool: PoolView,
    layers: Any,
    slots: Any,
    rope: Any,
    stream: int,
) -> None: ...

def apply_rope(x: Any, out: Any, rope: Any, stream: int) -> None:
    """See kvlink.apply_rope."""

def check_errors(device: int) -> None:
    """Waits for the device and raises what its kernels recorded."""

def device_count() -> int:
    """CUDA devices; 0 without a driver."""

def digest_pages(
    *,
    pool: PoolView,
    pages: Any,
    layers: Sequence[int],
    model_layers: Sequence[int],
    num_heads: int,
    head: int,
    model_head: int,
    num_tokens: int,
    start: int,
    token_position: int,
    digest_into: Any,
    ready: Sequence[tuple[Any, int]],
    ready_timeout: float,
    stream: int,
) -> tuple[Any, ...]:
    """(rows, digest). Layers are stored layers."""

def last_prefill() -> str:
    """What this thread's last call with q_indptr took for sequences of many rows.

    wgmma, or "mma.sync: " and why.
    """

def merge_states(outs: Sequence[Any], lses: Sequence[Any], out: Any, lse: Any, stream: int) -> None:
    """See kvlink.merge_states."""

def order_streams(device: int, first: int, then: int) -> None:
    """What is queued on stream `then` from now on waits for what is queued on `first`.

    Handles; 1 and 2 are the legacy and the per-thread default stream.
    """

def paged_attention(
    q: Any,
    pool: PoolView,
    layer: int,
    page_table: Any,
    seq_lens: Any,
    q_indptr: Any,
    page_indptr: Any,
    causal: bool,
    scale: float,
    window: int,
    softcap: float,
    sinks: Any,
    alibi_slopes: Any,
    out: Any,
    lse: Any,
    q_positions: Any,
    mask: Any,
    mask_starts: Any,
    page_generations: Any,
    expected_generations: Any,
    ready: Sequence[tuple[Any, int]],
    ready_timeout: float,
    stream: int,
) -> None:
    """See kvlink.paged_attention; window 0 and softcap 0 mean none."""

def relayout_pages(
    *,
    src: PoolView,
    src_pages: Any,
    dst: PoolView,
    dst_pages: Any,
    src_layers: Sequence[int],
    dst_layers: Sequence[int],
    model_layers: Sequence[int],
    num_heads: int,
    src_head: int,
    dst_head: int,
    model_head: int,
    num_tokens: int,
    src_start: int,
    dst_start: int,
    token_position: int,
    digest: bool,
    digest_into: Any,
    ready: Sequence[tuple[Any, int]],
    ready_timeout: float,
    raises: Sequence[Any] = [],
    stream: int,
) -> tuple[Any, ...]:
    """(rows, digest). Layers are stored layers."""

def set_prefill(name: str | bytes) -> None:
    """For tests and measurements: the kernel of long prompts, for the whole process.

    auto; mma.sync; wgmma (sm_90a; for few rows, too) or "wgmma, two parts" (of each
    weight: slower, and as close as float32 sums).
    """

def unavailable_reason() -> str:
    """Empty when there is a device."""
