"""KVPool: memory of its own, of an engine, of another process."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from kvlink import KVLayout, KVPool
from kvlink.errors import InvalidArgument, Unsupported

SIZES = {"num_kv_heads": 3, "head_dim": 8, "page_size": 4}
LAYOUTS = {
    "nhd": KVLayout.nhd(**SIZES, dtype="float32"),
    "nhd_v5": KVLayout.nhd(**SIZES, head_dim_v=5, dtype="float16"),
    "hnd": KVLayout.hnd(**SIZES, dtype="float16"),
    "packed": KVLayout.packed(**SIZES, head_dim_v=6, dtype="float32"),
    "packed_hnd": KVLayout.packed(**SIZES, order="hnd", dtype="float32"),
    "latent": KVLayout.latent(head_dim=12, head_dim_v=8, page_size=4, dtype="float32"),
    "token_head": KVLayout.nhd(**SIZES, dtype="int8", scale="token_head"),
    "head": KVLayout.hnd(**SIZES, dtype="int8", scale="head"),
    "tensor": KVLayout.packed(**SIZES, dtype="int8", scale="tensor"),
}
ENGINE_AXES = ["kv page slot head dim", "page kv head slot dim", "page slot kv head dim"]


def k(pool: KVPool, layer: int = 0) -> np.ndarray:
    return np.from_dlpack(pool.k(layer))


def v(pool: KVPool, layer: int = 0) -> np.ndarray:
    return np.from_dlpack(pool.v(layer))


def address(array: np.ndarray, *index: int) -> int:
    steps = zip(index, array.strides, strict=True)
    return array.ctypes.data + sum(i * stride for i, stride in steps)


# --- create ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("shared", [False, True])
def test_created_pool_is_zero_and_lies_as_its_layout_says(name: str, shared: bool) -> None:
    layout = LAYOUTS[name]
    pool = KVPool.create(layout, num_layers=2, num_pages=5, shared=shared)
    assert (pool.num_layers, pool.num_stored_layers, pool.num_pages) == (2, 2, 5)
    assert pool.shared is shared
    last = (4, layout.page_size - 1, layout.num_kv_heads - 1)
    for layer in range(2):
        keys, values = k(pool, layer), v(pool, layer)
        assert keys.shape == (5, layout.page_size, layout.num_kv_heads, layout.head_dim)
        assert values.shape == (*keys.shape[:3], layout.head_dim_v)
        assert not keys.any()
        assert not values.any()
        base = address(keys, 0, 0, 0, 0) - layout.k_offset(0, 0, 0, 0)
        assert address(keys, *last, 1) - base == layout.k_offset(*last, 1)
        assert address(values, *last, 1) - base == layout.v_offset(*last, 1)
        keys[...] = 1 + layer
    assert (k(pool, 0) == 1).all()
    assert (k(pool, 1) == 2).all()


def test_torch_sees_the_same_memory() -> None:
    layout = KVLayout.nhd(**SIZES, dtype="bfloat16")
    pool = KVPool.create(layout, num_layers=1, num_pages=2)
    torch.from_dlpack(pool.k(0))[1, 2, 1] = 1.5
    again = torch.from_dlpack(pool.k(0))
    assert again.dtype == torch.bfloat16
    assert again.sum() == 1.5 * 8


def test_layers_share_a_stored_layer() -> None:
    pool = KVPool.create(LAYOUTS["nhd"], num_layers=3, num_pages=2, layer_map=[0, 1, 0])
    assert (pool.num_layers, pool.num_stored_layers) == (3, 2)
    assert pool.num_bytes == 2 * LAYOUTS["nhd"].layer_bytes(2)
    k(pool, 2)[0] = 7
    assert (k(pool, 0)[0] == 7).all()
    assert not k(pool, 1).any()


def test_static_scales_begin_at_one_and_can_be_set() -> None:
    pool = KVPool.create(LAYOUTS["head"], num_layers=2, num_pages=2)
    assert (np.from_dlpack(pool.k_scale(1)) == 1).all()
    pool.set_scales(1, [0.5, 1.0, 2.0], [3.0, 4.0, 5.0])
    assert np.from_dlpack(pool.k_scale(1)).shape == (2, 4, 3)
    assert np.from_dlpack(pool.k_scale(1))[1, 3].tolist() == [0.5, 1.0, 2.0]
    assert np.from_dlpack(pool.v_scale(1))[0, 0].tolist() == [3.0, 4.0, 5.0]
    assert (np.from_dlpack(pool.v_scale(0)) == 1).all()
    pool = KVPool.create(LAYOUTS["tensor"], num_layers=1, num_pages=2)
    pool.set_scales(0, 0.25, 0.75)
    assert (np.from_dlpack(pool.k_scale(0)) == 0.25).all()
    assert (np.from_dlpack(pool.v_scale(0)) == 0.75).all()
    for bad in (0.0, -1.0, float("nan"), [1.0, 1.0]):
        with pytest.raises(InvalidArgument, match="v_scale: expected 1 finite positive"):
            pool.set_scales(0, 1.0, bad)


def test_token_scales_begin_at_zero_and_are_writable() -> None:
    pool = KVPool.create(LAYOUTS["token_head"], num_layers=1, num_pages=2)
    scales = np.from_dlpack(pool.v_scale(0))
    assert not scales.any()
    scales[1, 2, 0] = 3.0
    assert np.from_dlpack(pool.v_scale(0)).sum() == 3.0
    assert not np.from_dlpack(pool.k_scale(0)).any()
    with pytest.raises(InvalidArgument, match="only 'tensor' and 'head' scales are set"):
        pool.set_scales(0, 1.0, 1.0)


def test_opaque_pages() -> None:
    pool = KVPool.create(KVLayout.opaque([3, 5], "uint8"), num_layers=1, num_pages=2)
    assert k(pool).shape == (2, 1, 1, 15)
    with pytest.raises(InvalidArgument, match="opaque pages have no V"):
        pool.v(0)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"device": "cuda:0"}, Unsupported, "device: create makes pools on 'cpu'.*got 'cuda:0'"),
        ({"num_layers": 0}, InvalidArgument, "num_layers: expected >= 1; got 0"),
        ({"num_pages": 0}, InvalidArgument, "num_pages: expected a positive integer; got 0"),
        ({"layer_map": [0]}, InvalidArgument, "layer_map: expected 2 entries; got 1"),
        ({"layer_map": [0, 2]}, InvalidArgument, r"layer_map: .*got \[0, 2\]"),
        ({"num_pages": 2**31 - 1, "num_layers": 100_000}, OSError, "could not map"),
    ],
)
def test_create_refuses(changes: dict[str, object], error: type[Exception], message: str) -> None:
    arguments: dict[str, object] = {"num_layers": 2, "num_pages": 4}
    with pytest.raises(error, match=message):
        KVPool.create(LAYOUTS["nhd"], **(arguments | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("layer", [-1, 2])
def test_layer_out_of_range(layer: int) -> None:
    pool = KVPool.create(LAYOUTS["nhd"], num_layers=2, num_pages=1)
    with pytest.raises(InvalidArgument, match=f"layer: expected 0 to 1; got {layer}"):
        pool.k(layer)


def test_views_outlive_the_pool() -> None:
    pool = KVPool.create(LAYOUTS["nhd"], num_layers=1, num_pages=3)
    keys, lazily = k(pool), pool.v(0)
    keys[...] = 3
    gone = weakref.ref(pool)
    del pool
    gc.collect()
    assert gone() is None
    assert (keys == 3).all()
    np.from_dlpack(lazily)[...] = 4


def test_memory_is_returned() -> None:
    def mapped() -> int:
        with open("/proc/self/maps") as maps:
            return sum("/memfd:kvlink" in line for line in maps)

    before = mapped()
    pool = KVPool.create(LAYOUTS["nhd"], num_layers=1, num_pages=3, shared=True)
    fd = pool.segment.fd  # type: ignore[union-attr]
    keys = k(pool)
    assert mapped() == before + 1
    del pool
    assert mapped() == before + 1
    del keys
    gc.collect()
    assert mapped() == before
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


# --- wrap -----------------------------------------------------------------------------------------


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


# --- another process ------------------------------------------------------------------------------

OWNER = """
import socket, sys
import numpy as np
from kvlink import KVLayout, KVPool
peer = socket.socket(fileno=int(sys.argv[1]))
layout = KVLayout.hnd(num_kv_heads=3, head_dim=8, page_size=4, dtype="float16")
pool = KVPool.create(layout, num_layers=2, num_pages=5, shared=True, layer_map=[0, 0])
np.from_dlpack(pool.k(1))[4, 3] = 2.5
socket.send_fds(peer, [layout.to_bytes()], [pool.segment.fd])
assert peer.recv(1) == b"x"
print(float(np.from_dlpack(pool.v(0))[1, 2, 0, 3]), flush=True)
peer.recv(1)
"""


@pytest.mark.two_process
def test_pool_of_another_process() -> None:
    ours, theirs = socket.socketpair()
    ours.settimeout(60)
    command = [sys.executable, "-c", OWNER, str(theirs.fileno())]
    with subprocess.Popen(
        command, pass_fds=[theirs.fileno()], stdout=subprocess.PIPE, text=True
    ) as owner:
        try:
            theirs.close()
            data, fds, _, _ = socket.recv_fds(ours, 4096, 1)
            layout = KVLayout.from_bytes(data)
            pool = KVPool.attach(layout, num_pages=5, layer_map=[0, 0], fd=fds[0])
            os.close(fds[0])  # the pool has its own
            assert k(pool, 0)[4, 3].tolist() == [[2.5] * 8] * 3
            v(pool, 1)[1, 2, 0, 3] = -7
            ours.sendall(b"x")
            assert owner.stdout is not None
            assert owner.stdout.readline() == "-7.0\n"
            with open(f"/proc/{owner.pid}/maps") as maps:
                shared = [line for line in maps if "/memfd:kvlink" in line or "/dev/shm" in line]
            assert len(shared) == 1
            assert "/memfd:kvlink (deleted)" in shared[0]  # it has no name in any file system
            owner.send_signal(signal.SIGKILL)
            assert owner.wait(60) == -signal.SIGKILL
        finally:
            owner.kill()
            ours.close()
    # The memory lives on with its last user, and nowhere else.
    assert k(pool, 1)[4, 3].tolist() == [[2.5] * 8] * 3
    assert not [name for name in os.listdir("/dev/shm") if "kvlink" in name]


def test_attach_refuses() -> None:
    layout = LAYOUTS["nhd"]
    pool = KVPool.create(layout, num_layers=1, num_pages=4, shared=True)
    assert pool.segment is not None
    with pytest.raises(InvalidArgument, match="shared memory: expected at least"):
        KVPool.attach(layout, num_pages=400, layer_map=[0], fd=pool.segment.fd)
    with pytest.raises(OSError, match="fstat of shared memory descriptor -1"):
        KVPool.attach(layout, num_pages=4, layer_map=[0], fd=-1)
    fd = os.memfd_create("unsealed")
    try:
        os.ftruncate(fd, 1 << 20)
        with pytest.raises(InvalidArgument, match="not sealed against shrinking"):
            KVPool.attach(layout, num_pages=4, layer_map=[0], fd=fd)
    finally:
        os.close(fd)
    attached = KVPool.attach(layout, num_pages=4, layer_map=[0], fd=pool.segment.fd)
    k(attached)[...] = 1
    assert (k(pool) == 1).all()
    del pool
    gc.collect()
    assert (k(attached) == 1).all()
