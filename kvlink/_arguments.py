"""What arguments of callers may be, for the whole package: checks of types and of ranges.

A check takes a name and a value and raises InvalidArgument: name, what was expected, what came.
"""

from __future__ import annotations

import functools
import inspect
import operator
import time
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

from kvlink.errors import InvalidArgument, KVLinkError

P = ParamSpec("P")
R = TypeVar("R")
Check = Callable[[str, Any], Any]
_TEXTS = (str, bytes, bytearray)
_FLAGS = ("bool", "bool_")  # names of types, numpy's too
_LONGEST = 120  # characters of a value in a message
_LONGEST_WAIT = 1e9  # s
_INT32_MAX, _INT64_MAX = 2**31 - 1, 2**63 - 1
# What Python, numpy and the bindings raise where an argument is of a wrong type.
UNEXPLAINED = (
    TypeError, AttributeError, ValueError, LookupError, ArithmeticError, RuntimeError, BufferError,
)  # fmt: skip


def shown(value: Any) -> str:
    """A value as messages have it."""
    text = " ".join(repr(value).split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def wrong(name: str, expected: str, value: Any) -> InvalidArgument:
    """The error, to be raised."""
    return InvalidArgument(f"{name}: expected {expected}; got {shown(value)}")


def index_of(value: Any) -> int | None:
    """An integer of Python, numpy or torch as an int; None for anything else, and for bool."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except (TypeError, RuntimeError):
        return None


def number_of(value: Any) -> float | None:
    """A real number of Python, numpy or torch as a float; None for anything else, and for bool."""
    try:
        if type(value).__name__ in _FLAGS or getattr(value, "ndim", 0) != 0:
            return None
        return float(operator.truediv(value, 1))
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None


def integer(name: str, value: Any, low: int = -_INT64_MAX - 1, high: int = _INT64_MAX) -> int:
    """An integer in [low, high]."""
    number = index_of(value)
    if number is None or not low <= number <= high:
        if high < _INT32_MAX:
            expected = f"{low} to {high}"
        elif number is not None and number > high:
            power = (high + 1).bit_length() - 1
            expected = f"at most 2^{power} - 1" if high + 1 == 1 << power else f"at most {high}"
        elif low < -_INT32_MAX:
            expected = "an integer"
        else:
            expected = "a positive integer" if low == 1 else f"an integer >= {low}"
        raise wrong(name, expected, value)
    return number


def positive(**values: Any) -> list[int]:
    """Integers in [1, 2^31 - 1], as plain ones."""
    return [integer(name, value, 1, _INT32_MAX) for name, value in values.items()]


def integers(name: str, value: Any) -> list[int]:
    """Integers, of a sequence, an array or another iterable."""
    try:
        found = [None] if isinstance(value, _TEXTS) else [index_of(item) for item in value]
    except (TypeError, RuntimeError):
        found = [None]
    numbers = [item for item in found if item is not None and -_INT64_MAX <= item <= _INT64_MAX]
    if len(numbers) != len(found):
        raise wrong(name, "integers", value)
    return numbers


def number(name: str, value: Any) -> float:
    """A real number."""
    found = number_of(value)
    if found is None:
        raise wrong(name, "a number", value)
    return found


def wait_end(timeout: Any, name: str = "timeout") -> float:
    """When a wait of so many seconds ends (time.monotonic): now, if there are none."""
    seconds = number_of(timeout)
    if seconds is None or not seconds <= _LONGEST_WAIT:
        raise wrong(name, f"seconds, at most {_LONGEST_WAIT:g}", timeout)
    return time.monotonic() + max(0.0, seconds)


def flag(name: str, value: Any) -> bool:
    """True or False, Python's or numpy's."""
    if type(value).__name__ not in _FLAGS:
        raise wrong(name, "True or False", value)
    return bool(value)


def one_of(name: str, value: Any, allowed: Sequence[str]) -> str:
    """One of some words."""
    if not isinstance(value, str) or value not in allowed:
        raise wrong(name, "one of " + ", ".join(allowed), value)
    return value


def text(name: str, value: Any) -> None:
    """A str."""
    if not isinstance(value, str):
        raise wrong(name, "text", value)


def function(name: str, value: Any) -> None:
    """Something to call."""
    if not callable(value):
        raise wrong(name, "a function", value)


def name_text(name: str, value: Any) -> str:
    """A name: 1 to 255 bytes of UTF-8."""
    try:
        if isinstance(value, str) and 1 <= len(value.encode()) <= 255:
            return value
    except UnicodeEncodeError:
        pass
    raise wrong(name, "1 to 255 bytes of text", value)


def a(kind: type) -> Check:
    """An object of a class."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, kind):
            raise wrong(name, f"a {kind.__name__}", value)

    return check


def array(name: str, value: Any) -> None:
    """An array of any DLPack library."""
    if not hasattr(value, "__dlpack__"):
        raise wrong(name, "an array with __dlpack__ (torch, numpy, cupy, ...)", value)


def array_or_integers(name: str, value: Any) -> None:
    """An array of any DLPack library, or (nested) sequences of integers."""
    if isinstance(value, list | tuple | range) and value and isinstance(value[0], list | tuple):
        for row in value:
            array_or_integers(name, row)
    elif not hasattr(value, "__len__") or getattr(value, "ndim", 1) == 0:
        raise wrong(name, "integers, in an array or a list", value)
    elif not hasattr(value, "__dlpack__"):
        integers(name, value)


def integer_or_integers(name: str, value: Any) -> None:
    """One or several."""
    if index_of(value) is None:
        integers(name, value)
    else:
        integer(name, value)


def within(low: int, high: int) -> Check:
    """An integer in [low, high]."""
    return lambda name, value: integer(name, value, low, high)


def each(check: Check) -> Check:
    """A list or tuple of what a check takes."""

    def check_each(name: str, value: Any) -> None:
        if not isinstance(value, list | tuple):
            raise wrong(name, "a list", value)
        for i, item in enumerate(value):
            check(f"{name}[{i}]", item)

    return check_each


def counter(name: str, value: Any) -> None:
    """What a device waits for: a pair of an array and an integer."""
    if not isinstance(value, tuple) or len(value) != 2:
        raise wrong(name, "(counter, target)", value)
    array(f"counter of {name}", value[0])
    integer(f"target of {name}", value[1])


def optional(check: Check) -> Check:
    """None, too."""
    return lambda name, value: None if value is None else check(name, value)


def checked(**checks: Check) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Has a function say which of its arguments is wrong where Python or the bindings would only
    say that one is. The checks run then, never before, so that good calls cost no more."""

    def decorate(body: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(body)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return body(*args, **kwargs)
            except UNEXPLAINED as error:
                try:
                    given = inspect.signature(body).bind(*args, **kwargs).arguments
                except TypeError:
                    given = {}  # arguments are missing, or unknown: Python says which
                explain(error, checks, given)
                raise

        return call

    return decorate


def explain(error: Exception, checks: dict[str, Check], given: dict[str, Any]) -> None:
    """Raises InvalidArgument for the first given argument that a check refuses, unless `error` says
    already what is wrong. `checked` calls it, and so do functions for which a call more is much."""
    if isinstance(error, KVLinkError):
        return
    for name, check in checks.items():
        try:
            if name in given:
                check(name, given[name])
        except InvalidArgument as named:
            raise named from None
