"""Mutual proof of the shared secret, and the keys of the frames that follow.

Both proofs are HMAC-SHA256 over the whole transcript (both hellos: versions, nonces, session
epochs, names), each under its own label, so none can be replayed, reflected or downgraded.
"""

from __future__ import annotations

import hmac
import secrets
from dataclasses import dataclass

from kvlink.transfer import wire
from kvlink.transfer.channel import Channel
from kvlink.transfer.errors import (
    ConnectError,
    LinkRefused,
    ProtocolError,
    SecretMismatch,
    VersionMismatch,
)


@dataclass(frozen=True)
class Identity:
    """What an endpoint says of itself, and the versions it speaks."""

    name: str
    epoch: bytes
    secret: bytes
    min_version: int = wire.MIN_VERSION
    max_version: int = wire.MAX_VERSION


@dataclass(frozen=True)
class Peer:
    """Who is at the other end."""

    name: str
    epoch: bytes
    version: int


def hello_of(identity: Identity) -> wire.Hello:
    """A fresh hello."""
    return wire.Hello(
        identity.min_version, identity.max_version, secrets.token_bytes(wire.NONCE_BYTES),
        identity.epoch, identity.name,
    )  # fmt: skip


def challenge_of(identity: Identity, hello: wire.Hello) -> wire.Challenge:
    """The server's answer; raises VersionMismatch when no version is shared."""
    version = min(identity.max_version, hello.max_version)
    if version < max(identity.min_version, hello.min_version):
        raise VersionMismatch(
            f"protocol versions: {identity.name!r} speaks {identity.min_version} to "
            f"{identity.max_version}; {hello.name!r} speaks {hello.min_version} to "
            f"{hello.max_version}"
        )
    unproven = wire.Challenge(
        version, identity.min_version, identity.max_version,
        secrets.token_bytes(wire.NONCE_BYTES), identity.epoch, identity.name, b"",
    )  # fmt: skip
    proof = _proof(identity.secret, b"server", _transcript(hello, unproven))
    return wire.Challenge(**{**unproven.__dict__, "proof": proof})


def answer(identity: Identity, hello: wire.Hello, challenge: wire.Challenge) -> wire.Auth:
    """The client's proof, after it checked the server's; raises SecretMismatch, VersionMismatch."""
    transcript = _transcript(hello, challenge)
    if not hmac.compare_digest(_proof(identity.secret, b"server", transcript), challenge.proof):
        raise SecretMismatch(f"{challenge.name!r} does not hold the secret of {identity.name!r}")
    if not hello.min_version <= challenge.version <= hello.max_version:
        raise VersionMismatch(
            f"protocol version: expected {hello.min_version} to {hello.max_version}; "
            f"{challenge.name!r} chose {challenge.version}"
        )
    return wire.Auth(_proof(identity.secret, b"client", transcript))


def check_auth(
    identity: Identity, hello: wire.Hello, challenge: wire.Challenge, auth: wire.Auth
) -> None:
    """The server's check of the client; raises SecretMismatch."""
    expected = _proof(identity.secret, b"client", _transcript(hello, challenge))
    if not hmac.compare_digest(expected, auth.proof):
        raise SecretMismatch(f"{hello.name!r} does not hold the secret of {identity.name!r}")


def set_keys(
    channel: Channel, secret: bytes, hello: wire.Hello, challenge: wire.Challenge, client: bool
) -> None:
    """Derives a key for each direction from the secret and the transcript."""
    transcript = _transcript(hello, challenge)
    to_server = _proof(secret, b"to server", transcript)
    to_client = _proof(secret, b"to client", transcript)
    channel.set_keys(*((to_server, to_client) if client else (to_client, to_server)))


def refusal(error: Exception) -> wire.Refuse:
    """The frame that tells a peer why it is refused."""
    code = wire.RefuseCode.BUSY
    for kind, number in (
        (ProtocolError, wire.RefuseCode.MALFORMED),
        (VersionMismatch, wire.RefuseCode.VERSION),
        (SecretMismatch, wire.RefuseCode.SECRET),
    ):
        if isinstance(error, kind):
            code = number
    return wire.Refuse(code, str(error))


def refused(frame: wire.Refuse) -> ConnectError:
    """The error behind a peer's refusal."""
    classes: dict[int, type[ConnectError]] = {
        wire.RefuseCode.VERSION: VersionMismatch,
        wire.RefuseCode.SECRET: SecretMismatch,
    }
    return classes.get(frame.code, LinkRefused)(f"refused by the peer: {frame.message}")


def _transcript(hello: wire.Hello, challenge: wire.Challenge) -> bytes:
    return hello.pack() + challenge.claims()


def _proof(secret: bytes, label: bytes, transcript: bytes) -> bytes:
    return hmac.digest(secret, b"kvlink " + label + b"\0" + transcript, "sha256")
