"""The permission checks of `doctor`: whether this user may do an adapter's work, and whether strangers get in."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
import uuid
from typing import Literal, TypeAlias

import msgspec
from nats.errors import Error as NatsError

from adapter.cli.bus import BusConnection, connected_bus
from adapter.cli.exits import NO, Failed
from adapter.cli.output import some_of
from adapter.contract.messages import Outbound
from adapter.contract.names import Names
from adapter.errors import UNDECODABLE
from adapter.tools.permissions import USER_INFO, Grants, User, grants, required, streams, user_of

WHERE = "see helm/nats/"
ASK_S = 2.0
ACKNOWLEDGED_S = 5.0
PROBE = "doctor"
"""The sandbox whose command, to hide that it types, shows whether acknowledgements work."""
CheckState: TypeAlias = Literal["ok", "warn", "fail"]


class Finding(msgspec.Struct, frozen=True):
    """The result of one check. `say` tells what to do unless all is well."""

    check: str
    state: CheckState
    say: str


async def check_permissions(bus: BusConnection) -> list[Finding]:
    """Compares what the server says of this user with what an adapter does; tries to get in without credentials."""
    user = await _fetch_user(bus)
    return [_check_user(user, bus), *await _check_strangers(user, bus)]


async def _fetch_user(bus: BusConnection) -> User | None:
    """What the server says of the user of this connection; None if it does not."""
    with contextlib.suppress(NatsError, TimeoutError, *UNDECODABLE):
        return user_of((await bus.nc.request(USER_INFO, b"", timeout=ASK_S)).data)
    return None


def _check_user(user: User | None, bus: BusConnection) -> Finding:
    if user is None:
        return Finding("permissions", "warn", f"Cannot be told: let this user publish to {USER_INFO}.")
    may = user.permissions
    lacks = may.missing(required(bus.names, bus.settings.nats_inbox_prefix))
    inboxes = ("_INBOX.>", "_INBOX_platform.>", "_INBOX_operator.>")
    if not lacks and not any(may.publish.allows_some_of(subject) for subject in inboxes):
        lacks = ["publish to the inboxes of whoever asks"]
    if not lacks and not may.publish.allows_all_of("_R_.>"):
        said = "An adapter with this user could not answer to other accounts: let it publish to _R_.>"
        return Finding("permissions", "warn", f"{said}; {WHERE}.")
    if not lacks:
        return Finding("permissions", "ok", "this user may do all that an adapter does")
    if not may.missing(grants(bus.names, "operator")):
        return Finding("permissions", "ok", "an operator's; the adapter needs a user of its own")
    return Finding("permissions", "fail", f"An adapter with this user may not {some_of(lacks)}: {WHERE}.")


async def check_acknowledged(bus: BusConnection) -> list[Finding]:
    """Whether an adapter acknowledges commands: stores one that nobody sees, and waits until the stream has it no
    more."""
    names, body = bus.names, msgspec.json.encode(Outbound(id=f"doctor-{uuid.uuid4().hex}", typing="off"))
    sequence = (await bus.store(names.out(PROBE), body, {})).seq
    deadline = time.monotonic() + ACKNOWLEDGED_S
    while await bus.get_stored(names.stream_out, sequence) is not None:
        if time.monotonic() < deadline:
            await asyncio.sleep(0.1)
            continue
        await bus.delete_stored(names.stream_out, sequence)
        rights = f"$JS.ACK.{names.stream_out}.> and $JS.ACK.*.*.{names.stream_out}.>"
        said = f"No adapter acknowledged a command within {ACKNOWLEDGED_S:g} s: may its user publish to {rights}?"
        return [Finding("acknowledgements", "fail", f"{said} {WHERE}.")]
    return [Finding("acknowledgements", "ok", "an adapter has acknowledged a command")]


# Others -------------------------------------------------------------------------------------------------


def foreign_grants(names: Names) -> Grants:
    """What no sandbox may do: subjects that are read, or only asked, so that trying them changes nothing."""
    ask = [names.svc(verb) for verb in ("bindings.list", "replay", "window", "replay.doctor", "window.doctor")]
    api = ["INFO", "STREAM.NAMES", *(f"STREAM.INFO.{s}" for s in streams(names)), f"DIRECT.GET.{names.stream_in}"]
    subscribe = [names.live("*"), names.event("*", "*"), names.inbox("*"), f"{names.out_plain}.>", names.svc(">")]
    subscribe += [names.polled(), f"$KV.{names.bindings}.>", "$KV.>", "$O.>", "$SRV.>", "$JS.API.>", "_INBOX.>"]
    subscribe += [f"{names.prefix}.>", ">"]
    return Grants((*ask, *(f"$JS.API.{verb}" for verb in api), "$SRV.INFO"), tuple(subscribe))


async def _check_strangers(user: User | None, bus: BusConnection) -> list[Finding]:
    """Whether somebody without credentials gets in, and into this account."""
    settings = bus.settings
    with_credentials = any((settings.nats_creds, settings.nats_nkey, settings.nats_user, settings.nats_token))
    urls = tuple(re.sub(r"^(\w+://)?.*@", r"\1", url) for url in settings.nats_url)
    if not with_credentials and urls == settings.nats_url:
        if settings.nats_cert:
            return []
        said = "No credentials are asked for: whoever reaches this server reads every chat and can bind bots"
        return [Finding("strangers", "warn", f"{said}; {WHERE}.")]
    if bus.nc.is_asked_for_credentials:
        return [Finding("strangers", "ok", "nobody gets in without credentials")]
    nobody = msgspec.structs.replace(
        settings, nats_url=urls, nats_creds="", nats_nkey="", nats_user="", nats_password="", nats_token=""
    )
    async with contextlib.AsyncExitStack() as stack:
        try:
            anonymous = await stack.enter_async_context(connected_bus(nobody))
        except Failed:
            return [Finding("strangers", "ok", "nobody gets in without credentials")]
        open_to, _ = await _probe(anonymous, foreign_grants(bus.names))
        theirs = await _fetch_user(anonymous)
    if not open_to or (user and theirs and user.account != theirs.account):
        return [Finding("strangers", "ok", "who has no credentials gets in, but not at this bus")]
    return [Finding("strangers", "fail", f"Without credentials one may {some_of(open_to)}: {WHERE}.")]


async def _probe(bus: BusConnection, what: Grants) -> tuple[list[str], list[str]]:
    """Tries what of `what` the server lets this connection do. Returns what it allows and what it forbids. Raises
    Failed."""
    bus.complaints.clear()
    inbox = bus.nc.new_inbox()
    try:
        subscriptions = [await bus.nc.subscribe(subject) for subject in what.subscribe]
        for subject in what.publish:
            await bus.nc.publish(subject, b"", reply=inbox)
        for _ in range(2):  # nats-py writes the first ping ahead of what waits to be written
            await bus.nc.flush()
        for subscription in subscriptions:
            await subscription.unsubscribe()
    except NatsError as exc:
        raise Failed(NO, f"The connection broke while permissions were tried ({exc}): try again.") from None
    tried = {f"publish {s}": ("publish", s.lower()) for s in what.publish}
    tried |= {f"subscribe {s}": ("subscription", s.lower()) for s in what.subscribe}
    refused = [done for done, complaint in tried.items() if complaint in bus.forbidden]
    return [done for done in tried if done not in refused], refused


async def check_sandbox_confined(bus: BusConnection, sandbox: str) -> list[Finding]:
    """Checks the credentials of a sandbox: what is its own is allowed, and nothing else of what can be tried without
    harm."""
    asks = tuple(bus.names.svc(f"{verb}.{sandbox}") for verb in ("replay", "window"))
    _, missing = await _probe(bus, Grants(asks, grants(bus.names, "sandbox", sandbox).subscribe))
    open_to, _ = await _probe(bus, foreign_grants(bus.names))
    return [
        Finding("own", "fail", f"It may not {some_of(missing)}: {WHERE}.")
        if missing
        else Finding("own", "ok", f"{sandbox} gets what is its own"),
        Finding("others", "fail", f"It may {some_of(open_to)}: {WHERE}.")
        if open_to
        else Finding("others", "ok", "and nothing of others that was tried"),
    ]
