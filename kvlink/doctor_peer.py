"""`kvlink doctor --peer`: connects to an endpoint for real, and tells what a link to it uses."""

from __future__ import annotations

import json
import os
import secrets
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from kvlink.errors import InvalidArgument
from kvlink.transfer import Endpoint, Link
from kvlink.transfer.errors import (
    ConnectError,
    PathUnavailable,
    PeerUnreachable,
    SecretMismatch,
    TransferError,
    VersionMismatch,
)

# Exit status by what went wrong; the first that fits. argparse, too, ends with 2.
EXITS: tuple[tuple[type[Exception], int, str], ...] = (
    (PeerUnreachable, 3, "unreachable"),
    (SecretMismatch, 4, "wrong secret"),
    (VersionMismatch, 5, "no common version"),
    (PathUnavailable, 6, "path unavailable"),
    (ConnectError, 7, "refused"),
    (TransferError, 8, "protocol error"),
    (InvalidArgument, 2, "usage"),
    (OSError, 2, "usage"),
)
_NUM_ROUNDS = 9


def main(peer: str, secret_file: str, require: str | None, timeout: float, as_json: bool) -> int:
    """The command; returns its exit status, which tells errors apart (`EXITS`)."""
    try:
        found = examine(address_of(peer), secret_of(secret_file), require, timeout)
    except (TransferError, InvalidArgument, OSError) as error:
        code, what = _exit_of(error)
        if as_json:
            failure = {"what": what, "error": type(error).__name__, "message": str(error)}
            print(json.dumps({"peer": failure}, indent=2))
        else:
            print(f"kvlink doctor: {what}: {error}", file=sys.stderr)
        return code
    print(json.dumps({"peer": found}, indent=2) if as_json else text(found))
    return 0


def examine(
    address: bytes, secret: bytes, require: str | None = None, timeout: float = 5.0
) -> dict[str, Any]:
    """Connects, measures the control connection's round trip, and closes again. Raises as
    `Endpoint.connect`."""
    with Endpoint(f"doctor-{os.getpid()}", secret=secret) as endpoint:
        begin = time.perf_counter()
        link = endpoint.connect(address, require=require, timeout=timeout)
        connect_s = time.perf_counter() - begin
        return {
            "address": address.decode(),
            "name": link.peer_name,
            "epoch": link.peer_epoch.hex(),
            "control_version": link.version,
            "path": link.path,
            "path_detail": link.path_detail,
            "why_not": link.why_not,
            "connect_ms": round(connect_s * 1e3, 3),
            "round_trip_ms": round(_round_trip(link, timeout) * 1e3, 3),
        }


def address_of(peer: str) -> bytes:
    """An address as text, or the file that has one (`FileDiscovery`)."""
    if peer.startswith("kvlink:"):
        return peer.encode()
    try:
        return Path(peer).read_bytes().strip()
    except OSError as error:
        raise InvalidArgument(f"--peer: expected kvlink:... or a file with it; {error}") from error


def secret_of(secret_file: str) -> bytes:
    """The file's bytes, without the newline that editors add."""
    return Path(secret_file).read_bytes().rstrip(b"\r\n")


def text(found: dict[str, Any]) -> str:
    """As people read it."""
    lines = [
        f"peer {found['name']!r} at {found['address']}",
        f"  path             {found['path']} ({found['path_detail']})",
        *(f"  not {name:<13}{why}" for name, why in found["why_not"].items()),
        f"  control version  {found['control_version']}",
        f"  round trip       {found['round_trip_ms']:.3f} ms (of the control connection)",
        f"  connecting       {found['connect_ms']:.3f} ms",
    ]
    return "\n".join(lines)


def _round_trip(link: Link, timeout: float) -> float:
    """Median seconds of a question about a transfer that nobody knows."""
    times = []
    for _ in range(_NUM_ROUNDS):
        begin = time.perf_counter()
        link.query(secrets.token_bytes(16), timeout)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _exit_of(error: Exception) -> tuple[int, str]:
    return next((code, what) for kind, code, what in EXITS if isinstance(error, kind))
