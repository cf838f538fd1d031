"""Quotes that name only an id: whose words they are, and whose they never may be."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from adapter.contract import FileItem, ImageItem, Inbound, Quote, TextItem
from adapter.conversation.record import SentText
from adapter.dedup import Keys
from adapter.inbound.batches import store
from adapter.inbound.cursors import acquire
from adapter.inbound.inbox import Heard, publish
from adapter.inbound.sessions import Session
from adapter.names import H_IDS
from adapter.ports import Polled, Said
from adapter.quotes import Part, Reference
from tests.fakes import Bench, settle

VIRTUAL_TIME = True

BOT, USER, OTHER = "b1@im.bot", "u1@im.wechat", "u2@im.wechat"


def says(
    text: str = "this", message: str = "1", *, quotes: str = "", part: Part | None = None, **fields: Any
) -> Said:
    """A message of the user; `quotes` is the id of another one."""
    said = Said(
        keys=Keys(message, "", "", USER, 1, text),
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


async def hear(bench: Bench, *saids: Said, sandbox: str = "s1", bot: str = BOT) -> list[Inbound]:
    """Puts messages on the bus; all that are there."""
    heard = [Heard(said, sandbox, bot, bench.clock.now_ms(), said.keys.record(0)) for said in saids]
    await publish(heard, bench.incoming())
    return bench.bus.inbound()


async def quote_of(bench: Bench, said: Said) -> Quote:
    quote = (await hear(bench, said))[-1].quote
    assert quote is not None
    return quote


async def test_a_users_own_message_is_found_in_the_inbox() -> None:
    bench = Bench()
    await hear(bench, says("hello", "41"), says("later", "42"))
    assert await quote_of(bench, says(message="43", quotes="41")) == Quote(
        id="41", text="hello", said_by="user", kind="text"
    )
    assert bench.metrics.value("quotes_total", outcome="user") == 1


async def test_a_message_of_the_same_batch_is_found() -> None:
    bench = Bench()
    quoted = says("hello", "41")
    quote = (await hear(bench, quoted, says(message="43", quotes="41")))[-1].quote
    assert quote == Quote(id="41", text="hello", said_by="user", kind="text")


async def test_an_item_of_the_same_batch_is_found_behind_another_message() -> None:
    bench = Bench()
    picture = says("", "41", items=[FileItem(name="a.pdf")], item_ids=("77",))
    other = says("hello", "42", item_ids=("78",))
    quote = (await hear(bench, picture, other, says(message="43", quotes="77")))[-1].quote
    assert quote == Quote(id="77", text="[file] a.pdf", said_by="user", kind="file")


async def test_a_message_of_another_user_in_the_same_batch_is_not_shown() -> None:
    bench = Bench()
    quote = (await hear(bench, says("secret", "41", user=OTHER), says(message="43", quotes="41")))[-1].quote
    assert quote == Quote(id="41")


async def test_nothing_is_read_for_a_message_that_quotes_nothing() -> None:
    bench = Bench()
    bench.bus.unreadable = 1
    await hear(bench, says())
    assert bench.bus.unreadable == 1


async def test_a_message_to_an_earlier_bot_of_the_user_is_found() -> None:
    bench = Bench()
    await hear(bench, says("hello", "41"), bot="b0@im.bot")
    assert (await quote_of(bench, says(message="43", quotes="41"))).text == "hello"


async def test_an_item_is_found_by_its_own_id() -> None:
    bench = Bench()
    items = [TextItem(text="look"), FileItem(name="a.pdf")]
    await hear(bench, says("look", "41", items=items, item_ids=("", "77")))
    (stored,) = bench.bus.found("IN")
    assert stored.headers[H_IDS] == "1:77"
    assert await quote_of(bench, says(message="43", quotes="77")) == Quote(
        id="77", text="[file] a.pdf", said_by="user", kind="file"
    )
    assert (await quote_of(bench, says(message="44", quotes="41"))).text == "look"


async def test_a_message_without_ids_of_its_items_has_no_such_header() -> None:
    bench = Bench()
    await hear(bench, says(item_ids=("",)))
    assert H_IDS not in bench.bus.found("IN")[0].headers


async def test_an_image_is_summed_up() -> None:
    bench = Bench()
    await hear(bench, says("", "41", items=[ImageItem()]))
    assert await quote_of(bench, says(message="43", quotes="41")) == Quote(
        id="41", text="[image]", said_by="user", kind="image"
    )


async def test_what_another_user_of_the_sandbox_wrote_is_not_shown() -> None:
    bench = Bench()
    await hear(bench, says("secret", "41", user=OTHER))
    assert await quote_of(bench, says(message="43", quotes="41")) == Quote(id="41")


async def test_what_was_said_in_another_sandbox_is_not_shown() -> None:
    bench = Bench()
    await hear(bench, says("secret", "41"), sandbox="s2")
    assert await quote_of(bench, says(message="43", quotes="41")) == Quote(id="41")
    assert bench.metrics.value("quotes_total", outcome="unknown") == 1


async def test_an_id_that_is_the_end_of_another_is_none_of_it() -> None:
    bench = Bench()
    await hear(bench, says("secret", "141"))
    assert await quote_of(bench, says(message="43", quotes="41")) == Quote(id="41")


async def test_what_was_sent_is_found() -> None:
    bench = Bench()
    bench.hears("s1", USER, sent=[SentText(id="51", kind="text", text="an answer")])
    await settle()
    assert await quote_of(bench, says(message="43", quotes="51")) == Quote(
        id="51", text="an answer", said_by="bot", kind="text"
    )


@pytest.mark.parametrize(("sandbox", "user"), [("s2", USER), ("s1", OTHER)])
async def test_what_was_sent_from_another_sandbox_or_to_another_user_is_not_shown(sandbox: str, user: str) -> None:
    bench = Bench()
    bench.hears(sandbox, user, sent=[SentText(id="51", kind="text", text="secret")])
    await settle()
    assert await quote_of(bench, says(message="43", quotes="51")) == Quote(id="51")


async def test_a_part_of_what_was_sent_is_shown() -> None:
    bench = Bench()
    bench.hears("s1", USER, sent=[SentText(id="51", kind="text", text="hello hello")])
    await settle()
    assert (await quote_of(bench, says(message="43", quotes="51", part=Part("ello", "h", 0, 1, "")))).text == "ello h"


async def test_what_cannot_be_read_now_is_asked_again() -> None:
    bench = Bench()
    await hear(bench, says("hello", "41"))
    bench.bus.unreadable = 2
    assert (await quote_of(bench, says(message="43", quotes="41"))).text == "hello"


async def test_a_quote_goes_through_a_poll() -> None:
    """From iLink's bytes to the bus, as the poller does it."""
    bench = Bench()
    await bench.bind()
    session, needs = Session(BOT), bench.incoming()
    place = await acquire(session, needs)
    assert place is not None

    def raw(number: int, text: str, **item: Any) -> bytes:
        whole = {"type": 1, "msg_id": number + 100, "text_item": {"text": text}} | item
        return msgspec.json.encode(
            {"from_user_id": USER, "message_id": number, "create_time_ms": number, "item_list": [whole]}
        )

    place = await store(session, Polled([raw(41, "hello")], "b", 1), place, needs)
    by_item = raw(42, "this", ref_msg={"message_item": {"type": 0, "msg_id": 141}})
    await store(session, Polled([by_item], "c", 1), place, needs)
    assert bench.bus.inbound()[-1].quote == Quote(id="141", text="hello", said_by="user", kind="text")
