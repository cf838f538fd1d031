"""Records of a newer version in the real buckets, as in the middle of an upgrade: each is left alone, by itself."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from nats.aio.client import Client
from nats.errors import NoRespondersError

from adapter.contract.messages import BindingsPage, BindingsQuery
from adapter.contract.names import person_token, to_subject_token
from tests.e2e.test_bindings import ask
from tests.e2e.test_nats_failures import operator
from tests.e2e.world import NAMES, World, eventually, stream, until, world
from tests.newer import made_newer


async def write_newer(nc: Client, bucket: str, key: str, **fields: object) -> bytes:
    """What a newer replica makes of a record."""
    kv = await nc.jetstream().key_value(bucket)
    entry = await kv.get(key)
    value = made_newer(entry.value or b"", **fields)
    await kv.update(key, value, entry.revision)
    return value


async def is_polled_on(made: World, bot: str) -> None:
    enough = made.sim.polls(bot).total + 3
    await until(lambda: made.sim.polls(bot).total > enough, "the bot is polled")


@pytest.mark.slow
async def test_a_bot_whose_binding_is_newer_is_not_polled_and_all_others_are(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        adapter = await made.add_adapter()
        nc = await made.nc()
        for sandbox in ("s1", "s2"):
            await made.bind(nc, sandbox, made.sim.add_bot())
        newer, other = made.bots["s1"].bot, made.bots["s2"].bot
        await until(lambda: made.sim.polls(newer).total > 0, "the bot is polled")
        key = to_subject_token(newer)
        value = await write_newer(nc, NAMES.bindings, key, token={"of": "another form"})

        async def is_given_up() -> bool:
            try:
                page = await ask(nc, "bindings.list", BindingsQuery(bot=newer, health=True), BindingsPage)
            except NoRespondersError:  # it starts
                return False
            return [info.health.status for info in page.bindings] == ["too_new"]

        await eventually(is_given_up, "no replica polls the bot")
        for restarted in (False, True):  # also one that has never known an older form of it
            if restarted:
                await adapter.kill()
                await adapter.start()
                await eventually(is_given_up, "known as too new after a start")
            before = made.sim.polls(newer).total
            await is_polled_on(made, other)
            assert made.sim.polls(newer).total == before
        await made.command(nc, "s1", "waits")
        made.sent["s1"].clear()
        made.say("s2", "hello")
        await made.command(nc, "s2", "goes on")
        await made.settle(nc)
        refused = await made.bind(nc, "s1", made.bots["s1"])
        assert (refused.reason, "newer version" in refused.detail) == ("too_new", True)
        assert [r.outcome for r in await made.receipts(nc) if r.command == "waits" and r.outcome != "parked"] == []
        assert (await (await nc.jetstream().key_value(NAMES.bindings)).get(key)).value == value
        assert adapter.said("record.too_new") == 2  # once in each life

        said = await operator(made, "doctor", "--json")
        checks = {line["check"]: line for line in map(json.loads, said.splitlines())}
        assert (checks["bindings"]["state"], "1 too_new" in checks["bindings"]["say"]) == ("fail", True)


@pytest.mark.slow
async def test_a_person_whose_record_is_newer_holds_nobody_else(tmp_path: Path) -> None:
    """Another user of the same sandbox does not wait, and the user's commands go out once the record can be read."""
    async with world(tmp_path) as made:
        adapter = await made.add_adapter()
        nc = await made.nc()
        one, two = made.sim.add_bot(), made.sim.add_bot()
        for bot in (one, two):
            await made.bind(nc, "s1", bot)
            made.say("s1", f"hello to {bot.bot}")
        await made.settle(nc)
        for number, bot in enumerate((one, two)):
            body = {"id": f"first{number}", "user": bot.user, "text": "first"}
            await nc.jetstream().publish(NAMES.out("s1"), msgspec.json.encode(body))
        key = f"s1.{person_token('s1', one.user)}"
        kv = await nc.jetstream().key_value(NAMES.persons)

        async def is_stored() -> bool:
            return len(await stream(nc, f"KV_{NAMES.persons}", ">")) == 2

        await eventually(is_stored, "both have a record")
        await made.settle(nc)
        known = (await kv.get(key)).value
        await adapter.kill()
        value = await write_newer(nc, NAMES.persons, key, sealed=3)
        for number, bot in enumerate((one, two, one, two)):
            body = {"id": f"c{number}", "user": bot.user, "text": f"answer c{number}"}
            await nc.jetstream().publish(NAMES.out("s1"), msgspec.json.encode(body))
        await adapter.start()

        def texts(user: str) -> list[str]:
            return [message.text for message in made.sim.phone(user) if message.text != "first"]

        await until(lambda: texts(two.user) == ["answer c1", "answer c3"], "the other user is served")
        entry = await kv.get(key)
        assert (texts(one.user), entry.value) == ([], value)
        page = await ask(nc, "bindings.list", BindingsQuery(bot=one.bot, health=True), BindingsPage)
        assert page.bindings[0].health.is_unread
        assert adapter.said("record.too_new") == 1
        await kv.update(key, known or b"", entry.revision)
        await until(lambda: texts(one.user) == ["answer c0", "answer c2"], "what was held goes out, in order")
