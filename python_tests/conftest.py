"""Profiles of hypothesis, and which build the tests run on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # the GPU tests do without
    pass
else:
    _SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
    settings.register_profile("default", deadline=None, suppress_health_check=_SLOW)
    settings.register_profile(
        "sanitize", deadline=None, max_examples=15, suppress_health_check=_SLOW, database=None
    )
    settings.load_profile("default")


def pytest_configure() -> None:
    """Refuses to test another build than the one that was asked for. torch, which computes small
    references here, gets one thread: those that wait for its next operator spin, on cores that
    kvlink's threads need."""
    from kvlink import _C

    build = os.environ.get("KVLINK_EXPECTED_BUILD")
    if build and Path(build) not in Path(_C.__file__).parents:
        raise pytest.UsageError(f"expected kvlink._C of {build}; got {_C.__file__}")
    with suppress(ImportError):
        import torch

        torch.set_num_threads(1)


@pytest.fixture
def restored_settings() -> Iterator[None]:
    """For tests that choose a SIMD level or a number of threads."""
    from kvlink import _C

    level, threads = _C.simd_level(), _C.num_threads()
    yield
    _C.set_simd_level(level)
    _C.set_num_threads(threads)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a CUDA device are skipped where there is none."""
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(params=["portable", "avx2", "avx512"])
def simd_level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test once per level that this CPU runs."""
    from kvlink import _C

    if request.param not in _C.supported_simd_levels():
        pytest.skip(f"this CPU does not run {request.param}")
    before = _C.simd_level()
    _C.set_simd_level(request.param)
    yield request.param
    _C.set_simd_level(before)
