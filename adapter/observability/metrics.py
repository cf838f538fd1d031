"""Every metric, in one class with its own registry; beside `fast_metrics` the only file that imports
prometheus_client.

Labels are enums, listed in the help text. Never a label: bot, user, sandbox, subject, id, URL, error text.
"""

from __future__ import annotations

import itertools
import platform
from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Gauge, GCCollector, ProcessCollector
from prometheus_client.exposition import choose_encoder

from adapter import __version__
from adapter.contract.messages import FINAL_OUTCOMES, FINAL_STATUSES, SCHEMA_VERSION
from adapter.observability.fast_metrics import Counter, Histogram

NAMESPACE = "wechat_adapter"

REFUSED = (
    "invalid",
    "not_bound",
    "ambiguous_bot",
    "other_user",
    "window_closed",
    "quota",
    "reserved",
    "throttled",
    "needs_login",
    "too_long",
    "expired",
    "rejected",
    "backlog",
    "media",
    "typing",
)
DEAD = ("unreadable", "too_large", "unreachable", "crashed")
STATES = ("starting", "polling", "throttled", "paused", "needs_login", "error", "draining")
PARKED = ("window_closed", "quota", "throttled", "needs_login")
KINDS = ("text", "media", "typing", "unreadable")
TASKS = ("poller", "conversation", "other")
ENDPOINTS = (
    "getupdates",
    "sendmessage",
    "notifystart",
    "notifystop",
    "getuploadurl",
    "getconfig",
    "sendtyping",
    "get_bot_qrcode",
    "get_qrcode_status",
    "cdn_upload",
    "cdn_download",
)
LONG_POLLS = ("getupdates", "get_qrcode_status")
UPSTREAM_FAILURES = (
    "ret_2",
    "ret_14",
    "ret_other",
    "http_4xx",
    "http_5xx",
    "timeout",
    "network",
    "unreadable",
)
RETRIED = tuple(failure for failure in UPSTREAM_FAILURES if failure != "ret_2")
CONSUMERS = ("out", "router", "control")

_FAST_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0)
_CALL_S = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 15.0, 30.0)
_MESSAGE_S = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0)


