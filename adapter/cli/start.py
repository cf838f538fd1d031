"""`start`: NATS, the adapter, the login and an agent of one's own, in one terminal."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from pathlib import Path

import msgspec
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from rich.cells import set_cell_size

from adapter import __version__
from adapter.agent import Sandbox
from adapter.agent.runner import Agent, Runner, Sessions, TurnEnd, log_end
from adapter.cli import output, stdin
from adapter.cli.agent import AgentChoice, Choice, opened, state_of
from adapter.cli.bindings import all_bindings, status_of
from adapter.cli.bus import BROKE, BusConnection, connected_bus, with_context
from adapter.cli.embedded import adapter_running, while_alive
from adapter.cli.exits import CLOSING_S, OK, UNREACHABLE, Failed, on_signal
from adapter.cli.login import check_login, fill, log_in
from adapter.cli.options import Sandbox as SandboxName
from adapter.cli.run import durable_nats
from adapter.cli.send import describe
from adapter.content.quotes import kind_of
from adapter.contract.messages import BindingInfo, BotStatus, LoginStart, Receipt, TextItem
from adapter.environment import read_settings
from adapter.errors import UNDECODABLE
from adapter.observability import logs
from adapter.settings import Settings

SANDBOX = "s1"
LOG_FILE = "adapter.log"
"""In the data folder: the log of the adapter and of the agent's runner."""
STDERR_FILE = "stderr.log"
"""In the agent's folder: what a program has written to its standard error since the start."""
APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND
START_S = 60.0
LOOK_S = 3.0
"""Pause between two looks at the bots."""
WHO = 9
"""Columns of a user: the last characters, since the first ones of iLink's ids are the same for all."""
LINE_CHARS = 300
INDENT = " " * 10
TROUBLE: tuple[BotStatus, ...] = ("failing", "stale", "paused")
"""States of a bot whose user waits for an answer in vain."""
WAITS_FOR = "the end of WeChat's open poll, within 35 s as a rule"


async def start(sandbox: SandboxName = SANDBOX, /, *, choice: Choice = AgentChoice()) -> int:  # noqa: B008 -- frozen
    """Talk to an agent of yours in WeChat: NATS, adapter, login and agent in this terminal.

    Shows a QR code unless somebody has scanned one before, and then a line for each message: who wrote, how long the
    text is, how long the answer took, or why there is none. The text itself is never shown.
    Everything is kept in WECHAT_NATS_DATA_DIR (./data): the next start goes on without a code and loses nothing.
    Other commands find this NATS server if they are called in the same folder. NATS_URL does not count.
    Ends at ctrl-C, with exit code 0.
    """
    # not settings_here(): in this folder it finds the server of the last start
    settings, task = read_settings(with_context(os.environ)), asyncio.current_task()
    choice.check()
    assert task is not None
    draining = on_signal(task.cancel, WAITS_FOR, settings.drain_s + CLOSING_S)
    with draining, contextlib.suppress(asyncio.CancelledError):
        await _start(sandbox, choice, settings)
    output.say("Stopped. The next start goes on from here.")
    return OK


async def _start(sandbox: str, choice: AgentChoice, settings: Settings) -> None:
    """Starts everything, and serves until cancelled. Raises Failed, and what an agent's runner raises."""
    async with contextlib.AsyncExitStack() as stack:
        state, sessions = state_of(sandbox, settings)
        data, named = Path(settings.data_dir), settings
        if settings.http_addr == Settings().http_addr:  # several may run on one machine
            settings = msgspec.structs.replace(settings, http_addr="127.0.0.1:0")
        server, settings = await stack.enter_async_context(durable_nats(settings, 0))  # and so this is the only one
        log = stack.enter_context(os.fdopen(os.open(data / LOG_FILE, APPEND, 0o600), "ab", 0))
        logs.configure(settings.log, log, version=__version__)
        stderr = stack.enter_context(os.fdopen(os.open(state / STDERR_FILE, APPEND | os.O_TRUNC, 0o600), "ab"))
        answer = await stack.enter_async_context(opened(choice, named, state, stderr=stderr.fileno()))
        running = adapter_running(settings, start_s=START_S, drain_s=settings.drain_s + 1.0)
        adapter = await stack.enter_async_context(running)
        _say(f"NATS, the adapter and the agent of the sandbox {sandbox} run.")
        output.say(f"Log: {data / LOG_FILE}")
        bus = await stack.enter_async_context(connected_bus(settings, lasting=True))
        try:
            await while_alive(_serve(bus, sandbox, answer, sessions, choice.welcome), server, adapter)
        except Failed as exc:
            if server.is_running and not adapter.done():
                raise
            adapter.cancel()  # it would wait for NATS, to give everything back
            raise Failed(exc.code, f"{exc}\nThe next start goes on from here.") from None


