"""`acceptance`: the first hour with the real service. A person says what the phone shows."""

from __future__ import annotations

import asyncio
import base64
import re
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
from cyclopts import Parameter

from adapter import __version__
from adapter.agent.media import get_media, put_media
from adapter.agent.reader import read_inbound
from adapter.cli import output, stdin
from adapter.cli.acceptance_report import ACCEPTED, Facts, Report, Result, markdown
from adapter.cli.bus import BusConnection, connected_bus
from adapter.cli.doctor import query_adapters
from adapter.cli.exits import NO, OK, UNREACHABLE, USAGE, Failed
from adapter.cli.login import GOOD, fill, log_in
from adapter.cli.options import Sandbox, flag, new_id
from adapter.cli.output import say, write_private
from adapter.cli.send import PIECE_S, WAIT_S, wait_outcome
from adapter.contract import messages as contract
from adapter.contract.messages import Inbound, Media, Outbound, OutFile, OutImage, OutVideo
from adapter.contract.names import H_MSG_ID, H_SCHEMA, position
from adapter.contract.records import ALL
from adapter.errors import UNDECODABLE, AdapterError
from adapter.tools.media_types import identify

LOOK_S = 0.3
"""Pause between two looks for a message of the person, or for an adapter."""
EXPIRES_S = 120.0
"""After which a command is not sent any more. Its receipt may come RECEIPT_S later."""
RECEIPT_S = 30.0
END = "⟂END"
FIRST = f"First reply {END}"
MARKS = "a_b_c.pdf, __init__, x_y"
PICTURE = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAGAAAABAAQMAAADf+uBNAAAABlBMVEUarRn///+iMv0SAAAAGElEQVR42mNgoBP4jwRoyRn1z6h/6OgfAAEgfpB1"
    "x1wYAAAAAElFTkSuQmCC"
)
"""PNG with stripes in green and white."""
INTRODUCTION = """\
Nobody has run this adapter against the real service yet. Have your phone at
hand; no agent may answer in this sandbox meanwhile. Start the adapter so that
it holds nothing back:

  WECHAT_NATS_PART_CHARS=4000 WECHAT_NATS_PART_BYTES=16384 \\
  WECHAT_NATS_SENDS_PER_WINDOW=0 WECHAT_NATS_WINDOW_HOURS=71 \\
  wechat-nats run --embedded

s and Enter skips a step; ctrl-C ends, and the same command goes on from there."""
UNSHOWN = (
    "The phone shows no reply, so nothing more can be tried. More sends do not help (the protocol page, “Success"
    " without a message id”): look at the adapter's log, and try again on another day."
)


class Undone(Exception):
    """The step ends without a result, and the next call repeats it. The text is its status."""


