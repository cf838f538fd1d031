"""`login`: a QR code on the terminal that binds the person who scans it to a sandbox, or codes for many sandboxes."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import re
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from adapter.cli import bulk, output, stdin
from adapter.cli.bus import BusConnection, connected_bus
from adapter.cli.exits import NO, OK, UNREACHABLE, USAGE, Failed
from adapter.cli.options import AutoTyping, Json, RowSandbox, flag
from adapter.cli.output import write_private
from adapter.contract.messages import CHECKING, FINAL_STATUSES, Login, LoginQuery, LoginStart, LoginVerify

START_S = 20.0
REFRESH_S, REFRESH_ROWS_S = 1.0, 3.0
"""Seconds between two looks at a login: a person's, and each of many."""
EXPIRY_GRACE_S = 30.0
"""Seconds beyond a login's end during which an adapter that is away is waited for."""
GOOD = ("confirmed", "already_bound")
ROWS_UNDER_WAY = 500
"""Logins of `--from` that are open at the same time: each costs the adapter a long poll."""
_DIGITS = re.compile(r"[0-9]{1,12}")


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
    json: Json = False,
) -> int:
    """Show a QR code: whoever scans it with WeChat talks to this sandbox from then on.

    A code that nobody scans is replaced by a new one, and so is one whose replica is gone. Digits that the phone
    shows are read from standard input. Exit code 0 once the bot is bound, or if the user has a bot of this sandbox
    already. Ctrl-C cancels the login. The codes are secrets until the login is over.

    With --from, rows have the column sandbox, and may have auto_typing; --png, --url or --json
    says where the codes go. A login for which the phone shows digits fails then: do it alone.
    """
    if url and (png is not None or json):
        raise Failed(USAGE, "Give --url alone.")
    if (sandbox is None) == (rows is None):
        raise Failed(USAGE, "Name a sandbox, or give --from.")
    if rows is not None and not (url or png or json):
        raise Failed(USAGE, "With --from, give --png with a folder, --url or --json: no terminal has room for all.")
    typed = None if sandbox is None else stdin.lines()

    async def start(row: bulk.OptionsRow) -> Login:
        asked = LoginStart(sandbox=row.sandbox, options=row.options, png=png is not None)
        return await bus.request_service("login.start", asked, Login, START_S)

    async def complete(row: bulk.OptionsRow, first: Login, picture: Path | None, label: str = "") -> int:
        view, again = _View(picture, url=url, json=json, label=label), partial(start, row)
        try:
            now = await _follow(bus, first, again, view, typed, png=png is not None)
        except BaseException:  # ctrl-C, too: nobody shall scan a code that nobody waits for
            with contextlib.suppress(Failed):
                await bus.request_service("login.cancel", LoginQuery(login=view.login), Login)
            raise
        if now.status not in GOOD:
            raise Failed(NO, output.printable(now.detail or f"The login ended: {now.status}."))
        return OK

    async def run_row(row: bulk.OptionsRow) -> None:
        picture = None if png is None else png / f"{row.sandbox}.png"
        await complete(row, await start(row), picture, f"{row.sandbox}  ")

    async with connected_bus(lasting=True) as bus:
        await bus.check_subscribed()
        options: dict[str, Any] = {"auto_typing": auto_typing}
        if rows is not None:
            found = bulk.read_rows(rows, bulk.OptionsRow, options)
            work = bulk.run_rows(found, run_row, done="logged in", failed_file=failed, limit=ROWS_UNDER_WAY)
        else:
            row = bulk.OptionsRow(sandbox=sandbox or "", **options)
            work = complete(row, await start(row), png)
        return await work


