"""Does attention wait for KV that is still arriving, with a bound, and for nothing else?"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from receiving import PAGES, SPEC, TOKENS, Receiver, new_sender

import kvlink
from kvlink.errors import InvalidArgument, NeverReady, NotReady
from kvlink.testing.transfer_peer import Peer, open_endpoint, reachable
from kvlink.transfer import Grant, GrantRevoked, Link

SECONDS = 20.0  # bound of waits that are to end well before


def query(seed: int = 3) -> Any:
    return np.random.default_rng(seed).standard_normal((1, 8, SPEC.head_dim), dtype=np.float32)


def attend(pool: kvlink.KVPool, layer: int, **options: Any) -> Any:
    return kvlink.paged_attention(query(), pool, layer, [PAGES], [TOKENS], **options)


def expected(layer: int) -> Any:
    pool = SPEC.build()
    SPEC.fill(pool, PAGES, TOKENS)
    return attend(pool, layer)


class Waiting:
    """A call in a thread of its own: its result, or the error it ended with."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.result: Any = None
        self.error: BaseException | None = None

        def run() -> None:
            try:
                self.result = call()
            except Exception as error:
                self.error = error

        self.thread = threading.Thread(target=run)
        self.thread.start()

    def end(self) -> Any:
        self.thread.join(SECONDS)
        assert not self.thread.is_alive()
        return self.result


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_attention_waits_for_its_layer(receiver: Receiver, sender: Peer, backend: str) -> None:
    sender.call("connect", receiver.address)
    grant = receiver.grant()
    transfer = sender.call("begin", PAGES, grant.to_bytes())
    # The pool holds NaN: whoever does not wait shows it.
    waiting = [
        Waiting(
            lambda layer=layer: attend(
                receiver.pool, layer, ready=grant.readiness(layer), ready_timeout=SECONDS,
                backend=backend,
            )
        )
        for layer in range(4)
    ]  # fmt: skip
    for layer in (2, 0, 3, 1):
        sender.call("push_layer", transfer, layer, 7)
        assert not grant.readiness(layer).ready
        sender.call("push_layer", transfer, layer)
        out = waiting[layer].end()
        assert waiting[layer].error is None
        assert grant.readiness(layer).ready
        if backend == "cpu":
            assert out.tobytes() == expected(layer).tobytes()
        else:
            np.testing.assert_allclose(out, expected(layer), rtol=1e-5, atol=1e-6)
    sender.call("finish", transfer)
    grant.wait(10)


def test_several_are_awaited_together(receiver: Receiver, sender: Peer) -> None:
    sender.call("connect", receiver.address)
    grants = [receiver.grant(), receiver.grant([1, 2, 4])]
    ready = [grant.readiness(0) for grant in grants]
    for pages, grant in zip(([5, 3, 9], [5, 3, 9]), grants, strict=True):
        with pytest.raises(NotReady, match="layer 0: 0 of 320 rows"):
            attend(receiver.pool, 0, ready=ready, ready_timeout=0.01)
        sender.call("push", pages, grant.to_bytes())
        grant.wait(10)
    out = kvlink.paged_attention(
        np.concatenate([query(), query()]), receiver.pool, 0, [PAGES, [1, 2, 4]], [TOKENS] * 2,
        ready=ready, ready_timeout=0,
    )  # fmt: skip
    assert out[0].tobytes() == out[1].tobytes() == expected(0).tobytes()


def test_a_wait_has_a_bound_and_writes_nothing(receiver: Receiver) -> None:
    grant = receiver.grant()
    readiness = grant.readiness(1)
    out = np.full((1, 8, SPEC.head_dim), 7, np.float32)
    with pytest.raises(NotReady, match=rf"{grant.transfer_id.hex()}, layer 1: 0 of 320 rows"):
        attend(receiver.pool, 1, ready=readiness, ready_timeout=0.05, out=out)
    assert (out == 7).all()
    assert readiness.waited_s > 0
    with pytest.raises(TimeoutError):
        readiness.wait(0.0)
    grant.revoke()


