"""A sandbox that gets another person: what the one before wrote, and what answers it, stays between the two."""

from __future__ import annotations

import asyncio
import random
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from nats.aio.client import Client

from adapter.contract.messages import Bind, Erase, Inbound, Receipt, ReplayPage, ReplayQuery, Unbind
from adapter.simulator import BotRecord
from tests.e2e.asker import Asker
from tests.e2e.reading import inbox
from tests.e2e.test_bindings import ask
from tests.e2e.world import NAMES, World, eventually, stream, until, world


async def replayed(nc: Client, **query: Any) -> list[str]:
    """What the sandbox is told that asks with its own rights."""
    page = await ask(nc, "replay.s1", ReplayQuery(**query), ReplayPage)
    return [msgspec.json.decode(entry.message, type=Inbound).text for entry in page.messages]


async def handed(asker: Asker) -> list[str]:
    """What the sandbox has not handled yet; it handles all that it got before."""
    return [message.text for message in await asker.take()]


async def says(made: World, nc: Client, text: str) -> Inbound:
    """The sandbox's person writes; the message once it is on the bus."""
    made.say("s1", text)
    await made.settle(nc)
    message = (await inbox(nc, "s1"))[-1]
    assert message.text == text
    return message


async def unbind(made: World, nc: Client, **fields: Any) -> None:
    receipt = await made.control(nc, "s1", Unbind(**(fields or {"all": True})))
    assert receipt.bots


async def outcome(made: World, nc: Client, ident: str, **body: Any) -> Receipt:
    """The receipt of a command that the sandbox sends."""
    subject, payload = NAMES.out("s1"), msgspec.json.encode({"id": ident, "text": f"answer {ident}", **body})
    await nc.jetstream().publish(subject, payload)
    found: list[Receipt] = []

    async def has_receipt() -> bool:
        found[:] = [receipt for receipt in await made.receipts(nc) if receipt.command == ident]
        return bool(found)

    await eventually(has_receipt, f"{ident} has its receipt")
    return found[-1]


async def begun(made: World) -> tuple[Client, BotRecord]:
    """A sandbox and its first person."""
    await made.add_adapter()
    nc, bot = await made.nc(), made.sim.add_bot()
    assert (await made.bind(nc, "s1", bot)).outcome == "applied"
    return nc, bot


