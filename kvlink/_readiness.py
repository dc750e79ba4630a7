"""What `ready=` may be: Readiness objects, or counters that a device waits for."""

from __future__ import annotations

from typing import Any

from kvlink import _C
from kvlink._arguments import counter, each, wrong


def ready_feature(ready: Any) -> str:
    """What a backend must have to wait for `ready`."""
    items = ready if isinstance(ready, list | tuple) else []
    return "ready_counters" if items and isinstance(items[0], tuple) else "ready"


def waitable(name: str, value: Any) -> None:
    """A check of `ready`: Readiness objects, or counters."""
    listed = [value] if isinstance(value, _C.Readiness) else value
    each(_counter_or_readiness)(name, listed)


def _counter_or_readiness(name: str, value: Any) -> None:
    if not isinstance(value, _C.Readiness):
        counter(name, value)


def ready_items(ready: Any) -> list[_C.Readiness]:
    """The objects, of one or several. Raises InvalidArgument."""
    if ready is None:
        return []
    if isinstance(ready, _C.Readiness):
        return [ready]
    try:
        items = list(ready)
    except TypeError:
        raise wrong("ready", "Readiness objects", ready) from None
    for item in items:
        if not isinstance(item, _C.Readiness):
            raise wrong("ready", "Readiness objects", item)
    return items
