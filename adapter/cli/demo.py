"""A simulated phone in the terminal: what its user types, and all that follows on a real bus."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO
from urllib.parse import urlsplit

import msgspec
from nats.aio.msg import Msg
from rich.console import Console
from rich.text import Text

from adapter.agent.program import STDERR
from adapter.agent.runner import Answer, Turn, TurnEnd, log_end
from adapter.cli.bus import BusConnection
from adapter.cli.exits import NO, OK, TIMEOUT, USAGE, Failed
from adapter.cli.output import can_colour, pad, printable, read_bytes
from adapter.cli.send import describe
from adapter.cli.stdin import LineEditor
from adapter.contract.messages import FINAL_OUTCOMES, Inbound, Outbound, Receipt, TextItem
from adapter.contract.quotes import kind_of
from adapter.settings import Settings
from adapter.tools.media_types import identify
from adapter.tools.timing import raise_if_cancelled, wait_event

if TYPE_CHECKING:
    from adapter.simulator import Simulator

UNANSWERED = 5
"""Most lines without an answer at once. Each line opens the send window anew, for ten sends; further answers would
wait for the next line."""

WIDTH, LABEL = 80, 18
"""Columns of a line, and of its label."""
COLOURS = {"you": "36", "receipt": "32", "phone": "1;36", "problem": "1;31"}
OTHER = "2"
PATIENCE_S = 30.0
SILENT_S = 10.0
"""Seconds without progress after which the terminal says why."""
AGENT_S = 600.0
"""Seconds that a program may take for an answer."""
REPLY_CHARS = 2000
MOST_CHARS = 100
"""Characters of a text on its way."""
IMAGE = "/image "
WELCOMED = "-welcome"
"""End of the id of a command that welcomes: the answer is another one."""
DRAIN_S = 5.0
HOLD_MS = 1000
"""How long the simulated iLink holds a poll. An adapter that stops waits for the end of its poll."""


async def echo(turn: Turn) -> Answer:
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
        partitions=1,
        drain_s=DRAIN_S,
        http_addr="127.0.0.1:0",
        in_max_bytes=2**26,  # a server on a small disk refuses to reserve more than it has
        media_store_bytes=2**28,
    )


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
        nothing = "" if end.reason or end.chars or end.items else "The agent said nothing."
        for line in filter(None, (end.detail or end.reason or nothing, end.said)):
            self.show("problem", line)

    def _label(self, label: str) -> str:
        padded = pad(label, LABEL)
        colour = "35" if ".out." in label else COLOURS.get(label, OTHER)
        return f"\x1b[{colour}m{padded}\x1b[0m" if self._colours else padded

    def _enter(self, text: str) -> None:
        """Writes lines above the prompt, behind which what was typed stays."""
        if self.editor is not None and self._prompted:
            before = self.editor.clear(LABEL, self._columns)
            text = before + text + self.editor.prompt(self._label("you"))
        self._write(text)

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


class LogEnd:
    """The adapter's log, which says why nothing happens."""

    def __init__(self, file: Path | None) -> None:
        """`file`: None: the log goes to standard error."""
        self.file = file
        self._seen = 0

    def opened(self) -> BinaryIO:
        """To be written to, by its owner alone."""
        if self.file is None:
            return os.fdopen(os.dup(STDERR), "wb", 0)
        log = os.fdopen(os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab", 0)
        self._seen = log.tell()
        return log

    def tell_later(self, say: Callable[[str], None], otherwise: str) -> Callable[[], None]:
        """In SILENT_S seconds, says the last warning since the start; `otherwise`: if there is none. Returns what
        calls that off."""

        def tell() -> None:
            say(f"Nothing has happened for {SILENT_S:g} s. {self._last_warning() or otherwise}")

        return asyncio.get_running_loop().call_later(SILENT_S, tell).cancel

    def _last_warning(self) -> str:
        """Of those that have a reason; "": there is none."""
        for line in reversed(self.file.read_bytes()[self._seen :].splitlines() if self.file is not None else []):
            found = msgspec.json.decode(line, type=dict[str, Any])
            if found["severity_text"] in ("WARNING", "ERROR") and "reason" in found:
                return f"The last warning: {found['body']} ({found['reason']}). {found.get('detail', '')}"
        return ""


class TalkSession:
    """What a user types goes in, everything that follows is shown."""

    def __init__(
        self, bus: BusConnection, sandbox: str, simulator: Simulator, user: str, screen: Screen, log: LogEnd
    ) -> None:
        self._bus = bus
        self._sandbox = sandbox
        self._simulator = simulator
        self._user = user
        self._screen = screen
        self._log = log
        self._moved = asyncio.Event()
        self._call_off: Callable[[], None] = lambda: None
        self._open = 0
        """Lines without an answer."""
        self._ended: set[str] = set()
        """Subjects of final receipts. A receipt may arrive twice, and closes one line."""
        self._failed = False

    async def run(self, lines: AsyncIterator[str], patience_s: float) -> int:
        """Holds the conversation until the lines end and all are answered: the exit code. Raises Failed if an answer
        is due, and there was no progress for `patience_s` seconds."""
        names, nc, sandbox = self._bus.names, self._bus.nc, self._sandbox
        await nc.subscribe(names.live(sandbox), cb=self._on_inbound)
        await nc.subscribe(names.out(sandbox), cb=self._on_command)
        await nc.subscribe(names.receipts(sandbox), cb=self._on_receipt)
        await nc.flush()
        raise_if_cancelled()
        try:
            await self._talk(lines, patience_s)
        finally:
            self._open = 0
            self._progress()
        return NO if self._failed else OK

    async def _talk(self, lines: AsyncIterator[str], patience_s: float) -> None:
        screen = self._screen
        screen.prompt()
        async for line in lines:
            screen.on_line_typed()
            if not line.strip():
                screen.prompt()
                continue
            await self._wait_open(UNANSWERED - 1, patience_s)
            if screen.editor is None:
                screen.show("you", line)
            try:
                self._say(line)
                self._open += 1
                self._progress()
            except Failed as exc:
                screen.show("problem", str(exc))
            screen.prompt()
        await self._wait_open(0, patience_s)

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

    async def _wait_open(self, most: int, patience_s: float) -> None:
        """Waits until at most so many lines are open. Raises Failed once nothing has moved for too long."""
        while self._open > most:
            self._moved.clear()
            if not await wait_event(self._moved, patience_s):
                said = f"Lines without an answer: {self._open}; nothing happened for {patience_s:g} s."
                raise Failed(TIMEOUT, said)

    def _progress(self) -> None:
        """Something has happened. If that was the last for a while, and lines are open, the terminal says why."""
        self._moved.set()
        self._call_off()
        if self._open:
            self._call_off = self._log.tell_later(self._print_problem, "The agent has not answered yet.")

    def _print_problem(self, why: str) -> None:
        self._screen.show("problem", why)

    async def _on_inbound(self, msg: Msg) -> None:
        message = msgspec.json.decode(msg.data, type=Inbound)
        left = message.window.remaining
        budget = "" if left is None else f", {left} sends left"
        said = " ".join(f"[{kind_of(item)}]" for item in message.items if not isinstance(item, TextItem))
        said = " ".join(filter(None, (message.text and _quoted(message.text), said)))
        self._screen.show(msg.subject, f"{said}  (id {message.id[-12:]}{budget})")
        self._progress()

    async def _on_command(self, msg: Msg) -> None:
        command = msgspec.json.decode(msg.data, type=Outbound)
        if command.typing == "off":  # the agent is done, and has nothing to say
            self._close(True)
        elif not command.typing:
            said = _quoted(command.text) if command.text else f"{len(command.items or [])} items"
            self._screen.show(msg.subject, said)
            self._progress()

    async def _on_receipt(self, msg: Msg) -> None:
        """Shows what became of an answer, then what the phone shows of it."""
        receipt = msgspec.json.decode(msg.data, type=Receipt)
        typing = receipt.outcome == "accepted" and not receipt.message_ids
        if typing or msg.subject in self._ended:
            return
        self._screen.show("receipt", describe(receipt))
        if receipt.outcome == "accepted":
            for message_id in receipt.message_ids:
                self._screen.show("phone", await self._on_phone(message_id))
        if receipt.outcome in FINAL_OUTCOMES:
            self._ended.add(msg.subject)
            if receipt.command.endswith(WELCOMED):
                self._progress()
                return
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
        self._progress()


def _quoted(text: str) -> str:
    """What passes on the bus, cut: the phone shows it whole."""
    return f'"{text}"' if len(text) <= MOST_CHARS else f'"{text[:MOST_CHARS]}…"  ({len(text):,} characters)'
