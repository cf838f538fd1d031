"""Spans as a collector gets them: a real adapter, OTLP over HTTP, and the variables of OpenTelemetry alone."""

from __future__ import annotations

import asyncio
import http.server
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from adapter.cli.demo import demo_settings
from adapter.cli.embedded import EmbeddedNats
from adapter.cli.lifetime import adapter_running
from adapter.contract.headers import derive_traceparent
from adapter.replica.wiring import _exporting_spans
from adapter.simulator import Simulator
from tests.cli.conftest import START_S, Command


class Collector(http.server.ThreadingHTTPServer):
    """Takes spans."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def spans(self) -> list[Span]:
        found: list[Span] = []
        for body in self.bodies:
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                found += [span for scope in resource.scope_spans for span in scope.spans]
        return found


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        self.server.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.05,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
async def traced_adapter(
    server: EmbeddedNats, simulator: Simulator, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[asyncio.Task[None]]:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
    async with adapter_running(demo_settings(server.url, simulator.url), start_s=START_S, drain_s=START_S) as task:
        yield task


async def test_a_conversation_is_in_the_traces_that_the_bus_tells_of(
    cli: Command,
    simulator: Simulator,
    server: EmbeddedNats,
    collector: Collector,
    tmp_path: Path,
    traced_adapter: None,
) -> None:
    bot = simulator.add_bot()
    token = tmp_path / "token"
    token.write_text(bot.token)
    assert (await cli("bind", "s1", bot.bot, "--token-file", str(token), "--user", bot.user)).code == 0
    simulator.say(bot.user, "private words")
    (message,) = (await cli("tail", "s1", "--all", "--count", "1", "--json")).rows
    assert (await cli("send", "s1", "private answer")).code == 0
    while {span.name for span in collector.spans} != {"poll", "store", "publish", "command", "wait", "send"}:
        await asyncio.sleep(0.1)
    publish = next(span for span in collector.spans if span.name == "publish")
    polls = {(span.trace_id, span.span_id) for span in collector.spans if span.name == "poll"}
    assert publish.trace_id.hex() == derive_traceparent(message["id"])[3:35]
    assert {(link.trace_id, link.span_id) for link in publish.links} <= polls
    assert not any(b"private" in body or bot.user.encode() in body for body in collector.bodies)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_TRACES_EXPORTER": "none"},
    ],
    ids=["no-collector", "disabled", "none"],
)
def test_nothing_is_exported_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str]) -> None:
    for variable, value in environ.items():
        monkeypatch.setenv(variable, value)
    assert _exporting_spans("pod-1") is None


def test_without_the_extra_the_adapter_starts_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    monkeypatch.delitem(sys.modules, "adapter.observability.spans", raising=False)
    assert _exporting_spans("pod-1") is None
    assert "spans.unavailable" in capsys.readouterr().out
