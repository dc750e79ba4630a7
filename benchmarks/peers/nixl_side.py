"""One side of NIXL's WRITE of scattered pieces, through its UCX backend (see lines.py).

Runs in an environment that has the `nixl` wheels; kvlink is not imported.
"""

from __future__ import annotations

import os
import time

import lines
import numpy as np
from nixl import nixl_agent, nixl_agent_config


class Nixl:
    """Both roles: the target lends a buffer, the initiator writes into it."""

    def __init__(self) -> None:
        self.agent = nixl_agent(f"side-{os.getpid()}", nixl_agent_config(backends=["UCX"]))

    def expose(self, num_bytes: int) -> list[object]:
        """Target: registers a buffer of zeros; [metadata, address]."""
        self._register(np.zeros(num_bytes, np.uint8))
        return [self.agent.get_agent_metadata().hex(), self.buffer.ctypes.data]

    def attach(self, num_bytes: int, metadata: str, address: int) -> int:
        """Initiator: a buffer of random bytes; their sum, as the target must find it."""
        self._register(np.random.default_rng(1).integers(0, 255, num_bytes, np.uint8))
        name = self.agent.add_remote_agent(bytes.fromhex(metadata))
        self.peer = name if isinstance(name, str) else name.decode()
        self.address = address
        return self.sum()

    def prepare(self, piece_bytes: int) -> None:
        """Initiator: descriptors of all pieces, in one order here and in another one there."""
        num_pieces = self.buffer.nbytes // piece_bytes
        indices = np.arange(num_pieces, dtype=np.int32)
        handles = [
            self.agent.prep_xfer_dlist(
                name, self._descriptors(address, piece_bytes, num_pieces, seed), mem_type="DRAM"
            )
            for name, address, seed in (
                ("NIXL_INIT_AGENT", self.buffer.ctypes.data, 1),
                (self.peer, self.address, 2),
            )
        ]
        self.transfer = self.agent.make_prepped_xfer(
            "WRITE", handles[0], indices, handles[1], indices
        )

    def write(self) -> float:
        """Initiator: seconds from posting the prepared transfer until it is DONE."""
        begin = time.perf_counter()
        state = self.agent.transfer(self.transfer)
        while state == "PROC":
            state = self.agent.check_xfer_state(self.transfer)
        if state != "DONE":
            raise RuntimeError(f"the transfer ended as {state}")
        return time.perf_counter() - begin

    def sum(self) -> int:
        """Of the buffer as 64-bit words: independent of their order."""
        return int(self.buffer.view(np.uint64).sum(dtype=np.uint64))

    def _register(self, buffer: np.ndarray) -> None:
        self.buffer = buffer
        address = buffer.ctypes.data
        self.agent.register_memory([(address, buffer.nbytes, 0, "")], "DRAM")

    @staticmethod
    def _descriptors(base: int, piece_bytes: int, num_pieces: int, seed: int) -> np.ndarray:
        found = np.zeros((num_pieces, 3), np.uint64)
        order = np.array(lines.scattered(num_pieces, seed), np.uint64)
        found[:, 0] = np.uint64(base) + order * np.uint64(piece_bytes)
        found[:, 1] = piece_bytes
        return found


if __name__ == "__main__":
    lines.serve(Nixl())
