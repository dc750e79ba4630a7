"""What endpoints and links count is what happened, as a scrape of a real registry sees it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from receiving import PAGES, SPEC, TOKENS, Receiver, eventually, new_sender

from kvlink.integrations.prometheus import EndpointCollector
from kvlink.testing.transfer_peer import SECRET, Peer
from kvlink.transfer import (
    DigestMismatch,
    Endpoint,
    GrantRevoked,
    InvalidDescriptor,
    PeerLost,
    SecretMismatch,
    TransferCancelled,
)

pytestmark = pytest.mark.two_process
NUM_ROWS = TOKENS * 4 * 4 * 2  # layers, heads, planes
NUM_BYTES = NUM_ROWS * 16 * 4


@pytest.fixture(scope="module")
def path() -> str:
    """What is told is the same for every path; this file names one."""
    return "host_shm"


class Scrape:
    """The samples of one endpoint, by name and by what labels they are asked for."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(EndpointCollector(endpoint))

    def __call__(self, name: str, **labels: str) -> float:
        """The sum over all series that have these labels."""
        found = 0.0
        for family in self._registry.collect():
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    found += sample.value
        return found

    def text(self) -> str:
        return generate_latest(self._registry).decode()


@pytest.fixture
def scrape(receiver: Receiver) -> Scrape:
    return Scrape(receiver.endpoint)


def test_what_arrived(receiver: Receiver, sender: Peer, scrape: Scrape) -> None:
    sender.call("connect", receiver.endpoint.address)
    for _ in range(3):
        receiver.arrive(sender)
    assert scrape("kvlink_arrived_bytes_total", endpoint="decode") == 3 * NUM_BYTES
    assert scrape("kvlink_arrived_rows_total") == 3 * NUM_ROWS
    assert scrape("kvlink_arrived_pages_total") == 3 * len(PAGES)
    assert scrape("kvlink_arrived_layers_total") == 3 * 4
    assert scrape("kvlink_arrived_tokens_total") == 3 * TOKENS
    assert scrape("kvlink_lent_opened_total", kind="grant") == 3
    assert scrape("kvlink_lent_ended_total", kind="grant", outcome="ok") == 3
    assert scrape("kvlink_arrival_verify_seconds_count") == 3
    assert scrape("kvlink_arrival_wait_seconds_count") == 3
    eventually(lambda: scrape("kvlink_link_up", peer="peer", path="host_shm") == 1)
    sender.call("close_link")
    eventually(lambda: scrape("kvlink_link_up") == 0)


def test_what_was_pushed_and_pulled(receiver: Receiver, sender: Peer, scrape: Scrape) -> None:
    endpoint = receiver.endpoint
    link = endpoint.connect(sender.address)
    SPEC.fill(receiver.pool, PAGES, TOKENS)
    grant = sender.call("grant", [10, 11, 12], TOKENS)
    link.push(PAGES, grant)  # nobody holds or asks the transfer: it is counted all the same
    sender.call("wait", grant)
    offer = sender.call("offer", PAGES, TOKENS)
    link.pull(offer, [20, 21, 22]).wait_arrived(10)
    link.adopt(sender.call("offer", PAGES, TOKENS)).release()
    labels = {"peer": "peer", "path": "host_shm"}
    for direction in ("push", "pull"):
        told = {**labels, "direction": direction}
        assert scrape("kvlink_transfer_begun_total", **told) == 1
        assert scrape("kvlink_transfer_ended_total", outcome="ok", **told) == 1
        assert scrape("kvlink_transfer_bytes_total", **told) == NUM_BYTES
        assert scrape("kvlink_transfer_rows_total", **told) == NUM_ROWS
        assert scrape("kvlink_transfer_pages_total", **told) == len(PAGES)
        assert scrape("kvlink_transfer_layers_total", **told) == 4
    assert scrape("kvlink_transfer_adopted_total", **labels) == 1
    assert scrape("kvlink_transfer_post_seconds_count", **labels) == 4
    assert scrape("kvlink_transfer_post_seconds_bucket", le="+Inf", **labels) == 4
    assert scrape("kvlink_transfer_post_seconds_sum", **labels) > 0
    assert scrape("kvlink_transfer_wait_seconds_count", **labels) == 1
    assert scrape("kvlink_transfer_moving_seconds_count", **labels) == 2
    own = link.metrics()
    assert (own["peer"], own["path"], own["state"]) == ("peer", "host_shm", "connected")
    assert own["push"]["bytes"] == own["pull"]["bytes"] == NUM_BYTES
    link.close()
    assert scrape("kvlink_transfer_bytes_total", **labels) == 2 * NUM_BYTES
    assert scrape("kvlink_link_up", **labels) == 0


