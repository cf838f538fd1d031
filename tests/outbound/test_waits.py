"""What waits, in virtual time: it expires whatever it waits for, keeps its place, and opens nothing for nobody."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.fakes import Bench
from tests.outbound.partitions import BOT, USER, finals, free_slots, outcomes, ready, user_writes

VIRTUAL_TIME = True

OTHER = "u2@im.wechat"
"""A user who is not the binding's, and may write to its bot all the same."""
HOUR_S = 3600


async def test_what_waits_for_a_record_that_only_a_newer_replica_can_read_expires() -> None:
    bench, partition = await ready(is_open=False)
    bench.hears(newer=True)
    partition.on_delivery(bench.command("hi", id="c1", expires_in_s=60))
    await asyncio.sleep(90)
    assert outcomes(bench)[-1] == ("c1", "refused", "expired")


async def test_what_waits_for_a_record_that_cannot_be_read_expires() -> None:
    bench, partition = await ready(is_open=False)
    bench.person_bucket.unreadable = 10**6
    partition.on_delivery(bench.command("hi", id="c1", expires_in_s=60))
    await asyncio.sleep(120)
    bench.person_bucket.unreadable = 0
    await asyncio.sleep(60)
    assert outcomes(bench) == [("c1", "refused", "expired")]


async def test_what_waits_for_an_unknown_user_expires_after_the_longest_time(bench: Bench) -> None:
    await bench.bind(user="")
    partition = bench.partition()
    partition.on_delivery(bench.command("bare", id="c1"))
    partition.on_delivery(bench.command("bot", id="c2", bot=BOT))
    partition.on_delivery(bench.command("user", id="c3", user=USER))
    await asyncio.sleep(71 * HOUR_S)
    assert finals(bench) == []
    await asyncio.sleep(2 * HOUR_S)
    partition.evict_idle()
    await asyncio.sleep(1)
    assert sorted(outcomes(bench)[-3:]) == [(f"c{number}", "refused", "expired") for number in (1, 2, 3)]
    assert bench.chat.texts == []
    assert not bench.person_bucket.entries


async def test_what_waits_for_a_login_expires_and_delays_no_other_user(bench: Bench) -> None:
    await bench.bind(state="needs_login")
    await bench.bind(bot="b2@im.bot", user=OTHER)
    for user in (USER, OTHER):
        bench.hears(user=user, bot=BOT if user == USER else "b2@im.bot")
    partition = bench.partition()
    for number in range(20):
        partition.on_delivery(bench.command(f"t{number}", id=f"c{number}", user=USER, expires_in_s=HOUR_S))
    partition.on_delivery(bench.command("hi", id="other", user=OTHER))
    await asyncio.sleep(1)
    assert [receipt.command for receipt in finals(bench)] == ["other"]
    await asyncio.sleep(HOUR_S + 60)
    assert {(one.outcome, one.reason) for one in finals(bench)[1:]} == {("refused", "expired")}
    assert len(finals(bench)) == 21


async def test_a_command_is_not_overtaken_while_its_user_is_looked_up() -> None:
    bench, partition = await ready(is_open=False)
    await user_writes(bench)
    await asyncio.sleep(5)
    await user_writes(bench)
    second = Bench(world=bench)
    partition.stop()
    partition = second.partition()
    second.person_bucket.unreadable = 2
    partition.on_delivery(second.command("first"))
    await asyncio.sleep(0.05)
    second.person_bucket.unreadable = 0
    await second.wrote("in:9")
    partition.on_delivery(second.command("second"))
    await asyncio.sleep(60)
    assert second.chat.texts == ["first", "second"]


async def test_users_who_do_not_exist_leave_nothing_in_memory() -> None:
    bench, partition = await ready(is_open=False)
    for number in range(2000):
        partition.on_delivery(bench.command("t", user=f"nobody{number}@im.wechat"))
    await asyncio.sleep(60)
    assert {(one.outcome, one.reason) for one in finals(bench)} == {("refused", "not_bound")}
    assert len(finals(bench)) == 2000
    assert not bench.person_bucket.entries
    assert list(partition) == []
    assert partition.tasks == 0


async def test_a_user_to_whom_much_is_said_keeps_their_place_before_a_slot_is_free() -> None:
    bench, partition = await ready()

    async def other() -> None:
        while True:
            async with bench.slots.slot("s1"):
                await asyncio.sleep(4)

    others = [asyncio.create_task(other()) for _ in range(20)]
    await asyncio.sleep(1)
    for number in range(5):
        partition.on_delivery(bench.command(f"t{number}", id=f"c{number}"))
        await asyncio.sleep(4)
    assert bench.chat.texts[:1] == ["t0"]
    for task in others:
        task.cancel()


async def test_what_expires_while_it_waits_for_a_slot_is_not_sent() -> None:
    bench, partition = await ready()
    for _ in range(free_slots(bench)):
        assert bench.slots.try_acquire("other")
    partition.on_delivery(bench.command("code 1234", id="c1", expires_in_s=30))
    await asyncio.sleep(120)
    bench.slots.release("other")
    await asyncio.sleep(5)
    assert bench.chat.texts == []
    assert outcomes(bench) == [("c1", "refused", "expired")]


async def test_what_expires_while_its_send_cannot_be_stored_is_not_sent() -> None:
    bench, partition = await ready()
    bench.leases.has_lease = False
    partition.on_delivery(bench.command("code 1234", id="c1", expires_in_s=30))
    await asyncio.sleep(300)
    bench.leases.has_lease = True
    await asyncio.sleep(20)
    assert bench.chat.texts == []
    assert outcomes(bench) == [("c1", "refused", "expired")]


async def test_what_expires_behind_a_command_delays_it_not() -> None:
    """While the record is written, the clock goes on, and short-lived commands come and go."""
    bench, partition = await ready()
    update = bench.person_bucket.update

    async def slow(*args: Any, **options: Any) -> int:
        await asyncio.sleep(0.005)
        return await update(*args, **options)

    bench.person_bucket.update = slow  # type: ignore[method-assign]
    partition.on_delivery(bench.command("the answer"))
    for _ in range(10):
        partition.on_delivery(bench.command("a note", expires_in_s=0.001))
        await asyncio.sleep(0.004)
    assert bench.chat.texts[:1] == ["the answer"]
