"""How commands end on ctrl-C: the first says what it waits for, a second ends everything within a second."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import signal
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from adapter.cli.demo import demo_settings
from adapter.cli.embedded import EmbeddedNats, adapter_running
from adapter.simulator import Simulator
from tests.cli.conftest import START_S
from tests.cli.process import TOKEN_KEY, children, printed, seen, started

ENVIRON = {"WECHAT_NATS_HTTP_ADDR": "127.0.0.1:0", "WECHAT_NATS_TOKEN_KEY": TOKEN_KEY}
COMMANDS: dict[str, tuple[tuple[str, ...], bytes]] = {
    "run": (("run",), b"adapter.started"),
    "run --embedded": (("run", "--embedded", "--port", "0"), b"adapter.started"),
    "demo": (("demo",), b"You are a WeChat user"),
    "start": (("start", "--exec", "cat"), b"Scan this code"),
    "login": (("login", "s1"), b"Scan this code"),
    "agent": (("agent", "s1", "--exec", "cat"), b"agent.started"),
    "simulator": (("simulator", "--bots", "1"), b"admin_url"),
}
"""Arguments, and what is printed once it is at work."""


@pytest.mark.parametrize("name", COMMANDS)
async def test_a_second_ctrl_c_ends_it_within_a_second(
    name: str, server: EmbeddedNats, simulator: Simulator, tmp_path: Path
) -> None:
    """Also where no server answers, which is when somebody presses it twice."""
    arguments, words = COMMANDS[name]
    environ = {**ENVIRON, "WECHAT_NATS_DATA_DIR": str(tmp_path), "WECHAT_NATS_ILINK_BASE_URL": simulator.url}
    environ["WECHAT_NATS_ALLOWED_HOSTS"] = urlsplit(simulator.url).netloc
    async with contextlib.AsyncExitStack() as stack:
        if name == "login":
            settings = demo_settings(server.url, simulator.url)
            await stack.enter_async_context(adapter_running(settings, start_s=START_S, drain_s=START_S))
        process = await stack.enter_async_context(started(*arguments, env=environ, stderr=None))
        await printed(process, words)
        for pid in (server.pid, *children(process.pid)):
            os.kill(pid, signal.SIGSTOP)
            stack.callback(resume, pid)
        process.send_signal(signal.SIGINT)
        await asyncio.sleep(0.2)  # until a person presses it again
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        await process.wait()
        assert time.monotonic() - began < 1.0


def resume(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


async def test_the_first_ctrl_c_of_run_says_what_it_waits_for_and_how_long(server: EmbeddedNats) -> None:
    main, terminal = pty.openpty()
    env = {**ENVIRON, "WECHAT_NATS_DRAIN_S": "7"}
    async with started("run", stderr=terminal, env=env) as process:
        await printed(process, b"partitions.taken")  # before, there is nothing to give back, and it ends at once
        os.kill(server.pid, signal.SIGSTOP)
        process.send_signal(signal.SIGINT)
        what = b"waiting for open polls and for answers to what is being sent."
        await seen(main, what, b"  7 s at most; ctrl-C again ends it at once.")
        os.kill(server.pid, signal.SIGCONT)
        assert process.stdout is not None
        await process.stdout.read()
        assert await process.wait() == 0
    os.close(main)
    os.close(terminal)
