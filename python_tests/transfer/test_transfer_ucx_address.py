"""Addresses of UCX workers that are none: refused, and the process goes on."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest

from kvlink.transfer.paths.ucx import report

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.skipif(not report()["available"], reason="no UCX here"),
]
# A process of its own, that an address which UCX does not survive ends.
CONNECT = """
import sys
from kvlink import _C
from kvlink.errors import InvalidArgument
from kvlink.transfer.paths import ucx
ucx.load()
control = _C.Control.create(1, 1)
hub = _C.UcxHub(control)
for line in sys.stdin:
    same_host, address = line.split(":")
    link = hub.open_link(0)
    good = link.describe()
    head = good[:24]
    bad = bytes.fromhex(address) if address.strip() != "good" else good[24:]
    try:
        link.connect(head + bad, same_host == "1")
        print("connected", flush=True)
    except (InvalidArgument, RuntimeError):
        print("refused", flush=True)
    link.close(_C.TransferStatus.CANCELLED)
hub.close()
"""


DESCRIBE = """
from kvlink import _C
from kvlink.transfer.paths import ucx
ucx.load()
control = _C.Control.create(1, 1)
hub = _C.UcxHub(control)
link = hub.open_link(0)
print(link.describe()[24:].hex())
link.close(_C.TransferStatus.CANCELLED)
hub.close()
"""


def run(code: str, lines: str, transports: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], input=lines, capture_output=True, text=True, timeout=50,
        env=os.environ | {"UCX_TLS": transports, "UCX_LOG_LEVEL": "fatal"},
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout, done.stderr)
    return done.stdout


def connect(addresses: list[str], transports: str) -> list[str]:
    """What came of each, by turns as if the peer were on another host and on this one."""
    lines = "".join(f"{idx % 2}:{each}\n" for idx, each in enumerate(addresses))
    return run(CONNECT, lines, transports).split()


@pytest.mark.parametrize("transports", ["all", "tcp"])
def test_no_address_at_all(transports: str) -> None:
    rng = random.Random(7)
    other_version = [bytes([0x20 | version]) + rng.randbytes(180) for version in range(2, 16)]
    bad = [b"", b"\0", bytes(8), *other_version]
    told = connect([each.hex() for each in bad] + ["good"] * 2, transports)
    assert told == ["refused"] * len(bad) + ["connected"] * 2


def test_cut_off_and_random() -> None:
    """Over TCP, as between hosts. Some connect to nobody: that shows when the peer is silent."""
    rng = random.Random(11)
    address = bytes.fromhex(run(DESCRIBE, "", "tcp"))
    bad = [address[: rng.randrange(1, len(address))] for _ in range(20)]
    bad += [bytes([rng.randrange(2)]) + rng.randbytes(rng.randrange(9, 300)) for _ in range(20)]
    told = connect([each.hex() for each in bad] + ["good"] * 2, "tcp")
    assert len(told) == len(bad) + 2
    assert told[-2:] == ["connected"] * 2
    assert told.count("refused") >= 20
