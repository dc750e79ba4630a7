"""What numbers of a caller may be: those of Python and those of numpy."""

from numbers import Integral, Real


def is_integer(value: object) -> bool:
    """An int, or numpy's."""
    return isinstance(value, Integral)


def is_number(value: object) -> bool:
    """An int or a float, or numpy's."""
    return isinstance(value, Real)
