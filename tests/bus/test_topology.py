"""The streams: created once, compared, never altered; and what they do with what comes in."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest
from nats.aio.client import ServerVersion
from structlog.testing import capture_logs

from adapter.cli.embedded import EmbeddedNats
from adapter.contract.messages import COMMAND_BYTES
from adapter.contract.names import H_COMMAND, H_MSG_ID, LAYOUT_KEY, Names
from adapter.errors import BusRefused, SettingsError
from adapter.jetstream import topology
from adapter.jetstream.buckets import KvBucket
from adapter.jetstream.inspector import Inspector
from adapter.jetstream.managed_connection import ManagedConnection
from adapter.jetstream.publisher import Publisher
from adapter.jetstream.topology import LAYOUT, Layout, read_layout, shape_of
from adapter.ports import BusMessage
from adapter.settings import Settings
from adapter.tools import permissions
from adapter.tools.metrics import Metrics
from adapter.tools.timing import SystemClock
from tests.bus.rig import NAMES, PATIENCE_S, Bus, Rig, rig_on, store_all


async def test_what_is_missing_is_created_and_then_nothing_differs(bus: Bus) -> None:
    async with rig_on(bus, streams=False) as rig:
        assert await topology.ensure_topology(rig.connection, NAMES, bus.settings) == []
        missing, different, _ = await topology.inspect_topology(rig.connection, NAMES, bus.settings)
        assert (missing, different) == ([], [])
        revision = await rig.connection.api_request(f"STREAM.INFO.{NAMES.stream_out}")
        assert await topology.ensure_topology(rig.connection, NAMES, bus.settings) == []
        assert (await rig.connection.api_request(f"STREAM.INFO.{NAMES.stream_out}"))["created"] == revision["created"]


class SmallNats(EmbeddedNats):
    """A server with so many bytes for streams that reserve some, and no more."""

    room = 0

    def _write_config(self) -> Path:
        config = super()._write_config()
        config.write_text(config.read_text().replace("jetstream {", f"jetstream {{ max_file: {self.room}", 1))
        return config


@pytest.mark.parametrize("missing", [0, 1])
async def test_a_server_needs_room_for_each_stream_once(tmp_path: Path, missing: int) -> None:
    """A stream that another replica was faster to create needs none. Without room the layout key is not written."""
    bus, server = Bus(tmp_path), SmallNats(tmp_path)
    settings = Settings(in_max_bytes=1 << 30, media_store_bytes=1 << 30)
    wanted = topology.wanted_streams(NAMES, settings)
    server.room = sum(each.config["max_bytes"] for each in wanted if each.reserves_space) - missing
    async with server:
        bus.settings = msgspec.structs.replace(settings, nats_url=(server.url,))
        async with rig_on(bus, streams=False) as rig:
            if missing:
                with pytest.raises(SettingsError, match=r"stream \w+ cannot be created: 10047 .*MAX_BYTES"):
                    await topology.ensure_topology(rig.connection, NAMES, bus.settings)
                assert await read_layout(rig.connection, NAMES) is None
            else:
                await topology.ensure_topology(rig.connection, NAMES, bus.settings)
                for each in wanted:
                    await topology.create_stream(rig.connection, each)


class OldServer(ManagedConnection):
    """A server that takes newer options without a word and ignores them."""

    def __init__(self, level: int | None) -> None:
        self.level = level

    async def api_request(
        self, verb: str, body: dict[str, Any] | None = None, timeout_s: float = 5.0
    ) -> dict[str, Any]:
        assert verb == "INFO", "nothing is created on it"
        return {} if self.level is None else {"api": {"level": self.level}}


async def test_a_stream_that_would_break_a_guarantee_stops_the_start_with_a_sentence(bus: Bus) -> None:
    async with rig_on(bus, streams=False) as rig:
        config = {"name": NAMES.stream_out, "subjects": ["wechat.out", "wechat.out.*"], "retention": "limits"}
        await rig.connection.api_request(f"STREAM.CREATE.{NAMES.stream_out}", config)
        with pytest.raises(SettingsError) as caught:
            await topology.ensure_topology(rig.connection, NAMES, bus.settings)
        assert caught.value.reason == "stream_differs"
        for word in (NAMES.stream_out, "retention", "workqueue", "doctor --fix"):
            assert word in caught.value.detail
        assert (await rig.connection.api_request(f"STREAM.INFO.{NAMES.stream_out}"))["config"][
            "retention"
        ] == "limits"


async def test_streams_and_consumers_say_what_they_are_for(bus: Bus) -> None:
    """And an operator may say it in other words."""
    async with rig_on(bus) as rig:
        wanted = topology.wanted_streams(NAMES, bus.settings)
        infos = [(await rig.connection.api_request(f"STREAM.INFO.{each.name}"))["config"] for each in wanted]
        for name in (topology.ROUTER, topology.partition_consumer(7)):
            stream, config = topology.consumer_config(NAMES, name)
            request = {"stream_name": stream, "config": config}
            made = await rig.connection.api_request(f"CONSUMER.DURABLE.CREATE.{stream}.{name}", request)
            infos.append(made["config"])
        assert all(info["description"] and info["metadata"].items() >= topology.MADE_BY.items() for info in infos)
        other = infos[0] | {"description": "Ours"}
        await rig.connection.api_request(f"STREAM.UPDATE.{wanted[0].name}", other)
        assert (await topology.inspect_topology(rig.connection, NAMES, bus.settings)).different == []


async def test_a_bucket_that_may_lose_its_keys_stops_the_start_until_a_repair_keeps_them(bus: Bus) -> None:
    """As any other program makes one."""
    async with rig_on(bus, streams=False) as rig:
        (wanted,) = [w for w in topology.wanted_streams(NAMES, bus.settings) if w.name == f"KV_{NAMES.persons}"]
        usual = {"allow_rollup_hdrs": True, "deny_purge": False, "allow_msg_ttl": False}
        await rig.connection.api_request(f"STREAM.CREATE.{wanted.name}", wanted.config | usual)
        kept = await rig.bucket(NAMES.persons).update("s1.u1", b"1", 0)
        with pytest.raises(
            SettingsError, match=r"deny_purge is False, must be True; .*allow_msg_ttl is False, must be True"
        ):
            await topology.ensure_topology(rig.connection, NAMES, bus.settings)
        _, different, _ = await topology.inspect_topology(rig.connection, NAMES, bus.settings)
        await topology.alter_stream(rig.connection, wanted.name, different)
        assert await topology.ensure_topology(rig.connection, NAMES, bus.settings) == []
        assert await rig.bucket(NAMES.persons).write("s1.u1", b"2", kept, ttl_s=60) > kept


async def test_an_operators_own_limits_are_reported_and_never_changed(bus: Bus) -> None:
    async with rig_on(bus, streams=False) as rig:
        (wanted,) = [w for w in topology.wanted_streams(NAMES, bus.settings) if w.name == NAMES.stream_in]
        await rig.connection.api_request(f"STREAM.CREATE.{wanted.name}", {**wanted.config, "max_msgs_per_subject": 7})
        with capture_logs() as logs:
            (difference,) = await topology.ensure_topology(rig.connection, NAMES, bus.settings)
        assert (difference.field, difference.found, difference.critical) == ("max_msgs_per_subject", 7, False)
        assert "stream.differs" in [line["event"] for line in logs]
        info = await rig.connection.api_request(f"STREAM.INFO.{wanted.name}")
        assert info["config"]["max_msgs_per_subject"] == 7

        await topology.alter_stream(rig.connection, wanted.name, [difference])
        assert await topology.ensure_topology(rig.connection, NAMES, bus.settings) == []


async def test_only_the_inbox_and_what_is_not_private_can_be_purged(rig: Rig) -> None:
    """A person's subject is emptied by a purge, a command ends with a receipt and a key with a marker."""
    refused = set()
    for name in [wanted.name for wanted in topology.wanted_streams(NAMES, rig.bus.settings)]:
        try:
            await rig.history.purge(name, "nobody")
        except BusRefused:
            refused.add(name)
    buckets = {f"KV_{name}" for name in permissions.buckets(NAMES)}
    assert refused == {NAMES.stream_out, *buckets}


