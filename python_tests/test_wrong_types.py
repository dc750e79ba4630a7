"""A value of a wrong type is told by the name of its argument, whatever it is given to."""

import functools

import numpy as np
import pytest

import kvlink
from kvlink.errors import InvalidArgument, KVLinkError
from kvlink.transfer import Endpoint, FileDiscovery, StoreDiscovery, TransferPlan

LAYOUT = kvlink.KVLayout.nhd(num_kv_heads=2, head_dim=64, page_size=16, dtype="float32")
SCALED = kvlink.KVLayout.nhd(num_kv_heads=2, head_dim=64, page_size=16, dtype="int8", scale="head")
SHARD = kvlink.Shard([0], [0, 1])
POOL = kvlink.KVPool.create(LAYOUT, num_layers=2, num_pages=8)
OTHER = kvlink.KVPool.create(LAYOUT, num_layers=2, num_pages=8)
SCALED_POOL = kvlink.KVPool.create(SCALED, num_layers=2, num_pages=8)
K = np.ones((5, 2, 64), np.float32)
TABLE = kvlink.rope_table(np.ones(32), 16)
ROPE = kvlink.Rope(TABLE, np.arange(5))
PAGES = np.zeros((2, 2), np.int32)
PLAN = TransferPlan.build((LAYOUT, SHARD), (LAYOUT, SHARD))
TENSOR = np.ones((2, 4, 16, 2, 64), np.float32)
AXES = "kv page slot head dim"
DIMS = dict(num_kv_heads=2, head_dim=64, page_size=16, dtype="float32", head_dim_v=32, scale="none")
RANK = dict(num_layers=4, num_kv_heads=4, tp_rank=0, tp_size=2, pp_rank=0, pp_size=1)
MOVE = dict(num_tokens=20, digest=False, token_position=0, layers=[0, 1], backend="auto")

# (what is called, its arguments, those of them that must be named)
CALLS = {
    "nhd": (kvlink.KVLayout.nhd, DIMS, DIMS),
    "hnd": (kvlink.KVLayout.hnd, DIMS, DIMS),
    "packed": (kvlink.KVLayout.packed, {**DIMS, "order": "nhd"}, {**DIMS, "order": "nhd"}),
    "opaque": (
        kvlink.KVLayout.opaque, dict(page_shape=(4, 8), dtype="float32", num_heads=2),
        ["page_shape", "dtype", "num_heads"],
    ),
    "from_tensor": (
        kvlink.KVLayout.from_tensor, dict(tensor=TENSOR, axes=AXES, form="separate"),
        ["axes", "form"],
    ),
    "from_bytes": (kvlink.KVLayout.from_bytes, dict(data=LAYOUT.to_bytes()), ["data"]),
    "k_offset": (LAYOUT.k_offset, dict(page=0, slot=0, head=0, dim=0), ["page", "slot", "dim"]),
    "shard": (
        kvlink.Shard, dict(layers=[0], kv_heads=[0], replica=(0, 1)),
        ["layers", "kv_heads", "replica"],
    ),
    "of_rank": (kvlink.Shard.of_rank, RANK, RANK),
    "overlaps": (SHARD.overlaps, dict(other=SHARD), ["other"]),
    "create": (
        kvlink.KVPool.create,
        dict(layout=LAYOUT, num_layers=2, num_pages=4, shared=False, layer_map=[0, 0]),
        ["layout", "num_layers", "num_pages", "shared", "layer_map"],
    ),
    "wrap": (
        kvlink.KVPool.wrap, dict(tensors=[TENSOR], axes=AXES, layer_map=[0]),
        ["tensors", "axes", "layer_map"],
    ),
    "k": (POOL.k, dict(layer=0), ["layer"]),
    "v_scale": (SCALED_POOL.v_scale, dict(layer=0), ["layer"]),
    "set_scales": (
        SCALED_POOL.set_scales, dict(layer=0, k_scale=[1.0, 1.0], v_scale=[1.0, 1.0]),
        ["layer", "k_scale", "v_scale"],
    ),
    "append_kv": (
        kvlink.append_kv, dict(k=K, v=K, pool=POOL, layer=0, slots=np.arange(5), rope=ROPE),
        ["pool", "layer", "rope"],
    ),
    "apply_rope": (kvlink.apply_rope, dict(x=K, rope=ROPE), ["x", "rope"]),
    "rope": (
        lambda **fields: kvlink.apply_rope(K, kvlink.Rope(**fields)),
        dict(cos_sin=TABLE, positions=np.arange(5), interleaved=False, first_dim=0),
        ["cos_sin", "positions", "interleaved", "first_dim"],
    ),
    "rope_table": (
        kvlink.rope_table, dict(inv_freq=[1.0], num_positions=4, factor=1.0),
        ["inv_freq", "num_positions", "factor"],
    ),
    "plan_attention": (
        kvlink.plan_attention,
        dict(pool=POOL, page_table=PAGES, seq_lens=[3, 4], num_q_heads=4, causal=True, window=2),
        ["pool", "page_table", "seq_lens", "num_q_heads", "causal", "window"],
    ),
    "relayout_pages": (
        kvlink.relayout_pages,
        dict(src_pool=POOL, src_pages=[0, 1], dst_pool=OTHER, dst_pages=[2, 3],
             src_start=0, dst_start=0, src_shard=None, dst_shard=None, **MOVE),
        ["src_pool", "src_pages", "dst_pool", "dst_pages", "src_start", "src_shard", *MOVE],
    ),
    "digest_pages": (
        kvlink.digest_pages, dict(pool=POOL, pages=[0, 1], num_tokens=20, shard=None),
        ["pool", "pages", "num_tokens", "shard"],
    ),
    "copy_pages": (
        kvlink.copy_pages, dict(pool=POOL, src_pages=[0], dst_pages=[1]),
        ["pool", "src_pages", "dst_pages"],
    ),
    "describe": (
        PLAN.describe, dict(num_tokens=20, src_pages=[0, 1], dst_pages=[0, 1]),
        ["num_tokens", "src_pages", "dst_pages"],
    ),
    "build": (TransferPlan.build, dict(src=(LAYOUT, SHARD), dst=(LAYOUT, SHARD)), ["src", "dst"]),
    "endpoint": (
        Endpoint, dict(name="e", secret=b"s" * 16, paths=("host_shm",), num_slots=4),
        ["name", "secret", "paths", "num_slots"],
    ),
    "file_discovery": (FileDiscovery, dict(folder="/nowhere"), ["folder"]),
    "store_discovery": (StoreDiscovery, dict(store=object()), ["store"]),
}  # fmt: skip