async def _follow(
    bus: BusConnection,
    now: Login,
    start: Callable[[], Awaitable[Login]],
    view: _View,
    typed: AsyncIterator[str] | None,
    *,
    png: bool,
) -> Login:
    """Shows each step of a login and forwards digits, until the login is over; one that is lost with its replica is
    started anew. `typed`: lines of the person with the phone; None: nobody types.
    Raises Failed."""
    line: asyncio.Future[str | None] | None = None
    while True:
        view.show(now)
        if now.status == "lost":
            now = await start()
            continue
        if now.status in FINAL_STATUSES:
            return now
        if now.status != "need_verify_code" or now.reason == CHECKING:
            await asyncio.sleep(REFRESH_ROWS_S if typed is None else REFRESH_S)
            now = await _refresh(bus, now, png=png)
            continue
        if typed is None:
            raise Failed(NO, "The phone shows digits: log this one in alone.")
        line = line or asyncio.ensure_future(anext(typed, None))
        await asyncio.wait({line}, timeout=REFRESH_S)
        if not line.done():
            now = await _refresh(bus, now, png=png)
            continue
        said, line = line.result(), None
        if said is None:
            raise Failed(NO, "There are no digits on standard input; the login is cancelled.")
        digits = "".join(said.split())
        if not _DIGITS.fullmatch(digits):
            view.prompt("Only the digits that the phone shows: ")
            continue
        try:
            now = await bus.request_service("login.verify", LoginVerify(login=now.login, code=digits), Login)
        except Failed as exc:
            output.complain(str(exc))
            now = await _refresh(bus, now, png=png)


async def _refresh(bus: BusConnection, now: Login, *, png: bool) -> Login:
    """How the login stands. An adapter that is away for a moment does not end it. Raises Failed."""
    try:
        return await bus.request_service("login.status", LoginQuery(login=now.login, png=png), Login)
    except Failed as exc:
        if exc.code != UNREACHABLE or time.time() * 1000 > now.expires_at_ms + EXPIRY_GRACE_S * 1000:
            raise
        return now


class _View:
    """Shows a login in words; with `url` only its codes on standard output; with `json` every state as an object."""

    def __init__(self, png: Path | None, *, url: bool = False, json: bool = False, label: str = "") -> None:
        """`label` precedes each line if there are several logins."""
        self._png = png
        self._url = url
        self._json = json
        self._label = label
        self._shown: tuple[str, int, str, str] | None = None
        self._code: tuple[str, int] | None = None
        self.login = ""
        """The login that was last shown."""

    def show(self, now: Login) -> None:
        """Shows what has changed since the last call."""
        state, code, self.login = (now.login, now.code, now.status, now.reason), (now.login, now.code), now.login
        waits = now.status == "wait"
        if state == self._shown or (waits and code != self._code and not now.qrcode_url):
            return
        self._shown = state
        if self._json:
            output.json_line(now)
        elif waits and code != self._code:
            self._show_code(now)
        self._code = code if waits else self._code
        self._show_state(now)

    def _show_code(self, now: Login) -> None:
        if self._url:
            output.say(self._label + output.printable(now.qrcode_url))
        elif self._png is not None and now.qrcode_png:
            write_private(self._png, base64.b64decode(now.qrcode_png))
            self._say(f"Code {now.code} is in {self._png}.")
        else:
            text = now.qrcode_text
            output.say(text if output.can_style(sys.stdout) else stdin.COLOURS.sub("", text))

    def _show_state(self, now: Login) -> None:
        """A new state. How a login that failed has ended is said last, as an error."""
        match now.status:
            case "need_verify_code" if now.reason != CHECKING:
                self.prompt("Wrong. The digits shown on the phone: " if now.reason else "Digits shown on the phone: ")
            case "wait" if now.code == 1:
                self._say("Scan this code with WeChat.")
            case "wait":
                self._say("Scan this new code; the old one is dying.")
            case "confirmed":
                self._say(f"{output.printable(now.bot)} serves {now.sandbox}. {output.printable(now.detail)}")
            case "lost":
                self._say("The replica that ran the login is gone. Its code is of no use any more.")
            case "scanned" | "already_bound":
                self._say(output.printable(now.detail))

    def _say(self, text: str) -> None:
        if not self._json:
            print(self._label + text, file=sys.stderr if self._url else sys.stdout, flush=True)

    def prompt(self, text: str) -> None:
        """A question that is answered on the same line."""
        print(text, end="", file=sys.stderr, flush=True)
