"""`login`: a QR code on the terminal that binds the person who scans it to a sandbox."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import re
import sys
import time
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from nats.aio.msg import Msg

from adapter.cli import output, stdin
from adapter.cli.bus import Bus, connected_bus
from adapter.cli.exit_codes import INTERRUPTED, NO, OK, UNREACHABLE, USAGE, Failed
from adapter.cli.lifetime import run_until_stopped, until_signalled
from adapter.cli.options import AutoTyping, Durable, Json, Sandbox, flag
from adapter.contract.messages import CHECKING, FINAL_STATUSES, Login, LoginQuery, LoginStart, LoginVerify, Options
from adapter.kit.timing import wait_event

START_S = 20.0
REFRESH_S = 3.0
"""Between two looks at a login of which no event tells."""
EXPIRY_GRACE_S = 30.0
"""How long beyond a login's end an adapter that is away is waited for."""
GOOD = ("confirmed", "already_bound")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_DIGITS = re.compile(r"[0-9]{1,12}")


async def login(
    sandbox: Sandbox,
    /,
    *,
    url: Annotated[bool, flag("Print only the text of each code, which is a URL.")] = False,
    png: Annotated[Path | None, Parameter(help="Write each code as PNG to this file instead of drawing it.")] = None,
    auto_typing: AutoTyping = False,
    durable: Durable = False,
    json: Json = False,
) -> int:
    """Show a QR code: whoever scans it with WeChat talks to this sandbox from then on.

    A code that nobody scans is replaced by a new one. Digits that the phone shows are read from standard input.
    Exit code 0 once the bot is bound, or if the user has a bot of this sandbox already. Ctrl-C cancels the login.
    The codes are secrets until the login is over.
    """
    if url and (png is not None or json):
        raise Failed(USAGE, "Give --url alone.")
    asked = LoginStart(
        sandbox=sandbox, options=Options(durable=durable, auto_typing=auto_typing), png=png is not None
    )
    view = _JsonView() if json else _UrlView() if url else _View(png)
    has_event = asyncio.Event()

    async def on_event(_: Msg) -> None:
        has_event.set()

    async with connected_bus(lasting=True) as bus:
        event_subject = bus.names.event(asked.sandbox, "login")
        await bus.nc.subscribe(event_subject, cb=on_event)
        await bus.check_subscribed(event_subject)
        first = await bus.request_service("login.start", asked, Login, START_S)
        with until_signalled() as stop:
            code = await run_until_stopped(
                stop, _run(_LoginFollower(bus, view, has_event, png=asked.png), first, bus)
            )
    return INTERRUPTED if code is None else code


async def _run(following: _LoginFollower, first: Login, bus: Bus) -> int:
    try:
        now = await following.until_over(first)
    except BaseException:  # ctrl-C, too: nobody shall scan a code that nobody waits for
        with contextlib.suppress(Failed):
            await bus.request_service("login.cancel", LoginQuery(login=first.login), Login)
        raise
    if now.status not in GOOD:
        raise Failed(NO, output.printable(now.detail or f"The login ended: {now.status}."))
    return OK


