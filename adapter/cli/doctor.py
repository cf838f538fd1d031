"""`doctor`: is everything in place, and if not, what to do about it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import os
from collections import Counter
from collections.abc import Awaitable
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter
from nats.errors import Error as NatsError

from adapter.bridge.bindings import count_stored_tokens, reseal_tokens
from adapter.cli import inboxes, output, permission_checks
from adapter.cli.bindings import TROUBLE, all_bindings, status_of
from adapter.cli.bus import BusConnection, connected_bus
from adapter.cli.exits import NO, OK, UNREACHABLE, Failed
from adapter.cli.options import Json, MaybeSandbox, flag
from adapter.cli.permission_checks import CheckState, Finding
from adapter.contract.messages import BOT_STATUSES, BindingInfo
from adapter.contract.records import Lease
from adapter.errors import UNDECODABLE, BusRefused, Conflict, Refused, Temporary
from adapter.jetstream import topology
from adapter.jetstream.buckets import KvBucket
from adapter.jetstream.copies import lacking_copies, sentences
from adapter.jetstream.microservice import SERVICE
from adapter.ports import StoredMessage
from adapter.settings import NEWEST_ILINK_VERSION, PREFIX, variable_of
from adapter.tools.seal import Sealer, Sealing

PING_S = 1.0
SILENT_S = 15.0
"""Age of a partition's key at which nobody renews it: its owner writes it each second, and is replaced within
seconds of its death."""
SPARE = 0.9
"""Part of the capacity without one replica that may be used, as in the alert WechatSpareCapacityLow."""
_SEALED: dict[Sealing, str] = {
    "sealed": "sealed",
    "older": "sealed with an older key",
    "foreign": "sealed with a key that is not set here, or damaged",
}
RESTORE = "restore it from the backup"
STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


async def doctor(
    *,
    fix: Annotated[bool, flag("Create what is missing, change what differs; says it first.")] = False,
    allow_loss: Annotated[bool, flag("With --fix: also lower copies and limits, which costs messages.")] = False,
    sandbox: Annotated[
        MaybeSandbox,
        Parameter(metavar="SANDBOX", help="With the credentials of a sandbox: check only that they confine it."),
    ] = None,
    json: Json = False,
) -> int:
    """Check NATS, permissions, streams, adapters, bindings and what waits.

    Run it with the adapter's credentials, or an operator's. --fix needs the adapter's. What streams should be like is
    said by the layout key, which adapters write at their start, and only without it by the settings here.
    Exit code 0: nothing fails (warnings do not count); 1: something fails; 3: NATS is not reachable.
    """
    try:
        async with connected_bus() as bus:
            checks = await _attempt("permissions", bus.check_subscribed())  # without answers nothing can be told
            if not checks and sandbox:
                checks = await permission_checks.check_sandbox_confined(bus, sandbox)
            elif not checks:
                checks = await _run_checks(bus, fix=fix, allow_loss=allow_loss, quiet=json)
    except Failed as exc:
        if exc.code != UNREACHABLE:
            raise
        checks = [Finding("nats", "fail", str(exc))]
    output.listing(checks, json, ("check", "state", ""), lambda c: (c.check, c.state, c.say), styles=STYLES)
    failing = [check.check for check in checks if check.state == "fail"]
    return UNREACHABLE if failing == ["nats"] else NO if failing else OK


async def _run_checks(bus: BusConnection, *, fix: bool, allow_loss: bool, quiet: bool) -> list[Finding]:
    """Every check, after the fixes."""
    here = topology.shape_of(bus.settings)
    left: list[Finding] = []
    if fix:
        left = await _fix(bus, await _adopt_settings(bus, here), allow_loss=allow_loss, quiet=quiet)
    names, version, url = bus.names, bus.nc.connected_server_version, bus.nc.connected_url
    server = f"nats-server {version.major}.{version.minor}.{version.patch}"
    checks = [Finding("nats", "ok", f"{server}, {url.netloc.rpartition('@')[2] if url else '?'}")]
    checks += await permission_checks.check_permissions(bus)
    checks += await _attempt("jetstream", _check_api_level(bus))
    if checks[-1].state == "ok":
        checks += [await _adopt_settings(bus, here), *left]
        checks += await _attempt("streams", _check_topology(bus))
        stored = {"tokens": _check_tokens(bus), "readers": _check_readers(bus), "persons": _check_persons(bus)}
        # they time out where this user may not read
        checks += itertools.chain(*await asyncio.gather(*(_attempt(name, check) for name, check in stored.items())))
    there = await query_adapters(bus)
    checks.append(_check_adapters(there))
    if checks[-1].state != "fail":
        checks += await _attempt("partitions", _check_partitions(bus))
        checks += await _attempt("bindings", _check_bindings(bus, there))
        checks += await _attempt("acknowledgements", permission_checks.check_acknowledged(bus))
    wait = "in turn, for their users to write, or for a login"
    letters = _check_backlog(bus, "dead letters", names.stream_dead, "warn", "see `wechat-nats dead ls`")
    commands = _check_backlog(bus, "commands waiting", names.stream_out, "ok", wait)
    return checks + await _attempt("dead letters", letters) + await _attempt("commands waiting", commands)


async def _attempt(name: str, check: Awaitable[list[Finding] | None]) -> list[Finding]:
    """A check that cannot be made fails, and does not hide the others."""
    try:
        return await check or []
    except Failed as exc:
        return [Finding(name, "fail", str(exc))]
    except (BusRefused, Temporary, NatsError) as exc:
        why = exc if isinstance(exc, NatsError) else exc.detail or exc.reason
        said = f"Cannot be told ({why}): is JetStream enabled, may this user publish to $JS.API.>?"
        return [Finding(name, "fail", said)]


async def _check_api_level(bus: BusConnection) -> list[Finding]:
    level = await topology.api_level(bus.connection)
    if level >= topology.API_LEVEL:
        return [Finding("jetstream", "ok", f"API level {level}")]
    said = f"API level {level}; {topology.API_LEVEL} is needed: nats-server 2.14 or newer."
    return [Finding("jetstream", "fail", said)]


async def _check_topology(bus: BusConnection) -> list[Finding]:
    """Streams, their configuration and their copies. They work without a copy, so a lost one does not fail."""
    missing, different, infos = await topology.inspect_topology(bus.connection, bus.names, bus.settings)
    checks = [
        Finding(
            w.name, "fail", f"This stream is missing: {RESTORE}; if it never was, start an adapter, or use --fix."
        )
        for w in missing
    ]
    for d in different:
        if number := topology.renumbered_from(d):
            said = topology.partitions_advice(bus.names, number, bus.settings.partitions)
            checks.append(Finding(d.name, "fail", said))
            continue
        said = f"{d.field} is {_short(d.found)}, should be {_short(d.wanted)}: use --fix"
        if d.lowers:
            said += f" --allow-loss, with {await _at_stake(bus, d)}"
        said += "." if d.critical or d.lacks_copies else ", or leave it if it is meant."
        checks.append(Finding(d.name, "fail" if d.critical or d.lacks_copies else "warn", said))
    if not checks:
        checks = [Finding("streams", "ok", "all streams and buckets are as they should be")]
    number = max((info["config"]["num_replicas"] for info in infos.values()), default=1)
    if said := topology.stopped_by_a_header(bus.connection, number):
        checks.append(Finding("server", "warn", f"{said}."))
    if lacking := lacking_copies(infos):
        return [*checks, *(Finding("copies", "warn", said) for said in sentences(lacking, len(infos)))]
    return [*checks, Finding("copies", "ok", f"{number} of each stream, none is behind")] if number > 1 else checks


async def _at_stake(bus: BusConnection, lowering: topology.Difference) -> str:
    """What lowering a limit or the copies of a stream costs at most."""
    state = (await bus.api_request(f"STREAM.INFO.{lowering.name}"))["state"]
    messages, size = int(state["messages"]), int(state["bytes"])
    if lowering.field == "max_bytes":
        messages = math.ceil(messages * (1 - min(size, lowering.wanted) / size)) if size else 0
    return f"{messages:,} messages at stake"


async def _adopt_settings(bus: BusConnection, here: topology.Shape) -> Finding:
    """Has `bus.settings` shape streams as expected, and says whose settings that are. `here`: those of the shell."""
    layout = None
    with contextlib.suppress(Temporary):  # there is no bucket, or this user may not read it
        layout = await topology.read_layout(bus.connection, bus.names)
    shape, whose = here, "this shell"
    if layout is not None and layout.settings:
        shape, whose = layout.settings, "the layout key"
    known = {name: value for name, value in shape.items() if name in topology.SHAPING}
    if variable_of("partitions") in os.environ:  # no adapter starts with another number, so only `--fix` changes it
        known["partitions"] = here["partitions"]
    bus.settings = msgspec.structs.replace(bus.settings, **known)
    if layout is not None and layout.version != topology.LAYOUT:
        return Finding("layout", "fail", topology.layout_advice(layout))
    said = f"version {topology.LAYOUT}, settings of {whose}"
    if differ := [
        f"{PREFIX}{name.upper()} is {here[name]}"
        for name in shape
        if name != "partitions" and shape[name] != here.get(name)
    ]:
        said += f", not those here ({', '.join(differ)})"
    if layout is None:
        return Finding("layout", "warn", f"{said}. There is no layout key: start an adapter, or use --fix.")
    return Finding("layout", "ok", said)


async def _check_tokens(bus: BusConnection) -> list[Finding]:
    """How bot tokens are stored, as far as this command's keys tell."""
    sealer = Sealer(bus.settings.token_key)
    try:
        found = await count_stored_tokens(bus.history, bus.names, sealer)
    except Temporary:
        said = "this user cannot read how they are stored; adapters look at their start"
        return [Finding("tokens", "ok", said)]
    older = "use --fix before you take the older key away"
    return [_sealing(bus, "tokens", found, older=older, foreign="bind those bots anew")]


