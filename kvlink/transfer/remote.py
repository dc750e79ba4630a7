"""What a link knows of its peer's pools, and how descriptors of grants and offers name them."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from kvlink import _C
from kvlink.errors import InvalidArgument
from kvlink.pool import KVPool
from kvlink.transfer import wire
from kvlink.transfer.connecting import PeerSide, add_region
from kvlink.transfer.descriptor import Descriptor
from kvlink.transfer.errors import Unconvertible, UnknownRegion
from kvlink.transfer.plan import TransferPlan
from kvlink.transfer.region import Region
from kvlink.transfer.reservation import Reservation

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_REGION_WAIT = 5.0  # s, for a region that was registered a moment ago


class Remote:
    """A peer's regions, mapped here, and the plans between them and ours."""

    def __init__(self, side: PeerSide, descriptor_key: bytes) -> None:
        self._name, self._epoch = side.peer.name, side.peer.epoch
        self._control = side.control
        self._key = descriptor_key
        self._regions = side.regions
        self._changed = threading.Condition()
        self._plans: dict[tuple[str, int, int], TransferPlan] = {}

    def add(self, frame: wire.Frame, fds: list[int]) -> None:
        """Service thread: the peer registered another pool."""
        with self._changed:
            add_region(self._regions, frame, fds)
            self._changed.notify_all()

    def parse(self, kind: Any, token: Any) -> Descriptor:
        """A descriptor of this peer's current session; raises InvalidDescriptor, UnknownRegion."""
        if isinstance(token, Reservation):
            token = token.to_bytes()
        if not isinstance(token, (bytes, bytearray, memoryview)):
            raise InvalidArgument(f"{kind.name.lower()}: expected its bytes; got {token!r}")
        descriptor = Descriptor.from_bytes(bytes(token), self._key, kind)
        if descriptor.epoch != self._epoch:
            raise UnknownRegion(
                f"the {kind.name.lower()} was made by another endpoint, or before "
                f"{self._name!r} restarted"
            )
        return descriptor

    def pool(self, descriptor: Descriptor) -> KVPool:
        """The mapped pool that it names; raises UnknownRegion."""
        number = descriptor.region_id
        if number not in self._regions:
            with self._changed:
                self._changed.wait_for(lambda: number in self._regions, _REGION_WAIT)
        region = self._regions.get(number)
        if region is None or region.pool is None:
            raise UnknownRegion(f"{self._name!r} has no shared region {number} on this link")
        return region.pool

    def pages(self, descriptor: Descriptor) -> npt.NDArray[np.int32]:
        """The page ids that it names, where they lie: read-only, and not checked yet."""
        pages: npt.NDArray[np.int32] = self._control.page_list(
            descriptor.first_page, descriptor.num_pages
        )
        return pages

    def plan(self, kind: Any, own: Region, descriptor: Descriptor) -> TransferPlan:
        """The cut of our region and the one it names, made once; raises Unconvertible."""
        name = (kind.name, own.region_id, descriptor.region_id)
        plan = self._plans.get(name)
        if plan is None:
            pair = (own.descriptor, self._regions[descriptor.region_id].descriptor)
            src, dst = pair if kind == _C.SlotKind.GRANT else pair[::-1]
            if dst.num_stored_layers > _C.MAX_STORED_LAYERS:
                raise Unconvertible(f"shards: more than {_C.MAX_STORED_LAYERS} stored layers")
            plan = self._plans[name] = TransferPlan.build(src, dst)
        return plan
