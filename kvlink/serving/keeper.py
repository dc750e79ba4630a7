"""`GrantKeeper`: grants do not expire because decode itself is busy."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

_SHORTEST_S = 0.01  # between two looks


class GrantKeeper:
    """Extends `grants()` while a step lasts, however long: nobody takes in then what arrives, nor
    hears prefill's signs of life. Entered around each step; a thread looks between `start` and
    `close`.
    """

    def __init__(self, grants: Callable[[], Iterable[Any]], ttl_s: float) -> None:
        self._grants = grants
        self._ttl_s = ttl_s
        self._step = 0  # odd while one lasts
        self._seen = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="grant-keeper", daemon=True)

    def start(self) -> None:
        """Begins to look, eight times in a grant's life."""
        self._thread.start()

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()
        self._thread.join()

    def look(self) -> None:
        """Extends the grants if the same step lasts as at the last look."""
        step = self._step
        if step % 2 == 1 and step == self._seen:
            for grant in self._grants():
                grant.extend(self._ttl_s)
        self._seen = step

    def _run(self) -> None:
        while not self._closed.wait(max(self._ttl_s / 8, _SHORTEST_S)):
            self.look()

    def __enter__(self) -> None:
        self._step += 1

    def __exit__(self, *_: object) -> None:
        self._step += 1
