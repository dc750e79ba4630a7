"""How much of a transfer is hidden behind the prefill that makes its KV.

A prompt of 2048 tokens runs through the attention of 8 layers here (append_kv and a causal
paged_attention each, nothing else of a model), and its KV goes to another process: layer by layer
while later layers compute, or all of it after the last. Both take turns. What is not hidden is the
time from the end of the computation until the receiver has verified everything.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from harness import Figure
from moves import Shape
from sides import Side

import kvlink
from kvlink.transfer import Endpoint

_SECRET = b"the secret of the benchmarks"  # as in peers/kvlink_side.py
_MIN_ROUNDS = 5
_TIMEOUT = 60.0  # s
SHAPE = Shape(num_layers=8, num_tokens=2048, heads=(0, 8))


@dataclass
class Prefill:
    """The attention of a prompt, over a pool of its own; pages in scattered order."""

    shape: Shape = SHAPE
    pool: kvlink.KVPool = field(init=False)

    def __post_init__(self) -> None:
        shape, random = self.shape, np.random.default_rng(1)
        num_heads = shape.heads[1] - shape.heads[0]
        num_pages = -(-shape.num_tokens // shape.page_size)
        layout = kvlink.KVLayout.nhd(
            num_kv_heads=num_heads, head_dim=shape.head_dim, page_size=shape.page_size,
            dtype=shape.dtype,
        )  # fmt: skip
        self.pool = kvlink.KVPool.create(
            layout, num_layers=shape.num_layers, num_pages=num_pages, shared=True
        )
        self.pages = random.permutation(num_pages).astype(np.int32)
        at = np.arange(shape.num_tokens)
        self._slots = self.pages[at // shape.page_size].astype(np.int64) * shape.page_size
        self._slots += at % shape.page_size
        size = (3, shape.num_tokens, num_heads, shape.head_dim)
        self._qkv: npt.NDArray[np.float32] = random.standard_normal(size, np.float32)

    def layer(self, idx: int) -> None:
        """Writes the layer's KV and attends to it."""
        q, k, v = self._qkv
        num_tokens = self.shape.num_tokens
        kvlink.append_kv(k, v, self.pool, idx, self._slots)
        kvlink.paged_attention(
            q, self.pool, idx, self.pages[None], [num_tokens], q_indptr=[0, num_tokens]
        )


@dataclass
class Times:
    """Seconds of each round."""

    computing: list[float] = field(default_factory=list)
    moving: list[float] = field(default_factory=list)
    exposed: list[float] = field(default_factory=list)

    def medians(self) -> tuple[float, float, float]:
        computing, moving, exposed = map(
            statistics.median, (self.computing, self.moving, self.exposed)
        )
        return computing, moving, exposed


def overlap(seconds: float, path: str = "host_shm") -> Iterator[Figure]:
    """Figures of both ways: `ms` is what is not hidden."""
    options = {} if path == "host_shm" else {"paths": [path]}
    prefill = Prefill()
    layer_wise, afterwards = Times(), Times()
    with Side("kvlink_side") as side, Endpoint("prefill", secret=_SECRET, **options) as endpoint:
        endpoint.register(prefill.pool)
        address = side.call("open", vars(prefill.shape), None, options)
        link = endpoint.connect(bytes.fromhex(address), require=path)
        for times in (layer_wise, afterwards):
            _once(prefill, link, side, times is layer_wise, Times())  # fills caches
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(layer_wise.exposed) < _MIN_ROUNDS:
            for times in (layer_wise, afterwards):
                _once(prefill, link, side, times is layer_wise, times)
    computing, moving, exposed = layer_wise.medians()
    computing_alone, moving_alone, exposed_after = afterwards.medians()
    note = (
        f"{1 - exposed / exposed_after:.0%} of the time that push_after shows is hidden; computing "
        f"{computing * 1e3:.0f} ms, {computing / computing_alone - 1:+.1%} by the "
        f"{moving * 1e3:.1f} ms of moving beside it"
    )
    yield _figure("push_layers", path, exposed, note)
    yield _figure("push_after", path, exposed_after, f"{moving_alone * 1e3:.1f} ms of moving")


def _once(prefill: Prefill, link: object, side: Side, layer_wise: bool, times: Times) -> None:
    grant = bytes.fromhex(side.call("grant"))
    side.start("wait")
    transfer = link.begin(prefill.pages, grant)  # type: ignore[attr-defined]
    layers = range(prefill.shape.num_layers)
    begin = time.monotonic_ns()
    for layer in layers:
        prefill.layer(layer)
        if layer_wise:
            transfer.push_layer(layer)
    computed = time.monotonic_ns()
    if not layer_wise:
        for layer in layers:
            transfer.push_layer(layer)
    transfer.finish()
    arrived = side.result()
    transfer.wait_arrived(_TIMEOUT)
    times.computing.append((computed - begin) * 1e-9)
    times.moving.append(transfer.progress().moving_s)
    times.exposed.append((arrived - computed) * 1e-9)


def _figure(op: str, path: str, seconds: float, note: str) -> Figure:
    case = "overlap" if path == "host_shm" else f"overlap_{path}"
    ms = round(seconds * 1e3, 4)
    return Figure(op, case, path, SHAPE.dtype, SHAPE.page_size, ms, 0, 0, "none", 0, "kvlink", note)
