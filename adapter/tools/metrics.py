"""Every metric of the adapter, in one class with its own registry.

Only this module imports prometheus_client. Labels are enums, and the help text lists their values. A bot, user,
sandbox, subject, id, URL or error text is never a label.
"""

from __future__ import annotations

import itertools
import platform
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, GCCollector, Histogram, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics import MetricWrapperBase

from adapter import __version__
from adapter.contract.messages import FINAL_OUTCOMES, FINAL_STATUSES, SCHEMA_VERSION

NAMESPACE = "wechat_adapter"
prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call] # a third of all samples

REFUSED = (
    "invalid not_bound ambiguous_bot other_user window_closed quota throttled needs_login too_long "
    "expired cancelled not_found rejected media"
)
DEAD = "unreadable too_large crashed"
STATES = "waiting polling storing throttled paused retrying stale needs_login"
PARKED = "window_closed quota throttled needs_login scheduled"
KINDS = "text media typing cancel unreadable bind unbind erase"
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
VERBS = (
    "bindings-list bindings-get login-start login-status login-verify login-cancel media-get media-put next receipt"
    " replay send window"
)
STREAMS = "in event dead out kv media"

_FAST_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0)
_ANSWER_S = (0.005, 0.025, 0.1, 0.5, 2.0, 10.0)
_CALL_S = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 15.0, 30.0)
_MESSAGE_S = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0)


M = TypeVar("M", bound=MetricWrapperBase)