class Metrics:
    """Attributes are the names without prefix and unit; all children exist from the start, so that rates begin at 0.

    Safe to change in the event loop while another thread exposes them.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)

        self.build_info = Gauge(
            "build_info",
            "Always 1; what runs: version of the program, Python, version of the bus schema.",
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
            "Tasks of the event loop; poller: one per bot, conversation: what sends and settles commands.",
            kind=TASKS,
        )

    def value(self, name: str, **labels: str) -> float:
        """The sample `name` (without prefix, with `_total`, `_count` …), 0 where there is none: for tests."""
        return self.registry.get_sample_value(f"{NAMESPACE}_{name}", labels) or 0.0

    def expose(self, accept: str = "") -> tuple[bytes, str]:
        """All metrics and their content type, in the format that the HTTP header `accept` asks for."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    def _make_ownership(self) -> None:
        self.bindings = self._gauge(
            "bindings",
            "Bindings of this replica.",
            state=STATES,
        )
        self.bindings_capacity = self._gauge("bindings_capacity", "Bindings that this replica serves at most.")
        self.bindings_unowned = self._gauge(
            "bindings_unowned", "Bindings of shards that no replica owns, or beyond capacity: polled by nobody."
        )
        self.tokens_sealed = self._gauge(
            "tokens_sealed", "1 if bot tokens are sealed at rest; 0: no key is set, and they are stored as they are."
        )
        self.shards_owned = self._gauge("shards_owned", "Shards of sandboxes that this replica owns.")
        self.lease_changes = self._counter(
            "lease_changes",
            "Changes of the shards that this replica owns; lost: it could not renew, taken: from a dead replica.",
            reason=["acquired", "released", "lost", "taken"],
        )

    def _make_upstream(self) -> None:
        self.polls = self._counter(
            "polls",
            "Long polls of iLink; empty is the server's answer, client_timeout is none.",
            outcome=["messages", "empty", "client_timeout", "stale_token", "error"],
        )
        self.polls_full = self.polls.labels(outcome="messages")
        self.polls_empty = self.polls.labels(outcome="empty")
        self.oldest_poll_age = self._gauge(
            "oldest_poll_age_seconds", "Longest time since a completed poll among the bindings that poll, or wait to."
        )
        self.upstream_requests = self._counter(
            "upstream_requests",
            "Requests to iLink; ret_2 throttles, ret_14 is a stale token.",
            endpoint=ENDPOINTS,
            outcome=["ok", *UPSTREAM_FAILURES],
        )
        self.upstream_request_duration = self._histogram(
            "upstream_request_duration_seconds",
            "Duration of requests to iLink, without the long poll.",
            _CALL_S,
            endpoint=[endpoint for endpoint in ENDPOINTS if endpoint not in LONG_POLLS],
        )

    def _make_inbound(self) -> None:
        self.inbound_messages = self._counter(
            "inbound_messages",
            "Messages that a poll returned.",
            kind=["text", "image", "voice", "file", "video", "unsupported"],
            outcome=["published", "duplicate", "unbound", "rejected", "publish_failed", "dead_lettered"],
        )
        self.quotes = self._counter(
            "quotes",
            "Quotes in inbound messages, by whose words were found; unknown: nobody's.",
            outcome=["user", "bot", "unknown"],
        )
        self.inbound_publish_duration = self._histogram(
            "inbound_publish_duration_seconds",
            "Of each new message, from the answer of the poll to the stream's acknowledgement of its batch.",
            _FAST_S,
        )
        self.inbound_age = self._histogram(
            "inbound_age_seconds", "From WeChat's time of sending to the stream's acknowledgement.", _MESSAGE_S
        )

    def _make_outbound(self) -> None:
        self.outbound_received = self._counter(
            "outbound_received",
            "Commands taken from the outbound stream, each at most once: what was on its way as a shard changed "
            "hands is counted by neither replica.",
        )
        self.outbound_messages = self._counter(
            "outbound_messages",
            "Commands with a final outcome; duplicate: a command seen before, not sent again; unreadable: refused or"
            " put aside before anybody knew what it was.",
            children=[
                (kind, outcome, reason)
                for kind in KINDS
                for outcome, reason in (
                    ("accepted", "none"),
                    ("accepted_unconfirmed", "none"),
                    *(("refused", reason) for reason in REFUSED),
                    ("uncertain", "none"),
                    *(("dead_lettered", reason) for reason in DEAD),
                    ("duplicate", "none"),
                )
            ],
            kind=KINDS,
            outcome=[*FINAL_OUTCOMES, "duplicate"],
            reason=["none", *REFUSED, *DEAD],
        )
        self.outbound_in_flight = self._gauge(
            "outbound_in_flight", "Commands taken that are neither parked nor settled."
        )
        self.outbound_parked = self._gauge(
            "outbound_parked", "Commands that wait for their user or a login, not for the service.", reason=PARKED
        )
        self.outbound_duration = self._histogram(
            "outbound_duration_seconds",
            "From storing a command to its final outcome, without the time from parking it to its next turn; failed:"
            " dead-lettered or uncertain, settled: the rest.",
            _MESSAGE_S,
            outcome=["settled", "failed"],
        )
        self.outbound_oldest_pending = self._gauge(
            "outbound_oldest_pending_seconds", "Age of the oldest command that is neither parked nor settled."
        )
        self.outbound_retries = self._counter(
            "outbound_retries", "Sends repeated, by the failure of the attempt before.", reason=RETRIED
        )
        self.receipts = self._counter(
            "receipts",
            "Receipts published; all but parked are final.",
            outcome=[*FINAL_OUTCOMES, "parked"],
        )
        self.dead_letters = self._counter(
            "dead_letters", "Messages put aside for a person, by where they came from.", stream=["out", "in", "ctl"]
        )
        self.schema_violations = self._counter(
            "schema_violations", "Requests that do not fit their schema.", kind=["out", "ctl", "svc"]
        )

    def _make_media(self) -> None:
        directions, outcomes = ["in", "out"], ["ok", "failed"]
        self.media_transfers = self._counter(
            "media_transfers",
            "Media downloaded from (in) or uploaded to (out) iLink's CDN.",
            direction=directions,
            outcome=outcomes,
        )
        self.media_bytes = self._counter("media_bytes", "Plain bytes of media transferred.", direction=directions)
        self.media_duration = self._histogram(
            "media_duration_seconds", "Duration of a transfer.", _MESSAGE_S, direction=directions
        )

    def _make_logins(self) -> None:
        self.logins = self._counter(
            "logins",
            "QR logins that ended; already_bound: the user has a bot of the sandbox.",
            outcome=FINAL_STATUSES,
        )
        self.qr_refreshes = self._counter("qr_refreshes", "QR codes replaced by a new one during a login.")

    def _make_services(self) -> None:
        self.service_refusals = self._counter(
            "service_refusals",
            "Requests that were not looked at; busy: too many of one sandbox at once, full: too many bytes of all,"
            " reply: they ask for an answer elsewhere than in an inbox of the asker.",
            reason=["busy", "full", "reply"],
        )

    def _make_bus(self) -> None:
        streams = ["in", "journal", "event", "dead", "out", "kv", "media", "ctl"]
        self.nats_connected = self._gauge("nats_connected", "1 while connected to NATS, else 0.")
        self.nats_reconnects = self._counter("nats_reconnects", "Connections to NATS made again after a loss.")
        self.nats_publish = self._counter(
            "nats_publish",
            "Writes to JetStream; retried counts attempts, refused those given up.",
            stream=streams,
            outcome=["ok", "retried", "refused"],
        )
        self.nats_publish_oldest = self._gauge(
            "nats_publish_oldest_seconds",
            "Age of the oldest write that its stream has not acknowledged, 0 if none. What writes there waits too.",
        )
        self.nats_streams_missing = self._gauge(
            "nats_streams_missing", "Streams and buckets that were deleted, and buckets that lack keys."
        )
        self.nats_streams_altered = self._gauge(
            "nats_streams_altered",
            "Streams and buckets changed so that a guarantee is broken, and consumers that were paused.",
        )
        self.nats_publish_duration = self._histogram(
            "nats_publish_duration_seconds", "From a write to its acknowledgement.", _FAST_S, stream=streams
        )
        self.nats_consumer_pending = self._gauge(
            "nats_consumer_pending", "Messages that a consumer has yet to deliver.", consumer=CONSUMERS
        )
        self.nats_consumer_ack_pending = self._gauge(
            "nats_consumer_ack_pending", "Messages delivered and not acknowledged.", consumer=CONSUMERS
        )
        self.nats_redeliveries = self._counter(
            "nats_redeliveries", "Messages that came again from a consumer.", consumer=CONSUMERS
        )

    def _counter(
        self,
        name: str,
        text: str,
        *,
        children: Iterable[tuple[str, ...]] | None = None,
        **labels: Sequence[str],
    ) -> Counter:
        made = Counter(f"{NAMESPACE}_{name}", _help(text, labels), list(labels), self.registry)
        for values in itertools.product(*labels.values()) if children is None else children:
            made.child(*values)
        return made

    def _gauge(self, name: str, text: str, **labels: Sequence[str]) -> Gauge:
        made = Gauge(name, _help(text, labels), list(labels), namespace=NAMESPACE, registry=self.registry)
        for values in itertools.product(*labels.values()):
            if values:
                made.labels(*values)
        return made

    def _histogram(self, name: str, text: str, buckets: Sequence[float], **labels: Sequence[str]) -> Histogram:
        made = Histogram(f"{NAMESPACE}_{name}", _help(text, labels), list(labels), self.registry, buckets)
        for values in itertools.product(*labels.values()):
            made.child(*values)
        return made


def _help(text: str, labels: dict[str, Sequence[str]]) -> str:
    """`text` with the values of every label."""
    lists = (f" {label}: {', '.join(values)}." for label, values in labels.items())
    return text + "".join(lists)