class Walk:
    """What the steps ask of the person and of the adapter."""

    def __init__(self, bus: BusConnection, sandbox: str, typed: AsyncIterator[str], after: str) -> None:
        """`after`: the messages in the stream up to this position are old."""
        self.bus, self.sandbox, self.typed = bus, sandbox, typed
        self.facts: Facts = {}
        """Of the present step."""
        self._may_send = False
        """Whether the person has written since the last send that was not accepted."""
        self._after = after
        self._came: deque[tuple[str, Inbound]] = deque()
        self._line: asyncio.Future[str | None] | None = None

    async def line(self, timeout_s: float | None = None) -> str:
        """What the person types; "" if nothing in time. Raises Undone, Failed."""
        self._line = self._line or asyncio.ensure_future(anext(self.typed, None))
        await asyncio.wait({self._line}, timeout=timeout_s)
        if not self._line.done():
            return ""
        line, self._line = self._line.result(), None
        if line is None:
            raise Failed(NO, "There are no more answers on standard input.")
        if line.strip().lower() in ("s", "skip"):
            raise Undone("skipped")
        return line.strip().lower()

    async def answer(self, question: str, choices: str, wanted: str) -> str:
        while True:
            print(f"  ? {question} [{choices}] ", end="", flush=True)
            if re.fullmatch(wanted, said := await self.line()):
                return said

    async def asks(self, fact: str, question: str) -> bool:
        self.facts[fact] = (await self.answer(question, "y/n/s", "y|n|yes|no"))[0] == "y"
        return bool(self.facts[fact])

    async def counts(self, question: str, most: int) -> int:
        while (number := int(await self.answer(question, "number/s", "[0-9]{1,5}"))) > most:
            pass
        return number

    async def _look(self) -> None:
        """For new messages of the person. Raises Failed."""
        query = contract.ReplayQuery(after=self._after)
        page = await self.bus.request_service(f"replay.{self.sandbox}", query, contract.ReplayPage)
        for each in page.messages:
            self._after, self._may_send = each.position, True
            self._came.append((each.position, read_inbound(each.message)))

    async def forget(self) -> None:
        """What has come so far was not asked for. Raises Failed."""
        await self._look()
        self._came.clear()

    async def hears(
        self, request: str, fits: Callable[[Inbound], object] = bool, *, fresh: bool = True
    ) -> tuple[str, Inbound]:
        """A message that the person is asked for, and its position. `fresh`: none that came before. Raises Undone,
        Failed."""
        if fresh:
            await self.forget()
        say(f"  > {request}")
        while True:
            while self._came:
                position, message = self._came.popleft()
                kinds = "+".join(str(item.__struct_config__.tag) for item in message.items) or "nothing"
                self.facts["came"] = kinds
                say(f"    Came: {kinds}.")
                if fits(message) or await self.answer("Is that what you sent?", "y/n/s", "y|n") == "y":
                    return position, message
            await self._look()
            if not self._came:
                await self.line(LOOK_S)

    async def sends(self, **content: Any) -> Facts:
        """Sends a command, once the person has written. Returns what its receipt says. Raises Undone, Failed."""
        if not self._may_send:
            await self.hears("Write a word to the bot, so that it may send.")
        sent = await self.sends_now(**content)
        self._may_send = sent["outcome"] == "accepted"
        if sent["outcome"] == "refused":
            raise Undone("refused")
        return sent

    async def sends_now(self, **content: Any) -> Facts:
        """As `sends`, whether or not the person has written."""
        command = Outbound(id=new_id(), when_closed="refuse", expires_in_s=EXPIRES_S, **content)
        names, ident = self.bus.names, str(command.id)
        receipts = await self.bus.nc.subscribe(names.receipt(self.sandbox, ident))
        await self.bus.check_subscribed()
        headers = {H_MSG_ID: ident, H_SCHEMA: contract.SCHEMA_VERSION}
        await self.bus.store(names.out(self.sandbox), msgspec.json.encode(command), headers)
        got = await wait_outcome(receipts, ident, EXPIRES_S + RECEIPT_S, True)
        await receipts.unsubscribe()
        sent: Facts = {name: getattr(got, name) for name in ("outcome", "reason", "ret", "errcode", "attempts")}
        words = ["…" if "@" in word else word for word in got.errmsg.split()]  # ids have one
        sent["errmsg"] = output.printable(" ".join(words))[:80]
        sent |= {"messages": len(got.message_ids), "took_ms": got.at_ms - got.received_at_ms}
        self.facts["sends"] = [*self.facts.get("sends", ()), sent]
        say(f"    Sent: {' '.join(filter(None, (got.outcome, got.reason, sent['errmsg'])))}, {sent['took_ms']} ms.")
        if got.outcome == "refused" and not got.attempts:
            raise Undone("held back")
        return sent

    async def receives(self, kind: str, request: str) -> tuple[Inbound, bytes]:
        """A message with media that the person sends, and their bytes. Raises Undone, Failed."""
        position, message = await self.hears(request, lambda message: media_of(message, kind))
        data = b""
        try:
            if media := media_of(message, kind):
                asking = partial(self.bus.ask, timeout_s=PIECE_S)
                data = await get_media(asking, self.sandbox, media.object, position=position, wait_s=WAIT_S)
        except (Failed, AdapterError) as exc:
            say(f"    {output.printable(exc)}")
        told = media.size if media else 0
        self.facts |= {"arrived": bool(data), "bytes": len(data), "told_bytes": told}
        self.facts["type"] = identify(data[:4096]).mime if data else "none"
        say(f"    Fetched: {len(data):,} bytes, {self.facts['type']}.")
        return message, data

    async def binding(self) -> contract.BindingInfo | None:
        """One that needs no login; None also while no adapter answers. Raises Failed."""
        query = contract.BindingsQuery(sandbox=self.sandbox, health=True)
        try:
            page = await self.bus.request_service("bindings.list", query, contract.BindingsPage)
        except Failed as exc:
            if exc.code == UNREACHABLE:
                return None
            raise
        return next((each for each in page.bindings if each.state == "active"), None)


