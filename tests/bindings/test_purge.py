"""Nobody else's words: an unbind that purges, and a sandbox that starts afresh when its person changes."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any

import msgspec
import pytest

from adapter.errors import Temporary
from tests.bindings.test_control import BOT, USER, NoEraser, Platform

VIRTUAL_TIME = True

FRESH = {"fresh": True}
OTHER: dict[str, Any] = {"bot": "b2@im.bot", "user": "u2@im.wechat"}


class SlowOwner(NoEraser):
    """The owner of a bot that still has media to wait for."""

    def __init__(self) -> None:
        self.has_ended = asyncio.Event()

    async def wait_released(self, bots: Collection[str]) -> None:
        await self.has_ended.wait()


def says(platform: Platform, text: str, sandbox: str = "s1") -> None:
    platform.bench.bus.put(platform.bench.names.inbox(sandbox), msgspec.json.encode({"text": text}), {})


def inbox(platform: Platform) -> list[str]:
    return [msgspec.json.decode(stored.data)["text"] for stored in platform.bench.bus.found("IN")]


async def test_an_unbind_that_purges_leaves_nothing_in_the_inbox_of_its_sandbox(platform: Platform) -> None:
    await platform.bind()
    says(platform, "of the first one")
    says(platform, "elsewhere", "s2")
    assert (await platform.say("unbind", sandbox="s1", purge=True)).ok
    assert inbox(platform) == ["elsewhere"]
    assert (await platform.say("unbind", sandbox="s1", purge=True)).ok  # nobody is bound, and nothing there


@pytest.mark.parametrize("is_next_bound", [False, True])
async def test_what_is_published_after_the_unbind_goes_too_and_nothing_of_the_next_person(
    is_next_bound: bool,
) -> None:
    owner = SlowOwner()
    platform = Platform(eraser=owner)
    await platform.bind()
    await platform.say("unbind", sandbox="s1", purge=True)
    says(platform, "waited for its picture")
    if is_next_bound:
        await platform.bind(**OTHER)
        says(platform, "of the next one")
    owner.has_ended.set()
    await asyncio.sleep(1)
    assert inbox(platform) == (["of the next one"] if is_next_bound else [])


async def test_a_purge_that_fails_later_is_told_in_the_log_and_holds_up_nobody() -> None:
    class NoBus(NoEraser):
        async def wait_released(self, bots: Collection[str]) -> None:
            raise Temporary("bus_timeout")

    platform = Platform(eraser=NoBus())
    await platform.bind()
    assert (await platform.say("unbind", sandbox="s1", purge=True)).ok
    assert (await platform.bind(**OTHER)).ok


@pytest.mark.parametrize("how", [{"bot": BOT}, {"keep_undelivered": True}], ids=["another-stays", "keep"])
async def test_a_purge_that_would_take_what_is_to_stay_is_refused_and_nobody_is_unbound(
    how: dict[str, Any], platform: Platform
) -> None:
    await platform.bind()
    await platform.bind(**OTHER)
    says(platform, "stays")
    answer = await platform.say("unbind", sandbox="s1", purge=True, **how)
    assert (answer.ok, inbox(platform)) == (False, ["stays"])
    assert set(platform.bound) == {BOT, OTHER["bot"]}


async def test_a_fresh_sandbox_loses_what_was_there_once_another_person_is_bound(platform: Platform) -> None:
    await platform.bind(options=FRESH)
    says(platform, "of the first one")
    await platform.say("unbind", sandbox="s1", keep_undelivered=True)
    assert inbox(platform) == ["of the first one"]
    await platform.bind(options=FRESH, **OTHER)
    assert inbox(platform) == []
    assert platform.binding(OTHER["bot"]).in_after == 1


@pytest.mark.parametrize("again", [{}, {"bot": "b9@im.bot"}], ids=["bot", "person"])
async def test_the_same_person_loses_nothing(again: dict[str, Any], platform: Platform) -> None:
    """With the same bot or another, at once or after an unbind."""
    await platform.bind(options=FRESH)
    says(platform, "mine")
    await platform.bind(options=FRESH, user=USER, **again)
    await platform.say("unbind", sandbox="s1")
    await platform.bind(options=FRESH, user=USER)
    assert inbox(platform) == ["mine"]


@pytest.mark.parametrize("options", [{}, FRESH], ids=["not-fresh", "another-is-bound"])
async def test_what_is_anothers_too_stays(options: dict[str, Any], platform: Platform) -> None:
    await platform.bind()
    says(platform, "stays")
    if not options:
        await platform.say("unbind", sandbox="s1")
    await platform.bind(options=options, **OTHER)
    assert inbox(platform) == ["stays"]


async def test_fresh_and_keep_exclude_each_other(platform: Platform) -> None:
    answer = await platform.bind(options=FRESH, keep_undelivered=True)
    assert (answer.ok, "exclude" in answer.error, platform.bound) == (False, True, {})