def _sealing(bus: BusConnection, check: str, found: Counter[Sealing], *, older: str, foreign: str) -> Finding:
    """What to do about keys that are older, or foreign."""
    said = ", ".join(f"{count} {_SEALED[sealing]}" for sealing, count in sorted(found.items())) or "none yet"
    if found["foreign"] and bus.settings.token_key:
        return Finding(check, "fail", f"{said}: set that key too, after the first, or {foreign}.")
    if found["foreign"]:  # whoever operates the bus need not have the key
        advice = "without WECHAT_NATS_TOKEN_KEY it cannot be told whether adapters can open them"
        return Finding(check, "warn", f"{said}: {advice}.")
    return Finding(check, "warn", f"{said}: {older}.") if found["older"] else Finding(check, "ok", said)


async def _check_readers(bus: BusConnection) -> list[Finding]:
    """Whether the stream of the inboxes has reached what agents have read of it."""
    try:
        above = await inboxes.find_readers_above(bus)
    except Temporary:
        return [Finding("readers", "ok", "this user cannot read their places; adapters look at them")]
    stream = bus.names.stream_in
    if not above:
        return [Finding("readers", "ok", f"none is above the last sequence of {stream}")]
    said = f"{output.some_of([one.sandbox for one in above])}: above the last sequence of {stream}, which was"
    said += " set back: they are given nothing. Stop the adapters, use --fix, start them."
    return [Finding("readers", "fail", said)]


