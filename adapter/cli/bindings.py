"""`bind`, `unbind`, `bindings`: which bot serves which sandbox."""

from __future__ import annotations

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
from adapter.cli.options import AutoTyping, Json, ReceiptId, Sandbox, Timeout, flag, new_id
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
    Erase,
    Options,
    Receipt,
    Unbind,
)
from adapter.contract.names import H_MSG_ID, H_REPLY_TO, H_SCHEMA, is_sandbox
from adapter.errors import Refused
from adapter.ilink.client import ILink
from adapter.logins.flow import check_token
from adapter.ports import Account
from adapter.tools.metrics import Metrics

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
"""For the answer: a request to iLink that is out ends before its person is unbound."""


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
    no_check: Annotated[
        bool, flag("Take ids as they are and do not ask iLink whether it takes the token: while iLink is away.")
    ] = False,
    request_id: ReceiptId = None,
    timeout: Timeout = BIND_S,
    json: Json = False,
) -> int:
    """Let a bot serve a sandbox.

    The bot's token comes from a file, from standard input, or is asked for without echo. It is never an argument,
    since every user of a machine can read those.
    The request is stored even while no adapter runs (exit code 4 then). A bot that another sandbox or another user
    has is refused: unbind it there first.

    iLink is asked first whether it accepts the token. A refused token is not bound, and earlier bindings stay.
    """
    asked = Bind(
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
        is_known = no_check or await _check_token(bus, asked)
        receipt = await request_control(bus, sandbox, asked, timeout)
    if receipt.outcome == "applied" and not (is_known or json):
        output.complain("iLink gave no answer: whether it takes the token is not known.")
    return _print_receipt(receipt, json, done=f"{bot} serves {sandbox}.", former="replaced")


async def unbind(
    sandbox: Sandbox,
    bot: Annotated[str | None, Parameter(help="Bot to unbind.")] = None,
    /,
    *,
    every: Annotated[bool, flag("Instead of a bot: all of the sandbox.", name="--all")] = False,
    request_id: ReceiptId = None,
    timeout: Timeout = BIND_S,
    json: Json = False,
) -> int:
    """Let a bot, or every bot of a sandbox, serve it no longer.

    What a person has written is deleted with them, so that the next person's agent reads nothing of the former one.
    Commands that wait for the person are refused.
    """
    if every == (bot is not None):
        raise Failed(USAGE, "Name the bot to unbind, or give --all.")
    async with connected_bus() as bus:
        await bus.check_subscribed()
        asked = Unbind(bot=bot, all=every, id=request_id or new_id())
        receipt = await request_control(bus, sandbox, asked, timeout)
    done = "Unbound." if receipt.bots else "No such bot is bound here."
    return _print_receipt(receipt, json, done=done, former="unbound")


def _print_receipt(receipt: Receipt, json: bool, *, done: str, former: str) -> int:
    """`former`: what became of the bots in it. Returns the exit code."""
    is_applied = receipt.outcome == "applied"
    if json:
        output.json_line(receipt)
    elif not is_applied:
        output.complain(receipt.detail or UNREASONED)
    else:
        for bot in receipt.bots:
            output.say(f"{former}  {output.printable(bot)}")
        output.say(output.printable(done))
    return OK if is_applied else NO


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


async def request_control(
    bus: BusConnection, sandbox: str, asked: Bind | Unbind | Erase, timeout_s: float
) -> Receipt:
    """Stores a bind, unbind or erase, and waits for its final receipt. Raises Failed."""
    inbox = bus.nc.new_inbox()
    headers = {H_MSG_ID: asked.id or "", H_REPLY_TO: inbox, H_SCHEMA: SCHEMA_VERSION}
    subject = bus.names.said(type(asked).__name__.lower(), sandbox)
    answers = await bus.nc.subscribe(inbox)
    ack = await bus.store(subject, msgspec.json.encode(asked), headers)
    try:
        if ack.duplicate:
            said = f"Request {asked.id} was stored before: `wechat-nats bindings` shows what holds now."
            raise Failed(TIMEOUT, said)
        return decode_answer((await answers.next_msg(timeout=timeout_s)).data, Receipt)
    except TimeoutError:
        said = f"Stored; there was no receipt in {timeout_s:g} s. It takes effect when an adapter runs."
        raise Failed(TIMEOUT, said) from None
    except NatsError:
        raise Failed(UNREACHABLE, f"Stored; {BROKE}") from None
    finally:
        with contextlib.suppress(NatsError):
            await answers.unsubscribe()
