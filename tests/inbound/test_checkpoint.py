"""The checkpoint of a bot: when it is written, what it knows, and who may write it."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from adapter.content.dedup import SIZE
from adapter.contract.records import CheckpointRecord
from adapter.errors import Conflict, LeaseLost, Temporary
from adapter.inbound.checkpoint import SAVE_AFTER_NEW, SAVE_AFTER_S, Checkpoint
from adapter.inbound.poller import UNSAVED_S, BotPoller, State
from adapter.ports import BusMessage, Polled
from adapter.security.seal import Sealer, cursor_context
from tests.fakes import Bench, Failing, batch, ready
from tests.inbound.pollers import (
    BOT,
    STALE,
    Poller,
    Replica,
    polls,
    raw,
    set_owner,
    start_poller,
    successor_of,
    texts,
)
from tests.newer import made_newer

VIRTUAL_TIME = True


def writes(bench: Bench) -> int:
    return bench.bus.writes.count("checkpoint")


async def taken(bench: Bench, poller: Poller) -> tuple[BotPoller, Checkpoint]:
    """A poller that waits for its first answer."""
    session = poller(bench)
    await asyncio.sleep(1)
    assert session.checkpoint is not None
    bench.bus.writes.clear()
    return session, session.checkpoint


# when it is written --------------------------------------------------------------------------------------


async def test_it_is_written_after_so_many_new_messages(poller: Poller) -> None:
    bench = await ready()
    session, _ = await taken(bench, poller)
    for number in range(SAVE_AFTER_NEW):
        assert writes(bench) == 0
        bench.chat.polls.append(batch(raw(f"t{number}", number), cursor=f"c{number}"))
        session.cancel_poll()
        await asyncio.sleep(0.5)
    position = (await bench.checkpoint()).position
    assert (writes(bench), position.cursor, position.inbox_seq) == (1, f"c{SAVE_AFTER_NEW - 1}", SAVE_AFTER_NEW)
    assert len(position.prints) == SAVE_AFTER_NEW * SIZE


async def test_it_is_written_a_minute_after_it_became_stale(poller: Poller) -> None:
    """A bot of which nothing comes is not looked at before its next poll ends."""

    def idle() -> Polled:
        return batch(cursor=None)

    bench = await ready()
    session, _ = await taken(bench, poller)
    bench.chat.polls.append(batch(raw(), cursor="b"))
    session.cancel_poll()
    for passed_s, written in ((SAVE_AFTER_S - 10, 0), (15, 1), (300, 1)):
        await asyncio.sleep(passed_s)
        bench.chat.polls.append(idle)
        session.cancel_poll()
        await asyncio.sleep(1)
        assert writes(bench) == written


@pytest.mark.parametrize("answer", [STALE, Temporary("http", "503")], ids=["needs_login", "outage"])
async def test_it_is_written_though_no_poll_is_answered_any_more(answer: Exception, poller: Poller) -> None:
    """Else a replica that takes the bot after hours asks with an old cursor, and iLink repeats what nobody knows."""
    bench = await ready(batch(raw(), cursor="b"), *[answer] * 1000)
    session = poller(bench)
    await asyncio.sleep(3 * SAVE_AFTER_S)
    assert session.state is (State.NEEDS_LOGIN if answer is STALE else State.RETRYING)
    position = (await bench.checkpoint()).position
    assert (position.cursor, position.inbox_seq, len(position.prints)) == ("b", 1, SIZE)


async def test_a_write_delays_no_poll_until_it_has_failed_for_long(poller: Poller) -> None:
    bench = await ready(
        *[batch(raw(f"t{n}", n), cursor=f"c{n}") for n in range(SAVE_AFTER_NEW)], *[None, batch(cursor=None)] * 50
    )
    session = poller(bench)
    await asyncio.sleep(0.01)
    bench.checkpoint_bucket.on_write = away = Failing(10**6, Temporary("bus_down"))
    await asyncio.sleep(0.9 * UNSAVED_S)
    assert session.state is State.POLLING
    await asyncio.sleep(0.2 * UNSAVED_S)
    assert (session.state, session.why, bench.chat.polling) == (
        State.PAUSED,
        "The checkpoint cannot be written.",
        0,
    )
    asked = len(bench.chat.asked)
    await asyncio.sleep(UNSAVED_S)
    assert len(bench.chat.asked) == asked
    away.left = 0
    await asyncio.sleep(10)
    assert session.state is State.POLLING
    assert len(bench.chat.asked) > asked


# what it knows -------------------------------------------------------------------------------------------


async def test_it_knows_only_messages_that_the_inbox_has(poller: Poller) -> None:
    """Else what iLink repeats would be taken for known, and nobody had it."""
    bench = await ready()
    session, checkpoint = await taken(bench, poller)
    bench.chat.polls.append(batch(*(raw(f"t{number}", number) for number in range(5)), cursor="b"))
    gate = asyncio.Event()

    async def wait(message: BusMessage) -> None:
        if message.stream == "in" and len(texts(bench)) == 3:
            await gate.wait()

    bench.bus.on_publish = wait
    session.cancel_poll()
    await asyncio.sleep(5)
    assert len(texts(bench)) == 3
    await checkpoint.save()
    position = (await bench.checkpoint()).position
    assert (position.prints, position.cursor, position.inbox_seq) == (b"", "", 0)
    gate.set()
    await asyncio.sleep(5)
    await checkpoint.save()
    position = (await bench.checkpoint()).position
    assert (len(position.prints), position.cursor, position.inbox_seq) == (5 * SIZE, "b", 5)


async def test_what_the_inbox_had_and_evicted_is_not_stored_again_by_the_next_owner() -> None:
    """With other ids, after the server forgot the old ones."""
    many = 2 * SAVE_AFTER_NEW
    bench = await ready(*[batch(raw(f"t{n}", n), cursor=f"c{n}") for n in range(many)])
    replica = Replica(bench)
    await asyncio.sleep(30)
    await replica.die()
    successor = successor_of(bench)
    successor.bus.kept = [kept for kept in successor.bus.kept if kept.stream != "WECHAT_IN"]
    again = (raw(f"t{n}", n, message_id=n + 1, client_id=f"x{n}") for n in range(many))
    successor.chat.polls.append(batch(*again, raw("new", many)))
    replica = Replica(successor)
    await asyncio.sleep(30)
    assert texts(successor) == ["new"]
    await replica.leave()


# who may write it ----------------------------------------------------------------------------------------


async def test_a_write_after_another_owners_is_refused(poller: Poller) -> None:
    bench = await ready()
    _, checkpoint = await taken(bench, poller)
    await set_owner(bench, "other-1", cursor="theirs")
    checkpoint.cursor = "mine"
    for write in (checkpoint.save, checkpoint.release):
        with pytest.raises(LeaseLost, match="bot_taken"):
            await write()
    assert (await bench.checkpoint()).position.cursor == "theirs"


async def test_a_write_that_was_cancelled_is_adopted(poller: Poller) -> None:
    """It reached the bucket, and nobody heard of it."""
    bench = await ready()
    _, checkpoint = await taken(bench, poller)
    update = bench.checkpoint_bucket.update

    async def silent(*written: Any, **fields: Any) -> int:
        await update(*written, **fields)
        await asyncio.Event().wait()
        return 0

    bench.checkpoint_bucket.update = silent  # type: ignore[method-assign]
    checkpoint.cursor = "first"
    checkpoint.note()
    task = asyncio.create_task(checkpoint.save())
    await asyncio.sleep(1)
    task.cancel()
    await asyncio.wait([task])
    bench.checkpoint_bucket.update = update  # type: ignore[method-assign]
    assert checkpoint.stale_s() >= 1, "it does not count as written"
    checkpoint.cursor = "second"
    await checkpoint.save()
    assert ((await bench.checkpoint()).position.cursor, checkpoint.stale_s()) == ("second", 0.0)


async def test_a_replica_without_a_valid_lease_does_not_write(poller: Poller) -> None:
    bench = await ready()
    _, checkpoint = await taken(bench, poller)
    bench.leases.has_lease = False
    with pytest.raises(LeaseLost, match="lease_lost"):
        await checkpoint.save()
    assert writes(bench) == 0


# what is stored ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [None, "given"], ids=["polled", "bound"])
async def test_the_position_is_sealed_and_the_next_owner_opens_it_with_an_older_key(given: str | None) -> None:
    """A cursor holds the bot's token. The owner is in clear, for doctors and replicas with another key."""
    sealer = Sealer((bytes(32),))
    start = sealer.seal(cursor_context(BOT), given) if given else None
    bench = await ready(batch(raw("secret"), cursor="cursor-b"), start_cursor=start)
    successor = Bench(bench, incarnation="next-1", token_key=(b"\1" * 32, bytes(32)))
    successor.leases.proven_dead.add("me-1")
    with capture_logs() as logs:
        await polls(bench)
        await polls(successor)
    assert bench.chat.asked == [given or "", "cursor-b", "cursor-b"]
    assert not [entry for entry in logs if entry["log_level"] == "error"]
    (entry,) = bench.checkpoint_bucket.entries.values()
    assert entry.value is not None
    assert msgspec.json.decode(entry.value, type=CheckpointRecord).owner == ""
    for secret in (b"given", b"cursor-b", b"secret"):
        assert secret not in entry.value


