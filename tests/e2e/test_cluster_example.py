"""The cluster of `helm/nats/cluster-values.yaml`, as three servers here: its sizes, and the loss of one server."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from adapter.contract.messages import Inbound
from adapter.jetstream.topology import wanted_streams
from adapter.settings import Settings
from tests import canary
from tests.e2e.cluster import NatsCluster
from tests.e2e.world import NAMES, until, world

FOLDER = Path(__file__).parents[2] / "helm" / "nats"


def jetstream() -> dict[str, Any]:
    """The server's block, as NATS' chart makes it of the values."""
    found = yaml.safe_load((FOLDER / "cluster-values.yaml").read_text())["config"]["jetstream"]
    return {"max_file_store": found["fileStore"]["maxSize"], "max_memory_store": 0, **found["merge"]}


class Example(NatsCluster):
    def __init__(self, folder: Path, max_file_store: str) -> None:
        super().__init__(folder)
        values = jetstream() | {"max_file_store": max_file_store}
        block = ", ".join(f"{key}: {value}" for key, value in values.items())
        for node in self.nodes:
            text = node.config.read_text()
            assert text.count("sync_interval: always") == 1
            node.config.write_text(text.replace("sync_interval: always", block))


@pytest.mark.parametrize(
    ("max_file_store", "media_store_bytes"),
    [
        pytest.param(jetstream()["max_file_store"], Settings().media_store_bytes, id="1,000 people"),
        pytest.param("144Gi", 107374182400, id="10,000 people", marks=pytest.mark.slow),
    ],
)
async def test_the_sizes_of_the_example_are_enough_and_one_server_may_die(
    tmp_path: Path, max_file_store: str, media_store_bytes: int
) -> None:
    page = (FOLDER / "README.md").read_text()
    assert f"| `{max_file_store}` |" in page
    assert media_store_bytes == Settings().media_store_bytes or f"`{media_store_bytes}`" in page
    settings = Settings(replicas=3, media_store_bytes=media_store_bytes)
    wanted = (each.config.get("max_bytes", 0) for each in wanted_streams(NAMES, settings))
    reserved = sum(size for size in wanted if size > 0)
    assert reserved < 0.85 * int(max_file_store.removesuffix("Gi")) * 2**30  # the servers do not look at the sum
    environ = {
        "WECHAT_NATS_IN_MAX_BYTES": str(settings.in_max_bytes),
        "WECHAT_NATS_MEDIA_STORE_BYTES": str(media_store_bytes),
    }
    async with world(tmp_path, bus=Example(tmp_path / "nats", max_file_store), environ=environ) as made:
        await made.add_adapter()
        nc = await made.nc()
        live = await nc.subscribe(NAMES.live("s1"))
        receipts = await nc.subscribe(NAMES.receipts("s1"))
        assert (await made.bind(nc, "s1", made.sim.add_bot())).outcome == "applied"
        info = msgspec.json.decode((await nc.request(f"$JS.API.STREAM.INFO.{NAMES.stream_in}")).data)
        assert len(info["cluster"]["replicas"]) == 2
        for text in ("of three", "of two"):
            made.say("s1", text)
            assert msgspec.json.decode((await live.next_msg(timeout=30)).data, type=Inbound).text == text
            await made.command(nc, "s1", text.replace(" ", "-"))
            receipt = msgspec.json.decode((await receipts.next_msg(timeout=30)).data)
            assert receipt["outcome"] == "accepted"
            if text == "of three":
                gone = partial(_is_clean, tmp_path / "nats", made.texts())
                await until(gone, "the bind is gone from all disks")
                (await made.cluster.leader(NAMES.stream_in)).kill()
        await nc.close()


def _is_clean(disks: Path, texts: set[str]) -> bool:
    return not canary.leaks_on_disk(disks, texts)
