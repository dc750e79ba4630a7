"""Decode begins while layers are landing: same tokens, and none before the KV is verified."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stepping import Serving

from kvlink.serving.early import EarlyStep

PROMPT = list(range(10, 50))
OTHER = list(range(90, 103))


@pytest.fixture
def serving(
    checkpoint: Callable[[str], tuple[Any, Path]], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Serving]:
    # However slow the machine is; tests of late layers say otherwise.
    monkeypatch.setattr("kvlink.serving.decode._ALONE_S", 20.0)
    monkeypatch.setattr("kvlink.serving.decode._SHARED_S", 20.0)
    serving = Serving(checkpoint("llama3")[1])
    yield serving
    serving.close()


def at_layer(
    monkeypatch: pytest.MonkeyPatch, act: Callable[[int], None]
) -> list[tuple[int, list[bool]]]:
    """Calls `act(layer)` as the early step comes to that layer; lists what had landed by then."""
    seen: list[tuple[int, list[bool]]] = []
    awaited = EarlyStep.awaited

    def acting(self: EarlyStep, layer: int) -> Any:
        items, timeout = awaited(self, layer)
        seen.append((layer, [item.ready for item in items]))
        act(layer)
        return items, timeout

    monkeypatch.setattr(EarlyStep, "awaited", acting)
    return seen


def test_layers_land_as_the_step_comes_to_them(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving.admit(0, PROMPT)
    transfer = serving.prefill(serving.granted(), PROMPT)
    seen = at_layer(monkeypatch, transfer.push_layer)
    serving.worker.collect_arrivals()
    serving.worker.run()
    assert seen == [(layer, [False]) for layer in range(serving.num_layers)]
    (job,) = serving.worker.scheduler.arriving.values()
    # The second token is there, and nobody was told: nothing has been verified yet.
    expected = serving.expected(PROMPT)
    assert (job.token_ids, job.early_token) == (expected[:1], expected[1])
    serving.worker.run()
    assert len(seen) == serving.num_layers
    assert not serving.worker.totals["num_early"]
    transfer.finish()
    assert serving.finish() == {0: expected}
    stats = serving.worker.stats()
    assert (stats["num_early"], stats["num_verified"]) == (1, 1)
    assert stats["early_hidden_s"] > 0


class Landing:
    """The readiness of one layer, told by the test."""

    ready = False
    waited_s = 0.0


def test_what_was_waited_for_is_not_counted_as_hidden() -> None:
    layers = [Landing(), Landing(), Landing()]
    job: Any = SimpleNamespace(grant=SimpleNamespace(readiness=lambda layer: layers[layer]))
    step = EarlyStep([job], len(layers), 20.0)
    for layer in layers:
        items, timeout = step.awaited(layers.index(layer))
        assert items == [layer]
        assert 0 < timeout <= 20.0
        layer.waited_s, layer.ready = 1000.0, True
    assert step.look() == []
    assert step.waited_s == 3000.0
    # Far less than a second was spent beside the waits, all of it with something missing.
    assert 0 <= step.hidden_s(job) < 1000.0


def test_a_byte_that_changes_after_the_step(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token computed early is dropped, the request retried; others in the batch go on."""
    serving.start(1, OTHER)
    serving.admit(0, PROMPT)
    transfer = serving.prefill(serving.granted(), PROMPT)
    seen = at_layer(monkeypatch, transfer.push_layer)
    serving.worker.run()
    assert len(seen) == serving.num_layers
    job = serving.worker.scheduler.arriving[0]
    assert job.early_token is not None
    torch.utils.dlpack.from_dlpack(serving.worker.pool.k(2))[int(job.pages[1]), 3] += 1
    transfer.finish()
    serving.worker.collect_arrivals()
    assert serving.worker.totals["num_early_dropped"] == 1
    assert not serving.worker.scheduler.arriving
    assert (job.token_ids, job.early_token) == ([], None)
    grant = serving.granted()
    assert (grant["index"], grant["attempt"]) == (0, 2)
    serving.push_all(serving.prefill(grant, PROMPT))
    assert serving.finish() == {0: serving.expected(PROMPT), 1: serving.expected(OTHER)}
    worker = serving.worker
    assert worker.allocator.num_free + len(worker.cache) == 64


