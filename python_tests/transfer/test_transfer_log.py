"""The log of transfers has the fields that tell one from another, at levels that suit."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from receiving import PAGES, TOKENS, Receiver, eventually

from kvlink.testing.transfer_peer import Peer
from kvlink.transfer import (
    DigestMismatch,
    Endpoint,
    InvalidDescriptor,
    SecretMismatch,
    StaleTransfer,
    TransferTimeout,
)
from kvlink.transfer.log import EVENTS, JsonFormatter, logger

pytestmark = pytest.mark.two_process


@pytest.fixture(scope="module")
def path() -> str:
    """What is told is the same for every path; this file names one."""
    return "host_shm"


class Lines:
    """What was logged: JSON objects."""

    def __init__(self, stream: io.StringIO) -> None:
        self._stream = stream

    def all(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._stream.getvalue().splitlines()]

    def of(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.all() if line.get("event") == event]


@pytest.fixture
def lines() -> Iterator[Lines]:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield Lines(stream)
    logger.setLevel(level)
    logger.removeHandler(handler)


def test_a_transfer_from_the_receivers_side(receiver: Receiver, sender: Peer, lines: Lines) -> None:
    sender.call("connect", receiver.endpoint.address)
    arrival = receiver.arrive(sender)
    eventually(lambda: lines.of("released") and lines.of("link_up"))
    told = {line["event"]: line for line in lines.all()}
    for event in ("granted", "arrived", "released"):
        assert told[event]["transfer_id"] == arrival.transfer_id.hex()
        assert (told[event]["endpoint"], told[event]["level"]) == ("decode", "DEBUG")
    assert told["granted"]["num_pages"] == len(PAGES)
    assert told["granted"]["num_tokens"] == TOKENS
    up = told["link_up"]
    assert (up["level"], up["peer"], up["path"]) == ("INFO", "peer", "host_shm")
    sender.call("close_link")
    eventually(lambda: lines.of("link_down"))
    assert set(told) <= set(EVENTS)


def test_a_transfer_from_the_senders_side(receiver: Receiver, sender: Peer, lines: Lines) -> None:
    link = receiver.endpoint.connect(sender.address)
    grant = sender.call("grant", [10, 11, 12], TOKENS)
    transfer = link.push(PAGES, grant)
    sender.call("wait", grant)
    eventually(lambda: lines.of("arrived"))  # though nobody asks
    for event, count in (("begun", 1), ("posted", 4), ("arrived", 1)):
        found = lines.of(event)
        assert len(found) == count
        for line in found:
            assert line["transfer_id"] == transfer.transfer_id.hex()
            assert (line["peer"], line["path"]) == ("peer", "host_shm")
    link.close()
    eventually(lambda: lines.of("link_down"))
    (down,) = lines.of("link_down")
    assert not down["lost"]


def test_corrupted_data_is_a_warning(receiver: Receiver, sender: Peer, lines: Lines) -> None:
    sender.call("connect", receiver.endpoint.address)
    grant = receiver.grant()
    pushed = sender.call("push", PAGES, grant.to_bytes())
    sender.call("wait_source_reusable", pushed)
    np.from_dlpack(receiver.pool.k(3)).view(np.int32)[5, 0, 0, 0] ^= 8
    for _ in range(2):
        with pytest.raises(DigestMismatch):
            grant.wait(10)
    eventually(lambda: lines.of("failed"))
    (failed,) = lines.of("failed")
    assert (failed["level"], failed["reason"]) == ("WARNING", "DigestMismatch")
    assert failed["transfer_id"] == grant.transfer_id.hex()
    sender.call("close_link")


def test_refusals_are_told_once(receiver: Receiver, sender: Peer, lines: Lines) -> None:
    link = receiver.endpoint.connect(sender.address)
    for _ in range(3):
        with pytest.raises(InvalidDescriptor):
            link.push(PAGES, b"no grant")
    refused = lines.of("refused")
    assert [line["level"] for line in refused] == ["WARNING", "DEBUG", "DEBUG"]
    assert {line["reason"] for line in refused} == {"InvalidDescriptor"}
    with (
        Endpoint("stranger", secret=b"another secret altogether") as stranger,
        pytest.raises(SecretMismatch),
    ):
        stranger.connect(receiver.endpoint.address)
    eventually(lambda: lines.of("handshake_refused"))
    (away,) = lines.of("handshake_refused")
    assert (away["level"], away["reason"]) == ("WARNING", "SecretMismatch")


def test_every_line_is_json_with_a_time(lines: Lines) -> None:
    logger.info("a %s with no fields", "line", extra={"odd": object()})
    try:
        raise ValueError("on purpose")
    except ValueError:
        logger.exception("caught")
    plain, caught = lines.all()
    assert plain["message"] == "a line with no fields"
    assert plain["time"].endswith("+00:00")
    assert "object" in plain["odd"]
    assert "on purpose" in caught["exception"]


def test_what_is_refused_is_told_by_its_transfer(
    receiver: Receiver, sender: Peer, lines: Lines
) -> None:
    link = receiver.endpoint.connect(sender.address)
    token = sender.call("grant", [10, 11, 12], TOKENS)
    link.push(PAGES, token)
    sender.call("wait", token)
    with pytest.raises(StaleTransfer) as raised:
        link.push(PAGES, token)
    (refused,) = lines.of("refused")
    assert refused["reason"] == "StaleTransfer"
    assert refused["transfer_id"] in str(raised.value)
    unseen = link.push(PAGES, sender.call("grant", [13, 14, 15], TOKENS))
    with pytest.raises(TransferTimeout, match=r"Grant\.wait"):
        unseen.wait_arrived(0.01)
    link.close()
    eventually(lambda: lines.of("link_down"))
    assert lines.of("link_down")[0]["reason"] == "this side closed it"