async def test_what_comes_in_is_not_republished(rig: Rig) -> None:
    """An entry holds what only the adapter may read."""
    info = await rig.connection.api_request(f"STREAM.INFO.{NAMES.stream_in}")
    assert "republish" not in info["config"]
    assert info["config"]["subjects"] == ["wechat.inbox.*.*"]


# the layout key ------------------------------------------------------------------------------------------


async def test_a_creation_that_was_cut_short_is_completed(bus: Bus) -> None:
    async with rig_on(bus, streams=False) as rig:
        for wanted in topology.wanted_streams(NAMES, bus.settings)[::2]:
            await topology.create_stream(rig.connection, wanted)
        assert await topology.ensure_topology(rig.connection, NAMES, bus.settings) == []
        assert await read_layout(rig.connection, NAMES) == Layout(LAYOUT, shape_of(bus.settings))


@pytest.mark.parametrize(("served", "deleted"), [(True, True), (False, True), (True, False)])
async def test_a_start_makes_nothing_anew_of_what_was_deleted(bus: Bus, *, served: bool, deleted: bool) -> None:
    """The bucket of bindings has the key itself: what adapters have stored elsewhere says that there was one. Leases
    and logins are in no backup."""
    async with rig_on(bus, streams=False) as rig:
        await topology.ensure_topology(rig.connection, NAMES, bus.settings)
        if served:
            await store_all(rig.publisher, [BusMessage("event", NAMES.event("s1", "binding"), b"{}", {})])
        gone = [NAMES.leases, NAMES.logins, *([NAMES.bindings] if deleted else [])]
        for bucket in gone:
            await rig.connection.api_request(f"STREAM.DELETE.KV_{bucket}")
        if served and deleted:
            with pytest.raises(SettingsError, match=f"KV_{NAMES.bindings}: missing. Restore"):
                await topology.ensure_topology(rig.connection, NAMES, bus.settings)
        else:
            await topology.ensure_topology(rig.connection, NAMES, bus.settings)
        missing, _, _ = await topology.inspect_topology(rig.connection, NAMES, bus.settings)
        left = {f"KV_{name}" for name in gone} if served and deleted else set()
        assert {wanted.name for wanted in missing} == left


