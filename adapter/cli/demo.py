"""`demo`: everything in one terminal, with nothing to install and no WeChat account."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from cyclopts import Parameter

from adapter import __version__
from adapter.agent import Sandbox
from adapter.agent.program import Program
from adapter.agent.runner import Answer, Runner, Sessions, Turn
from adapter.cli.agent import MAX_OUTPUT, Exec
from adapter.cli.bindings import request_control
from adapter.cli.bus import connected_bus
from adapter.cli.embedded import EmbeddedNats, adapter_running, while_alive
from adapter.cli.exits import NO, OK, Failed
from adapter.cli.options import flag
from adapter.cli.output import can_style
from adapter.cli.stdin import LineEditor, lines
from adapter.cli.talk import SANDBOX, Screen, TalkSession
from adapter.contract.messages import Bind
from adapter.observability import logs
from adapter.settings import Settings

PATIENCE_S = 30.0
AGENT_S = 600.0
"""Seconds that a program may take for an answer."""
REPLY_CHARS = 2000
DRAIN_S = 5.0
HOLD_MS = 1000
"""How long the simulated iLink holds a poll. An adapter that stops waits for the end of its poll."""


async def demo(
    *,
    program: Exec = None,
    echo: Annotated[
        bool, Parameter(negative="--no-echo", show_default=False, help="Without an agent: attach one yourself.")
    ] = True,
    verbose: Annotated[bool, flag("The adapter's log goes to standard error.")] = False,
) -> int:
    """Chat as a WeChat user with an agent, through a real bus: one that echoes, or a program of yours.

    Starts NATS in a temporary folder, a simulated iLink, the adapter and the agent. You type as the WeChat user; each
    step of a message and of its answer is shown. Lines may also be piped in: at the end of the input it waits for
    the last answers and ends. Exit code 0 then, and after ctrl-C too, which is how a chat ends.
    """
    prompting = sys.stdin is not None and sys.stdin.isatty()
    editor = LineEditor() if prompting and can_style(sys.stdout) else None
    screen = Screen(sys.stdout, prompting=prompting, editor=editor)
    with _log(screen, verbose):
        try:
            return await _demo(screen, program, echo, editor.lines() if editor else lines())
        except asyncio.CancelledError:
            screen.note("")
            return OK


async def _demo(screen: Screen, program: str | None, echo: bool, typed: AsyncIterator[str]) -> int:
    """Starts everything, holds the conversation and cleans up, however it ends. Returns the exit code."""
    from adapter.simulator import Simulator, SimulatorSettings  # noqa: PLC0415

    answer = Program(program, timeout_s=AGENT_S, max_output=MAX_OUTPUT) if program is not None else _echo
    async with contextlib.AsyncExitStack() as stack:
        nats = await stack.enter_async_context(EmbeddedNats())
        simulator = await stack.enter_async_context(Simulator(SimulatorSettings(hold_ms=HOLD_MS, hint_ms=HOLD_MS)))
        settings = demo_settings(nats.url, simulator.url)
        adapter = await stack.enter_async_context(adapter_running(settings, start_s=PATIENCE_S, drain_s=DRAIN_S * 2))
        bus = await stack.enter_async_context(connected_bus(settings))
        bot = simulator.add_bot()
        asked = Bind(sandbox=SANDBOX, bot=bot.bot, bot_token=bot.token, user=bot.user, id="demo")
        bound = await request_control(bus, asked, PATIENCE_S)
        if not bound.ok:
            raise Failed(NO, f"The bot could not be bound: {bound.error}")
        agent, hint = None, f"Your agent: NATS_URL={nats.url} wechat-nats agent {SANDBOX} --exec 'PROGRAM'"
        if program is not None or echo:
            sandbox = await stack.enter_async_context(Sandbox(SANDBOX, settings))
            agent = Runner(sandbox, answer, Sessions(SANDBOX)).run
            hint = "Another agent: wechat-nats demo --exec 'PROGRAM', or --no-echo."
        screen.note(f"NATS at {nats.url}, sandbox {SANDBOX}. You are a WeChat user: write. ctrl-C ends.")
        screen.note(f"{hint}\n")
        patience_s = PATIENCE_S if agent is not None and program is None else PATIENCE_S + AGENT_S
        talk = TalkSession(bus, simulator, bot, screen, patience_s)
        return await while_alive(talk.run(typed, agent), nats, adapter)


async def _echo(turn: Turn) -> Answer:
    return Answer(f"You said: {turn.message.text}"[:REPLY_CHARS])


def demo_settings(nats_url: str, ilink_url: str) -> Settings:
    """Settings for a simulator on loopback: no pauses, and little space, since nothing is kept."""
    return Settings(
        nats_url=(nats_url,),
        ilink_base_url=ilink_url,
        cdn_base_url=ilink_url,
        allowed_hosts=(urlsplit(ilink_url).netloc,),
        token_key=(secrets.token_bytes(32),),
        send_gap_ms=0,
        lease_s=1.0,
        drain_s=DRAIN_S,
        http_addr="127.0.0.1:0",
        in_max_bytes=2**26,  # a server on a small disk refuses to reserve more than it has
        media_store_bytes=2**28,
    )


@contextlib.contextmanager
def _log(screen: Screen, verbose: bool) -> Iterator[None]:
    """The adapter's log, away from the conversation. The file stays if the demo fails."""
    if verbose:
        logs.configure("info", sys.stderr.buffer, version=__version__)
        yield
        return
    handle, name = tempfile.mkstemp(prefix="wechat-nats-demo-", suffix=".log")
    with open(handle, "wb", buffering=0) as file:
        screen.note(f"The adapter logs to {name} (--verbose: to standard error).")
        logs.configure("info", file, version=__version__)
        try:
            yield
        except BaseException:
            screen.note(f"The log of what went wrong: {name}")
            raise
    Path(name).unlink()
