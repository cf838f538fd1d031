"""What is noticed of streams that somebody changes while the service runs."""

from __future__ import annotations

from structlog.testing import capture_logs

from adapter.jetstream import topology
from adapter.jetstream.inspector import Inspector
from tests.bus.rig import NAMES, Rig


async def test_an_inspector_names_streams_that_are_gone_and_buckets_that_were_emptied(rig: Rig) -> None:
    bucket, written = rig.bucket(NAMES.cursors), 0
    inspector = Inspector(NAMES, rig.bus.settings, rig.metrics, at_least={NAMES.cursors: lambda: written})
    for key in ("a", "b"):
        await bucket.update(key, b"x", 0)
        written += 1
    assert await inspector.look(rig.link) == []
    assert (inspector.purges(NAMES.cursors), inspector.messages(bucket.stream)) == (0, 2)
    await rig.link.api(f"STREAM.PURGE.{bucket.stream}")
    for _ in range(2):
        assert await inspector.look(rig.link) == []
    assert (inspector.purges(NAMES.cursors), rig.metrics.value("nats_purges_total")) == (1, 1)
    assert inspector.lacks(NAMES.cursors)
    for key in ("a", "b"):
        await bucket.update(key, b"x", 0)
    await inspector.look(rig.link)
    assert not inspector.lacks(NAMES.cursors)
    await rig.link.api(f"STREAM.DELETE.{NAMES.stream_dead}")
    assert await inspector.look(rig.link) == [NAMES.stream_dead]
    await topology.ensure(rig.link, NAMES, rig.bus.settings)
    assert await inspector.look(rig.link) == []


async def test_an_inspector_notices_a_bucket_that_was_set_back_with_all_its_keys(rig: Rig) -> None:
    """As after a restore, or on a disk that forgot: no key is missing, and whose bots are idle write none anew."""
    bucket = rig.bucket(NAMES.cursors)
    inspector = Inspector(NAMES, rig.bus.settings, rig.metrics, at_least={})
    revision = await bucket.update("a", b"old", 0)
    await bucket.update("a", b"new", revision)
    await inspector.look(rig.link)
    config = (await rig.link.api(f"STREAM.INFO.{bucket.stream}"))["config"]
    await rig.link.api(f"STREAM.DELETE.{bucket.stream}")
    await inspector.look(rig.link)
    assert inspector.purges(NAMES.cursors) == 0
    await rig.link.api(f"STREAM.CREATE.{bucket.stream}", config | {"first_seq": revision})
    await bucket.update("a", b"old", 0)
    for _ in range(2):
        await inspector.look(rig.link)
    assert (inspector.purges(NAMES.cursors), rig.metrics.value("nats_purges_total")) == (1, 1)
    assert not inspector.lacks(NAMES.cursors)


async def test_an_inspector_tells_what_was_changed_once_and_not_an_operators_own_limits(rig: Rig) -> None:
    inspector = Inspector(NAMES, rig.bus.settings, rig.metrics, at_least={})
    config = (await rig.link.api(f"STREAM.INFO.{NAMES.stream_out}"))["config"]
    changed = {key: value for key, value in config.items() if key != "subject_transform"}
    await rig.link.api(f"STREAM.UPDATE.{NAMES.stream_out}", changed | {"max_msgs_per_subject": 7})
    bucket = (await rig.link.api(f"STREAM.INFO.KV_{NAMES.bindings}"))["config"]
    await rig.link.api(f"STREAM.UPDATE.KV_{NAMES.bindings}", bucket | {"max_age": 3600 * topology.NS})
    with capture_logs() as logs:
        for _ in range(2):
            assert await inspector.look(rig.link) == []
    assert [(line["stream"], line["field"]) for line in logs if line["event"] == "stream.altered"] == [
        (NAMES.stream_out, "subject_transform"),
        (f"KV_{NAMES.bindings}", "max_age"),
    ]
    assert list(inspector.altered) == [NAMES.stream_out, f"KV_{NAMES.bindings}"]
    for name, before in ((NAMES.stream_out, config), (f"KV_{NAMES.bindings}", bucket)):
        await rig.link.api(f"STREAM.UPDATE.{name}", before)
    await inspector.look(rig.link)
    assert inspector.altered == {}
