"""Quotes that name only an id: whose words they are, and whose they never may be."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from adapter.content.dedup import MessageKeys
from adapter.content.quotes import Part, Reference
from adapter.contract.messages import Inbound, Quote, TextItem
from adapter.conversation.record import SentText
from adapter.inbound.inbox import AddressedMessage, publish
from adapter.ports import InboundMessage
from tests.fakes import Bench, settle

VIRTUAL_TIME = True

BOT, USER, OTHER = "b1@im.bot", "u1@im.wechat", "u2@im.wechat"


def says(message: str = "1", *, quotes: str = "", part: Part | None = None, **fields: Any) -> InboundMessage:
    """A message of the user; `quotes` is the id of another one."""
    said = InboundMessage(
        keys=MessageKeys(message, "", "", USER, 1, "this"),
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


async def hear(bench: Bench, *saids: InboundMessage) -> list[Inbound]:
    """Puts messages on the bus; all that are there."""
    heard = [AddressedMessage(said, "s1", BOT, bench.clock.now_ms(), said.keys.id_for(BOT), "1.0") for said in saids]
    await publish(heard, bench.dispatch_deps().publishing)
    return bench.bus.inbound()


async def quote_of(bench: Bench, said: InboundMessage) -> Quote:
    quote = (await hear(bench, said))[-1].quote
    assert quote is not None
    return quote


async def test_what_was_sent_is_found(bench: Bench) -> None:
    bench.hears("s1", USER, sent=[SentText(id="51", kind="text", text="an answer")])
    await settle()
    assert await quote_of(bench, says("43", quotes="51")) == Quote(
        id="51", text="an answer", said_by="bot", kind="text"
    )


@pytest.mark.parametrize(("sandbox", "user"), [("s2", USER), ("s1", OTHER)])
async def test_what_was_sent_from_another_sandbox_or_to_another_user_is_not_shown(
    sandbox: str, user: str, bench: Bench
) -> None:
    bench.hears(sandbox, user, sent=[SentText(id="51", kind="text", text="secret")])
    await settle()
    assert await quote_of(bench, says("43", quotes="51")) == Quote(id="51")


async def test_a_part_of_what_was_sent_is_shown(bench: Bench) -> None:
    bench.hears("s1", USER, sent=[SentText(id="51", kind="text", text="hello hello")])
    await settle()
    assert (await quote_of(bench, says("43", quotes="51", part=Part("ello", "h", 0, 1, "")))).text == "ello h"


async def test_the_inbox_is_not_searched(bench: Bench) -> None:
    await hear(bench, says("41"))
    bench.bus.unreadable = 10**6
    assert await quote_of(bench, says("43", quotes="41")) == Quote(id="41")
    assert bench.bus.unreadable == 10**6
