"""`Options` of a run, and the layouts and pool sizes that follow from them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from kvlink._memory import available_memory
from kvlink.errors import InvalidArgument
from kvlink.layout import KVLayout
from kvlink.pool import pool_bytes
from kvlink.serving.config import ModelConfig

LAYOUTS = ("nhd", "hnd", "packed")
KV_DTYPES = ("auto", "float32", "float16", "bfloat16", "fp8_e4m3", "fp8_e5m2", "int8")
PATHS = ("auto", "host_shm", "ucx")
DTYPES = ("auto", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class SideOptions:
    """One of the two processes. `num_pages` 0: sized to the input, within the machine's memory."""

    page_size: int = 16
    layout: str = "nhd"
    kv_dtype: str = "auto"
    num_pages: int = 0
    num_threads: int = 1

    def kv_layout(self, config: ModelConfig, model_dtype: str) -> KVLayout:
        """The layout of this side's pool; 8-bit types carry a scale per token and head."""
        dtype = model_dtype if self.kv_dtype == "auto" else self.kv_dtype
        make = {"nhd": KVLayout.nhd, "hnd": KVLayout.hnd, "packed": KVLayout.packed}[self.layout]
        return make(
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            page_size=self.page_size,
            dtype=dtype,
            scale="token_head" if dtype in ("fp8_e4m3", "fp8_e5m2", "int8") else "none",
        )

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens`."""
        return -(-num_tokens // self.page_size)


@dataclass(frozen=True)
class Options:
    """What both processes must know; plain values, sent to them as JSON."""

    model_dir: str
    dtype: str = "auto"  # of weights and activations
    prefill: SideOptions = SideOptions()
    decode: SideOptions = SideOptions()
    max_num_seqs: int = 64  # sequences that decode holds or has granted pages to
    max_batch_tokens: int = 1024  # prompt tokens in one prefill step
    ignore_eos: bool = False
    grant_ttl_s: float = 60.0
    prefill_ranks: int = 1
    path: str | None = None  # None: the fastest that there is
    prefix_caching: bool = True  # prompts that begin alike share pages

    def to_message(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> Options:
        """Inverse of `to_message`."""
        sides = {name: SideOptions(**message[name]) for name in ("prefill", "decode")}
        return cls(**{**message, **sides})

    def model_dtype(self, config: ModelConfig) -> str:
        """The dtype of weights and activations, resolved."""
        return config.dtype if self.dtype == "auto" else self.dtype

    def sized(self, config: ModelConfig, num_tokens: Sequence[tuple[int, int]]) -> Options:
        """Page counts filled in where they are 0.

        `num_tokens` gives per request what prefill and decode must hold. A pool gets room for the
        `max_num_seqs` longest of them, at most a quarter of the memory that the machine and the
        control groups of this process leave (all ranks of prefill together).
        """
        prefill, decode = (
            self._sized(side, config, [tokens[which] for tokens in num_tokens], num_pools)
            for which, (side, num_pools) in enumerate(
                ((self.prefill, self.prefill_ranks), (self.decode, 1))
            )
        )
        return replace(self, prefill=prefill, decode=decode)

    def _sized(
        self, side: SideOptions, config: ModelConfig, num_tokens: Sequence[int], num_pools: int
    ) -> SideOptions:
        layout = side.kv_layout(config, self.model_dtype(config))
        num_pages = side.num_pages
        if num_pages == 0:
            longest = sorted(map(side.pages_for, num_tokens), reverse=True)[: self.max_num_seqs]
            page_bytes = config.num_layers * layout.layer_bytes(1)
            room = available_memory() // 4 // num_pools // page_bytes
            num_pages = max(1, min(sum(longest), room))
        need = num_pools * pool_bytes(layout, config.num_layers, num_pages)
        if need > available_memory():
            raise InvalidArgument(
                f"num_pages: {num_pages} pages take {need >> 20} MiB; "
                f"{available_memory() >> 20} MiB are available"
            )
        return replace(side, num_pages=num_pages)


def side_threads(num_threads: int = 0, prefill_ranks: int = 1) -> tuple[int, int]:
    """Threads of each rank of prefill and of decode; `num_threads` 0: as many as the CPUs that this
    process may use.

    Either side may use all of them: prefill is at work when decode has little to do, and the other
    way round. When both are, the operating system divides the CPUs.
    """
    total = num_threads or len(os.sched_getaffinity(0))
    return max(1, total // prefill_ranks), total
