"""`Rope`: a rotary embedding as a table of cosines and sines; `apply_rope` turns queries by it."""

from __future__ import annotations

from typing import Any, NamedTuple

from kvlink import _C
from kvlink._arguments import Check, a, array, checked, flag, integer, number, optional, text, wrong
from kvlink._arrays import as_reference, device_of, dtype_of, empty_like, from_reference
from kvlink._cuda_part import cuda_ops, stream_of
from kvlink.backends import FLOATS, TRITON_DEVICES, TRITON_PACKAGES, Capabilities, choose_name
from kvlink.errors import Unsupported

_NONE: frozenset[str] = frozenset()

# In order of preference.
ROPE_BACKENDS = (
    Capabilities("cpu", frozenset({"cpu"}), FLOATS, FLOATS, _NONE),
    Capabilities("cuda", frozenset({"cuda"}), FLOATS, FLOATS, _NONE, packages=("kvlink._cuda",)),
    Capabilities("triton", TRITON_DEVICES, FLOATS, FLOATS, _NONE, packages=TRITON_PACKAGES),
    Capabilities("reference", frozenset({"cpu"}), FLOATS, FLOATS, _NONE, automatic=False),
)


_FIELDS: dict[str, Check] = {
    "cos_sin": array,
    "positions": array,
    "interleaved": flag,
    "first_dim": integer,
}


class Rope(NamedTuple):
    """The angles by which pairs of a head's dims turn, token by token.

    `cos_sin`: float32 [num_positions, rotary_dim], in each row the cosines of the rotary_dim / 2
    pairs, then their sines, whatever frequencies and factors they come from (`rope_table` makes a
    plain one). `positions`: int64 [num_tokens], the row of each token. Turned are the dims from
    `first_dim` on, rotary_dim of them (partial rotary; the tail of a latent row); pair i is dims i
    and i + rotary_dim / 2 of these or, `interleaved`, dims 2 i and 2 i + 1: (a, b) becomes
    (a cos - b sin, b cos + a sin), each product and the sum rounded to float32.
    """

    cos_sin: Any
    positions: Any
    interleaved: bool = False
    first_dim: int = 0


def rope_table(inv_freq: Any, num_positions: int, factor: float = 1.0) -> Any:
    """`cos_sin` of positions 0 to num_positions - 1: numpy float32 [num_positions, 2 * pairs].

    `inv_freq` [pairs]: radians per position. `factor` multiplies cosines and sines (YaRN).
    """
    import numpy as np

    try:
        frequencies = np.asarray(inv_freq, dtype=np.float32)
    except (TypeError, ValueError, RuntimeError):
        raise wrong("inv_freq", "floats [pairs]", inv_freq) from None
    if frequencies.ndim != 1:
        raise wrong("inv_freq", "floats [pairs]", inv_freq)
    num_positions = integer("num_positions", num_positions, 0)
    number("factor", factor)
    angles = np.arange(num_positions, dtype=np.float32)[:, None] * frequencies
    return np.concatenate((np.cos(angles), np.sin(angles)), axis=1) * np.float32(factor)


def rope_fields(name: str, rope: Any) -> None:
    """A Rope, of fields of the right types; raises InvalidArgument."""
    a(Rope)(name, rope)
    for field, check in _FIELDS.items():
        check(f"{name}.{field}", getattr(rope, field))


@checked(x=array, rope=rope_fields, out=optional(array), backend=text, stream=optional(integer))
def apply_rope(
    x: Any, rope: Rope, out: Any = None, *, backend: str = "auto", stream: int | None = None
) -> Any:
    """Turns `x` [num_tokens, num_heads, head_dim], as `append_kv` turns K, and returns the result.

    `x` is float32, float16 or bfloat16, dim contiguous; computed in float32, rounded once. The
    result is written into `out` if given (it may be `x`), else into a new array of x's library.
    `backend` is "auto" or the name of one in ROPE_BACKENDS. Raises InvalidArgument (shapes, a
    position outside the table; nothing is written then), Unsupported (dtypes). On a CUDA device all
    arrays are on it and the work is queued on `stream` as for `append_kv`; a token whose position
    is outside the table is not written, and raised by a later call.
    """
    dtype, device = dtype_of(x, "x"), device_of(x, "x")
    if dtype not in FLOATS:
        raise Unsupported(f"x: supported dtypes are {', '.join(sorted(FLOATS))}; got {dtype}")
    name = choose_name(ROPE_BACKENDS, backend, device, dtype, dtype)
    if out is None:
        out = empty_like(x, tuple(x.shape), name="x")
    if name == "triton":
        import kvlink.triton

        kvlink.triton.apply_rope(x, rope, out, stream=stream)
    elif name == "cuda":
        cuda_ops().apply_rope(x, out, rope, stream_of(device, stream))
    elif name == "reference":
        from kvlink.reference.rope import apply_rope as reference

        cos_sin, positions = as_reference(rope.cos_sin), as_reference(rope.positions)
        there = rope._replace(cos_sin=cos_sin, positions=positions)
        turned = reference(as_reference(x).float(), there)
        from_reference(turned, out)
    else:
        _C.apply_rope(x, out, rope)
    return out
