"""Quotes that name only an id: whose words they are, and whose they never may be."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from adapter.content.dedup import MessageKeys
from adapter.content.quotes import Part, Reference
from adapter.contract.messages import FileItem, ImageItem, Inbound, Quote, TextItem, Window
from adapter.contract.names import H_IDS, H_MSG_ID
from adapter.conversation.record import SentText
from adapter.inbound.inbox import QUOTES_S, AddressedMessage, publish
from adapter.inbound.recall import MAX_SEARCHED
from adapter.ports import InboundMessage, Stored
from tests.fakes import Bench, batch, raw_message, ready, settle
from tests.inbound.pollers import polls

VIRTUAL_TIME = True

BOT, USER, OTHER = "b1@im.bot", "u1@im.wechat", "u2@im.wechat"


def says(
    text: str = "this", message: str = "1", *, quotes: str = "", part: Part | None = None, **fields: Any
) -> InboundMessage:
    """A message of the user; `quotes` is the id of another one."""
    said = InboundMessage(
        keys=MessageKeys(message, "", "", USER, 1, text),
        user=USER,
        sent_at_ms=1,
        context_token="",
        text=text,
        items=[TextItem(text=text)],
        quote=Quote(id=quotes) if quotes else None,
        echo=False,
        raw=b"{}",
        broken="",
        kind="text",
        reference=Reference((quotes,), part, "") if quotes else None,
    )
    return msgspec.structs.replace(said, **fields)


async def hear(bench: Bench, *saids: InboundMessage, sandbox: str = "s1", bot: str = BOT) -> list[Inbound]:
    """Puts messages on the bus; all that are there."""
    heard = [
        AddressedMessage(said, sandbox, bot, bench.clock.now_ms(), said.keys.id_for(bot), "1.0") for said in saids
    ]
    await publish(heard, bench.dispatch_deps().publishing)
    return bench.bus.inbound()


async def quote_of(bench: Bench, said: InboundMessage) -> Quote:
    quote = (await hear(bench, said))[-1].quote
    assert quote is not None
    return quote


async def test_a_users_own_message_is_found_in_the_inbox(bench: Bench) -> None:
    await hear(bench, says("hello", "41"), says("later", "42"))
    assert await quote_of(bench, says(message="43", quotes="41")) == Quote(
        id="41", text="hello", said_by="user", kind="text"
    )
    assert bench.metrics.value("quotes_total", outcome="user") == 1


async def test_a_message_of_the_same_batch_is_found(bench: Bench) -> None:
    quoted = says("hello", "41")
    quote = (await hear(bench, quoted, says(message="43", quotes="41")))[-1].quote
    assert quote == Quote(id="41", text="hello", said_by="user", kind="text")


async def test_an_item_of_the_same_batch_is_found_behind_another_message(bench: Bench) -> None:
    picture = says("", "41", items=[FileItem(name="a.pdf")], item_ids=("77",))
    other = says("hello", "42", item_ids=("78",))
    quote = (await hear(bench, picture, other, says(message="43", quotes="77")))[-1].quote
    assert quote == Quote(id="77", text="[file] a.pdf", said_by="user", kind="file")


async def test_a_message_of_another_user_in_the_same_batch_is_not_shown(bench: Bench) -> None:
    quote = (await hear(bench, says("secret", "41", user=OTHER), says(message="43", quotes="41")))[-1].quote
    assert quote == Quote(id="41")


async def test_nothing_is_read_for_a_message_that_quotes_nothing(bench: Bench) -> None:
    bench.bus.unreadable = 1
    await hear(bench, says())
    assert bench.bus.unreadable == 1


async def test_a_message_to_an_earlier_bot_of_the_user_is_found(bench: Bench) -> None:
    await hear(bench, says("hello", "41"), bot="b0@im.bot")
    assert (await quote_of(bench, says(message="43", quotes="41"))).text == "hello"


async def test_an_item_is_found_by_its_own_id(bench: Bench) -> None:
    items = [TextItem(text="look"), FileItem(name="a.pdf")]
    await hear(bench, says("look", "41", items=items, item_ids=("", "77")))
    (stored,) = bench.bus.found("IN")
    assert stored.headers[H_IDS] == "1:77"
    assert await quote_of(bench, says(message="43", quotes="77")) == Quote(
        id="77", text="[file] a.pdf", said_by="user", kind="file"
    )
    assert (await quote_of(bench, says(message="44", quotes="41"))).text == "look"


async def test_a_message_without_ids_of_its_items_has_no_such_header(bench: Bench) -> None:
    await hear(bench, says(item_ids=("",)))
    assert H_IDS not in bench.bus.found("IN")[0].headers


async def test_an_image_is_summed_up(bench: Bench) -> None:
    await hear(bench, says("", "41", items=[ImageItem()]))
    assert await quote_of(bench, says(message="43", quotes="41")) == Quote(
        id="41", text="[image]", said_by="user", kind="image"
    )


async def test_what_another_user_of_the_sandbox_wrote_is_not_shown(bench: Bench) -> None:
    await hear(bench, says("secret", "41", user=OTHER))
    assert await quote_of(bench, says(message="43", quotes="41")) == Quote(id="41")


async def test_what_was_said_in_another_sandbox_is_not_shown(bench: Bench) -> None:
    await hear(bench, says("secret", "41"), sandbox="s2")
    assert await quote_of(bench, says(message="43", quotes="41")) == Quote(id="41")
    assert bench.metrics.value("quotes_total", outcome="unknown") == 1


async def test_an_id_that_is_the_end_of_another_is_none_of_it(bench: Bench) -> None:
    await hear(bench, says("secret", "141"))
    assert await quote_of(bench, says(message="43", quotes="41")) == Quote(id="41")


async def test_what_was_sent_is_found(bench: Bench) -> None:
    bench.hears("s1", USER, sent=[SentText(id="51", kind="text", text="an answer")])
    await settle()
    assert await quote_of(bench, says(message="43", quotes="51")) == Quote(
        id="51", text="an answer", said_by="bot", kind="text"
    )


@pytest.mark.parametrize(("sandbox", "user"), [("s2", USER), ("s1", OTHER)])
async def test_what_was_sent_from_another_sandbox_or_to_another_user_is_not_shown(
    sandbox: str, user: str, bench: Bench
) -> None:
    bench.hears(sandbox, user, sent=[SentText(id="51", kind="text", text="secret")])
    await settle()
    assert await quote_of(bench, says(message="43", quotes="51")) == Quote(id="51")


async def test_a_part_of_what_was_sent_is_shown(bench: Bench) -> None:
    bench.hears("s1", USER, sent=[SentText(id="51", kind="text", text="hello hello")])
    await settle()
    assert (await quote_of(bench, says(message="43", quotes="51", part=Part("ello", "h", 0, 1, "")))).text == "ello h"


async def test_what_cannot_be_read_now_is_asked_again(bench: Bench) -> None:
    await hear(bench, says("hello", "41"))
    bench.bus.unreadable = 2
    assert (await quote_of(bench, says(message="43", quotes="41"))).text == "hello"


@pytest.mark.parametrize("nonsense", [b"nonsense", b'{"sandbox":"\xff"}'])
async def test_odd_records_cost_a_quote_its_words_and_nothing_else(nonsense: bytes, bench: Bench) -> None:
    bench.bus.put("wechat.inbox.s1", nonsense, {H_MSG_ID: f"in:{BOT}:m51"}, "in")
    heard = AddressedMessage(says(message="43", quotes="51"), "s1", BOT, 1, "i", "1.0")
    await publish([heard], bench.dispatch_deps().publishing)
    quote = msgspec.json.decode(bench.bus.found("IN")[-1].data, type=Inbound).quote
    assert quote == Quote(id="51")


async def test_a_quote_goes_through_a_poll() -> None:
    """From iLink's bytes to the bus."""
    by_item = {"type": 1, "text_item": {"text": "this"}, "ref_msg": {"message_item": {"type": 0, "msg_id": 141}}}
    quoted = raw_message(41, {"type": 1, "msg_id": 141, "text_item": {"text": "hello"}})
    bench = await ready(batch(quoted), batch(raw_message(42, by_item), cursor="c"))
    await polls(bench)
    assert bench.bus.inbound()[-1].quote == Quote(id="141", text="hello", said_by="user", kind="text")


