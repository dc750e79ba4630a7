"""Where no UCX library can be loaded the path is missing, and told so; nothing else is."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.two_process, pytest.mark.timeout(60)]

ENVIRONMENT = os.environ | {"KVLINK_UCX_LIBRARY": "/nonexistent/libucp.so.0"}
CONNECT = """
from kvlink.transfer import Endpoint, PathUnavailable
secret = bytes(range(16))
with Endpoint("a", secret=secret) as a, Endpoint("b", secret=secret) as b:
    print(b.connect(a.address).path)
    try:
        b.connect(a.address, require="ucx")
    except PathUnavailable as error:
        print(error)
"""


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=50, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_doctor_has_the_reason() -> None:
    ucx = json.loads(run("-m", "kvlink.cli", "doctor", "--json"))["paths"]["ucx"]
    assert ucx["available"] is False
    assert "/nonexistent/libucp.so.0" in ucx["why"] or "without UCX's headers" in ucx["why"]


def test_links_take_what_is_there() -> None:
    path, refusal = run("-c", CONNECT).splitlines()
    assert path == "host_shm"
    assert refusal.startswith("require: 'ucx': ")
