"""`erase` and `export`: everything that the bus has of one person."""

from __future__ import annotations

import base64
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter

from adapter.bridge.erasure import Found, PersonSearch
from adapter.cli import output
from adapter.cli.bindings import request_control
from adapter.cli.bus import BusConnection, connected_bus
from adapter.cli.exits import NO, OK, USAGE, Failed
from adapter.cli.options import Json, MaybeSandbox, ReceiptId, flag, new_id
from adapter.cli.stored import readable_body
from adapter.contract.messages import Erase, Receipt
from adapter.contract.names import UNROUTED
from adapter.contract.records import Binding, LoginRecord
from adapter.errors import UNDECODABLE

User = Annotated[str, Parameter(metavar="USER", help="The WeChat user, …@im.wechat.")]
ERASE_S = 600.0


async def erase(
    *,
    user: User,
    sandbox: MaybeSandbox = None,
    dry_run: Annotated[bool, flag("Only count what there is: nobody is unbound, and nothing erased.")] = False,
    yes: Annotated[bool, flag("Erase without asking.")] = False,
    request_id: ReceiptId = None,
    timeout: Annotated[float, Parameter(metavar="SECONDS", help="Seconds to wait for the outcome.")] = ERASE_S,
    json: Json = False,
) -> int:
    """Unbind a person, and erase everything of theirs from streams and buckets.

    It shows what there is, and asks before it erases; without a terminal give --yes. An adapter does the work, beside
    its other work, and answers with the counts. It may be repeated. Exit code 1: something is left, erase again; 4:
    no answer came in time, which also means that. Backups are not touched.
    """
    asks = not (yes or dry_run)
    if asks and not output.can_confirm():
        raise Failed(USAGE, "Nobody can be asked here: give --yes to erase, or --dry-run to count.")
    asked, where = Erase(user=user, id=request_id or new_id(), dry_run=dry_run), sandbox or UNROUTED
    async with connected_bus() as bus:
        await bus.check_subscribed()
        if asks:
            counting = msgspec.structs.replace(asked, id=new_id(), dry_run=True)
            found = await request_control(bus, where, counting, timeout)
            code = _print(found, json)
            if code != OK or not found.counts:
                return code
            if not output.confirm(f"Erase all this of {user}{f' in {sandbox}' if sandbox else ''}?"):
                raise Failed(NO, "Nothing was erased.")
        return _print(await request_control(bus, where, asked, timeout), json)


def _print(receipt: Receipt, json: bool) -> int:
    """Returns the exit code."""
    is_applied = receipt.outcome == "applied"
    if json:
        output.json_line(receipt)
    elif is_applied:
        kinds = sorted(receipt.counts.keys() | receipt.left.keys())
        rows = [(kind, receipt.counts.get(kind, 0), receipt.left.get(kind, 0)) for kind in kinds]
        output.table(("kind", "found", "left"), rows, empty="Nothing is there of this person.")
        if receipt.unlearned:
            output.say(
                f"{receipt.unlearned} bots there have no known user, as nobody has written to them yet. If this"
                " person has scanned one of them, unbind it; `wechat-nats bindings` shows them without a user."
            )
    if receipt.detail and not json:
        output.complain(receipt.detail)
    return OK if is_applied and not receipt.left else NO


async def export(*, user: User, sandbox: MaybeSandbox = None) -> int:
    """Print everything of one person as JSON, a line for each message or record.

    It reads buckets that are closed to operators: run it with the adapter's credentials. What opens something
    (tokens, cursors, keys) is masked. The record of a person and inbound dead letters are sealed: they are opened
    with WECHAT_NATS_TOKEN_KEY. The lines hold what people wrote: guard them as such.
    """
    async with connected_bus() as bus:

        async def print_all() -> None:
            async for found in PersonSearch(bus.history, bus.names, user, sandbox).find():
                output.json_line(msgspec.json.encode(_as_line(bus, found)))

        await bus.ask_jetstream(f"DIRECT.GET.KV_{bus.names.bindings}", print_all())
    return OK


def _as_line(bus: BusConnection, found: Found) -> dict[str, Any]:
    stored = found.stored
    return {
        "kind": found.kind,
        "stream": found.stream,
        "sequence": stored.seq,
        "subject": stored.subject,
        "stored_ms": stored.time_ms,
        "sandbox": found.sandbox,
        "size": len(stored.data),
        "content": _content(bus, found),
    }


def _content(bus: BusConnection, found: Found) -> Any:
    data = found.stored.data
    match found.kind:
        case "binding":
            return msgspec.to_builtins(msgspec.json.decode(data, type=Binding).info())
        case "login":
            login = msgspec.json.decode(data, type=LoginRecord)
            return {"sandbox": login.sandbox, "status": login.status, "bot": login.bot, "user": login.user}
        case "media" if ".C." in found.stored.subject:
            return base64.b64encode(data).decode()
        case _:
            text = readable_body(bus, found.stored)
            try:
                return msgspec.json.decode(text)
            except UNDECODABLE:
                return text
