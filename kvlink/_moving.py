"""Moving and digesting rows by the backend that is chosen: what stands behind `relayout_pages`."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

from kvlink import _C
from kvlink._cuda_part import cuda_ops, on_cuda, stream_of
from kvlink.backends import STORED, TRITON_DEVICES, TRITON_PACKAGES, Capabilities, choose_name
from kvlink.errors import Unsupported
from kvlink.pool import KVPool

_ALL = STORED | {"uint8"}
_NONE: frozenset[str] = frozenset()
_CPU, _CUDA = frozenset({"cpu"}), frozenset({"cuda"})

# In order of preference.
RELAYOUT_BACKENDS = (
    Capabilities("cpu", _CPU, _ALL, _ALL, _NONE),
    Capabilities(
        "cuda",
        _CUDA,
        _ALL,
        _ALL,
        frozenset({"digest_into", "ready_counters"}),
        packages=("kvlink._cuda",),
    ),
    Capabilities("triton", TRITON_DEVICES, _ALL, _ALL, _NONE, packages=TRITON_PACKAGES),
    Capabilities("reference", _CPU, _ALL, _ALL, _NONE, automatic=False),
)


class DeviceOptions(NamedTuple):
    """What is for devices: where a digest goes, what is waited for, what is raised."""

    digest_into: Any = None
    ready: Any = None
    ready_timeout: float = 1.0
    raises: Any = None

    def features(self) -> list[str]:
        """What a backend must have for them."""
        counted = (self.ready is not None and len(self.ready)) or (
            self.raises is not None and len(self.raises)
        )
        given = (("digest_into", self.digest_into is not None), ("ready_counters", counted))
        return [name for name, needed in given if needed]

    def arguments(self) -> dict[str, Any]:
        """As kvlink._cuda takes them."""
        given: dict[str, Any] = {"ready": list(self.ready or [])}
        given |= {"digest_into": self.digest_into, "ready_timeout": self.ready_timeout}
        return given if self.raises is None else given | {"raises": list(self.raises)}


class RelayoutResult(NamedTuple):
    """What was moved: rows (one KV head of one token in K or V of one layer) and their digest.

    Digests are 64-bit sums over rows: add up parts modulo 2**64, in any order. 0 if not asked for.
    """

    rows: int
    digest: int


def move_rows(
    src_pool: KVPool,
    src_pages: Any,
    dst_pool: KVPool,
    dst_pages: Any,
    backend: str,
    stream: int | None,
    on_device: DeviceOptions,
    **run: Any,
) -> RelayoutResult:
    """`run`: which layers, heads and tokens, as `_C.relayout_pages` takes them."""
    if src_pool.device != dst_pool.device and (
        on_cuda(src_pool.device) or on_cuda(dst_pool.device)
    ):
        raise Unsupported(
            "relayout_pages: both pools on one device; got DLPack devices "
            f"{src_pool.device} and {dst_pool.device}"
        )
    name = _chosen(dst_pool, backend, src_pool.layout.dtype, on_device.features())
    if name == "cuda":
        result = cuda_ops().relayout_pages(
            src=src_pool.view, src_pages=src_pages, dst=dst_pool.view, dst_pages=dst_pages,
            stream=stream_of(dst_pool.device, stream), **on_device.arguments(), **run,
        )  # fmt: skip
    elif name == "triton":
        result = _triton_ops().move_rows(
            src_pool, src_pages, dst_pool, dst_pages, stream=stream, **run
        )
    elif name == "reference":
        result = _by_definition().move_rows(src_pool, src_pages, dst_pool, dst_pages, **run)
    else:
        result = _C.relayout_pages(
            src=src_pool.view, src_pages=_C.PageIds(src_pages, "src_pages"),
            dst=dst_pool.view, dst_pages=_C.PageIds(dst_pages, "dst_pages"), **run,
        )  # fmt: skip
    return RelayoutResult(*result)


def digest_rows(
    pool: KVPool,
    pages: Any,
    backend: str,
    stream: int | None,
    on_device: DeviceOptions,
    **run: Any,
) -> RelayoutResult:
    """`run`: which layers, heads and tokens, as `_C.digest_pages` takes them."""
    name = _chosen(pool, backend, pool.layout.dtype, on_device.features())
    if name == "cuda":
        result = cuda_ops().digest_pages(
            pool=pool.view, pages=pages, stream=stream_of(pool.device, stream),
            **on_device.arguments(), **run,
        )  # fmt: skip
    elif name == "triton":
        result = _triton_ops().digest_rows(pool, pages, stream=stream, **run)
    elif name == "reference":
        result = _by_definition().digest_rows(pool, pages, **run)
    else:
        result = _C.digest_pages(pool=pool.view, pages=_C.PageIds(pages, "pages"), **run)
    return RelayoutResult(*result)


def _chosen(pool: KVPool, backend: str, src_dtype: str, features: list[str]) -> str:
    if backend == "auto" and not features and not on_cuda(pool.device):
        return "cpu"
    dtypes = src_dtype, pool.layout.dtype
    return choose_name(RELAYOUT_BACKENDS, backend, pool.device, *dtypes, features)


def _triton_ops() -> Any:
    return importlib.import_module("kvlink.triton.relayout_pages")


def _by_definition() -> Any:
    return importlib.import_module("kvlink.reference.relayout_pages")