def test_failures_by_reason(receiver: Receiver, sender: Peer, scrape: Scrape) -> None:
    endpoint = receiver.endpoint
    link = endpoint.connect(sender.address)
    transfer = link.begin(PAGES, sender.call("grant", [10, 11, 12], TOKENS))
    transfer.push_layer(0)
    transfer.cancel()
    with pytest.raises(TransferCancelled):
        transfer.wait_arrived(10)
    link.begin(PAGES, sender.call("grant", [13, 14, 15], TOKENS))  # dropped: cancelled
    told = {"direction": "push", "outcome": "TransferCancelled"}
    eventually(lambda: scrape("kvlink_transfer_ended_total", **told) == 2)
    assert scrape("kvlink_transfer_pages_total", direction="push") == 0
    with pytest.raises(InvalidDescriptor):
        link.pull(b"neither grant nor offer", PAGES)
    assert scrape("kvlink_transfer_refused_total", reason="InvalidDescriptor") == 1

    sender.call("connect", endpoint.address)
    grant = receiver.grant()
    pushed = sender.call("push", PAGES, grant.to_bytes())
    sender.call("wait_source_reusable", pushed)
    np.from_dlpack(receiver.pool.k(3)).view(np.int32)[5, 0, 0, 0] ^= 8
    with pytest.raises(DigestMismatch):
        grant.wait(10)
    revoked = receiver.grant()
    revoked.revoke()
    with pytest.raises(GrantRevoked):
        revoked.wait(10)
    ended: dict[str, Any] = endpoint.metrics()["grants"]["ended"]
    assert ended == {"DigestMismatch": 1, "GrantRevoked": 1}
    assert scrape("kvlink_lent_ended_total", kind="grant", outcome="DigestMismatch") == 1
    assert scrape("kvlink_arrived_bytes_total") == 0


def test_who_was_turned_away(receiver: Receiver, scrape: Scrape) -> None:
    with Endpoint("stranger", secret=b"another secret altogether") as stranger:
        with pytest.raises(SecretMismatch):
            stranger.connect(receiver.endpoint.address)
        assert stranger.metrics()["connect_failed"] == {"SecretMismatch": 1}
        assert stranger.metrics()["links"] == []
    told = {"reason": "SecretMismatch"}
    eventually(lambda: scrape("kvlink_connections_refused_total", **told) == 1)


def test_pages_in_quarantine(receiver: Receiver, scrape: Scrape) -> None:
    with new_sender(receiver) as peer:
        grant = receiver.grant()
        assert scrape("kvlink_lent_open", kind="grant") == 1
        assert peer.call("enter", grant.to_bytes()) == "OK"
        grant.revoke()
        assert scrape("kvlink_lent_open", kind="grant") == 0
        assert scrape("kvlink_lent_quarantined", kind="grant") == 1
        assert scrape("kvlink_lent_quarantined_pages", kind="grant") == len(PAGES)
        peer.call("leave")
        grant.wait_released(10)
        assert scrape("kvlink_lent_quarantined_pages", kind="grant") == 0


