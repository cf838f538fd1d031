"""The streams, buckets and consumers of the bridge: their configuration, and its comparison with the server.

Missing ones are created. Existing ones are verified and never changed silently: a difference that breaks a guarantee
stops the start with a message, and other differences (an operator's own limits) are logged. `wechat-nats doctor
--fix` changes them. Consumers are created by their owners (consumer.py).

The layout key says which layout the streams have, and the settings that the adapters have for them. It is written
last, when all streams are there, into the bucket of bindings, so that it is in every backup. While it exists no
stream is made anew but by `doctor --fix`: what is missing was deleted, and an empty stream would hide that. Where its
bucket itself is missing, what adapters have stored elsewhere says that it was deleted.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import structlog

from adapter.contract.messages import COMMAND_BYTES
from adapter.contract.names import LAYOUT_KEY, Names
from adapter.errors import UNDECODABLE, BusRefused, Conflict, SettingsError, Temporary
from adapter.jetstream.api_replies import ACCOUNT_FULL, NO_STREAM
from adapter.jetstream.buckets import KvBucket, updates_subject_of
from adapter.jetstream.history import direct_get_last
from adapter.jetstream.managed_connection import ManagedConnection
from adapter.settings import Settings, variable_of

log = structlog.get_logger()

LAYOUT = 3
"""Version of `wanted_streams`: one more with each change of names, subjects or meanings."""
SHAPING = (
    "replicas",
    "partitions",
    "in_max_per_person",
    "in_max_age_h",
    "in_max_bytes",
    "out_max_per_sandbox",
    "park_hours",
    "media_hours",
    "media_store_bytes",
)
"""Settings that shape streams."""
Shape = dict[str, int | float]

NAME_IN_USE = 10058
NO_ROOM = (ACCOUNT_FULL, 10047)
"""Errors for a stream that reserves more than the account or the server has left."""
MORE_ROOM = (
    "lower WECHAT_NATS_IN_MAX_BYTES (of which streams reserve 1.6 times as much when they are made) and"
    " WECHAT_NATS_MEDIA_STORE_BYTES (once), or give JetStream more storage (max_file_store, or the account's limit)"
)
API_LEVEL = 4
"""API level of nats-server 2.14, with consumer reset. Older servers silently accept newer options, so it is
checked."""
STOPPED_BY_A_HEADER = (2, 14, 0), (2, 15, 1)
"""First and last versions of nats-server on which one publish with `Nats-Expected-Last-Msg-Id` stops a stream with
several copies for good (SECURITY.md)."""
NS = 1_000_000_000
HOUR_NS = 3600 * NS
DUPLICATE_WINDOW_NS = 300 * NS
OUT_DUPLICATE_WINDOW_NS = 15 * NS
"""Duplicate window of commands. The server keeps their ids in memory for up to three windows, and a sandbox may make
each id as long as all headers. The window covers a publisher that repeats an unacknowledged command, and a router
after a takeover. The adapter drops later duplicates itself."""
HEADER_BYTES = 64 * 1024
"""Longest headers of a message that a server stores."""
OUT_PART, DEAD_PART = 2, 10
"""Commands have half of the bytes of inbound messages, dead letters a tenth. One sandbox cannot use all bytes of
commands: its share is `out_max_per_sandbox` of the largest commands, 3 GiB of 5 by default."""
OUT_ACK_WAIT_NS = 3600 * NS
"""Long on purpose: unacknowledged commands are redelivered by a consumer reset, at takeover and after each
connect."""

EVENTS_KEPT = 100_000
"""Events of one kind and sandbox that are kept. A sandbox with thousands of refused commands must not fill the disk.
Receipts have a subject for each command; bridge/receipts.py bounds them."""
OUT_UNSETTLED = 100_000
"""Commands of a partition that are delivered and not settled: the full queues of ten sandboxes. The partition bounds
their bytes itself; otherwise one sandbox could fill its consumer."""
UNSETTLED = 512
"""Commands of the router that are delivered and not settled."""

MADE_BY = {"made-by": "wechat-nats", "layout": str(LAYOUT)}
"""Metadata of streams and consumers, as `nats stream info` shows them."""
FOR_READERS = ("description", "metadata")
"""Fields that an operator may change: nothing depends on them, and the server adds to the latter."""

LIMITS = ("num_replicas", "max_bytes", "max_age", "max_msgs_per_subject")

PARTITION = "part-"
ROUTER = "router"


def partition_consumer(number: int) -> str:
    """Name of the durable consumer for one partition's commands."""
    return f"{PARTITION}{number:02d}"


