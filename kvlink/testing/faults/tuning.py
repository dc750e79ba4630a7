"""Shorter bounds, so that a thousand faults fit into minutes; and the hooks for frames."""

from __future__ import annotations

import os

from kvlink.testing.faults import frames
from kvlink.transfer import accepting
from kvlink.transfer.paths import ucx

HANDSHAKE_TIMEOUT = 0.5  # s


def tune() -> None:
    """For a process of the campaign, before its endpoint is made."""
    os.environ.setdefault("UCX_LOG_LEVEL", "fatal")  # a peer that dies is what we are here for
    accepting._HANDSHAKE_TIMEOUT = HANDSHAKE_TIMEOUT
    ucx._BEGIN_TIMEOUT_NS = int(HANDSHAKE_TIMEOUT * 1e9)
    frames.install()
