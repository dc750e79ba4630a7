"""What tests wait for and users need not know."""

from __future__ import annotations

import time

from kvlink.transfer import Transfer


def wait_outside(transfer: Transfer, timeout: float) -> None:
    """Until what was pushed so far is moved and the peer's pages are left."""
    end = time.monotonic() + timeout
    while True:
        raw = transfer._moving.progress()
        # A layer is done a moment before its pages are left.
        if not raw["num_moving"] and all(done or not posted for posted, _, done in raw["parts"]):
            return
        assert time.monotonic() < end, "the worker is still inside"
        time.sleep(0.001)