# bounds --------------------------------------------------------------------------------------------------


def fill(bench: Bench, count: int, sandbox: str = "s1") -> None:
    """Messages of the user that nobody quotes."""
    for number in range(count):
        inbound = Inbound(
            id=f"in:{BOT}:mx{number}", sandbox=sandbox, bot=BOT, user=USER, sent_at_ms=1, received_at_ms=1, text="x",
            items=[TextItem(text="x")], window=Window(),
        )  # fmt: skip
        bench.bus.put(f"wechat.inbox.{sandbox}", msgspec.json.encode(inbound), {H_MSG_ID: inbound.id}, "in")


async def test_a_quote_reads_no_more_than_so_many_messages(bench: Bench) -> None:
    """The newest hours first, so that what was said lately is found in any inbox."""
    fill(bench, 10_000)
    await asyncio.sleep(2 * 3600)
    await hear(bench, says("hello", "41"))
    read = bench.bus.read_back
    assert (await quote_of(bench, says(message="43", quotes="41"))).text == "hello"
    assert bench.bus.read_back - read < 10
    assert await quote_of(bench, says(message="44", quotes="40")) == Quote(id="40")
    assert bench.bus.read_back - read <= MAX_SEARCHED + 20


@pytest.mark.parametrize("hours", [0, 2, 12, 60])
async def test_a_quote_of_any_age_is_found_in_an_inbox_of_a_usual_size(hours: int, bench: Bench) -> None:
    for _ in range(3):
        fill(bench, 100)
        await asyncio.sleep(4 * 3600)
    await hear(bench, says("hello", "41"))
    for _ in range(3):
        await asyncio.sleep(hours * 1200)
        fill(bench, 100)
    assert (await quote_of(bench, says(message="43", quotes="41"))).text == "hello"


