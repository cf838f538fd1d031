"""`bind`, `unbind`, `bindings`: which bot serves which sandbox."""

from __future__ import annotations

import asyncio
import getpass
import sys
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError

from adapter.cli import output
from adapter.cli.bus import Bus, connected_bus
from adapter.cli.exit_codes import NO, OK, TIMEOUT, UNREACHABLE, USAGE, Failed
from adapter.cli.options import AutoTyping, Durable, Json, Keep, MaybeSandbox, RequestId, Sandbox, Timeout, new_id
from adapter.contract.messages import (
    SCHEMA_VERSION,
    Bind,
    BindingInfo,
    BindingsPage,
    BindingsQuery,
    ControlAnswer,
    Options,
    Unbind,
)
from adapter.contract.names import H_MSG_ID, H_REPLY_TO, H_SCHEMA
from adapter.errors import UNDECODABLE

COLUMNS = ("sandbox", "bot", "user", "state", "since", "reason")
STYLES = {"active": "green", "needs_login": "red"}


async def bind(
    sandbox: Sandbox,
    bot: Annotated[str, Parameter(help="iLink's bot id, …@im.bot.")],
    /,
    *,
    token: Annotated[
        str | None,
        Parameter(allow_leading_hyphen=True, help="Only `-`: read the bot's token from standard input."),
    ] = None,
    token_file: Annotated[Path | None, Parameter(help="Read the bot's token from this file.")] = None,
    user: Annotated[str | None, Parameter(help="The WeChat user, …@im.wechat; learned if absent.")] = None,
    base_url: Annotated[str | None, Parameter(help="iLink API base of this bot; default: the service's.")] = None,
    cursor: Annotated[
        str | None, Parameter(help='Only `""`: poll from the start; default: from where it was.')
    ] = None,
    cursor_file: Annotated[Path | None, Parameter(help="Poll from iLink's cursor in this file.")] = None,
    durable: Durable = False,
    auto_typing: AutoTyping = False,
    keep: Keep = False,
    request_id: RequestId = None,
    timeout: Timeout = 10.0,
    json: Json = False,
) -> int:
    """Let a bot serve a sandbox.

    The bot's token comes from a file, from standard input, or is asked for without echo; it is never an argument,
    since every user of a machine can read those. Nor is a cursor of iLink's, in which the token stands. The request
    is stored even while no adapter runs (exit code 4 then).
    """
    asked = Bind(
        sandbox=sandbox,
        bot=bot,
        bot_token=_read_token(token, token_file),
        id=request_id or new_id(),
        base_url=base_url,
        user=user,
        cursor=_read_cursor(cursor, cursor_file),
        options=Options(durable=durable, auto_typing=auto_typing),
        keep_undelivered=keep,
    )
    async with connected_bus() as bus:
        answer = await request(bus, bus.names.bind, asked, timeout)
    return _print_answer(answer, "bound", json)


async def unbind(
    sandbox: Sandbox,
    bot: Annotated[str | None, Parameter(help="Bot to unbind; default: every bot of the sandbox.")] = None,
    /,
    *,
    keep: Keep = False,
    request_id: RequestId = None,
    timeout: Timeout = 10.0,
    json: Json = False,
) -> int:
    """Let a bot, or every bot of a sandbox, serve it no longer.

    What its person wrote and the sandbox has not read is passed over then, by its durable consumer and by replay.
    """
    asked = Unbind(sandbox=sandbox, bot=bot, id=request_id or new_id(), keep_undelivered=keep)
    async with connected_bus() as bus:
        answer = await request(bus, bus.names.unbind, asked, timeout)
    return _print_answer(answer, "unbound", json)


async def bindings(*, sandbox: MaybeSandbox = None, json: Json = False) -> int:
    """List which bots serve which sandboxes. Tokens are never shown."""
    async with connected_bus() as bus:
        found = await all_bindings(bus, sandbox)
    if json:
        for info in found:
            output.json_line(info)
    else:
        _table(found, empty="Nothing is bound." if sandbox is None else f"Nothing is bound to {sandbox}.")
    return OK