async def test_the_layout_key_has_the_settings_of_the_adapter_that_started_last(bus: Bus) -> None:
    async with rig_on(bus) as rig:
        for hours in (72.0, 100.0):
            settings = msgspec.structs.replace(bus.settings, in_max_age_h=hours)
            await topology.ensure_topology(rig.connection, NAMES, settings)
            layout = await read_layout(rig.connection, NAMES)
            assert layout is not None
            assert layout.settings["in_max_age_h"] == hours


@pytest.mark.parametrize(
    ("value", "advice"),
    [
        (b'{"version":9,"settings":{}}', "layout 9, this program has 3: use a newer program"),
        (b"?", "layout 0, this program has 3: run `wechat-nats doctor --fix`"),
    ],
)
async def test_streams_of_another_layout_are_reported_at_the_start_and_while_running(
    bus: Bus, value: bytes, advice: str
) -> None:
    async with rig_on(bus, streams=False) as rig:
        await topology.ensure_topology(rig.connection, NAMES, bus.settings)
        inspector = Inspector(NAMES, bus.settings, at_least={})
        await inspector.inspect_streams(rig.connection)
        assert inspector.altered == {}
        bindings = KvBucket(rig.connection, NAMES.bindings)
        entry = await bindings.get(LAYOUT_KEY)
        assert entry is not None
        await bindings.write(LAYOUT_KEY, value, entry.revision)
        await inspector.inspect_streams(rig.connection)
        assert list(inspector.altered) == ["layout"]
        with pytest.raises(SettingsError, match=advice):
            await topology.ensure_topology(rig.connection, NAMES, bus.settings)


@pytest.mark.parametrize("level", [None, 0, 3])
async def test_a_server_that_is_too_old_is_refused(level: int | None) -> None:
    with pytest.raises(SettingsError) as caught:
        await topology.ensure_topology(OldServer(level), NAMES, Settings())
    assert caught.value.reason == "server_too_old"
    assert "2.14" in caught.value.detail


@pytest.mark.parametrize("partitions", [1, 7, 32])
async def test_a_sandboxs_partition_is_the_servers(bus: Bus, partitions: int) -> None:
    """The transform's partition() and ours, for 300 names; and plain wechat.out stays as it is."""
    bus.settings, mine = msgspec.structs.replace(bus.settings, partitions=partitions), Names(partitions=partitions)
    names = [f"sandbox-{number}" for number in range(290)]
    names += ["a", "_", "-", "0", "z" * 64, "a_b-c", "s1", "s2", "00000000", "x-y_z"]
    async with rig_on(bus) as rig:
        await store_all(rig.publisher, [BusMessage("out", mine.out(name), name.encode(), {}) for name in names])
        await rig.publisher.store(BusMessage("out", mine.out_plain, b"plain", {}))
        stored = {one.data.decode(): one.subject async for one in rig.history.read(mine.stream_out, ">")}
        of_first = await rig.read(mine.stream_out, mine.out_of_sandbox(names[0]))
    assert stored.pop("plain") == mine.out_plain
    assert stored == {name: f"wechat.part.{mine.partition_of(name)}.out.{name}" for name in names}
    assert {mine.partition_of(name) for name in names} == set(range(partitions))
    assert of_first == [names[0].encode()]


