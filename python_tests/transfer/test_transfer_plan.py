"""TransferPlan, without endpoints: every cut to every cut, moved by the executor, byte for byte."""

from __future__ import annotations

import ctypes
import itertools
from typing import Any

import numpy as np
import pytest
from sharded import Model, Rank, copy_of, engine, make_rank, raw

from kvlink import _C, KVLayout, KVPool, Shard, digest_pages
from kvlink.errors import InvalidArgument
from kvlink.transfer import TransferPlan, Unconvertible

SIZES = (1, 2, 3, 4, 8)
LAYOUTS = [  # kind and page size of either side
    (("nhd", 16), ("hnd", 24)),
    (("hnd", 7), ("packed", 5)),
    (("packed_hnd", 64), ("strided", 16)),
    (("strided", 16), ("nhd", 64)),
    (("nhd", 16), ("nhd", 16)),
]
STAGES = [([5], [5]), ([3, 2], [5]), ([5], [2, 1, 2]), ([1, 3, 1], [2, 3])]  # layers per PP rank


def side(rank: Rank) -> tuple[Any, ...]:
    return rank.pool.layout, rank.shard, rank.pool.layer_map


def plan_of(src: Rank, dst: Rank) -> TransferPlan | None:
    """None when they have no layer or no head in common, which is told as an error."""
    layers = set(src.shard.layers) & set(dst.shard.layers)
    heads = set(src.shard.kv_heads) & set(dst.shard.kv_heads)
    assert src.shard.overlaps(dst.shard) == bool(layers and heads)
    if layers and heads:
        return TransferPlan.build(side(src), side(dst))
    with pytest.raises(Unconvertible, match=r"in common|no layer of the destination"):
        TransferPlan.build(side(src), side(dst))
    return None


def apply(plan: TransferPlan, src: Rank, dst: Rank, num_tokens: int) -> tuple[int, int]:
    """Rows and digest, all parts in one call of the executor."""
    if not plan.parts:
        return 0, 0
    num_heads, src_head, dst_head, model_head = plan.heads
    src_layers, dst_layers, model_layers = map(list, zip(*plan.parts, strict=True))
    result: tuple[int, int] = _C.relayout_pages(
        src=src.pool.view, src_pages=_C.PageIds(src.pages, "src_pages"), dst=dst.pool.view,
        dst_pages=_C.PageIds(dst.pages, "dst_pages"), src_layers=src_layers,
        dst_layers=dst_layers, model_layers=model_layers, num_heads=num_heads, src_head=src_head,
        dst_head=dst_head, model_head=model_head, num_tokens=num_tokens, src_start=0, dst_start=0,
        token_position=0, digest=True,
    )  # fmt: skip
    return result


def check_resharding(
    model: Model, src: list[Rank], dst: list[Rank], dst_kind: str, dst_page_size: int
) -> None:
    """What all sources send fills each destination rank, each row once, byte for byte."""
    for rank in dst:
        moved = [
            apply(plan, sender, rank, model.num_tokens)
            for sender in src
            if (plan := plan_of(sender, rank)) is not None
        ]
        held = digest_pages(rank.pool, rank.pages, num_tokens=model.num_tokens, shard=rank.shard)
        assert sum(rows for rows, _ in moved) == held.rows
        assert sum(digest for _, digest in moved) % 2**64 == held.digest
    for rank, want in zip(dst, copy_of(dst, model, dst_kind, dst_page_size), strict=True):
        assert rank.bytes() == want.bytes()


@pytest.mark.parametrize("num_kv_heads", [8, 3, 2, 1])
@pytest.mark.parametrize("dst_tp", SIZES)
@pytest.mark.parametrize("src_tp", SIZES)
def test_every_cut_to_every_cut(src_tp: int, dst_tp: int, num_kv_heads: int) -> None:
    model = Model(num_kv_heads=num_kv_heads)
    for idx, (src_layout, dst_layout) in enumerate(LAYOUTS):
        src_stages, dst_stages = STAGES[(idx + src_tp + 2 * dst_tp) % len(STAGES)]
        src = engine(model, src_tp, src_stages, *src_layout)
        for rank in src:
            rank.hold(model)
        dst = engine(model, dst_tp, dst_stages, *dst_layout)
        check_resharding(model, src, dst, *dst_layout)


