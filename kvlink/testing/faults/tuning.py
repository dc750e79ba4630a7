"""Shorter bounds, so that a thousand faults fit into minutes; and the hooks for frames."""

from __future__ import annotations

from typing import Any

from kvlink.testing.faults import frames
from kvlink.transfer import accepting, remote

HANDSHAKE_TIMEOUT = 0.5  # s


def tune(options: dict[str, Any] | None = None) -> None:
    """For a process of the campaign, before its endpoint is made."""
    accepting._HANDSHAKE_TIMEOUT = HANDSHAKE_TIMEOUT
    remote._REGION_WAIT = HANDSHAKE_TIMEOUT
    frames.install()
