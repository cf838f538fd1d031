"""erase: the person's bots are unbound first; then it goes on beside other commands, and names nobody afterwards."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from adapter.contract.messages import ControlAnswer, Erase
from adapter.errors import BusRefused
from tests.bindings.test_control import BOT, USER, Platform

VIRTUAL_TIME = True


class SlowEraser:
    """Counts one message, once it may."""

    def __init__(self) -> None:
        self.asked: list[Erase] = []
        self.may_end = asyncio.Event()
        self.may_end.set()
        self.failure: Exception | None = None

    async def run(self, command: Erase) -> ControlAnswer:
        self.asked.append(command)
        await self.may_end.wait()
        if self.failure is not None:
            raise self.failure
        return ControlAnswer(ok=True, id=command.id or "", counts={"message": 1})


async def bound(eraser: SlowEraser) -> Platform:
    """The person has a bot in two sandboxes, and somebody else has one."""
    platform = Platform(erase=eraser.run)
    await platform.bind()
    await platform.bind(sandbox="s2", bot="b2@im.bot")
    await platform.bind(sandbox="s2", bot="b3@im.bot", user="other@im.wechat")
    return platform


async def test_a_persons_bots_are_unbound_before_what_is_theirs_is_erased() -> None:
    eraser = SlowEraser()
    platform = await bound(eraser)
    answer = await platform.say("erase", user=USER, id="e1")
    assert (answer.ok, answer.id, answer.counts) == (True, "e1", {"message": 1})
    assert [info.bot for info in answer.bindings] == [BOT, "b2@im.bot"]
    assert platform.bound == {"b3@im.bot": "s2"}
    (command,) = eraser.asked
    assert (command.user, command.id) == (USER, "e1")


async def test_one_sandbox_alone_and_a_dry_run_unbinds_nobody() -> None:
    eraser = SlowEraser()
    platform = await bound(eraser)
    await platform.say("erase", user=USER, sandbox="s2", dry_run=True)
    assert set(platform.bound) == {BOT, "b2@im.bot", "b3@im.bot"}
    await platform.say("erase", user=USER, sandbox="s2")
    assert set(platform.bound) == {BOT, "b3@im.bot"}


async def test_only_commands_of_the_same_person_wait_for_an_erasure() -> None:
    eraser = SlowEraser()
    eraser.may_end.clear()
    platform = await bound(eraser)
    delivery = platform.publish("erase", msgspec.json.encode({"user": USER, "id": "e1"}))
    same = platform.publish(
        "bind", msgspec.json.encode({"sandbox": "s1", "bot": BOT, "bot_token": "t", "user": USER})
    )
    await asyncio.sleep(1)
    assert (await platform.bind(sandbox="s3", bot="b4@im.bot", user="third@im.wechat")).ok
    assert (delivery.acks, same.acks) == (0, 0)  # a crash now: it is carried on, and the person is bound after it
    eraser.may_end.set()
    await asyncio.sleep(1)
    assert (delivery.acks, same.acks) == (1, 1)


async def test_a_bind_right_behind_an_erasure_gets_no_command_of_before() -> None:
    platform = Platform(erase=SlowEraser().run)
    await platform.bind()
    command = platform.bench.bus.put(platform.bench.names.out("s1"), b'{"text":"for the first"}', {})
    body = {"sandbox": "s1", "bot": "b9@im.bot", "bot_token": "t9", "user": "other@im.wechat"}
    platform.publish("erase", msgspec.json.encode({"user": USER}))
    bind = platform.publish("bind", msgspec.json.encode(body))
    await asyncio.sleep(1)
    assert (bind.acks, platform.bound) == (1, {"b9@im.bot": "s1"})
    assert platform.binding("b9@im.bot").out_after == command


async def test_one_that_the_bus_refuses_says_that_it_is_to_be_repeated() -> None:
    eraser = SlowEraser()
    eraser.failure = BusRefused(10059, "stream not found")
    platform = await bound(eraser)
    answer = await platform.say("erase", user=USER)
    assert (answer.ok, answer.error) == (False, "The erasure is not complete (bus_refused): erase again.")


@pytest.mark.parametrize("body", [b"no json", b'{"user":""}', b'{"sandbox":"s1"}'])
async def test_what_cannot_be_read_becomes_a_dead_letter_without_its_words(body: bytes, platform: Platform) -> None:
    platform.publish("erase", body)
    await asyncio.sleep(1)
    (letter,) = platform.bench.bus.found("DEAD")
    assert letter.data == b""
    assert USER not in repr(Erase(user=USER))
