"""-14: the calls that are made, the word that is given in time, and what becomes of what waits."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from nats.aio.client import Client

from adapter.contract.messages import BindingEvent, Receipt
from adapter.simulator import BotRecord, FaultRule
from tests.e2e.world import NAMES, SOON, World, eventually, free_port, stream, until, world

WRONG = SOON | {"login_polls_s": (2.0, 4.0, 86_400.0)}
"""A login that is called lost is tried again after two seconds, and every four."""


async def changes(nc: Client, sandbox: str = "s1") -> list[BindingEvent]:
    found = await stream(nc, NAMES.stream_event, NAMES.event(sandbox, "binding"))
    return [msgspec.json.decode(data, type=BindingEvent) for _, data in found]


async def wait_binding_event(nc: Client, change: str) -> BindingEvent:
    """The first event of this kind, once there is one."""
    found: list[BindingEvent] = []

    async def is_there() -> bool:
        found[:] = [event for event in await changes(nc) if event.change == change]
        return bool(found)

    await eventually(is_there, f"{change} is told")
    return found[0]


async def parked(made: World, nc: Client, count: int) -> None:
    async def are_parked() -> bool:
        found = [r for r in await made.receipts(nc) if r.outcome == "parked"]
        return len(found) == count and {r.reason for r in found} == {"needs_login"}

    await eventually(are_parked, f"{count} commands wait for a login")


def texts(made: World, user: str) -> list[str]:
    """What the phone shows; what waited may come in one message."""
    return [text for shown in made.sim.phone(user) for text in shown.text.split("\n\n")]


def counts(made: World, bot: str) -> dict[str, int]:
    """Calls of a bot by endpoint."""
    return {call.endpoint: call.count for call in made.sim.calls(bot)}


def since(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    return {name: count - before.get(name, 0) for name, count in after.items() if count != before.get(name, 0)}


async def test_f9_costs_exactly_the_scheduled_calls_on_every_endpoint(tmp_path: Path) -> None:
    async with world(tmp_path, parts=SOON) as made:
        nc, bot = await made.begun()
        await until(lambda: made.sim.polls(bot.bot).now == 1, "a poll is held")
        before = counts(made, bot.bot)
        made.sim.kill_token(bot.bot)
        await wait_binding_event(nc, "stale")
        for number in range(3):
            await made.command(nc, "s1", f"c{number}")
        await parked(made, nc, 3)
        lost = await wait_binding_event(nc, "needs_login")
        assert "-14" in lost.reason
        assert "QR code" in lost.detail
        assert [event.change for event in await changes(nc)] == ["bound", "stale", "needs_login"]
        await made.command(nc, "s1", "c3")
        await parked(made, nc, 4)
        assert since(before, counts(made, bot.bot)) == {"getupdates": 3, "msg/notifystart": 3}
        await _log_in_again(made, nc, bot.user, ["c0", "c1", "c2", "c3"])
        assert since(before, counts(made, bot.bot)) == {"getupdates": 3, "msg/notifystart": 3}


def _refuse_sends(made: World, bot: BotRecord) -> None:
    """iLink refuses the token at each send and at notifystart; polls go on."""
    made.sim.set_fault(FaultRule(fault="F10", bot=bot.bot))
    made.sim.set_fault(FaultRule(fault="F9", endpoint="msg/notifystart", bot=bot.bot))


@pytest.mark.parametrize("evidence", ["notifystart", "poll"])
async def test_minus_14_on_one_message_refuses_it_and_nothing_else(tmp_path: Path, evidence: str) -> None:
    """So iLink answers to a message that it does not like, too, while the session lives."""
    async with world(tmp_path, parts=SOON) as made:
        nc, bot = await made.begun()
        made.sim.set_fault(FaultRule(fault="F10", params={"text": "cursed"}))
        if evidence == "poll":
            made.sim.set_fault(FaultRule(fault="F1", endpoint="msg/notifystart"))
        for ident in ("c0", "cursed", "c1"):
            await made.command(nc, "s1", ident)
        await made.settle(nc)
        receipts = await made.receipts(nc)
        assert [(receipt.command, receipt.outcome, receipt.reason) for receipt in receipts] == [
            ("c0", "accepted", ""),
            ("cursed", "refused", "rejected"),
            ("c1", "accepted", ""),
        ]
        refused = receipts[1]
        assert (refused.ret, refused.errcode, refused.errmsg, refused.attempts) == (None, -14, "session timeout", 2)
        assert texts(made, bot.user) == ["answer c0", "answer c1"]
        assert [event.change for event in await changes(nc)] == ["bound"]


@pytest.mark.parametrize("status", [401, 403])
async def test_a_firewall_that_forbids_everything_costs_no_login_and_no_message(tmp_path: Path, status: int) -> None:
    async with world(tmp_path, parts=SOON) as made:
        nc, first = await made.begun()
        second = made.sim.add_bot()
        await made.bind(nc, "s2", second)
        bots = (first, second)
        await until(lambda: all(made.sim.polls(bot.bot).now == 1 for bot in bots), "both polls are held")
        before = [counts(made, bot.bot)["getupdates"] for bot in bots]
        made.sim.set_fault(FaultRule(fault="F1", params={"status": status}))
        for sandbox in ("s1", "s2"):
            made.say(sandbox, "ends the poll that was out")
        await made.command(nc, "s1", "c0")

        def are_forbidden() -> bool:
            polls = [counts(made, bot.bot)["getupdates"] - count for bot, count in zip(bots, before, strict=True)]
            return min(polls) > len(SOON["stale_retry_s"]) + 1 and counts(made, first.bot).get("sendmessage", 0) > 1

        await until(are_forbidden, "more polls are forbidden than -14 would have cost, and sends")
        made.sim.clear_faults()
        made.say("s1", "still there?")
        await made.settle(nc)
        assert texts(made, first.user) == ["answer c0"]
        for sandbox in ("s1", "s2"):
            assert [event.change for event in await changes(nc, sandbox)] == ["bound"]
        assert (await receipt_of(made, nc, "c0")).outcome == "accepted"


async def receipt_of(made: World, nc: Client, command: str) -> Receipt:
    (found,) = [receipt for receipt in await made.receipts(nc) if receipt.command == command]
    return found


async def test_minus_14_on_every_send_refuses_each_while_polls_go_on(tmp_path: Path) -> None:
    """-14 to sends, also to notifystart: the poll is the proof. Each command costs two requests, and is refused."""
    async with world(tmp_path, parts=SOON) as made:
        nc, bot = await made.begun()
        _refuse_sends(made, bot)
        for number in range(3):
            await made.command(nc, "s1", f"c{number}")
        await made.settle(nc)
        assert [(r.command, r.outcome, r.reason, r.errcode, r.attempts) for r in await made.receipts(nc)] == [
            (f"c{number}", "refused", "rejected", -14, 2) for number in range(3)
        ]
        assert counts(made, bot.bot)["sendmessage"] == 6
        made.sim.clear_faults()
        await made.command(nc, "s1", "c3")
        await made.settle(nc)
        assert texts(made, bot.user) == ["answer c3"]
        assert [event.change for event in await changes(nc)] == ["bound"]


async def _log_in_again(made: World, nc: Client, user: str, waiting: list[str]) -> None:
    """The user scans a code: iLink gives them a new bot, which gets what was parked for them."""
    new = made.sim.add_bot(user=user)
    await made.bind(nc, "s1", new)
    made.say("s1", "I am back")
    await made.settle(nc)
    assert texts(made, user) == [f"answer {ident}" for ident in waiting]
    assert {shown.bot for shown in made.sim.phone(user)} == {new.bot}


async def test_the_same_bot_with_a_new_token_gets_what_was_parked_too(tmp_path: Path) -> None:
    async with world(tmp_path, parts=SOON) as made:
        nc, bot = await made.begun()
        made.sim.kill_token(bot.bot)
        await wait_binding_event(nc, "needs_login")
        for number in range(3):
            await made.command(nc, "s1", f"c{number}")
        await parked(made, nc, 3)
        made.sim.revive_token(bot.bot)
        await made.bind(nc, "s1", bot)
        await made.settle(nc)
        assert texts(made, bot.user) == [f"answer c{number}" for number in range(3)]


async def _lost(made: World) -> tuple[Client, BotRecord]:
    """The token of a bot is dead; a command waits."""
    nc, bot = await made.begun()
    made.sim.kill_token(bot.bot)
    await made.command(nc, "s1", "c")
    await wait_binding_event(nc, "needs_login")
    return nc, bot


async def test_a_bot_that_was_called_dead_by_mistake_comes_back_by_itself(tmp_path: Path) -> None:
    """Also in the hands of another replica than the one that said so."""
    async with world(tmp_path, parts=WRONG) as made:
        nc, bot = await _lost(made)
        await parked(made, nc, 1)
        before = counts(made, bot.bot)["getupdates"]
        await until(lambda: counts(made, bot.bot)["getupdates"] > before + 1, "it is polled all the same")
        assert [event.change for event in await changes(nc)] == ["bound", "stale", "needs_login"]
        second = await made.add_adapter(WECHAT_NATS_HTTP_ADDR=f"127.0.0.1:{free_port()}")
        await made.adapters[0].kill()
        made.sim.revive_token(bot.bot)
        await wait_binding_event(nc, "recovered")
        made.say("s1", "still there?")
        await made.settle(nc)
        assert [event.change for event in await changes(nc)] == ["bound", "stale", "needs_login", "recovered"]
        assert texts(made, bot.user) == ["answer c"]

        async def is_shown() -> bool:
            return await second.metric('bindings{state="polling"}') == 1

        await eventually(is_shown, "the metrics say so")
        assert await second.metric('bindings{state="needs_login"}') == 0
