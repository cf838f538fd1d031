"""The windows of users as sandboxes see them: by quota, by -2, by time, and after kill -9."""

from __future__ import annotations

from pathlib import Path

import msgspec
from nats.aio.client import Client

from adapter.contract.messages import FINAL_OUTCOMES, Window, WindowQuery
from adapter.simulator import FaultRule
from tests.e2e.world import NAMES, World, eventually, until, world


async def commands(made: World, nc: Client, count: int, first: int = 0) -> None:
    for number in range(first, first + count):
        await made.command(nc, "s1", f"c{number}")


async def shown(nc: Client) -> Window:
    """What wechat.svc.window says."""
    query = msgspec.json.encode(WindowQuery(sandbox="s1"))
    return msgspec.json.decode((await nc.request(NAMES.svc("window"), query, timeout=10)).data, type=Window)


async def left(nc: Client, remaining: int) -> None:
    async def is_left() -> bool:
        return (await shown(nc)).remaining == remaining

    await eventually(is_left, f"{remaining} sends are left")


async def wait_parked_for(made: World, nc: Client, reason: str) -> None:
    """Waits until a command waits for `reason`."""

    async def is_parked() -> bool:
        return reason in [r.reason for r in await made.receipts(nc) if r.outcome == "parked"]

    await eventually(is_parked, f"a command is parked: {reason}")


async def wait_parked(made: World, nc: Client, command: str) -> None:
    """Waits until this command is parked."""

    async def is_parked() -> bool:
        return command in [r.command for r in await made.receipts(nc) if r.outcome == "parked"]

    await eventually(is_parked, f"{command} is parked")


async def all_ended(made: World, nc: Client) -> None:
    """Waits until each command has ended. Nobody writes meanwhile, as `World.settle` would."""

    async def are_ended() -> bool:
        ended = {receipt.command for receipt in await made.receipts(nc) if receipt.outcome in FINAL_OUTCOMES}
        return {ident for idents in made.sent.values() for ident in idents} <= ended

    await eventually(are_ended, "every command has ended")


async def test_by_quota_and_by_minus_2(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        nc, bot = await made.begun()
        await left(nc, 10)
        await commands(made, nc, 12)
        await wait_parked_for(made, nc, "quota")
        assert (await shown(nc)).remaining == 0
        made.say("s1", "go on")
        await all_ended(made, nc)
        assert len(made.sim.phone(bot.user)) == 11, "the parked ones came in one message"
        assert (await shown(nc)).remaining == 9
        made.sim.set_fault(FaultRule(fault="F11", bot=bot.bot, params={"until_notifystart": True}))
        (started,) = made.sim.calls(bot.bot, "msg/notifystart")
        await commands(made, nc, 1, first=12)
        await until(lambda: made.sim.calls(bot.bot, "msg/notifystart")[0].count > started.count, "it starts anew")
        await wait_parked_for(made, nc, "throttled")
        assert (await shown(nc)).remaining == 0
        made.say("s1", "and on")
        await all_ended(made, nc)
        assert (await shown(nc)).remaining == 9
        assert made.sim.violations(kind="quota_exceeded") == []


async def test_prepare_failed_in_an_open_window_restarts_the_session_once(tmp_path: Path) -> None:
    """At most once a minute for a bot, and nothing is sent because of it. Other words do not ask for it."""
    async with world(tmp_path) as made:
        nc, bot = await made.begun()

        def restarts() -> int:
            return sum(call.count for call in made.sim.calls(bot.bot, "msg/notifystart")) - 1  # the poller's

        for number, (words, expected) in enumerate(
            [("rate limited", 0), ("prepare failed", 1), ("prepare failed", 1)]
        ):
            made.sim.set_fault(FaultRule(fault="F11", bot=bot.bot, count=1, params={"errmsg": words}))
            await commands(made, nc, 1, first=number)
            await until(lambda: len(made.sim.sends(bot.bot)) == 2 * number + 1, "it is refused")  # noqa: B023 -- awaited
            await wait_parked(made, nc, f"c{number}")
            await until(lambda: restarts() == expected, "the session is restarted")  # noqa: B023 -- awaited
            assert [send.why for send in made.sim.sends(bot.bot)] == [*["F11", "shown"] * number, "F11"]
            made.say("s1", f"go on {number}")
            await all_ended(made, nc)
        assert restarts() == 1
        assert {r.outcome for r in await made.receipts(nc)} == {"parked", "accepted"}


async def test_kill_minus_9_forgets_no_send(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        first = await made.add_adapter()
        nc = await made.nc()
        await made.bind(nc, "s1", made.sim.add_bot())
        made.say("s1", "hello")
        await left(nc, 10)
        await commands(made, nc, 8)
        await made.settle(nc)
        await first.kill()
        await made.add_adapter()
        await commands(made, nc, 3, first=8)
        await wait_parked_for(made, nc, "quota")
        await left(nc, 0)
