"""A message that makes the code raise: it alone becomes a dead letter, and the others go on in order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from adapter.contract.messages import TextItem
from adapter.contract.names import H_REASON, H_SUBJECT
from adapter.contract.records import Binding
from adapter.conversation.actor import ConversationActor
from adapter.ilink.translate import read_message
from adapter.inbound.bot_poller import BotPoller
from adapter.inbound.poller import run_poller
from adapter.ports import InboundMessage, Message, Polled, PubAck
from tests.capture import ALWAYS, WORDS, Bugs, Capture
from tests.fakes import Bench, Failing, FakeChat, batch, raw_message, ready
from tests.inbound.downloads import PNG, image, said
from tests.inbound.pollers import Poller, raw, tended, texts

VIRTUAL_TIME = True

BAD = raw(WORDS, 2)

Fault = Callable[[Bench, int], dict[str, Any]]
"""Makes a port raise so many times for the message at fault, and returns changes of `Bench.inbound_deps`."""


def is_bad(payload: bytes) -> bool:
    return WORDS.encode() in payload


def reading(bench: Bench, times: int) -> dict[str, Any]:
    bugs = Bugs(times)

    def read(data: bytes) -> InboundMessage:
        if is_bad(data):
            bugs.strike()
        return read_message(data)

    return {"read_message": read}


def telling_the_conversation(bench: Bench, times: int) -> dict[str, Any]:
    """Of another user of the bot, so that the fault is this message's alone."""
    bugs, hear = Bugs(times), bench.conversations.on_inbound

    async def fails(binding: Binding, user: str, **heard: Any) -> ConversationActor:
        if "u2" in user:
            bugs.strike()
        return await hear(binding, user, **heard)

    bench.conversations.on_inbound = fails  # type: ignore[method-assign]
    return {}


def preparing(bench: Bench, times: int) -> dict[str, Any]:
    """Its words are what no encoder takes."""
    bugs = Bugs(times)

    def read(data: bytes) -> InboundMessage:
        found = read_message(data)
        if is_bad(data) and bugs.left > 0:
            bugs.left -= 1
            return msgspec.structs.replace(found, items=[TextItem(text=f"{WORDS}\ud83d")])
        return found

    return {"read_message": read}


def publishing(bench: Bench, times: int) -> dict[str, Any]:
    bugs = Bugs(times)

    async def fails(message: Message) -> None:
        if message.stream == "in" and is_bad(message.payload):
            bugs.strike()

    bench.bus.on_publish = fails
    return {}


FAULTS: list[Fault] = [reading, telling_the_conversation, preparing, publishing]


def bad_of(fault: Fault) -> bytes:
    return raw(WORDS, 2, from_user_id="u2@im.wechat") if fault is telling_the_conversation else BAD


def dead(bench: Bench) -> list[tuple[str, str, bytes]]:
    return [(stored.headers[H_REASON], stored.headers[H_SUBJECT], stored.data) for stored in bench.bus.found("DEAD")]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
async def test_the_message_at_fault_alone_becomes_a_dead_letter(
    fault: Fault, poller: Poller, captured: Capture
) -> None:
    bad = bad_of(fault)
    bench = await ready(batch(raw("one", 1), bad, raw("three", 3), cursor="b"), batch(raw("four", 4), cursor="c"))
    poller(bench, **fault(bench, ALWAYS))
    await asyncio.sleep(60)
    assert texts(bench) == ["one", "three", "four"]
    assert dead(bench) == [("crashed", "wechat.inbox.s1", bad)]
    assert bench.chat.asked == ["", "b", "c"]
    assert (await bench.last_record()).cursor == "c"
    kinds = ("unsupported", "text")
    counted = [bench.metrics.value("inbound_messages_total", kind=kind, outcome="dead_lettered") for kind in kinds]
    assert sum(counted) == 1
    assert all(".py" in line["exception"] for line in captured.crashes())
    assert 3 <= len(captured.crashes()) <= 4  # once for several, three times for it alone
    assert WORDS.encode() not in captured.getvalue()


@pytest.mark.parametrize("fault", [reading, telling_the_conversation, publishing], ids=lambda fault: fault.__name__)
async def test_what_goes_through_at_the_second_try_is_told_once_and_in_its_place(
    fault: Fault, poller: Poller
) -> None:
    bench = await ready(batch(raw("one", 1), bad_of(fault), raw("three", 3), cursor="b"))
    poller(bench, **fault(bench, 1))
    await asyncio.sleep(60)
    assert texts(bench) == ["one", WORDS, "three"]
    assert dead(bench) == []
    assert bench.chat.asked == ["", "b"]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