class Wanted(NamedTuple):
    """A stream with its configuration. `critical`: fields whose difference breaks a guarantee."""

    name: str
    config: dict[str, Any]
    critical: tuple[str, ...] = ()
    from_one: bool = False
    """Its sequences start at 1, see `create_stream`."""
    is_transient: bool = False
    """Only running replicas need what is in it: it is in no backup, and is made anew."""

    @property
    def reserves_space(self) -> bool:
        """Whether the server reserves space for it."""
        return int(self.config.get("max_bytes", -1)) > 0


class Difference(NamedTuple):
    """A field of a stream that differs. `critical`: it prevents a start."""

    name: str
    field: str
    wanted: Any
    found: Any
    critical: bool

    @property
    def lowers(self) -> bool:
        """Whether the change to `wanted` may cost copies or messages. 0, -1 and nothing are no limit."""
        if self.field not in LIMITS:
            return False
        wanted, found = (
            math.inf if not isinstance(value, int) or value <= 0 else value for value in (self.wanted, self.found)
        )
        return wanted < found

    @property
    def lacks_copies(self) -> bool:
        """Whether a lost server loses messages that the replicas take for safe."""
        return self.field == "num_replicas" and not self.lowers


def wanted_streams(names: Names, settings: Settings) -> list[Wanted]:
    """All streams, including those of buckets."""
    common = {"num_replicas": settings.replicas, "storage": "file", "allow_direct": True}
    prefix = names.prefix

    def stream(name: str, description: str, critical: tuple[str, ...], **config: Any) -> Wanted:
        critical = (*critical, "allow_direct")  # all reads use it
        about = {"name": name, "description": description, "metadata": MADE_BY}
        return Wanted(name, {**about, "duplicate_window": DUPLICATE_WINDOW_NS, **common, **config}, critical)

    def bucket(
        name: str, description: str, *, republished: bool = False, expires: bool = False, max_age: int = 0
    ) -> Wanted:
        config: dict[str, Any] = {
            "subjects": [f"$KV.{name}.>"],
            "max_msgs_per_subject": 1,
            "discard": "new",
            "allow_rollup_hdrs": False,  # a roll-up is a purge
            "deny_delete": True,
            "deny_purge": True,
            "allow_msg_ttl": expires,
            "max_age": max_age,
        }
        critical = ["subjects", "max_msgs_per_subject", "deny_purge"]
        if expires:  # a write with a TTL is refused otherwise
            critical.append("allow_msg_ttl")
        if not max_age:  # its data are nowhere else: tokens, bindings, windows
            critical.append("max_age")
        if republished:
            config["republish"] = {"src": f"$KV.{name}.>", "dest": f"{updates_subject_of(name)}.>"}
            critical.append("republish")
        return stream(f"KV_{name}", description, tuple(critical), **config)

    return [
        stream(
            names.stream_in,
            "Inbound messages, an entry for each answer of iLink",
            ("subjects", "retention", "discard"),
            subjects=[names.inbox("*")],
            retention="limits",
            discard="old",
            max_age=int(settings.in_max_age_h * HOUR_NS),
            max_msgs_per_subject=settings.in_max_per_person,
            max_bytes=settings.in_max_bytes,
        ),
        stream(
            names.stream_out,
            "Commands, binds, unbinds and erasures, until their final receipts",
            ("subjects", "retention", "discard", "subject_transform", "max_age", "deny_purge"),
            subjects=[f"{prefix}.out", *(names.said(verb, "*") for verb in ("out", "bind", "unbind", "erase"))],
            retention="workqueue",
            discard="new",
            discard_new_per_subject=True,
            max_msgs_per_subject=settings.out_max_per_sandbox,
            deny_purge=True,
            max_age=0,  # a command stays until its final receipt; only the adapter expires it
            max_msg_size=COMMAND_BYTES + HEADER_BYTES,
            max_bytes=_share_of_inbound_bytes(settings, OUT_PART),
            duplicate_window=OUT_DUPLICATE_WINDOW_NS,
            subject_transform={
                "src": f"{prefix}.*.*",
                "dest": f"{prefix}.part.{{{{partition({settings.partitions},2)}}}}"
                ".{{wildcard(1)}}.{{wildcard(2)}}",
            },
        ),
        stream(
            names.stream_event,
            "Receipts and other events of sandboxes",
            ("subjects", "retention", "discard"),
            subjects=[f"{prefix}.event.*.*", f"{prefix}.event.*.*.*.*"],
            retention="limits",
            discard="old",
            max_age=int((max(72.0, settings.park_hours) + 24) * HOUR_NS),  # a receipt outlives its command by a day
            max_msgs_per_subject=EVENTS_KEPT,
        ),
        stream(
            names.stream_dead,
            "Dead letters: what could not be delivered or read",
            ("subjects", "retention", "discard"),
            subjects=[f"{prefix}.dead.*"],
            retention="limits",
            discard="old",
            max_age=30 * 24 * HOUR_NS,
            max_bytes=_share_of_inbound_bytes(settings, DEAD_PART),
        )._replace(from_one=True),  # operators type its sequences, and nothing stores them
        bucket(
            names.bindings, "Which bot serves which sandbox, with its sealed token", republished=True, expires=True
        ),
        bucket(names.persons, "A person's window, context token and sends, sealed", expires=True),
        bucket(names.readers, "Up to which message a sandbox has confirmed", expires=True),
        bucket(names.leases, "Which replica owns which partition", expires=True)._replace(is_transient=True),
        bucket(names.logins, "Logins by QR code that are under way", republished=True, max_age=24 * HOUR_NS)._replace(
            is_transient=True
        ),
        stream(
            f"OBJ_{names.media}",
            "Media of messages and commands",
            ("subjects", "retention", "allow_rollup_hdrs"),
            subjects=[f"$O.{names.media}.C.>", f"$O.{names.media}.M.>"],
            retention="limits",
            discard="new",
            allow_rollup_hdrs=True,
            max_age=int(settings.media_hours * HOUR_NS),
            max_bytes=settings.media_store_bytes,
        ),
    ]


