"""ucx_perftest's figure, where UCX's wheel or a system UCX has the program."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from harness import Figure

_TIMEOUT = 60.0  # s


def line_rate(
    case: str, piece_bytes: int, note: str, prefixes: Sequence[Sequence[str]],
    hosts: Sequence[str], environment: Mapping[str, str],
) -> Iterator[Figure]:  # fmt: skip
    """Puts of `piece_bytes` from host 1 to host 0; nothing where there is no ucx_perftest."""
    program, libraries = _find()
    if program is None:
        return
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    environment = {**os.environ, **environment, "LD_LIBRARY_PATH": libraries}
    common = [program, "-p", port]
    server = subprocess.Popen(
        [*prefixes[0], *common], env=environment, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        time.sleep(1.0)
        test = ["-t", "ucp_put_bw", "-s", str(piece_bytes), "-n", str((1 << 30) // piece_bytes)]
        client = subprocess.run(
            [*prefixes[1], *common, hosts[0], *test], env=environment, capture_output=True,
            text=True, timeout=_TIMEOUT, check=True,
        )  # fmt: skip
        # Final: iterations, 3 latencies, average and overall bandwidth in MB/s (2^20), 2 rates
        final = re.search(r"^Final:\s+(.*)$", client.stdout, re.MULTILINE)
        if final is None:
            raise ValueError(f"no result in {client.stdout!r}")
        rate = float(final[1].split()[5]) * (1 << 20)
        yield Figure(
            "put", case, "ucx", "uint8", 0, round((256 << 20) / rate * 1e3, 4),
            round(rate / 1e9, 3), 0.0, "none", 0.0, "ucx_perftest", note,
        )  # fmt: skip
    except (subprocess.SubprocessError, ValueError, IndexError) as error:
        print(f"{case}: ucx_perftest is left out: {error}", file=sys.stderr)
    finally:
        server.kill()
        server.wait()


def _find() -> tuple[str | None, str]:
    """The program, and where its libraries are."""
    inherited = os.environ.get("LD_LIBRARY_PATH", "")
    wheel = importlib.util.find_spec("libucx")
    if wheel and wheel.origin:
        folder = Path(wheel.origin).parent
        program = folder / "bin" / "ucx_perftest"
        if os.access(program, os.X_OK):
            return str(program), os.pathsep.join([str(folder / "lib"), inherited])
    return shutil.which("ucx_perftest"), inherited
