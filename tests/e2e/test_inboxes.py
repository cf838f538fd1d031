"""What happens to inboxes, and to who writes in them, while people talk: each message is there once, in order."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from nats.aio.client import Client

from adapter.contract.messages import Unbind
from adapter.simulator import BotRecord
from tests.e2e.reading import Listener, inbox
from tests.e2e.test_nats_failures import ask, faultless, loaded, operator, running
from tests.e2e.world import NAMES, World, eventually, stream, until, world

MODES = ["cursor_replay", pytest.param("ack_on_delivery", marks=pytest.mark.slow)]
KEPT = 3
"""Messages that an inbox keeps where it is small."""


def texts(listener: Listener, sandbox: str, since: int = 0, until: int | None = None) -> list[str]:
    """What a plain subscriber was told: each stored message once, though the inbox has let it go. `since`, `until`:
    places in what it received."""
    received = listener.received[sandbox][since:until]
    return [live.inbound.text for live in {live.place: live for live in received}.values()]


def in_order(said: list[str], told: list[str]) -> bool:
    """Each once, in the order in which they were said; some may be missing."""
    return told == [text for text in said if text in set(told)]


@pytest.mark.parametrize("mode", MODES)
async def test_an_inbox_that_keeps_three_entries_doubles_nothing(tmp_path: Path, mode: str) -> None:
    """The newest entry says what is known, and where the next poll begins."""
    small = {"WECHAT_NATS_IN_MAX_PER_PERSON": str(KEPT)}
    async with world(tmp_path, cursor_mode=mode, environ=small) as made:
        adapter = await made.add_adapter()
        nc = await made.nc()
        listener = Listener()
        await listener.listen(nc)
        await made.bind(nc, "s1", made.sim.add_bot())
        wanted = [f"text {number}" for number in range(12)]
        for text in wanted:  # an answer for each
            made.say("s1", text)
            await until(lambda text=text: text in texts(listener, "s1"), f"{text} has it")  # type: ignore[misc]
        assert len(await stream(nc, NAMES.stream_in, NAMES.inbox("s1"))) == KEPT
        for turn in range(2):
            await adapter.kill()
            await adapter.start()
            wanted.append(f"after kill {turn}")
            made.say("s1", wanted[-1])
            await until(lambda: wanted[-1] in texts(listener, "s1"), "it has it")
        await made.command(nc, "s1", "c1")
        await until(lambda: made.phone_texts("s1") == ["answer c1"], "the person has the newest token")
        assert texts(listener, "s1") == wanted


@pytest.mark.parametrize("mode", MODES)
async def test_a_stream_of_inboxes_that_is_made_anew_under_load_goes_on(tmp_path: Path, mode: str) -> None:
    """What was in it is gone; what people write while it is away waits, and comes once, in order. The next owners
    find nothing wrong with it either."""
    async with running(tmp_path, cursor_mode=mode) as (made, nc, adapter):
        await loaded(made, nc, 3)
        await made.settle(nc)
        assert (await ask(nc, f"STREAM.DELETE.{NAMES.stream_in}")).get("success")
        made.said.clear()
        for sandbox in made.bots:
            made.say(sandbox, "while it is gone")

        async def noticed() -> bool:
            return NAMES.stream_in in (await adapter.unready()).get("streams", "")

        await eventually(noticed, "it is noticed")
        assert f"creating stream {NAMES.stream_in}" in await operator(made, "doctor", "--fix")
        await loaded(made, nc, 2, first=3)
        await eventually(adapter.is_ready, "it is ready again")
        await faultless(made, nc)
        for turn, number in enumerate((signal.SIGTERM, signal.SIGKILL)):
            adapter.signal(number)
            await adapter.ended()
            await adapter.start()
            await loaded(made, nc, 2, first=5 + 2 * turn)
            await faultless(made, nc)


@contextlib.asynccontextmanager
async def writing(made: World, sandbox: str, *, per_s: float = 20.0) -> AsyncIterator[None]:
    """The sandbox's person writes, as long as the block lasts."""
    over = asyncio.Event()

    async def write() -> None:
        for number in itertools.count():
            if over.is_set():
                return
            made.say(sandbox, f"{sandbox} text {number}")
            await asyncio.sleep(random.uniform(0, 2 / per_s))

    async with asyncio.TaskGroup() as group:
        group.create_task(write())
        yield
        over.set()


async def dead(nc: Client) -> int:
    return len(await stream(nc, NAMES.stream_dead, "wechat.dead.*"))