def _share_of_inbound_bytes(settings: Settings, part: int) -> int:
    """Bytes of a stream with a part of those of inbound messages; -1: the server's limit."""
    return settings.in_max_bytes // part if settings.in_max_bytes > 0 else -1


def consumer_config(names: Names, name: str) -> tuple[str, dict[str, Any]]:
    """The stream of one of the adapter's durable consumers, and its configuration. Each has one owner (leases), so
    the ack wait is long."""
    config = {
        "durable_name": name,
        "name": name,
        "ack_policy": "explicit",
        "deliver_policy": "all",
        "ack_wait": OUT_ACK_WAIT_NS,
        "max_deliver": -1,
        "max_ack_pending": UNSETTLED,
        "replay_policy": "instant",
        "metadata": MADE_BY,
    }
    if name == ROUTER:
        routed = "Commands that name no sandbox, for the adapter that routes them"
        return names.stream_out, config | {"description": routed, "filter_subject": names.out_plain}
    subject = names.of_partition(int(name.removeprefix(PARTITION)))
    # in memory, or a server writes a file for each that is in use, ten times a second
    about = f"What is said to the sandboxes of partition {name.removeprefix(PARTITION)}, for the adapter that owns it"
    own = {"description": about, "filter_subject": subject, "max_ack_pending": OUT_UNSETTLED, "mem_storage": True}
    return names.stream_out, config | own


def differences(wanted: Wanted, found: dict[str, Any]) -> list[Difference]:
    """Fields of `wanted` that differ on the server. Fields that the server adds do not count."""
    out = []
    for field, value in wanted.config.items():
        if field in FOR_READERS:
            continue
        actual = found.get(field)
        if actual != value and not (not value and not actual):
            out.append(Difference(wanted.name, field, value, actual, field in wanted.critical))
    return out


