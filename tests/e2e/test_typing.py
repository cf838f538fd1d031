"""Typing over real sockets: the phone shows it, and it ends with the answer."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import msgspec
from nats.aio.client import Client

from adapter.contract.messages import Options
from adapter.simulator import BotRecord
from tests.e2e.test_commands import final_of
from tests.e2e.world import NAMES, World, eventually, until, world


async def talking(made: World, nc: Client, **options: Any) -> BotRecord:
    """A bound bot whose user has written."""
    bot = made.sim.add_bot()
    await made.bind(nc, "s1", bot, options=Options(**options))
    made.say("s1", "hello")
    await made.settle(nc)
    return bot


async def typing(nc: Client, switch: str, ident: str) -> None:
    body = msgspec.json.encode({"typing": switch})
    await nc.jetstream().publish(NAMES.out("s1"), body, headers={"Nats-Msg-Id": ident})


async def test_commands_show_and_hide_it_and_an_answer_ends_it(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        await made.add_adapter()
        nc = await made.nc()
        bot = await talking(made, nc)
        await typing(nc, "on", "on-1")
        shown = await final_of(made, "on-1")
        assert (shown.outcome, shown.message_ids) == ("accepted", [])
        await until(lambda: made.sim.typing(bot.user).on, "it is shown")
        await typing(nc, "off", "off-1")
        assert (await final_of(made, "off-1")).outcome == "accepted"
        await until(lambda: not made.sim.typing(bot.user).on, "it is hidden")
        await typing(nc, "on", "on-2")
        await until(lambda: made.sim.typing(bot.user).on, "it is shown again")
        await made.command(nc, "s1", "c")
        await until(lambda: not made.sim.typing(bot.user).on, "the answer ends it")
        assert [shown.text for shown in made.sim.phone(bot.user)] == ["answer c"]
        receipt = await final_of(made, "c")
        assert receipt.window.remaining == 9  # typing cost nothing of it
        assert made.sim.violations(kind="unknown_ticket") == []


async def test_a_bot_bound_so_types_from_each_message_to_its_answer(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        await made.add_adapter()
        nc = await made.nc()
        bot = await talking(made, nc, auto_typing=True)
        await until(lambda: made.sim.typing(bot.user).on, "the first message shows it")
        await made.command(nc, "s1", "c1")
        await until(lambda: not made.sim.typing(bot.user).on, "its answer hides it")
        made.say("s1", "and now")
        await until(lambda: made.sim.typing(bot.user).on, "the next message shows it again")


async def test_sigterm_hides_it(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        first = await made.add_adapter()
        nc = await made.nc()
        bot = await talking(made, nc)
        await typing(nc, "on", "on")
        await until(lambda: made.sim.typing(bot.user).on, "it is shown")
        first.signal(signal.SIGTERM)
        assert await first.ended() == 0
        assert not made.sim.typing(bot.user).on


async def test_behind_something_that_waits_it_is_refused_at_once(tmp_path: Path) -> None:
    """Nothing is shown before an answer that does not come, and nothing of it waits."""
    async with world(tmp_path) as made:
        await made.add_adapter()
        nc, bot = await made.nc(), made.sim.add_bot()
        await made.bind(nc, "s1", bot)
        await made.command(nc, "s1", "parked")

        async def is_parked() -> bool:
            return [one.outcome for one in await made.receipts(nc)] == ["parked"]

        await eventually(is_parked, "nobody has written yet")
        for switch in ("on", "off"):
            await typing(nc, switch, f"behind-{switch}")
            receipt = await final_of(made, f"behind-{switch}")
            assert (receipt.outcome, receipt.reason) == ("refused", "window_closed")
            assert receipt.at_ms - receipt.received_at_ms < 3000
        assert [one.outcome for one in await made.receipts(nc) if one.command != "parked"] == ["refused"] * 2
        made.say("s1", "hello")
        assert (await final_of(made, "parked")).outcome == "accepted"
        assert made.sim.calls(bot.bot, "sendtyping") == []
