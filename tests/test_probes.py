"""Probes: what each one depends on, what it must not depend on, and that a stuck loop cannot silence them."""

from __future__ import annotations

import contextlib
import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from adapter.contract.names import Names
from adapter.errors import SettingsError
from adapter.replica.health import Health
from adapter.replica.probes import ProbeServer
from adapter.tools.metrics import Metrics
from adapter.tools.timing import SystemClock
from adapter.tools.web import MAX_CONNECTIONS

DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Clock(SystemClock):
    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def now_ms(self) -> int:
        return int(self.now * 1000)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def starting(clock: Clock) -> Health:
    edges: Any = SimpleNamespace(clock=clock, metrics=Metrics())
    nothing: Any = SimpleNamespace(altered={}, incomplete=[])
    return Health(edges, Names(), nothing, "_INBOX")


@pytest.fixture
def health(clock: Clock) -> Health:
    """A replica in service."""
    health = starting(clock)
    health.on_started()
    return health


@pytest.fixture
def server(health: Health) -> Iterator[ProbeServer]:
    with ProbeServer("127.0.0.1:0", health, Metrics()) as server:
        yield server


def ask(server: ProbeServer, path: str, *, method: str = "GET", accept: str = "") -> tuple[int, bytes]:
    """Status and body. Blocks the thread, and with it the event loop where there is one."""
    request = urllib.request.Request(server.url + path, method=method, headers={"Accept": accept})
    try:
        with DIRECT.open(request) as answer:
            return int(answer.status), bytes(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def checks(server: ProbeServer, path: str) -> tuple[int, dict[str, dict[str, Any]]]:
    status, body = ask(server, path)
    return status, {check["name"]: check for check in json.loads(body)}


def test_a_replica_in_service_passes_every_probe(server: ProbeServer) -> None:
    for path, names in {
        "/startupz": {"started"},
        "/livez": {"event_loop"},
        "/readyz": {"started", "nats", "permissions", "jetstream", "streams", "not_draining"},
    }.items():
        status, found = checks(server, path)
        assert (status, set(found)) == (200, names)
        assert all(check["ok"] and check["since_ms"] > 0 and check["detail"] == "" for check in found.values())


def test_before_the_start_is_done_only_life_is_claimed(clock: Clock) -> None:
    health = starting(clock)
    health.phase = "waiting for NATS"
    with ProbeServer("127.0.0.1:0", health, Metrics()) as server:
        status, found = checks(server, "/startupz")
        assert (status, found["started"]["detail"]) == (503, "waiting for NATS")
        assert ask(server, "/readyz")[0] == 503
        assert ask(server, "/livez")[0] == 200


async def test_a_blocked_event_loop_is_reported_while_it_is_blocked(
    server: ProbeServer, clock: Clock, health: Health
) -> None:
    """This test holds the event loop all along: only another thread can answer."""
    clock.now += 29
    assert ask(server, "/livez")[0] == 200
    clock.now += 1
    status, found = checks(server, "/livez")
    assert (status, found["event_loop"]["ok"]) == (503, False)
    assert "no heartbeat for 30 s" in found["event_loop"]["detail"]
    assert ask(server, "/metrics")[0] == 200
    health.on_heartbeat(is_connected=True)
    assert ask(server, "/livez")[0] == 200


def test_a_loop_that_died_for_good_fails_liveness(server: ProbeServer, health: Health) -> None:
    health.report_failed_loop("router", "stopped after 5 restarts")
    status, found = checks(server, "/livez")
    assert status == 503
    assert (found["router"]["ok"], found["router"]["detail"]) == (False, "stopped after 5 restarts")
    assert ask(server, "/readyz")[0] == 200


def test_an_outage_of_nats_costs_readiness_after_ten_seconds_and_never_life(
    server: ProbeServer, clock: Clock, health: Health
) -> None:
    health.on_heartbeat(is_connected=False)
    clock.now += 10
    health.on_heartbeat(is_connected=False)
    status, found = checks(server, "/readyz")
    assert (status, found["nats"]["detail"]) == (200, "disconnected for 10 s")
    clock.now += 0.5
    assert ask(server, "/readyz")[0] == 503
    clock.now += 3600
    health.on_heartbeat(is_connected=False)
    assert ask(server, "/livez")[0] == 200
    assert ask(server, "/startupz")[0] == 200
    health.on_heartbeat(is_connected=True)
    assert ask(server, "/readyz")[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 404), ("GET", "/metrics/x", 404), ("POST", "/livez", 405), ("HEAD", "/livez", 200)],
)
def test_other_requests_are_answered_plainly(server: ProbeServer, method: str, path: str, status: int) -> None:
    assert ask(server, path, method=method)[0] == status


def test_a_client_that_says_nothing_holds_nobody_up(server: ProbeServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port)):
        assert ask(server, "/livez")[0] == 200


def test_clients_by_the_hundred_that_say_little_hold_nobody_up(server: ProbeServer) -> None:
    clients = list[socket.socket]()
    with contextlib.ExitStack() as opened:
        for _ in range(3 * MAX_CONNECTIONS):
            client = opened.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            client.sendall(b"GET /livez HTTP/1.1\r\n")
            clients.append(client)
        assert ask(server, "/livez")[0] == 200
        assert len(server._server._connections) <= MAX_CONNECTIONS
        for client in clients[: 2 * MAX_CONNECTIONS]:  # closed for those that came later
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(1024) == b""


def test_a_port_in_use_names_the_setting(server: ProbeServer, health: Health) -> None:
    taken = f"127.0.0.1:{server.port}"
    with (
        pytest.raises(SettingsError, match=r"WECHAT_NATS_HTTP_ADDR: .*Address already in use"),
        ProbeServer(taken, health, Metrics()),
    ):
        pass