@pytest.mark.parametrize(("src_tp", "dst_tp"), [(1, 4), (4, 1), (8, 3)])
@pytest.mark.parametrize("form", ["latent", "opaque"])
def test_states_that_every_rank_holds(form: str, src_tp: int, dst_tp: int) -> None:
    model = Model(num_kv_heads=1, num_planes=1, dtype="float32", num_tokens=21)
    sizes = ((form, 1), (form, 1)) if form == "opaque" else ((form, 16), (form, 5))
    for src_stages, dst_stages in STAGES:
        src = engine(model, src_tp, src_stages, *sizes[0])
        for rank in src:
            rank.hold(model)
        check_resharding(model, src, engine(model, dst_tp, dst_stages, *sizes[1]), *sizes[1])


@pytest.mark.parametrize(("src_tp", "dst_tp"), [(1, 1), (4, 2), (2, 8)])
@pytest.mark.parametrize("stages", STAGES)
def test_layers_that_share_memory(
    stages: tuple[list[int], list[int]], src_tp: int, dst_tp: int
) -> None:
    model = Model(same=(0, 1, 2, 2, 2), num_tokens=30)
    src = engine(model, src_tp, stages[0], "nhd", 16)
    for rank in src:
        rank.hold(model)
    dst = engine(model, dst_tp, stages[1], "hnd", 7)
    assert {rank.pool.num_stored_layers for rank in dst} <= {1, 2, 3}
    check_resharding(model, src, dst, "hnd", 7)
    # Each stored layer once, though a layer that shares it is moved to a pool where none does.
    apart = make_rank(Shard(range(5), dst[0].shard.kv_heads), Model(), "nhd", 16)
    plan = plan_of(src[0], apart)
    assert plan is not None
    assert [part[1:] for part in plan.parts] == [
        (layer, layer) for layer in range(5) if layer in src[0].shard.layers
    ]


def test_replicas_share_the_work() -> None:
    layout = KVLayout.nhd(num_kv_heads=1, head_dim=8, page_size=16, dtype="float16")
    ranks = [
        (layout, Shard.of_rank(num_layers=30, num_kv_heads=2, tp_rank=rank, tp_size=8))
        for rank in range(8)
    ]
    for dst in ranks:
        sent = {}
        for idx, src in enumerate(ranks):
            if src[1].kv_heads == dst[1].kv_heads:
                sent[idx] = [part[2] for part in TransferPlan.build(src, dst).parts]
        assert sorted(itertools.chain(*sent.values())) == list(range(30))
        assert {len(layers) for layers in sent.values()} == {7, 8}


def test_a_replica_without_a_share_sends_nothing() -> None:
    layout = KVLayout.latent(head_dim=8, head_dim_v=4, page_size=16, dtype="float16")
    plan = TransferPlan.build((layout, Shard([6], [0], (1, 2))), (layout, Shard([6], [0])))
    assert plan.parts == ()
    assert plan.parts_of_layer == ((),)
    assert plan.describe(100).rows == 0


def test_equal_pairs_share_one_plan() -> None:
    def pair(page_size: int) -> list[tuple[KVLayout, Shard]]:
        layout = KVLayout.nhd(num_kv_heads=2, head_dim=8, page_size=page_size, dtype="float16")
        return [(layout, Shard(range(3), range(2))), (layout, Shard(range(3), range(2), (1, 2)))]

    assert TransferPlan.build(*pair(16)) is TransferPlan.build(*pair(16))
    assert TransferPlan.build(*pair(16)) is not TransferPlan.build(*pair(17))
    assert TransferPlan.build(*pair(16)[::-1]).parts == ((1, 1, 1),)


@pytest.mark.parametrize("num_tokens", [1, 16, 61])
@pytest.mark.parametrize("heads", [(range(4), range(4)), (range(4), range(2, 4))])
@pytest.mark.parametrize(
    ("src_layout", "dst_layout"),
    [*LAYOUTS, (("packed", 16), ("packed", 16)), (("hnd", 16), ("hnd", 16)),
     (("hnd", 16), ("hnd", 24))],
)  # fmt: skip
def test_runs_are_the_copies(
    src_layout: tuple[str, int], dst_layout: tuple[str, int], heads: tuple[range, range],
    num_tokens: int,
) -> None:  # fmt: skip
    model = Model(num_kv_heads=4, num_tokens=num_tokens)
    src, dst = (
        make_rank(Shard(range(5), held), model, *layout, seed=idx)
        for idx, (held, layout) in enumerate(zip(heads, (src_layout, dst_layout), strict=True))
    )
    for pages in (None, list(range(len(src.pages)))):
        src.pages = pages or src.pages
        src.hold(model)
        plan = plan_of(src, dst)
        assert plan is not None
        runs = plan.runs(src.pages, dst.pages, num_tokens)
        assert plan.verbatim
        for src_layer, dst_layer, _ in plan.parts:
            for name, copies in runs.items():
                bases = [
                    raw(rank.pool, layer, name).data_ptr()
                    for rank, layer in ((src, src_layer), (dst, dst_layer))
                ]
                heads_at = [plan.heads[1], plan.heads[2]]
                assert heads_at == [heads[1].start, 0]
                for src_offset, dst_offset, num_bytes in copies.tolist():
                    ctypes.memmove(bases[1] + dst_offset, bases[0] + src_offset, num_bytes)
        (want,) = copy_of([dst], model, *dst_layout)
        assert dst.bytes() == want.bytes()
        told = plan.describe(num_tokens, src.pages, dst.pages)
        assert told.num_runs == sum(map(len, runs.values())) * 5
        assert sum(int(copies[:, 2].sum()) for copies in runs.values()) * 5 == told.dst_bytes


