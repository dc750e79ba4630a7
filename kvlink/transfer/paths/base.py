"""What paths and their links do alike; each path adds how it reaches a peer's pools."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

from kvlink import _C
from kvlink.transfer.errors import PathUnavailable, ProtocolError, TransferError, UnknownRegion
from kvlink.transfer.fds import SCARCE
from kvlink.transfer.paths import Blob, Peer

if TYPE_CHECKING:
    from kvlink.transfer.descriptor import Descriptor
    from kvlink.transfer.region import Region

RegionT = TypeVar("RegionT")


def slot_key(descriptor: Descriptor) -> Any:
    """The use of the slot that a grant or an offer stands for."""
    return _C.SlotKey(descriptor.slot, descriptor.generation)


def check_told(what: str, told: bytes, fds: list[int], num_bytes: int, num_fds: int) -> None:
    """Raises ProtocolError where a peer told more or less than its path has to tell."""
    if len(told) != num_bytes or len(fds) != num_fds:
        raise ProtocolError(
            f"{what}: expected {num_bytes} bytes and {num_fds} descriptors; "
            f"got {len(told)} and {len(fds)}"
        )


def unusable(what: str, error: Exception) -> TransferError:
    """What a peer told cannot be used: because this process has too little, or it was wrong."""
    if isinstance(error, OSError) and error.errno in SCARCE:
        return PathUnavailable(f"{what}: {error}")
    return ProtocolError(f"{what}: {error}")


class BasePath:
    """A path that keeps nothing between the steps of a handshake."""

    def missing(self) -> str | None:
        """It is always there."""
        return None

    def undescribe(self, bit: int) -> None:
        """Nothing was made."""

    def describe_region(self, region: Region) -> Blob:
        """Nothing beyond what every path tells."""
        return b"", ()

    def forget_region(self, region: Region) -> None:
        """Nothing was kept of it."""

    def close(self) -> None:
        """Nothing to end."""


class BaseLink(Generic[RegionT]):
    """Remembers the peer's regions in the form that its path needs. `moving`: the bound link."""

    def __init__(self, peer: Peer, moving: Any) -> None:
        self._peer = peer
        self._moving = moving
        self._regions: dict[int, RegionT] = {}

    def remove_region(self, region_id: int) -> None:
        """Transfers and leases under way have what they need."""
        self._regions.pop(region_id, None)

    def region_of(self, descriptor: Descriptor) -> RegionT:
        """Raises UnknownRegion."""
        region = self._regions.get(descriptor.region_id)
        if region is None:
            raise UnknownRegion(
                f"{self._peer.name!r} has no region {descriptor.region_id} that this link reaches"
            )
        return region

    def release(self, key: Any) -> None:
        """Nothing was adopted."""

    def unadopt(self, key: Any) -> None:
        """Nothing was adopted."""

    def failed(self) -> str | None:
        """The control connection tells of every end."""
        return None

    def counters(self) -> dict[str, int]:
        """Nothing beyond what every path counts."""
        return {}

    def close(self, status: Any) -> None:
        """Ends every transfer."""
        self._moving.close(status)
