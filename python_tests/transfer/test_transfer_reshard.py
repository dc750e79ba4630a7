"""Ranks of two engines, linked: fan-in, fan-out, push and pull, whatever the cut."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest

from kvlink import KVPool, Shard
from kvlink.testing.transfer_pool import PoolSpec, pool_bytes
from kvlink.transfer import Endpoint, Unconvertible

SECRET = b"a secret of the resharding tests"
TOKENS = 45
LAYERS = 6
SMALL = PoolSpec(num_pages=14, head_dim=8)


@dataclass(frozen=True)
class Engine:
    """`spec` gives pages and dtype; the cut follows from the rest. `same`: see PoolSpec.layer_map,
    for all layers of the model."""

    spec: PoolSpec = SMALL
    tp: int = 1
    stages: tuple[int, ...] = (LAYERS,)
    num_kv_heads: int = 8
    same: tuple[int, ...] | None = None

    def specs(self) -> list[PoolSpec]:
        specs = []
        for pp_rank in range(len(self.stages)):
            for tp_rank in range(self.tp):
                shard = Shard.of_rank(
                    num_layers=LAYERS, num_kv_heads=self.num_kv_heads, tp_rank=tp_rank,
                    tp_size=self.tp, pp_rank=pp_rank, pp_size=len(self.stages),
                    pp_layers=self.stages,
                )  # fmt: skip
                held = [layer if self.same is None else self.same[layer] for layer in shard.layers]
                stored = list(dict.fromkeys(held))
                specs.append(
                    replace(
                        self.spec, layers=shard.layers, replica=shard.replica,
                        kv_heads=(shard.kv_heads.start, shard.kv_heads.stop),
                        layer_map=tuple(stored.index(layer) for layer in held),
                    )
                )  # fmt: skip
        return specs


NHD, HND = SMALL, replace(SMALL, kind="hnd", page_size=24)
LATENT = replace(SMALL, kind="latent")
SHARED = (0, 1, 2, 2, 2, 2)
CASES = {
    "TP 4 to 2": (Engine(tp=4), Engine(HND, tp=2)),
    "TP 2 to 4": (Engine(tp=2), Engine(replace(NHD, page_size=7, kind="packed"), tp=4)),
    "TP 8 to 3": (Engine(tp=8), Engine(HND, tp=3)),
    "TP 3 to 1, int8": (Engine(tp=3), Engine(replace(HND, dtype="int8", scale="token_head"))),
    "2 heads, TP 8 to 3": (Engine(tp=8, num_kv_heads=2), Engine(HND, tp=3, num_kv_heads=2)),
    "2 heads, TP 1 to 4, fp8": (
        Engine(num_kv_heads=2),
        Engine(replace(HND, dtype="float8_e4m3", scale="tensor"), tp=4, num_kv_heads=2),
    ),
    "PP 2 to 3, TP 2 to 1": (Engine(tp=2, stages=(4, 2)), Engine(HND, stages=(1, 3, 2))),
    "latent, TP 4 to 2": (
        Engine(LATENT, tp=4, num_kv_heads=1),
        Engine(replace(LATENT, page_size=5), tp=2, num_kv_heads=1),
    ),
    "shared layers, TP 2 to 1": (Engine(tp=2, same=SHARED), Engine(HND, same=SHARED)),
    "shared layers, PP 2 to 1": (
        Engine(stages=(3, 3), same=SHARED),
        Engine(HND, same=SHARED),
    ),
}


@pytest.fixture(params=["host_shm", "ucx"])
def path(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@contextlib.contextmanager
def running(engine: Engine, path: str) -> Iterator[list[tuple[Endpoint, KVPool, PoolSpec]]]:
    with contextlib.ExitStack() as stack:
        ranks = []
        for idx, spec in enumerate(engine.specs()):
            endpoint = stack.enter_context(
                Endpoint(
                    f"rank-{idx}", secret=SECRET, paths=(path,), num_slots=4, num_page_entries=256
                )
            )
            pool = spec.build()
            endpoint.register(pool, spec.shard)
            ranks.append((endpoint, pool, spec))
        yield ranks


def pages_of(spec: PoolSpec, seed: int) -> list[int]:
    count = -(-TOKENS // spec.page_size)
    return list(range(seed % 3, seed % 3 + count))[::-1]


def fill(spec: PoolSpec, pool: KVPool, pages: list[int], same: tuple[int, ...] | None) -> None:
    """As the model has it: layers that share KV hold that of the lowest."""
    if same is not None:
        spec = replace(spec, layers=tuple(same[layer] for layer in spec.layers))
    spec.fill(pool, pages, TOKENS, 3)


def held(engine: Engine, spec: PoolSpec, pages: list[int]) -> bytes:
    pool = spec.build()
    fill(spec, pool, pages, engine.same)
    return pool_bytes(pool).tobytes()


@pytest.mark.parametrize("name", CASES)
def test_push(name: str, path: str) -> None:
    src_engine, dst_engine = CASES[name]
    with running(src_engine, path) as sources, running(dst_engine, path) as destinations:
        for idx, (_, pool, spec) in enumerate(sources):
            fill(spec, pool, pages_of(spec, idx), src_engine.same)
        grants, transfers = [], []
        for idx, (decode, _, spec) in enumerate(destinations):
            grant = decode.grant(pages_of(spec, idx), TOKENS)
            grants.append(grant)
            for src_idx, (prefill, _, src_spec) in enumerate(sources):
                if not src_spec.shard.overlaps(spec.shard):
                    continue
                link = prefill.connect(decode.address)
                assert link.path == path
                transfers.append(link.push(pages_of(src_spec, src_idx), grant.to_bytes()))
        for idx, (grant, (_, pool, spec)) in enumerate(zip(grants, destinations, strict=True)):
            grant.wait(10)
            assert pool_bytes(pool).tobytes() == held(dst_engine, spec, pages_of(spec, idx))
        for transfer in transfers:
            transfer.wait_arrived(10)


@pytest.mark.parametrize("name", CASES)
def test_pull(name: str, path: str) -> None:
    src_engine, dst_engine = CASES[name]
    with running(src_engine, path) as sources, running(dst_engine, path) as destinations:
        for src_idx, (prefill, src_pool, src_spec) in enumerate(sources):
            pages = pages_of(src_spec, src_idx)
            fill(src_spec, src_pool, pages, src_engine.same)
            reached = [
                (idx, decode)
                for idx, (decode, _, spec) in enumerate(destinations)
                if src_spec.shard.overlaps(spec.shard)
            ]
            offer = prefill.offer(pages, TOKENS, pulls=len(reached))
            for idx, decode in reached:
                link = decode.connect(prefill.address)
                transfer = link.pull(offer.to_bytes(), pages_of(destinations[idx][2], idx))
                transfer.wait_arrived(10)
            offer.wait_released(10)
        for idx, (_, pool, spec) in enumerate(destinations):
            assert pool_bytes(pool).tobytes() == held(dst_engine, spec, pages_of(spec, idx))


def test_ranks_with_nothing_in_common_are_told(path: str) -> None:
    src, dst = Engine(tp=2), Engine(tp=2)
    with running(src, path) as sources, running(dst, path) as destinations:
        grant = destinations[1][0].grant([1, 2, 3], TOKENS)
        link = sources[0][0].connect(destinations[1][0].address)
        with pytest.raises(Unconvertible, match="no KV head in common"):
            link.push([1, 2, 3], grant.to_bytes())


def test_links_between_equal_pools_share_a_plan(path: str) -> None:
    engine = Engine(tp=2, num_kv_heads=1)  # two replicas: equal as destinations
    with running(Engine(num_kv_heads=1), path) as sources, running(engine, path) as destinations:
        (prefill, _, _), plans = sources[0], []
        for decode, _, _ in destinations:
            grant = decode.grant([1, 2, 3], TOKENS)
            transfer = prefill.connect(decode.address).push([1, 2, 3], grant.to_bytes())
            plans.append(transfer.plan)
            grant.wait(10)
        assert plans[0] is plans[1]


AXES = {
    "kv page slot head dim": (2, 14, 16, 2, 8),
    "page kv head slot dim": (14, 2, 2, 16, 8),
    "page slot head kv dim": (14, 16, 2, 2, 8),
}


@pytest.mark.parametrize("axes", AXES)
def test_engine_tensors_at_either_end(axes: str, path: str) -> None:
    """Two ranks with tensors of their own feed one pool; a third set of tensors pulls from it."""
    order = [axes.split().index(axis) for axis in ("kv", "page", "slot", "head", "dim")]
    pages, at = [5, 13, 2], np.arange(TOKENS)
    where = np.array(pages)[at // 16], at % 16
    truth = np.random.default_rng(0).random((2, TOKENS, 4, 8), np.float32)
    with contextlib.ExitStack() as stack:
        decode, *ranks, reader = (
            stack.enter_context(Endpoint(name, secret=SECRET, paths=(path,)))
            for name in ("decode", "rank-0", "rank-1", "reader")
        )
        spec = replace(HND, layers=(0,), kv_heads=(0, 4))
        decode.register(spec.build(), spec.shard)
        grant = decode.grant([3, 7], TOKENS)
        pushed = []
        for rank, endpoint in enumerate(ranks):
            tensor = np.full(AXES[axes], np.nan, np.float32)
            heads = range(2 * rank, 2 * rank + 2)
            view = tensor.transpose(order)
            for plane in range(2):
                view[plane][where] = truth[plane][:, heads.start : heads.stop]
            endpoint.register(KVPool.wrap([tensor], axes), Shard([0], heads))
            pushed.append(endpoint.connect(decode.address).push(pages, grant.to_bytes()))
        grant.wait(10)
        for transfer in pushed:
            transfer.wait_arrived(10)
        tensor = np.full(AXES[axes], np.nan, np.float32)
        reader.register(KVPool.wrap([tensor], axes), Shard([0], range(1, 3)))
        offer = decode.offer([3, 7], TOKENS)
        transfer = reader.connect(decode.address).pull(offer.to_bytes(), pages)
        transfer.wait_arrived(10)
        view = tensor.transpose(order)
        for plane in range(2):
            assert (view[plane][where] == truth[plane][:, 1:3]).all()
            view[plane][where] = np.nan
        assert np.isnan(tensor).all()