def layout_of(kind: str, **changed: Any) -> KVLayout:
    shape: dict[str, Any] = dict(num_kv_heads=4, head_dim=64, page_size=16, dtype="bfloat16")
    layout: KVLayout = getattr(KVLayout, kind)(**(shape | changed))
    return layout


ROW = 64 * 2
DESCRIPTIONS = {
    # (source, destination): run bytes at the source, at the destination, on both, and copies
    "same": (layout_of("nhd"), layout_of("nhd"), (32 * 4 * ROW, 32 * 4 * ROW, 32 * 4 * ROW, 3)),
    "packed": (layout_of("packed"), layout_of("packed"), (32 * 4 * ROW,) * 3 + (3,)),
    "hnd": (layout_of("nhd"), layout_of("hnd"), (32 * 4 * ROW, 32 * 4 * ROW, ROW, 40 * 4 * 2)),
    "larger pages": (layout_of("nhd"), layout_of("nhd", page_size=64),
                     (32 * 4 * ROW, 40 * 4 * ROW, 16 * 4 * ROW, 3 * 2)),
    "fp8": (layout_of("nhd"), layout_of("nhd", dtype="float8_e4m3"),
            (32 * 4 * ROW, 32 * 4 * 64, 0, 0)),
}  # fmt: skip


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_a_plan_tells_what_it_takes(name: str) -> None:
    src, dst, (src_run, dst_run, run, num_runs) = DESCRIPTIONS[name]
    shard = Shard(range(2), range(4))
    told = TransferPlan.build((src, shard), (dst, shard)).describe(40)
    if name in ("same", "packed"):
        num_runs = 2 * (2 + (1 if name == "packed" else 2))  # of the last page, K and V apart
    else:
        num_runs *= 2
    assert (told.src_run_bytes, told.dst_run_bytes, told.run_bytes) == (src_run, dst_run, run)
    assert told.num_runs == num_runs
    assert told.rows == 40 * 2 * 2 * 4
    assert told.src_bytes == told.rows * ROW
    assert told.dst_bytes == told.rows * 64 * dst.element_bytes
    assert (told.num_parts, told.num_heads) == (2, 4)
    assert told.verbatim is (name != "fp8")


def test_half_of_the_heads_come_in_shorter_runs() -> None:
    src = layout_of("nhd"), Shard([0], range(4))
    dst = layout_of("nhd", num_kv_heads=2), Shard([0], range(2, 4))
    told = TransferPlan.build(src, dst).describe(16)
    assert (told.run_bytes, told.num_runs) == (2 * ROW, 16 * 2)
    rowwise = TransferPlan.build(
        (layout_of("nhd", dtype="int8", scale="token_head"), src[1]),
        (layout_of("nhd", dtype="int8", scale="token_head"), src[1]),
    ).describe(16)
    assert rowwise.dst_bytes == 16 * 4 * 2 * (64 + 4)
    assert rowwise.num_runs == 1 + 2  # K and V, and the scales of each
    static = layout_of("nhd", dtype="int8", scale="head"), src[1]
    assert TransferPlan.build(static, static).describe(16).verbatim is None


LAYOUT = layout_of("nhd")
SHARD = Shard(range(2), range(4))


@pytest.mark.parametrize(
    ("message", "dst"),
    [
        ("separate pages do not convert to latent", (
            KVLayout.latent(head_dim=64, head_dim_v=32, page_size=16, dtype="bfloat16"),
            Shard(range(2), [0]))),
        ("head_dim/head_dim_v differ: 64/64 and 32/32", (layout_of("nhd", head_dim=32), SHARD)),
        (r"range\(0, 4\) and range\(4, 8\) have no KV head in common",
         (LAYOUT, Shard(range(2), range(4, 8)))),
        ("no layer of the destination", (LAYOUT, Shard([2], range(4)))),
        ("model layers .0, 1. share memory at the destination, but not at the source",
         (LAYOUT, SHARD, (0, 0))),
    ],
)  # fmt: skip
def test_what_does_not_convert(message: str, dst: tuple[Any, ...]) -> None:
    with pytest.raises(Unconvertible, match=message):
        TransferPlan.build((LAYOUT, SHARD), dst)


