"""What numbers of a caller may be: those of Python and those of numpy."""

import time
from numbers import Integral, Real

from kvlink.errors import InvalidArgument

_LONGEST = 1e9  # s


def is_integer(value: object) -> bool:
    """An int, or numpy's."""
    return isinstance(value, Integral)


def is_number(value: object) -> bool:
    """An int or a float, or numpy's."""
    return isinstance(value, Real)


def wait_end(timeout: float, name: str = "timeout") -> float:
    """When a wait of so many seconds ends (time.monotonic): now, if there are none. Raises
    InvalidArgument."""
    if not is_number(timeout) or not timeout <= _LONGEST:
        raise InvalidArgument(f"{name}: expected seconds, at most {_LONGEST:g}; got {timeout!r}")
    return time.monotonic() + max(0.0, timeout)
