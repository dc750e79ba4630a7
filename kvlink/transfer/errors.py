"""Every way a transfer or a connection can fail, one class each (docs/transfer_contract.md)."""

from __future__ import annotations

from typing import Any

from kvlink.errors import KVLinkError


class TransferError(KVLinkError):
    """Base of the errors below."""


# --- connecting ------------------------------------------------------------------------------


class ConnectError(TransferError):
    """Base: no link was made. Nothing is left behind on either side."""


class PeerUnreachable(ConnectError, ConnectionError):
    """Nobody listens at the address, or the peer did not answer in time."""


class SecretMismatch(ConnectError):
    """The two endpoints do not hold the same secret."""


class VersionMismatch(ConnectError):
    """The two endpoints share no version of the control protocol."""


class PathUnavailable(ConnectError):
    """The path that `require` demands is not there; the message tells what is."""


class LinkRefused(ConnectError):
    """The peer refused for another reason, which the message gives (too many links, ...)."""


class ProtocolError(TransferError):
    """A frame that does not follow the schema: wrong size, type, field or authentication code."""


# --- beginning a transfer --------------------------------------------------------------------


class Unconvertible(TransferError):
    """The two pools' layouts or shards cannot be converted; the message tells why."""


class InvalidDescriptor(TransferError):
    """Bytes of a grant or an offer that are truncated, altered, or made under another secret."""


class UnknownRegion(TransferError):
    """The descriptor names a region or an endpoint that this link does not reach."""


class OutOfSlots(TransferError):
    """The endpoint has as many open grants and offers as it can hold."""


class PagesLent(TransferError):
    """A page is under another grant, or offered; the message names region and page. Nothing was
    lent or begun, and it may be once the pages are released."""


class AlreadyWriting(TransferError):
    """This link already writes to the grant, or the offer is already taken."""


class LinkClosed(TransferError):
    """The link (or its endpoint) was closed on this side."""


# --- how a transfer ends ---------------------------------------------------------------------


class TransferFailed(TransferError):
    """Base: the KV did not arrive, and nobody will read what was written."""


class TransferTimeout(TransferError, TimeoutError):
    """The wait's bound passed. The transfer goes on; waiting again is allowed."""


class TransferCancelled(TransferFailed):
    """The sender cancelled."""


class GrantRevoked(TransferFailed):
    """The owner of the pages took the grant (or the offer) back."""


class GrantExpired(TransferFailed):
    """The deadline of the grant (or the offer, or the lease) passed."""


class PeerLost(TransferFailed):
    """The peer died or closed its link before its part was complete."""


class DigestMismatch(TransferFailed):
    """The bytes in the pages are not those that were sent."""


class GenerationMismatch(TransferFailed):
    """A page was freed or reused while it was granted."""


class RowCountMismatch(TransferFailed):
    """More rows arrived than the grant covers: something was written twice."""


class StaleTransfer(TransferFailed):
    """It had ended before, or the owner of the pages no longer knows how."""


class MoveFailed(TransferFailed):
    """The executor could not move the rows; the message gives its reason."""


_BY_STATUS: dict[str, type[TransferError]] = {
    "CANCELLED": TransferCancelled,
    "REVOKED": GrantRevoked,
    "EXPIRED": GrantExpired,
    "PEER_LOST": PeerLost,
    "DIGEST_MISMATCH": DigestMismatch,
    "GENERATION_MISMATCH": GenerationMismatch,
    "ROW_COUNT_MISMATCH": RowCountMismatch,
    "STALE": StaleTransfer,
    "MOVE_FAILED": MoveFailed,
    "TIMEOUT": TransferTimeout,
    "BUSY": AlreadyWriting,
}


def status_error(status: Any, what: str, message: str = "") -> TransferError:
    """The error behind a `_C.TransferStatus` other than OK and PENDING."""
    kind = _BY_STATUS[status.name]
    summary = (kind.__doc__ or "").split(".")[0]
    return kind(f"{what}: {message or summary}")


def again(error: Exception) -> Exception:
    """The same error once more. One object that is raised each time would keep the frames of all
    who were told."""
    return type(error)(*error.args)


def outcome_name(status: Any) -> str:
    """A `_C.TransferStatus` as metrics and the log name it: "ok", or its error's name."""
    return "ok" if status.name == "OK" else _BY_STATUS[status.name].__name__
