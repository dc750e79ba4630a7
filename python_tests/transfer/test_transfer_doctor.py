"""`kvlink doctor --peer` tells the truth about a link, and each way to have none apart."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from receiving import SPEC

from kvlink.doctor_peer import EXITS
from kvlink.testing.transfer_peer import SECRET, Peer
from kvlink.transfer.paths import ucx

pytestmark = pytest.mark.two_process


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    with Peer(SPEC) as peer:
        yield peer


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    file = tmp_path / "secret"
    file.write_bytes(SECRET + b"\n")
    return file


def doctor(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvlink.cli", "doctor", *map(str, arguments)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_the_path_of_a_link(peer: Peer, secret: Path) -> None:
    address = peer.address.decode()
    done = doctor("--peer", address, "--secret-file", secret, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["peer"]
    assert (found["name"], found["address"]) == ("peer", address)
    assert (found["path"], found["path_detail"]) == ("host_shm", "mapped memory")
    assert found["why_not"] == {}
    assert found["control_version"] == 2
    assert found["round_trip_ms"] > 0
    assert found["connect_ms"] > 0
    text = doctor("--peer", address, "--secret-file", secret, "--require", "host_shm").stdout
    assert text.splitlines()[0] == f"peer 'peer' at {address}"
    assert "host_shm (mapped memory)" in text


def test_a_required_path(peer: Peer, secret: Path) -> None:
    arguments = ("--peer", peer.address.decode(), "--secret-file", secret, "--require", "ucx")
    if not ucx.report()["available"]:
        failed(6, "PathUnavailable", *arguments)
        return
    done = doctor(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["peer"]
    assert found["path"] == "ucx"
    assert found["path_detail"]
    assert list(found["why_not"]) == ["host_shm"]


def test_an_address_in_a_file(peer: Peer, secret: Path, tmp_path: Path) -> None:
    file = tmp_path / "decode-0"
    file.write_bytes(peer.address + b"\n")
    done = doctor("--peer", file, "--secret-file", secret)
    assert done.returncode == 0, done.stderr
    assert "peer 'peer'" in done.stdout


def failed(code: int, error: str, *arguments: object) -> str:
    """The message; exit status, stderr and JSON agree about what went wrong."""
    plain, as_json = doctor(*arguments), doctor(*arguments, "--json")
    assert (plain.returncode, as_json.returncode) == (code, code), plain.stderr
    assert not plain.stdout
    found = json.loads(as_json.stdout)["peer"]
    assert found["error"] == error
    assert found["what"] in plain.stderr
    return str(found["message"])


def test_wrong_secret(peer: Peer, tmp_path: Path) -> None:
    file = tmp_path / "other"
    file.write_bytes(b"not the secret of these tests")
    failed(4, "SecretMismatch", "--peer", peer.address.decode(), "--secret-file", file)


def test_nobody_there(secret: Path) -> None:
    failed(3, "PeerUnreachable", "--peer", "kvlink:2;unix=kvlink-nobody", "--secret-file", secret)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, says nothing
        address = f"kvlink:2;tcp=127.0.0.1:{silent.getsockname()[1]}"
        arguments = ("--peer", address, "--secret-file", secret, "--timeout", 0.5)
        failed(3, "PeerUnreachable", *arguments)


def test_another_version(secret: Path) -> None:
    failed(5, "VersionMismatch", "--peer", "kvlink:9;unix=kvlink-x", "--secret-file", secret)


def test_a_path_that_is_not_there(peer: Peer, secret: Path) -> None:
    address = peer.address.decode()
    message = failed(
        6, "PathUnavailable", "--peer", address, "--secret-file", secret, "--require", "nccl"
    )
    assert "nccl" in message


@pytest.mark.parametrize("what", ["address", "secret", "file", "path"])
def test_mistakes_of_the_caller(peer: Peer, secret: Path, tmp_path: Path, what: str) -> None:
    short = tmp_path / "short"
    short.write_bytes(b"short")
    address = peer.address.decode()
    arguments = {
        "address": ("--peer", "kvlink:2;", "--secret-file", secret),
        "secret": ("--peer", address, "--secret-file", short),
        "file": ("--peer", address, "--secret-file", tmp_path / "none"),
        "path": ("--peer", address, "--secret-file", secret, "--require", "carrier pigeon"),
    }[what]
    error = "FileNotFoundError" if what == "file" else "InvalidArgument"
    failed(2, error, *arguments)


def test_no_secret_file(peer: Peer) -> None:
    done = doctor("--peer", peer.address.decode())
    assert done.returncode == 2
    assert "--secret-file" in done.stderr


def test_exit_statuses_are_distinct() -> None:
    by_code = {code: what for _, code, what in EXITS}
    assert len(set(by_code.values())) == len(by_code)
    assert 0 not in by_code
    assert 1 not in by_code
