"""Capability records: what each backend of an operator can do, and the choice among them."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from kvlink._arguments import wrong
from kvlink.errors import Unsupported

FLOATS = frozenset({"float32", "float16", "bfloat16"})
STORED = FLOATS | {"float8_e4m3", "float8_e5m2", "int8"}
# Triton's own switch: its interpreter runs kernels on the CPU, and on nothing else.
TRITON_DEVICES = frozenset({"cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"})
_DEVICES = {1: "cpu", 2: "cuda", 3: "cpu", 13: "cuda"}  # DLPack's device types


# Of features that are no argument of a call.
_MEANING = {
    "any_head_dim": " (head_dim that is no multiple of 16, or above 256; latent: 576 / 512)",
    "large_head_dim": " (head_dim above 576, or head_dim_v above 512)",
    "any_strides": " (rows whose elements are not contiguous)",
    "scaled_floats": " (float pages with scales)",
    "mixed_dtypes": " (q of another dtype than K and V)",
}


@dataclass(frozen=True)
class Capabilities:
    """What one backend does. `automatic`: "auto" may pick it; `packages`: what it imports."""

    name: str
    devices: frozenset[str]
    q_dtypes: frozenset[str]
    kv_dtypes: frozenset[str]
    features: frozenset[str]
    automatic: bool = True
    packages: tuple[str, ...] = ()

    def meant(self, wanted: str) -> bool:
        """By `backend=wanted`."""
        return wanted == self.name or (wanted == "auto" and self.automatic)

    def able(self, device: str, q_dtype: str, kv_dtype: str, features: frozenset[str]) -> bool:
        """Nothing is missing."""
        return (
            device in self.devices
            and q_dtype in self.q_dtypes
            and kv_dtype in self.kv_dtypes
            and features <= self.features
            and all(map(_importable, self.packages))
        )

    def missing(
        self, device: str, q_dtype: str, kv_dtype: str, features: Iterable[str], of: str = "q"
    ) -> list[str]:
        """What a call needs and this backend lacks, in words."""
        lacks = [
            f"feature {name!r}{_MEANING.get(name, '')}"
            for name in features
            if name not in self.features
        ]
        lacks += [f"package {name!r}" for name in self.packages if not _importable(name)]
        for what, value, supported in (
            ("device", device, self.devices),
            (f"{of} dtype", q_dtype, self.q_dtypes),
            ("KV dtype", kv_dtype, self.kv_dtypes),
        ):
            if value not in supported:
                lacks.append(f"{what} {value} (it has {', '.join(sorted(supported))})")
        return lacks


def attention_features(layout: Any, q_dtype: str) -> dict[str, bool]:
    """Features that attention over a KVLayout needs, or not, by name."""
    dims = {layout.head_dim, layout.head_dim_v}
    return {
        "latent": layout.form == "latent",
        "mixed_dtypes": layout.dtype != q_dtype,
        "any_head_dim": any(dim % 16 for dim in dims)
        or (
            (layout.head_dim > 576 or layout.head_dim_v > 512)
            if layout.form == "latent"
            else max(dims) > 256
        ),
        "large_head_dim": layout.head_dim > 576 or layout.head_dim_v > 512,
        "any_strides": layout.k.stride_dim != 1
        or (layout.has_v_plane and layout.v.stride_dim != 1),
        "scaled_floats": layout.dtype in FLOATS and layout.scale != "none",
    }


TRITON_PACKAGES = ("torch", "triton")


def _importable(package: str) -> bool:
    if package in sys.modules:
        return sys.modules[package] is not None
    return _found(package)


@functools.lru_cache
def _found(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


class Choice(NamedTuple):
    """The backend taken, and the reason."""

    name: str
    why: str


def choose_name(
    backends: Sequence[Capabilities],
    wanted: str,
    device: tuple[int, int],
    q_dtype: str,
    kv_dtype: str,
    features: Iterable[str] = (),
    of: str = "q",
) -> str:
    """The name that `choose` gives, without the reason: operators need no more, call by call."""
    features = tuple(features)
    device_name, needed = _DEVICES.get(device[0], ""), frozenset(features)
    for backend in backends:
        if backend.meant(wanted) and backend.able(device_name, q_dtype, kv_dtype, needed):
            return backend.name
    return choose(backends, wanted, device, q_dtype, kv_dtype, features, of).name


def choose(
    backends: Sequence[Capabilities],
    wanted: str,
    device: tuple[int, int],
    q_dtype: str,
    kv_dtype: str,
    features: Iterable[str] = (),
    of: str = "q",
) -> Choice:
    """The first automatic backend that can, or the one that is `wanted`. `of`: whose `q_dtype` is.

    Raises InvalidArgument (no backend of that name), Unsupported (what is missing, by backend).
    """
    names = [backend.name for backend in backends]
    if not isinstance(wanted, str) or wanted not in ("auto", *names):
        raise wrong("backend", f"auto or one of {', '.join(names)}", wanted)
    device_name = _DEVICES.get(device[0], f"DLPack device type {device[0]}")
    features = tuple(features)
    refusals: list[str] = []
    for backend in backends:
        if not backend.meant(wanted):
            continue
        lacks = backend.missing(device_name, q_dtype, kv_dtype, features, of)
        if not lacks:
            if wanted == backend.name:
                return Choice(backend.name, "asked for")
            others = "".join(f"; {refusal}" for refusal in refusals)
            return Choice(backend.name, f"first that supports the call on {device_name}{others}")
        refusals.append(f"{backend.name} lacks {', '.join(lacks)}")
    raise Unsupported(f"no backend supports this call: {'; '.join(refusals)}")
