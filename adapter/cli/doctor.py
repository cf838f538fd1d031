"""`doctor`: is everything in place, and if not, what to do about it."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, NamedTuple

import msgspec
from cyclopts import Parameter
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from adapter.bindings.key_rotation import count_stored_tokens, reseal_tokens
from adapter.cli import output, permission_checks, unrouted_commands
from adapter.cli.bindings import TROUBLE, all_bindings, status_of
from adapter.cli.bus import Bus, connected_bus, permission_violations, settings_here
from adapter.cli.checks import Check, State
from adapter.cli.exit_codes import NO, OK, UNREACHABLE, Failed
from adapter.cli.options import Json, MaybeSandbox, flag
from adapter.contract.messages import BOT_STATUSES, BotStatus
from adapter.errors import UNDECODABLE, BusRefused, Refused, Temporary
from adapter.jetstream import topology
from adapter.jetstream.buckets import LeaderKvBucket
from adapter.jetstream.history import StreamHistory
from adapter.jetstream.managed_connection import ManagedConnection
from adapter.security.seal import Sealer, Sealing
from adapter.settings import Settings

SERVICE = "wechat-nats"
PING_S = 1.0
GIB = 1 << 30
UNRESERVED = GIB
"""Bytes for what reserves nothing: buckets, events, parked commands."""
_SEALED: dict[Sealing, str] = {
    "sealed": "sealed",
    "older": "sealed with an older key",
    "open": "not sealed",
    "foreign": "sealed with a key that is not set here",
}
NAMED = 3
"""Bots that are named of each that is in trouble."""
RESTORE = "restore it from the backup"
STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


async def doctor(
    *,
    fix: Annotated[bool, flag("Create what is missing, change what differs; says it first.")] = False,
    sandbox: Annotated[
        MaybeSandbox, Parameter(help="With the credentials of a sandbox: check only that they confine it.")
    ] = None,
    json: Json = False,
) -> int:
    """Check NATS, permissions, streams, adapters, bindings and what waits.

    Run it with the adapter's credentials, or an operator's. --fix needs the adapter's.
    Exit code 0: nothing fails (warnings do not count); 1: something fails; 3: NATS is not reachable.
    """
    settings = settings_here()
    try:
        async with connected_bus(settings) as bus:
            checks = await _check_replies(bus)
            if not checks and fix and not sandbox:
                await _fix_topology(bus, settings, quiet=json)
            checks = checks or await (
                permission_checks.check_sandbox_confined(bus, sandbox) if sandbox else run_checks(bus, settings)
            )
    except Failed as exc:
        if exc.code != UNREACHABLE:
            raise
        _print_checks([Check("nats", "fail", str(exc))], json)
        return UNREACHABLE
    _print_checks(checks, json)
    return NO if any(check.state == "fail" for check in checks) else OK


async def _check_replies(bus: Bus) -> list[Check]:
    """Why no answer can be heard, without which nothing else can be told. Raises Failed if the connection breaks."""
    try:
        await bus.check_subscribed()
    except Failed as exc:
        if exc.code == UNREACHABLE:
            raise
        return [Check("permissions", "fail", str(exc))]
    return []


async def run_checks(bus: Bus, settings: Settings) -> list[Check]:
    """Every check; one that cannot be made fails and does not hide the others."""
    checks = [Check("nats", "ok", f"nats-server {_check_version(bus)}, {_server_name(bus)}")]
    checks += await permission_checks.check_permissions(bus, settings)
    checks.append(await _check_api_level(bus, settings))
    if checks[-1].state == "ok":
        checks += await _check_topology(bus, settings)
        checks.append(await _check_storage(bus, settings))
        checks.append(await _check_tokens(bus, settings))
    adapters = await _check_adapters(bus)
    checks.append(adapters)
    if adapters.state == "ok":
        checks.append(await _check_bindings(bus))
    checks += [
        await _check_backlog(bus, "dead letters", bus.names.stream_dead, "warn", "see `wechat-nats dead ls`"),
        await _check_backlog(
            bus, "commands waiting", bus.names.stream_out, "ok", "in turn, for their users to write, or for a login"
        ),
    ]
    return checks


def _check_version(bus: Bus) -> str:
    found = bus.nc.connected_server_version
    return f"{found.major}.{found.minor}.{found.patch}"


def _server_name(bus: Bus) -> str:
    url = bus.nc.connected_url
    return url.netloc.rpartition("@")[2] if url else "?"


async def _adapter_connection(bus: Bus, settings: Settings) -> ManagedConnection:
    """The connection at hand as the adapter's own kind, without its loop that reconnects."""
    connection = ManagedConnection(settings, "doctor")
    await connection.adopt_client(bus.nc)
    return connection


