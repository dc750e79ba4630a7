"""Moves a request from four prefill ranks to two decode ranks, in another process, on the way from
pages of 16 to pages of 24 and from NHD to HND.

    python examples/reshard.py
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import secrets
from typing import Any

import numpy as np

from kvlink import Endpoint, KVLayout, KVPool, Shard, append_kv
from kvlink.transfer import TransferPlan

MODEL = dict(num_layers=4, num_kv_heads=8)
HEAD_DIM, NUM_TOKENS = 64, 100


def shards(tp_size: int) -> list[Shard]:
    return [Shard.of_rank(**MODEL, tp_rank=rank, tp_size=tp_size) for rank in range(tp_size)]


def layout(shard: Shard, order: str, page_size: int) -> KVLayout:
    make = {"nhd": KVLayout.nhd, "hnd": KVLayout.hnd}[order]
    return make(
        num_kv_heads=len(shard.kv_heads), head_dim=HEAD_DIM, page_size=page_size, dtype="float16"
    )


def computed(layer: int) -> Any:
    """K and V that the model computed for a layer, all heads."""
    random = np.random.default_rng(layer)
    return random.standard_normal((2, NUM_TOKENS, 8, HEAD_DIM)).astype(np.float16)


def prefill(secret: bytes, tickets: Any) -> None:
    """Four ranks; each sends both decode ranks what they have in common with it."""
    addresses, grants = tickets.recv()
    pages = [3, 1, 4, 0, 5, 9, 2]
    transfers, ranks = [], []
    for rank, shard in enumerate(shards(4)):
        pool = KVPool.create(layout(shard, "nhd", 16), num_layers=4, num_pages=10)
        slots = np.array([pages[t // 16] * 16 + t % 16 for t in range(NUM_TOKENS)])
        endpoint = Endpoint(f"prefill-{rank}", secret=secret)
        endpoint.register(pool, shard)
        ranks.append(endpoint)
        for layer in shard.layers:
            k, v = computed(layer)[:, :, shard.kv_heads.start : shard.kv_heads.stop]
            append_kv(k, v, pool, layer, slots)
        for decode_shard, address, grant in zip(shards(2), addresses, grants, strict=True):
            if shard.overlaps(decode_shard):
                transfers.append(endpoint.connect(address).push(pages, grant))
    for transfer in transfers:
        transfer.wait_arrived(10)
    for endpoint in ranks:
        endpoint.close()


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()  # there are none
    secret = secrets.token_bytes(32)
    context = mp.get_context("spawn")
    tickets, theirs = context.Pipe()
    process = context.Process(target=prefill, args=(secret, theirs))
    process.start()
    pages = [6, 2, 7, 5, 0]
    pools, endpoints, grants = [], [], []
    for rank, shard in enumerate(shards(2)):
        pool = KVPool.create(layout(shard, "hnd", 24), num_layers=4, num_pages=8, shared=True)
        endpoint = Endpoint(f"decode-{rank}", secret=secret)
        endpoint.register(pool, shard)
        grants.append(endpoint.grant(pages, NUM_TOKENS))
        endpoints.append(endpoint)
        pools.append(pool)
    tickets.send(([each.address for each in endpoints], [each.to_bytes() for each in grants]))
    for grant in grants:
        grant.wait(timeout=20)
    for shard, pool in zip(shards(2), pools, strict=True):
        for layer in shard.layers:
            k = np.from_dlpack(pool.k(layer))[pages].reshape(-1, 4, HEAD_DIM)[:NUM_TOKENS]
            heads = slice(shard.kv_heads.start, shard.kv_heads.stop)
            assert (k == computed(layer)[0][:, heads]).all()
    process.join(20)
    for endpoint in endpoints:
        endpoint.close()
    print(f"{NUM_TOKENS} tokens arrived, verified, at both decode ranks (exit {process.exitcode})")

    src, dst = shards(4)[1], shards(2)[0]
    plan = TransferPlan.build((layout(src, "nhd", 16), src), (layout(dst, "hnd", 24), dst))
    print("from rank 1 of 4 to rank 0 of 2:", plan.describe(NUM_TOKENS))


if __name__ == "__main__":
    main()
