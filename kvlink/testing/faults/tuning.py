"""Shorter bounds, so that a thousand faults fit into minutes; and the hooks for frames.

Where a fault makes somebody wait in vain, the library's own bounds would do nothing but pass.
Where nobody may wait in vain, they are generous: a loaded machine is not a fault.
"""

from __future__ import annotations

import os

from kvlink.testing.faults import frames
from kvlink.transfer import accepting
from kvlink.transfer.paths import ucx

SHORT, LONG = 0.5, 30.0  # s


def tune() -> None:
    """For a process of the campaign, before its endpoint is made."""
    os.environ.setdefault("UCX_LOG_LEVEL", "fatal")  # a peer that dies is what we are here for
    frames.install()
    be_patient(True)


def be_patient(patient: bool) -> None:
    """How long this process waits for handshakes and for the begin of transfers over ucx."""
    accepting._HANDSHAKE_TIMEOUT = LONG if patient else SHORT
    ucx._BEGIN_TIMEOUT_NS = int(accepting._HANDSHAKE_TIMEOUT * 1e9)
