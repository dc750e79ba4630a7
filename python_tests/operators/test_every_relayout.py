"""relayout_pages, digest_pages and copy_pages of every backend, byte for byte the reference's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from places import Place, assert_same_bytes

from kvlink import KVPool, Shard, copy_pages, digest_pages, relayout_pages
from kvlink.errors import InvalidArgument, PageTableError, Unsupported
from kvlink.reference.digest_pages import run_digest
from kvlink.reference.relayout_pages import relayout_pages as reference_relayout_pages
from kvlink.testing.pools import DTYPES, KINDS, SCALES, fill_run, make_pool, model_pool, rows_of

WILD = [-1, 2**31 - 1, -(2**31), 12345]


def wild_table(pages: list[int], start: int, num_tokens: int, pool: KVPool) -> torch.Tensor:
    """The page ids of a run, wild ones wherever the run does not look."""
    page_size = pool.layout.page_size
    used = range(start // page_size, -(-(start + num_tokens) // page_size))
    ids = [page if i in used else WILD[i % len(WILD)] for i, page in enumerate(pages)]
    return torch.tensor([*ids, *WILD], dtype=torch.int32)


def check(
    place: Place, src_shape: dict[str, Any], dst_shape: dict[str, Any], *, num_tokens: int,
    src_start: int = 0, dst_start: int = 0, seed: int = 0, **shards: Shard,
) -> None:  # fmt: skip
    src = make_pool(**src_shape, seed=seed)
    ours, expected = (make_pool(**dst_shape, seed=seed + 7) for _ in range(2))
    random = np.random.default_rng(seed)
    src_pages = random.permutation(src.pool.num_pages).tolist()
    dst_pages = random.permutation(ours.pool.num_pages).tolist()
    fill_run(src, src_pages, src_start, num_tokens, seed)
    before = src.bytes()
    run: dict[str, Any] = dict(num_tokens=num_tokens, src_start=src_start, dst_start=dst_start)
    src_pool, dst_pool = place.put(src.pool), place.put(ours.pool)
    result = relayout_pages(
        src_pool, place.put(wild_table(src_pages, src_start, num_tokens, src.pool)),
        dst_pool, place.put(wild_table(dst_pages, dst_start, num_tokens, ours.pool)),
        **run, **shards, token_position=11, digest=True, backend=place.backend,
    )  # fmt: skip
    reference_relayout_pages(src.pool, src_pages, expected.pool, dst_pages, **run, **shards)
    assert_same_bytes(place, dst_pool, ours, expected)
    assert src.bytes() == before
    if not shards:
        digest = digest_pages(
            dst_pool, dst_pages, num_tokens=num_tokens, start=dst_start, token_position=11,
            backend=place.backend,
        )  # fmt: skip
        assert digest == result
        planes = 2 if ours.pool.layout.has_v_plane else 1
        heads = ours.pool.layout.num_kv_heads
        assert result.rows == num_tokens * heads * planes * ours.pool.num_layers
        shard = Shard(range(ours.pool.num_layers), range(heads))
        assert digest.digest == run_digest(
            expected.pool, dst_pages, num_tokens, dst_start, shard, 11
        )


@pytest.mark.parametrize("src_dtype", DTYPES)
def test_every_dtype_and_scale(place: Place, src_dtype: str) -> None:
    first = DTYPES.index(src_dtype)
    for i, (src_scale, dst_scale) in enumerate((a, b) for a in SCALES for b in SCALES):
        for j in range(2):
            check(
                place,
                dict(kind=KINDS[i % 5], dtype=src_dtype, scale=src_scale, num_kv_heads=3,
                     page_size=5, head_dim_v=3),
                dict(kind=KINDS[(i // 5 + first) % 5], dtype=DTYPES[(first + i + 3 * j) % 6],
                     scale=dst_scale, num_kv_heads=3, page_size=7, head_dim_v=3),
                num_tokens=13, src_start=3, dst_start=2, seed=i,
            )  # fmt: skip


@pytest.mark.parametrize("dst_kind", KINDS)
@pytest.mark.parametrize("src_kind", KINDS)
def test_every_layout(place: Place, src_kind: str, dst_kind: str) -> None:
    """Gather, scatter, reorder and repage; long runs of several programs, and short ones."""
    for i, (dtype, num_tokens) in enumerate((("bfloat16", 20), ("float8_e4m3", 1), ("float32", 7))):
        check(
            place,
            dict(kind=src_kind, dtype=dtype, head_dim=37 + 27 * i, head_dim_v=16, num_layers=2),
            dict(kind=dst_kind, dtype=dtype, head_dim=37 + 27 * i, head_dim_v=16, page_size=3,
                 num_pages=9, num_layers=2),
            num_tokens=num_tokens, src_start=1, dst_start=5, seed=i,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("src_shard", "dst_shard"),
    [
        (Shard([5, 6], range(4)), Shard([6, 5], range(2, 6))),
        (Shard([0, 1], range(1, 5)), Shard([1, 3], range(4))),
        (Shard([0, 1], range(4, 8)), Shard([0, 1], range(3, 7))),
    ],
)
def test_shards(place: Place, src_shard: Shard, dst_shard: Shard) -> None:
    for i, (src, dst) in enumerate((("bfloat16", "bfloat16"), ("float32", "int8"))):
        shape = dict(num_kv_heads=4, num_layers=2, head_dim=16)
        check(
            place, dict(kind="nhd", dtype=src, **shape),
            dict(kind="hnd", dtype=dst, scale="token_head" if i else "none", page_size=5, **shape),
            num_tokens=17, dst_start=4, src_shard=src_shard, dst_shard=dst_shard,
        )  # fmt: skip


@pytest.mark.parametrize("head_dim", [1, 7, 128, 1030, 2050])
def test_rows_of_any_length(place: Place, head_dim: int) -> None:
    for src, dst, scale in (
        ("bfloat16", "bfloat16", "none"),
        ("float16", "int8", "token_head"),
        ("int8", "float32", "none"),
    ):
        shape = dict(head_dim=head_dim, head_dim_v=5, num_pages=3)
        check(
            place, dict(kind="nhd", dtype=src, **shape),
            dict(kind="nhd", dtype=dst, scale=scale, **shape), num_tokens=9,
        )  # fmt: skip


@pytest.mark.parametrize("dst_scale", SCALES)
@pytest.mark.parametrize("src_scale", SCALES)
def test_latent(place: Place, src_scale: str, dst_scale: str) -> None:
    for src_dtype, dst_dtype in (("bfloat16", "float8_e4m3"), ("int8", "int8")):
        shape = dict(kind="latent", head_dim=40, head_dim_v=32)
        check(
            place, dict(dtype=src_dtype, scale=src_scale, **shape),
            dict(dtype=dst_dtype, scale=dst_scale, page_size=7, **shape),
            num_tokens=20, src_start=2, dst_start=3,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [*DTYPES, "uint8"])
def test_opaque_pages_move_whole(place: Place, dtype: str) -> None:
    src, dst, expected = (make_pool("opaque", dtype=dtype, head_dim=3001) for _ in range(3))
    src.memory[0].random_(0, 256)
    pool = place.put(dst.pool)
    result = relayout_pages(
        place.put(src.pool), [4, 0, 4], pool, [1, 2, 5], num_tokens=3, digest=True,
        backend=place.backend,
    )  # fmt: skip
    for page, origin in ((1, 4), (2, 0), (5, 4)):
        rows_of(expected.pool, 0, "k")[page] = rows_of(src.pool, 0, "k")[origin]
    assert_same_bytes(place, pool, dst, expected)
    assert result == (3, run_digest(expected.pool, [1, 2, 5], 3, 0, Shard([0], [0])))


def test_shared_stored_layers_move_once(place: Place) -> None:
    shape: dict[str, Any] = dict(kind="nhd", num_layers=4)
    src, twin = (make_pool(layer_map=[0, 1, 0, 1], **shape) for _ in range(2))
    fill_run(src, list(range(6)), 0, 24)
    pool = place.put(twin.pool)
    run: dict[str, Any] = dict(num_tokens=24, backend=place.backend)
    result = relayout_pages(place.put(src.pool), range(6), pool, range(6), digest=True, **run)
    assert result.rows == 24 * 2 * 2 * 2
    assert_same_bytes(place, pool, twin, src)
    assert result == digest_pages(pool, range(6), **run)
    other = make_pool(layer_map=[0, 0, 1, 1], **shape)
    with pytest.raises(Unsupported, match="layers 0 and 1 share a stored layer of the destination"):
        relayout_pages(place.put(src.pool), range(6), place.put(other.pool), range(6), **run)


def test_layers_can_be_chosen_and_may_be_none(place: Place) -> None:
    src = model_pool(kind="nhd")
    dst, expected = (make_pool("nhd", num_kv_heads=4, num_layers=2, head_dim=16) for _ in range(2))
    pools = place.put(src.pool), place.put(dst.pool)
    shards: dict[str, Any] = dict(
        src_shard=Shard([5, 6, 7], range(4)), dst_shard=Shard([7, 6], range(4))
    )
    run: dict[str, Any] = dict(num_tokens=4, backend=place.backend)
    result = relayout_pages(pools[0], [2], pools[1], [3], layers=[7], **run, **shards)
    assert result == (4 * 4 * 2, 0)
    for name in ("k", "v"):
        rows_of(expected.pool, 0, name)[3] = rows_of(src.pool, 2, name)[2]
    assert_same_bytes(place, pools[1], dst, expected)
    with pytest.raises(InvalidArgument, match=r"layers: expected .*\[6, 7\]; got \[5\]"):
        relayout_pages(pools[0], [2], pools[1], [3], layers=[5], **run, **shards)
    for shard in (Shard([7, 8], range(4)), Shard([0, 1], range(4, 8))):
        assert relayout_pages(pools[0], [0], pools[1], [0], dst_shard=shard, **run) == (0, 0)
    run["num_tokens"] = 0
    assert relayout_pages(pools[0], [], pools[1], [-1], digest=True, **run, **shards) == (0, 0)
    assert digest_pages(pools[0], [], **run) == (0, 0)


def test_copy_pages_inside_a_pool(place: Place) -> None:
    shape: dict[str, Any] = dict(kind="hnd", dtype="int8", scale="token_head")
    ours, expected = model_pool(**shape), model_pool(**shape)
    for layer in range(3):
        for name in ("k", "v"):
            scales = torch.from_dlpack(getattr(expected.pool, f"{name}_scale")(layer))
            for tensor in (rows_of(expected.pool, layer, name), scales):
                tensor[[0, 5]] = tensor[[4, 1]]
    pool = place.put(ours.pool)
    ids = torch.tensor([4, 1], dtype=torch.int32)
    copy_pages(pool, place.put(ids), [0, 5], backend=place.backend)
    assert_same_bytes(place, pool, ours, expected)


@pytest.mark.parametrize(
    "make",
    [list, tuple, np.array, torch.tensor, iter,
     lambda ids: torch.tensor([[page, 9] for page in ids])[:, 0]],
)  # fmt: skip
def test_page_ids_of_any_kind(place: Place, make: Any) -> None:
    src = model_pool(kind="nhd")
    dst, expected = (make_pool("nhd", num_kv_heads=4, num_layers=3, head_dim=16) for _ in range(2))
    pool = place.put(dst.pool)
    relayout_pages(
        place.put(src.pool), make([3, 1]), pool, make([0, 5]), num_tokens=8, backend=place.backend
    )
    reference_relayout_pages(src.pool, [3, 1], expected.pool, [0, 5], num_tokens=8)
    assert_same_bytes(place, pool, dst, expected)


# --- refusals -----------------------------------------------------------------------------------


def on_host(place: Place) -> None:
    if place.device != "cpu":
        pytest.skip("a device's values are not looked at before the launch")


@pytest.mark.parametrize("bad", [-1, 6, -7, 2**31 - 1, 2**40])
@pytest.mark.parametrize("side", ["src_pages", "dst_pages"])
def test_a_bad_page_moves_nothing(place: Place, side: str, bad: int) -> None:
    on_host(place)
    src, dst = model_pool(kind="nhd").pool, make_pool("hnd", num_kv_heads=4, num_layers=3,
                                                      head_dim=16)  # fmt: skip
    before = dst.bytes()
    tables = {"src_pages": [0, 1, 2], "dst_pages": [3, 4, 5]}
    tables[side][2] = bad
    run: dict[str, Any] = dict(backend=place.backend)
    with pytest.raises(PageTableError, match=rf"{side}\[2\]: expected a page in \[0, 6\); got "):
        relayout_pages(src, tables["src_pages"], dst.pool, tables["dst_pages"], num_tokens=9, **run)
    assert dst.bytes() == before
    relayout_pages(src, tables["src_pages"], dst.pool, tables["dst_pages"], num_tokens=8, **run)
    with pytest.raises(PageTableError, match=r"pages\[2\]"):
        digest_pages(src, [0, 1, bad], num_tokens=1, start=8, **run)


@pytest.mark.parametrize(
    ("match", "change"),
    [
        ("src_pages: expected at least 3 pages for 9 tokens.*; got 2", {"src_pages": [0, 1]}),
        ("dst_pages: expected at least 4 pages", {"dst_start": 5}),
        ("num_tokens: expected >= 0; got -1", {"num_tokens": -1}),
        ("src_pages: expected a first slot >= 0; got -2", {"src_start": -2}),
        ("num_tokens: expected >= 0; got", {"num_tokens": 2**62}),
        ("src_shard: expected 3 layers.*got 1 and 4", {"src_shard": Shard([0], range(4))}),
        ("dst_shard: .*got 3 and 5", {"dst_shard": Shard(range(3), range(5))}),
        (r"src_pages\[1\]: expected an integer; got 'x'", {"src_pages": [0, "x", 1]}),
        ("src_pages: expected dtype int32 or int64; got float32", {"src_pages": torch.zeros(3)}),
        ("dst_pages: expected distinct pages; got 3 twice", {"dst_pages": [3, 4, 3]}),
    ],
)  # fmt: skip
def test_bad_arguments_move_nothing(place: Place, match: str, change: dict[str, Any]) -> None:
    if "distinct" in match:
        on_host(place)
    dst = make_pool("hnd", num_kv_heads=4, num_layers=3, head_dim=16)
    before = dst.bytes()
    args: dict[str, Any] = dict(src_pages=[0, 1, 2], dst_pages=[3, 4, 5], num_tokens=9) | change
    with pytest.raises(InvalidArgument, match=match):
        relayout_pages(
            place.put(model_pool(kind="nhd").pool), args.pop("src_pages"), place.put(dst.pool),
            args.pop("dst_pages"), backend=place.backend, **args,
        )  # fmt: skip
    assert dst.bytes() == before


def test_a_pages_source_and_destination_differ(place: Place) -> None:
    on_host(place)
    filled = model_pool(kind="hnd")
    with pytest.raises(InvalidArgument, match="no source page of the same pool; got 1"):
        copy_pages(filled.pool, [0, 1], [1, 2], backend=place.backend)
    with pytest.raises(InvalidArgument, match="dst_pages: expected 2 pages; got 1"):
        copy_pages(filled.pool, [0, 1], [2], backend=place.backend)


def test_forms_that_do_not_convert(place: Place) -> None:
    separate, latent = make_pool("nhd", num_kv_heads=1), make_pool("latent")
    opaque, other = make_pool("opaque"), make_pool("opaque", dtype="float16")

    def refuses(src: Any, dst: Any, *names: str) -> None:
        with pytest.raises((Unsupported, InvalidArgument)) as caught:
            relayout_pages(
                place.put(src.pool), [0], place.put(dst.pool), [0], num_tokens=1,
                backend=place.backend,
            )  # fmt: skip
        for name in names:
            assert name in str(caught.value)

    refuses(separate, latent, "from separate", "to latent")
    refuses(latent, separate, "from latent", "to separate")
    refuses(opaque, separate, "from opaque", "to separate")
    refuses(opaque, other, "8 x float32", "8 x float16")
    refuses(opaque, make_pool("opaque", head_dim=9), "8 x float32", "9 x float32")
    narrow = make_pool("nhd", num_kv_heads=1, head_dim_v=4)
    refuses(separate, narrow, "head_dim and head_dim_v: expected 8 and 8", "got 8 and 4")
