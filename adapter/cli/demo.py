"""`demo`: a conversation of a simulated phone with an agent in one terminal, over a real bus."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO
from urllib.parse import urlsplit

import msgspec
from cyclopts import Parameter
from nats.aio.msg import Msg
from rich.console import Console
from rich.text import Text

from adapter import __version__
from adapter.agent import Sandbox
from adapter.agent.program import STDERR
from adapter.agent.runner import Agent, Answer, Runner, Sessions, Turn, TurnEnd, log_end
from adapter.cli.agent import AgentChoice, Choice, opened
from adapter.cli.bindings import request_control
from adapter.cli.bus import BusConnection, connected_bus, settings_here
from adapter.cli.embedded import EmbeddedNats, adapter_running, while_alive
from adapter.cli.exits import NO, OK, TIMEOUT, USAGE, Failed
from adapter.cli.options import flag
from adapter.cli.output import can_colour, can_style, pad, printable, read_bytes
from adapter.cli.send import describe
from adapter.cli.stdin import LineEditor, lines
from adapter.content.media import identify
from adapter.content.quotes import kind_of
from adapter.contract.messages import FINAL_OUTCOMES, Bind, Inbound, Outbound, Receipt, TextItem
from adapter.kit.timing import raise_if_cancelled, wait_event
from adapter.observability import logs
from adapter.settings import Settings

if TYPE_CHECKING:
    from adapter.simulator import BotRecord, Simulator

SANDBOX = "demo"
UNANSWERED = 5
"""Most lines without an answer at once. Each line opens the send window anew, for ten sends; further answers would
wait for the next line."""

WIDTH, LABEL = 80, 18
"""Columns of a line, and of its label."""
COLOURS = {"you": "36", "wechat.out.demo": "35", "receipt": "32", "phone": "1;36", "problem": "1;31"}
OTHER = "2"
PATIENCE_S = 30.0
AGENT_S = 600.0
"""Seconds that a program may take for an answer."""
REPLY_CHARS = 2000
MOST_CHARS = 100
"""Characters of a text on its way."""
IMAGE = "/image "
DRAIN_S = 5.0
HOLD_MS = 1000
"""How long the simulated iLink holds a poll. An adapter that stops waits for the end of its poll."""


async def demo(
    *,
    choice: Choice = AgentChoice(),  # noqa: B008 -- frozen
    echo: Annotated[
        bool, Parameter(negative="--no-echo", show_default=False, help="Without an agent: attach one yourself.")
    ] = True,
    verbose: Annotated[bool, flag("The log, and what a program writes, go to standard error.")] = False,
) -> int:
    """Chat as a WeChat user with an agent, through a real bus: one that echoes, or a program of yours.

    Starts NATS in a temporary folder, a simulated iLink, the adapter and the agent. You type as the WeChat user; each
    step of a message and of its answer is shown. `/image FILE` sends a picture. Lines may also be piped in: at the
    end of the input it waits for the last answers and ends. Exit code 0 then, and after ctrl-C too, which is how a
    chat ends.
    """
    editor = LineEditor() if sys.stdin.isatty() and can_style(sys.stdout) else None
    screen = Screen(sys.stdout, editor)
    async with contextlib.AsyncExitStack() as stack:
        answer: Agent | None = _echo if echo else None
        if choice != AgentChoice():  # before all else, so that a fault of its own is the first thing that is said
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="wechat-nats-demo-")))
            silent = stack.enter_context(os.fdopen(os.open(os.devnull, os.O_WRONLY)))
            stderr = STDERR if verbose else silent.fileno()
            answer = await stack.enter_async_context(opened(choice, settings_here(), folder, stderr=stderr))
        stack.enter_context(_log(screen, verbose))
        try:
            return await _demo(screen, answer, choice.welcome or "", editor.lines() if editor else lines())
        except asyncio.CancelledError:
            return OK
        finally:
            screen.leave_prompt()


async def _demo(screen: Screen, answer: Agent | None, welcome: str, typed: AsyncIterator[str]) -> int:
    """Starts everything, holds the conversation and cleans up, however it ends. `answer`: None for an agent that is
    attached by the user. Returns the exit code."""
    from adapter.simulator import Simulator, SimulatorSettings  # noqa: PLC0415

    async with contextlib.AsyncExitStack() as stack:
        nats = await stack.enter_async_context(EmbeddedNats())
        simulator = await stack.enter_async_context(Simulator(SimulatorSettings(hold_ms=HOLD_MS, hint_ms=HOLD_MS)))
        made = demo_settings(nats.url, simulator.url)
        settings = msgspec.structs.replace(made, language=settings_here().language)
        adapter = await stack.enter_async_context(adapter_running(settings, start_s=PATIENCE_S, drain_s=DRAIN_S * 2))
        bus = await stack.enter_async_context(connected_bus(settings))
        bot = simulator.add_bot()
        asked = Bind(sandbox=SANDBOX, bot=bot.bot, bot_token=bot.token, user=bot.user, id="demo")
        bound = await request_control(bus, asked, PATIENCE_S)
        if not bound.ok:
            raise Failed(NO, f"The bot could not be bound: {bound.error}")
        agent, hint = None, f"Your agent:\nNATS_URL={nats.url} wechat-nats agent {SANDBOX} --exec 'PROGRAM'"
        if answer is not None:
            sandbox = await stack.enter_async_context(Sandbox(SANDBOX, settings))
            agent = Runner(sandbox, answer, Sessions(SANDBOX), screen.tell_end, welcome=welcome).run
            hint = "Another agent: wechat-nats demo --exec 'PROGRAM', or --no-echo."
        screen.note(f"NATS at {nats.url}, sandbox {SANDBOX}.")
        screen.note("You are a WeChat user: write, or send a picture by /image FILE. ctrl-C ends.")
        screen.note(f"{hint}\n")
        patience_s = PATIENCE_S if answer is _echo else PATIENCE_S + AGENT_S
        talk = TalkSession(bus, simulator, bot, screen, patience_s)
        return await while_alive(talk.run(typed, agent), nats, adapter)


async def _echo(turn: Turn) -> Answer:
    kinds = [f"[{kind_of(item)}]" for item in turn.message.inbound.items if not isinstance(item, TextItem)]
    return Answer(f"You said: {' '.join([turn.message.text, *kinds]).strip()}"[:REPLY_CHARS])


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
        screen.note(f"The adapter logs to {name}, kept if it fails.")
        logs.configure("info", file, version=__version__)
        yield
    Path(name).unlink()


class Screen:
    """Writes lines of at most WIDTH columns. On a terminal it has colours and keeps a prompt below."""

    def __init__(self, out: TextIO, editor: LineEditor | None = None) -> None:
        """`editor`: what shows the prompt, and reads behind it; None: nobody types at a terminal."""
        self._out = out
        self.editor = editor
        self._colours = can_colour(out)
        self._columns = shutil.get_terminal_size().columns if out.isatty() else WIDTH
        self._width = min(WIDTH, self._columns)
        self._prompted = False

    def prompt(self) -> None:
        """Prompts the user, if somebody types: from now on until the line ends, the prompt stays below all else."""
        if self.editor is not None and not self._prompted:
            self._write(self.editor.prompt(self._label("you")))
            self._prompted = True

    def on_line_typed(self) -> None:
        """The user has ended the line with the prompt."""
        self._prompted = False

    def leave_prompt(self) -> None:
        """What comes now goes below the prompt, and what was typed there."""
        if self._prompted:
            self._prompted = False
            self._write("\n")

    def show(self, label: str, text: str) -> None:
        """One entry, over several lines if it is long."""
        wrapped = Text(printable(text)).wrap(Console(), max(self._width - LABEL, LABEL))
        self._enter(self._label(label) + f"\n{' ' * LABEL}".join(line.plain.rstrip() for line in wrapped) + "\n")

    def note(self, text: str) -> None:
        """A line without a label, as it is."""
        self._enter(text + "\n")

    def tell_end(self, end: TurnEnd) -> None:
        """What went wrong with a message, if anything did."""
        log_end(end)
        for line in filter(None, (end.detail or end.reason, end.said)):
            self.show("problem", line)

    def _label(self, label: str) -> str:
        padded = pad(label, LABEL)
        return f"\x1b[{COLOURS.get(label, OTHER)}m{padded}\x1b[0m" if self._colours else padded

    def _enter(self, text: str) -> None:
        """Writes lines above the prompt, behind which what was typed stays."""
        if self.editor is not None and self._prompted:
            before = self.editor.clear(LABEL, self._columns)
            text = before + text + self.editor.prompt(self._label("you"))
        self._write(text)

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


class TalkSession:
    """What a user types goes in, everything that follows is shown."""

    def __init__(
        self, bus: BusConnection, simulator: Simulator, bot: BotRecord, screen: Screen, patience_s: float
    ) -> None:
        """`patience_s`: seconds without any progress after which an answer that is due has failed."""
        self._bus = bus
        self._simulator = simulator
        self._user = bot.user
        self._screen = screen
        self._patience_s = patience_s
        self._moved = asyncio.Event()
        self._open = 0
        """Lines without an answer."""
        self._failed = False

    async def run(self, lines: AsyncIterator[str], agent: Callable[[], Coroutine[Any, Any, None]] | None) -> int:
        """Holds the conversation, beside `agent` if it is ours, until the lines end and all are answered: the exit
        code. Raises Failed if it stands still, and what the agent raises."""
        names, nc = self._bus.names, self._bus.nc
        await nc.subscribe(names.live(SANDBOX), cb=self._on_inbound)
        await nc.subscribe(names.out(SANDBOX), cb=self._on_command)
        await nc.subscribe(names.receipts(SANDBOX), cb=self._on_receipt)
        await nc.flush()
        raise_if_cancelled()
        try:
            async with asyncio.TaskGroup() as group:
                beside = [group.create_task(agent())] if agent is not None else []
                await self._talk(lines)
                for task in beside:
                    task.cancel()
        except ExceptionGroup as several:
            raise several.exceptions[0] from None
        return NO if self._failed else OK

    async def _talk(self, lines: AsyncIterator[str]) -> None:
        screen = self._screen
        screen.prompt()
        async for line in lines:
            screen.on_line_typed()
            if not line.strip():
                screen.prompt()
                continue
            await self._wait_open(UNANSWERED - 1)
            if screen.editor is None:
                screen.show("you", line)
            try:
                self._say(line)
                self._open += 1
            except Failed as exc:
                screen.show("problem", str(exc))
            screen.prompt()
        await self._wait_open(0)

    def _say(self, line: str) -> None:
        """Raises Failed."""
        if not line.startswith(IMAGE):
            self._simulator.say(self._user, line)
            return
        file = Path(line.removeprefix(IMAGE).strip()).expanduser()
        content = read_bytes(file)
        if not identify(content).mime.startswith("image/"):
            raise Failed(USAGE, f"{file} is no picture.")
        self._simulator.say_media(self._user, "image", content)

    async def _wait_open(self, most: int) -> None:
        """Waits until at most so many lines are open. Raises Failed once nothing has moved for too long."""
        while self._open > most:
            self._moved.clear()
            if not await wait_event(self._moved, self._patience_s):
                said = f"Lines without an answer: {self._open}; nothing happened for {self._patience_s:g} s."
                raise Failed(TIMEOUT, said)

    async def _on_inbound(self, msg: Msg) -> None:
        message = msgspec.json.decode(msg.data, type=Inbound)
        left = message.window.remaining
        budget = "" if left is None else f", {left} sends left"
        said = " ".join(f"[{kind_of(item)}]" for item in message.items if not isinstance(item, TextItem))
        said = " ".join(filter(None, (message.text and _quoted(message.text), said)))
        self._screen.show(msg.subject, f"{said}  (id {message.id[-12:]}{budget})")
        self._moved.set()

    async def _on_command(self, msg: Msg) -> None:
        command = msgspec.json.decode(msg.data, type=Outbound)
        if command.typing == "off":  # the agent is done, and has nothing to say
            self._close(True)
        elif not command.typing:
            said = _quoted(command.text) if command.text else f"{len(command.items or [])} items"
            self._screen.show(msg.subject, said)
            self._moved.set()

    async def _on_receipt(self, msg: Msg) -> None:
        """Shows what became of an answer, then what the phone shows of it."""
        receipt = msgspec.json.decode(msg.data, type=Receipt)
        if receipt.outcome == "accepted" and not receipt.message_ids:  # typing
            return
        self._screen.show("receipt", describe(receipt))
        if receipt.outcome == "accepted":
            for message_id in receipt.message_ids:
                self._screen.show("phone", await self._on_phone(message_id))
        if receipt.outcome in FINAL_OUTCOMES:
            self._close(receipt.outcome == "accepted")

    async def _on_phone(self, message_id: str) -> str:
        """The text of a message, or its media, once the phone shows it."""
        while True:
            for shown in reversed(self._simulator.phone(self._user)):
                if shown.message_id == message_id:
                    media = [f"[{view.kind}: {view.file_name or f'{view.size:,} bytes'}]" for view in shown.media]
                    return shown.text or " ".join(media)
            await asyncio.sleep(0.01)

    def _close(self, good: bool) -> None:
        """A line is answered, or has failed; another answer to a closed line changes nothing."""
        if self._open:
            self._open -= 1
            self._failed |= not good
        self._moved.set()


def _quoted(text: str) -> str:
    """What passes on the bus, cut: the phone shows it whole."""
    return f'"{text}"' if len(text) <= MOST_CHARS else f'"{text[:MOST_CHARS]}…"  ({len(text):,} characters)'