@pytest.mark.parametrize("mode", MODES)
async def test_a_bot_that_goes_from_sandbox_to_sandbox_is_in_one_at_a_time(tmp_path: Path, mode: str) -> None:
    """A bind elsewhere is refused until the unbind, and nothing comes twice; but an iLink that repeats tells a bind
    without a cursor all again, since nothing is kept of an earlier time."""
    homes = ["s1", "s2", "s3"]
    assert len({NAMES.partition_of(sandbox) for sandbox in homes}) == 3
    async with world(tmp_path, cursor_mode=mode, hold_ms=300) as made:
        for _ in range(2):
            await made.add_adapter()
        nc, bot = await made.nc(), made.sim.add_bot()
        listener = Listener()
        await listener.listen(nc)
        await made.bind(nc, "s1", bot)
        home, stays = "s1", [("s1", 0)]
        async with writing(made, "s1"):
            for to in ["s2", "s3", "s1"] * 3:
                answer = await made.bind(nc, to, bot)
                assert (answer.outcome, answer.reason) == ("refused", "bound_elsewhere"), answer
                answer = await made.control(nc, home, Unbind(bot=bot.bot))
                assert answer.outcome == "applied", answer
                before = len(listener.received[to])
                stays.append((to, before))
                answer = await made.bind(nc, to, bot)
                assert answer.outcome == "applied", answer
                await until(lambda to=to, before=before: len(listener.received[to]) > before, f"{to} has it")  # type: ignore[misc]
                home = to
        said = made.said["s1"]
        await until(lambda: said[-1] in texts(listener, home), "the last one is delivered")
        for number, (stay, begin) in enumerate(stays):
            end = next((later for each, later in stays[number + 1 :] if each == stay), None)
            assert in_order(said, got := texts(listener, stay, begin, end)), f"{stay} got {got}"
        if mode == "ack_on_delivery":
            delivered = [text for home in homes for text in texts(listener, home)]
            assert len(delivered) == len(set(delivered)), "nothing comes twice"
        assert made.sim.violations(kind="concurrent_polls") == []
        made.bots = {home: bot}
        await made.command(nc, home, "c1")
        await until(lambda: made.phone_texts(home) == ["answer c1"], "its user is answered from where it is now")


@pytest.mark.parametrize("mode", MODES)
async def test_persons_that_change_under_load_meet_nothing_of_each_other(tmp_path: Path, mode: str) -> None:
    """Each unbind leaves nobody and empties the inbox: what the next one's sandbox is told is theirs alone."""
    async with world(tmp_path, cursor_mode=mode, hold_ms=300) as made:
        for _ in range(2):
            await made.add_adapter()
        nc = await made.nc()
        listener = Listener()
        await listener.listen(nc)
        persons: dict[str, BotRecord] = {name: made.sim.add_bot() for name in ("anna", "bert")}
        said: dict[str, list[str]] = {name: [] for name in persons}
        told: dict[str, list[list[str]]] = {name: [] for name in persons}
        """What was told of each in each of their times."""
        over = asyncio.Event()

        async def write(name: str) -> None:
            for number in itertools.count():
                if over.is_set():
                    return
                said[name].append(f"{name} text {number}")
                made.sim.say(persons[name].bot, said[name][-1])
                await asyncio.sleep(random.uniform(0, 0.1))

        async with asyncio.TaskGroup() as group:
            for name in persons:
                group.create_task(write(name))
            for name in ["anna", "bert"] * 4:
                assert await inbox(nc, "s1") == [], "nothing of the former one is there"
                before = len(listener.received["s1"])
                assert (await made.bind(nc, "s1", persons[name])).outcome == "applied"
                await until(lambda before=before: len(listener.received["s1"]) > before + 3, "they come")  # type: ignore[misc]
                assert {message.user for message in await inbox(nc, "s1")} == {persons[name].user}
                assert (await made.control(nc, "s1", Unbind(all=True))).bots
                assert await inbox(nc, "s1") == []
                assert {live.inbound.user for live in listener.received["s1"][before:]} == {persons[name].user}
                told[name].append(texts(listener, "s1", before))
            over.set()
        for name, bot in persons.items():  # what they wrote while the other one was there waits with iLink
            assert (await made.bind(nc, f"of-{name}", bot)).outcome == "applied"

        def times(name: str) -> list[list[str]]:
            return [*told[name], texts(listener, f"of-{name}")]

        def delivered(name: str) -> set[str]:
            return {text for time in times(name) for text in time}

        async def all_delivered() -> bool:
            lost = await dead(nc) if mode == "ack_on_delivery" else 0
            return sum(len(delivered(name)) for name in persons) + lost >= sum(map(len, said.values()))

        await eventually(all_delivered, "all is delivered, or a dead letter")
        for name in persons:
            assert all(in_order(said[name], time) for time in times(name)), "once, and in order"
        if mode == "ack_on_delivery":
            assert all(sum(map(len, times(name))) == len(delivered(name)) for name in persons), "nothing comes twice"
            lost = sum(len(said[name]) - len(delivered(name)) for name in persons)
            assert lost == await dead(nc), "what reaches nobody is a dead letter"
        assert made.sim.violations(kind="concurrent_polls") == []
