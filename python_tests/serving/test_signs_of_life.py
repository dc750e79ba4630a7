"""What tells a worker that is slow from one that is stuck."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from stepping import SECRET, Serving, Wire

from kvlink.serving.keeper import GrantKeeper
from kvlink.serving.options import Options, SideOptions
from kvlink.serving.prefill import PrefillWorker
from kvlink.serving.request import Request
from kvlink.serving.sampling import Sampling
from kvlink.serving.scheduler import PrefillJob
from kvlink.serving.workers import WorkerFailed, WorkerProcess


@pytest.fixture
def worker(checkpoint: Callable[[str], tuple[Any, Path]]) -> Iterator[PrefillWorker]:
    """In this process; its prompts are longer than a step."""
    side = SideOptions(page_size=16, num_pages=64)
    options = Options(
        str(checkpoint("llama3")[1]), "float32", side, side, max_batch_tokens=8, grant_ttl_s=0.0
    )
    setup = {"options": options.to_message(), "secret": SECRET.hex()}
    wire: Any = Wire()
    worker = PrefillWorker("prefill", 0, setup, wire)
    yield worker
    worker.endpoint.close()


def signs(worker: PrefillWorker) -> int:
    wire: Any = worker.channel
    return [message["type"] for message in wire.sent].count("alive")


def test_each_layer_of_a_step_tells(worker: PrefillWorker) -> None:
    """A step may take longer than a grant lives."""
    worker.scheduler.add(PrefillJob(Request(0, list(range(20)), 3, Sampling()), 1, b""))
    worker.run_and_migrate(worker.scheduler.schedule())
    assert signs(worker) == worker.pool.num_layers


def test_a_transfer_that_moves_tells(worker: PrefillWorker) -> None:
    account = {"num_bytes": 10.0}
    moving: Any = SimpleNamespace(source_reusable=lambda: False, account=lambda: account)
    worker.collect([moving])
    assert signs(worker) == 1
    worker.collect([])
    assert signs(worker) == 1  # nothing moved
    account["num_bytes"] = 20.0
    worker.collect([])
    assert signs(worker) == 2
    assert worker.migrations == [moving]


def test_totals_wait_for_the_last_answers(worker: PrefillWorker) -> None:
    """Decode may have a whole prompt, and its tokens, before it answers for its last layers."""
    account = {"num_bytes": 10.0}
    moving: Any = SimpleNamespace(
        source_reusable=lambda: False,
        account=lambda: account,
        wait=lambda timeout: account.update(num_bytes=30.0),
    )
    worker.collect([moving])
    assert worker.stats()["num_bytes"] == 30.0


def test_grants_outlive_a_step_of_decode(
    checkpoint: Callable[[str], tuple[Any, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it lasts nobody hears prefill, nor verifies what has arrived."""
    serving = Serving(checkpoint("llama3")[1])
    worker, model = serving.worker, serving.worker.model
    extended: list[float] = []

    def slow(*args: Any, **kwargs: Any) -> Any:
        worker.keeper.look()
        assert extended == []  # it may be a short one
        worker.keeper.look()
        return model(*args, **kwargs)

    try:
        serving.start(0, list(range(10, 50)))
        serving.admit(1, list(range(90, 103)))
        serving.granted()
        grant = worker.scheduler.arriving[1].grant
        monkeypatch.setattr(grant, "extend", extended.append)
        monkeypatch.setattr(worker, "model", slow)
        worker.run()
        assert extended == [worker.options.grant_ttl_s]
        for _ in range(3):  # between steps the grant's time runs
            worker.keeper.look()
        assert len(extended) == 1
    finally:
        serving.close()


def test_the_keeper_looks_by_itself() -> None:
    extended = threading.Event()
    grant = SimpleNamespace(extend=lambda ttl: extended.set())
    keeper = GrantKeeper(lambda: [grant], 0.01)
    keeper.start()
    with keeper:
        assert extended.wait(20)
    keeper.close()
    assert "grant-keeper" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.two_process
def test_a_worker_that_takes_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there, but stopped: what it is sent must not hold the router up forever."""
    monkeypatch.setattr("kvlink.serving.workers._SEND_S", 0.2)
    worker = WorkerProcess("decode", 1)
    try:
        os.kill(worker.pid, signal.SIGSTOP)
        with pytest.raises(WorkerFailed, match=rf"decode worker \(pid {worker.pid}\) took no mess"):
            worker.send("admit", request="x" * 10_000_000)
    finally:
        worker.end()
    assert worker.process.returncode == -signal.SIGKILL
