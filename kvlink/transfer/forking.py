"""Endpoints at the end of their process, and in a forked child of it.

Slots and pages lie in shared memory and the threads stay behind, so a child that went on with
them would change the parent's transfers, or wait for nobody. In the child everything that an
endpoint made is cut off from them, never destroyed, and its connections are closed.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import weakref
from typing import TYPE_CHECKING, Any

from kvlink.transfer.errors import LinkClosed

if TYPE_CHECKING:
    from kvlink.transfer.endpoint import Endpoint

live: weakref.WeakSet[Endpoint] = weakref.WeakSet()
WHY = "made before a fork, so it is the parent process's; start processes with `spawn`"


class _Parents:
    """Stands for something of the parent's: whatever is asked of it raises LinkClosed."""

    def __getattr__(self, name: str) -> Any:
        raise LinkClosed(WHY)


PARENTS: Any = _Parents()


def keep(*things: Any) -> None:
    """They are never destroyed in this process, not at its end either: their destructors would
    wait for threads that are not here."""
    for thing in things:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


@atexit.register
def _close_all() -> None:
    """Workers must not outlive the interpreter."""
    for endpoint in list(live):
        endpoint.close(timeout=0.2)


def _leave_all() -> None:
    for endpoint in list(live):
        endpoint.leave()
    live.clear()


os.register_at_fork(after_in_child=_leave_all)