@pytest.mark.parametrize("ends", ["cancel", "revoke"])
def test_a_grant_that_ends_within_the_step(
    ends: str, serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving.start(1, OTHER)
    serving.admit(0, PROMPT)
    transfer = serving.prefill(serving.granted(), PROMPT)
    job = serving.worker.scheduler.arriving[0]

    def act(layer: int) -> None:
        if layer < 2:
            transfer.push_layer(layer)
        elif ends == "cancel":
            transfer.cancel()
        else:
            job.grant.revoke()

    seen = at_layer(monkeypatch, act)
    (other,) = serving.worker.scheduler.running
    before = list(other.token_ids)
    serving.worker.run()
    assert len(seen) == 3
    assert other.token_ids == before
    serving.worker.collect_arrivals()
    monkeypatch.undo()
    serving.push_all(serving.prefill(serving.granted(), PROMPT))
    assert serving.finish() == {0: serving.expected(PROMPT), 1: serving.expected(OTHER)}


def test_a_late_layer_holds_others_up_once(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvlink.serving.decode._SHARED_S", 0.005)
    serving.start(1, OTHER)
    serving.admit(0, PROMPT)
    transfer = serving.prefill(serving.granted(), PROMPT)
    transfer.push_layer(0)
    (other,) = serving.worker.scheduler.running
    lengths = []
    for _ in range(3):
        serving.worker.collect_arrivals()
        serving.worker.run()
        lengths.append(len(other.token_ids))
    assert lengths == [1, 2, 3]
    assert serving.worker.totals["num_early_late"] == 1
    assert serving.worker.scheduler.arriving[0].early_token is None
    for layer in range(1, serving.num_layers):
        transfer.push_layer(layer)
    transfer.finish()
    assert serving.finish() == {0: serving.expected(PROMPT), 1: serving.expected(OTHER)}


def test_alone_it_waits_again(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvlink.serving.decode._ALONE_S", 0.005)
    serving.admit(0, PROMPT)
    transfer = serving.prefill(serving.granted(), PROMPT)
    for _ in range(2):
        serving.worker.collect_arrivals()
        serving.worker.run()
    assert serving.worker.totals["num_early_late"] == 2
    at_layer(monkeypatch, transfer.push_layer)
    monkeypatch.setattr("kvlink.serving.decode._ALONE_S", 10.0)
    serving.worker.run()
    transfer.finish()
    assert serving.finish() == {0: serving.expected(PROMPT)}
    assert serving.worker.totals["num_early"] == 1


def test_two_begin_early_together(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    transfers = []
    for index, prompt in enumerate((PROMPT, OTHER)):
        serving.admit(index, prompt)
        transfers.append(serving.prefill(serving.granted(), prompt))
        if index == 0:
            # One pool serves both prompts here: the first has to have left it.
            serving.push_all(transfers[0])
    seen = at_layer(monkeypatch, transfers[1].push_layer)
    serving.worker.run()
    assert seen == [(layer, [True, False]) for layer in range(serving.num_layers)]
    transfers[1].finish()
    assert serving.finish() == {0: serving.expected(PROMPT), 1: serving.expected(OTHER)}
    assert serving.worker.totals["num_early"] == 2


def test_a_request_of_one_token_does_not_begin_early(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving.admit(0, PROMPT, num_tokens=1)
    transfer = serving.prefill(serving.granted(), PROMPT)
    seen = at_layer(monkeypatch, transfer.push_layer)
    serving.worker.run()
    assert seen == []
    serving.push_all(transfer)
    assert serving.finish() == {0: serving.expected(PROMPT)[:1]}
