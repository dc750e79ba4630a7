"""KVPool.wrap: an engine's own tensors, nothing copied."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from kvlink import KVPool
from kvlink.errors import InvalidArgument

ENGINE_AXES = ["kv page slot head dim", "page kv head slot dim", "page slot kv head dim"]


def k(pool: KVPool, layer: int = 0) -> np.ndarray:
    return np.from_dlpack(pool.k(layer))


def v(pool: KVPool, layer: int = 0) -> np.ndarray:
    return np.from_dlpack(pool.v(layer))


def numbered(shape: list[int], library: str) -> torch.Tensor | np.ndarray:
    count = int(np.prod(shape))
    if library == "torch":
        return torch.arange(count, dtype=torch.float32).reshape(shape)
    return np.arange(count, dtype=np.float32).reshape(shape)


@pytest.mark.parametrize("library", ["torch", "numpy"])
@pytest.mark.parametrize("axes", ENGINE_AXES)
def test_wrapped_tensor_is_not_copied(axes: str, library: str) -> None:
    sizes = {"kv": 2, "page": 3, "slot": 4, "head": 2, "dim": 8}
    names = axes.split()
    tensors = [numbered([sizes[name] for name in names], library) for _ in range(2)]
    pool = KVPool.wrap(tensors, axes)
    canonical = [
        np.asarray(tensor).transpose(
            [names.index(n) for n in ("kv", "page", "slot", "head", "dim")]
        )
        for tensor in tensors
    ]
    for layer in range(2):
        assert (k(pool, layer) == canonical[layer][0]).all()
        assert (v(pool, layer) == canonical[layer][1]).all()
    v(pool, 1)[2, 3, 1, 7] = -1
    assert canonical[1][1, 2, 3, 1, 7] == -1
    assert pool.segment is None
    assert not pool.shared


def test_wrapped_pairs() -> None:
    pairs = [(torch.zeros(3, 4, 2, 8), torch.zeros(3, 4, 2, 6)) for _ in range(2)]
    pool = KVPool.wrap(pairs, "page slot head dim")
    assert (pool.layout.head_dim, pool.layout.head_dim_v) == (8, 6)
    v(pool, 1)[1] = 2
    assert (pairs[1][1][1] == 2).all()
    assert sum(float(t.sum()) for pair in pairs for t in pair) == 2 * 4 * 2 * 6


def test_wrapped_packed_latent_and_headless() -> None:
    packed = torch.zeros(3, 4, 2, 14)
    pool = KVPool.wrap([packed], "page slot head dim", form="packed", head_dim=8)
    v(pool)[...] = 1
    assert (packed[..., 8:] == 1).all()
    assert not packed[..., :8].any()
    latent = torch.zeros(3, 4, 12)
    pool = KVPool.wrap([latent], "page slot dim", form="latent", head_dim_v=8)
    k(pool)[...] = 1
    assert v(pool).shape == (3, 4, 1, 8)
    assert (v(pool) == 1).all()
    assert (latent == 1).all()
    headless = np.zeros((2, 3, 4, 8), np.float16)
    pool = KVPool.wrap([headless], "kv page slot dim")
    v(pool)[2, 1, 0] = 5
    assert headless[1, 2, 1].tolist() == [5] * 8


def test_wrapped_part_of_a_larger_tensor() -> None:
    whole = torch.zeros(2, 6, 4, 4, 16)
    part = whole[:, ::2, :, 1:3, 4:12]
    pool = KVPool.wrap([part], "kv page slot head dim")
    k(pool)[...] = 1
    v(pool)[...] = 2
    assert (part[0] == 1).all()
    assert (part[1] == 2).all()
    assert whole.sum() == part.sum()


def test_wrapped_bytes_with_a_value_type() -> None:
    raw = torch.zeros(2, 3, 4, 2, 8, dtype=torch.uint8)
    pool = KVPool.wrap([raw], "kv page slot head dim", dtype="float8_e4m3")
    assert pool.layout.dtype == "float8_e4m3"
    torch.from_dlpack(pool.k(0))[0, 0, 0, 0] = 1.0
    assert raw[0, 0, 0, 0, 0] == torch.tensor(1.0).to(torch.float8_e4m3fn).view(torch.uint8)
    with pytest.raises(InvalidArgument, match="dtype: float16 does not fit"):
        KVPool.wrap([raw], "kv page slot head dim", dtype="float16")


@pytest.mark.parametrize("scale", ["tensor", "head", "token_head"])
def test_wrapped_scales(scale: str) -> None:
    tensor = np.zeros((2, 3, 4, 2, 8), np.int8)
    shape = {"tensor": [1], "head": [2], "token_head": [3, 4, 2]}[scale]
    scales = (np.full(shape, 0.5, np.float32), np.full(shape, 2, np.float32))
    pool = KVPool.wrap([tensor], "kv page slot head dim", scale=scale, scales=[scales])
    assert (np.from_dlpack(pool.k_scale(0)) == 0.5).all()
    scales[1][...] = 4
    assert np.from_dlpack(pool.v_scale(0)).shape == (3, 4, 2)
    assert (np.from_dlpack(pool.v_scale(0)) == 4).all()
    with pytest.raises(InvalidArgument, match=r"k_scale of tensors\[0\]: expected float32"):
        KVPool.wrap([tensor], "kv page slot head dim", scale=scale, scales=[(tensor, tensor)])
    with pytest.raises(InvalidArgument, match="scales: expected 1 pairs; got 2"):
        KVPool.wrap([tensor], "kv page slot head dim", scale=scale, scales=[scales, scales])


def test_wrapped_layer_map() -> None:
    tensors = [np.zeros((2, 3, 4, 2, 8), np.float32) for _ in range(2)]
    pool = KVPool.wrap(tensors, "kv page slot head dim", layer_map=[1, 0, 1])
    k(pool, 2)[...] = 1
    assert (k(pool, 0) == 1).all()
    assert tensors[0].sum() == 0
    assert (tensors[1][0] == 1).all()
    with pytest.raises(InvalidArgument, match="layer_map"):
        KVPool.wrap(tensors, "kv page slot head dim", layer_map=[0, 1, 2])


def refusals() -> Iterator[tuple[str, object, str, dict[str, object], str]]:
    good = np.zeros((2, 3, 4, 2, 8), np.float32)
    axes = "kv page slot head dim"
    frozen = good.copy()
    frozen.flags.writeable = False
    overlapping = np.lib.stride_tricks.as_strided(np.zeros(99, np.float32), good.shape, [4] * 5)
    yield "no tensors", [], axes, {}, "at least one layer"
    yield "not an array", [3], axes, {}, "__dlpack__"
    yield "read-only", [frozen], axes, {}, "read-?only"
    yield "overlapping", [overlapping], axes, {}, "elements overlap"
    yield "broadcast", [torch.zeros(2, 3, 4, 1, 8).expand(2, 3, 4, 2, 8)], axes, {}, "overlap"
    yield "reversed", [good[:, ::-1]], axes, {}, "positive sizes and strides"
    yield "empty", [good[:, :0]], axes, {}, "positive sizes and strides"
    yield "unknown axis", [good], "kv page slot heads dim", {}, "axes: expected each of"
    yield "repeated axis", [good], "kv page slot dim dim", {}, "axes: expected each of"
    yield "axis missing", [good[0, 0]], "slot head dim", {}, "axes: expected each of"
    yield "too many axes", [good[0]], axes, {}, r"expected 5 axes .*got shape \[3, 4, 2, 8\]"
    yield "kv of 3", [np.zeros((3, 3, 4, 2, 8), np.float32)], axes, {}, "kv axis of size 2; got 3"
    yield "dtype", [good.astype(np.float64)], axes, {}, "dtype: expected one of.*float64"
    yield "plain uint8", [good.astype(np.uint8)], axes, {}, "uint8 is for opaque pages"
    yield "form", [good[0]], "page slot head dim", {"form": "odd"}, "form: expected"
    yield "packed kv", [good], axes, {"form": "packed"}, "form 'packed' has no kv axis"
    yield "latent", [good[0]], "page slot head dim", {"form": "latent"}, "head_dim_v: required"
    yield "scales", [good], axes, {"scales": [(good, good)]}, "scales: given, but scale is 'none'"
    yield "no scales", [good], axes, {"scale": "head"}, "takes a .k_scale, v_scale. pair; got None"
    yield "pages differ", [good, good[:, :2].copy()], axes, {}, r"tensors\[1\]: .*"
    yield (
        "pair sizes",
        [(good[0], good[0, :2])],
        "page slot head dim",
        {},
        "axis 'page' has 3 and 2",
    )
    yield "pair with kv", [(good, good)], axes, {}, "axes without 'kv'"


@pytest.mark.parametrize(
    ("tensors", "axes", "options", "message"),
    [pytest.param(*case[1:], id=case[0]) for case in refusals()],
)
def test_wrap_refuses(
    tensors: list[object], axes: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        KVPool.wrap(tensors, axes, **options)  # type: ignore[arg-type]


def test_wrapped_tensors_live_as_long_as_the_pool() -> None:
    tensor = np.zeros((2, 3, 4, 2, 8), np.float32)
    alive = weakref.ref(tensor)
    pool = KVPool.wrap([tensor], "kv page slot head dim")
    del tensor
    gc.collect()
    k(pool)[...] = 6
    assert (k(pool) == 6).all()
    keys = k(pool)
    del pool
    gc.collect()
    assert alive() is not None
    assert (keys == 6).all()
    del keys
    gc.collect()
    assert alive() is None