async def test_a_position_that_was_moved_to_another_bot_or_owner_is_not_taken_for_its_own() -> None:
    bench = await ready()
    await set_owner(bench, "me-1", cursor="mine")
    (entry,) = bench.checkpoint_bucket.entries.values()
    assert entry.value is not None
    record = msgspec.json.decode(entry.value, type=CheckpointRecord)
    key = entry.key
    bench.checkpoint_bucket.put(key.replace("b1", "b2"), entry.value)
    bench.checkpoint_bucket.put(key, msgspec.json.encode(msgspec.structs.replace(record, owner="other-1")))
    for bot, owner in (("b2@im.bot", "me-1"), (BOT, "other-1")):
        stored = await bench.checkpoint(bot)
        assert stored.position.cursor == ""
        assert stored.owner in ("", owner)


async def test_a_bot_whose_checkpoint_is_of_a_later_version_is_left_alone(poller: Poller) -> None:
    bench = await ready()
    await set_owner(bench, "", cursor="theirs")
    (entry,) = bench.checkpoint_bucket.entries.values()
    assert entry.value is not None
    newer = made_newer(entry.value)
    bench.checkpoint_bucket.put(entry.key, newer)
    session = poller(bench)
    await asyncio.sleep(120)
    assert (bench.chat.asked, session.state, session.why[:15]) == ([], State.RETRYING, "record_too_new:")
    assert bench.checkpoint_bucket.entries[entry.key].value == newer


