"""The probes of a real adapter: what costs readiness, what costs life, and what must cost neither."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import nats
import pytest

from adapter.cli.embedded import EmbeddedNats
from adapter.replica.app import run_replica
from adapter.replica.health import STUCK_S
from adapter.replica.wiring import Replica
from adapter.settings import read_settings
from adapter.simulator import FaultRule, Simulator
from adapter.tools.timing import SystemClock
from tests.e2e.waiting import eventually, free_port
from tests.e2e.world import TOKEN_KEY, AdapterProcess


class Probes:
    """Asks one adapter."""

    def __init__(self, port: int) -> None:
        self._base = f"http://127.0.0.1:{port}"

    def ask(self, path: str) -> tuple[int, dict[str, dict[str, Any]]]:
        """Status and checks by name. Raises httpx.HTTPError."""
        with httpx.Client(trust_env=False, timeout=20) as http:
            answer = http.get(self._base + path)
        return answer.status_code, {check["name"]: check for check in json.loads(answer.content)}

    def is_served(self, path: str) -> bool:
        with httpx.Client(trust_env=False, timeout=20) as http:
            return http.get(self._base + path).status_code == 200

    async def gives(self, path: str, status: int, *failing: str) -> dict[str, dict[str, Any]]:
        """Waits for a status with exactly these checks failing; the checks."""
        found: dict[str, dict[str, Any]] = {}

        async def so() -> bool:
            nonlocal found
            try:
                now, found = await asyncio.to_thread(self.ask, path)
            except httpx.HTTPError:
                return False
            return now == status and {name for name, check in found.items() if not check["ok"]} == set(failing)

        await eventually(so, f"{path} gives {status} for {failing}: {found}")
        return found


async def test_an_adapters_probes_from_its_start_to_its_end(tmp_path: Path) -> None:
    """NATS late, iLink broken, NATS gone and back, SIGTERM while a long poll waits."""
    nats_port, port = free_port(), free_port()
    probes = Probes(port)
    async with Simulator() as sim:
        adapter = AdapterProcess(
            {
                "NATS_URL": f"nats://127.0.0.1:{nats_port}",
                "WECHAT_NATS_ILINK_BASE_URL": sim.url,
                "WECHAT_NATS_ALLOWED_HOSTS": "127.0.0.1",
                "WECHAT_NATS_HTTP_ADDR": f"127.0.0.1:{port}",
                "WECHAT_NATS_TOKEN_KEY": TOKEN_KEY,
            },
            tmp_path / "adapter.log",
        )
        await adapter.start()
        try:
            await eventually(lambda: _has_detail(probes, "/startupz", "started", "connecting to NATS"), "it says why")
            await probes.gives("/readyz", 503, "started", "jetstream")
            assert probes.ask("/livez")[0] == 200
            server = EmbeddedNats(tmp_path / "nats", nats_port)
            async with server:
                await probes.gives("/startupz", 200)
                await probes.gives("/readyz", 200)

                sim.set_fault(FaultRule(fault="F1"))  # every request to iLink fails
                bot = sim.add_bot()
                await _bind(server.url, bot.bot, bot.token, bot.user)
                await eventually(lambda: _polled(sim, bot.bot), "iLink was asked, and failed")
                for path in ("/startupz", "/livez", "/readyz"):
                    assert probes.ask(path)[0] == 200
                sim.clear_faults()
                await eventually(lambda: _parked(sim), "a poll waits")
                server.kill()
                await eventually(
                    lambda: _has_detail(probes, "/readyz", "nats", "disconnected"), "the outage is noticed"
                )
                status, found = probes.ask("/readyz")
                assert status == 200, "a short outage moves nothing"
                await probes.gives("/readyz", 503, "nats")
                for path in ("/startupz", "/livez"):
                    assert probes.ask(path)[0] == 200
            async with EmbeddedNats(tmp_path / "nats", nats_port):
                found = await probes.gives("/readyz", 200)
                assert found["nats"]["since_ms"] > found["started"]["since_ms"]

                await eventually(lambda: _parked(sim), "a poll waits")
                adapter.signal(signal.SIGTERM)
                found = await probes.gives("/readyz", 503, "not_draining")
                assert found["not_draining"]["detail"] == "shutting down"
                assert probes.ask("/livez")[0] == 200
                assert adapter.running, "a poll is not cut for it"
                sim.say(bot.bot, "the poll ends with this")
                assert await adapter.ended() == 0
        finally:
            if adapter.running:
                await adapter.kill()


async def _bind(url: str, bot: str, token: str, user: str) -> None:
    nc = await nats.connect(url)
    body = {"bot": bot, "bot_token": token, "user": user}
    await nc.jetstream().publish("wechat.bind.s1", json.dumps(body).encode())
    await nc.close()


async def _polled(sim: Simulator, bot: str) -> bool:
    return any(call.endpoint == "getupdates" for call in sim.calls(bot))


async def _parked(sim: Simulator) -> bool:
    return sim.stats().parked == 1


async def _has_detail(probes: Probes, path: str, check: str, words: str) -> bool:
    try:
        _, found = await asyncio.to_thread(probes.ask, path)
    except httpx.HTTPError:
        return False
    return words in found[check]["detail"]


class Loop:
    """An adapter in a thread with an event loop of its own, which a test may hold up."""

    def __init__(self, url: str) -> None:
        self.port = free_port()
        self.ready = threading.Event()
        self._stop = asyncio.Event()
        settings = read_settings(
            {"NATS_URL": url, "WECHAT_NATS_HTTP_ADDR": f"127.0.0.1:{self.port}", "WECHAT_NATS_TOKEN_KEY": TOKEN_KEY}
        )
        self.replica = Replica(settings)
        self.late_s = 0.0
        """How far the probes' clock was put forward."""
        late = self

        class LateClock(SystemClock):
            def monotonic(self) -> float:
                return super().monotonic() + late.late_s

        self.replica.health.clock = LateClock()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._run, name="adapter")
        self.thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_until_complete(run_replica(self.replica, self._stop, self.ready.set))
        self.loop.close()

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self._stop.set)
        self.thread.join()


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Loop]:
    """A replica in service on a server of its own."""
    server = EmbeddedNats(tmp_path / "nats", free_port())
    runner = asyncio.Runner()
    runner.run(server.__aenter__())
    try:
        loop = Loop(server.url)
        try:
            loop.ready.wait()
            yield loop
        finally:
            loop.stop()
    finally:
        server.kill()
        runner.close()


