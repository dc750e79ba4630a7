"""A plugin of pytest: the whole session has a pretended device, with emulated kernels."""

from __future__ import annotations

import sys
from contextlib import ExitStack

import pytest
from emulated import emulation
from pretended import pretended_cuda

_device = ExitStack()


@pytest.hookimpl(tryfirst=True)
def pytest_configure() -> None:
    """Before tests are collected: what they need decides whether they are skipped."""
    sys.modules["kvlink._cuda"] = emulation().module
    _device.enter_context(pretended_cuda())


def pytest_unconfigure() -> None:
    """The device is gone."""
    _device.close()