async def _check_api_level(bus: Bus, settings: Settings) -> Check:
    try:
        level = await topology.api_level(await _adapter_connection(bus, settings))
    except BusRefused as exc:
        return Check("jetstream", "fail", f"Not available: {exc.detail}. Enable JetStream for this account.")
    except Temporary:
        return Check("jetstream", "fail", "No answer: enable JetStream, and let this user publish to $JS.API.>.")
    if level < topology.API_LEVEL:
        return Check(
            "jetstream", "fail", f"API level {level}; {topology.API_LEVEL} is needed: nats-server 2.14 or newer."
        )
    return Check("jetstream", "ok", f"API level {level}")


async def _check_topology(bus: Bus, settings: Settings) -> list[Check]:
    try:
        missing, different = await topology.inspect_topology(
            await _adapter_connection(bus, settings), bus.names, settings
        )
    except (BusRefused, Temporary) as exc:
        return [Check("streams", "fail", f"Cannot be read ({exc.detail}): let this user publish to $JS.API.>.")]
    checks = [
        Check(w.name, "fail", f"This stream is missing: {RESTORE}; if it never was, start an adapter, or use --fix.")
        for w in missing
        if not w.stream
    ]
    if consumers := [w for w in missing if w.stream]:
        checks.append(Check("consumers", "fail", f"{len(consumers)} are missing: start an adapter, or use --fix."))
    for d in different:
        said = f"{d.field} is {_short(d.found)}, should be {_short(d.wanted)}: use --fix" + (
            "." if d.critical else ", or leave it if it is meant."
        )
        checks.append(Check(d.name, "fail" if d.critical else "warn", said))
    checks += await _check_paused(bus, settings)
    checks += await _check_unrouted(bus, settings)
    return checks or [Check("streams", "ok", "all streams, buckets and consumers are as they should be")]


async def _check_storage(bus: Bus, settings: Settings) -> Check:
    """Whether the account's limit has room for what streams reserve, and some for the others."""
    need = topology.reserved_bytes(bus.names, settings) * settings.replicas
    try:
        limit = int(
            ((await (await _adapter_connection(bus, settings)).api_request("INFO")).get("limits") or {}).get(
                "max_storage", -1
            )
        )
    except (BusRefused, Temporary) as exc:
        return Check("storage", "fail", f"Cannot be told ({exc.detail}): try again.")
    said = f"streams reserve {need / GIB:.1f} GiB"
    if limit < 0:
        return Check("storage", "ok", f"{said}; max_file_store of the servers has to be larger by what buckets take")
    if limit - need < UNRESERVED:
        return Check("storage", "warn", f"{said} of the account's {limit / GIB:.1f}: {topology.MORE_ROOM}.")
    return Check("storage", "ok", f"{said} of the account's {limit / GIB:.1f}")


async def _check_paused(bus: Bus, settings: Settings) -> list[Check]:
    try:
        found = await topology.paused_consumers(await _adapter_connection(bus, settings), bus.names)
    except Temporary as exc:
        return [Check("consumers paused", "fail", f"Cannot be told ({exc.detail}): try again.")]
    said = f"{', '.join(found)}: delivers nothing until `nats consumer resume`, by an administrator."
    return [Check("consumers paused", "fail", said)] if found else []


async def _check_unrouted(bus: Bus, settings: Settings) -> list[Check]:
    try:
        count = await unrouted_commands.count_unrouted(await _adapter_connection(bus, settings), bus.names)
    except (BusRefused, Temporary):
        return []  # there is no such stream, which is told
    said = f"{count} were stored where no adapter looks, without the subject transform: use --fix."
    return [Check("commands astray", "fail", said)] if count else []


