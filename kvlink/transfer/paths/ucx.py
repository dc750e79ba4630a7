"""The ucx path: active messages, puts and gets over whatever UCX finds between two peers."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import struct
import threading
import time
from typing import TYPE_CHECKING, Any

from kvlink import _C
from kvlink.errors import InvalidArgument, Unsupported
from kvlink.pool import KVPool
from kvlink.transfer.errors import PathUnavailable, ProtocolError
from kvlink.transfer.paths import Blob, Path, Peer
from kvlink.transfer.paths.base import BaseLink, BasePath, check_told, slot_key
from kvlink.transfer.region import RegionDescriptor

if TYPE_CHECKING:
    from kvlink.transfer.descriptor import Descriptor
    from kvlink.transfer.paths import Missing
    from kvlink.transfer.plan import TransferPlan
    from kvlink.transfer.region import Region

_BEGIN_TIMEOUT_NS = 5_000_000_000
_CHECKSUM_BYTES = 8
_RELEASE = struct.Struct("<HH")  # major and minor of UCX
# A context and its workers open about 20; UCX ends the process where it cannot have them.
_DESCRIPTORS = 64
_VERBS = ("rc_verbs", "rc_mlx5", "dc_mlx5", "ud_verbs", "ud_mlx5", "gga_mlx5", "srd")


_started_in: int | None = None  # which process UCX's own threads are in


def library_candidates() -> list[str]:
    """Where libucp is looked for, in order: KVLINK_UCX_LIBRARY alone if it is set, else the
    libucx-cu12/-cu13 package, then what the dynamic linker finds."""
    wanted = os.environ.get("KVLINK_UCX_LIBRARY")
    if wanted:
        return [wanted]
    found = []
    package = importlib.util.find_spec("libucx")
    for folder in (package.submodule_search_locations or []) if package else []:
        path = os.path.join(folder, "lib", "libucp.so.0")
        if os.path.exists(path):
            found.append(path)
    return [*found, "libucp.so.0"]


def load() -> tuple[str, str]:
    """(path, version) of the UCX library, loaded once; raises Unsupported with the reason."""
    if not _C.UCX_BUILT:
        raise Unsupported("kvlink was built without UCX's headers (KVLINK_UCX_HOME in setup.py)")
    library: tuple[str, str] = _C.ucx_load(library_candidates())
    return library


def report() -> dict[str, Any]:
    """For `kvlink doctor`: which UCX, and what it can reach."""
    try:
        path, version = load()
        transports = _C.ucx_transports()
    except (Unsupported, RuntimeError) as error:
        return {"available": False, "why": str(error)}
    verbs = sorted({name for name in transports if name.split("/")[0] in _VERBS})
    return {
        "available": True,
        "why": f"UCX {version}",
        "library": path,
        "transports": transports,
        "verbs": verbs or "none: this UCX has no RDMA transports, or the machine no RDMA device",
    }


class Ucx(BasePath):
    """One UCX context for an endpoint, made with its first session."""

    name = "ucx"

    def __init__(self, control: Any) -> None:
        self._control = control
        self._lock = threading.Lock()
        self._hub: Any = None
        self._described: dict[int, Any] = {}  # sessions that wait for their peer, by its bit
        self._release = (0, 0)
        self._missing = self._why_missing()

    def missing(self) -> str | None:
        """No UCX library, or one that cannot start."""
        if _started_in not in (None, os.getpid()):
            return "UCX was at work when this process was forked; start processes with `spawn`"
        return self._missing

    def describe(self, bit: int) -> Blob:
        """The address of a worker made for this peer, and a random number that names the session.
        Regions need no more: a peer learns addresses and keys of pages it was granted."""
        with self._lock:
            _check_descriptors()
            if self._hub is None:
                _note_start()
                self._hub = _C.UcxHub(self._control)
            link = self._hub.open_link(bit)
            stale, self._described[bit] = self._described.get(bit), link
        if stale is not None:
            stale.close(_C.TransferStatus.CANCELLED)
        blob = _RELEASE.pack(*self._release) + link.describe()
        return _checksum(blob) + blob, ()

    def undescribe(self, bit: int) -> None:
        """The peer that was given this bit did not come."""
        with self._lock:
            link = self._described.pop(bit, None)
        if link is not None:
            link.close(_C.TransferStatus.CANCELLED)

    def forget_region(self, region: Region) -> None:
        """Its memory is registered no more, if it was for a put or a get."""
        with self._lock:
            hub = self._hub
        if hub is not None:
            hub.forget(region.pool.view)

    def connect(self, peer: Peer, bit: int, peer_bit: int, blob: bytes, fds: list[int]) -> UcxLink:
        """Connects the worker that was described to the peer's. Raises PathUnavailable where the
        two ends have different releases of UCX, which need not understand each other."""
        with self._lock:
            link = self._described.pop(peer_bit, None)
        if link is None:
            raise ProtocolError("describe: this side has not described itself")
        try:
            check_told("describe", blob, fds, len(blob), 0)
            checksum, blob = blob[:_CHECKSUM_BYTES], blob[_CHECKSUM_BYTES:]
            if checksum != _checksum(blob):  # UCX does not survive every address
                raise ProtocolError("describe: not the address that the peer sent")
            self._check_release(peer, blob[: _RELEASE.size])
            link.connect(blob[_RELEASE.size :], peer.same_host)
        except (ProtocolError, PathUnavailable):
            link.close(_C.TransferStatus.CANCELLED)
            raise
        except (InvalidArgument, RuntimeError) as error:
            link.close(_C.TransferStatus.CANCELLED)
            raise ProtocolError(f"ucx: {error}") from error
        return UcxLink(peer, link)

    def close(self) -> None:
        """Ends the threads."""
        with self._lock:
            self._described.clear()
            hub, self._hub = self._hub, None
        if hub is not None:
            hub.close()

    def _why_missing(self) -> str | None:
        try:
            _, version = load()
        except Unsupported as error:
            return str(error)
        major, minor, *_ = map(int, version.split("."))
        self._release = (major, minor)
        return None

    def _check_release(self, peer: Peer, told: bytes) -> None:
        if len(told) != _RELEASE.size:
            raise ProtocolError("describe: no release of UCX")
        theirs = _RELEASE.unpack(told)
        if theirs != self._release:
            ours, other = (".".join(map(str, release)) for release in (self._release, theirs))
            raise PathUnavailable(
                f"ucx: expected one release of UCX at both ends; got {ours} here and {other} at "
                f"{peer.name!r} (KVLINK_UCX_LIBRARY chooses)"
            )


class UcxLink(BaseLink[RegionDescriptor]):
    """A worker of our own that talks to one of the peer's. To close it destroys the worker: nothing
    comes in through it any more."""

    @property
    def detail(self) -> str:
        """The transports and devices in use."""
        return ", ".join(self._moving.transports()) or "not connected"

    def add_region(self, descriptor: RegionDescriptor, blob: bytes, fds: list[int]) -> None:
        """Remembers its layout."""
        check_told(f"region {descriptor.region_id}", blob, fds, 0, 0)
        self._regions[descriptor.region_id] = descriptor

    def begin(
        self,
        kind: Any,
        descriptor: Descriptor,
        own: Region,
        own_ids: Any,
        plan: TransferPlan,
        generations: Any,
    ) -> Any:
        """Asks the owner of the pages and waits for its answer, for 5 s at most."""
        region = self.region_of(descriptor)
        return self._moving.begin(
            kind, slot_key(descriptor), plan.parts, plan.heads, own.pool.view, own_ids,
            region.layout.to_bytes(), region.num_stored_layers, region.num_pages,
            descriptor.num_tokens, generations, time.monotonic_ns() + _BEGIN_TIMEOUT_NS,
        )  # fmt: skip

    def adopt(self, descriptor: Descriptor) -> tuple[KVPool, Any, Any, Any]:
        """Never: the peer's memory is not mapped here."""
        raise PathUnavailable("ucx: pages can only be used in place over host_shm; pull them")

    def failed(self) -> str | None:
        """UCX lost the peer, or the peer broke the protocol."""
        return self._moving.failed() or None

    def counters(self) -> dict[str, int]:
        """`copied_chunks` went through a buffer, `in_place_chunks` were read by a peer on this host
        where they were packed, `gathered_chunks` were sent from the pages themselves,
        `direct_chunks` were put or got; `credit_waits`: chunks that waited for room in the window;
        `asked_again`: questions to a peer that had been silent; `dropped_messages`: of another
        session, or without a question."""
        counters: dict[str, int] = self._moving.counters()
        return counters

    def quiet(self) -> bool:
        """No transport that this path uses lets a peer write without our worker."""
        return True

    def enter(self, descriptor: Descriptor) -> str:
        """Has the pages pinned for this side and stays inside, as a writer about to put: "OK", or
        why not. For fault injection."""
        region = self._regions.get(descriptor.region_id)
        # Of a region that is gone: its owner says why nobody may enter.
        layer, head = (
            (region.stored_model_layers[0], region.shard.kv_heads.start) if region else (0, 0)
        )
        status = self._moving.enter(
            descriptor.kind, slot_key(descriptor), layer, head,
            time.monotonic_ns() + _BEGIN_TIMEOUT_NS,
        )  # fmt: skip
        return str(status.name)

    def leave(self, descriptor: Descriptor) -> None:
        """Ends what `enter` began; a transfer that may put does so before."""
        self._moving.leave()

    def inject(self, fault: str, count: int = 1) -> None:
        """For fault tests: "drop", "duplicate", "flip_bit" or "delay" the next messages."""
        self._moving.inject(getattr(_C.UcxFault, fault.upper()), count)


def _check_descriptors() -> None:
    """Raises OSError while fewer than UCX may need can be opened."""
    found: list[int] = []
    try:
        while len(found) < _DESCRIPTORS:
            found.append(os.eventfd(0, os.EFD_CLOEXEC))
    except OSError as error:
        why = f"UCX needs {_DESCRIPTORS} free descriptors, there are {len(found)} (ulimit -n)"
        raise OSError(error.errno or errno.EMFILE, why) from None
    finally:
        for fd in found:
            os.close(fd)


def _note_start() -> None:
    global _started_in
    _started_in = os.getpid()


def _checksum(blob: bytes) -> bytes:
    return hashlib.blake2b(blob, digest_size=_CHECKSUM_BYTES).digest()


def make(control: Any) -> Path | Missing:
    """For `make_path`."""
    return Ucx(control)
