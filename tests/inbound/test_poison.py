"""A message that makes the code raise: it alone suffers, and the others go on in order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from adapter.contract.messages import TextItem, Window
from adapter.contract.names import H_REASON, H_SUBJECT
from adapter.ilink.translate import read_message
from adapter.kit.persist import ATTEMPTS
from adapter.outbound import window
from adapter.outbound.conversation import Conversation
from adapter.outbound.shard import Shard
from adapter.outbound.window import InboundReceived
from adapter.ports import BusMessage, InboundMessage, Polled, PubAck
from tests.capture import ALWAYS, WORDS, Bugs, Capture
from tests.fakes import Bench, FakeChat, batch, raw_message, ready
from tests.inbound.pollers import Poller, Replica, opened, raw, start_poller, successor_of, texts

VIRTUAL_TIME = True

BAD = raw(WORDS, 2)

Fault = Callable[[Bench, int], dict[str, Any]]
"""Makes a part raise so many times for the message at fault, and returns changes of `Bench.poll_deps`."""


def is_bad(payload: bytes) -> bool:
    return WORDS.encode() in payload


# what costs the message ----------------------------------------------------------------------------------


def reading(bench: Bench, times: int) -> dict[str, Any]:
    """The translator raises."""
    bugs = Bugs(times)

    def read(data: bytes) -> InboundMessage:
        if is_bad(data):
            bugs.strike()
        return read_message(data)

    return {"read_message": read}


def building(bench: Bench, times: int) -> dict[str, Any]:
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

    async def fails(message: BusMessage) -> None:
        if message.stream == "in" and is_bad(message.payload):
            bugs.strike()

    bench.bus.on_publish = fails
    return {}


FAULTS: list[Fault] = [reading, building, publishing]


def letters(bench: Bench) -> list[tuple[str, str, bytes]]:
    return [
        (letter.headers[H_REASON], letter.headers[H_SUBJECT], opened(bench, letter))
        for letter in bench.bus.found("DEAD")
    ]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
async def test_the_message_at_fault_alone_becomes_a_dead_letter(
    fault: Fault, poller: Poller, captured: Capture
) -> None:
    bench = await ready(batch(raw("one", 1), BAD, raw("three", 3), cursor="b"), batch(raw("four", 4), cursor="c"))
    session = poller(bench, **fault(bench, ALWAYS))
    await asyncio.sleep(60)
    assert texts(bench) == ["one", "three", "four"]
    assert letters(bench) == [("crashed", "wechat.inbox.s1", BAD)]
    assert bench.chat.asked == ["", "b", "c"]
    assert session.checkpoint is not None
    assert session.checkpoint.cursor == "c"
    kinds = ("unsupported", "text")
    counted = [bench.metrics.value("inbound_messages_total", kind=kind, outcome="dead_lettered") for kind in kinds]
    assert sum(counted) == 1
    assert all(".py" in line["exception"] for line in captured.crashes())
    assert len(captured.crashes()) <= 2 * ATTEMPTS  # of a publish for several, then for it alone
    assert captured.crashes()
    assert WORDS.encode() not in captured.getvalue()


async def test_what_succeeds_at_the_second_try_is_stored_once_and_in_its_place(poller: Poller) -> None:
    bench = await ready(batch(raw("one", 1), BAD, raw("three", 3), cursor="b"))
    poller(bench, **publishing(bench, 1))
    await asyncio.sleep(60)
    assert texts(bench) == ["one", WORDS, "three"]
    assert letters(bench) == []
    assert bench.chat.asked == ["", "b"]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
async def test_ilinks_repeats_of_the_others_are_still_known(fault: Fault, poller: Poller) -> None:
    """And the server has forgotten their ids."""
    bench = await ready(batch(raw("one", 1), BAD, raw("three", 3), cursor="b"))

    def repeats() -> Polled:
        bench.bus.forget_ids()
        return batch(raw("one", 1), raw("three", 3), cursor="c")

    bench.chat.polls += [None, repeats]
    poller(bench, **fault(bench, ALWAYS))
    await asyncio.sleep(60)
    assert (texts(bench), bench.chat.asked[-1]) == (["one", "three"], "c")


async def test_a_fault_after_the_message_is_on_the_bus_makes_no_dead_letter_of_it(poller: Poller) -> None:
    bench = await ready(batch(raw("one", 1), BAD, raw("three", 3), cursor="b"))
    store, bugs = bench.bus.store, Bugs(ALWAYS)

    def stored_all_the_same(message: BusMessage) -> PubAck:
        ack = store(message)
        if message.stream == "in" and is_bad(message.payload):
            bugs.strike()
        return ack

    bench.bus.store = stored_all_the_same  # type: ignore[method-assign]
    poller(bench)
    await asyncio.sleep(60)
    assert texts(bench) == ["one", WORDS, "three"]
    assert letters(bench) == []
    assert bench.chat.asked == ["", "b"]


async def test_a_dead_letter_is_stored_before_the_next_poll(poller: Poller) -> None:
    """iLink forgets the message with it."""
    bench = await ready(batch(BAD, cursor="b"))
    gate = asyncio.Event()

    async def wait(message: BusMessage) -> None:
        if message.stream == "dead":
            await gate.wait()

    bench.bus.on_publish = wait
    poller(bench, **reading(bench, ALWAYS))
    await asyncio.sleep(60)
    assert bench.chat.asked == [""]
    gate.set()
    await asyncio.sleep(1)
    assert (bench.chat.asked, len(letters(bench))) == (["", "b"], 1)


async def test_another_bot_is_not_delayed_meanwhile(bench: Bench) -> None:
    await bench.bind()
    await bench.bind("s2", "b2@im.bot", "u2@im.wechat")
    bench.chat.polls.append(batch(BAD, cursor="b"))
    gate = asyncio.Event()

    async def fails(message: BusMessage) -> None:
        if message.stream == "dead":
            await gate.wait()
        if message.stream == "in" and is_bad(message.payload):
            raise RuntimeError("a bug")

    bench.bus.on_publish = fails
    session, task = start_poller(bench)
    await asyncio.sleep(1)
    chat = FakeChat(bench.clock)
    chat.polls.append(batch(raw("hello", 7, from_user_id="u2@im.wechat"), cursor="b"))
    second = Bench(bench).new_poller("b2@im.bot", chat=chat)
    twin = asyncio.get_running_loop().create_task(second.run())
    await asyncio.sleep(0.5)
    assert (texts(bench), letters(bench)) == (["hello"], [])
    gate.set()
    await asyncio.sleep(10)
    assert [reason for reason, _, _ in letters(bench)] == ["crashed"]
    for one, ended in ((session, task), (second, twin)):
        one.stop(immediately=True)
        await ended


async def test_a_message_with_media_at_fault_alone_becomes_a_dead_letter(poller: Poller, captured: Capture) -> None:
    def image(number: int, text: str) -> bytes:
        item = {"type": 2, "image_item": {"media": {"encrypt_query_param": f"p{number}"}}}
        return raw_message(number, item, {"type": 1, "text_item": {"text": text}})

    bench = await ready(batch(image(1, "one"), bad := image(2, WORDS), image(3, "three"), cursor="b"))
    poller(bench, **publishing(bench, ALWAYS))
    await asyncio.sleep(60)
    assert texts(bench) == ["one", "three"]
    assert letters(bench) == [("crashed", "wechat.inbox.s1", bad)]
    assert WORDS.encode() not in captured.getvalue()


# what costs less -----------------------------------------------------------------------------------------


async def test_a_window_that_raises_costs_the_window_in_the_message(
    poller: Poller, captured: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    visible_window, strikes = window.visible_window, Bugs(1)

    def fails(*args: Any) -> Any:
        strikes.strike()
        return visible_window(*args)

    monkeypatch.setattr(window, "visible_window", fails)
    bench = await ready(batch(raw("one", 1), raw("two", 2), cursor="b"))
    poller(bench)
    await asyncio.sleep(5)
    assert [(one.text, one.window == Window()) for one in bench.bus.inbound()] == [("one", True), ("two", False)]
    assert (letters(bench), bench.chat.asked, len(captured.crashes())) == ([], ["", "b"], 1)
    assert bench.record().token == "token-2"


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyError("a bug")], ids=["RuntimeError", "KeyError"])
async def test_a_conversation_that_raises_as_it_takes_a_message_costs_its_window(
    error: Exception, poller: Poller, captured: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in the inbox, and the next owner's conversation finds it there."""
    taken = Conversation.on_inbound

    def fails(conversation: Conversation, inbound: InboundReceived) -> None:
        if inbound.message.endswith("001"):
            raise error
        taken(conversation, inbound)

    monkeypatch.setattr(Conversation, "on_inbound", fails)
    bench = await ready(batch(raw("one", 1), cursor="b"))
    replica = Replica(bench)
    await asyncio.sleep(5)
    assert (texts(bench), letters(bench), bench.chat.asked) == (["one"], [], ["", "b"])
    assert len(captured.crashes()) == 1
    await replica.die()
    monkeypatch.setattr(Conversation, "on_inbound", taken)
    successor = successor_of(bench)
    successor.shard().on_delivery(successor.command("answer", id="c1", when_closed="refuse"))
    await asyncio.sleep(5)
    assert [one.outcome for one in successor.bus.receipts()] == ["accepted"]


