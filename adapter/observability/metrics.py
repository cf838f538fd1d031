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
from typing import Self

import prometheus_client
from prometheus_client import CollectorRegistry, Gauge, GCCollector, ProcessCollector
from prometheus_client.exposition import choose_encoder

from adapter import __version__
from adapter.contract.messages import FINAL_OUTCOMES, FINAL_STATUSES, SCHEMA_VERSION

NAMESPACE = "wechat_adapter"
prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call] # a third of all samples

REFUSED = (
    "invalid not_bound ambiguous_bot other_user window_closed quota throttled needs_login too_long "
    "expired rejected backlog media"
)
DEAD = "unreadable too_large crashed"
STATES = "waiting taking polling storing throttled paused retrying stale needs_login releasing"
PARKED = "window_closed quota throttled needs_login"
KINDS = "text media typing unreadable"
TASKS = "poller sender other"
ENDPOINTS = (
    "getupdates sendmessage notifystart notifystop getuploadurl getconfig sendtyping get_bot_qrcode "
    "get_qrcode_status cdn_upload cdn_download"
)
LONG_POLLS = "getupdates get_qrcode_status"
UPSTREAM_FAILURES = "ret_2 ret_14 ret_other http_4xx http_5xx timeout network unreadable"
RETRIED = UPSTREAM_FAILURES.removeprefix("ret_2 ")
CONSUMERS = "out router control"

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