def block(free: threading.Event) -> None:
    """A call that waits, as one to a file system that is gone."""
    free.wait()


def burn(free: threading.Event) -> None:
    """A computation without end, which keeps the interpreter's lock."""
    while not free.is_set():
        pass


def test_a_stuck_event_loop_costs_life_and_silences_no_probe(held: Loop) -> None:
    """The loop is held for real; only the thirty seconds are not waited for: the probes' clock is put forward."""
    for hold in (block, burn):
        stick_and_free(held, hold)


def stick_and_free(held: Loop, hold: Callable[[threading.Event], None]) -> None:
    probes, free, is_held = Probes(held.port), threading.Event(), threading.Event()
    assert probes.ask("/livez")[0] == 200

    def stick() -> None:
        is_held.set()
        hold(free)

    held.loop.call_soon_threadsafe(stick)
    is_held.wait()
    try:
        assert probes.ask("/livez")[0] == 200, "not yet"
        held.late_s += STUCK_S
        status, found = probes.ask("/livez")
        assert (status, found["event_loop"]["ok"]) == (503, False)
        assert found["event_loop"]["detail"].startswith("no heartbeat for 3")
        assert probes.is_served("/metrics")
        assert probes.ask("/startupz")[0] == 200
    finally:
        held_until_ms = time.time_ns() // 1_000_000
        free.set()
    while True:  # the loop goes on, and with it life
        status, found = probes.ask("/livez")
        if status == 200:
            break
    assert found["event_loop"]["since_ms"] >= held_until_ms