async def _serve(bus: BusConnection, sandbox: str, answer: Agent, sessions: Sessions, welcome: str | None) -> None:
    """Lets the agent answer, and users log in, until cancelled. Raises Failed, and what the runner raises."""
    await bus.nc.subscribe(bus.names.receipts(sandbox), cb=_show_receipt)
    try:
        async with Sandbox(sandbox, bus.settings) as connected, asyncio.TaskGroup() as group:
            group.create_task(Runner(connected, answer, sessions, _show_turn, welcome=welcome).run())
            group.create_task(_keep_bound(bus, sandbox))
    except ExceptionGroup as several:
        first = several.exceptions[0]
        raise (Failed(UNREACHABLE, BROKE) if isinstance(first, NatsError) else first) from None


async def _keep_bound(bus: BusConnection, sandbox: str) -> None:
    """Shows a code while nobody is bound, and once where WeChat has ended a bot's session. Says which bots are in
    trouble. Runs until cancelled. Raises Failed if nobody is bound after a login."""
    typed, told = stdin.lines(), dict[str, str]()
    asked: set[str] = set()
    """Bots whose users were asked to scan anew."""
    is_first = True
    while True:
        found = await _bindings(bus, sandbox)
        lost = {info.bot for info in found if info.state == "needs_login"}
        for bot in (new := lost - asked):
            _say(f"WeChat has ended the session of {bot}: scan a new code.")
        if new or not found:
            asked |= new
            try:
                check_login(await log_in(bus, LoginStart(sandbox=sandbox), typed))
            except Failed as exc:
                if len(lost) == len(found):
                    raise
                output.complain(str(exc))
        elif is_first:
            _say(f"{' and '.join(info.bot for info in found)} serve{'s' * (len(found) == 1)} {sandbox}.")
        if new or not found or is_first:
            output.say("Write to the bot now. Ctrl-C ends it.\n")
        is_first = False
        for info in (info for info in found if info.bot not in lost):
            health = info.health if status_of(info) in TROUBLE else None
            why = f"{health.status}: {health.detail}" if health else ""
            if why != told.get(info.bot, ""):
                _say(f"{_now()}  {info.bot} {why or 'is well again.'}")
            told[info.bot] = why
        await asyncio.sleep(LOOK_S)


async def _bindings(bus: BusConnection, sandbox: str) -> list[BindingInfo]:
    """Those of the sandbox, once the adapter answers. Raises Failed."""
    while True:
        try:
            return await all_bindings(bus, sandbox, health=True)
        except Failed as exc:
            if exc.code != UNREACHABLE:
                raise
            await asyncio.sleep(0.1)


def _show_turn(end: TurnEnd) -> None:
    """Says how a message was handled, without its text."""
    log_end(end)
    message, length = end.message, len(end.message.text)
    wrote = [_count(length, "character")] if length else []
    wrote += [kind_of(item) for item in message.inbound.items if not isinstance(item, TextItem)]
    answer = [_count(end.chars, "character")] if end.chars else []
    answer += [_count(end.items, "file")] if end.items else []
    became = "failed" if end.reason else " and ".join(answer) or "no answer"
    _say(f"{_now()}  {_short(message.user)}  {', '.join(wrote)} → {became}, {end.seconds:.1f} s")
    for line in filter(None, (end.detail or end.reason, end.said)):
        _say(f"{INDENT}{line}")


async def _show_receipt(msg: Msg) -> None:
    """Says which answer has not reached the user."""
    with contextlib.suppress(*UNDECODABLE):  # of a later version
        receipt = msgspec.json.decode(msg.data, type=Receipt)
        if receipt.outcome != "accepted" and receipt.command.startswith("agent-"):  # typing has no such id
            _say(f"{_now()}  {_short(receipt.user)}  answer {describe(receipt)}")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _short(user: str) -> str:
    name = user.partition("@")[0]
    return set_cell_size(output.printable(f"…{name[1 - WHO :]}" if len(name) > WHO else name), WHO)


def _now() -> str:
    return time.strftime("%H:%M:%S")


def _say(text: str) -> None:
    """A line, over several ones of the terminal if it is long."""
    line = output.printable(text)
    output.say(fill(line if len(line) <= LINE_CHARS else f"{line[:LINE_CHARS]}…", INDENT))
