"""What is stored of a person: the record is written by sends alone, and nothing of it is read in vain."""

from __future__ import annotations

import asyncio

import pytest
from structlog.testing import capture_logs

from adapter.bridge.record import SentText
from adapter.contract.names import person_token
from tests.fakes import Bench
from tests.newer import made_newer
from tests.outbound.partitions import BOT, USER, outcomes, ready, user_writes

VIRTUAL_TIME = True

KEY = f"s1.{person_token('s1', USER)}"
AGAIN = "b2@im.bot"


async def test_nothing_is_written_for_a_person_because_a_message_came() -> None:
    bench, _ = await ready(is_open=False)
    for number in range(5):
        await bench.wrote(f"in:{number}")
        await asyncio.sleep(10)
    assert bench.records() == {}


async def test_a_send_writes_the_record_once_before_its_request() -> None:
    bench, partition = await ready()
    bench.bus.writes.clear()
    partition.on_delivery(bench.command("hi", id="c1"))
    await asyncio.sleep(60)
    assert bench.bus.writes == ["person", "event"]


async def test_no_record_is_written_once_the_lease_is_over() -> None:
    """Also where the bus was away meanwhile: by then the record is the next owner's."""
    bench, partition = await ready()
    before = dict(bench.person_bucket.entries)

    async def lost(_: str) -> None:
        bench.leases.lose()

    bench.person_bucket.on_write = lost
    partition.on_delivery(bench.command("hi", id="c1"))
    await asyncio.sleep(5)
    assert (bench.person_bucket.entries, bench.chat.sent) == (before, [])


async def test_the_cursor_of_a_silent_person_is_stored_once_a_day() -> None:
    bench, _ = await ready()
    person = await bench.person()
    bench.bus.writes.clear()
    for hour in range(51):
        person.on_cursor("b1@im.bot", f"cursor {hour}")
        await asyncio.sleep(3600)
    assert bench.bus.writes == ["person"] * 2


async def test_a_person_who_is_gone_leaves_memory() -> None:
    bench, partition = await ready()
    partition.on_delivery(bench.command("hi", id="c1"))
    await asyncio.sleep(10)
    await bench.unbind()
    partition.evict_idle()
    assert [*partition] == []
    assert bench.records() == {}, "its record ends with the person's time"


async def test_a_bot_is_unbound_once_nothing_of_its_user_is_in_flight() -> None:
    """Or an erasure would leave the receipt and the record that come later."""
    bench, partition = await ready()
    bench.chat.took_s = 20.0
    for ident in ("c1", "c2"):
        partition.on_delivery(bench.command("hi", id=ident))
    await asyncio.sleep(5)
    began = bench.clock.monotonic()
    await bench.unbind()
    assert 14 < bench.clock.monotonic() - began < 18
    assert outcomes(bench) == [("c1", "accepted", ""), ("c2", "refused", "not_bound")]
    partition.on_delivery(bench.command("hi", id="c3"))
    await asyncio.sleep(1)
    assert outcomes(bench)[2:] == [("c3", "refused", "not_bound")]


async def test_what_was_of_a_former_time_does_not_come_back() -> None:
    """The same user is bound again, and the record of before is still there."""
    bench, partition = await ready()
    bench.hears(sent=[SentText(id="1", kind="text", text="your secret")])
    await bench.person()
    await bench.bindings.remove(BOT)
    partition.evict_idle()
    await bench.bind(since=-7)
    person = await bench.person()
    assert (person.state.sent, person.state.token) == ([], "")
    await bench.wrote("in:3")
    partition.on_delivery(bench.command("hi", id="c1"))
    await asyncio.sleep(5)
    assert outcomes(bench) == [("c1", "accepted", "")]
    assert (bench.record().window.id, bench.record().sent) == ("in:3", [])