def media_of(message: Inbound, kind: str) -> Media | None:
    """Of the first item of this kind that has some."""
    found = (getattr(item, "media", None) for item in message.items if str(item.__struct_config__.tag) == kind)
    return next((media for media in found if media), None)


def ruled(chars: int, filler: str) -> str:
    """A text of `chars` characters, of which each ten hold their number, and the end mark. `filler`: five."""
    return "".join(f"{filler}{number:04d} " for number in range(10, chars, 10)).ljust(chars - len(END), ".") + END


# steps ------------------------------------------------------------------------------------------------


async def _login(walk: Walk) -> None:
    declared = {adapter.metadata.get("ilink_version", "?") for adapter in await query_adapters(walk.bus)}
    walk.facts["declared"] = ", ".join(sorted(declared))
    if await walk.binding():
        walk.facts["status"] = "bound before"
        return
    began = time.monotonic()
    ended = await log_in(walk.bus, contract.LoginStart(sandbox=walk.sandbox), walk.typed)
    walk.facts |= {"succeeded": ended.status in GOOD, "status": ended.status, "codes": ended.code}
    walk.facts["took_s"] = round(time.monotonic() - began)
    if ended.status in GOOD:
        say("")
        return
    say(fill(output.printable(ended.detail)))
    if ended.status == "expired":
        walk.facts["asked_to_upgrade"] = await walk.answer("Did the phone ask to upgrade OpenClaw?", "y/n/s", "y|n")


async def _shows(question: str, walk: Walk, **content: Any) -> None:
    await walk.sends(**content)
    await walk.asks("shown", question)


async def _long(chars: int, filler: str, walk: Walk) -> None:
    text = ruled(chars, filler)
    walk.facts |= {"chars": len(text), "bytes": len(text.encode())}
    if (await walk.sends(text=text))["messages"] > 1:
        raise Undone("held back")  # in parts it shows nothing
    if not await walk.asks("shown", f"Open it, scroll to its end. Is {END} there?"):
        last = await walk.counts("What is the last whole number in it? 0: none.", chars)
        walk.facts |= {"last": last, "last_bytes": len(text[:last].encode())}


async def _typing(walk: Walk) -> None:
    await _shows("Does the top of the chat say that the bot is typing?", walk, typing="on")
    await walk.sends(typing="off")


Item = type[OutImage] | type[OutFile] | type[OutVideo]


async def _media(kind: str, asked: str, item: Item, data: bytes, question: str, walk: Walk) -> None:
    """Both ways. `data`: what the bot sends; empty: what has come."""
    _, came = await walk.receives(kind, f"Send the bot {asked}.")
    if data := data or came:
        stored = await put_media(partial(walk.bus.ask, timeout_s=PIECE_S), walk.sandbox, data, "")
        await _shows(question, walk, items=[item(media=stored)])


async def _voice(walk: Walk) -> None:
    message, _ = await walk.receives("voice", "Hold the microphone and say a few words.")
    if "voice" in walk.facts["came"]:
        walk.facts["has_transcript"] = bool(message.text)