def test_opaque_pages_of_other_content_do_not_convert() -> None:
    shard = Shard([0], [0])
    for shape, dtype in (((8, 4), "float16"), ((8, 5), "float32")):
        with pytest.raises(Unconvertible):
            TransferPlan.build(
                (KVLayout.opaque((8, 4), "float32"), shard), (KVLayout.opaque(shape, dtype), shard)
            )


@pytest.mark.parametrize("bad", [None, LAYOUT, (LAYOUT,), (SHARD, LAYOUT),
                                 (LAYOUT, Shard([0], range(3))), (LAYOUT, SHARD, (0, 2)),
                                 (LAYOUT, SHARD, (0,))])  # fmt: skip
def test_sides_that_are_none(bad: Any) -> None:
    with pytest.raises(InvalidArgument):
        TransferPlan.build((LAYOUT, SHARD), bad)


def test_numbers_are_checked() -> None:
    plan = TransferPlan.build((LAYOUT, SHARD), (LAYOUT, SHARD))
    for num_tokens in (0, -1, True, 2.0):
        with pytest.raises(InvalidArgument, match="num_tokens"):
            plan.describe(num_tokens)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="dst_pages: expected at least 2 for 17 tokens"):
        plan.runs([0, 1], [0], 17)
    quantised = TransferPlan.build((LAYOUT, SHARD), (layout_of("nhd", dtype="int8"), SHARD))
    with pytest.raises(Unconvertible, match="converted"):
        quantised.runs([0, 1], [0, 1], 17)


def state_rank(heads: range, truth: Any, pages: list[int]) -> Rank:
    """A rank that holds some heads of an SSM state [8, 4, 8] in each page; NaN elsewhere."""
    layout = KVLayout.opaque((len(heads), 4, 8), "float32", num_heads=len(heads))
    pool = KVPool.create(layout, num_layers=1, num_pages=6)
    state = raw(pool, 0, "k").numpy()[:, 0]
    state[:] = np.nan
    if truth is not None:
        state[pages] = truth[:, heads.start : heads.stop].reshape(len(pages), len(heads), 32)
    return Rank(Shard([0], heads), pool, [raw(pool, 0, "k")], pages)


@pytest.mark.parametrize(("src_tp", "dst_tp"), [(2, 4), (8, 1), (3, 2)])
def test_states_held_by_heads_are_resharded(src_tp: int, dst_tp: int) -> None:
    truth = np.random.default_rng(0).random((3, 8, 4, 8), np.float32)
    cut = [
        [
            Shard.of_rank(num_layers=1, num_kv_heads=8, tp_rank=rank, tp_size=size).kv_heads
            for rank in range(size)
        ]
        for size in (src_tp, dst_tp)
    ]
    sources = [state_rank(heads, truth, [5, 1, 2]) for heads in cut[0]]
    for heads in cut[1]:
        rank = state_rank(heads, None, [0, 4, 3])
        rows = 0
        for source in sources:
            plan = plan_of(source, rank)
            rows += apply(plan, source, rank, 3)[0] if plan is not None else 0
        assert rows == 3 * len(heads)
        assert rank.bytes() == state_rank(heads, truth, [0, 4, 3]).bytes()


def test_a_state_by_heads_in_bytes() -> None:
    assert KVLayout.opaque((8, 4, 8), "float32", num_heads=8).layer_bytes(1) == 8 * 4 * 8 * 4
    with pytest.raises(InvalidArgument, match="page_shape"):
        KVLayout.opaque((9, 4), "float32", num_heads=2)
    plan = TransferPlan.build(
        (KVLayout.opaque((4, 4, 8), "float32", num_heads=4), Shard([0], range(4, 8))),
        (KVLayout.opaque((2, 4, 8), "float32", num_heads=2), Shard([0], range(4, 6))),
    )
    assert plan.heads == (2, 0, 0, 4)
    assert plan.describe(3).dst_bytes == 3 * 2 * 4 * 8 * 4
    (copies,) = plan.runs([5, 1, 2], [0, 1, 2], 3).values()
    assert copies.tolist() == [[512, 256, 256], [1024, 512, 256], [2560, 0, 256]]
