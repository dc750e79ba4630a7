"""`place`: a test that takes it runs once for every backend of this process."""

from __future__ import annotations

import pytest
from emulated import emulated_cuda
from places import Place, places

__all__ = ["emulated_cuda"]


@pytest.fixture(params=places(), ids=str)
def place(request: pytest.FixtureRequest) -> Place:
    """A backend and its memory."""
    found: Place = request.param
    if found.device == "emulated":
        request.getfixturevalue("emulated_cuda").seed(1)
    return found
