"""A rolling upgrade to a version whose private records have a newer form, its way back, and forward again."""

from __future__ import annotations

import asyncio
import json
import random
import signal
from pathlib import Path

import msgspec
import pytest
from nats.aio.client import Client

from adapter.contract.names import person_token, to_subject_token
from tests.e2e.reading import inbox
from tests.e2e.test_nats_failures import operator
from tests.e2e.world import NAMES, AdapterProcess, World, audit, load, stream, until, world

OLD, NEW = "adapter", "tests.e2e.newer_version"
BOTS = 6
BUCKETS = (NAMES.bindings, NAMES.persons)


async def newer_records(nc: Client) -> dict[str, bytes]:
    """All records of version 2, by their subject in the stream of their bucket."""
    found: dict[str, bytes] = {}
    for bucket in BUCKETS:
        found |= dict(await stream(nc, f"KV_{bucket}", ">"))
    return {subject: value for subject, value in found.items() if value and msgspec.json.decode(value).get("v") == 2}


async def roll(made: World, olds: list[AdapterProcess], module: str) -> list[AdapterProcess]:
    """Replaces one replica after the other, as a Deployment does: a new one, then an end of an old one."""
    news = []
    for old in olds:
        new = await made.add_adapter(module=module)
        await until(lambda new=new: bool(new.said("partitions.taken")), "the new one has its share")  # type: ignore[misc]
        old.signal(signal.SIGTERM)
        assert await old.ended() == 0
        news.append(new)
    return news


async def is_served(made: World, sandbox: str, ident: str) -> None:
    await until(lambda: f"answer {ident}" in made.phone_texts(sandbox), f"{ident} is on the phone")


@pytest.mark.slow
async def test_an_upgrade_and_its_way_back_lose_nothing_and_repeat_nothing(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        nc = await made.nc()
        replicas = [await made.add_adapter() for _ in range(2)]
        for number in range(BOTS):
            await made.bind(nc, f"s{number}", made.sim.add_bot())

        async def traffic(rounds: int) -> None:
            first = len(made.sent["s0"])
            await load(made, nc, rounds=rounds, pause_s=0.3, rng=random.Random(first), first=first)

        # forward: nobody waits for anything, although the older replica meets what the newer one writes
        loading = asyncio.create_task(traffic(8))
        replicas = await roll(made, replicas, NEW)
        await loading
        await traffic(1)  # sends write records
        await made.settle(nc)
        assert (await audit(made, nc)).faults() == []
        await made.bind(nc, "fresh", made.sim.add_bot())
        newer = await newer_records(nc)
        persons = [f"{sandbox}.{person_token(sandbox, bot.user)}" for sandbox, bot in made.bots.items()]
        assert {f"$KV.{NAMES.persons}.{person}" for person in persons[:BOTS]} <= newer.keys()
        assert f"$KV.{NAMES.bindings}.{to_subject_token(made.bots['fresh'].bot)}" in newer

        # back: who has such records is left alone, and named; who has none is served
        loading = asyncio.create_task(traffic(8))
        replicas = await roll(made, replicas, OLD)
        await loading
        newer = await newer_records(nc)
        await traffic(1)
        await made.bind(nc, "late", made.sim.add_bot())
        made.say("late", "hello")
        await made.command(nc, "late", "to-late")
        await is_served(made, "late", "to-late")
        lines = (await operator(made, "doctor", "--json")).splitlines()
        checks = {line["check"]: line for line in map(json.loads, lines)}
        assert (checks["bindings"]["state"], f"{BOTS + 1} too_new" in checks["bindings"]["say"]) == ("fail", True)
        entries = [
            line for replica in replicas for line in replica.lines("record.too_new") if line["record"] == "Entry"
        ]
        assert {line["subject"].split(".")[2] for line in entries} == made.bots.keys() - {"late"}
        assert await newer_records(nc) == newer

        # back for good, for one person: without what is newer of theirs the older version begins anew
        bot = made.bots["s0"]
        js = nc.jetstream()
        person = person_token("s0", bot.user)
        purged = {message.text for message in await inbox(nc, "s0")}
        made.said["s0"] = [text for text in made.said["s0"] if text not in purged]
        await js.purge_stream(NAMES.stream_in, subject=NAMES.inbox("s0", person))
        await (await js.key_value(NAMES.persons)).delete(f"s0.{person}")
        await is_served(made, "s0", made.sent["s0"][-1])

        # forward again: all that waited comes, in order, once
        await roll(made, replicas, NEW)
        await made.settle(nc)
        assert (await audit(made, nc)).faults() == []