async def _quote(walk: Walk) -> None:
    say(f"  > Long-press “{FIRST}” in the chat and choose Quote.")
    _, message = await walk.hears("Then write a word.", lambda message: message.quote)
    quote = message.quote or contract.Quote()
    walk.facts |= {"came_as_quote": message.quote is not None, "words_known": FIRST in quote.text}
    walk.facts |= {"has_an_id": bool(quote.id), "quoted_kind": quote.kind}


async def _eleven(walk: Walk) -> None:
    await walk.hears("Write a word to the bot. It then sends eleven messages.")
    accepted, sent = 0, Facts(outcome="accepted")
    while accepted < 11 and sent["outcome"] in ACCEPTED:
        sent = await walk.sends_now(text=f"{accepted + 1} of 11 {END}")
        accepted += sent["outcome"] in ACCEPTED
    walk.facts |= {"accepted": accepted, "sends": [sent]}
    walk.facts["shown_sends"] = await walk.counts("How many of the eleven does the phone show?", 11)
    await walk.hears("Write a word to the bot once more.")
    after = await walk.sends_now(text=f"The window is open {END}")
    walk.facts["opened_by_a_message"] = after["outcome"] in ACCEPTED


async def _restart(walk: Walk) -> None:
    await walk.forget()
    say("  > Stop the adapter: ctrl-C in its terminal. It may take a minute.")
    while await walk.binding():
        await walk.line(LOOK_S)
    began = time.monotonic()
    await walk.answer("It is stopped. Write “one” to the bot, then press Enter.", "Enter/s", ".*")
    say("  > Start the adapter again.")
    while not await walk.binding():
        await walk.line(LOOK_S)
    walk.facts["away_s"] = round(time.monotonic() - began)
    came = [await walk.hears("It is back, and “one” should come.", fresh=False)]
    came += [await walk.hears("Write “two” to the bot.", fresh=False)]
    walk.facts["came_once"] = [message.text.strip(" .“”").lower() for _, message in came] == ["one", "two"]
    await walk.sends(text=f"Back again {END}")
    await walk.asks("goes_on", f"Does the phone show “Back again {END}”?")


async def _late(walk: Walk) -> None:
    found = await walk.binding()
    if found is None or found.health is None or not found.health.inbound_ms:
        raise Failed(NO, f"No bot of {walk.sandbox} is there that you have written to.")
    walk.facts["hours"] = round((time.time() * 1000 - found.health.inbound_ms) / 3_600_000, 1)
    say(f"  > You wrote {walk.facts['hours']} h ago. Do not write now: it opens the window.")
    await walk.answer("The bot sends a message.", "Enter/s", ".*")
    await walk.sends_now(text=f"Late {END}")
    walk.facts["on_the_phone"] = await walk.answer(f"Does the phone show “Late {END}”?", "y/n/s", "y|n")


class Step(NamedTuple):
    title: str
    section: str
    """Of the protocol page, which it is about."""
    run: Callable[[Walk], Awaitable[None]]


RULES, ITEMS, KNOWN, REFUSED = "Rules for outbound messages", "Outbound items", "Known numbers", "Refused sends"
FIRST_SHOWN = f"Does the phone show “{FIRST}”?"
STRIPES = "Does the phone show a picture with green stripes?"
FILE = f"Does file.txt open, and say {END}?"
BACK = "Does the video that came back play?"
COMPARED, WHOLE = "1 < 2, 3 > 2 **in bold**", "Is all of “1 ＜ 2, 3 ＞ 2 in bold” there, the end bold?"
MARKDOWN = f"Are all underscores there (maybe wide): {MARKS}?"
NEWLINE = "Is “second line” on a line of its own?"
STEPS = {
    "login": Step("Login", "Login", _login),
    "first": Step("First reply", "sendmessage", partial(_shows, FIRST_SHOWN, text=FIRST)),
    "text-2100": Step("2,100 characters", KNOWN, partial(_long, 2100, "text ")),
    "text-4000": Step("4,000 characters, half Chinese", KNOWN, partial(_long, 4000, "一二三四五")),
    "compared": Step("Less and more", RULES, partial(_shows, WHOLE, text=COMPARED)),
    "markdown": Step("Underscores as Markdown", RULES, partial(_shows, MARKDOWN, text=MARKS)),
    "newline": Step("A single line break", RULES, partial(_shows, NEWLINE, text="first line\nsecond line")),
    "typing": Step("Typing", "Typing", _typing),
    "picture": Step("Picture", ITEMS, partial(_media, "image", "a picture", OutImage, PICTURE, STRIPES)),
    "file": Step("File", ITEMS, partial(_media, "file", "a file", OutFile, END.encode(), FILE)),
    "video": Step("Video", ITEMS, partial(_media, "video", "a short video", OutVideo, b"", BACK)),
    "voice": Step("Voice", "Voice", _voice),
    "quote": Step("Quote", "Quotes", _quote),
    "restart": Step("Restart", "Redelivery", _restart),
    "eleven": Step("Eleven sends", REFUSED, _eleven),  # may be followed by an hour of refusals
    "late": Step("A send after the window", REFUSED, _late),
}