class _LoginFollower:
    """A login that was started here."""

    def __init__(self, bus: Bus, view: _View, has_event: asyncio.Event, *, png: bool) -> None:
        self._bus = bus
        self._view = view
        self._changed = has_event
        self._png = png
        self._lines = stdin.lines()
        self._line: asyncio.Task[str | None] | None = None

    async def until_over(self, now: Login) -> Login:
        """Shows each step and hands digits on. Raises Failed."""
        try:
            while True:
                self._view.show(now)
                if now.status in FINAL_STATUSES:
                    return now
                wants_digits = now.status == "need_verify_code" and now.reason != CHECKING
                now = await (self._enter_digits(now) if wants_digits else self._next_state(now))
        finally:
            if self._line is not None:
                self._line.cancel()

    async def _next_state(self, now: Login) -> Login:
        """How it stands after the next event, or in a while."""
        await wait_event(self._changed, REFRESH_S)
        return await self._status(now)

    async def _status(self, now: Login) -> Login:
        self._changed.clear()
        try:
            return await self._bus.request_service("login.status", LoginQuery(login=now.login, png=self._png), Login)
        except Failed as exc:
            # an adapter that is away for a moment does not end a login
            if exc.code != UNREACHABLE or time.time() * 1000 > now.expires_at_ms + EXPIRY_GRACE_S * 1000:
                raise
            await asyncio.sleep(0.5)
            return now

    async def _enter_digits(self, now: Login) -> Login:
        """The state after a line was typed, or after something else has happened."""
        if self._line is None:
            self._line = asyncio.create_task(self._read_line())
        changed = asyncio.create_task(self._changed.wait())
        try:
            await asyncio.wait({self._line, changed}, timeout=REFRESH_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            changed.cancel()
        if not self._line.done():
            return await self._status(now)
        line, self._line = self._line.result(), None
        if line is None:
            raise Failed(NO, "There are no digits on standard input; the login is cancelled.")
        digits = "".join(line.split())
        if not _DIGITS.fullmatch(digits):
            self._view.prompt("Only the digits that the phone shows: ")
            return now
        try:
            return await self._bus.request_service("login.verify", LoginVerify(login=now.login, code=digits), Login)
        except Failed as exc:
            output.complain(str(exc))
            return await self._status(now)

    async def _read_line(self) -> str | None:
        return await anext(self._lines, None)


class _View:
    """Shows a login to a person."""

    def __init__(self, png: Path | None = None) -> None:
        self._png = png
        self._shown: tuple[str, int, str] | None = None
        self._code = 0

    def show(self, now: Login) -> None:
        """What has changed since it was last called."""
        if now.code != self._code and now.qrcode_url and now.status == "wait":
            self._code = now.code
            self.show_code(now)
        state = (now.status, now.code, now.reason)
        if state != self._shown and (now.status != "wait" or self._code == now.code):
            self._shown = state
            self.show_state(now)

    def show_code(self, now: Login) -> None:
        """A new code."""
        if self._png is not None and now.qrcode_png:
            _write(self._png, base64.b64decode(now.qrcode_png))
            output.say(f"Code {now.code} is in {self._png}.")
        else:
            text = now.qrcode_text
            output.say(text if sys.stdout.isatty() else _COLOURS.sub("", text))

    def show_state(self, now: Login) -> None:
        """A new state."""
        match now.status:
            case "wait":
                self.say(
                    "Scan this code with WeChat." if now.code == 1 else "Scan this new code; the old one is dying."
                )
            case "need_verify_code" if now.reason == CHECKING:
                pass
            case "need_verify_code":
                self.prompt("Wrong. The digits shown on the phone: " if now.reason else "Digits shown on the phone: ")
            case "confirmed":
                self.say(f"{output.printable(now.bot)} serves {now.sandbox}. {output.printable(now.detail)}")
            case "scanned" | "already_bound":
                self.say(output.printable(now.detail))
            case _:  # how it ended is said last, as an error
                pass

    def say(self, text: str) -> None:
        output.say(text)

    def prompt(self, text: str) -> None:
        """A question that is answered on the same line."""
        print(text, end="", file=sys.stderr, flush=True)


class _UrlView(_View):
    """Codes on standard output, one URL a line; the rest on standard error."""

    def show_code(self, now: Login) -> None:
        output.say(output.printable(now.qrcode_url))

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class _JsonView(_View):
    """Every state as a JSON object."""

    def show_code(self, now: Login) -> None:
        """It is in the object."""

    def show_state(self, now: Login) -> None:
        output.json_line(now)
        if now.status == "need_verify_code" and now.reason != CHECKING:
            self.prompt("Digits shown on the phone: ")


def _write(path: Path, picture: bytes) -> None:
    """Only its owner may read it. Raises Failed."""
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(picture)
    except OSError as exc:
        raise Failed(USAGE, f"Cannot write the code to {path}: {exc.strerror}.") from None
