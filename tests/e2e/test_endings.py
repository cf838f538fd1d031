"""How a replica ends on SIGTERM, whatever is gone: within the drain time, and in seconds once its lease is gone."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

import pytest

from tests.e2e.waiting import eventually, until
from tests.e2e.world import NAMES, stream, world

DRAIN_S = 10
LEASE_S = 4
FEW_S = 5
"""What an end needs beside what it waits for, on a machine that does other things, too."""


@contextmanager
def black_hole() -> Iterator[str]:
    """A base URL that nobody connects to: its queue is full, so the kernel answers no SYN."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        port = server.getsockname()[1]
        fillers = [socket.socket() for _ in range(8)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            for filler in fillers:
                filler.close()


@pytest.mark.parametrize(
    ("nats", "ilink", "lease", "most_s"),
    [
        ("there", "waits", "held", DRAIN_S + 2),
        ("there", "refuses", "held", FEW_S),
        ("killed", "waits", "held", LEASE_S + FEW_S),
        ("frozen", "black hole", "held", LEASE_S + FEW_S),
        ("killed", "refuses", "gone", FEW_S),
        ("killed", "has answered", "gone", DRAIN_S + 2),
        ("frozen", "has answered", "held", DRAIN_S + 2),
    ],
)
async def test_sigterm_ends_a_replica_whatever_is_gone(
    tmp_path: Path, nats: str, ilink: str, lease: str, most_s: float
) -> None:
    """An answer of iLink that cannot be stored is waited for as long as an open poll: nobody may deliver it again."""
    environ = {"WECHAT_NATS_DRAIN_S": str(DRAIN_S), "WECHAT_NATS_LEASE_S": str(LEASE_S)}
    async with AsyncExitStack() as stack:
        made = await stack.enter_async_context(world(tmp_path, environ=environ, hold_ms=60_000))
        adapter = await made.add_adapter()
        nc, bot = await made.nc(), made.sim.add_bot()
        if ilink == "black hole":
            await made.bind(nc, "s1", bot, base_url=stack.enter_context(black_hole()))
        else:
            await made.bind(nc, "s1", bot)
            await until(lambda: made.sim.stats().parked == 1, "a poll waits")

        async def is_bind_deleted() -> bool:
            return not await stream(nc, NAMES.stream_out, ">")

        await eventually(is_bind_deleted, "its token is on no disk any more")
        if nats == "killed":
            made.server.kill()
        elif nats == "frozen":
            os.kill(made.server.pid, signal.SIGSTOP)
            stack.callback(os.kill, made.server.pid, signal.SIGCONT)
        if ilink == "has answered":
            made.say("s1", "the poll ends with this")
            await until(lambda: made.sim.stats().parked == 0, "the answer is out")
        elif ilink == "refuses":
            await made.sim.__aexit__(None, None, None)
        if lease == "gone":
            await until(lambda: adapter.said("lease.paused") == 1, "its lease is gone")
        began = time.monotonic()
        adapter.signal(signal.SIGTERM)
        is_lost = ilink == "has answered"
        assert await adapter.ended() == (5 if is_lost else 0)
        (end,) = adapter.lines("adapter.stopped")
        assert (end.get("lost_bots", 0), end.get("lost_messages", 0)) == ((1, 1) if is_lost else (0, 0))
        assert time.monotonic() - began < most_s