async def acceptance(
    sandbox: Sandbox,
    /,
    *,
    out: Annotated[Path, Parameter(metavar="FOLDER", help="Folder of the report.")] = Path(),
    late: Annotated[bool, flag("Only the last step: a send a day after your last message.")] = False,
) -> int:
    """Try the real service for an hour, phone in hand: what it shows, and which settings follow.

    Asks you to write, to look at the phone and to answer; writes acceptance-SANDBOX.md and .json. Steps that are done
    are not repeated by the next call. --late repeats its step each time.
    """
    path = out / f"acceptance-{sandbox}.json"
    report = Report(sandbox=sandbox, version=__version__)
    if path.exists():
        try:
            report = msgspec.json.decode(output.read_bytes(path), type=Report)
            markdown(report)
        except (*UNDECODABLE, LookupError, TypeError):
            raise Failed(USAGE, f"{path} is no report of this command: move it away.") from None
    say(INTRODUCTION)
    async with connected_bus(lasting=True) as bus:
        await bus.check_subscribed()
        stream = await bus.api_request(f"STREAM.INFO.{bus.names.stream_in}")
        walk = Walk(bus, sandbox, stdin.lines(), position(stream["state"]["last_seq"], ALL))
        try:
            for place, (name, step) in enumerate(STEPS.items(), 1):
                is_done = name in report.steps and report.steps[name].status == "done"
                if name == "login":
                    is_done = is_done and await walk.binding() is not None
                elif name == "first":
                    is_done = is_done and report.steps[name].facts["shown"]
                if (name == "late") != late or (is_done and not late):
                    continue
                say(f"\n[{place}/{len(STEPS)}] {step.title}")
                result = report.steps[name] = await _run_step(walk, step)
                _write(report, path)
                if name == "login" and await walk.binding() is None:
                    raise Failed(NO, f"No bot serves {sandbox}, so there is nothing to try.")
                if name == "first" and result.status != "skipped" and not result.facts.get("shown"):
                    raise Failed(NO, UNSHOWN)
        finally:
            _write(report, path)
            say(f"\nThe report is in {path.with_suffix('.md')}.")
    if not late:
        say("A day after your last message, with nothing written since: the same with --late.")
    return OK


async def _run_step(walk: Walk, step: Step) -> Result:
    """Raises Failed."""
    status: Any = "done"
    walk.facts = {}
    try:
        await step.run(walk)
    except Undone as exc:
        status = exc.args[0]
        if status != "skipped":
            why = "see the settings above" if status == "held back" else "iLink may need a pause of an hour"
            say(f"    It was {status}: {why}. The next call tries it again.")
    return Result(step.title, step.section, status, int(time.time() * 1000), walk.facts)


def _write(report: Report, path: Path) -> None:
    """Raises Failed."""
    write_private(path, msgspec.json.format(msgspec.json.encode(report), indent=2))
    write_private(path.with_suffix(".md"), markdown(report))
