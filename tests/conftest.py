"""Which tier a test belongs to, which loop it gets, pollers that end with their test, and what npm brings.

A module with `VIRTUAL_TIME = True` gets a loop whose clock jumps, one with `LOOPS` each of those in turn. No test may
print a secret (tests/canary.py), and none of the tier `unit` may open a connection.
"""

from __future__ import annotations

import asyncio
import fcntl
import gc
import os
import shutil
import signal
import socket
import subprocess
import sys
import zlib
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import HealthCheck, settings
from nats.aio.client import Client

from adapter.bridge.poller import BotPoller
from adapter.jetstream.client import BusClient
from adapter.tools.decoding import log_once
from tests import canary
from tests.capture import Capture, capturing
from tests.fakes import Bench, VirtualLoop
from tests.inbound.pollers import Poller, start_poller

canary.mark()

# What the code says of a bug: rich would draw it with every variable of every frame, which takes a second.
structlog.dev.ConsoleRenderer.get_active().exception_formatter = structlog.dev.plain_traceback

# How long an example takes says nothing about the code where others have the cores.
settings.register_profile("here", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("here")

# What tests subscribe to with nats-py itself is there after a `flush`, too.
Client._send_ping = BusClient._send_ping  # type: ignore[assignment,method-assign]

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Behind a shell's `&` ctrl-C is ignored, also by every program that a test starts and interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parents[1]
NPM = ROOT / "tests" / "npm"
TIERS = {
    "tests/attacks": "load",
    "tests/e2e/test_chaos.py": "load",
    "tests/e2e/test_load.py": "load",
    "tests/e2e/test_storm.py": "load",
    "tests/e2e": "system",
    "tests/bus": "integration",
    "tests/cli": "integration",
    "tests/console/test_browser.py": "ops",
    "tests/console": "integration",
    "tests/ilink/test_addresses.py": "integration",
    "tests/ilink/test_cdn.py": "integration",
    "tests/ilink/test_client.py": "integration",
    "tests/ilink/test_hostile_answers.py": "integration",
    "tests/ilink/test_large_answers.py": "integration",
    "tests/ilink/test_proxy.py": "integration",
    "tests/ilink/test_connection.py": "integration",
    "tests/simulator": "integration",
    "tests/test_probes.py": "integration",
    "tests/chart": "ops",
    "tests/clients": "ops",
    "tests/foreign": "ops",
    "tests/image": "ops",
    "tests/monitoring/test_runbook.py": "unit",
    "tests/monitoring": "ops",
    "tests": "unit",
}
"""Tier by folder or file; the longest path counts. tests/README.md says what each tier is."""
running: list[str] = []
"""The tier of the test that runs."""
UNREACHABLE = ("ENOTFOUND", "EAI_AGAIN", "ECONNREFUSED", "ETIMEDOUT", "ENETUNREACH")
"""What npm says when there is no network."""


def tier_of(path: Path) -> str:
    """The tier of a test file."""
    relative = path.relative_to(ROOT)
    return next(TIERS[each.as_posix()] for each in (relative, *relative.parents) if each.as_posix() in TIERS)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(tier_of(item.path))
    if hasattr(config, "workerinput"):  # in each worker's part are tests that wait, and tests that compute
        items.sort(key=lambda item: zlib.crc32(item.path.relative_to(ROOT).as_posix().encode()))


def pytest_collection_finish() -> None:
    """What collecting has made stays: no collection of garbage need look at a million objects again."""
    gc.collect()
    gc.freeze()


def forbid_connections(event: str, arguments: tuple[Any, ...]) -> None:
    """Of the tier `unit`: no server, no connection. Unix sockets are asyncio's own."""
    if running == ["unit"] and event in ("socket.bind", "socket.connect") and arguments[0].family != socket.AF_UNIX:
        raise RuntimeError(f"{event} in a test of the tier `unit`; see TIERS in tests/conftest.py")


sys.addaudithook(forbid_connections)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    running.append(tier_of(item.path))
    try:
        return (yield)
    finally:
        running.clear()


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    module = getattr(item, "module", None)
    if getattr(module, "VIRTUAL_TIME", False):
        return {"virtual": VirtualLoop}
    loops: Mapping[str, Callable[[], asyncio.AbstractEventLoop]]
    loops = getattr(module, "LOOPS", {"asyncio": asyncio.new_event_loop})
    return loops


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call" and report.passed:
        for where, text in report.sections:
            if secret := canary.printed(text):
                report.outcome = "failed"
                report.longrepr = f"{item.nodeid}: {where} holds a secret: {secret}…"
    return report


@pytest.fixture
async def bench() -> Bench:
    return Bench()


@pytest.fixture
async def poller() -> AsyncIterator[Poller]:
    """As `start_poller`, told to leave when the test is over."""
    begun: list[tuple[BotPoller, asyncio.Task[None]]] = []

    def begin(bench: Bench, **changes: Any) -> BotPoller:
        begun.append(start_poller(bench, **changes))
        return begun[-1][0]

    yield begin
    for session, task in begun:
        session.stop(immediately=True)
        await task


@pytest.fixture
def captured() -> Iterator[Capture]:
    """Everything that is logged."""
    with capturing() as out:
        yield out


@pytest.fixture(scope="session")
def npm() -> Path:
    """The folder whose node_modules hold what the lock file names. Skips where there is no npm, or no registry."""
    for command in ("node", "npm"):
        if shutil.which(command) is None:
            pytest.skip(f"{command} is missing; on Debian: apt-get install nodejs npm")
    with (ROOT / "tests" / "npm" / "package.json").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two workers of pytest must not install at once
        done = subprocess.run(["make", "npm"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        reason = f"cannot install what npm brings: {done.stderr.strip()[-300:]}"
        if any(word in done.stderr for word in UNREACHABLE) and not os.environ.get("CI"):
            pytest.skip(reason)
        pytest.fail(reason)
    return NPM


@pytest.fixture(autouse=True)
def forget_logged() -> None:
    """A line that is logged once in a process is logged in each test."""
    log_once.cache_clear()