def test_a_grant_that_ends_ends_the_wait(receiver: Receiver) -> None:
    grant = receiver.grant()
    waiting = Waiting(
        lambda: attend(receiver.pool, 0, ready=grant.readiness(0), ready_timeout=SECONDS)
    )
    grant.revoke()
    waiting.end()
    assert isinstance(waiting.error, NeverReady)
    assert "its pages were taken back" in str(waiting.error)
    with pytest.raises(NeverReady):
        _ = grant.readiness(0).ready
    with pytest.raises(GrantRevoked):
        grant.wait(0)


def test_a_peer_that_dies_ends_the_wait(receiver: Receiver) -> None:
    with new_sender(receiver) as peer:
        grant = receiver.grant()
        transfer = peer.call("begin", PAGES, grant.to_bytes())
        peer.call("push_layer", transfer, 0)
        waiting = Waiting(
            lambda: attend(receiver.pool, 1, ready=grant.readiness(1), ready_timeout=SECONDS)
        )
        peer.kill()
        waiting.end()
    assert isinstance(waiting.error, NeverReady)
    assert "the peer is lost" in str(waiting.error)


@pytest.mark.parametrize("arrives", [True, False])
def test_a_reused_slot_means_nothing_to_the_earlier_grant(
    sender: Peer, path: str, arrives: bool
) -> None:
    with open_endpoint("decode", path, num_slots=1) as endpoint:
        pool = SPEC.build()
        endpoint.register(pool)
        sender.call("connect", reachable(endpoint))

        def grant_and(push: bool) -> Grant:
            grant = endpoint.grant(PAGES, TOKENS)
            readiness.append(grant.readiness(2))
            if push:
                sender.call("push", PAGES, grant.to_bytes())
                grant.wait(10)
            else:
                grant.revoke()
            return grant

        readiness: list[Any] = []
        grants = [grant_and(arrives), grant_and(not arrives)]
        for grant, earlier in zip(grants, readiness, strict=True):
            late = grant.readiness(2)
            assert late is earlier
            if arrives == (grant is grants[0]):
                attend(pool, 2, ready=[earlier, grant.readiness(3)], ready_timeout=0)
            else:
                with pytest.raises(NeverReady):
                    attend(pool, 2, ready=earlier, ready_timeout=0)
                with pytest.raises(NeverReady):
                    attend(pool, 2, ready=grant.readiness(3), ready_timeout=0)


def test_layers_that_share_memory_are_ready_together(path: str) -> None:
    shared = replace(SPEC, layer_map=(0, 1, 1, 2))
    with open_endpoint("decode", path) as endpoint, Peer(shared, path=path) as peer:
        endpoint.register(shared.build(), shared.shard)
        peer.call("connect", reachable(endpoint))
        grant = endpoint.grant(PAGES, TOKENS)
        assert grant.readiness(1) is grant.readiness(2)
        transfer = peer.call("begin", PAGES, grant.to_bytes())
        peer.call("push_layer", transfer, 1)
        grant.readiness(2).wait(SECONDS)
        assert not grant.readiness(3).ready
        grant.revoke()


@pytest.mark.parametrize("kind", ["nhd", "hnd", "packed"])
@pytest.mark.parametrize(("page_size", "head_dim"), [(16, 16), (512, 128)])
def test_the_next_token_may_be_appended_while_pages_land(
    path: str, kind: str, page_size: int, head_dim: int
) -> None:
    """Slots past the granted tokens are never written by the peer, in short runs or long ones."""
    spec = replace(SPEC, kind=kind, page_size=page_size, head_dim=head_dim, num_pages=12)
    num_tokens = 2 * page_size + 8
    with open_endpoint("decode", path) as endpoint, Peer(spec, path=path) as peer:
        pool = spec.build()
        endpoint.register(pool)
        peer.call("fill", PAGES, num_tokens)
        peer.call("connect", reachable(endpoint))
        grant = endpoint.grant(PAGES, num_tokens)
        token = np.full((1, 4, head_dim), 3, np.float32)
        kvlink.append_kv(token, token, pool, 0, np.array([PAGES[2] * page_size + 8]))
        peer.call("push", PAGES, grant.to_bytes())
        grant.wait(10)
        for plane in (pool.k(0), pool.v(0)):
            last_page = np.from_dlpack(plane)[PAGES[2]]
            assert (last_page[8] == 3).all()
            assert np.isfinite(last_page[:8]).all()
            assert np.isnan(last_page[9:]).all()


