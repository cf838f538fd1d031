"""Spans: what becomes of an answer, a message and a command, in the traces that the bus tells of."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from adapter.contract.headers import derive_traceparent
from adapter.observability.spans import Spans
from tests.outbound.shards import ready, user_writes

VIRTUAL_TIME = True

AUTHORS = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
MESSAGE = "in:bot1@im.bot:m1"


def made() -> tuple[Spans, InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    return Spans(SimpleSpanProcessor(exporter), "pod-1"), exporter


def by_name(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in exporter.get_finished_spans()}


def traceparent(context: Any) -> str:
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-01"


def seconds(span: ReadableSpan) -> tuple[float, float]:
    return (span.start_time or 0) / 1e9, (span.end_time or 0) / 1e9


def test_a_poll_has_its_own_trace_and_each_message_links_to_it() -> None:
    spans, exporter = made()
    spans.record_poll("bot1@im.bot", "s1", 7, (1_000, 31_000, 31_250))
    spans.record_publish(MESSAGE, "bot1@im.bot", "s1", 7, (31_000, 31_500))
    found = by_name(exporter)
    poll, store, publish = found["poll"], found["store"], found["publish"]
    assert (seconds(poll), seconds(store), seconds(publish)) == ((1, 31.25), (31, 31.25), (31, 31.5))
    assert (poll.parent, store.parent, publish.parent) == (None, poll.context, None)
    assert traceparent(publish.context) == derive_traceparent(MESSAGE)
    assert [link.context for link in publish.links] == [poll.context]
    assert publish.attributes == {
        "wechat.bot": "bot1@im.bot",
        "wechat.sandbox": "s1",
        "wechat.message": MESSAGE,
    }


@pytest.mark.parametrize("author", ["", AUTHORS], ids=["none", "author"])
async def test_a_command_that_was_parked_waits_and_is_sent_below_what_it_answers(author: str) -> None:
    bench, shard = await ready(is_open=False)
    spans, exporter = made()
    bench.access.events.spans = spans
    headers = {"traceparent": author} if author else {}
    shard.intake.on_delivery(bench.command("private", id="c1", reply_to=MESSAGE, headers=headers))
    await asyncio.sleep(30)
    assert exporter.get_finished_spans() == ()  # parked: it has not ended
    await user_writes(bench)
    await asyncio.sleep(30)
    found = by_name(exporter)
    command, wait, send = found["command"], found["wait"], found["send"]
    parent = command.parent
    assert traceparent(parent) == (author or derive_traceparent(MESSAGE))
    assert {span.context.trace_id for span in found.values() if span.context} == {parent.trace_id}  # type: ignore[union-attr]
    assert wait.parent == send.parent == command.context
    assert seconds(wait)[1] - seconds(wait)[0] >= 30
    assert seconds(wait)[1] == seconds(send)[0]
    assert seconds(command) == (seconds(wait)[0], seconds(send)[1])
    (opened,) = wait.links
    assert traceparent(opened.context) == derive_traceparent(str((command.attributes or {})["wechat.opened_by"]))
    assert command.status.is_ok or command.status.is_unset
    assert "private" not in "".join(span.to_json() for span in found.values())


async def test_a_command_that_is_refused_has_failed_and_was_not_sent() -> None:
    bench, shard = await ready(is_open=False)
    spans, exporter = made()
    bench.access.events.spans = spans
    shard.intake.on_delivery(bench.command("hi", id="c1", when_closed="refuse"))
    await asyncio.sleep(5)
    found = by_name(exporter)
    assert set(found) == {"command", "wait"}
    assert not found["command"].status.is_ok
    assert found["command"].status.is_unset is False
    assert found["command"].parent is None


@pytest.mark.parametrize(
    ("environ", "name"),
    [({}, "wechat-nats"), ({"OTEL_SERVICE_NAME": "bridge"}, "bridge")],
    ids=["own", "given"],
)
def test_the_service_is_named_by_the_environment_or_by_itself(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], name: str
) -> None:
    for variable, value in environ.items():
        monkeypatch.setenv(variable, value)
    spans, exporter = made()
    spans.record_poll("b", "s1", 1, (1, 2, 3))
    resource = by_name(exporter)["poll"].resource.attributes
    assert (resource["service.name"], resource["service.instance.id"]) == (name, "pod-1")
