"""`Migration`: one prompt's KV on its way from prefill to decode, and what it took."""

from __future__ import annotations

import contextlib
from typing import Any

from kvlink.serving.scheduler import PrefillJob
from kvlink.transfer import TransferError, TransferTimeout


class Migration:
    """Pushes layer by layer what decode does not have yet: all from token `job.start` on.

    A failure is kept in `error`, not raised: the rest of the step goes on, and decode decides
    whether to ask again.
    """

    def __init__(self, link: Any, job: PrefillJob, page_size: int) -> None:
        self.job = job
        self.error: TransferError | None = None
        self.computed_ns = 0  # time.monotonic_ns() at the end of the prompt's forward pass
        self._transfer: Any = None
        try:
            self._transfer = link.begin(job.pages[job.start // page_size :], job.grant)
        except TransferError as error:
            self.error = error

    def push_layer(self, layer: int) -> None:
        """The layer's KV is complete in the source pool."""
        if self.error is None:
            self._try(self._transfer.push_layer, layer)

    def finish(self, computed_ns: int) -> None:
        """Every layer was pushed."""
        self.computed_ns = computed_ns
        if self.error is None:
            self._try(self._transfer.finish)

    @property
    def failure(self) -> str | None:
        """Why it failed, if it did."""
        return None if self.error is None else f"{type(self.error).__name__}: {self.error}"

    def source_reusable(self) -> bool:
        """Nobody reads the source pages any more."""
        return self._transfer is None or bool(self._transfer.source_reusable)

    def wait(self, timeout: float) -> None:
        """Until it has ended, with all of it counted; at most `timeout` seconds."""
        if self._transfer is not None:
            with contextlib.suppress(TransferTimeout):
                self._transfer.wait_source_reusable(timeout)

    def account(self) -> dict[str, float]:
        """Bytes stored, seconds moving, and the part of them while the model still computed."""
        if self._transfer is None:
            return {"num_bytes": 0, "moving_s": 0.0, "hidden_s": 0.0}
        progress = self._transfer.progress()
        spans = [(t.started_ns, t.done_ns) for t in progress.parts if t.done_ns]
        hidden = [max(0, min(done, self.computed_ns) - started) for started, done in spans]
        return {
            "num_bytes": progress.num_bytes,
            "moving_s": sum(done - started for started, done in spans) * 1e-9,
            "hidden_s": sum(hidden) * 1e-9,
        }

    def _try(self, act: Any, *args: Any) -> None:
        try:
            act(*args)
        except TransferError as error:
            self.error = error
            self._transfer.cancel()
