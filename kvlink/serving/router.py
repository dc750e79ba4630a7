"""The router: the parent process, which carries small messages between the workers.

A request goes to decode first. Once decode has pages for it, the grant goes with the prompt to
prefill, which pushes the KV straight into those pages and sends the first token back this way.
With several ranks of prefill each gets every request and pushes its part of the heads; the first
of them sends the token.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait

from kvlink.serving.channel import Message
from kvlink.serving.options import Options
from kvlink.serving.ranks import rank_name
from kvlink.serving.request import Request, Result
from kvlink.serving.workers import WorkerFailed, WorkerProcess

_START_S = 600.0  # to load a model
_POLL_S = 1.0
_STOP_S = 60.0
_STALLED_S = 600.0  # workers tell of every step they make


class Router:
    """Use as a context manager: on the way out, the workers are gone whatever happened."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.path = ""  # how the links move bytes
        self.path_detail = ""
        self.num_generated = 0  # tokens so far, for progress
        self.started_at = 0.0  # time.monotonic() when the requests were submitted
        self.stats: dict[str, Counter[str]] = {}  # by role
        self._workers: list[WorkerProcess] = []

    def __enter__(self) -> Router:
        secret = os.urandom(32).hex()
        try:
            for rank in range(self.options.prefill_ranks):
                name = rank_name(rank, self.options.prefill_ranks)
                self._start("prefill", name, rank, self.options.prefill.num_threads, secret)
            self._start("decode", "decode", 0, self.options.decode.num_threads, secret)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.end()

    def connect(self) -> None:
        """Waits for the workers to load, and links them. Raises WorkerFailed."""
        *prefill, decode = self._workers
        ready = self._one_from_each(_START_S)
        for worker in prefill:
            worker.send("connect", address=ready[decode.name]["address"])
        linked = self._one_from_each(_START_S, prefill).values()
        self.path = ", ".join(sorted({message["path"] for message in linked}))
        self.path_detail = ", ".join(sorted({message["detail"] for message in linked}))

    def generate(self, requests: Sequence[Request]) -> Iterator[Result]:
        """Serves all requests; yields results as they end. Raises WorkerFailed."""
        *prefill, decode = self._workers
        by_index = {request.index: request for request in requests}
        self.started_at = time.monotonic()
        for request in requests:
            decode.send("admit", request=request.to_message())
        heard_at = self.started_at
        while by_index:
            if time.monotonic() - heard_at > _STALLED_S:
                raise WorkerFailed(f"no sign of life of any worker for {_STALLED_S:g} s")
            for _, message in self._messages(_POLL_S, self._workers):
                heard_at = time.monotonic()
                kind = message["type"]
                if kind == "granted":
                    prompt = by_index[message["index"]].to_message()
                    for worker in prefill:
                        worker.send("prefill", **_without_type(message), request=prompt)
                elif kind in ("prefilled", "not_sent", "alive"):
                    decode.send(kind, **_without_type(message))
                elif kind == "progress":
                    self.num_generated = message["num_tokens"]
                elif kind in ("finished", "gave_up"):
                    del by_index[message["index"]]
                    yield _result(message)
                if not by_index:
                    break

    def stop(self) -> None:
        """Ends the workers in good order and keeps what they report in `stats`."""
        *prefill, decode = self._workers
        # Whoever has connected goes first: no link is lost, each is closed.
        for workers in (prefill, [decode]):
            for worker in workers:
                worker.send("stop")
            stats = self._one_from_each(_STOP_S, workers, wanted="stats")
            for worker in workers:
                said = self.stats.setdefault(worker.role, Counter())
                said.update(_without_type(stats[worker.name]))
                worker.end(grace=_STOP_S)

    def _start(self, role: str, name: str, rank: int, num_threads: int, secret: str) -> None:
        worker = WorkerProcess(role, num_threads, rank, name)
        self._workers.append(worker)
        worker.send("setup", options=self.options.to_message(), secret=secret)

    def _one_from_each(
        self, timeout: float, workers: Sequence[WorkerProcess] = (), wanted: str = ""
    ) -> dict[str, Message]:
        """The next message (of type `wanted`, if given) of each worker, by name."""
        workers = workers or self._workers
        found: dict[str, Message] = {}
        while missing := [worker for worker in workers if worker.name not in found]:
            for worker, message in self._messages(timeout, missing):
                if not wanted or message["type"] == wanted:
                    found[worker.name] = message
                    break
            else:
                names = ", ".join(f"{worker.name} worker (pid {worker.pid})" for worker in missing)
                raise WorkerFailed(f"{names}: no answer within {timeout:g} s")
        return found

    def _messages(
        self, timeout: float, workers: Sequence[WorkerProcess]
    ) -> Iterator[tuple[WorkerProcess, Message]]:
        """What the workers send, until nothing came for `timeout` seconds."""
        while ready := wait([worker.connection for worker in workers], timeout):
            for worker in workers:
                if worker.connection in ready:
                    yield worker, worker.receive()


def _without_type(message: Message) -> Message:
    return {name: value for name, value in message.items() if name != "type"}


def _result(message: Message) -> Result:
    if message["type"] == "gave_up":
        return Result(message["index"], [], error=message["error"])
    return Result(
        message["index"],
        message["token_ids"],
        message["finish_reason"],
        message["first_token_at"],
        message["last_token_at"],
    )
