"""What is noticed of streams that somebody changes while the service runs."""

from __future__ import annotations

import msgspec
from structlog.testing import capture_logs

from adapter.contract.names import LAYOUT_KEY
from adapter.jetstream import topology
from adapter.jetstream.inspector import Inspector
from tests.bus.rig import NAMES, Rig


async def test_an_inspector_names_streams_that_are_gone_and_buckets_that_lack_keys(rig: Rig) -> None:
    bucket, written = rig.bucket(NAMES.bindings), 0
    inspector = Inspector(NAMES, rig.bus.settings, at_least={NAMES.bindings: lambda: written})
    for key in ("a", "b"):
        await bucket.update(key, b"x", 0)
        written += 1
    assert (await inspector.inspect_streams(rig.connection), inspector.incomplete) == ([], [])
    assert inspector.message_count(bucket.stream) == 2
    await rig.connection.api_request(f"STREAM.DELETE.{bucket.stream}")
    assert (await inspector.inspect_streams(rig.connection), inspector.incomplete) == ([bucket.stream], [])
    await topology.ensure_topology(rig.connection, NAMES, rig.bus.settings)
    with capture_logs() as logs:
        assert (await inspector.inspect_streams(rig.connection), inspector.incomplete) == ([], [bucket.stream])
    assert [(line["event"], line["keys"], line["at_least"]) for line in logs] == [("bucket.incomplete", 1, 2)]
    for key in ("a", "b"):
        await bucket.update(key, b"x", 0)
    assert (await inspector.inspect_streams(rig.connection), inspector.incomplete) == ([], [])


async def test_an_inspector_reports_fewer_copies_than_its_replica_expects(rig: Rig) -> None:
    inspector = Inspector(NAMES, msgspec.structs.replace(rig.bus.settings, replicas=3), at_least={})
    await inspector.inspect_streams(rig.connection)
    assert {d.field for found in inspector.altered.values() for d in found} == {"num_replicas"}
    assert len(inspector.altered) == len(topology.wanted_streams(NAMES, rig.bus.settings))


async def test_an_inspector_reports_a_change_once_and_no_limits_of_an_operator(rig: Rig) -> None:
    inspector = Inspector(NAMES, rig.bus.settings, at_least={})
    config = (await rig.connection.api_request(f"STREAM.INFO.{NAMES.stream_out}"))["config"]
    changed = {key: value for key, value in config.items() if key != "subject_transform"}
    await rig.connection.api_request(f"STREAM.UPDATE.{NAMES.stream_out}", changed | {"max_msgs_per_subject": 7})
    bucket = (await rig.connection.api_request(f"STREAM.INFO.KV_{NAMES.bindings}"))["config"]
    await rig.connection.api_request(f"STREAM.UPDATE.KV_{NAMES.bindings}", bucket | {"max_age": 3600 * topology.NS})
    with capture_logs() as logs:
        for _ in range(2):
            assert await inspector.inspect_streams(rig.connection) == []
    assert [(line["stream"], line["field"]) for line in logs if line["event"] == "stream.altered"] == [
        (NAMES.stream_out, "subject_transform"),
        (f"KV_{NAMES.bindings}", "max_age"),
    ]
    assert list(inspector.altered) == [NAMES.stream_out, f"KV_{NAMES.bindings}"]
    for name, before in ((NAMES.stream_out, config), (f"KV_{NAMES.bindings}", bucket)):
        await rig.connection.api_request(f"STREAM.UPDATE.{name}", before)
    await inspector.inspect_streams(rig.connection)
    assert inspector.altered == {}


async def test_streams_of_a_newer_version_are_no_alteration(rig: Rig) -> None:
    """`doctor --fix` of the new version comes before the replicas are replaced."""
    inspector = Inspector(NAMES, rig.bus.settings, at_least={})
    assert await inspector.inspect_streams(rig.connection) == []
    config = (await rig.connection.api_request(f"STREAM.INFO.{NAMES.stream_out}"))["config"]
    changed = {key: value for key, value in config.items() if key != "subject_transform"}
    await rig.connection.api_request(f"STREAM.UPDATE.{NAMES.stream_out}", changed)
    bindings = rig.bucket(NAMES.bindings)
    await topology.write_layout(rig.connection, NAMES, rig.bus.settings)
    layout = await bindings.get(LAYOUT_KEY)
    assert layout is not None
    newer = msgspec.json.encode(topology.Layout(topology.LAYOUT + 1))
    revision = await bindings.write(LAYOUT_KEY, newer, layout.revision)
    with capture_logs() as logs:
        for _ in range(2):
            assert await inspector.inspect_streams(rig.connection) == []
    assert [(line["event"], line["log_level"]) for line in logs] == [("layout.differs", "warning")]
    assert "use a newer program" in logs[0]["detail"]
    assert list(inspector.altered) == ["layout"]
    await bindings.write(LAYOUT_KEY, layout.value, revision)
    with capture_logs() as logs:
        await inspector.inspect_streams(rig.connection)
    assert [line["event"] for line in logs] == ["layout.restored", "stream.altered"]
    await rig.connection.api_request(f"STREAM.UPDATE.{NAMES.stream_out}", config)
    await inspector.inspect_streams(rig.connection)
    assert inspector.altered == {}
