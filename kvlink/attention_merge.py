"""`merge_states`: joins attention over disjoint sets of positions."""

from __future__ import annotations

from typing import Any

from kvlink import _C
from kvlink._arguments import array, checked, integer, optional, text, wrong
from kvlink._arrays import as_reference, device_of, dtype_of, empty_like, from_reference
from kvlink._cuda_part import cuda_ops, stream_of
from kvlink.backends import FLOATS, TRITON_DEVICES, TRITON_PACKAGES, Capabilities, choose_name
from kvlink.errors import InvalidArgument, Unsupported

# In order of preference.
MERGE_BACKENDS = (
    Capabilities("cpu", frozenset({"cpu"}), FLOATS, FLOATS, frozenset()),
    Capabilities(
        "cuda", frozenset({"cuda"}), FLOATS, FLOATS, frozenset(), packages=("kvlink._cuda",)
    ),
    Capabilities("triton", TRITON_DEVICES, FLOATS, FLOATS, frozenset(), packages=TRITON_PACKAGES),
    Capabilities("reference", frozenset({"cpu"}), FLOATS, FLOATS, frozenset(), automatic=False),
)


# What the arrays of two states are called there; further on they are those of a list.
_NAMES = {"outs[0]": "out_a", "lses[0]": "lse_a", "outs[1]": "out_b", "lses[1]": "lse_b"}


@checked(backend=text, stream=optional(integer))
def merge_states(
    out_a: Any,
    lse_a: Any,
    out_b: Any = None,
    lse_b: Any = None,
    *,
    backend: str = "auto",
    stream: int | None = None,
) -> tuple[Any, Any]:
    """Joins attention results over disjoint sets of positions into the result over all of them.

    Two states: `merge_states(out_a, lse_a, out_b, lse_b)`; many: `merge_states(outs, lses)` with
    lists. Each out is [T, H, D] float32, float16 or bfloat16, each lse float32 [T, H] (natural
    log), all contiguous. Returns (out, lse) in the dtype and library of the first out. The same
    states in the same order give the same bits. A state whose lse is -inf has seen nothing and is
    not read. Give sinks to one of the partial calls only. `backend` is "auto" or the name of one in
    MERGE_BACKENDS; those of devices queue the work on `stream`, as `append_kv` does; "triton" takes
    up to 64 states. Raises InvalidArgument, Unsupported.
    """
    if out_b is None and lse_b is None:
        return _merged(_listed("outs", out_a), _listed("lses", lse_a), backend, stream)
    try:
        return _merged([out_a, out_b], [lse_a, lse_b], backend, stream)
    except (InvalidArgument, Unsupported) as error:
        message = str(error)
        for listed, name in _NAMES.items():
            message = message.replace(listed, name)
        raise type(error)(message) from None


def _listed(name: str, states: Any) -> list[Any]:
    """The arrays of a list, or of the first axis of an array."""
    if isinstance(states, str | bytes | dict):
        raise wrong(name, "a list of arrays", states)
    try:
        listed = list(states)
    except TypeError:
        raise wrong(name, "a list of arrays", states) from None
    if not listed:
        raise InvalidArgument(f"{name}: expected at least one state; got none")
    return listed


def _merged(outs: list[Any], lses: list[Any], backend: str, stream: int | None) -> tuple[Any, Any]:
    array("outs[0]", outs[0])
    shape = tuple(outs[0].shape)
    out = empty_like(outs[0], shape, name="outs[0]")
    lse = empty_like(outs[0], shape[:2], "float32", name="outs[0]")
    device, dtype = device_of(outs[0], "outs[0]"), dtype_of(outs[0], "outs[0]")
    chosen = choose_name(MERGE_BACKENDS, backend, device, dtype, dtype, of="outs[0]")
    if chosen == "triton":
        import kvlink.triton

        kvlink.triton.merge_states(outs, lses, into=(out, lse), stream=stream)
    elif chosen == "reference":
        from kvlink.reference.merge_states import merge_states as reference

        merged = reference(
            [as_reference(part) for part in outs], [as_reference(part) for part in lses]
        )
        from_reference(merged[0], out)
        from_reference(merged[1], lse)
    elif chosen == "cuda":
        cuda_ops().merge_states(outs, lses, out, lse, stream=stream_of(device, stream))
    else:
        _C.merge_states(outs, lses, out, lse)
    return out, lse
