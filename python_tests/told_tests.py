"""A plugin of pytest for tools/run_gpu.py: each test is a line of JSON on stdout when it begins and
when it ends, so that whoever reads them knows which one hangs.

KVLINK_TESTS_DONE names a file of tests that are left out, a line each: node ids, or functions (node
ids without parameters). A test that fails and leaves no device behind ends the process: all behind
it would fail as well.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

LOST = 70  # the process's exit code
_stdout = os.dup(1)  # before pytest captures it
_whys: dict[str, str] = {}  # of tests that have failed so far
_seconds: dict[str, float] = {}
_told = False  # here, and not in a process of pytest-xdist


def _tell(**line: object) -> None:
    if _told:
        os.write(_stdout, f"\n{json.dumps(line)}\n".encode())


def pytest_configure(config: pytest.Config) -> None:
    """Workers of pytest-xdist leave the telling to the process that has them."""
    global _told
    _told = not hasattr(config, "workerinput")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without those that are done."""
    path = os.environ.get("KVLINK_TESTS_DONE")
    done = set(Path(path).read_text().splitlines()) if path else set()
    left_out = [
        item for item in items if item.nodeid in done or item.nodeid.partition("[")[0] in done
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_runtest_logstart(nodeid: str) -> None:
    """It begins."""
    _tell(test=nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A part of it has ended."""
    test = report.nodeid
    _seconds[test] = _seconds.get(test, 0.0) + report.duration
    if report.failed:
        _whys[test] = report.longreprtext[-3000:]
    ends = report.when == "teardown" or (report.failed and not _device_is_there())
    if ends or report.when == "???":  # a worker of pytest-xdist has ended in it
        outcome = "failed" if test in _whys else "ended"
        _tell(test=test, outcome=outcome, seconds=round(_seconds.pop(test), 2),
              why=_whys.pop(test, ""))  # fmt: skip
    if report.failed and report.when != "teardown" and ends:
        os._exit(LOST)


def _device_is_there() -> bool:
    import torch

    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except Exception:  # whatever it is, it comes from the device
        return False
    return True


def pytest_sessionfinish(exitstatus: int) -> None:
    """None is left."""
    _tell(session=int(exitstatus))
