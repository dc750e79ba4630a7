"""`Peers`: an endpoint's links and sessions, from the first knock to the last sign of life."""

from __future__ import annotations

import secrets
import threading
import time
from typing import TYPE_CHECKING

from kvlink._arguments import one_of
from kvlink.transfer import wire
from kvlink.transfer.accepting import Acceptor
from kvlink.transfer.connecting import Joined, OwnSide
from kvlink.transfer.errors import (
    LinkClosed,
    PathUnavailable,
    TransferError,
    TransferTimeout,
)
from kvlink.transfer.fields import Pairs
from kvlink.transfer.handshake import Identity
from kvlink.transfer.link import Link
from kvlink.transfer.paths import BUILT_PATHS, PATHS, Path, make_path
from kvlink.transfer.reconnecting import Address, Reconnector
from kvlink.transfer.regions import Regions
from kvlink.transfer.service import Service
from kvlink.transfer.session import Session
from kvlink.transfer.tls import Credentials

if TYPE_CHECKING:
    from kvlink.transfer.region import Region
    from kvlink.transfer.slot_table import SlotTable
    from kvlink.transfer.transfer import Transfer

_JOIN_TIMEOUT = 1.0  # s, for threads that look for a peer


class Peers:
    """For `Endpoint`. Sessions are kept until their peers can touch nothing of ours any more, links
    until they are closed."""

    def __init__(
        self, name: str, secret: bytes, descriptor_key: bytes, table: SlotTable, regions: Regions,
        *, listen: str | None, paths: tuple[str, ...], peer_timeout: float,
    ) -> None:  # fmt: skip
        self.epoch = secrets.token_bytes(wire.EPOCH_BYTES)
        self.regions = regions
        self.table = table
        self.watch = table.watch
        self._paths: dict[str, Path] = {path: make_path(path, table.control) for path in paths}
        self.own = OwnSide(
            Identity(name, self.epoch), Credentials(secret), descriptor_key, self._paths,
            peer_timeout, table.watch, table.take_bit, self._free_bit, self._describe,
            self._reasons, self._abandon,
        )  # fmt: skip
        self._lock = threading.RLock()
        self._described: dict[int, set[int]] = {}  # regions told in a handshake, by the peer's bit
        self._sessions: set[Session] = set()
        self._links: dict[Link, Reconnector | None] = {}
        self._accepted: dict[Link, None] = {}  # that `accept` has not given out, in order
        self._arrived = threading.Condition(self._lock)
        self._closed = False
        self._acceptor = Acceptor(self.own, listen, self._on_incoming)
        self.address = self._acceptor.address

    def start(self, service: Service) -> None:
        """Peers are let in from now on."""
        self.service = service
        self._acceptor.start(service)

    def connect(self, address: Address, require: str | None, timeout: float) -> Link:
        """See `Endpoint.connect`."""
        if require is not None:
            self._check_path(require)
        reconnector = Reconnector(self.own, address, require, timeout, self._add_session)
        link = Link(self, reconnector)
        with self._lock:
            if self._closed:
                raise LinkClosed("the endpoint is closed")
            self._links[link] = reconnector
        try:
            joined = reconnector.first(lambda: self._closed)
            if not self._add_session(joined, link):
                raise LinkClosed("the endpoint is closed")
        except BaseException as error:
            self.on_link_closed(link)
            if isinstance(error, TransferError):
                self.watch.unconnected("", error, first=True, again=False)
            raise
        return link

    def accept(self, timeout: float) -> Link:
        """See `Endpoint.accept`."""
        end = time.monotonic() + timeout
        with self._arrived:
            while True:
                left = max(end - time.monotonic(), 0.0)
                if not self._arrived.wait_for(lambda: self._accepted, left):
                    raise TransferTimeout(f"nobody connected within {timeout} s")
                link = next(iter(self._accepted))
                del self._accepted[link]
                if link.state == "connected":  # else it has just ended
                    return link

    @property
    def links(self) -> tuple[Link, ...]:
        """The open links, of either direction."""
        with self._lock:
            return tuple(link for link in self._links if link.num_sessions and not link.closed)

    def tell_regions(self) -> None:
        """Regions were registered or unregistered."""
        for session in self._all_sessions():
            session.tell_regions()

    def transfers_of(self, region: Region) -> list[Transfer]:
        """Transfers between a pool of ours and any peer."""
        sessions = self._all_sessions()
        return [each for one in sessions for each in list(one.transfers) if each.region is region]

    def forget_region(self, region: Region) -> None:
        """Nothing moves from or to it any more."""
        for path in self._paths.values():
            path.forget_region(region)

    def path(self, name: str) -> Path:
        """The endpoint's side of a path."""
        return self._paths[name]

    def missing(self, name: str) -> str:
        """Why a path cannot be used by this endpoint; empty where it can."""
        if name not in self._paths:
            return "it is not among the endpoint's paths"
        return self._paths[name].missing() or ""

    # --- the end ------------------------------------------------------------------------------

    def close_links(self) -> None:
        """No link and no session from now on; the peers' ends are still to be awaited."""
        with self._lock:
            self._closed = True
            self._acceptor.shut()
            links, sessions = dict(self._links), list(self._sessions)
        for link in links:
            link.end()
        for session in sessions:
            session.close()
        for reconnector in links.values():
            if reconnector is not None:
                reconnector.join(_JOIN_TIMEOUT)

    @property
    def quiet(self) -> bool:
        """Every session has ended."""
        return not self._sessions

    def close(self) -> None:
        """The service has stopped: what is left is left as it is."""
        self._acceptor.close()
        for session in self._all_sessions():
            session.on_gone("the endpoint was closed", quiet=False)
        for path in self._paths.values():
            path.close()

    def leave(self) -> None:
        """In a forked child: see `forking`."""
        self._acceptor.leave()
        for link in self._links:
            link.leave()
        for session in self._sessions:
            session.leave()

    # --- for links, sessions and the service thread -----------------------------------------------

    def on_link_closed(self, link: Link) -> None:
        """It will have no further session."""
        with self._lock:
            known = link in self._links
            self._links.pop(link, None)
            self._accepted.pop(link, None)
        if known and link.num_sessions:
            self.watch.link_closed(link.watch)

    def on_session_quiet(self, session: Session) -> None:
        """The peer touches nothing any more: its pins, leases and unfinished writes end."""
        with self._lock:
            if session not in self._sessions:
                return
            self._sessions.discard(session)
        self.table.control.drop_link(session.peer_bit)
        self.table.free_bit(session.peer_bit)
        self.table.reap()

    def tick(self) -> bool:
        """True while something needs watching."""
        accepting = self._acceptor.tick()
        busy = [session.tick(time.monotonic_ns()) for session in self._all_sessions()]
        return any(busy) or accepting

    # --- inside -------------------------------------------------------------------------------

    def _all_sessions(self) -> list[Session]:
        with self._lock:
            return list(self._sessions)

    def _add_session(self, joined: Joined, link: Link | None) -> bool:
        session = Session(self, joined, link)
        with self._lock:
            session.was_told(self._described.pop(joined.peer_bit, set()))
            self._sessions.add(session)
            attached = not self._closed and link is not None and link.attach(session)
        session.start()
        if attached:
            session.tell_regions()
        else:
            session.close()
        return attached

    def _on_incoming(self, joined: Joined) -> None:
        link = Link(self)
        with self._lock:
            self._links[link] = None
        if self._add_session(joined, link):
            with self._arrived:
                self._accepted[link] = None
                self._arrived.notify_all()
        else:
            self.on_link_closed(link)

    def _abandon(self, joined: Joined) -> None:
        self._add_session(joined, None)

    def _free_bit(self, bit: int) -> None:
        with self._lock:
            self._described.pop(bit, None)
        for path in self._paths.values():
            path.undescribe(bit)
        self.table.free_bit(bit)

    def _describe(self, bit: int, path_name: str) -> list[tuple[wire.Frame, tuple[int, ...]]]:
        path, regions = self._paths[path_name], self.regions.all()
        with self._lock:
            self._described[bit] = set(regions)
        try:
            blob, fds = path.describe(bit)
        except (OSError, RuntimeError) as error:
            raise PathUnavailable(f"at {self.own.identity.name!r} {path_name}: {error}") from error
        frames: list[tuple[wire.Frame, tuple[int, ...]]] = [
            (wire.Describe(bit, len(regions), blob), fds)
        ]
        for region in regions.values():
            blob, fds = path.describe_region(region)
            frames.append((region.descriptor.to_frame(blob), fds))
        return frames

    def _reasons(self, same_host: bool, require: str | None) -> Pairs:
        reasons = []
        for name in BUILT_PATHS:
            why = self.missing(name)
            if not why and name == "host_shm" and not same_host:
                why = "reached over TCP, not over a Unix socket of one host"
            if not why and require not in (None, name):
                why = f"{require!r} is required"
            reasons.append((name, why))
        return tuple(reasons)

    def _check_path(self, require: str) -> None:
        one_of("require", require, PATHS)
        if require not in BUILT_PATHS:
            raise PathUnavailable(
                f"require: {require!r} is not in this build; there is {', '.join(BUILT_PATHS)}"
            )
        why = self.missing(require)
        if why:
            raise PathUnavailable(f"require: {require!r}: {why}")
