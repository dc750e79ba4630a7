"""One process that prefills and decodes in one pool: what several must generate, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tiny import token_ids

import kvlink
from kvlink.serving.batch import Batch, Chunk
from kvlink.serving.checkpoint import eos_ids, load_model
from kvlink.serving.config import ModelConfig
from kvlink.serving.options import SideOptions
from kvlink.serving.sampling import Sampling, sample


class Alone:
    """The model of a checkpoint directory, in float32."""

    def __init__(self, path: Path, side: SideOptions | None = None) -> None:
        self.config = ModelConfig.from_dir(path)
        self.model = load_model(path, self.config, "float32")
        self.eos = eos_ids(path)
        side = side or SideOptions()
        self.page_size = side.page_size
        layout = side.kv_layout(self.config, "float32")
        self.pool = kvlink.KVPool.create(
            layout, num_layers=self.config.num_layers, num_pages=256 // side.page_size
        )

    def generate(self, line: dict[str, Any], index: int = 0) -> list[int]:
        """The continuation of one input line, whose number is `index`."""
        sampling = Sampling(
            line.get("temperature", 0.0), line.get("top_p", 1.0), line.get("seed", index)
        )
        pages = np.arange(self.pool.num_pages, dtype=np.int32)
        prompt, found = token_ids(line), list[int]()
        chunk = Chunk(prompt, 0, pages, True)
        while True:
            logits = self.model(Batch.of([chunk], self.page_size), self.pool)
            found.append(sample(logits[0], sampling, step=len(found)))
            if found[-1] in self.eos or len(found) == line["max_new_tokens"]:
                return found
            chunk = Chunk(found[-1:], len(prompt) + len(found) - 1, pages, True)