async def _check_persons(bus: BusConnection) -> list[Finding]:
    """Which keys persons need, and whether there are entries of persons whom no binding has."""
    try:
        found = await inboxes.read_inboxes(bus)
        gone = await inboxes.unserved(bus, found)
        sealing = await inboxes.count_persons(bus, found, Sealer(bus.settings.token_key))
    except Temporary:
        return [Finding("persons", "ok", "this user cannot read what is stored of them")]
    older = "keep the older key until there are none, and for as long as messages are kept"
    checks = [_sealing(bus, "persons", sealing, older=older, foreign="unbind and bind them")]
    if gone:
        said = f"{_entries_of(gone)} whom no binding has, as after a restore: --fix deletes them."
        checks.append(Finding("persons", "warn", said))
    return checks


def _entries_of(found: list[inboxes.Inbox]) -> str:
    return f"{sum(count for count, _ in found):,} entries of {len(found):,} persons"


def _short(value: Any) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 80 else text[:79] + "…"


class Adapter(msgspec.Struct):
    """An adapter's answer to a ping."""

    id: str
    version: str
    metadata: dict[str, str] = {}


async def query_adapters(bus: BusConnection) -> list[Adapter]:
    """Asks all adapters, and waits for their answers. Raises Failed, NatsError."""
    ping, inbox = f"$SRV.PING.{SERVICE}", bus.nc.new_inbox()
    answers = await bus.nc.subscribe(inbox)
    await bus.nc.publish(ping, b"", reply=inbox)
    await asyncio.sleep(PING_S)
    bus.raise_if_forbidden(ping)
    found: list[Adapter] = []
    while answers.pending_msgs:
        with contextlib.suppress(*UNDECODABLE):  # empty: the server says that nobody subscribes
            found.append(msgspec.json.decode((await answers.next_msg()).data, type=Adapter))
    return found


