"""What a bind is looked at for before it changes anything: ids, and whose token it is."""

from __future__ import annotations

import pytest

from tests.bindings.platform import BOT, TOKEN, USER, Platform

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
    assert (refused.outcome, refused.reason, said in refused.detail) == ("refused", "invalid", True)
    assert ("SECRET" in refused.detail, platform.bound) == (False, {})
    assert (await platform.bind(**fields, check=False)).outcome == "applied"
    assert platform.bench.chat.notified == [], "iLink is not asked about the token"
