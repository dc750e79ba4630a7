"""Checkpoints are written once per session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import FAMILIES, make_model, write_checkpoint

Checkpoint = tuple[Any, Path]


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """Models this small only lose time to thread hand-offs."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """`checkpoint(family)`: transformers' model and the directory it was saved to."""
    made: dict[str, Checkpoint] = {}

    def get(family: str) -> Checkpoint:
        if family not in made:
            model = make_model(family, seed=list(FAMILIES).index(family))
            path = tmp_path_factory.mktemp(family)
            shard_size = "200KB" if family == "llama3" else "1GB"
            made[family] = (model, write_checkpoint(model, path, shard_size))
        return made[family]

    return get
