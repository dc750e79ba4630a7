"""What `ready=` may be: Readiness objects, or counters that a device waits for."""

from __future__ import annotations

from typing import Any

from kvlink import _C
from kvlink.errors import InvalidArgument


def ready_feature(ready: Any) -> str:
    """What a backend must have to wait for `ready`."""
    items = ready if isinstance(ready, list | tuple) else []
    return "ready_counters" if items and isinstance(items[0], tuple) else "ready"


def ready_items(ready: Any) -> list[_C.Readiness]:
    """The objects, of one or several. Raises InvalidArgument."""
    items = [] if ready is None else [ready] if isinstance(ready, _C.Readiness) else list(ready)
    for item in items:
        if not isinstance(item, _C.Readiness):
            raise InvalidArgument(f"ready: expected Readiness objects; got {item!r}")
    return items