def test_a_peer_that_dies_and_comes_back(receiver: Receiver, scrape: Scrape) -> None:
    addresses: list[bytes] = []
    with Peer(SPEC) as first, Peer(SPEC) as second:
        addresses.append(first.address)
        link = receiver.endpoint.connect(lambda: addresses[-1])
        transfer = link.begin(PAGES, first.call("grant", PAGES, TOKENS))
        transfer.push_layer(0)
        addresses.append(second.address)
        first.kill()
        with pytest.raises(PeerLost):
            transfer.wait_arrived(10)
        eventually(lambda: link.num_sessions == 2)
        SPEC.fill(receiver.pool, PAGES, TOKENS)
        link.push(PAGES, second.call("grant", PAGES, TOKENS)).wait_source_reusable(10)
        labels = {"peer": "peer", "path": "host_shm"}
        assert scrape("kvlink_link_lost_total", **labels) == 1
        assert scrape("kvlink_link_reconnects_total", **labels) == 1
        assert scrape("kvlink_transfer_begun_total", direction="push", **labels) == 2
        transfer.cancel()  # it failed long ago
        assert scrape("kvlink_transfer_ended_total", outcome="PeerLost", **labels) == 1


def test_the_snapshot_is_plain_and_grows(receiver: Receiver, sender: Peer) -> None:
    before = json.loads(json.dumps(receiver.endpoint.metrics()))
    sender.call("connect", receiver.endpoint.address)
    receiver.arrive(sender)
    eventually(lambda: receiver.endpoint.metrics()["links"])
    after = json.loads(json.dumps(receiver.endpoint.metrics()))
    assert before["links"] == []
    assert [(one["peer"], one["path"], one["up"]) for one in after["links"]] == [
        ("peer", "host_shm", 1)
    ]
    buckets = after["verify_s"]["buckets"]
    assert buckets[-1] == ["+Inf", 1]
    counts = [count for _, count in buckets]
    assert counts == sorted(counts)
    sender.call("close_link")


def test_names_follow_the_conventions(receiver: Receiver, sender: Peer, scrape: Scrape) -> None:
    sender.call("connect", receiver.endpoint.address)
    receiver.arrive(sender)
    for line in scrape.text().splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            assert name.startswith("kvlink_")
            assert (kind == "counter") == name.endswith("_total")
            assert (kind == "histogram") == name.endswith("_seconds")
    sender.call("close_link")


def test_the_ucx_path() -> None:
    receiver = Receiver("ucx")
    with receiver.endpoint, Endpoint("prefill", secret=SECRET, paths=("ucx",)) as endpoint:
        scrape, pool = Scrape(endpoint), SPEC.build()
        endpoint.register(pool)
        SPEC.fill(pool, PAGES, TOKENS)
        link = endpoint.connect(receiver.endpoint.address)
        grant = receiver.grant()
        transfer = link.push(PAGES, grant.to_bytes())
        grant.wait(10)
        transfer.wait_arrived(10)
        labels = {"peer": "decode", "path": "ucx"}
        assert scrape("kvlink_transfer_bytes_total", direction="push", **labels) == NUM_BYTES
        assert scrape("kvlink_transfer_ended_total", outcome="ok", **labels) == 1
        assert set(link.metrics()["path_events"]) == {
            "asked_again", "credit_waits", "dropped_messages", "copied_chunks", "in_place_chunks",
            "gathered_chunks", "direct_chunks",
        }  # fmt: skip
        before = scrape("kvlink_path_events_total", **labels)
        link.close()
        assert scrape("kvlink_path_events_total", **labels) >= before
        assert Scrape(receiver.endpoint)("kvlink_arrived_bytes_total") == NUM_BYTES


@pytest.mark.parametrize("name", ["host_shm", "ucx"])
def test_what_has_arrived_was_counted(name: str) -> None:
    """Whoever learns of an arrival finds all of its bytes in the counters."""
    with Endpoint("a", secret=SECRET) as receiver, Endpoint("b", secret=SECRET) as sender:
        for endpoint in (receiver, sender):
            endpoint.register(SPEC.build())
        link = sender.connect(receiver.address, require=name)
        for num_arrived in range(1, 101):
            grant = receiver.grant(PAGES, TOKENS)
            transfer = link.push(PAGES, grant.to_bytes())
            grant.wait(10)
            transfer.wait_arrived(10)
            pushed = link.metrics()["push"]
            assert pushed["bytes"] == num_arrived * NUM_BYTES
            assert pushed["layers"] == num_arrived * 4
