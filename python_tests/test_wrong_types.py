"""A value of a wrong type is told by the name of its argument, whatever it is given to."""

import functools

import numpy as np
import pytest
import torch

import kvlink
from kvlink.errors import InvalidArgument, KVLinkError
from kvlink.transfer import Endpoint, FileDiscovery, StoreDiscovery, TransferPlan

LAYOUT = kvlink.KVLayout.nhd(num_kv_heads=2, head_dim=64, page_size=16, dtype="float32")
SCALED = kvlink.KVLayout.nhd(num_kv_heads=2, head_dim=64, page_size=16, dtype="int8", scale="head")
SHARD = kvlink.Shard([0], [0, 1])
POOL = kvlink.KVPool.create(LAYOUT, num_layers=2, num_pages=8)
OTHER = kvlink.KVPool.create(LAYOUT, num_layers=2, num_pages=8)
SCALED_POOL = kvlink.KVPool.create(SCALED, num_layers=2, num_pages=8)
SHARED = kvlink.KVPool.create(LAYOUT, num_layers=2, num_pages=8, shared=True)
K = np.ones((5, 2, 64), np.float32)
Q = np.ones((2, 4, 64), np.float32)
LSE = np.ones((2, 4), np.float32)
LENS = np.array([20, 3], np.int32)
STARTS = np.array([0, 1, 2], np.int32)
HEADS = np.ones(4, np.float32)
TABLE = kvlink.rope_table(np.ones(32), 16)
ROPE = kvlink.Rope(TABLE, np.arange(5))
PAGES = np.zeros((2, 2), np.int32)
TASKS = kvlink.plan_attention(POOL, PAGES, LENS, num_q_heads=4)
PLAN = TransferPlan.build((LAYOUT, SHARD), (LAYOUT, SHARD))
TENSOR = np.ones((2, 4, 16, 2, 64), np.float32)
AXES = "kv page slot head dim"
DIMS = dict(num_kv_heads=2, head_dim=64, page_size=16, dtype="float32", head_dim_v=32, scale="none")
RANK = dict(num_layers=4, num_kv_heads=4, tp_rank=0, tp_size=2, pp_rank=0, pp_size=1)
MOVE = dict(num_tokens=20, digest=False, token_position=0, layers=[0, 1], backend="auto")

ATTENTION = dict(
    q=Q, pool=POOL, layer=0, page_table=PAGES, seq_lens=LENS, q_indptr=STARTS, causal=True,
    scale=0.1, window=4, softcap=2.0, sinks=HEADS, alibi_slopes=HEADS,
    mask=np.full((2, 1), 255, np.uint8), mask_starts=LENS - 1, q_positions=LENS - 1,
    page_generations=np.ones(8, np.uint32), expected_generations=np.ones((2, 2), np.uint32),
    out=np.empty((2, 4, 64), np.float32), return_lse=True, backend="auto", ready=None,
    ready_timeout=1.0,
)  # fmt: skip
STEP = dict(q=Q, pool=POOL, layer=0, page_table=PAGES, seq_lens=LENS)


def of_an_allocator(method, **arguments):
    """A call of a method of an allocator of 8 pages of which 4 are taken."""

    def call(**given):
        allocator = kvlink.PageAllocator(8, 16)
        allocator.allocate(4)
        return getattr(allocator, method)(**given)

    return call, arguments, arguments


