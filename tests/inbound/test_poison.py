"""A message that makes the code raise: it alone suffers, and the others go on in order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from adapter.bridge.person import Person
from adapter.bridge.record import PersonState
from adapter.bridge.window import InboundReceived
from adapter.contract.messages import TextItem
from adapter.contract.names import H_REASON, H_SUBJECT, person_token
from adapter.ilink.translate import read_message
from adapter.ports import BusMessage, InboundMessage, PubAck
from adapter.tools.tasks import ATTEMPTS
from tests.capture import ALWAYS, WORDS, Bugs, Capture
from tests.fakes import Bench, batch, ready
from tests.inbound.pollers import USER, Poller, Replica, opened, raw, successor_of, texts

VIRTUAL_TIME = True

BAD = raw(WORDS, 2)
SUBJECT = f"wechat.inbox.s1.{person_token('s1', USER)}"

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
    assert letters(bench) == [("crashed", SUBJECT, BAD)]
    assert bench.chat.asked == ["", "b", "c"]
    assert session.person is not None
    assert session.person.state.cursor == "c"
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


async def test_a_fault_after_the_message_is_on_the_bus_makes_no_dead_letter_of_it(poller: Poller) -> None:
    bench = await ready(batch(raw("one", 1), BAD, raw("three", 3), cursor="b"))
    store, bugs = bench.bus.store, Bugs(ALWAYS)

    async def stored_all_the_same(message: BusMessage) -> PubAck:
        ack = await store(message)
        if message.stream == "in" and is_bad(message.payload):
            bugs.strike()
        return ack

    bench.bus.store = stored_all_the_same  # type: ignore[method-assign]
    poller(bench)
    await asyncio.sleep(60)
    assert texts(bench) == ["one", WORDS, "three"]
    assert letters(bench) == []
    assert bench.chat.asked == ["", "b"]


# what costs less -----------------------------------------------------------------------------------------


async def test_a_person_that_raises_as_it_takes_a_message_costs_its_window(
    poller: Poller, captured: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in the inbox, and the next owner finds it there."""
    taken = Person.state_after

    def fails(person: Person, opened: InboundReceived) -> PersonState:
        if bench.bus.found("IN"):
            raise KeyError("a bug")
        return taken(person, opened)

    bench = await ready(batch(raw("one", 1), cursor="b"))
    monkeypatch.setattr(Person, "state_after", fails)
    replica = Replica(bench)
    await asyncio.sleep(5)
    assert (texts(bench), letters(bench), bench.chat.asked) == (["one"], [], ["", "b"])
    assert len(captured.crashes()) == 1
    await replica.die()
    monkeypatch.setattr(Person, "state_after", taken)
    successor = successor_of(bench)
    successor.partition().on_delivery(successor.command("answer", id="c1", when_closed="refuse"))
    await asyncio.sleep(5)
    assert [one.outcome for one in successor.bus.receipts()] == ["accepted"]
