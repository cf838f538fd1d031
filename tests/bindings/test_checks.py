"""What a bind is looked at for before it changes anything: ids, and whose token it is."""

from __future__ import annotations

import pytest

from tests.bindings.test_control import BOT, TOKEN, USER, Platform

VIRTUAL_TIME = True


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"bot": USER}, "@im.bot"),
        ({"bot": "b1"}, "@im.bot"),
        ({"user": BOT}, "@im.wechat"),
        ({"user": "u1"}, "@im.wechat"),
        ({"bot_token": "b2@im.bot:x"}, "another bot's"),
    ],
)
async def test_an_impossible_bot_user_or_token_is_refused_unless_it_is_bound_unchecked(
    fields: dict[str, str], said: str, platform: Platform
) -> None:
    fields = {"bot": BOT, "bot_token": TOKEN, **fields}
    refused = await platform.bind(**fields)
    assert (refused.ok, said in refused.error, platform.bound) == (False, True, {})
    assert "SECRET" not in refused.error
    assert (await platform.bind(**fields, check=False)).ok
    assert platform.bench.chat.notified == [], "iLink is not asked about the token"


async def test_a_bot_that_moves_without_naming_its_user_keeps_it(platform: Platform) -> None:
    await platform.bind()
    assert (await platform.bind(sandbox="s2", user=None)).moved_from == "s1"
    assert platform.binding().user == USER


async def test_a_bind_says_from_where_it_has_moved_the_bot(platform: Platform) -> None:
    assert (await platform.bind()).moved_from == ""
    assert (await platform.bind(sandbox="s2")).moved_from == "s1"
    assert (await platform.bind(sandbox="s2", id="again")).moved_from == ""
