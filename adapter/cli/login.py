"""`login`: a QR code on the terminal that binds the person who scans it to a sandbox, or codes for many sandboxes."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import re
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from nats.aio.msg import Msg

from adapter.cli import bulk, output, stdin
from adapter.cli.bus import Bus, connected_bus
from adapter.cli.exit_codes import INTERRUPTED, NO, OK, UNREACHABLE, USAGE, Failed
from adapter.cli.files import write_private
from adapter.cli.lifetime import run_until_stopped, until_signalled
from adapter.cli.options import AutoTyping, Durable, Fresh, Json, RowSandbox, flag
from adapter.contract.messages import CHECKING, FINAL_STATUSES, Login, LoginQuery, LoginStart, LoginVerify, Options
from adapter.kit.timing import wait_event

START_S = 20.0
REFRESH_S = 3.0
"""Between two looks at a login of which no event tells."""
EXPIRY_GRACE_S = 30.0
"""How long beyond a login's end an adapter that is away is waited for."""
GOOD = ("confirmed", "already_bound")
ROWS_UNDER_WAY = 500
"""Logins of `--from` that are open at the same time: each costs the adapter a long poll."""
_DIGITS = re.compile(r"[0-9]{1,12}")


class LoginRow(bulk.Row):
    """A row of `login --from`. What it leaves out is as the options of the command say."""

    durable: bool | None = None
    auto_typing: bool | None = None
    fresh: bool | None = None


async def login(
    sandbox: RowSandbox = None,
    /,
    *,
    rows: bulk.Source = None,
    failed: bulk.FailedFile = None,
    url: Annotated[bool, flag("Print only the text of each code, which is a URL.")] = False,
    png: Annotated[
        Path | None,
        Parameter(help="Write each code as PNG to this file; with --from: to <sandbox>.png in this folder."),
    ] = None,
    auto_typing: AutoTyping = False,
    durable: Durable = False,
    fresh: Fresh = False,
    json: Json = False,
) -> int:
    """Show a QR code: whoever scans it with WeChat talks to this sandbox from then on.

    A code that nobody scans is replaced by a new one. Digits that the phone shows are read from standard input.
    Exit code 0 once the bot is bound, or if the user has a bot of this sandbox already. Ctrl-C cancels the login.
    The codes are secrets until the login is over.

    With --from, rows have the column sandbox, and may have durable, auto_typing and fresh; --png, --url or --json
    says where the codes go. A login for which the phone shows digits fails then: do it alone.
    """
    if url and (png is not None or json):
        raise Failed(USAGE, "Give --url alone.")
    if (sandbox is None) == (rows is None):
        raise Failed(USAGE, "Name a sandbox, or give --from.")
    if rows is not None and not (url or png or json):
        raise Failed(
            USAGE, "With --from, give --png with a folder, --url or --json: so many codes fit on no terminal."
        )
    has_event: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)

    async def on_event(msg: Msg) -> None:
        has_event[msg.subject.split(".")[-2]].set()

    async def begin(row: LoginRow) -> Login:
        options = Options(
            durable=durable if row.durable is None else row.durable,
            auto_typing=auto_typing if row.auto_typing is None else row.auto_typing,
            fresh=fresh if row.fresh is None else row.fresh,
        )
        start = LoginStart(sandbox=row.sandbox, options=options, png=png is not None)
        return await bus.request_service("login.start", start, Login, START_S)

    async def run_row(row: LoginRow) -> None:
        picture = None if png is None else png / f"{row.sandbox}.png"
        label = row.sandbox
        view = _JsonView() if json else _UrlView(label=label) if url else _View(picture, label=label)
        first, changed = await begin(row), has_event[row.sandbox]
        await _run(_LoginFollower(bus, view, changed, png=png is not None, asks_digits=False), first, bus)

    async with connected_bus(lasting=True) as bus:
        event_subject = bus.names.event(sandbox or "*", "login")
        await bus.nc.subscribe(event_subject, cb=on_event)
        await bus.check_subscribed(event_subject)
        if sandbox is None:
            found = bulk.read_rows(rows or Path("-"), LoginRow)
            work = bulk.run_rows(found, run_row, done="logged in", failed_file=failed, limit=ROWS_UNDER_WAY)
        else:
            view = _JsonView() if json else _UrlView() if url else _View(png)
            first = await begin(LoginRow(sandbox=sandbox))
            work = _run(_LoginFollower(bus, view, has_event[sandbox], png=png is not None), first, bus)
        with until_signalled() as stop:
            code = await run_until_stopped(stop, work)
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

    def __init__(
        self, bus: Bus, view: _View, has_event: asyncio.Event, *, png: bool, asks_digits: bool = True
    ) -> None:
        self._bus = bus
        self._view = view
        self._changed = has_event
        self._png = png
        self._asks_digits = asks_digits
        self._lines = stdin.lines()
        self._line: asyncio.Task[str | None] | None = None

    async def until_over(self, now: Login) -> Login:
        """Shows each step and hands digits on. Raises Failed."""
        try:
            while True:
                self._view.show(now)
                if now.status in FINAL_STATUSES:
                    return now
                if now.status == "need_verify_code" and not self._asks_digits:
                    raise Failed(NO, "The phone shows digits: log this one in alone.")
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

    def __init__(self, png: Path | None = None, *, label: str = "") -> None:
        """`label`: the sandbox, where there are several."""
        self._png = png
        self.label = f"{label}  " if label else ""
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
            write_private(self._png, base64.b64decode(now.qrcode_png))
            self.say(f"Code {now.code} is in {self._png}.")
        else:
            text = now.qrcode_text
            output.say(text if output.can_style(sys.stdout) else stdin.COLOURS.sub("", text))

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
        output.say(self.label + text)

    def prompt(self, text: str) -> None:
        """A question that is answered on the same line."""
        print(text, end="", file=sys.stderr, flush=True)


class _UrlView(_View):
    """Codes on standard output, one URL a line; the rest on standard error."""

    def show_code(self, now: Login) -> None:
        output.say(self.label + output.printable(now.qrcode_url))

    def say(self, text: str) -> None:
        print(self.label + text, file=sys.stderr, flush=True)


class _JsonView(_View):
    """Every state as a JSON object."""

    def show_code(self, now: Login) -> None:
        """It is in the object."""

    def show_state(self, now: Login) -> None:
        output.json_line(now)
        if now.status == "need_verify_code" and now.reason != CHECKING:
            self.prompt("Digits shown on the phone: ")
