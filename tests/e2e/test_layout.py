"""`doctor --fix` from a shell that knows nothing of the replicas' settings, on a cluster of three."""

from __future__ import annotations

import asyncio
import json
import os
from asyncio.subprocess import PIPE
from pathlib import Path

from nats.aio.client import Client

from adapter.jetstream.topology import wanted_streams
from adapter.settings import Settings
from tests.e2e.world import NAMES, World, until, world
from tests.forks import fork


async def fixed(made: World, *options: str, **environ: str) -> tuple[int, str]:
    """`doctor --fix`, without a setting that the adapters have; its exit code and what it prints."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("WECHAT_NATS_")}
    env |= {"NATS_URL": made.url, **environ}
    process = await fork("adapter", "doctor", "--fix", *options, env=env, stdout=PIPE, stderr=PIPE)
    said = b"".join(await process.communicate()).decode()
    return await process.wait(), said


async def copies(nc: Client) -> set[int]:
    """Numbers of copies that the streams have."""
    answers = await asyncio.gather(
        *(
            nc.request(f"$JS.API.STREAM.INFO.{wanted.name}", timeout=10)
            for wanted in wanted_streams(NAMES, Settings())
        )
    )
    return {json.loads(answer.data)["config"]["num_replicas"] for answer in answers}


async def test_streams_keep_their_copies_whatever_a_shell_says(tmp_path: Path) -> None:
    async with world(tmp_path, clustered=True) as made:
        adapter = await made.add_adapter()
        nc = await made.nc()
        await until(lambda: bool(adapter.said("adapter.started")), "all streams are there")
        assert await copies(nc) == {3}
        code, said = await fixed(made, "--allow-loss", WECHAT_NATS_REPLICAS="1")
        assert (code, "settings of the layout key" in said, await copies(nc)) == (0, True, {3}), said
        await adapter.kill()
        code, said = await fixed(made, "--allow-loss")
        assert ("settings of the layout key" in said, await copies(nc)) == (True, {3}), said