async def _check_tokens(bus: Bus, settings: Settings) -> Check:
    """How bot tokens are stored, as far as the key of this command tells."""
    sealer = Sealer(settings.token_key)
    try:
        found = await count_stored_tokens(StreamHistory(await _adapter_connection(bus, settings)), bus.names, sealer)
    except Temporary:
        return Check("tokens", "ok", "this user cannot read how they are stored; adapters look at their start")
    said = ", ".join(f"{count} {_SEALED[sealing]}" for sealing, count in sorted(found.items())) or "none yet"
    if not sealer.is_enabled and found["open"]:
        return Check("tokens", "warn", f"{said}: set WECHAT_NATS_TOKEN_KEY, for adapters and for this command.")
    if not sealer.is_enabled and found["foreign"]:  # whoever operates the bus need not have the key
        said += ": without WECHAT_NATS_TOKEN_KEY it cannot be told whether adapters can open them."
        return Check("tokens", "warn", said)
    if not sealer.is_enabled:
        return Check("tokens", "ok", said)
    if found["open"]:
        return Check("tokens", "fail", f"{said}: use --fix.")
    if found["foreign"]:
        return Check("tokens", "fail", f"{said}: set that key too, after the first, or bind those bots anew.")
    if found["older"]:
        return Check("tokens", "warn", f"{said}: use --fix before you take the older key away.")
    return Check("tokens", "ok", said)


def _short(value: Any) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 80 else text[:79] + "…"


class Adapters(NamedTuple):
    """Adapters that have answered."""

    ids: set[str]
    versions: set[str]
    silent: bool
    """None has answered, and somebody hears the question: an adapter that is forbidden to answer on this inbox, or
    who listens to all subjects."""


async def query_adapters(bus: Bus, wait_s: float = PING_S) -> Adapters:
    """Asks every adapter at once; those that answer in time. Raises Failed, NatsError."""
    ping = f"$SRV.PING.{SERVICE}"
    inbox = bus.nc.new_inbox()
    ids: set[str] = set()
    versions: set[str] = set()
    nobody = False

    async def on_reply(msg: Msg) -> None:
        nonlocal nobody
        if (msg.headers or {}).get("Status") == "503":
            nobody = True  # the server's word that nobody has subscribed
            return
        try:
            pong = msgspec.json.decode(msg.data, type=dict[str, Any])
        except UNDECODABLE:
            return
        ids.add(str(pong.get("id")))
        versions.add(str(pong.get("version")))

    await bus.nc.subscribe(inbox, cb=on_reply)
    await bus.nc.publish(ping, b"", reply=inbox)
    await asyncio.sleep(wait_s)
    bus.raise_if_forbidden(ping)
    return Adapters(ids, versions, silent=not ids and not nobody)


def silent_adapters_advice(bus: Bus) -> str:
    """What to do where adapters are silent."""
    return (
        f"Somebody hears the question for adapters, and none answers on {bus.settings.nats_inbox_prefix}.>: set"
        " NATS_INBOX_PREFIX to _INBOX_operator; or an adapter hangs, or something else listens to all subjects."
    )


async def _check_adapters(bus: Bus) -> Check:
    try:
        there = await query_adapters(bus)
    except Failed as exc:
        return Check("adapters", "fail", str(exc))
    except NatsError as exc:
        return Check("adapters", "fail", f"Cannot ask for them: {exc}.")
    if there.silent:
        return Check("adapters", "fail", silent_adapters_advice(bus))
    if not there.ids:
        return Check("adapters", "fail", "None answers: start one with `wechat-nats run`.")
    return Check("adapters", "ok", f"{len(there.ids)} running, version {', '.join(sorted(there.versions))}")