def _check_adapters(there: list[Adapter]) -> Finding:
    if not there:
        return Finding("adapters", "fail", "None answers: start one with `wechat-nats run`, or look why it hangs.")
    versions = ", ".join(sorted({adapter.version for adapter in there}))
    said = f"{len(there)} running, version {versions}"
    declared = {adapter.metadata.get("ilink_version", "") for adapter in there} - {""}
    if declared:
        said += f", declare plugin version {', '.join(sorted(declared))} to iLink"
    if any(_numbers(version) < _numbers(NEWEST_ILINK_VERSION) for version in declared):
        said += f": older than {NEWEST_ILINK_VERSION}, WeChat may refuse its QR codes. Raise {PREFIX}ILINK_VERSION."
        return Finding("adapters", "warn", said)
    return Finding("adapters", "ok", said)


def _numbers(version: str) -> list[int]:
    return [int(number) for number in version.split(".")]


async def _check_partitions(bus: BusConnection) -> list[Finding]:
    """How many partitions each replica owns, and which nobody renews."""
    bucket, numbers = f"$KV.{bus.names.leases}", range(bus.settings.partitions)
    try:
        found = await bus.history.read_last_of_each(
            f"KV_{bus.names.leases}", [f"{bucket}.{each}" for each in numbers]
        )
    except Temporary:
        return [Finding("partitions", "ok", "this user cannot read who owns them")]
    stored = {each.subject.rpartition(".")[2]: each for each in found if each.data}
    now_ms = max((each.time_ms for each in found), default=0)  # by the server's clock, not by the one here
    owned, silent = Counter[str](), dict[str, str]()
    for number in map(str, numbers):
        lease = stored.get(number)
        age_s = math.inf if lease is None else (now_ms - lease.time_ms) / 1000
        if lease is None or age_s > SILENT_S:
            silent[number] = "never" if lease is None else f"{age_s:.0f} s ago"
        else:
            owned[_owner_of(lease)] += 1
    said = ", ".join(f"{count} of {owner}" for owner, count in sorted(owned.items()))
    if not silent:
        return [Finding("partitions", "ok", said)]
    ages = ", ".join(f"{number} ({age})" for number, age in silent.items())
    said = f"Nobody renews {ages}: look at /readyz and the logs of the adapters{said and f'; {said}'}."
    return [Finding("partitions", "fail", said)]


def _owner_of(stored: StoredMessage) -> str:
    """The instance that owns a partition."""
    try:
        return msgspec.json.decode(stored.data, type=Lease).owner.rpartition("-")[0] or "nobody yet"
    except UNDECODABLE:
        return "?"


async def _check_bindings(bus: BusConnection, there: list[Adapter]) -> list[Finding]:
    every = await all_bindings(bus, health=True)
    return [*await _check_bots(bus, every), *_check_capacity(len(every), there)]


def _check_capacity(bots: int, there: list[Adapter]) -> list[Finding]:
    """Whether the replicas that remain if one ends have room for every bot."""
    each = [int(adapter.metadata.get("capacity", 0)) for adapter in there]
    if not all(each):
        return []  # an older program does not say it
    if len(each) == 1:
        return [
            Finding("capacity", "ok", f"{bots:,} bindings of {each[0]:,}; nobody serves them if this replica ends")
        ]
    rest = sum(each) - max(each)
    said = f"{bots:,} bindings; the replicas that remain if one ends hold {rest:,}"
    if bots > SPARE * rest:
        return [Finding("capacity", "warn", f"{said}: add a replica, or raise {PREFIX}CAPACITY.")]
    return [Finding("capacity", "ok", said)]


