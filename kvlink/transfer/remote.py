"""What a session knows of its peer's pools, and how descriptors of grants and offers name them."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from kvlink import _C
from kvlink.errors import InvalidArgument
from kvlink.transfer import wire
from kvlink.transfer.descriptor import Descriptor
from kvlink.transfer.errors import ProtocolError, Unconvertible, UnknownRegion
from kvlink.transfer.fds import close_fds
from kvlink.transfer.group_descriptor import GroupDescriptor
from kvlink.transfer.plan import TransferPlan
from kvlink.transfer.region import Region, RegionDescriptor
from kvlink.transfer.regions import MAX_REGIONS
from kvlink.transfer.reservation import Reservation

if TYPE_CHECKING:
    from kvlink.transfer.paths import PathLink, Peer

_MAX_PLANS = 1024
_REGION_WAIT = 5.0  # s, for a region that was registered a moment ago


class Remote:
    """A peer's regions, and the plans between them and ours."""

    def __init__(self, peer: Peer, descriptor_key: bytes, path_link: PathLink) -> None:
        self._name, self._epoch = peer.name, peer.epoch
        self._key = descriptor_key
        self._path_link = path_link
        self.regions: dict[int, RegionDescriptor] = {}
        self._last = -1  # number that was told; each is higher than those before
        self._changed = threading.Condition()
        self._plans: dict[tuple[str, int, int], TransferPlan] = {}

    def add(self, frame: wire.Frame, fds: list[int]) -> None:
        """The peer registered another pool. Raises ProtocolError."""
        try:
            frame = wire.expect(frame, wire.RegionFrame)
            descriptor = RegionDescriptor.from_frame(frame)
            number = descriptor.region_id
            if number <= self._last or len(self.regions) >= MAX_REGIONS:
                raise ProtocolError(f"region {number}: told before, or one too many")
            self._path_link.add_region(descriptor, frame.blob, fds)
        finally:
            close_fds(fds)
        with self._changed:
            self.regions[number] = descriptor
            self._last = number
            self._changed.notify_all()

    def remove(self, number: int) -> None:
        """The peer registers it no more. Raises ProtocolError."""
        with self._changed:
            if self.regions.pop(number, None) is None:
                raise ProtocolError(f"region {number}: not one of the peer's")
            self._plans = {name: plan for name, plan in self._plans.items() if name[2] != number}
            self._changed.notify_all()
        self._path_link.remove_region(number)

    def parse(self, kind: Any, token: Any) -> Descriptor:
        """A descriptor of this peer's current epoch and regions; raises InvalidDescriptor,
        UnknownRegion."""
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
        self._region(descriptor.region_id)
        return descriptor

    def parse_group(self, kind: Any, token: Any) -> GroupDescriptor:
        """The bytes of a group, taken apart; raises InvalidDescriptor."""
        if hasattr(token, "to_bytes"):
            token = token.to_bytes()
        return GroupDescriptor.from_bytes(token, self._key, kind)

    def plan(self, kind: Any, own: Region, descriptor: Descriptor) -> TransferPlan:
        """The cut of our region and the one it names, made once; raises Unconvertible."""
        name = (kind.name, own.region_id, descriptor.region_id)
        plan = self._plans.get(name)
        if plan is None:
            pair = (own.descriptor, self._region(descriptor.region_id))
            src, dst = pair if kind == _C.SlotKind.GRANT else pair[::-1]
            if dst.num_stored_layers > _C.MAX_STORED_LAYERS:
                raise Unconvertible(f"shards: more than {_C.MAX_STORED_LAYERS} stored layers")
            plan = TransferPlan.build(src, dst)
            if len(self._plans) >= _MAX_PLANS:  # of regions of ours that were unregistered
                self._plans.clear()
            self._plans[name] = plan
        return plan

    def _region(self, number: int) -> RegionDescriptor:
        if (region := self.regions.get(number)) is not None:
            return region
        with self._changed:
            self._changed.wait_for(lambda: number <= self._last, _REGION_WAIT)
            region = self.regions.get(number)
        if region is None:
            raise UnknownRegion(f"{self._name!r} has no region {number} registered")
        return region
