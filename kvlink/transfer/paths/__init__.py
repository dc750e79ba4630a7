"""What every path does for a link, and which paths there are.

A path moves the bytes; everything else (who may connect, what a grant promises) is the same for
all. Its frames' contents are opaque to the control plane: blobs, and descriptors on one host.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from kvlink.pool import KVPool
from kvlink.transfer.errors import PathUnavailable

if TYPE_CHECKING:
    from kvlink.transfer.descriptor import Descriptor
    from kvlink.transfer.plan import TransferPlan
    from kvlink.transfer.region import Region, RegionDescriptor

PATHS = ("host_shm", "cuda_ipc", "ucx", "nccl")  # the fastest first
BUILT_PATHS = ("host_shm", "ucx")
Blob = tuple[bytes, tuple[int, ...]]  # what goes with a frame: bytes, and descriptors


@dataclass(frozen=True)
class Peer:
    """Who is at the other end of a session. `same_host`: descriptors can be passed to it."""

    name: str
    epoch: bytes
    version: int
    same_host: bool


class Path(Protocol):
    """An endpoint's side of one path. Calls come from any thread and must not wait for a peer."""

    name: str

    def missing(self) -> str | None:
        """Why it cannot be used here; None when it can."""

    def describe(self, bit: int) -> Blob:
        """For the peer that gets `bit` in our slots. Comes before `connect` on both sides."""

    def undescribe(self, bit: int) -> None:
        """No session came of what `describe` gave; `connect` was not called."""

    def describe_region(self, region: Region) -> Blob:
        """What a peer needs to reach a pool of ours."""

    def forget_region(self, region: Region) -> None:
        """It was unregistered, and nothing moves from or to it any more."""

    def connect(self, peer: Peer, bit: int, peer_bit: int, blob: bytes, fds: list[int]) -> PathLink:
        """A session with the peer that described itself so; `bit` is ours in its slots, `peer_bit`
        its in ours. The caller closes `fds`. Raises ProtocolError."""

    def close(self) -> None:
        """The endpoint ends; every session was closed before."""


class PathLink(Protocol):
    """One session on a path. `detail` tells how exactly ("mapped memory", "tcp/eth0")."""

    @property
    def detail(self) -> str: ...

    def add_region(self, descriptor: RegionDescriptor, blob: bytes, fds: list[int]) -> None:
        """The peer registered a pool. The caller closes `fds`. Raises ProtocolError."""

    def remove_region(self, region_id: int) -> None:
        """The peer registers it no more; what is under way ends by itself."""

    def begin(
        self,
        kind: Any,
        descriptor: Descriptor,
        own: Region,
        own_ids: Any,
        plan: TransferPlan,
        generations: Any,
    ) -> Any:
        """The bound PostedTransfer, or the TransferStatus that tells why there is none. Raises
        UnknownRegion, InvalidArgument."""

    def adopt(self, descriptor: Descriptor) -> tuple[KVPool, Any, Any, Any]:
        """(mapped pool, its page ids, control, slot key) of an offer that this link now holds.
        Raises PathUnavailable where nothing is mapped, UnknownRegion, a status's error."""

    def release(self, key: Any) -> None:
        """Ends what `adopt` began. Idempotent; allowed after `close`."""

    def unadopt(self, key: Any) -> None:
        """Undoes `adopt`, before anything was read: the offer is open again."""

    def failed(self) -> str | None:
        """Why the path itself has lost the peer; polled by the service thread."""

    def counters(self) -> dict[str, int]:
        """What only this path counts, for metrics: name -> number, which only grows."""

    def close(self, status: Any) -> None:
        """Ends every transfer with `status`. This side touches nothing of the peer once it
        returns."""

    def quiet(self) -> bool:
        """After `close` and the end of the control connection: the peer can touch nothing of ours
        any more. Polled; until then its bit and the pages it is inside of stay."""


class Missing:
    """A path that this build or machine lacks."""

    def __init__(self, name: str, reason: str) -> None:
        self.name = name
        self._reason = reason

    def missing(self) -> str:
        """Why."""
        return self._reason

    def describe(self, bit: int) -> Blob:
        """Never chosen."""
        raise PathUnavailable(f"{self.name}: {self._reason}")

    def undescribe(self, bit: int) -> None:
        """Nothing was made."""

    def describe_region(self, region: Region) -> Blob:
        """Never chosen."""
        raise PathUnavailable(f"{self.name}: {self._reason}")

    def forget_region(self, region: Region) -> None:
        """Nothing was kept."""

    def connect(self, peer: Peer, bit: int, peer_bit: int, blob: bytes, fds: list[int]) -> PathLink:
        """Never chosen."""
        raise PathUnavailable(f"{self.name}: {self._reason}")

    def close(self) -> None:
        """Nothing to end."""


def make_path(name: str, control: Any) -> Path:
    """The path of an endpoint whose slots are `control`; a `Missing` when there is none here."""
    try:
        module = importlib.import_module(f"kvlink.transfer.paths.{name}")
    except ModuleNotFoundError:
        return Missing(name, "it is not in this build")
    made: Path = module.make(control)
    return made
