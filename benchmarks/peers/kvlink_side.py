"""One side of kvlink's transfers: an endpoint with one shared pool or more (see lines.py).

Times are read where they happen, from the clock that all processes of a machine share.
"""

from __future__ import annotations

import time

import lines
import numpy as np

from kvlink import _C
from kvlink.layout import KVLayout, Shard
from kvlink.pool import KVPool
from kvlink.transfer import Endpoint

SECRET = b"the secret of the benchmarks"
_TIMEOUT = 60.0  # s


class Kvlink:
    """Both roles: the receiver grants, the sender pushes."""

    def open(self, shape: dict, threads: int | None = None, options: dict | None = None) -> str:
        """An endpoint with one pool of `shape`; its address, in hex."""
        if threads:
            _C.set_num_threads(threads)
        self.endpoint = Endpoint("side", secret=SECRET, **(options or {}))
        self.pool, self.num_tokens = _pool(shape), shape["num_tokens"]
        self.region = self.endpoint.register(
            self.pool, Shard(range(shape["num_layers"]), range(*shape["heads"]))
        )
        self.num_pages = self.pool.num_pages
        return self.endpoint.address.hex()

    def connect(self, address: str, path: str | None = None) -> list[str]:
        """[path, its detail]."""
        self.link = self.endpoint.connect(bytes.fromhex(address), require=path)
        return [self.link.path, str(getattr(self.link, "path_detail", ""))]

    def grant(self, digest: bool = True, num_tokens: int | None = None) -> str:
        """Grants all pages in an order of their own."""
        self.lent = self.endpoint.grant(
            self._pages(2, num_tokens), num_tokens or self.num_tokens, digest=digest
        )
        return self.lent.to_bytes().hex()

    def wait(self) -> int:
        """When everything had arrived and was verified."""
        self.lent.wait(_TIMEOUT)
        return time.monotonic_ns()

    def push(self, grant: str, at_ns: int = 0) -> list[int]:
        """Pushes a whole request; [when that began, when the last byte had been moved]."""
        begin = _begin(at_ns)
        self.transfer = self.link.push(self._pages(1), bytes.fromhex(grant))
        self.transfer.wait_source_reusable(_TIMEOUT)
        return [begin, max(part.done_ns for part in self.transfer.progress().parts)]

    def arrived(self) -> None:
        """Until the receiver has verified what was pushed."""
        self.transfer.wait_arrived(_TIMEOUT)

    def make_probe(self, num_bytes: int) -> dict[str, object]:
        """What `copy` and `read` use: memory as shared pools have it. How it is copied."""
        self.probe = _C.MemoryProbe(num_bytes, shared=True)
        return {"threads": _C.num_threads(), "copied_by": self.probe.copied_by}

    def copy(self, plain: bool, at_ns: int = 0) -> list[int]:
        """Copies all of the probe's memory, with the threads that move; [begin, end]."""
        begin = _begin(at_ns)
        self.probe.copy_plain() if plain else self.probe.copy()
        return [begin, time.monotonic_ns()]

    def read(self) -> float:
        """Seconds to read as much."""
        return self.probe.read()

    def post_layers(self, grant: str) -> list[float]:
        """Pushes layer by layer; the seconds that each call took."""
        transfer = self.link.begin(self._pages(1), bytes.fromhex(grant))
        times = []
        for layer in range(self.pool.num_layers):
            begin = time.perf_counter()
            transfer.push_layer(layer)
            times.append(time.perf_counter() - begin)
        transfer.finish()
        transfer.wait_arrived(_TIMEOUT)
        return times

    def offer(self, num_tokens: int) -> list[object]:
        """Offers that many tokens; [the offer, seconds of the call]."""
        pages = self._pages(1, num_tokens)
        begin = time.perf_counter()
        self.lent = self.endpoint.offer(pages, num_tokens)
        return [self.lent.to_bytes().hex(), time.perf_counter() - begin]

    def adopt(self, offer: str) -> float:
        """Takes an offer over and gives it back; the seconds until its pages could be used."""
        token = bytes.fromhex(offer)
        begin = time.perf_counter()
        lease = self.link.adopt(token)
        seconds = time.perf_counter() - begin
        lease.release()
        return seconds

    def released(self) -> None:
        """Until what was offered is the owner's alone again."""
        self.lent.wait_released(_TIMEOUT)

    def reconnect(self, address: str, **options: object) -> float:
        """Seconds to register this side's pool with a new endpoint and to connect it."""
        target = bytes.fromhex(address)
        with Endpoint("side", secret=SECRET, **options) as endpoint:
            begin = time.perf_counter()
            endpoint.register(self.pool)
            endpoint.connect(target)
            return time.perf_counter() - begin

    def _pages(self, seed: int, num_tokens: int | None = None) -> np.ndarray:
        """The pages of a request, scattered. Made once."""
        count = -(-(num_tokens or self.num_tokens) // self.pool.layout.page_size)
        name = f"_pages_{seed}_{count}"
        if not hasattr(self, name):
            order = np.array(lines.scattered(self.num_pages, seed), np.int32)
            setattr(self, name, order[:count])
        return getattr(self, name)


def _begin(at_ns: int) -> int:
    """Waits until then; what time it is."""
    while time.monotonic_ns() < at_ns:
        pass
    return time.monotonic_ns()


def _pool(shape: dict) -> KVPool:
    """A shared pool that holds `num_tokens` tokens; with `touched`, of ordinary values."""
    first, last = shape["heads"]
    layout = getattr(KVLayout, shape["order"])(
        num_kv_heads=last - first, head_dim=shape["head_dim"], page_size=shape["page_size"],
        dtype=shape["dtype"], scale=shape["scale"],
    )  # fmt: skip
    num_pages = -(-shape["num_tokens"] // shape["page_size"])
    pool = KVPool.create(layout, num_layers=shape["num_layers"], num_pages=num_pages, shared=True)
    if shape["touched"]:
        segment = pool.segment
        assert segment is not None
        view = _C.ArrayView(segment.address, [segment.num_bytes], [1], "uint8", (1, 0), segment)
        memory = np.from_dlpack(view)
        values = np.random.default_rng(1).standard_normal(1 << 19, np.float32)
        piece = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)  # bfloat16
        for begin in range(0, memory.size, piece.size):
            memory[begin : begin + piece.size] = piece[: memory.size - begin]
    for layer in range(pool.num_layers):
        if shape["scale"] == "tensor":
            pool.set_scales(layer, [0.02], [0.02])
    return pool


if __name__ == "__main__":
    lines.serve(Kvlink())
