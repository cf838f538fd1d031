"""Every metric of the adapter, in one class with its own registry.

Only this module imports prometheus_client. Labels are enums, and the help text lists their values. A bot, user,
sandbox, subject, id, URL or error text is never a label.
"""

from __future__ import annotations

import functools
import itertools
import platform
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, Self, TypeVar

import prometheus_client
from prometheus_client import CollectorRegistry, Gauge, GCCollector, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics import MetricWrapperBase

from adapter import __version__
from adapter.contract.messages import FINAL_OUTCOMES, FINAL_STATUSES, SCHEMA_VERSION

NAMESPACE = "wechat_adapter"
prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call] # a third of all samples

REFUSED = (
    "invalid not_bound ambiguous_bot other_user window_closed quota throttled needs_login too_long "
    "expired rejected media"
)
DEAD = "unreadable too_large crashed"
STATES = "waiting polling storing throttled paused retrying stale needs_login"
PARKED = "window_closed quota throttled needs_login"
KINDS = "text media typing unreadable bind unbind erase"
TASKS = "poller sender other"
ENDPOINTS = (
    "getupdates sendmessage notifystart notifystop getuploadurl getconfig sendtyping get_bot_qrcode "
    "get_qrcode_status cdn_upload cdn_download"
)
LONG_POLLS = "getupdates get_qrcode_status"
UPSTREAM_FAILURES = "ret_2 ret_14 ret_other http_4xx http_5xx timeout network unreadable"
RETRIED = UPSTREAM_FAILURES.removeprefix("ret_2 ")
CONSUMERS = "out router"
DIRECTIONS = "in out"
STREAMS = "in event dead out kv media"

_FAST_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0)
_CALL_S = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 15.0, 30.0)
_MESSAGE_S = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0)


class Counter(prometheus_client.Counter):
    """The library's, with `child`, and counting in a quarter of its time: all of it is done by one thread."""

    def inc(self, amount: float = 1, exemplar: dict[str, str] | None = None) -> None:
        self._value._value += amount

    @functools.cached_property
    def child(self) -> Callable[..., Self]:
        """As `labels`, in a tenth of its time, for values that each message decides. Other callers keep the child."""
        return functools.cache(self.labels)


class Histogram(prometheus_client.Histogram):
    """The library's, as Counter."""

    def observe(self, amount: float, exemplar: dict[str, str] | None = None) -> None:
        self._sum._value += amount
        self._buckets[bisect_left(self._upper_bounds, amount)]._value += 1

    @functools.cached_property
    def child(self) -> Callable[..., Self]:
        """As in Counter."""
        return functools.cache(self.labels)


M = TypeVar("M", bound=MetricWrapperBase)


class _Row(Generic[M]):
    """A metric of the table, named as its attribute in `Metrics`, where each instance has one of its own."""

    def __init__(
        self,
        kind: Callable[..., M],
        text: str,
        labels: dict[str, str],
        children: Iterable[tuple[str, ...]] | None = None,
        *,
        unit: str = "",
        **options: Any,
    ) -> None:
        """`labels`: the values of each label, as words. `children`: those that exist; by default all combinations."""
        self._kind, self._labels, self._unit, self._options = kind, labels, unit, options
        self._text = text + "".join(f" {label}: {', '.join(values.split())}." for label, values in labels.items())
        combinations = itertools.product(*(values.split() for values in labels.values())) if labels else ()
        self._children = [*(combinations if children is None else children)]

    def __set_name__(self, _: type, name: str) -> None:
        self._name = f"{name}{self._unit}"

    def __get__(self, metrics: object, _: type) -> M:
        raise AttributeError(self._name)  # an instance has its own

    def make(self, registry: CollectorRegistry) -> M:
        names = list(self._labels)
        metric = self._kind(self._name, self._text, names, namespace=NAMESPACE, registry=registry, **self._options)
        for values in self._children:
            metric.labels(*values)
        return metric