def stopped_by_a_header(connection: ManagedConnection, copies: int) -> str:
    """What to do if one header of a tenant may stop a stream with so many copies; "": it cannot."""
    version = connection.client().connected_server_version
    numbers, (first, last) = (version.major, version.minor, version.patch), STOPPED_BY_A_HEADER
    if copies == 1 or not first <= numbers <= last:
        return ""
    said = f"one header of a publish stops a stream with copies on nats-server {'.'.join(map(str, numbers))}"
    return f"{said}: let sandboxes that are not trusted have the role `untrusted` (SECURITY.md)"


async def api_level(connection: ManagedConnection) -> int:
    """JetStream's API level. Raises Temporary, BusRefused (JetStream off or not permitted)."""
    info = await connection.api_request("INFO")
    return int((info.get("api") or {}).get("level", 0))


class Inspected(NamedTuple):
    """The streams at one look."""

    missing: list[Wanted]
    """In the order of their creation."""
    different: list[Difference]
    infos: dict[str, dict[str, Any]]
    """By stream: the answer to STREAM.INFO."""


async def inspect_topology(connection: ManagedConnection, names: Names, settings: Settings) -> Inspected:
    """Compares all streams with what is wanted. Raises Temporary, BusRefused."""
    found = Inspected([], [], {})
    for wanted in wanted_streams(names, settings):
        info = await _stream_info(connection, wanted.name)
        if info is None:
            found.missing.append(wanted)
        else:
            found.infos[wanted.name] = info
            found.different.extend(differences(wanted, info["config"]))
    # A full server creates nothing more. If the largest stream does not fit, no storage is reserved.
    found.missing.sort(key=lambda wanted: (wanted.reserves_space, -wanted.config.get("max_bytes", 0)))
    return found


