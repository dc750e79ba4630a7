"""One side of Mooncake's WRITE of scattered pieces, through its TCP transport (see lines.py).

Runs in an environment that has Mooncake's wheel; kvlink is not imported.
"""

from __future__ import annotations

import time

import lines
import numpy as np
from mooncake.engine import TransferEngine

_BATCH = 2048  # pieces: as many as its queue takes at once by default


class Mooncake:
    """Both roles: the target lends a buffer, the initiator writes into it."""

    def __init__(self) -> None:
        self.engine = TransferEngine()

    def expose(self, num_bytes: int, host: str = "127.0.0.1") -> list[object]:
        """Target: registers a buffer of zeros; [session, address]."""
        self._start(host, np.zeros(num_bytes, np.uint8))
        return [f"{host}:{self.engine.get_rpc_port()}", self.buffer.ctypes.data]

    def attach(self, num_bytes: int, session: str, address: int, host: str = "127.0.0.1") -> int:
        """Initiator: a buffer of random bytes; their sum, as the target must find it."""
        self._start(host, np.random.default_rng(1).integers(0, 255, num_bytes, np.uint8))
        self.session, self.address = session, address
        return self.sum()

    def prepare(self, piece_bytes: int) -> None:
        """Initiator: addresses of all pieces, in one order here and in another one there."""
        num_pieces = self.buffer.nbytes // piece_bytes
        base = self.buffer.ctypes.data
        self.here = [base + idx * piece_bytes for idx in lines.scattered(num_pieces, 1)]
        self.there = [self.address + idx * piece_bytes for idx in lines.scattered(num_pieces, 2)]
        self.sizes = [piece_bytes] * num_pieces

    def write(self) -> float:
        """Initiator: seconds of synchronous batches, one after the other."""
        begin = time.perf_counter()
        for first in range(0, len(self.here), _BATCH):
            batch = slice(first, first + _BATCH)
            status = self.engine.batch_transfer_sync_write(
                self.session, self.here[batch], self.there[batch], self.sizes[batch]
            )
            if status != 0:
                raise RuntimeError(f"batch_transfer_sync_write returned {status}")
        return time.perf_counter() - begin

    def sum(self) -> int:
        """Of the buffer as 64-bit words: independent of their order."""
        return int(self.buffer.view(np.uint64).sum(dtype=np.uint64))

    def _start(self, host: str, buffer: np.ndarray) -> None:
        status = self.engine.initialize(host, "P2PHANDSHAKE", "tcp", "")
        if status != 0:
            raise RuntimeError(f"initialize returned {status}")
        self.buffer = buffer
        status = self.engine.register_memory(buffer.ctypes.data, buffer.nbytes)
        if status != 0:
            raise RuntimeError(f"register_memory returned {status}")


if __name__ == "__main__":
    lines.serve(Mooncake())
