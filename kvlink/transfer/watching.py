"""What links and endpoints tell of themselves: each event is counted, and logged."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kvlink import _C
from kvlink.errors import KVLinkError
from kvlink.transfer.errors import outcome_name
from kvlink.transfer.log import event, logger
from kvlink.transfer.metrics import EndpointMetrics, LinkMetrics, Moving

if TYPE_CHECKING:
    from kvlink.transfer.reservation import Reservation
    from kvlink.transfer.session import Session
    from kvlink.transfer.slot_table import SlotTable

_DEBUG, _INFO, _WARNING = logging.DEBUG, logging.INFO, logging.WARNING
_CORRUPTED = {"DIGEST_MISMATCH", "GENERATION_MISMATCH", "ROW_COUNT_MISMATCH", "MOVE_FAILED"}
_MISTAKES = {"Unconvertible", "InvalidDescriptor", "ProtocolError"}
_MOVE = {_C.SlotKind.GRANT: "push", _C.SlotKind.OFFER: "pull"}
_MAX_PAST = 256  # peers and paths whose closed links are told apart


def _level(status: Any) -> int:
    return _WARNING if status.name in _CORRUPTED else _DEBUG


class LinkWatch:
    """Of one link, over all its sessions."""

    def __init__(self, owner: EndpointWatch) -> None:
        self.metrics = LinkMetrics()
        self._owner = owner
        self._session: Session | None = None
        self._up = False
        self._num_sessions = 0
        self._told: set[str] = set()  # refusals that were logged in this session

    @property
    def peer(self) -> str:
        """Its name, as of the last session."""
        return self._session.peer.name if self._session is not None else ""

    @property
    def path(self) -> str:
        """That of the last session."""
        return self._session.path if self._session is not None else ""

    @property
    def up(self) -> bool:
        """There is a session now."""
        return self._up

    # --- sessions -------------------------------------------------------------------------------

    def session_up(self, session: Session) -> None:
        """There is a new one."""
        self._session, self._up = session, True
        self._num_sessions += 1
        self._told.clear()
        self._owner.link_opened(self)
        name = "link_up"
        if self._num_sessions > 1:
            name = "reconnected"
            self.metrics.count("reconnects")
        event(
            _INFO, name, "%s %r: %s (%s)", name.replace("_", " "), self.peer, self.path,
            session.path_link.detail, version=session.peer.version, **self._fields(),
        )  # fmt: skip

    def session_down(self, session: Session, why: str, lost: bool) -> None:
        """It has ended; `lost`: not by this side's doing."""
        if session is not self._session or not self._up:
            return
        self.metrics.path_ended(self.path_events())
        self._up = False
        if lost:
            self.metrics.count("lost")
        event(
            _INFO, "link_down", "link to %r %s: %s", self.peer, "lost" if lost else "closed", why,
            reason=why, lost=lost, **self._fields(),
        )  # fmt: skip

    # --- transfers ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def beginning(self, kind: Any, what: str = "") -> Iterator[dict[str, str]]:
        """Around what may refuse a transfer (or `what`); `kind` of what the peer opened. What
        is put into the dict that it gives is logged, too: the transfer's id, once known."""
        fields: dict[str, str] = {}
        try:
            yield fields
        except KVLinkError as error:
            self.metrics.refused(error)
            reason = type(error).__name__
            # The caller has the error; what no later try would change is worth a warning, once.
            level = _DEBUG if reason in self._told or reason not in _MISTAKES else _WARNING
            self._told.add(reason)
            what = what or _MOVE[kind]
            event(level, "refused", "%s refused: %s: %s", what, reason, error, kind=what,
                  reason=reason, **fields, **self._fields())  # fmt: skip
            raise

    def begun(self, kind: Any, transfer_id: bytes, moving: Any, num_pages: int) -> Moving:
        """A push or a pull; `kind` of what the peer opened."""
        name = _MOVE[kind]
        self.metrics.begun(name)
        if logger.isEnabledFor(_DEBUG):
            event(_DEBUG, "begun", "%s begun", name, transfer_id=transfer_id.hex(), kind=name,
                  num_pages=num_pages, **self._fields())  # fmt: skip
        return Moving(name, transfer_id, moving, num_pages)

    def posted(self, moving: Moving, layer: int, nanoseconds: int) -> None:
        """A layer of it."""
        self.metrics.posted(nanoseconds)
        if logger.isEnabledFor(_DEBUG):
            event(_DEBUG, "posted", "layer %d posted", layer, layer=layer,
                  transfer_id=moving.transfer_id.hex(), **self._fields())  # fmt: skip

    def posted_all(self, moving: Moving, num_layers: int, nanoseconds: int) -> None:
        """All its layers, in one step."""
        for layer in range(num_layers):
            self.posted(moving, layer, nanoseconds // num_layers)

    def adopted(self, transfer_id: bytes, num_pages: int) -> None:
        """An offer of the peer."""
        self.metrics.count("adopted")
        event(_DEBUG, "adopted", "offer adopted", transfer_id=transfer_id.hex(),
              num_pages=num_pages, **self._fields())  # fmt: skip

    def settle(self, moving: Moving, status: Any) -> None:
        """Its outcome is known."""
        if self.metrics.settle(moving, status):
            self._log_end(moving, status)

    def sweep(self) -> None:
        """Looks for transfers whose outcome is known and that nobody has asked about."""
        for moving, status in self.metrics.sweep():
            self._log_end(moving, status)

    def snapshot(self) -> dict[str, Any]:
        """The counters, as of now."""
        self.sweep()
        total = LinkMetrics()
        total.add(self.metrics, self.path_events())
        return {"peer": self.peer, "path": self.path, **total.snapshot()}

    def path_events(self) -> dict[str, int]:
        """What the path of the present session has counted so far."""
        if self._session is None or not self._up:
            return {}
        return dict(self._session.path_link.counters())

    def _log_end(self, moving: Moving, status: Any) -> None:
        if not logger.isEnabledFor(_level(status)):
            return
        raw, outcome = moving.moving.progress(), outcome_name(status)
        event(
            _level(status), "arrived" if outcome == "ok" else "failed", "%s ended: %s",
            moving.kind, outcome, kind=moving.kind, transfer_id=moving.transfer_id.hex(),
            reason=outcome, num_bytes=raw["num_bytes"], moving_s=raw["moving_ns"] * 1e-9,
            **self._fields(),
        )  # fmt: skip

    def _fields(self) -> dict[str, str]:
        return {"endpoint": self._owner.endpoint, "peer": self.peer, "path": self.path}


class EndpointWatch:
    """Of an endpoint: what it lends, who may not connect, and its links of the past."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.metrics = EndpointMetrics()
        self._open: set[LinkWatch] = set()
        self._past: dict[tuple[str, str], LinkMetrics] = {}
        self._lock = threading.Lock()

    def new_link(self) -> LinkWatch:
        """For a link of this endpoint."""
        return LinkWatch(self)

    def opened(self, lent: Reservation) -> None:
        """A grant or an offer."""
        kind = _kind_of(lent)
        self.metrics.opened(kind)
        name = {"grant": "granted", "offer": "offered"}[kind]
        event(_DEBUG, name, "%s of %d pages", kind, lent.pages.size, num_tokens=lent.num_tokens,
              num_pages=int(lent.pages.size), **self._fields(lent))  # fmt: skip

    def ended(self, lent: Reservation, status: Any, verify_ns: int) -> None:
        """It has its outcome."""
        kind, outcome = _kind_of(lent), outcome_name(status)
        self.metrics.ended(kind, status)
        arrived = kind == "grant" and outcome == "ok"
        if arrived:
            descriptor = lent.region.descriptor
            layers, tokens = descriptor.num_stored_layers, lent.num_tokens
            self.metrics.arrived(
                verify_ns * 1e-9, rows=layers * descriptor.rows_per_token * tokens,
                bytes=layers * descriptor.layout.token_bytes() * tokens, layers=layers,
                pages=int(lent.pages.size), tokens=tokens,
            )  # fmt: skip
        name = "arrived" if arrived else "failed" if kind == "grant" else "ended"
        event(_level(status), name, "%s ended: %s", kind, outcome, reason=outcome,
              verify_s=verify_ns * 1e-9, **self._fields(lent))  # fmt: skip

    def released(self, lent: Reservation) -> None:
        """Nobody else is inside its pages any more."""
        event(_DEBUG, "released", "pages released", num_pages=int(lent.pages.size),
              **self._fields(lent))  # fmt: skip

    def turned_away(self, peer: str, error: Exception) -> None:
        """A peer that wanted to connect."""
        self.metrics.refused(error)
        event(
            _WARNING, "handshake_refused", "%r refused %s: %s: %s", self.endpoint,
            repr(peer) if peer else "an unknown peer", type(error).__name__, error,
            endpoint=self.endpoint, peer=peer, reason=type(error).__name__,
        )  # fmt: skip

    def unconnected(self, peer: str, error: Exception, *, first: bool, again: bool) -> None:
        """An attempt to connect failed; `again`: of a link that was connected before."""
        self.metrics.unconnected(error)
        if again and first:
            event(
                _WARNING, "reconnect_failed", "link to %r does not connect again yet: %s: %s",
                peer, type(error).__name__, error, endpoint=self.endpoint, peer=peer,
                reason=type(error).__name__,
            )  # fmt: skip

    def link_opened(self, watch: LinkWatch) -> None:
        """It has a session."""
        with self._lock:
            self._open.add(watch)

    def link_closed(self, watch: LinkWatch) -> None:
        """Its counters stay, added to those of earlier links to the same peer by the same path."""
        watch.sweep()
        with self._lock:
            self._open.discard(watch)
            key = (watch.peer, watch.path)
            if key not in self._past and len(self._past) >= _MAX_PAST:
                key = ("", watch.path)
            past = self._past.setdefault(key, LinkMetrics())
            past.inherit(watch.metrics, watch.path_events())

    def snapshot(self, table: SlotTable) -> dict[str, Any]:
        """See `Endpoint.metrics`."""
        totals: dict[tuple[str, str], LinkMetrics] = {}
        up: Counter[tuple[str, str]] = Counter()
        with self._lock:
            for key, metrics in self._past.items():
                metrics.sweep()
                totals.setdefault(key, LinkMetrics()).add(metrics)
            for watch in self._open:
                watch.sweep()
                key = (watch.peer, watch.path)
                totals.setdefault(key, LinkMetrics()).add(watch.metrics, watch.path_events())
                up[key] += watch.up
        return {
            "endpoint": self.endpoint,
            **self.metrics.snapshot(_gauges(table)),
            "links": [
                {"peer": key[0], "path": key[1], "up": up[key], **each.snapshot()}
                for key, each in totals.items()
            ],
        }

    def _fields(self, lent: Reservation) -> dict[str, str]:
        return {"endpoint": self.endpoint, "transfer_id": lent.transfer_id.hex()}


def _kind_of(lent: Reservation) -> str:
    return str(lent.kind.name.lower())


def _gauges(table: SlotTable) -> dict[str, dict[str, int]]:
    """What is open, and what has ended while a peer is still inside."""
    gauges = {kind: dict.fromkeys(("open", "quarantined", "quarantined_pages"), 0)
              for kind in ("grant", "offer")}  # fmt: skip
    with table.lock:
        reservations = list(table.open.values())
    for lent in reservations:
        gauge = gauges[_kind_of(lent)]
        if lent.status == _C.TransferStatus.PENDING:
            gauge["open"] += 1
        else:
            gauge["quarantined"] += 1
            gauge["quarantined_pages"] += int(lent.pages.size)
    return gauges
