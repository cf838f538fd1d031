"""`bind`, `unbind`, `bindings`: which bot serves which sandbox."""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import sys
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from cyclopts import Parameter
from nats.errors import Error as NatsError

from adapter.cli import output
from adapter.cli.bus import BROKE, BusConnection, connected_bus, decode_answer
from adapter.cli.exits import NO, OK, TIMEOUT, UNREACHABLE, USAGE, Failed
from adapter.cli.options import AutoTyping, Json, RequestId, Sandbox, Timeout, flag, new_id
from adapter.cli.output import read_text
from adapter.contract.messages import (
    BOT_STATUSES,
    SCHEMA_VERSION,
    Bind,
    BindingHealth,
    BindingInfo,
    BindingsPage,
    BindingsQuery,
    BotStatus,
    ControlAnswer,
    Erase,
    Options,
    Unbind,
)
from adapter.contract.names import H_MSG_ID, H_REPLY_TO, H_SCHEMA, is_sandbox
from adapter.errors import Refused
from adapter.ilink.client import ILink
from adapter.logins.flow import check_token
from adapter.observability.metrics import Metrics
from adapter.ports import Account

COLUMNS = ("sandbox", "bot", "user", "state", "since", "reason")
HEALTH_COLUMNS = ("sandbox", "bot", "user", "state", "since", "last poll", "user wrote", "window", "why")
TROUBLE: tuple[BotStatus, ...] = ("not_polled", "too_new", "failing", "needs_login", "unknown", "stale", "paused")
UNREASONED = "The adapter refused without a reason."
STYLES = {
    "active": "green",
    "polling": "green",
    "storing": "green",
    "needs_login": "red",
    "not_polled": "red",
    "failing": "red",
    "too_new": "red",
}
BIND_S = 30.0
"""For the answer to a bind: another sandbox may have to release the bot."""


async def bind(
    sandbox: Sandbox,
    bot: Annotated[str, Parameter(help="iLink's bot id, …@im.bot.")],
    /,
    *,
    token: Annotated[
        str | None,
        Parameter(metavar="-", allow_leading_hyphen=True, help="Only `-`: read the bot's token from standard input."),
    ] = None,
    token_file: Annotated[Path | None, Parameter(metavar="FILE", help="Read the bot's token from this file.")] = None,
    user: Annotated[
        str | None, Parameter(metavar="USER", help="The WeChat user, …@im.wechat; learned if absent.")
    ] = None,
    base_url: Annotated[
        str | None, Parameter(metavar="URL", help="iLink API base of this bot; default: the service's.")
    ] = None,
    auto_typing: AutoTyping = False,
    yes: Annotated[
        bool, flag("Move a bot that serves another sandbox, without asking.", name=["--yes", "-y"])
    ] = False,
    no_check: Annotated[
        bool, flag("Take ids as they are and do not ask iLink whether it takes the token: while iLink is away.")
    ] = False,
    request_id: RequestId = None,
    timeout: Timeout = BIND_S,
    json: Json = False,
) -> int:
    """Let a bot serve a sandbox.

    The bot's token comes from a file, from standard input, or is asked for without echo. It is never an argument,
    since every user of a machine can read those.
    The request is stored even while no adapter runs (exit code 4 then).

    iLink is asked first whether it accepts the token. A refused token is not bound, and earlier bindings stay.
    """
    asked = Bind(
        sandbox=sandbox,
        bot=bot,
        bot_token=_read_token(token, token_file),
        id=request_id or new_id(),
        base_url=base_url,
        user=user,
        options=Options(auto_typing=auto_typing),
        check=not no_check,
    )
    async with connected_bus() as bus:
        await bus.check_subscribed()
        serves = sandbox if yes else (await _serving(bus, bot)).get(bot, sandbox)
        if serves != sandbox and not output.confirm(f"{bot} serves {serves}: move it to {sandbox}?"):
            raise Failed(NO, f"{bot} serves {serves}: give --yes to move it.")
        is_known = no_check or await _check_token(bus, asked)
        answer = await request_control(bus, asked, timeout)
    if answer.ok and not (is_known or json):
        output.complain("iLink gave no answer: whether it takes the token is not known.")
    return _print_answer(answer, "bound", json)


