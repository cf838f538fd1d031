"""Quotes that name only an id: whose words they are, and whose they never may be."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from adapter.bridge.record import SentText
from adapter.contract.messages import Inbound, Quote, TextItem
from adapter.contract.quotes import Part, Reference
from adapter.contract.repeats import MessageKeys
from adapter.ports import InboundMessage
from tests.fakes import Bench, batch
from tests.inbound.pollers import polls

VIRTUAL_TIME = True

BOT, USER, OTHER = "b1@im.bot", "u1@im.wechat", "u2@im.wechat"


def says(message: str = "1", *, quotes: str = "", part: Part | None = None, **fields: Any) -> InboundMessage:
    """A message of the user; `quotes` is the id of another one."""
    said = InboundMessage(
        keys=MessageKeys(message, "", "", USER, 1, message),
        user=USER,
        sent_at_ms=1,
        context_token="",
        text="this",
        items=[TextItem(text="this")],
        quote=Quote(id=quotes) if quotes else None,
        echo=False,
        raw=b"{}",
        broken="",
        kind="text",
        reference=Reference((quotes,), part, "") if quotes else None,
    )
    return msgspec.structs.replace(said, **fields)


async def receive(bench: Bench, *saids: InboundMessage) -> list[Inbound]:
    """Polls messages of the bot's user; all that are in the inbox."""
    if bench.bindings.get(BOT) is None:
        await bench.bind()
    by_raw = {str(number).encode(): said for number, said in enumerate(saids)}
    bench.chat.polls.append(batch(*by_raw))
    await polls(bench, read_message=by_raw.__getitem__)
    return bench.bus.inbound()


async def quote_of(bench: Bench, said: InboundMessage) -> Quote:
    quote = (await receive(bench, said))[-1].quote
    assert quote is not None
    return quote


async def test_what_was_sent_is_found(bench: Bench) -> None:
    bench.hears("s1", USER, sent=[SentText(id="51", kind="text", text="an answer")])
    assert await quote_of(bench, says("43", quotes="51")) == Quote(
        id="51", text="an answer", said_by="bot", kind="text"
    )


@pytest.mark.parametrize(("sandbox", "user"), [("s2", USER), ("s1", OTHER)])
async def test_what_was_sent_from_another_sandbox_or_to_another_user_is_not_shown(
    sandbox: str, user: str, bench: Bench
) -> None:
    bench.hears(sandbox, user, sent=[SentText(id="51", kind="text", text="secret")])
    assert await quote_of(bench, says("43", quotes="51")) == Quote(id="51")


async def test_a_part_of_what_was_sent_is_shown(bench: Bench) -> None:
    bench.hears("s1", USER, sent=[SentText(id="51", kind="text", text="hello hello")])
    assert (await quote_of(bench, says("43", quotes="51", part=Part("ello", "h", 0, 1, "")))).text == "ello h"


async def test_the_inbox_is_not_searched(bench: Bench) -> None:
    received = await receive(bench, says("41"), says("43", quotes="41"))
    assert received[1].quote == Quote(id="41")
    assert bench.bus.read_back == 0