class Metrics:
    """The table of metrics. Each attribute is one, named without prefix and unit.

    All children exist from the start, so rates begin at 0. The event loop alone changes
    metrics, while another thread may expose them.
    """

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        build_info = Gauge(
            "build_info",
            "Always 1. The labels give the versions of the adapter, of Python and of the bus schema.",
            ["version", "python", "schema_version"],
            namespace=NAMESPACE,
            registry=registry,
        )
        build_info.labels(__version__, platform.python_version(), SCHEMA_VERSION).set(1)

        def make(
            kind: Callable[..., M],
            name: str,
            text: str,
            labels: dict[str, str],
            children: Iterable[tuple[str, ...]] | None = None,
            **options: Any,
        ) -> M:
            """`labels`: the values of each label, as words. `children`: those that exist; by default all
            combinations."""
            text += "".join(f" {label}: {', '.join(values.split())}." for label, values in labels.items())
            metric = kind(name, text, [*labels], namespace=NAMESPACE, registry=registry, **options)
            if labels:
                for values in children or itertools.product(*(words.split() for words in labels.values())):
                    metric.labels(*values)
            return metric

        def counter(
            name: str, text: str, children: Iterable[tuple[str, ...]] | None = None, **labels: str
        ) -> Counter:
            return make(Counter, name, text, labels, children)

        def gauge(name: str, text: str, **labels: str) -> Gauge:
            return make(Gauge, name, text, labels)

        def histogram(name: str, text: str, buckets: Sequence[float], **labels: str) -> Histogram:
            return make(Histogram, name, text, labels, buckets=buckets)

        self.bindings = gauge("bindings", "Bindings of this replica.", state=STATES)
        self.bindings_capacity = gauge("bindings_capacity", "Maximum number of bindings that this replica serves.")
        self.bindings_unowned = gauge(
            "bindings_unowned",
            "Bindings that no replica polls: no replica owns their partition, or its owner is at capacity.",
        )
        self.partitions_owned = gauge("partitions_owned", "Partitions of sandboxes that this replica owns.")
        self.lease_changes = counter(
            "lease_changes",
            "Changes of the partitions that this replica owns. lost: not renewed in time; taken: its owner died.",
            reason="acquired released lost taken",
        )
        self.polls = counter(
            "polls",
            "Long polls of iLink. empty: iLink answered without messages; client_timeout: iLink did not answer.",
            outcome="messages empty client_timeout stale_token error",
        )
        self.oldest_poll_age = gauge(
            "oldest_poll_age_seconds",
            "Longest time since a completed poll, over the bindings that poll or wait to poll.",
        )
        self.newest_poll_age = gauge(
            "newest_poll_age_seconds",
            "Shortest time since a completed poll, over the bindings that poll: no poll of this replica was answered"
            " since. 0 without such bindings.",
        )
        self.upstream_requests = counter(
            "upstream_requests",
            "Requests to iLink. ret_2: iLink throttles; ret_14: the token is stale.",
            endpoint=ENDPOINTS,
            outcome=f"ok {UPSTREAM_FAILURES}",
        )
        self.upstream_request_duration = histogram(
            "upstream_request_duration_seconds",
            "Duration of requests to iLink other than long polls.",
            _CALL_S,
            endpoint=" ".join(each for each in ENDPOINTS.split() if each not in LONG_POLLS.split()),
        )
        self.inbound_messages = counter(
            "inbound_messages",
            "Messages that a poll returned.",
            kind="text image voice file video unsupported",
            outcome="published duplicate unbound rejected publish_failed dead_lettered",
        )
        self.inbound_publish_duration = histogram(
            "inbound_publish_duration_seconds",
            "Time from the answer of a poll to the stream's acknowledgement of its new messages.",
            _FAST_S,
        )
        self.inbound_age = histogram(
            "inbound_age_seconds",
            "Time from WeChat's send time to the stream's acknowledgement, per message.",
            _MESSAGE_S,
        )
        self.outbound_received = counter(
            "outbound_received",
            "Commands received from the outbound stream. Each counts at most once. Commands in transit while a "
            "partition changes owner are not counted.",
        )
        self.outbound_messages = counter(
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
        self.outbound_in_flight = gauge(
            "outbound_in_flight", "Received commands that are neither parked nor settled."
        )
        self.outbound_parked = gauge(
            "outbound_parked", "Commands that wait for their user, a login or their time.", reason=PARKED
        )
        self.outbound_duration = histogram(
            "outbound_duration_seconds",
            "Time from the storage of a command that was never parked to its final outcome. failed: dead-lettered"
            " or uncertain; settled: every other outcome.",
            _MESSAGE_S,
            outcome="settled failed",
        )
        self.outbound_oldest_pending = gauge(
            "outbound_oldest_pending_seconds", "Age of the oldest command that is neither parked nor settled."
        )
        self.outbound_retries = counter(
            "outbound_retries", "Repeated sends, by the failure of the previous attempt.", reason=RETRIED
        )
        self.receipts = counter(
            "receipts",
            "Published receipts. Every outcome except parked is final.",
            outcome=" ".join([*FINAL_OUTCOMES, "parked"]),
        )
        self.dead_letters = counter(
            "dead_letters", "Dead letters, by the stream of the original message.", stream="out in event"
        )
        self.schema_violations = counter(
            "schema_violations", "Requests that do not fit their schema.", kind="out svc"
        )
        self.ready = gauge("ready", "1 while /readyz says that this replica is ready, else 0.")
        self.nats_connected = gauge("nats_connected", "1 while connected to NATS, else 0.")
        self.nats_reconnects = counter("nats_reconnects", "Reconnections to NATS.")
        self.nats_publish = counter(
            "nats_publish",
            "Writes to JetStream. retried: repeated attempts; refused: writes given up.",
            stream=STREAMS,
            outcome="ok retried refused",
        )
        self.nats_publish_oldest = gauge(
            "nats_publish_oldest_seconds",
            "Age of the oldest write that its stream has not acknowledged, or 0. Later writes to that stream wait.",
        )
        self.nats_streams_missing = gauge(
            "nats_streams_missing", "Streams and buckets that were deleted, and buckets that lost keys."
        )
        self.nats_streams_altered = gauge(
            "nats_streams_altered",
            "Streams and buckets whose changed configuration breaks a guarantee.",
        )
        self.nats_streams_degraded = gauge(
            "nats_streams_degraded",
            "Streams and buckets with a copy on a server that is lost or behind, or with too few copies.",
        )
        self.nats_publish_duration = histogram(
            "nats_publish_duration_seconds", "Time from a write to its acknowledgement.", _FAST_S, stream=STREAMS
        )
        self.nats_consumer_pending = gauge(
            "nats_consumer_pending", "Messages that the consumer has not delivered yet.", consumer=CONSUMERS
        )
        self.nats_consumer_ack_pending = gauge(
            "nats_consumer_ack_pending", "Messages that were delivered and not acknowledged.", consumer=CONSUMERS
        )
        self.nats_redeliveries = counter(
            "nats_redeliveries", "Messages that the consumer delivered again.", consumer=CONSUMERS
        )
        self.service_refusals = counter(
            "service_refusals",
            "Requests refused unread. busy: the sandbox has too many requests open; full: all open requests are too"
            " large; reply: the reply subject is not an inbox of the client.",
            reason="busy full reply",
        )
        self.service_requests = counter(
            "service_requests",
            "Answered requests to the services on the bus. refused: the request is at fault (4xx); unavailable: 503;"
            " failed: 500; unanswered: the connection broke.",
            verb=VERBS,
            outcome="ok refused unavailable failed unanswered",
        )
        self.service_duration = histogram(
            "service_duration_seconds",
            "Time from a request's admission to its answer, with its wait for a turn.",
            _ANSWER_S,
            verb=VERBS,
        )
        self.media_transfers = counter(
            "media_transfers",
            "Media files downloaded from (in) or uploaded to (out) iLink's CDN.",
            direction=DIRECTIONS,
            outcome="ok failed",
        )
        self.media_bytes = counter(
            "media_bytes", "Bytes of media transferred, counted before encryption.", direction=DIRECTIONS
        )
        self.media_duration = histogram(
            "media_duration_seconds", "Duration of a media transfer.", _MESSAGE_S, direction=DIRECTIONS
        )
        self.media_fetches = counter(
            "media_fetches",
            "Media of inbound messages brought to the object store, or the reason why not. dropped: too many waited;"
            " unbound: the person has left.",
            outcome="stored too_large timeout unavailable corrupt reference store unbound dropped",
        )
        self.logins = counter(
            "logins",
            "QR logins that ended. already_bound: the user already has a bot of the sandbox.",
            outcome=" ".join(FINAL_STATUSES),
        )
        self.qr_refreshes = counter("qr_refreshes", "QR codes renewed during a login.")
        self.event_loop_lag = histogram("event_loop_lag_seconds", "How late the event loop wakes a sleeper.", _FAST_S)
        self.tasks = gauge(
            "tasks", "Tasks of the event loop. poller: one per bot; sender: one per person with commands.", kind=TASKS
        )

    def value(self, name: str, **labels: str) -> float:
        """Value of the sample `name` (without prefix, with `_total`, `_count` …), or 0 if missing. For tests."""
        return self.registry.get_sample_value(f"{NAMESPACE}_{name}", labels) or 0.0

    def expose(self, accept: str = "") -> tuple[bytes, str]:
        """All metrics and their content type, in the format that the HTTP header `accept` asks for."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type