async def unbind(
    sandbox: Sandbox,
    bot: Annotated[str | None, Parameter(help="Bot to unbind; default: every bot of the sandbox.")] = None,
    /,
    *,
    request_id: RequestId = None,
    timeout: Timeout = BIND_S,
    json: Json = False,
) -> int:
    """Let a bot, or every bot of a sandbox, serve it no longer.

    Where nobody stays bound, the sandbox's inbox is deleted, so that the next person's agent reads nothing of the
    former one. Commands that wait for the person are refused.
    """
    async with connected_bus() as bus:
        await bus.check_subscribed()
        answer = await request_control(bus, Unbind(sandbox=sandbox, bot=bot, id=request_id or new_id()), timeout)
    return _print_answer(answer, "unbound", json)


def _print_answer(answer: ControlAnswer, done: str, json: bool) -> int:
    """Returns the exit code."""
    if json:
        output.json_line(answer)
    elif not answer.ok:
        output.complain(answer.error or UNREASONED)
    else:
        rows = [
            (b.sandbox, b.bot, b.user or "-", b.state, output.clock(b.since_ms), b.reason) for b in answer.bindings
        ]
        output.table(COLUMNS, rows, styles=STYLES, empty="Nothing was bound.")
        for bot in answer.replaced:
            output.say(f"replaced  {output.printable(bot)}")
        if answer.moved_from:
            output.say(f"moved     from {answer.moved_from}")
        if answer.bindings:
            output.say(f"{done}.")
    return OK if answer.ok else NO


async def _check_token(bus: BusConnection, asked: Bind) -> bool:
    """Whether iLink has taken the token; False: it does not answer here. Raises Failed: it refuses it."""
    settings = bus.settings
    ilink = ILink(
        Metrics(),
        default_base_url=settings.ilink_base_url,
        allowed_hosts=settings.allowed_hosts,
        send_timeout_s=settings.send_timeout_s,
    )
    try:
        return await check_token(ilink, Account(asked.bot, asked.bot_token, asked.base_url or ""))
    except Refused as exc:
        raise Failed(NO, exc.detail) from None
    finally:
        await ilink.close()


async def _serving(bus: BusConnection, bot: str) -> dict[str, str]:
    """The sandbox that a bot serves; nothing while no adapter runs. Raises Failed."""
    try:
        return {info.bot: info.sandbox for info in await all_bindings(bus, bot=bot)}
    except Failed as exc:
        if exc.code != UNREACHABLE:
            raise
        return {}


async def bindings(
    *,
    sandbox: Annotated[
        str | None, Parameter(metavar="SANDBOX", help="Only this sandbox, or with * and ? those that match.")
    ] = None,
    user: Annotated[
        str | None, Parameter(metavar="USER", help="Only this user, or with * and ? those that match.")
    ] = None,
    state: Annotated[
        tuple[BotStatus | Literal["trouble"], ...],
        flag("Only bots in this state; trouble: all that is not as it should be. May be repeated.", metavar="STATE"),
    ] = (),
    json: Json = False,
) -> int:
    """List which bots serve which sandboxes and in which state, the worst first. Tokens are never shown.

    All replicas are asked how they poll their bots. States: not_polled (no replica polls it), too_new (a newer
    version wrote its binding), failing (for a minute iLink has answered no poll, or its answer could not be stored),
    needs_login, unknown (a replica gave no answer), stale (iLink refuses the token, which is tried again), paused
    (NATS or the lease is away), retrying, waiting (another replica may still poll it), storing, polling.
    """
    wanted = {each for one in state for each in (TROUBLE if one == "trouble" else (one,))}
    async with connected_bus() as bus:
        exact = sandbox if sandbox is not None and is_sandbox(sandbox) else None
        every = await all_bindings(bus, exact, health=True)
    found = [
        info
        for info in every
        if fnmatchcase(info.sandbox, sandbox or "*")
        and fnmatchcase(info.user, user or "*")
        and (not wanted or status_of(info) in wanted)
    ]
    found.sort(key=lambda info: (BOT_STATUSES.index(status_of(info)), info.sandbox, info.bot))
    empty = f"Nothing is bound to {exact}." if exact else "Nothing matches." if user or state or sandbox else ""
    output.listing(found, json, HEALTH_COLUMNS, _health_row, styles=STYLES, empty=empty or "Nothing is bound.")
    return OK


