"""What the next owner of a person makes of a send that its predecessor has left anywhere in the middle."""

from __future__ import annotations

import asyncio
import gc
import weakref

from adapter.bridge.parts import Bodies
from adapter.contract.names import person_token
from adapter.ports import BusMessage
from tests.outbound.partitions import FIRST, THROTTLED, finals, outcomes, parked, ready, user_writes
from tests.outbound.test_sequences import next_owner

VIRTUAL_TIME = True

FIVE = ("A" * 1500 + "\n\n") * 5
"""A text of five parts."""
KEY = f"s1.{person_token('s1', 'u1@im.wechat')}"


async def test_after_minus_2_nothing_is_sent_before_the_user_writes() -> None:
    bench, partition = await ready()
    bench.chat.sends.append(THROTTLED)
    for name in ("c1", "c2"):
        partition.on_delivery(bench.command(name, id=name))
    await asyncio.sleep(5)
    assert parked(bench) == ["c1", "c2"]
    successor, _ = next_owner(bench, partition)
    await asyncio.sleep(1000)
    assert len(bench.chat.sent) == 1, "that of the predecessor"
    await user_writes(successor)
    await asyncio.sleep(30)
    assert bench.chat.texts == ["c1", "c1", "c2"]
    assert [(one.command, one.outcome) for one in finals(bench)] == [("c1", "accepted"), ("c2", "accepted")]
    assert parked(bench) == []


async def test_after_part_3_of_5_the_two_that_are_left_are_sent() -> None:
    bench, partition = await ready(gap_ms=1000)
    bench.chat.sends.append(FIRST)
    partition.on_delivery(bench.command(FIVE, id="c1"))
    while len(bench.chat.sent) < 3:
        await asyncio.sleep(0.1)
    await asyncio.sleep(0.5)
    next_owner(bench, partition, gap_ms=1000)
    await asyncio.sleep(400)
    assert len({sent.client_id for sent in bench.chat.sent}) == len(bench.chat.sent) == 5
    (receipt,) = finals(bench)
    assert (receipt.outcome, len(receipt.message_ids), receipt.attempts) == ("accepted", 5, 5)
    assert bench.record().window.sends_used == 5


async def test_between_the_receipts_of_a_merged_send_the_others_get_theirs() -> None:
    bench, partition = await ready(is_open=False, merge_chars=3000)
    for name in ("c1", "c2", "c3"):
        partition.on_delivery(bench.command(name, id=name))
    await asyncio.sleep(5)

    async def only_one(message: BusMessage) -> None:
        if message.stream == "event" and len(finals(bench)):
            await asyncio.Event().wait()

    bench.bus.on_publish = only_one
    await user_writes(bench)
    await asyncio.sleep(30)
    assert len(finals(bench)) == 1
    bench.bus.on_publish = None
    next_owner(bench, partition, merge_chars=3000)
    await asyncio.sleep(400)
    assert bench.chat.texts == ["c1\n\nc2\n\nc3"]
    ends = {one.command: (one.outcome, one.message_ids) for one in finals(bench)}
    assert ends == dict.fromkeys(("c1", "c2", "c3"), ("accepted", ["m1"]))


async def test_what_comes_in_while_the_record_is_read_anew_keeps_window_and_token() -> None:
    """Another owner has written the record meanwhile, and knows of no message since."""
    bench, partition = await ready(is_open=False)
    bench.hears(id="in:old", opened_ms=bench.clock.now_ms() - 90_000_000, token="old")
    person = await bench.person()
    read, reads = bench.person_bucket.get, 0
    stored = bench.person_bucket.entries[KEY]

    async def slow(key: str) -> object:
        nonlocal reads
        reads += 1
        await user_writes(bench)
        return await read(key)

    bench.person_bucket.put(KEY, stored.value)  # at another revision
    bench.person_bucket.get = slow  # type: ignore[method-assign, assignment]
    person.is_save_due = True
    partition.senders[0].on_change()
    await asyncio.sleep(5)
    partition.on_delivery(bench.command("hi", id="c1"))
    await asyncio.sleep(30)
    assert reads
    assert outcomes(bench) == [("c1", "accepted", "")]
    assert [sent.context_token for sent in bench.chat.sent] == ["AARz"]


async def test_the_bodies_of_all_partitions_of_a_replica_have_one_bound() -> None:
    bench, first = await ready(is_open=False)
    await bench.bind(sandbox="s2", bot="b2@im.bot", user="u2@im.wechat")
    bodies = Bodies(1000)
    first.stop()
    first = bench.partition(bodies=bodies)
    second = bench.partition("s2", bodies=bodies)
    assert first.number != second.number
    first.on_delivery(bench.command("x" * 700, id="c1"))
    second.on_delivery(bench.command("y" * 700, id="c2", sandbox="s2"))
    held = [command for partition in (first, second) for command in partition.commands.commands.values()]
    assert [command.parts is not None for command in held] == [True, False]
    assert bodies.held <= 1000
    first.stop()
    second.stop()
    assert bodies.held == 0


async def test_a_partition_that_is_lost_with_parked_commands_leaves_memory() -> None:
    bench, partition = await ready(is_open=False)
    partition.on_delivery(bench.command("waits for three days", id="c1"))
    await asyncio.sleep(5)
    assert parked(bench) == ["c1"]
    lost = weakref.ref(next(iter(partition)))
    partition.stop()
    await asyncio.sleep(1)
    gc.collect()
    assert lost() is None
