"""`start` and `demo`: NATS, the adapter, the login and an agent of one's own, in one terminal."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, NoReturn

import msgspec
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from rich.cells import set_cell_size

from adapter import __version__
from adapter.agent import Sandbox
from adapter.agent.program import STDERR
from adapter.agent.runner import Agent, Runner, Sessions, TurnEnd, log_end
from adapter.cli import output, stdin
from adapter.cli.agent import AgentChoice, Choice, opened, state_of
from adapter.cli.bindings import all_bindings, status_of
from adapter.cli.bus import BROKE, BusConnection, connected_bus, with_context
from adapter.cli.demo import AGENT_S, HOLD_MS, PATIENCE_S, LogEnd, Screen, TalkSession, demo_settings, echo
from adapter.cli.embedded import EmbeddedNats, adapter_running, while_alive
from adapter.cli.exits import CLOSING_S, OK, UNREACHABLE, Failed, on_signal
from adapter.cli.login import View, check_login, fill, log_in
from adapter.cli.options import Sandbox as SandboxName
from adapter.cli.options import flag
from adapter.cli.run import durable_nats
from adapter.cli.send import describe
from adapter.contract.messages import BindingInfo, BotStatus, Login, LoginStart, Receipt, TextItem
from adapter.contract.quotes import kind_of
from adapter.errors import UNDECODABLE
from adapter.settings import Settings, read_settings
from adapter.tools import logs

if TYPE_CHECKING:
    from adapter.simulator import Simulator

SANDBOX, DEMO = "s1", "demo"
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


class _Stage(NamedTuple):
    """What the adapter and the agent stand on."""

    server: EmbeddedNats
    settings: Settings
    """The adapter's."""
    folder: Path
    """The agent's."""
    sessions: Sessions
    log: LogEnd
    stderr: int
    """Where that of a program goes: a descriptor."""
    simulator: Simulator | None = None
    """None: the real WeChat."""


class _View(NamedTuple):
    """What a person sees of it."""

    say: Callable[[str], None]
    on_end: Callable[[TurnEnd], None]
    run: Callable[[_Stage, BusConnection, Agent | None], Coroutine[Any, Any, int]]
    """Returns the exit code. The agent is None if the user attaches one."""


async def start(
    sandbox: SandboxName = SANDBOX,
    /,
    *,
    simulated: Annotated[
        bool, flag("With a simulated WeChat: you type as its user, and attach an agent if none is named.")
    ] = False,
    choice: Choice = AgentChoice(),  # noqa: B008 -- frozen
) -> int:
    """Talk to an agent of yours in WeChat: NATS, adapter, login and agent in this terminal.

    Shows a QR code unless somebody has scanned one before, and then a line for each message: who wrote, how long the
    text is, how long the answer took, or why there is none. The text itself is never shown.
    Everything is kept in WECHAT_NATS_DATA_DIR (./data): the next start goes on without a code and loses nothing.
    Other commands find this NATS server if they are called in the same folder. NATS_URL does not count.
    With --simulated it is as `demo`: no code is shown, and nothing is kept.
    Ends at ctrl-C, with exit code 0.
    """
    if simulated:
        return await _chat(sandbox, choice, None)
    # not settings_here(): in this folder it finds the server of the last start
    settings, task = read_settings(with_context(os.environ)), asyncio.current_task()
    choice.check()
    assert task is not None
    draining = on_signal(task.cancel, WAITS_FOR, settings.drain_s + CLOSING_S)
    view = _View(output.say, _show_turn, partial(_keep_bound, sandbox))
    with draining, contextlib.suppress(asyncio.CancelledError):
        await _run(sandbox, _kept(sandbox, settings), choice, settings, None, view)
    output.say("Stopped. The next start goes on from here.")
    return OK


