"""How far a result may be from the float32 reference, and why.

Operators accumulate in float32 and round once, to the result's dtype. Two correct implementations
then differ by at most one unit in the last place of that dtype (`torch.finfo(dtype).eps` times the
value: both may round to either side of a tie), plus what float32 accumulation in another order
costs. That cost, for values of magnitude about 1 over thousands of positions, is a few 1e-6; scores
of magnitude 100 add 100 * 2**-24 = 6e-6. 2e-5 leaves a factor of two, and nothing for a wrong mask,
scale or position, each of which costs 1e-2 and more. The cosine catches small errors that all lean
the same way.
"""

from __future__ import annotations

import torch

FLOAT32_ERROR = 2e-5
# 1 - cosine: rounding errors are independent, so it is about eps**2 / 24; 8 times that is allowed.
COSINE_ERROR = {
    torch.float32: 1e-9,
    torch.float16: torch.finfo(torch.float16).eps ** 2 / 3,
    torch.bfloat16: torch.finfo(torch.bfloat16).eps ** 2 / 3,
}


def assert_close(
    actual: torch.Tensor,
    expected: torch.Tensor,
    what: str = "out",
    slack: torch.Tensor | None = None,
) -> None:
    """Absolute, relative and cosine comparison; NaN, inf and dtype must agree exactly.

    `slack`, of expected's shape: how much further off each element may be, where an operator rounds
    on the way and the bound of what that costs is known.

    Raises AssertionError naming `what`, the worst element and by how much.
    """
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {actual.shape}, expected {expected.shape}"
    finite = expected.isfinite()
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    assert bool(same[~finite].all()), f"{what}: expected NaN or inf where there is none"
    got, wanted = actual[finite].double(), expected[finite].double()
    if not got.numel():
        return
    assert bool(got.isfinite().all()), f"{what}: NaN or inf where a number is expected"
    relative = max(torch.finfo(expected.dtype).eps, FLOAT32_ERROR)
    excess = (got - wanted).abs() - relative * wanted.abs() - FLOAT32_ERROR
    if slack is not None:
        excess -= slack[finite].double()
    worst = int(excess.argmax())
    assert excess[worst] <= 0, f"{what}: {got[worst]} where {wanted[worst]} is expected"
    norms = float(got.norm() * wanted.norm())
    if norms > 0 and got.numel() >= 64:
        error = 1 - float(got @ wanted) / norms
        assert error <= COSINE_ERROR[expected.dtype], f"{what}: cosine is 1 - {error}"


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor, what: str = "out") -> None:
    """Equal bit for bit, so that two NaNs of the same bits are equal, too."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    bits = {2: torch.int16, 4: torch.int32}[expected.element_size()]
    same = actual.contiguous().view(bits) == expected.contiguous().view(bits)
    assert bool(same.all()), f"{what}: {int((~same).sum())} of {same.numel()} elements differ"
