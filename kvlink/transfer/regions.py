"""The pools that an endpoint has registered."""

from __future__ import annotations

import threading
from typing import Any

from kvlink._arguments import a, optional, shown
from kvlink.errors import InvalidArgument, Unsupported
from kvlink.layout import Shard
from kvlink.pool import KVPool
from kvlink.transfer.region import Region, RegionDescriptor

MAX_REGIONS = 256  # of an endpoint, at a time


class Regions:
    """Regions by number; numbers are never used again. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._regions: dict[int, Region] = {}
        self._next = 0

    def add(self, pool: KVPool, shard: Shard | None, generations: Any) -> Region:
        """See `Endpoint.register`."""
        a(KVPool)("pool", pool)
        optional(a(Shard))("shard", shard)
        if pool.device[0] != 1:
            raise Unsupported(f"pool: expected CPU memory; got device {pool.device}")
        if shard is None:
            shard = Shard(range(pool.num_layers), range(pool.layout.num_kv_heads))
        with self._lock:
            if len(self._regions) >= MAX_REGIONS:
                raise InvalidArgument(f"pool: expected at most {MAX_REGIONS} registered at a time")
            descriptor = RegionDescriptor(
                self._next, pool.layout, shard, pool.layer_map, pool.num_pages, pool.shared
            )
            descriptor.check()
            region = Region(pool, descriptor, generations)
            self._regions[self._next] = region
            self._next += 1
        return region

    def remove(self, region: Region | KVPool) -> Region:
        """It is found no more."""
        if region is None:
            raise InvalidArgument("region: expected a Region or its KVPool; got None")
        found = self.of(region)
        with self._lock:
            self._regions.pop(found.region_id, None)
        return found

    def of(self, region: Region | KVPool | None) -> Region:
        """A region given as itself, as its pool, or left out when there is only one."""
        regions = self.all()
        if region is None:
            if len(regions) == 1:
                return next(iter(regions.values()))
            which = "name one" if regions else "register a pool first"
            raise InvalidArgument(f"region: {len(regions)} are registered; {which}")
        for candidate in regions.values():
            if region is candidate or region is candidate.pool:
                return candidate
        raise InvalidArgument(
            "region: expected a Region of this endpoint, or its pool; not registered here: got "
            f"{shown(region)}"
        )

    def all(self) -> dict[int, Region]:
        """All of them, by number."""
        with self._lock:
            return dict(self._regions)