class Metrics:
    """Each attribute is a metric, named without prefix and unit.

    All children exist from the start, so rates begin at 0. The event loop alone changes
    metrics, while another thread may expose them.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)

        self.build_info = Gauge(
            "build_info",
            "Always 1. The labels give the versions of the adapter, of Python and of the bus schema.",
            ["version", "python", "schema_version"],
            namespace=NAMESPACE,
            registry=self.registry,
        )
        self.build_info.labels(__version__, platform.python_version(), SCHEMA_VERSION).set(1)

        self._make_ownership()
        self._make_upstream()
        self._make_inbound()
        self._make_outbound()
        self._make_bus()
        self._make_services()
        self._make_media()
        self._make_logins()

        self.event_loop_lag = self._histogram(
            "event_loop_lag_seconds", "How late the event loop wakes a sleeper.", _FAST_S
        )
        self.tasks = self._gauge(
            "tasks",
            "Tasks of the event loop. poller: one per bot; sender: one per person with commands.",
            kind=TASKS,
        )

    def value(self, name: str, **labels: str) -> float:
        """Value of the sample `name` (without prefix, with `_total`, `_count` …), or 0 if missing. For tests."""
        return self.registry.get_sample_value(f"{NAMESPACE}_{name}", labels) or 0.0

    def expose(self, accept: str = "") -> tuple[bytes, str]:
        """All metrics and their content type, in the format that the HTTP header `accept` asks for."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    def _make_ownership(self) -> None:
        self.bindings = self._gauge("bindings", "Bindings of this replica.", state=STATES)
        self.bindings_capacity = self._gauge(
            "bindings_capacity", "Maximum number of bindings that this replica serves."
        )
        self.bindings_unowned = self._gauge(
            "bindings_unowned",
            "Bindings that no replica polls: no replica owns their shard, or its owner is at capacity.",
        )
        self.shards_owned = self._gauge("shards_owned", "Shards of sandboxes that this replica owns.")
        self.lease_changes = self._counter(
            "lease_changes",
            "Changes of the shards that this replica owns. lost: not renewed in time; taken: its owner died.",
            reason="acquired released lost taken",
        )

    def _make_upstream(self) -> None:
        self.polls = self._counter(
            "polls",
            "Long polls of iLink. empty: iLink answered without messages; client_timeout: iLink did not answer.",
            outcome="messages empty client_timeout stale_token error",
        )
        self.polls_full = self.polls.labels(outcome="messages")
        self.polls_empty = self.polls.labels(outcome="empty")
        self.oldest_poll_age = self._gauge(
            "oldest_poll_age_seconds",
            "Longest time since a completed poll, over the bindings that poll or wait to poll.",
        )
        self.upstream_requests = self._counter(
            "upstream_requests",
            "Requests to iLink. ret_2: iLink throttles; ret_14: the token is stale.",
            endpoint=ENDPOINTS,
            outcome=f"ok {UPSTREAM_FAILURES}",
        )
        self.upstream_request_duration = self._histogram(
            "upstream_request_duration_seconds",
            "Duration of requests to iLink other than long polls.",
            _CALL_S,
            endpoint=" ".join(each for each in ENDPOINTS.split() if each not in LONG_POLLS.split()),
        )

    def _make_inbound(self) -> None:
        self.inbound_messages = self._counter(
            "inbound_messages",
            "Messages that a poll returned.",
            kind="text image voice file video unsupported",
            outcome="published duplicate unbound rejected publish_failed dead_lettered",
        )
        self.inbound_publish_duration = self._histogram(
            "inbound_publish_duration_seconds",
            "Time from the answer of a poll to the stream's acknowledgement of its new messages.",
            _FAST_S,
        )
        self.inbound_age = self._histogram(
            "inbound_age_seconds",
            "Time from WeChat's send time to the stream's acknowledgement, per message.",
            _MESSAGE_S,
        )

    def _make_outbound(self) -> None:
        self.outbound_received = self._counter(
            "outbound_received",
            "Commands received from the outbound stream. Each counts at most once. Commands in transit while a shard "
            "changes owner are not counted.",
        )
        self.outbound_messages = self._counter(
            "outbound_messages",
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
        self.outbound_in_flight = self._gauge(
            "outbound_in_flight", "Received commands that are neither parked nor settled."
        )
        self.outbound_parked = self._gauge(
            "outbound_parked", "Commands that wait for their user or for a login.", reason=PARKED
        )
        self.outbound_duration = self._histogram(
            "outbound_duration_seconds",
            "Time from the storage of a command that was never parked to its final outcome. failed: dead-lettered"
            " or uncertain; settled: every other outcome.",
            _MESSAGE_S,
            outcome="settled failed",
        )
        self.outbound_oldest_pending = self._gauge(
            "outbound_oldest_pending_seconds", "Age of the oldest command that is neither parked nor settled."
        )
        self.outbound_retries = self._counter(
            "outbound_retries", "Repeated sends, by the failure of the previous attempt.", reason=RETRIED
        )
        self.receipts = self._counter(
            "receipts",
            "Published receipts. Every outcome except parked is final.",
            outcome=" ".join([*FINAL_OUTCOMES, "parked"]),
        )
        self.dead_letters = self._counter(
            "dead_letters", "Dead letters, by the stream of the original message.", stream="out in ctl event"
        )
        self.schema_violations = self._counter(
            "schema_violations", "Requests that do not fit their schema.", kind="out ctl svc"
        )

    def _make_media(self) -> None:
        directions, outcomes = "in out", "ok failed"
        self.media_transfers = self._counter(
            "media_transfers",
            "Media files downloaded from (in) or uploaded to (out) iLink's CDN.",
            direction=directions,
            outcome=outcomes,
        )
        self.media_bytes = self._counter(
            "media_bytes", "Bytes of media transferred, counted before encryption.", direction=directions
        )
        self.media_duration = self._histogram(
            "media_duration_seconds", "Duration of a media transfer.", _MESSAGE_S, direction=directions
        )
        self.media_fetches = self._counter(
            "media_fetches",
            "Media of inbound messages brought to the object store, or the reason why not. dropped: too many waited;"
            " unbound: the person has left.",
            outcome="stored too_large timeout unavailable corrupt reference store unbound dropped",
        )

    def _make_logins(self) -> None:
        self.logins = self._counter(
            "logins",
            "QR logins that ended. already_bound: the user already has a bot of the sandbox.",
            outcome=" ".join(FINAL_STATUSES),
        )
        self.qr_refreshes = self._counter("qr_refreshes", "QR codes renewed during a login.")

    def _make_services(self) -> None:
        self.service_refusals = self._counter(
            "service_refusals",
            "Requests refused unread. busy: the sandbox has too many requests open; full: all open requests are too"
            " large; reply: the reply subject is not an inbox of the client.",
            reason="busy full reply",
        )

    def _make_bus(self) -> None:
        streams = "in event dead out kv media ctl"
        self.nats_connected = self._gauge("nats_connected", "1 while connected to NATS, else 0.")
        self.nats_reconnects = self._counter("nats_reconnects", "Reconnections to NATS.")
        self.nats_publish = self._counter(
            "nats_publish",
            "Writes to JetStream. retried: repeated attempts; refused: writes given up.",
            stream=streams,
            outcome="ok retried refused",
        )
        self.nats_publish_oldest = self._gauge(
            "nats_publish_oldest_seconds",
            "Age of the oldest write that its stream has not acknowledged, or 0. Later writes to that stream wait.",
        )
        self.nats_streams_missing = self._gauge(
            "nats_streams_missing", "Streams and buckets that were deleted, and buckets that lost keys."
        )
        self.nats_streams_altered = self._gauge(
            "nats_streams_altered",
            "Streams and buckets whose changed configuration breaks a guarantee, and paused consumers.",
        )
        self.nats_streams_degraded = self._gauge(
            "nats_streams_degraded",
            "Streams and buckets with a copy on a server that is lost or behind, or with too few copies.",
        )
        self.nats_publish_duration = self._histogram(
            "nats_publish_duration_seconds", "Time from a write to its acknowledgement.", _FAST_S, stream=streams
        )
        self.nats_consumer_pending = self._gauge(
            "nats_consumer_pending", "Messages that the consumer has not delivered yet.", consumer=CONSUMERS
        )
        self.nats_consumer_ack_pending = self._gauge(
            "nats_consumer_ack_pending", "Messages that were delivered and not acknowledged.", consumer=CONSUMERS
        )
        self.nats_redeliveries = self._counter(
            "nats_redeliveries", "Messages that the consumer delivered again.", consumer=CONSUMERS
        )

    def _counter(
        self, name: str, text: str, *, children: Iterable[tuple[str, ...]] | None = None, **labels: str
    ) -> Counter:
        """`labels`: the values of each label, as words. `children`: those that exist; by default all combinations."""
        metric = Counter(name, _help(text, labels), list(labels), namespace=NAMESPACE, registry=self.registry)
        for values in (_combinations(labels) if children is None else children) if labels else ():
            metric.child(*values)
        return metric

    def _gauge(self, name: str, text: str, **labels: str) -> Gauge:
        metric = Gauge(name, _help(text, labels), list(labels), namespace=NAMESPACE, registry=self.registry)
        for values in _combinations(labels) if labels else ():
            metric.labels(*values)
        return metric

    def _histogram(self, name: str, text: str, buckets: Sequence[float], **labels: str) -> Histogram:
        metric = Histogram(
            name, _help(text, labels), list(labels), namespace=NAMESPACE, registry=self.registry, buckets=buckets
        )
        for values in _combinations(labels) if labels else ():
            metric.child(*values)
        return metric


def _combinations(labels: dict[str, str]) -> Iterable[tuple[str, ...]]:
    return itertools.product(*(values.split() for values in labels.values()))


def _help(text: str, labels: dict[str, str]) -> str:
    """`text`, followed by the values of every label."""
    return text + "".join(f" {label}: {', '.join(values.split())}." for label, values in labels.items())