async def all_bindings(bus: Bus, sandbox: str | None = None) -> list[BindingInfo]:
    """Every page of wechat.svc.bindings.list. Raises Failed."""
    found: list[BindingInfo] = []
    after = ""
    while True:
        page = await bus.request_service("bindings.list", BindingsQuery(sandbox=sandbox, after=after), BindingsPage)
        found += page.bindings
        if not page.next:
            return found
        after = page.next


def _read_token(token: str | None, token_file: Path | None) -> str:
    """Raises Failed, whose text never repeats what may be a token."""
    if token is not None and token_file is not None:
        raise Failed(USAGE, "Give --token - or --token-file, not both.")
    if token not in (None, "-"):
        raise Failed(USAGE, "A token on the command line can be read by others: use --token - or --token-file.")
    if token_file is not None:
        text = _read_file("token", token_file)
    elif token == "-":
        text = sys.stdin.readline()
    elif sys.stdin.isatty():
        text = getpass.getpass("Bot token (not shown): ")
    else:
        raise Failed(USAGE, "No token: use --token - to read it from standard input, or --token-file.")
    if not text.strip() or len(text.split()) > 1 or len(text) > 1026:
        raise Failed(USAGE, "The token is empty, too long, or more than one word.")
    return text.strip()


def _read_cursor(cursor: str | None, cursor_file: Path | None) -> str | None:
    """Raises Failed, whose text never repeats what has a token in it."""
    if cursor is not None and cursor_file is not None:
        raise Failed(USAGE, 'Give --cursor "" or --cursor-file, not both.')
    if cursor:
        raise Failed(
            USAGE, "A cursor on the command line can be read by others, and a token in it: use --cursor-file."
        )
    return cursor if cursor_file is None else _read_file("cursor", cursor_file).strip()


def _read_file(what: str, path: Path) -> str:
    """Raises Failed."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise Failed(USAGE, f"Cannot read the {what} from {path}: {_reason_text(exc)}.") from None


def _reason_text(exc: OSError | UnicodeDecodeError) -> str:
    return exc.strerror or "unknown" if isinstance(exc, OSError) else "it is not UTF-8"


async def request(bus: Bus, subject: str, asked: Bind | Unbind, timeout_s: float) -> ControlAnswer:
    """Stores the request and waits for the adapter's answer. Raises Failed."""
    inbox = bus.nc.new_inbox()
    answers = await bus.nc.subscribe(inbox)
    await bus.check_subscribed(inbox)
    headers = {H_MSG_ID: asked.id or "", H_REPLY_TO: inbox, H_SCHEMA: SCHEMA_VERSION}
    ack = await bus.store(subject, msgspec.json.encode(asked), headers)
    if ack.duplicate:
        raise Failed(TIMEOUT, f"Request {asked.id} was stored before: `wechat-nats bindings` shows what holds now.")
    return await _send_control(answers, timeout_s)


async def _send_control(answers: Subscription, timeout_s: float) -> ControlAnswer:
    try:
        async with asyncio.timeout(timeout_s):
            msg = await answers.next_msg(timeout=None)
    except TimeoutError:
        raise Failed(
            TIMEOUT, f"Stored; no adapter answered in {timeout_s:g} s, takes effect when one runs."
        ) from None
    except NatsError:
        raise Failed(
            UNREACHABLE, "Stored, but the connection broke before the answer; takes effect anyway."
        ) from None
    try:
        return msgspec.json.decode(msg.data, type=ControlAnswer)
    except UNDECODABLE:
        raise Failed(NO, "The adapter's answer cannot be read: are both of the same version?") from None


def _print_answer(answer: ControlAnswer, done: str, json: bool) -> int:
    if json:
        output.json_line(answer)
    elif answer.ok:
        _table(answer.bindings, empty="Nothing was bound.")
        for bot in answer.replaced:
            output.say(f"replaced  {output.printable(bot)}")
        if answer.bindings:
            output.say(f"{done}.")
    else:
        output.complain(answer.error or "The adapter refused without a reason.")
    return OK if answer.ok else NO


def _table(found: list[BindingInfo], *, empty: str) -> None:
    rows = [(b.sandbox, b.bot, b.user or "-", b.state, output.clock(b.since_ms), b.reason) for b in found]
    output.table(COLUMNS, rows, styles=STYLES, empty=empty)