def status_of(info: BindingInfo) -> BotStatus:
    return info.health.status if info.health is not None else "unknown"


def _health_row(info: BindingInfo) -> tuple[str, ...]:
    health = info.health or BindingHealth(status="unknown")
    window = "-" if health.window is None else "closed"
    if health.window is not None and health.window.closes_at_ms:
        count = "open" if health.window.remaining is None else f"{health.window.remaining} left"
        window = f"{count}, {output.span(health.window.closes_at_ms - time.time() * 1000)}"
    since, polled, wrote = (output.ago(ms) for ms in (health.since_ms, health.answered_ms, health.inbound_ms))
    return info.sandbox, info.bot, info.user or "-", health.status, since, polled, wrote, window, health.detail


async def all_bindings(
    bus: BusConnection, sandbox: str | None = None, bot: str | None = None, *, health: bool = False
) -> list[BindingInfo]:
    """Every page of wechat.svc.bindings.list. Raises Failed."""
    found: list[BindingInfo] = []
    after = ""
    while True:
        query = BindingsQuery(sandbox=sandbox, bot=bot, after=after, health=health)
        page = await bus.request_service("bindings.list", query, BindingsPage)
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
        text = read_text(token_file)
    elif token == "-":
        text = sys.stdin.readline()
    elif sys.stdin.isatty():
        text = getpass.getpass("Bot token (not shown): ")
    else:
        raise Failed(USAGE, "No token: use --token - to read it from standard input, or --token-file.")
    if not text.strip() or len(text.split()) > 1 or len(text) > 1026:
        raise Failed(USAGE, "The token is empty, too long, or more than one word.")
    return text.strip()


async def request_control(bus: BusConnection, asked: Bind | Unbind | Erase, timeout_s: float) -> ControlAnswer:
    """Stores a command and waits for the adapter's answer. Raises Failed."""
    inbox = bus.nc.new_inbox()
    headers = {H_MSG_ID: asked.id or "", H_REPLY_TO: inbox, H_SCHEMA: SCHEMA_VERSION}
    subject = {Bind: bus.names.bind, Unbind: bus.names.unbind, Erase: bus.names.erase}[type(asked)]
    answers = await bus.nc.subscribe(inbox)
    ack = await bus.store(subject, msgspec.json.encode(asked), headers)
    said = f"Stored; no adapter answered in {timeout_s:g} s, takes effect when one runs."
    try:
        if ack.duplicate:
            said = f"Request {asked.id} was stored before: `wechat-nats bindings` shows what holds now."
            raise Failed(TIMEOUT, said)
        async with asyncio.timeout(timeout_s):
            while True:
                answer = decode_answer((await answers.next_msg(timeout=None)).data, ControlAnswer)
                if not answer.pending:
                    return answer
                said = answer.error
    except TimeoutError:
        raise Failed(TIMEOUT, said) from None
    except NatsError:
        raise Failed(UNREACHABLE, f"Stored; {BROKE}") from None
    finally:
        with contextlib.suppress(NatsError):
            await answers.unsubscribe()