async def demo(
    *,
    choice: Choice = AgentChoice(),  # noqa: B008 -- frozen
    verbose: Annotated[bool, flag("The log, and what a program writes, go to standard error.")] = False,
) -> int:
    """Chat as a WeChat user with an agent, through a real bus: one that echoes, or a program of yours.

    Starts NATS in a temporary folder, a simulated iLink, the adapter and the agent. You type as the WeChat user; each
    step of a message and of its answer is shown. `/image FILE` sends a picture. Lines may also be piped in: at the
    end of the input it waits for the last answers and ends. Exit code 0 then, and after ctrl-C too, which is how a
    chat ends.
    """
    return await _chat(DEMO, choice, echo, verbose=verbose)


async def _chat(sandbox: str, choice: AgentChoice, answer: Agent | None, *, verbose: bool = False) -> int:
    """A start with a simulated WeChat. `answer`: the agent if none is named. Returns the exit code."""
    settings = read_settings(with_context(os.environ))
    editor = stdin.LineEditor() if sys.stdin.isatty() and output.can_style(sys.stdout) else None
    screen = Screen(sys.stdout, editor)
    talk = partial(_talk, sandbox, screen, editor.lines() if editor else stdin.lines())
    view = _View(screen.note, screen.tell_end, talk)
    try:
        return await _run(sandbox, _passing(sandbox, settings, verbose=verbose), choice, settings, answer, view)
    except asyncio.CancelledError:
        return OK
    finally:
        screen.leave_prompt()


@contextlib.asynccontextmanager
async def _kept(sandbox: str, settings: Settings) -> AsyncIterator[_Stage]:
    """In the data folder, where the next start finds it."""
    folder, sessions = state_of(sandbox, settings)
    if settings.http_addr == Settings().http_addr:  # several may run on one machine
        settings = msgspec.structs.replace(settings, http_addr="127.0.0.1:0")
    async with durable_nats(settings, 0) as (server, its_settings):  # and so this is the only one
        log = LogEnd(Path(settings.data_dir) / LOG_FILE)
        with os.fdopen(os.open(folder / STDERR_FILE, APPEND | os.O_TRUNC, 0o600), "ab") as stderr:
            yield _Stage(server, its_settings, folder, sessions, log, stderr.fileno())


@contextlib.asynccontextmanager
async def _passing(sandbox: str, settings: Settings, *, verbose: bool) -> AsyncIterator[_Stage]:
    """In a temporary folder, with a simulated WeChat. The log beside it stays if it fails."""
    from adapter.simulator import Simulator, SimulatorSettings  # noqa: PLC0415 -- other commands start faster without

    holds = SimulatorSettings(hold_ms=HOLD_MS, hint_ms=HOLD_MS, qr_hold_ms=HOLD_MS)
    silent = os.fdopen(os.open(os.devnull, os.O_WRONLY))
    with tempfile.TemporaryDirectory(prefix="wechat-nats-demo-") as folder, silent:
        async with EmbeddedNats() as server, Simulator(holds) as simulator:
            made = msgspec.structs.replace(demo_settings(server.url, simulator.url), language=settings.language)
            file, stderr = (None, STDERR) if verbose else (Path(f"{folder}.log"), silent.fileno())
            yield _Stage(server, made, Path(folder), Sessions(sandbox), LogEnd(file), stderr, simulator)