# (what is called, its arguments, those of them that must be named)
CALLS = {
    "paged_attention": (kvlink.paged_attention, ATTENTION, ATTENTION),
    "paged_attention, planned": (kvlink.paged_attention, {**STEP, "plan": TASKS}, ["plan"]),
    "paged_attention, CSR": (
        kvlink.paged_attention,
        {**STEP, "page_table": np.arange(3, dtype=np.int32),
         "page_indptr": np.array([0, 2, 3], np.int32)},
        ["page_table", "page_indptr"],
    ),
    "choose_backend": (
        kvlink.attention.choose_backend,
        dict(q_dtype="float32", pool=POOL, features=["window"], backend="auto"),
        ["q_dtype", "pool", "features", "backend"],
    ),
    "merge_states": (
        kvlink.merge_states, dict(out_a=Q, lse_a=LSE, out_b=Q, lse_b=LSE, backend="auto"),
        ["out_a", "lse_a", "out_b", "lse_b", "backend"],
    ),
    "merge_states of lists": (
        lambda outs, lses: kvlink.merge_states(outs, lses),
        dict(outs=[Q, Q], lses=[LSE, LSE]), ["outs", "lses"],
    ),
    "attach": (
        kvlink.KVPool.attach,
        dict(layout=LAYOUT, num_pages=8, layer_map=[0, 1], fd=SHARED.segment.fd),
        ["layout", "num_pages", "layer_map", "fd"],
    ),
    "KVLayout": (
        kvlink.KVLayout,
        dict(form="separate", num_kv_heads=2, page_size=16, dtype="float32", scale="none",
             head_dim=64, head_dim_v=64, k=LAYOUT.k, v=LAYOUT.v),
        ["form", "num_kv_heads", "dtype", "scale", "k", "v"],
    ),
    "latent": (
        kvlink.KVLayout.latent, dict(head_dim=64, head_dim_v=32, page_size=16, dtype="float32"),
        ["head_dim", "head_dim_v", "page_size", "dtype"],
    ),
    "allocator": (
        kvlink.PageAllocator, dict(num_pages=8, page_size=16), ["num_pages", "page_size"],
    ),
    "allocate": of_an_allocator("allocate", num_pages=1),
    "free": of_an_allocator("free", pages=[0]),
    "retain": of_an_allocator("retain", pages=[0]),
    "refcount": of_an_allocator("refcount", pages=[0]),
    "fork": of_an_allocator("fork", pages=[0, 1], num_tokens=17),
    "prepare_write": of_an_allocator("prepare_write", pages=[0], start=0, stop=18),
    "slots": of_an_allocator("slots", pages=[0], start=0, stop=3),
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

WRONG = [
    object(), {"a": 1}, [[1, "a"]], int, b"x", -1.5, np.full((2, 3), 0.5), np.float32(-1.5),
    torch.ones(3, device="meta"),
]  # fmt: skip
# Values that are not wrong there: lists of tensors, factors, any number as a truth value, arrays of
# coordinates.
TAKEN = {
    ("tensors", list), ("factor", float), ("k_offset", float), ("k_offset", np.ndarray),
    ("k_offset", np.float32), ("k_offset", torch.Tensor), ("interleaved", np.float32),
    ("digest", float), ("causal", float), ("interleaved", float), ("scale", float),
    ("digest", np.float32), ("causal", np.float32), ("scale", np.float32), ("factor", np.float32),
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


NEVER = torch.ones((2, 4, 64), requires_grad=True)
FIXED = np.ones((2, 4, 64), np.float32)
FIXED.flags.writeable = False
SHORT = kvlink.plan_attention(POOL, PAGES[:1], LENS[:1], num_q_heads=4)

# Of the right kind, and wrong all the same: what is given, and what the error has to say of it.
REFUSED = [
    (dict(q=np.ones((2, 4, 64), np.int32)), "q dtype int32"),
    (dict(q=np.ones((2, 4, 32), np.float32)), "q: expected head_dim = 64"),
    (dict(q=np.ones((8, 64), np.float32)), r"q: expected shape \[T, Hq, head_dim\]; got \(8, 64\)"),
    (dict(q=np.ones((2, 4, 128), np.float32)[:, :, ::2]), "q: expected a contiguous last axis"),
    (dict(q=NEVER), "q: the array could not be exported: Can't export tensors that require grad"),
    (dict(layer=2), "layer: expected 0 to 1; got 2"),
    (dict(layer=np.float32(1.5)), "layer: expected an integer; got"),
    (dict(page_table=PAGES.astype(np.float32)), "page_table: expected dtype int32; got float32"),
    (dict(page_table=[[0, 1.5], [2, 3]]), r"page_table\[0\]: expected integers; got \[0, 1.5\]"),
    (dict(page_table=[[0, 2**70], [2, 3]]), r"page_table\[0\]: expected integers"),
    (dict(seq_lens=[3.7, 4]), r"seq_lens: expected integers; got \[3.7, 4\]"),
    (dict(seq_lens=["3", "4"]), "seq_lens: expected integers"),
    (dict(seq_lens=[True, True]), "seq_lens: expected integers"),
    (dict(seq_lens=[2**40, 4]), "seq_lens: expected integers of 32 bits"),
    (dict(seq_lens=np.array([True, True])), "seq_lens: expected dtype int32; got bool"),
    (dict(seq_lens=LENS[::-1]), "seq_lens: expected a contiguous array"),
    (dict(scale="x"), "scale: expected a number; got 'x'"),
    (dict(scale=float("nan")), "scale: expected a finite number; got nan"),
    (dict(softcap=float("inf")), "softcap: expected a finite number"),
    (dict(window=-1), "window: expected >= 1 or None; got -1"),
    (dict(window=1.5), "window: expected an integer; got 1.5"),
    (dict(window=np.float32(1.5)), "window: expected an integer; got"),
    (dict(window=2**70), r"window: expected at most 2\^63 - 1; got"),
    (dict(causal="yes"), "causal: expected True or False; got 'yes'"),
    (dict(return_lse="no"), "return_lse: expected True or False; got 'no'"),
    (dict(mask=np.ones((3, 1), np.uint8)), "mask: expected num_tokens = 2 as in q; got 3"),
    (dict(mask=np.ones((2, 1), bool)), "mask: expected dtype uint8; got bool"),
    (dict(out=np.empty((2, 4, 64), np.float16)), "out: expected dtype float32; got float16"),
    (dict(out=FIXED), "out: is written to, but is read-only"),
    (dict(out=torch.ones(64).expand(2, 4, 64)), r"out: is written to, but axis 0 repeats"),
    (dict(out=Q), "out: expected memory of its own; got some that q is in, too"),
    (dict(plan=SHORT), "plan: "),
    (dict(plan="plan"), "plan: expected what plan_attention returns; got 'plan'"),
    (dict(ready_timeout=-1.0), "ready_timeout: expected seconds >= 0; got -1"),
    (dict(ready=[1]), "ready: expected Readiness objects; got 1"),
    (dict(backend=None), "backend: expected auto or one of cpu, .*; got None"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_attention_says_what_it_does_not_take(wrong, message):
    out = np.full((2, 4, 64), 7.0, np.float32)
    before = Q.copy()
    with pytest.raises(KVLinkError, match=message):
        kvlink.paged_attention(**{**STEP, "out": out, **wrong})
    assert (out == 7.0).all()
    assert (before == Q).all()


def test_views_that_take_turns_in_a_buffer_do_not_overlap():
    rng = np.random.default_rng(0)
    q = rng.standard_normal((2, 4, 64)).astype(np.float32)
    wanted = kvlink.paged_attention(**{**STEP, "q": q})
    for buffer, of_q, of_out in (
        (np.zeros((2, 8, 64), np.float32), np.s_[:, :4], np.s_[:, 4:]),
        (np.zeros((2, 8, 64), np.float32), np.s_[:, 4:], np.s_[:, :4]),
        (np.zeros((2, 4, 128), np.float32), np.s_[:, :, 64:], np.s_[:, :, :64]),
        (np.zeros((4, 4, 64), np.float32), np.s_[2:], np.s_[:2]),
    ):
        buffer[of_q] = q
        out = buffer[of_out]
        kvlink.paged_attention(**{**STEP, "q": buffer[of_q], "out": out})
        assert (out == wanted).all()
        assert (buffer[of_q] == q).all()
    buffer = np.zeros((3, 4, 96), np.float32)
    for out in (buffer[1:, :, :64], buffer[:2, :, 32:]):
        with pytest.raises(InvalidArgument, match="out: expected memory of its own"):
            kvlink.paged_attention(**{**STEP, "q": buffer[:2, :, :64], "out": out})


def test_an_empty_batch_is_no_mistake():
    empty = np.ones((0, 4, 64), np.float32)
    out, lse = kvlink.paged_attention(
        empty, POOL, 0, np.zeros((0, 2), np.int32), np.zeros(0, np.int32), return_lse=True
    )
    assert out.shape == (0, 4, 64)
    assert lse.shape == (0, 4)
