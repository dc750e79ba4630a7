"""`place`: a test that takes it runs once for every backend of this process."""

from __future__ import annotations

import pytest
from places import Place, places


@pytest.fixture(params=places(), ids=lambda place: place.backend)
def place(request: pytest.FixtureRequest) -> Place:
    """A backend and its memory."""
    found: Place = request.param
    return found