def test_attention_over_a_pull_that_lands(receiver: Receiver, sender: Peer) -> None:
    link = receiver.endpoint.connect(sender.address)
    transfer = link.pull(sender.call("offer", PAGES, TOKENS), PAGES)
    for layer in range(4):
        readiness = transfer.readiness(layer)
        out = attend(receiver.pool, layer, ready=readiness, ready_timeout=SECONDS)
        assert out.tobytes() == expected(layer).tobytes()
    transfer.wait_arrived(10)
    assert all(transfer.readiness(layer).ready for layer in range(4))


def test_a_pull_that_fails_ends_the_wait(
    receiver: Receiver, sender: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = receiver.endpoint.connect(sender.address)
    monkeypatch.setattr(Link, "_start_all", Link._start)  # nothing moves by itself
    transfer = link.pull(sender.call("offer", PAGES, TOKENS), PAGES)
    with pytest.raises(NotReady, match="layer 3: 0 of 320 rows"):
        transfer.readiness(3).wait(0.01)
    waiting = Waiting(
        lambda: attend(receiver.pool, 3, ready=transfer.readiness(3), ready_timeout=SECONDS)
    )
    transfer.cancel()
    waiting.end()
    assert isinstance(waiting.error, NeverReady)
    assert "layer 3: will not arrive: it was cancelled" in str(waiting.error)


def test_readiness_of_a_part_of_the_layers(receiver: Receiver, path: str) -> None:
    upper = replace(SPEC, layers=(2, 3))
    with Peer(upper, path=path) as peer:
        peer.call("fill", PAGES, TOKENS)
        link = receiver.endpoint.connect(peer.address)
        offer = peer.call("offer", PAGES, TOKENS)
        transfer = link.pull(offer, PAGES)
        with pytest.raises(InvalidArgument, match="layer: 1 is not moved by this transfer"):
            transfer.readiness(1)
        with pytest.raises(InvalidArgument, match="layer: expected 0 to 3; got 4"):
            transfer.readiness(4)
        out = attend(receiver.pool, 2, ready=transfer.readiness(2), ready_timeout=SECONDS)
        assert out.tobytes() == expected(2).tobytes()
        assert peer.call("wait_released", offer) == "OK"  # layer 3 may have been on its way
        push = link.begin(PAGES, peer.call("grant", PAGES, TOKENS))
        with pytest.raises(InvalidArgument, match="a push lands elsewhere"):
            push.readiness(0)


def test_signals_are_seen_while_it_waits(receiver: Receiver) -> None:
    grant = receiver.grant()

    def interrupted() -> None:
        kill = threading.Thread(target=lambda: os.kill(os.getpid(), signal.SIGINT))
        kill.start()
        attend(receiver.pool, 0, ready=grant.readiness(0), ready_timeout=SECONDS)

    # What started the tests may have told them to ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupted()
    finally:
        signal.signal(signal.SIGINT, before)
    grant.revoke()


def test_what_is_refused(receiver: Receiver) -> None:
    grant = receiver.grant()
    for layer in (-1, 4):
        with pytest.raises(InvalidArgument, match=rf"layer: expected 0 to 3; got {layer}"):
            grant.readiness(layer)
    with pytest.raises(InvalidArgument, match="ready: expected Readiness objects; got 3"):
        attend(receiver.pool, 0, ready=[3])
    with pytest.raises(InvalidArgument, match="ready_timeout: expected seconds >= 0; got -1"):
        attend(receiver.pool, 0, ready=grant.readiness(0), ready_timeout=-1)
    grant.revoke()