WRONG = [object(), {"a": 1}, [[1, "a"]], int, b"x", -1.5, np.full((2, 3), 0.5)]
# Values that are not wrong there: lists of tensors, factors, any number as a truth value, arrays of
# coordinates.
TAKEN = {
    ("tensors", list), ("factor", float), ("k_offset", float), ("k_offset", np.ndarray),
    ("digest", float), ("causal", float), ("interleaved", float),
}  # fmt: skip
CASES = [(call, name) for call, (_, _, names) in CALLS.items() for name in names]


@pytest.mark.parametrize(("call", "name"), CASES)
@pytest.mark.parametrize("value", WRONG, ids=lambda value: type(value).__name__)
def test_the_argument_is_named(call, name, value):
    function, arguments, _ = CALLS[call]
    if (call, type(value)) in TAKEN or (name, type(value)) in TAKEN:
        return
    with pytest.raises(KVLinkError, match=rf"\b{name}\b"):
        function(**{**arguments, name: value})
    # No half of it happened: the call is still good.
    if call not in ("endpoint", "file_discovery", "store_discovery"):
        function(**arguments)


@pytest.fixture(scope="module")
def endpoint():
    with Endpoint("named", secret=b"s" * 16) as endpoint:
        pool = kvlink.KVPool.create(LAYOUT, num_layers=2, num_pages=8, shared=True)
        endpoint.register(pool)
        yield endpoint


@pytest.mark.parametrize("value", [*WRONG, "x"], ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("kind", ["grant", "offer"])
def test_lending_names_its_arguments(endpoint, kind, value):
    lend = functools.partial(getattr(endpoint, kind))
    good = dict(pages=[0, 1], num_tokens=20, ttl=5.0)
    for name in ("pages", "num_tokens", "ttl", "region", "digest", "on_release"):
        if name == "on_release" and callable(value):
            continue
        with pytest.raises(InvalidArgument, match=rf"\b{name}\b.*got"):
            lend(**{**good, name: value})
    lent = lend(**good)
    lent.revoke()
    lent.wait_released(30.0)


def test_numbers_of_numpy_are_numbers(endpoint):
    grant = endpoint.grant(np.array([0, 1]), np.int64(20), np.float32(5.0))
    assert grant.num_tokens == 20
    grant.revoke()
    grant.wait_released(30.0)
    pool = kvlink.KVPool.create(LAYOUT, num_layers=np.int32(2), num_pages=np.int64(4))
    assert kvlink.Shard(np.arange(2), np.arange(2)) == kvlink.Shard(range(2), range(2))
    assert np.from_dlpack(pool.k(np.int64(1))).shape == np.from_dlpack(pool.k(1)).shape
