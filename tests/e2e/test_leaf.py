"""Sandboxes behind a leaf node: no JetStream where they connect, and a domain where it is."""

from __future__ import annotations

from pathlib import Path

import msgspec
import nats
from nats.aio.client import Client

from adapter.contract.messages import Inbound
from tests.e2e.asker import Asker
from tests.e2e.cluster import NatsCluster, Node
from tests.e2e.world import NAMES, World, eventually, free_port, world


class Hub(NatsCluster):
    """One server with JetStream, which a server without it joins as a leaf."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, size=1)
        (hub,) = self.nodes
        joins, leaf_at = free_port(), f"127.0.0.1:{free_port()}"
        hub.config.write_text(
            f"""
server_name: hub
listen: "{hub.url.removeprefix("nats://")}"
jetstream {{ store_dir: "{hub.folder}", domain: hub, sync_interval: always }}
leafnodes {{ listen: "127.0.0.1:{joins}" }}
"""
        )
        self.leaf = Node(folder / "leaf", 0, [leaf_at], [""])
        self.leaf.config.write_text(
            f"""
server_name: leaf
listen: "{leaf_at}"
leafnodes {{ remotes: [ {{ url: "nats://127.0.0.1:{joins}" }} ] }}
"""
        )

    async def __aenter__(self) -> Hub:
        await super().__aenter__()
        self.leaf.start()
        return self

    def kill(self) -> None:
        super().kill()
        self.leaf.kill()


async def behind_the_leaf(made: World, hub: Hub) -> Client:
    """A sandbox's connection, once the leaf has joined."""

    async def quiet(_: Exception) -> None:
        return None

    nc = await nats.connect(
        hub.leaf.url, max_reconnect_attempts=-1, reconnect_time_wait=0.1, error_cb=quiet, allow_reconnect=True
    )

    async def is_answered() -> bool:
        try:
            await nc.request(NAMES.svc("bindings.list"), b"{}", timeout=1)
        except nats.errors.Error:
            return False
        return True

    await eventually(is_answered, "what is asked behind the leaf is answered")
    return nc


async def test_a_sandbox_behind_a_leaf_node_receives_answers_and_reads_again(tmp_path: Path) -> None:
    hub = Hub(tmp_path / "nats")
    async with world(tmp_path, bus=hub, environ={"WECHAT_NATS_REPLICAS": "1"}) as made:
        await made.add_adapter()
        nc = await behind_the_leaf(made, hub)
        live = await nc.subscribe(NAMES.live("s1"))
        receipts = await nc.subscribe(NAMES.receipts("s1"))
        assert (await made.bind(nc, "s1", made.sim.add_bot())).outcome == "applied"
        made.say("s1", "hello")
        message = msgspec.json.decode((await live.next_msg(timeout=30)).data, type=Inbound)
        assert message.text == "hello"
        for plain in (False, True):
            await made.command(nc, "s1", f"answer {plain}", plain=plain)
            receipt = msgspec.json.decode((await receipts.next_msg(timeout=30)).data)
            assert (receipt["command"], receipt["outcome"]) == (f"answer {plain}", "accepted")
        answer = await nc.request(NAMES.svc("replay"), b'{"sandbox":"s1"}', timeout=10)
        assert [one["message"]["id"] for one in msgspec.json.decode(answer.data)["messages"]] == [message.id]
        assert [handed.id for handed in await Asker(nc).take()] == [message.id]


async def test_an_adapter_on_a_leaf_node_says_where_it_belongs(tmp_path: Path) -> None:
    hub = Hub(tmp_path / "nats")
    async with world(tmp_path, bus=hub) as made:
        adapter = await made.add_adapter(NATS_URL=hub.leaf.url)

        async def has_said() -> bool:
            return adapter.said("start.waits") > 0

        await eventually(has_said, "it says what it lacks")
        assert "leaf node" in adapter.lines("start.waits")[0]["detail"]
