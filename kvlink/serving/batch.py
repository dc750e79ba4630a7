"""`Batch`: the tokens of one step and where their KV goes, as model and operators take it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[Any]


@dataclass(frozen=True)
class Chunk:
    """The next tokens of one sequence: `token_ids` at positions `start`, `start + 1`, ..."""

    token_ids: Sequence[int]
    start: int
    pages: IntArray  # int32, enough for start + len(token_ids) tokens
    wants_logits: bool  # of its last token


@dataclass(frozen=True)
class Batch:
    """Ragged step input: chunk b owns rows [q_indptr[b], q_indptr[b + 1])."""

    token_ids: IntArray  # int64 [num_tokens]
    positions: IntArray  # int64 [num_tokens]
    slots: IntArray  # int64 [num_tokens], page * page_size + slot
    q_indptr: IntArray  # int32 [num_seqs + 1]
    seq_lens: IntArray  # int32 [num_seqs], new tokens included
    page_table: IntArray  # int32 [num_seqs, max_pages], -1 past the end
    logit_rows: IntArray  # int64 [num_logits]
    logit_indptr: IntArray  # int32 [num_seqs + 1], which of them are of which chunk

    @classmethod
    def of(cls, chunks: Sequence[Chunk], page_size: int) -> Batch:
        """Joins chunks into a step."""
        positions = [np.arange(c.start, c.start + len(c.token_ids)) for c in chunks]
        slots = [
            chunk.pages[at // page_size].astype(np.int64) * page_size + at % page_size
            for chunk, at in zip(chunks, positions, strict=True)
        ]
        indptr = np.cumsum([0, *(len(c.token_ids) for c in chunks)])
        seq_lens = np.array([c.start + len(c.token_ids) for c in chunks], np.int32)
        num_pages = -(-seq_lens // page_size)
        page_table = np.full((len(chunks), int(num_pages.max())), -1, np.int32)
        for row, chunk, used in zip(page_table, chunks, num_pages, strict=True):
            row[:used] = chunk.pages[:used]
        wanted = [end - 1 for c, end in zip(chunks, indptr[1:], strict=True) if c.wants_logits]
        return cls(
            token_ids=np.concatenate([np.asarray(c.token_ids, np.int64) for c in chunks]),
            positions=np.concatenate(positions).astype(np.int64),
            slots=np.concatenate(slots),
            q_indptr=indptr.astype(np.int32),
            seq_lens=seq_lens,
            page_table=page_table,
            logit_rows=np.array(wanted, np.int64),
            logit_indptr=np.cumsum([0, *(c.wants_logits for c in chunks)]).astype(np.int32),
        )