async def test_a_conversation_that_cannot_be_opened_costs_its_window(
    poller: Poller, captured: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another user of the bot, whose own user goes on."""
    opened = Shard.conversation

    async def fails(self: Shard, sandbox: str, user: str, bot: str) -> Conversation:
        if "u2" in user:
            raise RuntimeError(f"a bug over {WORDS}")
        return await opened(self, sandbox, user, bot)

    monkeypatch.setattr(Shard, "conversation", fails)
    theirs = raw(WORDS, 2, from_user_id="u2@im.wechat")
    bench = await ready(batch(raw("one", 1), theirs, raw("three", 3), cursor="b"))
    poller(bench)
    await asyncio.sleep(60)
    assert (texts(bench), letters(bench), bench.chat.asked) == (["one", WORDS, "three"], [], ["", "b"])
    assert bench.record().token == "token-3"
    assert len(captured.crashes()) == ATTEMPTS
    assert WORDS.encode() not in captured.getvalue()


async def test_a_record_that_only_a_newer_replica_knows_costs_the_window(poller: Poller) -> None:
    """It is left alone; the message goes on."""
    bench = await ready(batch(raw("one", 1), cursor="b"))
    bench.hears(newer=True)
    (before,) = bench.conversation_bucket.entries.values()
    poller(bench)
    await asyncio.sleep(60)
    assert (texts(bench), letters(bench), bench.chat.asked) == (["one"], [], ["", "b"])
    assert list(bench.conversation_bucket.entries.values()) == [before]
