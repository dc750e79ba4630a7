"""Shard.of_rank: which layers and KV heads each rank of an engine holds."""

from __future__ import annotations

from typing import Any

import pytest

from kvlink import Shard
from kvlink.errors import InvalidArgument

SIZES = (1, 2, 3, 4, 8)


def heads_of(num_kv_heads: int, tp_size: int) -> list[Shard]:
    return [
        Shard.of_rank(num_layers=2, num_kv_heads=num_kv_heads, tp_rank=rank, tp_size=tp_size)
        for rank in range(tp_size)
    ]


@pytest.mark.parametrize("tp_size", SIZES)
@pytest.mark.parametrize("num_kv_heads", [1, 2, 3, 5, 8])
def test_every_head_is_held_by_as_many_ranks_as_its_replicas_say(
    num_kv_heads: int, tp_size: int
) -> None:
    shards = heads_of(num_kv_heads, tp_size)
    for head in range(num_kv_heads):
        replicas = [shard.replica for shard in shards if head in shard.kv_heads]
        assert replicas == [(idx, len(replicas)) for idx in range(len(replicas))]
        assert replicas
    sizes = [len(shard.kv_heads) for shard in shards]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)
    assert [shard.kv_heads.start for shard in shards] == sorted(
        shard.kv_heads.start for shard in shards
    )


def test_heads_by_example() -> None:
    assert [shard.kv_heads for shard in heads_of(8, 3)] == [range(3), range(3, 6), range(6, 8)]
    assert [(shard.kv_heads[0], shard.replica) for shard in heads_of(2, 4)] == [
        (0, (0, 2)), (0, (1, 2)), (1, (0, 2)), (1, (1, 2)),
    ]  # fmt: skip
    assert [(shard.kv_heads[0], shard.replica) for shard in heads_of(2, 3)] == [
        (0, (0, 2)), (0, (1, 2)), (1, (0, 1)),
    ]  # fmt: skip
    assert [shard.replica for shard in heads_of(1, 3)] == [(0, 3), (1, 3), (2, 3)]  # a latent


def layers_of(num_layers: int, pp_size: int, **arguments: Any) -> list[tuple[int, ...]]:
    return [
        Shard.of_rank(
            num_layers=num_layers, num_kv_heads=4, tp_rank=0, tp_size=1, pp_rank=rank,
            pp_size=pp_size, **arguments,
        ).layers
        for rank in range(pp_size)
    ]  # fmt: skip


def test_layers_by_example() -> None:
    assert layers_of(4, 2) == [(0, 1), (2, 3)]
    assert layers_of(5, 3) == [(0, 1), (2, 3), (4,)]
    assert layers_of(5, 3, pp_layers=[1, 3, 1]) == [(0,), (1, 2, 3), (4,)]
    assert layers_of(8, 2, layers=range(3, 8, 4)) == [(3,), (7,)]


@pytest.mark.parametrize(
    ("message", "changed"),
    [
        ("tp_rank: expected 0 to 1; got 2", {"tp_rank": 2}),
        ("tp_rank: expected 0 to 1; got -1", {"tp_rank": -1}),
        ("tp_rank: expected 0 to 1; got 1.0", {"tp_rank": 1.0}),
        ("pp_rank: expected 0 to 0; got 1", {"pp_rank": 1}),
        ("tp_size: expected a positive integer; got 0", {"tp_size": 0}),
        ("num_kv_heads: expected a positive integer", {"num_kv_heads": -8}),
        ("pp_size: expected at most 4 layers; got 5", {"pp_size": 5}),
        ("pp_layers: expected 2 positive counts with sum 4; got .3, 2.",
         {"pp_size": 2, "pp_layers": [3, 2]}),
        ("pp_layers: expected 2 positive", {"pp_size": 2, "pp_layers": [4, 0]}),
        ("pp_layers: expected 2 positive", {"pp_size": 2, "pp_layers": [4]}),
        ("pp_rank: rank 0 of 2 holds none", {"pp_size": 2, "layers": [3]}),
    ],
)  # fmt: skip
def test_refusals(message: str, changed: dict[str, Any]) -> None:
    arguments: dict[str, Any] = dict(num_layers=4, num_kv_heads=8, tp_rank=0, tp_size=2)
    with pytest.raises(InvalidArgument, match=message):
        Shard.of_rank(**(arguments | changed))


@pytest.mark.parametrize("replica", [(1, 1), (-1, 2), (0, 0), (0, 65536), (0,), None, (0.0, 1)])
def test_replica_refusals(replica: Any) -> None:
    with pytest.raises(InvalidArgument, match="replica: expected"):
        Shard([0], [0], replica)