async def _check_bots(bus: BusConnection, every: list[BindingInfo]) -> list[Finding]:
    bucket = f"KV_{bus.names.bindings}"
    stored = int((await bus.api_request(f"STREAM.INFO.{bucket}"))["state"]["messages"])
    layout = await topology.read_layout(bus.connection, bus.names)
    if (lost := len(every) - (stored if layout is None else stored - 1)) > 0:
        return [Finding("bindings", "fail", f"{lost} that adapters know are not in {bucket}: {RESTORE}.")]
    bots = Counter(map(status_of, every))
    said = "; ".join(f"{bots[status]} {status}" for status in BOT_STATUSES if bots[status]) or "none yet"
    if not bots.keys() & set(TROUBLE):
        return [Finding("bindings", "ok", said)]
    said += ". See `wechat-nats bindings --state trouble`"
    if bots["not_polled"] or bots["too_new"] or bots["failing"]:
        return [Finding("bindings", "fail", f"{said}.")]
    advice = "; who needs a login has to scan a new QR code" if bots["needs_login"] else ""
    return [Finding("bindings", "warn", f"{said}{advice}.")]


async def _check_backlog(bus: BusConnection, name: str, stream: str, state: CheckState, advice: str) -> list[Finding]:
    count = int((await bus.api_request(f"STREAM.INFO.{stream}"))["state"]["messages"])
    return [Finding(name, state, f"{count}: {advice}") if count else Finding(name, "ok", "none")]


async def _fix(bus: BusConnection, layout: Finding, *, allow_loss: bool, quiet: bool) -> list[Finding]:
    """Creates and alters. Returns what is left since it costs messages. Raises Failed at the first that the server
    refuses, and for streams of a newer program."""
    left: list[Finding] = []

    def say(text: str) -> None:
        if not quiet:
            output.say(text)

    connection, names, settings = bus.connection, bus.names, bus.settings
    if layout.state == "fail" and "--fix" not in layout.say:
        raise Failed(NO, layout.say)
    try:
        missing, different, infos = await topology.inspect_topology(connection, names, settings)
        for number in filter(None, map(topology.renumbered_from, different)):
            if infos[names.stream_out]["state"]["messages"] or await query_adapters(bus):
                raise Failed(NO, topology.partitions_advice(names, number, settings.partitions))
        for wanted in missing:
            say(f"creating stream {wanted.name}")
            await topology.create_stream(connection, wanted)
        for d in different:
            change = f"{d.name}: {d.field} from {_short(d.found)} to {_short(d.wanted)}"
            if d.lowers:
                change += f", with {await _at_stake(bus, d)}"
            if d.lowers and not allow_loss:
                left.append(Finding(d.name, "fail", f"Not changed without --allow-loss: {change}."))
            else:
                say(f"changing {change}")
        changes = [d for d in different if allow_loss or not d.lowers]
        for name in dict.fromkeys(d.name for d in changes):
            await topology.alter_stream(connection, name, [d for d in changes if d.name == name])
        await topology.write_layout(connection, names, settings)
        sealer = Sealer(settings.token_key)
        found = await count_stored_tokens(bus.history, names, sealer)
        if count := found["older"]:
            say(f"sealing {count} bot tokens with the first key")
            await reseal_tokens(bus.history, KvBucket(connection, names.bindings), names, sealer)
        if above := await inboxes.find_readers_above(bus):
            sandboxes = output.some_of([one.sandbox for one in above])
            say(f"setting the readers of {sandboxes} to the last sequence of {names.stream_in}")
        for one in above:
            with contextlib.suppress(Conflict):  # by an adapter that runs, which is told by the check after it
                bucket = KvBucket(connection, names.readers, ttl_s=one.ttl_s)
                await bucket.write(one.sandbox, one.value, one.revision)
        if gone := await inboxes.unserved(bus, await inboxes.read_inboxes(bus)):
            say(f"deleting {_entries_of(gone)} whom no binding has")
        await inboxes.purge(bus, gone)
        return left
    except Refused as exc:
        raise Failed(NO, exc.detail) from exc
    except BusRefused as exc:
        by_hand = "" if exc.code in topology.NO_ROOM else "; this has to be changed by hand"
        raise Failed(NO, f"The server refused: {exc.detail}{by_hand}.") from exc
    except Temporary as exc:
        if bus.forbidden:
            raise Failed(NO, "This user may not do what --fix does: use the adapter's credentials.") from exc
        raise Failed(UNREACHABLE, f"JetStream did not answer ({exc.detail}): try again.") from exc
