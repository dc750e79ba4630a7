"""The host_shm path: peers on one host map each other's pools and control segments."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from kvlink import _C
from kvlink.errors import InvalidArgument
from kvlink.pool import KVPool
from kvlink.transfer.errors import status_error
from kvlink.transfer.paths import Blob, Peer
from kvlink.transfer.paths.base import BaseLink, BasePath, check_told, slot_key, unusable

if TYPE_CHECKING:
    from kvlink.transfer.descriptor import Descriptor
    from kvlink.transfer.plan import TransferPlan
    from kvlink.transfer.region import Region, RegionDescriptor

_CONTROL = struct.Struct("<Q")  # bytes of the control segment


class HostShm(BasePath):
    """Descriptors of the control segment and of the shared pools go to the peer. Whether peers are
    on one host shows when they connect."""

    name = "host_shm"

    def __init__(self, control: Any) -> None:
        self._control = control

    def describe(self, bit: int) -> Blob:
        """The control segment."""
        return _CONTROL.pack(self._control.num_bytes), (self._control.fd,)

    def describe_region(self, region: Region) -> Blob:
        """The pool's segment, when it is shared."""
        segment = region.pool.segment
        return b"", () if segment is None or not region.descriptor.shared else (segment.fd,)

    def connect(self, peer: Peer, bit: int, peer_bit: int, blob: bytes, fds: list[int]) -> ShmLink:
        """Maps the peer's control segment."""
        check_told("describe", blob, fds, _CONTROL.size, 1)
        try:
            control = _C.Control.attach(fds[0], *_CONTROL.unpack(blob))
            return ShmLink(peer, control, bit)
        except (InvalidArgument, OSError) as error:
            raise unusable("control segment", error) from error


class ShmLink(BaseLink[KVPool]):
    """The peer's memory, mapped here."""

    detail = "mapped memory"

    def __init__(self, peer: Peer, control: Any, bit: int) -> None:
        super().__init__(peer, _C.ShmLink(control, bit))
        self._control = control
        self._bit = bit

    def add_region(self, descriptor: RegionDescriptor, blob: bytes, fds: list[int]) -> None:
        """Maps it, when it is shared."""
        number = descriptor.region_id
        check_told(f"region {number}", blob, fds, 0, int(descriptor.shared))
        if not descriptor.shared:
            return
        try:
            self._regions[number] = KVPool.attach(
                descriptor.layout, num_pages=descriptor.num_pages,
                layer_map=descriptor.layer_map, fd=fds[0],
            )  # fmt: skip
        except (InvalidArgument, OSError) as error:
            raise unusable(f"region {number}", error) from error

    def begin(
        self,
        kind: Any,
        descriptor: Descriptor,
        own: Region,
        own_ids: Any,
        plan: TransferPlan,
        generations: Any,
    ) -> Any:
        """From pool to pool, both mapped."""
        return self._moving.begin(
            kind, descriptor.slot, descriptor.generation, plan.parts, plan.heads, own.pool.view,
            self.region_of(descriptor).view, own_ids, descriptor.first_page, descriptor.num_pages,
            descriptor.num_tokens, generations,
        )  # fmt: skip

    def adopt(self, descriptor: Descriptor) -> tuple[KVPool, Any, Any, Any]:
        """The pages where they lie."""
        (pool, pages), key = self.mapped(descriptor), slot_key(descriptor)
        status = self._control.adopt(key, self._bit)
        if status != _C.TransferStatus.OK:
            raise status_error(status, f"offer {descriptor.transfer_id.hex()}")
        return pool, pages, self._control, key

    def mapped(self, descriptor: Descriptor) -> tuple[KVPool, Any]:
        """The pool, and the page ids where they lie: read-only, and not checked yet."""
        pool = self.region_of(descriptor)
        return pool, self._control.page_list(descriptor.first_page, descriptor.num_pages)

    def release(self, key: Any) -> None:
        """Ends what `adopt` began."""
        self._control.release(key, self._bit)

    def unadopt(self, key: Any) -> None:
        """The offer is open again."""
        self._control.unadopt(key, self._bit)

    def enter(self, descriptor: Descriptor) -> str:
        """Pins the pages and stays inside, as a writer between two instructions: "OK", or why not.
        For fault injection."""
        return str(self._control.enter(slot_key(descriptor), self._bit).name)

    def leave(self, descriptor: Descriptor) -> None:
        """Ends what `enter` began."""
        self._control.leave(slot_key(descriptor), self._bit)

    def quiet(self) -> bool:
        """The kernel closes a process's sockets after its last thread has left user code, and a
        side that closes a link has stopped its own thread before."""
        return True


def make(control: Any) -> HostShm:
    """For `make_path`."""
    return HostShm(control)
