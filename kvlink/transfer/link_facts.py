"""What a link tells of itself: its peer, its path, how it stands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvlink.transfer.errors import PeerLost
    from kvlink.transfer.reconnecting import Reconnector
    from kvlink.transfer.session import Session
    from kvlink.transfer.watching import LinkWatch


class LinkFacts:
    """Base of `Link`. While there is no session, the last one is meant."""

    watch: LinkWatch
    _reconnector: Reconnector | None
    _session: Session | None
    _num_sessions: int
    _closed: bool
    _lost: PeerLost | None

    @property
    def path(self) -> str:
        """How bytes move: "host_shm" or "ucx"; that of the last session while there is none."""
        return self._last.path

    @property
    def path_detail(self) -> str:
        """More about it: "mapped memory", or which of UCX's transports and devices."""
        return self._last.path_link.detail

    @property
    def why_not(self) -> dict[str, str]:
        """Why the paths that are faster than `path` were not chosen."""
        return dict(self._last.why_not)

    @property
    def peer_name(self) -> str:
        """What the peer calls itself."""
        return self._last.peer.name

    @property
    def peer_epoch(self) -> bytes:
        """16 bytes, new whenever the peer restarts; its grants and offers of before are gone."""
        return self._last.peer.epoch

    @property
    def version(self) -> int:
        """Of the control protocol."""
        return self._last.peer.version

    @property
    def num_sessions(self) -> int:
        """1, and one more for each time that it connected again."""
        return self._num_sessions

    @property
    def state(self) -> str:
        """ "connected", "reconnecting" (with the last reason why that failed), or "closed"."""
        if self._closed:
            return "closed"
        if self._session is not None and not self._session.closed:
            return "connected"
        if self._reconnector is None:
            return "closed"
        why = self._reconnector.last_error
        return "reconnecting" + (f" ({why})" if why else "")

    def __repr__(self) -> str:
        if self._session is None:
            return "<Link: not connected yet>"
        return f"<Link to {self.peer_name!r} over {self.path}: {self.state}>"

    @property
    def gone(self) -> PeerLost | None:
        """Why there is no session now, when that was not this side's doing."""
        return self._lost or (None if self._closed else self._last.gone)

    def metrics(self) -> dict[str, Any]:
        """What it has counted over all its sessions: plain nested dicts
        (docs/transfer_contract.md, Observability)."""
        about = {"detail": self.path_detail, "state": self.state, "sessions": self.num_sessions}
        return {**about, **self.watch.snapshot()}

    @property
    def closed(self) -> bool:
        """No more transfers, ever: this side closed it, or its session is gone and the peer's next
        one is another link."""
        return self._closed

    @property
    def path_link(self) -> Any:
        """The session's `PathLink`; for tests, which make it do what no transfer would."""
        return self._last.path_link

    @property
    def _last(self) -> Session:
        assert self._session is not None
        return self._session
