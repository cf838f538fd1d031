"""Secrets at rest: each is sealed for its bot, and nothing else opens it."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from adapter.errors import Refused
from adapter.tools.seal import Sealer

BOT = "b1@im.bot"
TOKEN = "b1@im.bot:SECRET"


async def test_a_token_is_sealed_for_its_bot_and_opened_by_any_key() -> None:
    """Rotation: the first key seals, all open."""
    old, new = bytes(32), bytes([1] * 32)
    stored = Sealer((old,)).seal(BOT, TOKEN)
    assert TOKEN not in stored
    assert Sealer((new, old)).open(BOT, stored) == TOKEN
    assert Sealer((new, old)).seal(BOT, TOKEN).split(".")[1] != stored.split(".")[1]
    assert Sealer((new,)).open_given(BOT, "plain:token") == "plain:token"


@pytest.mark.parametrize(
    ("keys", "bot", "change"),
    [
        ((), BOT, lambda stored: stored),
        ((bytes([1] * 32),), BOT, lambda stored: stored),
        ((bytes(32),), "b2@im.bot", lambda stored: stored),
        ((bytes(32),), BOT, lambda stored: stored[:-8] + "AAAAAAA="),
        ((bytes(32),), BOT, lambda stored: stored[:20]),
        ((bytes(32),), BOT, lambda stored: stored.rpartition(".")[0] + ".ä"),
        ((bytes(32),), BOT, lambda stored: stored.rpartition(".")[0] + "."),
        ((bytes(32),), BOT, lambda stored: "s1."),
        ((bytes(32),), BOT, lambda stored: TOKEN),
        ((bytes(32),), BOT, lambda stored: stored.rpartition(".")[0] + "." + base64.b64encode(b"x" * 13).decode()),
    ],
    ids=[
        "no-key",
        "other-key",
        "other-bot",
        "changed",
        "cut",
        "no-base64",
        "empty",
        "only-a-mark",
        "in-clear",
        "too-short",
    ],
)
async def test_a_token_that_no_key_opens_is_refused(keys: tuple[bytes, ...], bot: str, change: Any) -> None:
    stored = change(Sealer((bytes(32),)).seal(BOT, TOKEN))
    with pytest.raises(Refused) as caught:
        Sealer(keys).open(bot, stored)
    assert caught.value.reason == "token_key"
    assert "SECRET" not in str(caught.value)