def hang_reads(bench: Bench, subject: str) -> None:
    """The history never answers for one subject."""
    read = bench.bus.read

    async def hanging(stream: str, of: str, **where: Any) -> AsyncIterator[Stored]:
        if of == subject:
            await asyncio.Event().wait()
        async for stored in read(stream, of, **where):
            yield stored

    bench.bus.read = hanging  # type: ignore[method-assign, assignment]


async def test_a_slow_history_costs_a_quote_its_words_and_its_bot_a_moment(bench: Bench) -> None:
    """All quotes of an answer together; each says what iLink tells."""
    hang_reads(bench, "wechat.inbox.s1")
    began = asyncio.get_running_loop().time()
    quoting = [says(f"t{number}", str(number + 1), quotes="999") for number in range(20)]
    told = await hear(bench, *quoting, says("last", "50"))
    assert [one.text for one in told] == [*(f"t{number}" for number in range(20)), "last"]
    assert {one.quote for one in told[:20]} == {Quote(id="999")}
    assert asyncio.get_running_loop().time() - began <= QUOTES_S + 1
    assert bench.metrics.value("quotes_total", outcome="unknown") == 20


async def test_a_slow_history_of_one_sandbox_holds_up_no_other_bots(bench: Bench) -> None:
    hang_reads(bench, "wechat.inbox.s1")
    slow = [asyncio.create_task(hear(bench, says(message=str(number), quotes="999"))) for number in range(1, 10)]
    await settle()
    await hear(bench, says("other", "60"), sandbox="s2", bot="b2@im.bot")
    assert [one.text for one in bench.bus.inbound()] == ["other"], "who quotes nothing does not wait"
    began = asyncio.get_running_loop().time()
    (quote,) = [
        one.quote
        for one in await hear(bench, says("this", "61", quotes="60"), sandbox="s2", bot="b2@im.bot")
        if one.id.endswith("61")
    ]
    assert asyncio.get_running_loop().time() - began <= QUOTES_S + 1
    assert quote is not None
    await asyncio.gather(*slow)
    assert len(bench.bus.inbound()) == 11


async def test_an_outage_of_the_history_holds_up_a_quote_for_a_moment(bench: Bench) -> None:
    await hear(bench, says("hello", "41"))
    bench.bus.unreadable = 10**6
    began = asyncio.get_running_loop().time()
    await hear(bench, says(message="43", quotes="41"))
    assert asyncio.get_running_loop().time() - began <= QUOTES_S + 1
    bench.bus.unreadable = 0
    assert bench.bus.inbound()[-1].quote == Quote(id="41")
