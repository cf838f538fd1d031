"""A real NATS server per test, the streams on it, and the command line in this process."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import msgspec
import pytest
import structlog

from adapter.bridge.entries import messages_of
from adapter.cli import main
from adapter.cli.bus import BusConnection, connected_bus
from adapter.cli.demo import demo_settings
from adapter.cli.embedded import EmbeddedNats, adapter_running
from adapter.jetstream import topology
from adapter.jetstream.managed_connection import ManagedConnection
from adapter.settings import Settings, read_settings
from adapter.simulator import Simulator, SimulatorSettings
from tests import canary
from tests.e2e.memory import SMALL, in_memory

START_S = 60.0
"""For an adapter to start, and to stop."""


class Result(NamedTuple):
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [msgspec.json.decode(line) for line in self.out.splitlines()]


Command = Callable[..., Coroutine[Any, Any, Result]]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No setting of the machine, and no logging set up by a command, outlives or enters a test."""
    for name in [name for name in os.environ if name.startswith(("NATS_", "WECHAT_NATS_"))]:
        monkeypatch.delenv(name)
    configured = structlog.get_config()
    levels = {name: logging.getLogger(name).level for name in ("nats", "asyncio")}
    yield
    structlog.configure(**configured)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture
async def server(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[EmbeddedNats]:
    """An empty NATS, which is what NATS_URL says."""
    folder = tmp_path_factory.mktemp("bus") / "nats"
    with in_memory(folder):
        async with EmbeddedNats(folder) as nats:
            nobody = "127.0.0.1:9"  # no test asks the real iLink about a token
            ilink = {"WECHAT_NATS_ILINK_BASE_URL": f"http://{nobody}", "WECHAT_NATS_ALLOWED_HOSTS": nobody}
            for name, value in {**SMALL, **ilink, "NATS_URL": nats.url}.items():
                monkeypatch.setenv(name, value)
            yield nats
            nats.kill()


@pytest.fixture
def settings(server: EmbeddedNats) -> Settings:
    """Those of the environment."""
    return read_settings(os.environ)


@pytest.fixture
async def bus(settings: Settings, request: pytest.FixtureRequest) -> AsyncIterator[BusConnection]:
    """A connection to a NATS with all streams, and no adapter. Its 34 consumers are there for modules that say
    `CONSUMERS = True`: most commands have nothing to do with them, and the server takes a second to make them."""
    async with connected_bus(settings) as found:
        connection = ManagedConnection(settings, "test")
        await connection.adopt_client(found.nc)
        if getattr(request.module, "CONSUMERS", False):
            await topology.ensure_topology(connection, found.names, settings)
        else:
            await asyncio.gather(
                *(topology.create_stream(connection, each) for each in topology.wanted_streams(found.names, settings))
            )
        yield found


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Command:
    """`await cli("send", "s1", "hi")`, in a thread, since commands make their own event loop."""

    async def run(*arguments: str) -> Result:
        capsys.readouterr()
        code = await asyncio.to_thread(main, list(arguments))
        said = capsys.readouterr()  # so that pytest does not see it, and the hook in tests/conftest.py neither
        assert not canary.printed(said.out + said.err)
        return Result(code, said.out, said.err)

    return run


async def stored(sandbox: str, count: int = 1) -> list[dict[str, Any]]:
    """The messages in the inbox of a sandbox, once there are so many."""
    async with connected_bus() as bus, asyncio.timeout(START_S):
        while True:
            place = bus.names.stream_in, bus.names.inbox(sandbox)
            entries = await bus.read_stored(*place, keep=lambda one: messages_of(one.data))
            found = [msgspec.json.decode(raw, type=dict[str, Any]) for messages in entries for raw in messages]
            if len(found) >= count:
                return found


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    async with Simulator(SimulatorSettings(hold_ms=300, hint_ms=300)) as running:
        yield running


@pytest.fixture
async def adapter(
    server: EmbeddedNats, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[asyncio.Task[bool]]:
    """Commands ask the same iLink as it does."""
    monkeypatch.setenv("WECHAT_NATS_ILINK_BASE_URL", simulator.url)
    monkeypatch.setenv("WECHAT_NATS_ALLOWED_HOSTS", urlsplit(simulator.url).netloc)
    async with adapter_running(demo_settings(server.url, simulator.url), start_s=START_S, drain_s=START_S) as task:
        yield task
