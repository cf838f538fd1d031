"""Spans of polls, messages and commands for OpenTelemetry.

The module is imported only if the variables of OpenTelemetry name a collector, because the SDK is the extra `otel`. A
span is created at the end of its work, and its ids are derived from the traceparents on the bus. The adapter thus
carries no span along, and an agent that continues the trace of a message has its spans in the same trace.

    poll ─ store              a trace for each answer of iLink
    publish                   an inbound message; links to the poll
      command ─ wait, send    below the message that it answers, or below its author's span
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from adapter import __version__
from adapter.contract.headers import derive_traceparent

_SCOPE = InstrumentationScope("wechat-nats", __version__)


class Spans:
    """Passes spans to a processor. Times are Unix milliseconds; `journal` is the sequence of a journal record."""

    def __init__(self, processor: SpanProcessor, instance: str) -> None:
        """`instance`: this replica's name. OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES give the rest."""
        self._processor = processor
        resource, attributes = Resource.create(), {"service.instance.id": instance}
        if str(resource.attributes.get("service.name", "")).startswith("unknown_service"):
            attributes["service.name"] = "wechat-nats"
        self._resource = resource.merge(Resource(attributes))

    def close(self) -> None:
        """Exports the remaining spans, which may take seconds."""
        self._processor.shutdown()

    def record_poll(self, bot: str, sandbox: str, journal: int, times_ms: tuple[int, int, int]) -> None:
        """`times_ms`: start of the poll, its answer, storage of the answer."""
        began_ms, received_ms, stored_ms = times_ms
        poll, about = _poll(bot, journal), {"wechat.bot": bot, "wechat.sandbox": sandbox}
        self._record("poll", poll, (began_ms, stored_ms), about, kind=SpanKind.CLIENT)
        self._record("store", _child(poll, "store"), (received_ms, stored_ms), about, parent=poll)

    def record_publish(self, message: str, bot: str, sandbox: str, journal: int, times_ms: tuple[int, int]) -> None:
        """`times_ms`: arrival of the answer with the message, publication of the message."""
        about = {"wechat.bot": bot, "wechat.sandbox": sandbox, "wechat.message": message}
        links = [_poll(bot, journal)]
        self._record("publish", derive_traceparent(message), times_ms, about, links=links, kind=SpanKind.PRODUCER)

    def record_command(
        self, receipts: str, author: str, reply_to: str, about: Mapping[str, str], times_ms: tuple[int, int, int]
    ) -> None:
        """`receipts`, `author`: traceparents of the receipts and of the author, or "". `times_ms`: storage of the
        command, its last request (0: none), storage of its final receipt. `about` has `wechat.outcome`, and for a
        parked command `wechat.opened_by`: the message that opened the window."""
        stored_ms, sent_ms, ended_ms = times_ms
        command = _child(author, about["wechat.command"]) if author else receipts
        parent = author or (derive_traceparent(reply_to) if reply_to else "")
        self._record("command", command, (stored_ms, ended_ms), about, parent=parent, kind=SpanKind.CONSUMER)
        links = [derive_traceparent(about["wechat.opened_by"])] if "wechat.opened_by" in about else []
        waited_ms = (stored_ms, sent_ms or ended_ms)
        self._record("wait", _child(command, "wait"), waited_ms, about, parent=command, links=links)
        if sent_ms:
            send = _child(command, "send")
            self._record("send", send, (sent_ms, ended_ms), about, parent=command, kind=SpanKind.CLIENT)

    def _record(
        self,
        name: str,
        traceparent: str,
        times_ms: tuple[int, int],
        about: Mapping[str, str],
        *,
        parent: str = "",
        links: Sequence[str] = (),
        kind: SpanKind = SpanKind.INTERNAL,
    ) -> None:
        is_failed = about.get("wechat.outcome", "accepted") not in ("accepted", "accepted_unconfirmed")
        span = ReadableSpan(
            name=name,
            context=_context(traceparent),
            parent=_context(parent) if parent else None,
            resource=self._resource,
            attributes=about,
            links=[Link(_context(link)) for link in links],
            kind=kind,
            instrumentation_scope=_SCOPE,
            status=Status(StatusCode.ERROR) if is_failed else Status(),
            start_time=times_ms[0] * 1_000_000,
            end_time=max(times_ms) * 1_000_000,
        )
        self._processor.on_end(span)


def _poll(bot: str, journal: int) -> str:
    return derive_traceparent(f"journal:{bot}:{journal}")


def _child(parent: str, name: str) -> str:
    return parent[:36] + hashlib.blake2b(f"{parent}:{name}".encode(), digest_size=8).hexdigest() + parent[52:]


def _context(traceparent: str) -> SpanContext:
    trace_id, span_id = int(traceparent[3:35], 16), int(traceparent[36:52], 16)
    return SpanContext(trace_id, span_id, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))


def exporting_spans(instance: str) -> Spans:
    """Spans that a thread exports to the target in the variables of OpenTelemetry."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    return Spans(BatchSpanProcessor(OTLPSpanExporter()), instance)