@pytest.mark.parametrize("value", [b"\xff\xfe", b"garbage", b'{"v":1,"owner":"","sealed":"none"}'])
async def test_an_unreadable_checkpoint_is_reported_and_the_inbox_finds_repeats(value: bytes) -> None:
    """By another hand. Nothing is lost but the cursor, and nothing is told twice."""
    bench = await ready(batch(raw("one", 1), cursor="b"))
    session, task = start_poller(bench)
    await asyncio.sleep(5)
    session.stop(immediately=True)
    await task
    (key,) = bench.checkpoint_bucket.entries
    bench.checkpoint_bucket.put(key, value)
    bench.bus.forget_ids()
    bench.chat.polls.append(batch(raw("one", 1), raw("two", 2), cursor="c"))
    with capture_logs() as logs:
        session, task = start_poller(bench)
        await asyncio.sleep(30)
    assert texts(bench) == ["one", "two"]
    assert "checkpoint.unreadable" in [entry["event"] for entry in logs]
    session.stop(immediately=True)
    await task


async def test_the_owner_counts_though_nobody_can_read_the_position(poller: Poller) -> None:
    """A replica that has lost a key does not poll beside the one that has the bot."""
    bench = await ready()
    session = poller(bench)
    await asyncio.sleep(1)
    (entry,) = bench.checkpoint_bucket.entries.values()
    assert entry.value is not None
    record = msgspec.json.decode(entry.value, type=CheckpointRecord)
    damaged = msgspec.structs.replace(record, sealed=record.sealed[:-8] + b"AAAAAAAA")
    bench.checkpoint_bucket.put(entry.key, msgspec.json.encode(damaged))
    other = Bench(bench, incarnation="other-1")
    waits = poller(other)
    await asyncio.sleep(5)
    stored = await other.checkpoint()
    assert (stored.owner, stored.is_unreadable) == ("me-1", True)
    assert (waits.state, waits.why, bench.chat.polling) == (State.WAITING, "me-1 has not released it", 1)
    assert session.state is State.POLLING


async def test_many_checkpoints_are_read_in_one_request() -> None:
    bench = await ready()
    asked: list[int] = []
    get_all = bench.checkpoint_bucket.get_all

    async def counted(keys: Any) -> Any:
        asked.append(len(keys))
        return await get_all(keys)

    bench.checkpoint_bucket.get_all = counted  # type: ignore[method-assign]
    await asyncio.gather(*(bench.checkpoints.read(f"b{number}@im.bot") for number in range(100)))
    assert (len(asked) <= 2, sum(asked)) == (True, 100)


async def test_a_write_expects_what_was_read() -> None:
    bench = await ready()
    stored = await bench.checkpoint()
    await bench.checkpoints.write(stored)
    with pytest.raises(Conflict):
        await bench.checkpoints.write(stored)
    assert not await bench.checkpoints.clear_owner(stored)
