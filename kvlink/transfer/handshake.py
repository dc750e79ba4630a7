"""What both ends settle once TLS has proved the secret: the version, and the path."""

from __future__ import annotations

from dataclasses import dataclass

from kvlink.transfer import wire
from kvlink.transfer.errors import (
    ConnectError,
    LinkRefused,
    PathUnavailable,
    ProtocolError,
    VersionMismatch,
)
from kvlink.transfer.fields import Pairs
from kvlink.transfer.paths import PATHS


@dataclass(frozen=True)
class Identity:
    """What an endpoint says of itself, and the versions it speaks."""

    name: str
    epoch: bytes
    min_version: int = wire.MIN_VERSION
    max_version: int = wire.MAX_VERSION


def hello_of(identity: Identity, paths: Pairs) -> wire.Hello:
    """The client's; `paths` tells why each cannot be used (empty where it can)."""
    return wire.Hello(
        identity.min_version, identity.max_version, identity.epoch, identity.name, paths
    )


def welcome_of(identity: Identity, hello: wire.Hello, paths: Pairs) -> wire.Welcome:
    """The server's answer; raises VersionMismatch, PathUnavailable when nothing is shared."""
    version = min(identity.max_version, hello.max_version)
    if version < max(identity.min_version, hello.min_version):
        raise VersionMismatch(
            f"protocol versions: {identity.name!r} speaks {identity.min_version} to "
            f"{identity.max_version}; {hello.name!r} speaks {hello.min_version} to "
            f"{hello.max_version}"
        )
    ours, theirs = dict(paths), dict(hello.paths)
    why_not: list[tuple[str, str]] = []
    for path in PATHS:
        if path not in ours and path not in theirs:
            continue
        why = _both(
            (identity.name, ours.get(path, "not known")),
            (hello.name, theirs.get(path, "not known")),
        )
        if not why:
            return wire.Welcome(version, identity.epoch, identity.name, path, tuple(why_not))
        why_not.append((path, why))
    raise PathUnavailable("no path; " + "; ".join(f"{path}: {why}" for path, why in why_not))


def _both(*reasons: tuple[str, str]) -> str:
    """What (name, reason) says of either end, once where they agree."""
    if len({reason for _, reason in reasons}) == 1:
        return reasons[0][1]
    return "; ".join(f"at {name!r} {reason}" for name, reason in reasons if reason)


def check_welcome(identity: Identity, hello: wire.Hello, welcome: wire.Welcome) -> None:
    """The client's look at what was chosen; raises VersionMismatch, ProtocolError."""
    if not hello.min_version <= welcome.version <= hello.max_version:
        raise VersionMismatch(
            f"protocol version: expected {hello.min_version} to {hello.max_version}; "
            f"{welcome.name!r} chose {welcome.version}"
        )
    if dict(hello.paths).get(welcome.path) != "":
        raise ProtocolError(f"welcome: path {welcome.path!r} cannot be used by {identity.name!r}")


_CODES: tuple[tuple[type[Exception], int, type[ConnectError]], ...] = (
    (VersionMismatch, wire.RefuseCode.VERSION, VersionMismatch),
    (PathUnavailable, wire.RefuseCode.PATH, PathUnavailable),
    (ProtocolError, wire.RefuseCode.MALFORMED, LinkRefused),
)


def refusal(error: Exception) -> wire.Refuse:
    """The frame that tells a peer why it is refused."""
    code = next((code for kind, code, _ in _CODES if isinstance(error, kind)), wire.RefuseCode.BUSY)
    return wire.Refuse(code, str(error))


def refused(frame: wire.Refuse) -> ConnectError:
    """The error behind a peer's refusal."""
    kind = next((kind for _, code, kind in _CODES if code == frame.code), LinkRefused)
    return kind(f"refused by the peer: {frame.message}")