async def create_stream(connection: ManagedConnection, wanted: Wanted) -> None:
    """Creates a stream. Raises Temporary, BusRefused.

    Its sequences start at the time in milliseconds. A stream that is recreated after a deletion starts above the
    former sequences, so that a remembered sequence or revision (of a reader, a cursor, the adapter) never means
    another message.
    """
    config = wanted.config if wanted.from_one else wanted.config | {"first_seq": time.time_ns() // 1_000_000}
    try:
        await connection.api_request(f"STREAM.CREATE.{wanted.name}", config, timeout_s=15)
    except BusRefused as exc:
        if exc.code in NO_ROOM:  # also the error if another replica created it first
            if await _stream_info(connection, wanted.name) is not None:
                return
            raise BusRefused(exc.code, f"{exc.detail.partition(' ')[2]}: {MORE_ROOM}") from exc
        if exc.code != NAME_IN_USE:  # another replica created it first
            raise


async def alter_stream(connection: ManagedConnection, stream: str, different: Sequence[Difference]) -> None:
    """Changes these fields of a stream (doctor --fix). Raises Temporary, BusRefused."""
    config = (await _stream_info(connection, stream) or {}).get("config", {})
    config |= {difference.field: difference.wanted for difference in different}
    await connection.api_request(f"STREAM.UPDATE.{stream}", config, timeout_s=15)


async def ensure_topology(connection: ManagedConnection, names: Names, settings: Settings) -> list[Difference]:
    """Creates missing streams, and returns the harmless differences.

    Raises Temporary, and SettingsError if the server is too old or a difference would break a guarantee.
    """
    try:
        level = await api_level(connection)
    except BusRefused as exc:
        raise SettingsError("jetstream", f"JetStream is not available to this user: {exc.detail}") from exc
    except Temporary as exc:
        if exc.reason == "bus_down":
            raise
        why = "is it enabled, is this no leaf node of it, and may this user publish to $JS.API.>?"
        raise Temporary(exc.reason, f"JetStream does not answer ({exc.detail}): {why}") from exc
    if level < API_LEVEL:
        raise SettingsError("server_too_old", f"JetStream API level {level}; nats-server 2.14 or newer is needed.")
    missing, different, infos = await inspect_topology(connection, names, settings)
    bindings = f"KV_{names.bindings}"
    layout = await read_layout(connection, names) if bindings in infos else None
    if layout is not None and layout.version != LAYOUT:
        raise SettingsError("layout_differs", layout_advice(layout))
    if (number := (layout.settings if layout else {}).get("partitions", settings.partitions)) != settings.partitions:
        raise SettingsError("partitions_differ", partitions_advice(names, int(number), settings.partitions))
    if missing and (layout is not None or _has_served(names, infos)):  # another replica may have created it since
        missing, different, infos = await inspect_topology(connection, names, settings)
        gone = ", ".join(wanted.name for wanted in missing if not wanted.is_transient)
        if gone and (layout is not None or bindings not in infos):
            advice = "Restore what was deleted from the backup; `wechat-nats doctor --fix` creates empty streams"
            raise SettingsError("stream_missing", f"{gone}: missing. {advice}.")
    for wanted in missing:
        try:
            await create_stream(connection, wanted)
        except BusRefused as exc:
            raise SettingsError("jetstream", f"stream {wanted.name} cannot be created: {exc.detail}") from exc
        log.info("stream.created", stream=wanted.name)
    if broken := [d for d in different if d.critical]:
        lines = [f"stream {d.name}: {d.field} is {d.found!r}, must be {d.wanted!r}" for d in broken]
        raise SettingsError("stream_differs", "; ".join(lines) + ". `wechat-nats doctor --fix` changes it.")
    for difference in different:
        log.warning("stream.differs", stream=difference.name, field=difference.field, found=str(difference.found))
    with contextlib.suppress(Conflict):  # another replica was first
        await write_layout(connection, names, settings)
    if detail := stopped_by_a_header(connection, settings.replicas):
        log.warning("server.stoppable", detail=detail)
    return different


def _has_served(names: Names, infos: Mapping[str, dict[str, Any]]) -> bool:
    """Whether an adapter has stored an entry or an event, so that there was a bucket of bindings."""
    found = [infos[name] for name in (names.stream_in, names.stream_event) if name in infos]
    return any(info["state"]["last_seq"] >= max(1, info["config"].get("first_seq", 1)) for info in found)


class Layout(msgspec.Struct, frozen=True):
    """Value of the layout key. `version` 0: it cannot be read."""

    version: int
    settings: Shape = {}


def shape_of(settings: Settings) -> Shape:
    """Those of the settings that shape streams."""
    return {name: getattr(settings, name) for name in SHAPING}


async def read_layout(connection: ManagedConnection, names: Names) -> Layout | None:
    """None: there is no key. Raises Temporary, also without its bucket."""
    stored = await direct_get_last(connection, f"KV_{names.bindings}", f"$KV.{names.bindings}.{LAYOUT_KEY}")
    try:
        return msgspec.json.decode(stored.data, type=Layout) if stored and stored.data else None
    except UNDECODABLE:
        return Layout(0)


async def write_layout(connection: ManagedConnection, names: Names, settings: Settings) -> None:
    """Raises Temporary, Conflict."""
    bucket, value = KvBucket(connection, names.bindings), msgspec.json.encode(Layout(LAYOUT, shape_of(settings)))
    entry = await bucket.get(LAYOUT_KEY)
    if entry is None or entry.value != value:
        await bucket.write(LAYOUT_KEY, value, entry.revision if entry else 0)


def layout_advice(layout: Layout) -> str:
    """What to do where streams have the layout of another version."""
    said = f"The streams have layout {layout.version}, this program has {LAYOUT}"
    return f"{said}: {'use a newer program' if layout.version > LAYOUT else 'run `wechat-nats doctor --fix`'}."


def renumbered_from(difference: Difference) -> int | None:
    """The number of partitions of a stream whose number differs; None: the difference is another one."""
    if difference.field != "subject_transform":
        return None
    found, wanted = (
        str(each).partition("{partition(")[2].partition(",")[0] for each in (difference.found, difference.wanted)
    )
    return int(found) if found.isdecimal() and found != wanted else None


def partitions_advice(names: Names, found: int, wanted: int) -> str:
    """What to do where the stream has another number of partitions."""
    said = f"{names.stream_out} has {found} partitions, {variable_of('partitions')} is {wanted}: set {found}, or"
    return f"{said}, once the stream is empty and no adapter runs, change them by `wechat-nats doctor --fix`."


async def _stream_info(connection: ManagedConnection, stream: str) -> dict[str, Any] | None:
    """The answer to STREAM.INFO; None: the stream is missing."""
    try:
        return await connection.api_request(f"STREAM.INFO.{stream}")
    except BusRefused as exc:
        if exc.code == NO_STREAM:
            return None
        raise