async def test_the_next_person_meets_nothing_of_the_one_before(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        nc, _ = await begun(made)
        agent = Asker(nc)
        first = await says(made, nc, "of the first one")
        assert await handed(agent) == ["of the first one"]
        await says(made, nc, "and more of it")
        await unbind(made, nc)
        made.said.clear()
        assert await handed(agent) == []
        assert await replayed(nc) == []
        assert (await made.bind(nc, "s1", made.sim.add_bot())).outcome == "applied"
        assert await handed(agent) == []
        assert [await replayed(nc), await replayed(nc, after="1.0"), await replayed(nc, since_ms=1)] == [[], [], []]
        assert await inbox(nc, "s1") == []
        second = await says(made, nc, "of the second one")
        assert await handed(agent) == ["of the second one"]
        assert await replayed(nc) == ["of the second one"]

        late = await outcome(made, nc, "late", reply_to=first.id)
        assert (late.outcome, late.reason) == ("refused", "other_user")
        mixed = await outcome(made, nc, "mixed", reply_to=first.id, user=second.user)
        assert (mixed.outcome, mixed.reason) == ("refused", "other_user")
        right = await outcome(made, nc, "right", reply_to=second.id, user=second.user)
        assert right.outcome == "accepted"
        assert (await outcome(made, nc, "strange", reply_to="42")).outcome == "accepted"
        assert made.phone_texts("s1") == ["answer right", "answer strange"]


async def test_a_new_bot_of_the_same_person_answers_what_was_said_to_the_old_one(
    tmp_path: Path,
) -> None:
    async with world(tmp_path, token_death_delay_s=0) as made:
        nc, old = await begun(made)
        agent = Asker(nc)
        before = await says(made, nc, "to the old bot")
        receipt = await made.bind(nc, "s1", made.sim.add_bot(user=old.user))
        assert receipt.bots == [old.bot]
        assert await replayed(nc) == ["to the old bot"]
        assert await handed(agent) == ["to the old bot"]
        await says(made, nc, "to the new bot")
        assert (await outcome(made, nc, "c1", reply_to=before.id)).outcome == "accepted"
        assert (await outcome(made, nc, "c2", reply_to=before.id, user=old.user)).outcome == "accepted"
        assert made.phone_texts("s1") == ["answer c1", "answer c2"]


async def test_commands_that_wait_for_who_leaves_end(tmp_path: Path) -> None:
    async with world(tmp_path, environ={"WECHAT_NATS_SENDS_PER_WINDOW": "1"}) as made:
        nc, bot = await begun(made)
        await says(made, nc, "hello")
        assert (await outcome(made, nc, "sent")).outcome == "accepted"
        assert (await outcome(made, nc, "waits")).outcome == "parked"
        await unbind(made, nc)
        assert [(one.outcome, one.reason) for one in await made.receipts(nc)][-1] == ("refused", "not_bound")
        assert await stream(nc, NAMES.stream_out, ">") == []
        await made.bind(nc, "s1", bot)
        made.said.clear()
        await says(made, nc, "here I am again")
        assert (await outcome(made, nc, "again")).outcome == "accepted"
        assert made.phone_texts("s1") == ["answer sent", "answer again"]


@pytest.mark.parametrize("leaves", ["unbind", "erase"])
async def test_an_answer_that_comes_too_late_is_not_the_next_persons(tmp_path: Path, leaves: str) -> None:
    """It is stored before the bind, while no adapter runs; after an erasure nothing tells of the former person."""
    async with world(tmp_path) as made:
        nc, first = await begun(made)
        await says(made, nc, "hello")
        if leaves == "unbind":
            await unbind(made, nc)
        else:
            receipt = await made.control(nc, "_", Erase(user=first.user))
            assert (receipt.outcome, receipt.left) == ("applied", {})
        await made.adapters[0].kill()
        js, second = nc.jetstream(), made.sim.add_bot()
        await js.publish(NAMES.out("s1"), b'{"id":"late","text":"for the first only"}')
        bind = Bind(bot=second.bot, bot_token=second.token, user=second.user)
        await js.publish(NAMES.said("bind", "s1"), msgspec.json.encode(bind))
        made.said.clear()
        made.sim.say(second.bot, "hi")
        await made.adapters[0].start()
        await until(lambda: made.sim.polls(second.bot).total > 1, "the next person is heard")
        assert (await outcome(made, nc, "now", user=second.user)).outcome == "accepted"
        assert [one.outcome for one in await made.receipts(nc) if one.command == "late"] == ["refused"]
        assert [message.text for message in made.sim.phone(second.user)] == ["answer now"]


async def test_an_answer_that_crosses_the_next_persons_bind_is_not_theirs(tmp_path: Path) -> None:
    """Its author sends it while the next person is bound: what is stored before they are is not shown to them."""
    chance = random.Random(1)
    async with world(tmp_path) as made:
        await made.add_adapter()
        nc = await made.nc()
        js = nc.jetstream()
        early = 0
        for number in range(30):
            sandbox, first, second = f"s{number}", made.sim.add_bot(), made.sim.add_bot()
            assert (await made.bind(nc, sandbox, first)).outcome == "applied"
            await made.control(nc, sandbox, Unbind(all=True))
            made.bots[sandbox] = second
            made.sim.say(second.bot, "hi")
            bind = Bind(bot=second.bot, bot_token=second.token, user=second.user)

            async def answer(sandbox: str, late_s: float) -> None:
                await asyncio.sleep(late_s)
                await js.publish(NAMES.out(sandbox), b'{"text":"for the first only"}')

            _, bound = await asyncio.gather(answer(sandbox, chance.random() * 0.03), made.control(nc, sandbox, bind))

            found: list[Receipt] = []

            async def has_receipt(sandbox: str, found: list[Receipt]) -> bool:
                found[:] = [one for one in await made.receipts(nc) if one.sandbox == sandbox]
                return bool(found)

            await eventually(partial(has_receipt, sandbox, found), "the answer has its receipt")
            receipt = found[-1]
            if receipt.sequence < bound.sequence:
                early += 1
                assert (receipt.outcome, made.phone_texts(sandbox)) == ("refused", [])
        assert early