async def _run(
    sandbox: str,
    staging: AbstractAsyncContextManager[_Stage],
    choice: AgentChoice,
    settings: Settings,
    answer: Agent | None,
    view: _View,
) -> int:
    """Starts everything, lets the agent answer while the view runs, and ends it. `settings`: for an agent that is
    elsewhere. `answer`: the agent if none is named. Returns the exit code. An agent that is not there is the first
    thing that is said. Raises Failed, SettingsError, Temporary."""
    async with contextlib.AsyncExitStack() as stack:
        stage = await stack.enter_async_context(staging)
        if choice != AgentChoice():
            opening = opened(choice, settings, stage.folder, stderr=stage.stderr)
            answer = await stack.enter_async_context(opening)
        logs.configure(stage.settings.log, stack.enter_context(stage.log.opened()), version=__version__)
        if (file := stage.log.file) is not None:
            view.say(f"Log: {file}{', kept if it fails' if stage.simulator else ''}")
            if stage.simulator:
                stack.push(lambda kind, *_: file.unlink() if kind in (None, asyncio.CancelledError) else None)
        stack.callback(call_off := stage.log.tell_later(view.say, "The adapter is not ready yet."))
        running = adapter_running(stage.settings, start_s=START_S, drain_s=stage.settings.drain_s + 1.0)
        adapter = await stack.enter_async_context(running)
        call_off()
        bus = await stack.enter_async_context(connected_bus(stage.settings, lasting=True))

        async def together() -> int:
            async with contextlib.AsyncExitStack() as inner, asyncio.TaskGroup() as group:
                if answer is None:
                    return await view.run(stage, bus, None)
                connected = await inner.enter_async_context(Sandbox(sandbox, stage.settings))
                welcome = choice.welcome if stage.simulator is None else choice.welcome or ""
                runner = Runner(
                    connected, answer, stage.sessions, view.on_end, welcome=welcome, gather_s=choice.gather
                )
                agent = group.create_task(runner.run())
                code = await view.run(stage, bus, answer)
                agent.cancel()
                return code

        try:
            return await while_alive(together(), stage.server, adapter)
        except ExceptionGroup as several:
            first = several.exceptions[0]
            raise (Failed(UNREACHABLE, BROKE) if isinstance(first, NatsError) else first) from None
        except Failed as exc:
            if stage.server.is_running and not adapter.done():
                raise
            adapter.cancel()  # it would wait for NATS, to give everything back
            goes_on = "" if stage.simulator else "\nThe next start goes on from here."
            raise Failed(exc.code, f"{exc}{goes_on}") from None


class _Scanned(View):
    """Has a simulated phone scan each code, instead of showing it."""

    def __init__(self, simulator: Simulator) -> None:
        super().__init__()
        self._simulator = simulator

    def show(self, now: Login) -> None:
        code, self.login = (now.login, now.code), now.login
        if now.status == "wait" and code != self._code:
            self._code = code
            self._simulator.confirm(self._simulator.qrcodes()[-1].qrcode)


async def _talk(
    sandbox: str, screen: Screen, typed: AsyncIterator[str], stage: _Stage, bus: BusConnection, answer: Agent | None
) -> int:
    """Lets a simulated user log in, and write what is typed. Returns the exit code. Raises Failed."""
    simulator, url = stage.simulator, stage.server.url
    assert simulator is not None
    check_login(await log_in(bus, LoginStart(sandbox=sandbox), typed, _Scanned(simulator)))
    screen.note(f"NATS at {url}, sandbox {sandbox}.")
    screen.note("You are a WeChat user: write, or send a picture by /image FILE. ctrl-C ends.")
    if answer is None:
        screen.note(f"Your agent:\nNATS_URL={url} wechat-nats agent {sandbox} --exec 'PROGRAM'\n")
    else:
        screen.note("Another agent: wechat-nats demo --exec 'PROGRAM'.\n")
    session = TalkSession(bus, sandbox, simulator, simulator.bots()[-1].user, screen, stage.log)
    return await session.run(typed, PATIENCE_S if answer is echo else PATIENCE_S + AGENT_S)


async def _keep_bound(sandbox: str, _stage: _Stage, bus: BusConnection, _answer: Agent | None) -> NoReturn:
    """Shows a code while nobody is bound, and once where WeChat has ended a bot's session. Says which bots are in
    trouble. Runs until cancelled. Raises Failed if nobody is bound after a login."""
    _say(f"NATS, the adapter and the agent of the sandbox {sandbox} run.")
    await bus.nc.subscribe(bus.names.receipts(sandbox), cb=_show_receipt)
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
