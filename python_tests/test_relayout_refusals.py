"""What relayout_pages and digest_pages refuse, before they move a byte."""

from __future__ import annotations

import pytest
import torch

from kvlink import KVPool, Shard, digest_pages, relayout_pages
from kvlink.errors import InvalidArgument, PageTableError, Unsupported
from kvlink.testing.pools import Filled, make_pool, model_pool


def small() -> tuple[KVPool, Filled]:
    return model_pool(kind="nhd").pool, make_pool("hnd", num_kv_heads=4, num_layers=3, head_dim=16)


@pytest.mark.parametrize("bad", [-1, 6, -7, 2**31 - 1, 2**40])
@pytest.mark.parametrize("side", ["src_pages", "dst_pages"])
def test_a_bad_page_moves_nothing(side: str, bad: int) -> None:
    src, dst = small()
    before = dst.bytes()
    tables = {"src_pages": [0, 1, 2], "dst_pages": [3, 4, 5]}
    tables[side][2] = bad
    with pytest.raises(PageTableError, match=rf"{side}\[2\]: expected a page in \[0, 6\); got "):
        relayout_pages(src, tables["src_pages"], dst.pool, tables["dst_pages"], num_tokens=9)
    assert dst.bytes() == before
    relayout_pages(src, tables["src_pages"], dst.pool, tables["dst_pages"], num_tokens=8)
    with pytest.raises(PageTableError, match=r"pages\[2\]"):
        digest_pages(src, [0, 1, bad], num_tokens=1, start=8)


@pytest.mark.parametrize(
    ("match", "change"),
    [
        ("src_pages: expected at least 3 pages for 9 tokens.*; got 2", {"src_pages": [0, 1]}),
        ("dst_pages: expected at least 4 pages", {"dst_start": 5}),
        ("dst_pages: expected distinct pages; got 3 twice", {"dst_pages": [3, 4, 3]}),
        ("num_tokens: expected >= 0; got -1", {"num_tokens": -1}),
        ("src_pages: expected a first slot >= 0; got -2", {"src_start": -2}),
        ("num_tokens: expected >= 0; got", {"num_tokens": 2**62}),
        ("src_shard: expected 3 layers.*got 1 and 4", {"src_shard": Shard([0], range(4))}),
        ("dst_shard: .*got 3 and 5", {"dst_shard": Shard(range(3), range(5))}),
        (r"src_pages\[1\]: expected an integer; got 'x'", {"src_pages": [0, "x", 1]}),
        ("src_pages: expected dtype int32 or int64; got float32", {"src_pages": torch.zeros(3)}),
    ],
)  # fmt: skip
def test_bad_arguments_move_nothing(match: str, change: dict[str, object]) -> None:
    src, dst = small()
    before = dst.bytes()
    args = dict(src_pages=[0, 1, 2], dst_pages=[3, 4, 5], num_tokens=9) | change
    with pytest.raises(InvalidArgument, match=match):
        relayout_pages(src, args.pop("src_pages"), dst.pool, args.pop("dst_pages"), **args)  # type: ignore[arg-type]
    assert dst.bytes() == before


def test_forms_that_do_not_convert() -> None:
    separate, latent = make_pool("nhd", num_kv_heads=1), make_pool("latent")
    opaque, other = make_pool("opaque"), make_pool("opaque", dtype="float16")

    def refuses(src: Filled, dst: Filled, *names: str) -> None:
        with pytest.raises(Unsupported) as caught:
            relayout_pages(src.pool, [0], dst.pool, [0], num_tokens=1)
        for name in names:
            assert name in str(caught.value)

    refuses(separate, latent, "from separate", "to latent")
    refuses(latent, separate, "from latent", "to separate")
    refuses(opaque, separate, "from opaque", "to separate")
    refuses(opaque, other, "8 x float32", "8 x float16")
    refuses(opaque, make_pool("opaque", head_dim=9), "8 x float32", "9 x float32")
    with pytest.raises(
        InvalidArgument, match=r"head_dim and head_dim_v: expected 8 and 8.*got 8 and 4"
    ):
        relayout_pages(
            separate.pool,
            [0],
            make_pool("nhd", num_kv_heads=1, head_dim_v=4).pool,
            [0],
            num_tokens=1,
        )


def test_no_tokens() -> None:
    src, dst = small()
    before = dst.bytes()
    assert relayout_pages(src, [], dst.pool, [-1], num_tokens=0, digest=True) == (0, 0)
    assert digest_pages(src, [], num_tokens=0) == (0, 0)
    assert dst.bytes() == before