@pytest.mark.parametrize("fields", [{}, {"sealed": 3}], ids=["with more in it", "of another form"])
async def test_a_record_of_a_newer_version_holds_its_own_person_only(fields: dict[str, object]) -> None:
    """In the middle of an upgrade: a newer replica has handed its partition to this one."""
    bench, partition = await ready()
    (entry,) = bench.person_bucket.entries.values()
    text = made_newer(entry.value or b"", **fields)
    bench.person_bucket.put(KEY, text)
    await bench.bind(bot=AGAIN, user="u2@im.wechat")
    bench.hears(user="u2@im.wechat", bot=AGAIN)
    with capture_logs() as logs:
        partition.on_delivery(bench.command("waits", id="c1", user=USER))
        partition.on_delivery(bench.command("waits behind it", id="c2", bot=BOT))
        partition.on_delivery(bench.command("goes on", id="c3", user="u2@im.wechat"))
        writing = asyncio.create_task(user_writes(bench))
        await bench.bind(token="another")
        await asyncio.sleep(60)
    assert bench.chat.texts == ["goes on"]
    assert bench.person_bucket.entries[KEY].value == text
    said = [line["event"] for line in logs if line["log_level"] in ("warning", "error")]
    assert said == ["record.too_new", "person.unopenable"]
    assert type(writing.exception()).__name__ == "RecordTooNew"  # its poller tries again

    bench.hears()  # as if the newer replica had gone back
    await asyncio.sleep(60)
    assert bench.chat.texts == ["goes on", "waits", "waits behind it"]


async def test_a_record_that_no_key_opens_is_neither_overwritten_nor_sent_by() -> None:
    """An operator took the old key away too early."""
    bench, _ = await ready()
    before = bench.person_bucket.entries[KEY]
    successor = Bench(bench, instance="me-2", token_key=(bytes(range(32)),))
    await successor.bind()
    with capture_logs() as logs:
        successor.partition().on_delivery(successor.command("hi", id="c1"))
        await asyncio.sleep(60)
    assert (outcomes(successor), successor.chat.sent) == ([], [])
    assert successor.person_bucket.entries[KEY] == before
    assert [line["event"] for line in logs].count("person.unopenable") == 1


@pytest.mark.parametrize(("is_redelivered", "end"), [(False, "refused"), (True, "uncertain")])
async def test_what_waits_for_somebody_who_is_gone_ends_also_where_no_key_opens_the_record(
    is_redelivered: bool, end: str
) -> None:
    """Else nobody could unbind them. What a former owner may have begun stands in the record."""
    bench, _ = await ready()
    successor = Bench(bench, instance="me-2", token_key=(bytes(range(32)),))
    await successor.bind()
    partition = successor.partition()
    if is_redelivered:
        successor.command("hi", id="c1")
        successor.redeliver(partition)
    else:
        partition.on_delivery(successor.command("hi", id="c1"))
    await asyncio.sleep(5)
    assert outcomes(successor) == []
    await asyncio.wait_for(successor.unbind(), 60)
    assert [(command, outcome) for command, outcome, _ in outcomes(successor)] == [("c1", end)]
    assert successor.chat.sent == []


@pytest.mark.parametrize("is_newer", [True, False])
async def test_what_another_has_written_that_cannot_be_read_here_ends_the_command_in_time(is_newer: bool) -> None:
    bench, partition = await ready()
    await bench.person()
    if is_newer:
        bench.hears(newer=True)
    else:
        Bench(bench, instance="me-2", token_key=(bytes(range(32)),)).hears()
    before = bench.person_bucket.entries[KEY]
    partition.on_delivery(bench.command("hi", id="c1", expires_in_s=60))
    await asyncio.sleep(30)
    assert outcomes(bench) == []
    await asyncio.sleep(60)
    assert outcomes(bench) == [("c1", "uncertain", "")]  # the record may say that its writer has begun it
    assert bench.chat.sent == []
    assert bench.person_bucket.entries[KEY] == before


async def test_a_delete_marker_that_goes_takes_nothing_from_memory() -> None:
    bench, partition = await ready(is_open=False)
    bench.person_bucket.put(KEY, None)
    await user_writes(bench)
    del bench.person_bucket.entries[KEY]
    partition.on_delivery(bench.command("hi", id="c1"))
    await asyncio.sleep(60)
    assert outcomes(bench) == [("c1", "accepted", "")]
    assert bench.record().token == "AARz"
