"""An endpoint's metrics for `prometheus_client` (`pip install 'kvlink[metrics]'`).

    collector = EndpointCollector(endpoint)
    prometheus_client.REGISTRY.register(collector)
    ...
    prometheus_client.REGISTRY.unregister(collector)

Nothing is counted twice and nothing runs between two scrapes: each reads `Endpoint.metrics()`.
Series of a peer stay when its link closes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from kvlink.transfer import Endpoint

_LINK = ("endpoint", "peer", "path")
_Labels = tuple[str, ...]
_Links = list[tuple[_Labels, dict[str, Any]]]
_Family = CounterMetricFamily | GaugeMetricFamily

# Key of a link's push or pull -> (metric, what it counts).
_MOVED = {
    "begun": ("kvlink_transfer_begun", "Transfers that this endpoint began to move."),
    "bytes": ("kvlink_transfer_bytes", "Bytes that this endpoint stored at the destination."),
    "rows": ("kvlink_transfer_rows", "Rows (one KV head of one token in one plane of a layer)."),
    "pages": ("kvlink_transfer_pages", "Pages, on this side, of transfers that arrived."),
    "layers": ("kvlink_transfer_layers", "Stored layers that were moved."),
}
_LINK_SECONDS = {
    "post_s": ("kvlink_transfer_post_seconds", "Time of a call that posts a layer."),
    "wait_s": ("kvlink_transfer_wait_seconds", "Time of a wait for an arrival at the peer."),
    "source_wait_s": ("kvlink_transfer_source_wait_seconds", "Time of a wait for the source."),
    "moving_s": ("kvlink_transfer_moving_seconds", "Time that a transfer spent moving."),
}
_LINK_COUNTS = {
    "adopted": ("kvlink_transfer_adopted", "Offers of the peer that were adopted."),
    "lost": ("kvlink_link_lost", "Sessions that ended without this side's doing."),
    "reconnects": ("kvlink_link_reconnects", "Sessions after the first one."),
}
_ARRIVED = {
    "bytes": "Bytes of requests that arrived in grants of this endpoint.",
    "rows": "Rows of requests that arrived.",
    "pages": "Pages of requests that arrived.",
    "layers": "Stored layers of requests that arrived.",
    "tokens": "Tokens of requests that arrived.",
}
_ENDPOINT_SECONDS = {
    "wait_s": ("kvlink_arrival_wait_seconds", "Time of a wait for an arrival here."),
    "verify_s": ("kvlink_arrival_verify_seconds", "Time that verifying an arrival took."),
}


class EndpointCollector(Collector):
    """Every metric of one endpoint. Several endpoints of a process need one each; their series
    differ by the label `endpoint`, so give them different names."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    def describe(self) -> Iterable[Metric]:
        """Names alone would need a scrape; `register` does not need them."""
        return []

    def collect(self) -> Iterator[Metric]:
        """One scrape."""
        found = self._endpoint.metrics()
        own = (found["endpoint"],)
        links: _Links = [((*own, link["peer"], link["path"]), link) for link in found["links"]]
        yield from _link_metrics(links)
        yield from _endpoint_metrics(own, found)


def _link_metrics(links: _Links) -> Iterator[Metric]:
    moved = [((*labels, kind), link[kind]) for labels, link in links for kind in ("push", "pull")]
    directed = (*_LINK, "direction")
    for key, (name, text) in _MOVED.items():
        yield _counter(name, text, directed, ((labels, each[key]) for labels, each in moved))
    yield _counter(
        "kvlink_transfer_ended", "Transfers whose outcome is known.", (*directed, "outcome"),
        _spread((labels, each["ended"]) for labels, each in moved),
    )  # fmt: skip
    yield _counter(
        "kvlink_transfer_refused", "Transfers and adoptions that did not begin.",
        (*_LINK, "reason"), _spread((labels, link["refused"]) for labels, link in links),
    )  # fmt: skip
    yield _counter(
        "kvlink_path_events", "What the path itself counts.", (*_LINK, "event"),
        _spread((labels, link["path_events"]) for labels, link in links),
    )  # fmt: skip
    for key, (name, text) in _LINK_COUNTS.items():
        yield _counter(name, text, _LINK, ((labels, link[key]) for labels, link in links))
    for key, (name, text) in _LINK_SECONDS.items():
        yield _histogram(name, text, _LINK, ((labels, link[key]) for labels, link in links))
    up = GaugeMetricFamily("kvlink_link_up", "Links that are connected now.", labels=_LINK)
    yield _filled(up, ((labels, link["up"]) for labels, link in links))


def _endpoint_metrics(own: _Labels, found: Mapping[str, Any]) -> Iterator[Metric]:
    lent = [((*own, kind), found[f"{kind}s"]) for kind in ("grant", "offer")]
    kinds = ("endpoint", "kind")
    yield _counter(
        "kvlink_lent_opened", "Grants and offers made.", kinds,
        ((labels, each["opened"]) for labels, each in lent),
    )  # fmt: skip
    yield _counter(
        "kvlink_lent_ended", "Grants and offers whose outcome is known.", (*kinds, "outcome"),
        _spread((labels, each["ended"]) for labels, each in lent),
    )  # fmt: skip
    for key, text in (
        ("open", "Grants and offers that have no outcome yet."),
        ("quarantined", "Grants and offers that have ended while a peer is still inside."),
        ("quarantined_pages", "Pages of those."),
    ):
        gauge = GaugeMetricFamily(f"kvlink_lent_{key}", text, labels=kinds)
        yield _filled(gauge, ((labels, each[key]) for labels, each in lent))
    for key, text in _ARRIVED.items():
        amount = [(own, found["arrived"][key])]
        yield _counter(f"kvlink_arrived_{key}", text, ("endpoint",), amount)
    for key, (name, text) in _ENDPOINT_SECONDS.items():
        yield _histogram(name, text, ("endpoint",), [(own, found[key])])
    for key, name, text in (
        ("refused", "kvlink_connections_refused", "Peers that were turned away."),
        ("connect_failed", "kvlink_connect_failed", "Attempts to connect that failed."),
    ):
        yield _counter(name, text, ("endpoint", "reason"), _spread([(own, found[key])]))


def _spread(
    values: Iterable[tuple[_Labels, Mapping[str, float]]],
) -> Iterator[tuple[_Labels, float]]:
    """A dict's keys as one more label."""
    for labels, by_name in values:
        for name, value in by_name.items():
            yield (*labels, name), value


def _counter(
    name: str, text: str, labels: _Labels, values: Iterable[tuple[_Labels, float]]
) -> Metric:
    return _filled(CounterMetricFamily(name, text, labels=labels), values)


def _filled(family: _Family, values: Iterable[tuple[_Labels, float]]) -> Metric:
    for labels, value in values:
        family.add_metric(labels, value)
    return family


def _histogram(
    name: str, text: str, labels: _Labels, values: Iterable[tuple[_Labels, dict[str, Any]]]
) -> Metric:
    family = HistogramMetricFamily(name, text, labels=labels)
    for each, found in values:
        buckets = [(str(bound), float(total)) for bound, total in found["buckets"]]
        family.add_metric(each, buckets, found["sum"])
    return family
