"""`bind`, `unbind`, `bindings`: which bot serves which sandbox."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import getpass
import io
import sys
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from cyclopts import Parameter
from nats.errors import Error as NatsError

from adapter.cli import output
from adapter.cli.bus import BROKE, BusConnection, connected_bus, decode_answer
from adapter.cli.exits import NO, OK, TIMEOUT, UNREACHABLE, USAGE, Failed
from adapter.cli.options import AutoTyping, Json, RequestId, RowSandbox, Sandbox, Timeout, flag, new_id
from adapter.cli.output import read_text, write_private
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
    SandboxId,
    Unbind,
)
from adapter.contract.names import H_MSG_ID, H_REPLY_TO, H_SCHEMA, is_sandbox

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
"""For the answer to a bind: iLink is asked, and another sandbox may have to release the bot."""
UNDER_WAY = 256
"""Binds of `--from` that may wait for answers at the same time."""


class _Row(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A row of `bind --from`. `error`: why it failed before; it is not read."""

    sandbox: SandboxId
    bot: str
    token: str
    user: str | None = None
    base_url: str | None = None
    cursor: str | None = None
    auto_typing: bool = False
    id: str | None = None
    error: str = ""


async def bind(
    sandbox: RowSandbox = None,
    bot: Annotated[str | None, Parameter(help="iLink's bot id, …@im.bot.")] = None,
    /,
    *,
    rows: Annotated[
        Path | None,
        Parameter(
            name="--from",
            metavar="FILE",
            allow_leading_hyphen=True,
            help="CSV with a header, a bot in each row; - is stdin.",
        ),
    ] = None,
    failed: Annotated[
        Path | None,
        Parameter(
            name="--failed", metavar="FILE", help="With --from: write the rows that failed, and why, to this file."
        ),
    ] = None,
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
    yes: Annotated[bool, flag("Move bots that serve another sandbox, without asking.", name=["--yes", "-y"])] = False,
    no_check: Annotated[
        bool, flag("Take ids as they are and do not ask iLink whether it takes the token: while iLink is away.")
    ] = False,
    request_id: RequestId = None,
    timeout: Timeout = BIND_S,
    json: Json = False,
) -> int:
    """Let a bot serve a sandbox.

    The bot's token comes from a file, from standard input, or is asked for without echo. It is never an argument,
    since every user of a machine can read those. A cursor of iLink contains the token: it may stand in a row of
    --from.
    The request is stored even while no adapter runs (exit code 4 then).

    iLink is asked first whether it accepts the token. A refused token is not bound, and earlier bindings stay.

    With --from, rows have the columns sandbox, bot and token, and may have user, base_url, cursor,
    auto_typing and id. They are stored in their order, and carried out at the same time where they have nothing to do
    with each other.
    """
    defaults: dict[str, Any] = {"base_url": base_url, "auto_typing": auto_typing}
    if rows is not None:
        if any(given is not None for given in (sandbox, bot, token, token_file, user, request_id)):
            raise Failed(USAGE, "With --from, sandboxes, bots and all that is their own stand in the rows.")
        return await _bind_rows(rows, defaults, failed, timeout, json, check=not no_check, may_move=yes)
    if sandbox is None or bot is None:
        raise Failed(USAGE, "Name a sandbox and a bot, or give --from.")
    secret = _read_token(token, token_file)
    row = _Row(sandbox=sandbox, bot=bot, token=secret, user=user, id=request_id, **defaults)
    async with connected_bus() as bus:
        await bus.check_subscribed()
        serves = sandbox if yes else (await _serving(bus, bot)).get(bot, sandbox)
        if serves != sandbox and not output.confirm(f"{bot} serves {serves}: move it to {sandbox}?"):
            raise Failed(NO, f"{bot} serves {serves}: give --yes to move it.")
        answer = await request_control(bus, _bind_of(row, check=not no_check), timeout)
    if answer.ok and not (no_check or answer.checked or json):
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


async def _bind_rows(
    source: Path,
    defaults: dict[str, Any],
    failed_file: Path | None,
    timeout_s: float,
    json: bool,
    *,
    check: bool,
    may_move: bool,
) -> int:
    """Binds each row. `defaults`: values of the columns that a row leaves out. However it ends, `failed_file` gets
    the rows that were not done. Returns the exit code. Raises Failed if `source` cannot be read."""
    text = sys.stdin.read() if str(source) == "-" else read_text(source)
    reader = csv.DictReader(io.StringIO(text, newline=""), restkey="more", skipinitialspace=True)
    rows: dict[int, dict[str, Any]] = {}
    for cells in reader:
        rows[reader.line_num] = cells
    undone = Failed(NO, "Not tried, or not answered yet.")
    failures = dict.fromkeys(rows, undone)
    slots, began = asyncio.Semaphore(UNDER_WAY), time.monotonic()

    async def bind_row(bus: BusConnection, number: int, serving: dict[str, str]) -> None:
        try:
            given = {name: cell for name, cell in rows[number].items() if cell}
            row = msgspec.convert(defaults | given, _Row, strict=False)
            serves = serving.get(row.bot, row.sandbox)
            if serves != row.sandbox:
                raise Failed(NO, f"{row.bot} serves {serves}: give --yes to move it.")
            answer = await request_control(bus, _bind_of(row, check=check), timeout_s)
            if json:
                output.json_line(answer)
            if not answer.ok:
                raise Failed(NO, answer.error or UNREASONED)
            del failures[number]
        except msgspec.ValidationError as exc:
            failures[number] = Failed(USAGE, f"{exc}.")
        except Failed as exc:
            failures[number] = exc
        finally:
            slots.release()

    try:
        async with connected_bus(lasting=True) as bus:
            await bus.check_subscribed()
            serving = {} if may_move else await _serving(bus)
            async with asyncio.TaskGroup() as group:
                for number in rows:
                    await slots.acquire()
                    group.create_task(bind_row(bus, number, serving))
    finally:
        if failed_file is not None:
            left = io.StringIO(newline="")
            columns = [name for name in reader.fieldnames or [] if name != "error"]
            writer = csv.DictWriter(left, [*columns, "error"], extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows[number] | {"error": str(why)} for number, why in failures.items())
            write_private(failed_file, left.getvalue())
    for number, why in failures.items():
        output.complain(f"line {number} ({rows[number].get('sandbox', '?')}): {why}")
    where = f"; what failed is in {failed_file}" if failures and failed_file else ""
    summary = f"{len(rows) - len(failures)} bound, {len(failures)} failed, in {time.monotonic() - began:.1f} s"
    print(f"{summary}{where}.", file=sys.stderr, flush=True)
    codes = {why.code for why in failures.values()}
    return OK if not codes else codes.pop() if len(codes) == 1 else NO


def _bind_of(row: _Row, *, check: bool) -> Bind:
    return Bind(
        sandbox=row.sandbox,
        bot=row.bot,
        bot_token=row.token,
        id=row.id or new_id(),
        base_url=row.base_url,
        user=row.user,
        cursor=row.cursor,
        options=Options(auto_typing=row.auto_typing),
        check=check,
    )


async def _serving(bus: BusConnection, bot: str | None = None) -> dict[str, str]:
    """The sandbox that a bot, or each bot, serves; nothing while no adapter runs. Raises Failed."""
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
    (NATS or the lease is away), retrying, releasing, waiting (another replica may still poll it), taking, storing,
    polling.
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
    async with bus.storing:  # so that rows are stored in their order
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