async def test_a_program_with_another_number_of_partitions_does_not_start(bus: Bus) -> None:
    """Nor does it change the layout key."""
    async with rig_on(bus, streams=False) as rig:
        await topology.ensure_topology(rig.connection, NAMES, bus.settings)
        settings = msgspec.structs.replace(bus.settings, partitions=1)
        with pytest.raises(
            SettingsError, match="WECHAT_OUT has 32 partitions, WECHAT_NATS_PARTITIONS is 1: set 32, or"
        ):
            await topology.ensure_topology(rig.connection, NAMES, settings)
        assert await read_layout(rig.connection, NAMES) == Layout(LAYOUT, shape_of(bus.settings))


async def test_a_sandbox_whose_queue_is_full_is_refused_and_others_are_not(bus: Bus) -> None:
    bus.settings = msgspec.structs.replace(bus.settings, out_max_per_sandbox=2)
    async with rig_on(bus) as rig:
        for _ in range(2):
            await rig.publisher.store(BusMessage("out", NAMES.out("s1"), b"x", {}))
        with pytest.raises(BusRefused):
            await rig.publisher.store(BusMessage("out", NAMES.out("s1"), b"x", {}))
        await rig.publisher.store(BusMessage("out", NAMES.out("s2"), b"x", {H_COMMAND: "c1"}))


async def test_what_is_too_large_to_be_a_command_is_refused_to_its_publisher(bus: Bus) -> None:
    """The largest command, with headers as long as the server takes, is stored."""
    async with rig_on(bus, streams=False) as rig:
        await topology.ensure_topology(rig.connection, NAMES, bus.settings)
        headers = {"long": "x" * (topology.HEADER_BYTES - 64)}
        largest = BusMessage("out", NAMES.out("s1"), b"x" * COMMAND_BYTES, headers)
        await rig.publisher.store(largest)
        too_large = msgspec.structs.replace(largest, payload=bytes(COMMAND_BYTES + topology.HEADER_BYTES))
        with pytest.raises(BusRefused, match="message size exceeds maximum allowed"):
            await rig.publisher.store(too_large)


class Hurried(EmbeddedNats):
    """A server that takes in no more than it writes at once: it says 10167 as one does that is flooded."""

    def _write_config(self) -> Path:
        config = super()._write_config()
        config.write_text(config.read_text().replace("jetstream {", "jetstream {\n  max_buffered_msgs: 1", 1))
        return config


async def test_what_a_flooded_stream_does_not_take_in_is_written_again(tmp_path: Path) -> None:
    """A copy by the router was refused for good, and its service told that the sandbox's queue was full."""
    async with Hurried(tmp_path / "nats") as server, asyncio.TaskGroup() as group:
        settings = Settings(nats_url=(server.url,), in_max_bytes=-1, media_store_bytes=-1)
        connection, metrics = ManagedConnection(settings, "test"), Metrics()
        publisher = Publisher(connection, SystemClock(), metrics)
        running = [group.create_task(loop) for loop in (connection.run(), publisher.run())]
        await connection.wait_connected(PATIENCE_S)
        (wanted,) = [w for w in topology.wanted_streams(NAMES, settings) if w.name == NAMES.stream_out]
        await topology.create_stream(connection, wanted)
        copies = [BusMessage("out", NAMES.out("s1"), b"x", {H_MSG_ID: str(number)}) for number in range(500)]
        answers = await store_all(publisher, copies)
        assert not [answer for answer in answers if isinstance(answer, BusRefused)]
        assert metrics.value("nats_publish_total", stream="out", outcome="retried") > 0
        for task in running:
            task.cancel()


class _Connected:
    """A connection to a server of some version."""

    def __init__(self, version: str) -> None:
        self.connected_server_version = ServerVersion(version)

    def client(self) -> Any:
        return self


@pytest.mark.parametrize(
    ("version", "copies", "is_told"),
    [("2.13.9", 3, False), ("2.14.0", 3, True), ("2.15.1", 3, True), ("2.15.1", 1, False), ("2.15.2", 3, False)],
)
def test_servers_that_one_header_stops_are_named(version: str, copies: int, is_told: bool) -> None:
    connection: Any = _Connected(version)
    assert (version in topology.stopped_by_a_header(connection, copies)) == is_told