async def _check_bindings(bus: Bus) -> Check:
    try:
        every = await all_bindings(bus, health=True)
        stored = (await bus.api_request(f"STREAM.INFO.KV_{bus.names.bindings}")).get("state") or {}
    except Failed as exc:
        return Check("bindings", "fail", str(exc))
    if (lost := len(every) - int(stored.get("messages", 0))) > 0:  # of a stream that is missing: all
        return Check("bindings", "fail", f"{lost} that adapters know are not in KV_{bus.names.bindings}: {RESTORE}.")
    bots_of: dict[BotStatus, list[str]] = {status: [] for status in BOT_STATUSES}
    for info in every:
        bots_of[status_of(info)].append(info.bot)
    parts = [f"{len(bots)} {status}{_named(status, bots)}" for status, bots in bots_of.items() if bots]
    said = "; ".join(parts) or "none yet"
    if bots_of["not_polled"] or bots_of["failing"]:
        return Check("bindings", "fail", f"{said}. See `wechat-nats bindings --state trouble`.")
    if any(bots_of[status] for status in TROUBLE):
        advice = "; who needs a login has to scan a new QR code" if bots_of["needs_login"] else ""
        return Check("bindings", "warn", f"{said}. See `wechat-nats bindings --state trouble`{advice}.")
    return Check("bindings", "ok", said)


def _named(status: BotStatus, bots: list[str]) -> str:
    if status not in TROUBLE:
        return ""
    return f" ({', '.join(bots[:NAMED])}{', …' if len(bots) > NAMED else ''})"


async def _check_backlog(bus: Bus, check: str, stream: str, state: State, advice: str) -> Check:
    try:
        answer = await bus.api_request(f"STREAM.INFO.{stream}")
    except Failed as exc:
        return Check(check, "fail", str(exc))
    count = int((answer.get("state") or {}).get("messages", 0))
    return Check(check, state, f"{count}: {advice}") if count else Check(check, "ok", "none")


async def _fix_topology(bus: Bus, settings: Settings, *, quiet: bool) -> None:
    """Creates and alters. Raises Failed at the first that the server refuses."""
    connection = await _adapter_connection(bus, settings)
    try:
        missing, different = await topology.inspect_topology(connection, bus.names, settings)
        for wanted in missing:
            _say_unless_quiet(f"creating {wanted.description} {wanted.name}", quiet)
            await topology.create_resource(connection, wanted)
        for d in different:
            _say_unless_quiet(f"changing {d.name}: {d.field} from {_short(d.found)} to {_short(d.wanted)}", quiet)
        for d in {d.name: d for d in different}.values():
            await topology.alter_stream(connection, bus.names, settings, d)
        await _reseal_tokens(connection, bus, settings, quiet=quiet)
        if count := await unrouted_commands.count_unrouted(connection, bus.names):
            _say_unless_quiet(f"publishing {count} commands again that were stored where no adapter looks", quiet)
            await unrouted_commands.republish_unrouted(connection, bus, count)
    except BusRefused as exc:
        by_hand = "" if exc.code in topology.NO_ROOM else "; this has to be changed by hand"
        raise Failed(NO, f"The server refused: {exc.detail}{by_hand}.") from exc
    except Temporary as exc:
        if permission_violations(bus.async_errors):
            raise Failed(NO, "This user may not do what --fix does: use the adapter's credentials.") from exc
        raise Failed(UNREACHABLE, f"JetStream did not answer ({exc.detail}): try again.") from exc


async def _reseal_tokens(connection: ManagedConnection, bus: Bus, settings: Settings, *, quiet: bool) -> None:
    """Raises BusRefused, Temporary, Failed."""
    sealer, history = Sealer(settings.token_key), StreamHistory(connection)
    found = await count_stored_tokens(history, bus.names, sealer)
    if not sealer.is_enabled or not (count := found["open"] + found["older"]):
        return
    _say_unless_quiet(f"sealing {count} bot tokens with the first key", quiet)
    try:
        await reseal_tokens(history, LeaderKvBucket(connection, bus.names.bindings), bus.names, sealer)
    except Refused as exc:
        raise Failed(NO, exc.detail) from exc


def _say_unless_quiet(text: str, quiet: bool) -> None:
    if not quiet:
        output.say(text)


def _print_checks(checks: list[Check], json: bool) -> None:
    if json:
        for check in checks:
            output.json_line(check)
    else:
        output.table(("check", "state", ""), [(c.check, c.state, c.say) for c in checks], styles=STYLES)
