"""`login`: a QR code on the terminal that binds the person who scans it to a sandbox."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import re
import sys
import textwrap
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.cells import cell_len

from adapter.cli import output, stdin
from adapter.cli.bus import BusConnection, connected_bus
from adapter.cli.exits import NO, OK, UNREACHABLE, USAGE, Failed
from adapter.cli.options import AutoTyping, Json, Sandbox, flag
from adapter.cli.output import write_private
from adapter.contract.messages import CHECKING, FINAL_STATUSES, Login, LoginQuery, LoginStart, LoginVerify, Options

START_S = 20.0
WIDTH = 80
REFRESH_S = 1.0
"""Seconds between two looks at a login."""
EXPIRY_GRACE_S = 30.0
"""Seconds beyond a login's end during which an adapter that is away is waited for."""
GOOD = ("confirmed", "already_bound")
_DIGITS = re.compile(r"[0-9]{1,12}")


async def login(
    sandbox: Sandbox,
    /,
    *,
    url: Annotated[bool, flag("Print only the text of each code, which is a URL.")] = False,
    png: Annotated[Path | None, Parameter(metavar="FILE", help="Write each code as PNG to this file.")] = None,
    auto_typing: AutoTyping = False,
    json: Json = False,
) -> int:
    """Show a QR code: whoever scans it with WeChat talks to this sandbox from then on.

    A code that nobody scans is replaced by a new one, and so is one whose replica is gone. Digits that the phone
    shows are read from standard input. Exit code 0 once the bot is bound, or if the user has a bot of this sandbox
    already. Ctrl-C cancels the login. The codes are secrets until the login is over.
    """
    if url and (png is not None or json):
        raise Failed(USAGE, "Give --url alone.")
    asked = LoginStart(sandbox=sandbox, options=Options(auto_typing=auto_typing), png=png is not None)
    async with connected_bus(lasting=True) as bus:
        await bus.check_subscribed()
        check_login(await log_in(bus, asked, stdin.lines(), View(png, url=url, json=json)))
    return OK


def check_login(ended: Login) -> None:
    """Raises Failed unless the user has a bot of the sandbox."""
    if ended.status not in GOOD:
        raise Failed(NO, output.printable(ended.detail or f"The login ended: {ended.status}."))


async def log_in(bus: BusConnection, asked: LoginStart, typed: AsyncIterator[str], view: View | None = None) -> Login:
    """Shows the codes of a login, and returns how it ended. Raises Failed."""
    view = view or View()
    try:
        return await _follow(bus, asked, view, typed)
    except BaseException:  # ctrl-C, too: nobody shall scan a code that nobody waits for
        if view.login is not None:
            with contextlib.suppress(Failed):
                await bus.request_service("login.cancel", LoginQuery(login=view.login), Login)
        raise


async def _follow(bus: BusConnection, asked: LoginStart, view: View, typed: AsyncIterator[str]) -> Login:
    """Starts a login, shows each of its steps and forwards digits, until the login is over; one that is lost with its
    replica is started anew. Raises Failed."""
    line: asyncio.Future[str | None] | None = None
    now = await bus.request_service("login.start", asked, Login, START_S)
    while True:
        view.show(now)
        if now.status == "lost":
            now = await bus.request_service("login.start", asked, Login, START_S)
            continue
        if now.status in FINAL_STATUSES:
            return now
        if now.status != "need_verify_code" or now.reason == CHECKING:
            await asyncio.sleep(REFRESH_S)
            now = await _refresh(bus, now, png=asked.png)
            continue
        line = line or asyncio.ensure_future(anext(typed, None))
        await asyncio.wait({line}, timeout=REFRESH_S)
        if not line.done():
            now = await _refresh(bus, now, png=asked.png)
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
            now = await _refresh(bus, now, png=asked.png)


async def _refresh(bus: BusConnection, now: Login, *, png: bool) -> Login:
    """How the login stands. An adapter that is away for a moment does not end it. Raises Failed."""
    try:
        return await bus.request_service("login.status", LoginQuery(login=now.login, png=png), Login)
    except Failed as exc:
        if exc.code != UNREACHABLE or time.time() * 1000 > now.expires_at_ms + EXPIRY_GRACE_S * 1000:
            raise
        return now


def fill(text: str, indent: str = "") -> str:
    """The text in lines of at most WIDTH columns; Chinese characters take two. `indent`: of all but the first."""
    columns = max(WIDTH // 2, WIDTH + len(text) - cell_len(text))
    return textwrap.fill(text, columns, subsequent_indent=indent, break_on_hyphens=False)


class View:
    """Shows a login in words; with `url` only its codes on standard output; with `json` every state as an object."""

    def __init__(self, png: Path | None = None, *, url: bool = False, json: bool = False) -> None:
        self._png = png
        self._url = url
        self._json = json
        self._shown: tuple[str, int, str, str] | None = None
        self._code: tuple[str, int] | None = None
        self.login: str | None = None
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
            output.say(output.printable(now.qrcode_url))
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
                self._say(f"The code before it is dying. {output.printable(now.detail)}")
            case "confirmed":
                self._say(f"{output.printable(now.bot)} serves {now.sandbox}. {output.printable(now.detail)}")
            case "lost":
                self._say("The replica that ran the login is gone. Its code is of no use any more.")
            case "scanned" | "already_bound":
                self._say(output.printable(now.detail))

    def _say(self, text: str) -> None:
        if not self._json:
            print(fill(text), file=sys.stderr if self._url else sys.stdout, flush=True)

    def prompt(self, text: str) -> None:
        """A question that is answered on the same line."""
        print(text, end="", file=sys.stderr, flush=True)