def _counter(text: str, *, children: Iterable[tuple[str, ...]] | None = None, **labels: str) -> _Row[Counter]:
    return _Row(Counter, text, labels, children)


def _gauge(text: str, **labels: str) -> _Row[Gauge]:
    return _Row(Gauge, text, labels)


def _age(text: str) -> _Row[Gauge]:
    return _Row(Gauge, text, {}, unit="_seconds")


def _histogram(text: str, buckets: Sequence[float], **labels: str) -> _Row[Histogram]:
    return _Row(Histogram, text, labels, unit="_seconds", buckets=buckets)


class Metrics:
    """The table of metrics. Each attribute is one, named without prefix and unit.

    All children exist from the start, so rates begin at 0. The event loop alone changes
    metrics, while another thread may expose them.
    """

    bindings = _gauge("Bindings of this replica.", state=STATES)
    bindings_capacity = _gauge("Maximum number of bindings that this replica serves.")
    bindings_unowned = _gauge(
        "Bindings that no replica polls: no replica owns their partition, or its owner is at capacity.",
    )
    partitions_owned = _gauge("Partitions of sandboxes that this replica owns.")
    lease_changes = _counter(
        "Changes of the partitions that this replica owns. lost: not renewed in time; taken: its owner died.",
        reason="acquired released lost taken",
    )
    polls = _counter(
        "Long polls of iLink. empty: iLink answered without messages; client_timeout: iLink did not answer.",
        outcome="messages empty client_timeout stale_token error",
    )
    oldest_poll_age = _age(
        "Longest time since a completed poll, over the bindings that poll or wait to poll.",
    )
    upstream_requests = _counter(
        "Requests to iLink. ret_2: iLink throttles; ret_14: the token is stale.",
        endpoint=ENDPOINTS,
        outcome=f"ok {UPSTREAM_FAILURES}",
    )
    upstream_request_duration = _histogram(
        "Duration of requests to iLink other than long polls.",
        _CALL_S,
        endpoint=" ".join(each for each in ENDPOINTS.split() if each not in LONG_POLLS.split()),
    )
    inbound_messages = _counter(
        "Messages that a poll returned.",
        kind="text image voice file video unsupported",
        outcome="published duplicate unbound rejected publish_failed dead_lettered",
    )
    inbound_publish_duration = _histogram(
        "Time from the answer of a poll to the stream's acknowledgement of its new messages.",
        _FAST_S,
    )
    inbound_age = _histogram(
        "Time from WeChat's send time to the stream's acknowledgement, per message.",
        _MESSAGE_S,
    )
    outbound_received = _counter(
        "Commands received from the outbound stream. Each counts at most once. Commands in transit while a "
        "partition changes owner are not counted.",
    )
    outbound_messages = _counter(
        "Commands with a final outcome. duplicate: a repeated command that is not sent again; unreadable: a"
        " command whose kind could not be read.",
        children=[
            (kind, outcome, reason)
            for kind in KINDS.split()
            for outcome, reason in (
                ("accepted", "none"),
                ("accepted_unconfirmed", "none"),
                *(("refused", reason) for reason in REFUSED.split()),
                ("uncertain", "none"),
                *(("dead_lettered", reason) for reason in DEAD.split()),
                ("duplicate", "none"),
            )
        ],
        kind=KINDS,
        outcome=" ".join([*FINAL_OUTCOMES, "duplicate"]),
        reason=f"none {REFUSED} {DEAD}",
    )
    outbound_in_flight = _gauge("Received commands that are neither parked nor settled.")
    outbound_parked = _gauge("Commands that wait for their user or for a login.", reason=PARKED)
    outbound_duration = _histogram(
        "Time from the storage of a command that was never parked to its final outcome. failed: dead-lettered"
        " or uncertain; settled: every other outcome.",
        _MESSAGE_S,
        outcome="settled failed",
    )
    outbound_oldest_pending = _age("Age of the oldest command that is neither parked nor settled.")
    outbound_retries = _counter("Repeated sends, by the failure of the previous attempt.", reason=RETRIED)
    receipts = _counter(
        "Published receipts. Every outcome except parked is final.",
        outcome=" ".join([*FINAL_OUTCOMES, "parked"]),
    )
    dead_letters = _counter("Dead letters, by the stream of the original message.", stream="out in event")
    schema_violations = _counter("Requests that do not fit their schema.", kind="out svc")
    nats_connected = _gauge("1 while connected to NATS, else 0.")
    nats_reconnects = _counter("Reconnections to NATS.")
    nats_publish = _counter(
        "Writes to JetStream. retried: repeated attempts; refused: writes given up.",
        stream=STREAMS,
        outcome="ok retried refused",
    )
    nats_publish_oldest = _age(
        "Age of the oldest write that its stream has not acknowledged, or 0. Later writes to that stream wait.",
    )
    nats_streams_missing = _gauge("Streams and buckets that were deleted, and buckets that lost keys.")
    nats_streams_altered = _gauge(
        "Streams and buckets whose changed configuration breaks a guarantee.",
    )
    nats_streams_degraded = _gauge(
        "Streams and buckets with a copy on a server that is lost or behind, or with too few copies.",
    )
    nats_publish_duration = _histogram("Time from a write to its acknowledgement.", _FAST_S, stream=STREAMS)
    nats_consumer_pending = _gauge("Messages that the consumer has not delivered yet.", consumer=CONSUMERS)
    nats_consumer_ack_pending = _gauge("Messages that were delivered and not acknowledged.", consumer=CONSUMERS)
    nats_redeliveries = _counter("Messages that the consumer delivered again.", consumer=CONSUMERS)
    service_refusals = _counter(
        "Requests refused unread. busy: the sandbox has too many requests open; full: all open requests are too"
        " large; reply: the reply subject is not an inbox of the client.",
        reason="busy full reply",
    )
    media_transfers = _counter(
        "Media files downloaded from (in) or uploaded to (out) iLink's CDN.",
        direction=DIRECTIONS,
        outcome="ok failed",
    )
    media_bytes = _counter("Bytes of media transferred, counted before encryption.", direction=DIRECTIONS)
    media_duration = _histogram("Duration of a media transfer.", _MESSAGE_S, direction=DIRECTIONS)
    media_fetches = _counter(
        "Media of inbound messages brought to the object store, or the reason why not. dropped: too many waited;"
        " unbound: the person has left.",
        outcome="stored too_large timeout unavailable corrupt reference store unbound dropped",
    )
    logins = _counter(
        "QR logins that ended. already_bound: the user already has a bot of the sandbox.",
        outcome=" ".join(FINAL_STATUSES),
    )
    qr_refreshes = _counter("QR codes renewed during a login.")
    event_loop_lag = _histogram("How late the event loop wakes a sleeper.", _FAST_S)
    tasks = _gauge("Tasks of the event loop. poller: one per bot; sender: one per person with commands.", kind=TASKS)

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        build_info = Gauge(
            "build_info",
            "Always 1. The labels give the versions of the adapter, of Python and of the bus schema.",
            ["version", "python", "schema_version"],
            namespace=NAMESPACE,
            registry=self.registry,
        )
        build_info.labels(__version__, platform.python_version(), SCHEMA_VERSION).set(1)
        for name, row in vars(type(self)).items():
            if isinstance(row, _Row):
                vars(self)[name] = row.make(self.registry)
        self.polls_full = self.polls.labels(outcome="messages")
        self.polls_empty = self.polls.labels(outcome="empty")

    def value(self, name: str, **labels: str) -> float:
        """Value of the sample `name` (without prefix, with `_total`, `_count` …), or 0 if missing. For tests."""
        return self.registry.get_sample_value(f"{NAMESPACE}_{name}", labels) or 0.0

    def expose(self, accept: str = "") -> tuple[bytes, str]:
        """All metrics and their content type, in the format that the HTTP header `accept` asks for."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type