async def test_ilinks_repeats_of_the_others_are_still_known(fault: Fault, poller: Poller) -> None:
    """And the server has forgotten their ids."""
    bench = await ready(batch(raw("one", 1), bad_of(fault), raw("three", 3), cursor="b"))

    def repeats() -> Polled:
        bench.bus.forget_ids()
        return batch(raw("one", 1), raw("three", 3), cursor="c")

    bench.chat.polls += [None, repeats]
    poller(bench, **fault(bench, ALWAYS))
    await asyncio.sleep(60)
    assert texts(bench) == ["one", "three"]
    assert (await bench.last_record()).cursor == "c"


async def test_a_fault_after_the_message_is_on_the_bus_makes_no_dead_letter_of_it(poller: Poller) -> None:
    bench = await ready(batch(raw("one", 1), BAD, raw("three", 3), cursor="b"))
    store, bugs = bench.bus.store, Bugs(ALWAYS)

    def stored_all_the_same(message: Message) -> PubAck:
        ack = store(message)
        if message.stream == "in" and is_bad(message.payload):
            bugs.strike()
        return ack

    bench.bus.store = stored_all_the_same  # type: ignore[method-assign]
    poller(bench)
    await asyncio.sleep(60)
    assert texts(bench) == ["one", WORDS, "three"]
    assert dead(bench) == []
    assert bench.chat.asked == ["", "b"]


async def test_another_bot_is_not_held_up_meanwhile(bench: Bench) -> None:
    await bench.bind()
    await bench.bind("s2", "b2@im.bot", "u2@im.wechat")
    bench.chat.polls.append(batch(BAD, cursor="b"))
    session, task = tended(bench, **publishing(bench, ALWAYS))
    while not bench.clock.slept:
        await asyncio.sleep(0.01)  # until the first pause between two tries
    began = bench.clock.monotonic()
    other = Bench(bench)
    chat = FakeChat(bench.clock)
    chat.polls.append(batch(raw("hello", 7, from_user_id="u2@im.wechat"), cursor="b"))
    second = BotPoller("b2@im.bot")
    twin = asyncio.get_running_loop().create_task(run_poller(second, other.inbound_deps(chat=chat)))
    while not texts(bench):
        await asyncio.sleep(0.01)
    assert bench.clock.monotonic() - began < 0.5
    assert dead(bench) == []
    await asyncio.sleep(10)
    assert [reason for reason, _, _ in dead(bench)] == ["crashed"]
    for one, ended in ((session, task), (second, twin)):
        one.stop(immediately=True)
        await ended


# what waits for media ------------------------------------------------------------------------------------


def bad_image(number: int) -> bytes:
    item = {"type": 2, "image_item": {"media": {"encrypt_query_param": f"p{number}"}}}
    return raw_message(number, item, {"type": 1, "text_item": {"text": WORDS}})


async def test_a_message_with_media_at_fault_alone_becomes_a_dead_letter(poller: Poller, captured: Capture) -> None:
    bench = await ready(batch(image(1), bad_image(2), image(3), raw("four", 4), cursor="b"))
    for number in (1, 2, 3):
        bench.cdn.has(f"p{number}", PNG)
    poller(bench, **publishing(bench, ALWAYS))
    await asyncio.sleep(60)
    assert said(bench) == ["+", "+", "four"]
    assert dead(bench) == [("crashed", "wechat.inbox.s1", bad_image(2))]
    assert 3 <= len(captured.crashes()) <= 4
    assert WORDS.encode() not in captured.getvalue()


async def test_a_message_with_media_that_goes_through_at_the_second_try_is_told(poller: Poller) -> None:
    bench = await ready(batch(image(1), bad_image(2), image(3), cursor="b"))
    for number in (1, 2, 3):
        bench.cdn.has(f"p{number}", PNG)
    poller(bench, **publishing(bench, 1))
    await asyncio.sleep(60)
    assert said(bench) == ["+", f"+ {WORDS}", "+"]
    assert dead(bench) == []


async def test_a_download_that_crashes_once_is_tried_again(poller: Poller) -> None:
    bench = await ready(batch(image(1), cursor="b"))
    bench.cdn.has("p1", PNG)
    bench.objects.on_put = Failing(1, RuntimeError("a bug"))
    poller(bench)
    await asyncio.sleep(60)
    assert said(bench) == ["+"]
