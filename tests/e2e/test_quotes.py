"""Quotes over real sockets, in every shape that iLink has given them: the words come back, and only to their own."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from nats.aio.client import Client

from adapter.contract.messages import Inbound, Quote
from adapter.simulator.kinds import text_item
from tests.e2e.reading import inbox
from tests.e2e.test_commands import final_of
from tests.e2e.world import World, eventually, world

SHAPES = ("quote_full", "quote_type_8", "quote_type_0", "quote_svr_id", "quote_partial")


async def quote_in(made: World, nc: Client, sandbox: str, text: str) -> Quote | None:
    """What the message with this text quotes, once it is on the bus."""
    found: list[Inbound] = []

    async def is_there() -> bool:
        found[:] = await inbox(nc, sandbox)
        return any(inbound.text == text for inbound in found)

    await eventually(is_there, f"{text} is on the bus")
    (inbound,) = [inbound for inbound in found if inbound.text == text]
    return inbound.quote


def say_quote(made: World, bot: str, text: str, ident: Any) -> None:
    """The user quotes a message by its id alone, as newer clients of WeChat do."""
    made.sim.inject(bot, {"item_list": [text_item(text) | {"ref_msg": {"svr_id": ident}}]})


async def test_every_shape_of_a_quote_has_the_words_of_the_answer_that_it_names(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        nc, bot = await made.begun()
        await made.command(nc, "s1", "c1")
        (ident,) = (await final_of(made, "c1")).message_ids
        for shape in SHAPES:
            made.sim.say_kind(bot.bot, shape, f"see {shape}", of=ident)
            quoted = await quote_in(made, nc, "s1", f"see {shape}")
            text = "c1" if shape == "quote_partial" else "answer c1"
            assert quoted == Quote(id=ident, text=text, said_by="bot", kind="text"), shape


async def test_a_quote_of_an_answer_has_its_text_after_a_restart_and_in_no_other_sandbox(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        first = await made.add_adapter()
        nc = await made.nc()
        bot, other = made.sim.add_bot(), made.sim.add_bot()
        await made.bind(nc, "s1", bot)
        await made.bind(nc, "s2", other)
        made.say("s1", "hello")
        made.say("s2", "a secret of s2")
        await made.settle(nc)
        idents = []
        for number in range(2):  # the simulator names one id as a number, the next as text
            await made.command(nc, "s1", f"c{number}")
            idents += (await final_of(made, f"c{number}")).message_ids
        assert len(idents) == 2
        assert all(int(ident) > 2**53 for ident in idents)
        first.signal(signal.SIGTERM)
        await first.ended()
        await made.add_adapter()
        for number, ident in enumerate(idents):
            say_quote(made, bot.bot, f"see c{number}", int(ident) if number else ident)
            quoted = await quote_in(made, nc, "s1", f"see c{number}")
            assert quoted == Quote(id=ident, text=f"answer c{number}", said_by="bot", kind="text")

        say_quote(made, other.bot, "what did s1 say", idents[0])
        assert await quote_in(made, nc, "s2", "what did s1 say") == Quote(id=idents[0])
        (secret,) = [record.message_id for record in made.sim.inbound(other.bot)[:1]]
        say_quote(made, bot.bot, "what was said to s2", secret)
        assert await quote_in(made, nc, "s1", "what was said to s2") == Quote(id=secret)
