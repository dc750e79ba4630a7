"""KVPool: memory of its own, and of another process."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import weakref

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
    assert (np.from_dlpack(pool.k_scale(0)) == 0.25).all()  # nothing was set


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
        ({"num_layers": 0}, InvalidArgument, "num_layers: expected a positive integer; got 0"),
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
