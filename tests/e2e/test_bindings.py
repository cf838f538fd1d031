"""Bindings over the bus, as the platform uses them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from nats.aio.client import Client

from adapter.contract.messages import (
    Bind,
    BindingEvent,
    Unbind,
)
from tests.e2e.world import NAMES, World, eventually, stream, until, world


async def ask(nc: Client, verb: str, query: msgspec.Struct, kind: type[Any]) -> Any:
    """A request to the service; its answer, or the error's text."""
    answer = await nc.request(NAMES.svc(verb), msgspec.json.encode(query), timeout=10)
    if answer.headers and "Nats-Service-Error" in answer.headers:
        return answer.headers["Nats-Service-Error-Code"]
    return msgspec.json.decode(answer.data, type=kind)


async def changes(nc: Client, sandbox: str) -> list[str]:
    events = await stream(nc, NAMES.stream_event, NAMES.event(sandbox, "binding"))
    return [msgspec.json.decode(data, type=BindingEvent).change for _, data in events]


async def started(made: World) -> Client:
    await made.add_adapter()
    return await made.nc()


async def test_a_bind_sent_while_no_adapter_runs_takes_effect_when_one_starts(tmp_path: Path) -> None:
    """A command that was published before it meant nobody, or somebody else, and is refused."""
    async with world(tmp_path) as made:
        nc = await started(made)
        await until(lambda: "adapter.started" in made.adapters[0].log.read_text(), "streams are there")
        await made.adapters[0].kill()
        bot = made.sim.add_bot()
        made.bots["s1"] = bot
        await made.command(nc, "s1", "early")
        bind = Bind(bot=bot.bot, bot_token=bot.token, user=bot.user)
        await nc.jetstream().publish(NAMES.said("bind", "s1"), msgspec.json.encode(bind))
        await made.adapters[0].start()
        await until(lambda: made.sim.polls(bot.bot).total > 0, "the bot is polled")
        made.say("s1", "hello")
        await made.settle(nc)
        await made.command(nc, "s1", "late")
        await made.settle(nc)
        found = [(receipt.command, receipt.outcome, receipt.reason) for receipt in await made.receipts(nc)]
        assert found == [("early", "refused", "not_bound"), ("late", "accepted", "")]


async def test_unbind_of_a_whole_sandbox_stops_its_polls_and_refuses_its_commands(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        nc = await started(made)
        bots = [made.sim.add_bot() for _ in range(2)]
        for bot in bots:
            await made.bind(nc, "s1", bot)
        await until(lambda: all(made.sim.online(bot.bot).online for bot in bots), "both told iLink that they poll")
        receipt = await made.control(nc, "s1", Unbind(all=True))
        assert sorted(receipt.bots) == sorted(bot.bot for bot in bots)
        await until(lambda: all(made.sim.polls(bot.bot).now == 0 for bot in bots), "no poll is open")
        await until(
            lambda: not any(made.sim.online(bot.bot).online for bot in bots), "both told iLink that they stopped"
        )
        await made.command(nc, "s1", "late")
        await made.settle(nc)
        (late,) = await made.receipts(nc)
        assert (late.outcome, late.reason) == ("refused", "not_bound")


async def test_what_an_unbinding_leaves_is_gone_in_time_and_nothing_else(tmp_path: Path) -> None:
    async with world(tmp_path, parts={"unbound_s": 2}) as made:
        nc = await started(made)
        sandboxes = ("unbound", "stays")
        for sandbox in sandboxes:
            made.bots[sandbox] = made.sim.add_bot()
            await made.bind(nc, sandbox, made.bots[sandbox])
            made.say(sandbox, "hello")
            await made.command(nc, sandbox, f"to-{sandbox}")

        async def records() -> set[str]:
            found = await stream(nc, f"KV_{NAMES.persons}", f"$KV.{NAMES.persons}.>")
            return {subject.split(".")[2] for subject, _ in found}

        async def left(*kept: str) -> bool:
            return await records() == set(kept)

        await eventually(lambda: left(*sandboxes), "all have records")
        await made.control(nc, "unbound", Unbind(all=True))
        await eventually(lambda: left("stays"), "what is not served is gone")

        async def unmarked() -> bool:
            found = await stream(nc, f"KV_{NAMES.bindings}", f"$KV.{NAMES.bindings}.>")
            return len(found) == 1 + 1  # the layout key, and one binding

        await eventually(unmarked, "so is the mark")
        assert made.adapters[0].said("bucket.incomplete") == 0
