"""A backup as docs/howto/maintain.md has it: everything that must outlive a server, with its sequences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adapter.cli.bus import BusConnection, connected_bus
from adapter.cli.embedded import EmbeddedNats
from adapter.settings import Settings
from tests import snapshots

CONSUMERS = True


async def states(bus: BusConnection) -> dict[str, dict[str, Any]]:
    """By stream: what is in it, and how many consumers it has."""
    names = (await bus.api_request("STREAM.NAMES"))["streams"]
    found = {}
    for name in names:
        state = (await bus.api_request(f"STREAM.INFO.{name}"))["state"]
        found[name] = {key: state[key] for key in ("messages", "last_seq", "consumer_count")}
        if state["messages"]:
            found[name]["first_seq"] = state["first_seq"]
    return found


async def test_all_that_must_last_comes_back_on_another_server(
    bus: BusConnection, settings: Settings, tmp_path: Path
) -> None:
    """Messages, the first two of which are purged, a command, and an entry of a bucket."""
    bodies = [b"x" * 300_000 + str(number).encode() for number in range(5)]
    seqs = [(await bus.js.publish("wechat.inbox.s1", body)).seq for body in bodies]
    await bus.js.purge_stream("WECHAT_IN", seq=seqs[2])
    await bus.js.publish("wechat.out.s1", b'{"text":"hi"}')
    revision = await (await bus.js.key_value("wechat_bindings")).put("b1", b"{}")
    before = await states(bus)
    saved = await snapshots.backup(settings.nats_url[0], tmp_path)
    assert before.keys() - set(saved) == {"KV_wechat_members", "KV_wechat_claims", "KV_wechat_logins"}
    async with EmbeddedNats() as other, connected_bus(Settings(nats_url=(other.url,))) as there:
        await snapshots.restore(other.url, [tmp_path / name for name in saved])
        assert await states(there) == {name: before[name] for name in saved}
        assert (await there.js.get_msg("WECHAT_IN", seqs[2])).data == bodies[2]
        entry = await (await there.js.key_value("wechat_bindings")).get("b1")
        assert (entry.value, entry.revision) == (b"{}", revision)
        later = await there.js.publish("wechat.inbox.s1", b"later")
        await snapshots.restore(other.url, [tmp_path / "WECHAT_IN"], replace=True)
        assert (await states(there))["WECHAT_IN"] == before["WECHAT_IN"]
        assert later.seq == seqs[-1] + 1
