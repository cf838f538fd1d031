"""Messages that wait for their media, through crashes, take-overs and changed bindings: each once, in order."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from adapter.contract import Options
from adapter.errors import Temporary
from adapter.inbound.cursors import acquire
from adapter.inbound.fetching import DONE_KEPT, SWEEP_S
from adapter.inbound.poller import tend
from adapter.inbound.sessions import Session
from adapter.names import H_MSG_ID, H_SANDBOX, H_SEEN, H_TIME_MS, shard_of
from adapter.ports import Message
from adapter.records import Cursor
from adapter.tasks import Tasks
from tests.fakes import EPOCH_MS, Bench, batch, ready
from tests.inbound.downloads import (
    BOT,
    KEY,
    PNG,
    RECORD,
    Replica,
    heir_of,
    image,
    run,
    said,
    waiting,
    words,
)

VIRTUAL_TIME = True


# crashes -------------------------------------------------------------------------------------------------


Dies = Callable[[Bench], None]


def dies_at_cursor(bench: Bench) -> None:
    """Between the raw message and the cursor."""
    hang = asyncio.Event()

    async def dies(key: str) -> None:
        if bench.bus.found("RAW"):
            await hang.wait()

    bench.cursors.on_write = dies
    bench.cdn.has("p1", None)


def dies_at_download(bench: Bench) -> None:
    """Between the cursor and the object."""
    bench.cdn.has("p1", None)


def dies_at_object(bench: Bench) -> None:
    """While the object is stored."""
    bench.objects.on_put = _hangs


def dies_at_telling(bench: Bench) -> None:
    """Between the object and the message."""

    async def dies(message: Message) -> None:
        if message.stream == "in":
            await asyncio.Event().wait()

    bench.bus.on_publish = dies


def dies_at_forgetting(bench: Bench) -> None:
    """Between the message and the end of the raw one."""

    async def delete(stream: str, seq: int, *, erase: bool = False) -> None:
        await asyncio.Event().wait()

    bench.bus.delete = delete  # type: ignore[method-assign]


async def _hangs(name: str) -> None:
    await asyncio.Event().wait()


CRASHES: list[Dies] = [dies_at_cursor, dies_at_download, dies_at_object, dies_at_telling, dies_at_forgetting]


def mended(bench: Bench) -> None:
    bench.cursors.on_write = bench.objects.on_put = bench.bus.on_publish = None
    bench.bus.__dict__.pop("delete", None)
    bench.cdn.has("p1", PNG)


@pytest.mark.parametrize("crash", CRASHES, ids=lambda crash: crash.__name__)
@pytest.mark.parametrize("replayed", [False, True], ids=["told-once", "replayed"])
async def test_after_a_crash_each_message_is_told_once_and_in_order(crash: Dies, replayed: bool) -> None:
    """Wherever it happens, whether iLink says it again or not, and long after the server's own window."""
    bench = await ready(batch(image(1), words(2)))
    bench.cdn.has("p1", PNG)
    crash(bench)
    replica = await run(bench)
    await asyncio.sleep(5)
    await replica.die()
    await asyncio.sleep(600)
    mended(bench)
    if replayed:
        bench.chat.polls.append(batch(image(1), words(2)))
    bench.chat.polls.append(batch(words(3), cursor="c"))
    heir = await heir_of(bench)
    await asyncio.sleep(30)
    assert said(bench) == ["+", "t2", "t3"]
    assert waiting(bench) == 0
    await heir.leave()


@pytest.mark.parametrize("crash", CRASHES, ids=lambda crash: crash.__name__)
async def test_a_repeat_with_other_ids_after_a_crash_is_told_once(crash: Dies) -> None:
    """F16 at its worst: not remembered with the cursor, and repeated with other ids to the next owner."""
    bench = await ready(batch(image(1)))
    bench.cdn.has("p1", PNG)
    crash(bench)
    replica = await run(bench)
    await asyncio.sleep(5)
    await replica.die()
    mended(bench)
    bench.chat.polls.append(batch(image(1, message_id=99, client_id="wx-99", seq=99), cursor="c"))
    heir = await heir_of(bench)
    await asyncio.sleep(30)
    assert said(bench) == ["+"]
    await heir.leave()


async def test_what_is_told_while_the_next_owner_reads_is_not_missed() -> None:
    """The raw message is read before the inbox: it is in the one before it is gone from the other."""
    bench = await ready(batch(image(1)))
    dies_at_cursor(bench)
    replica = await run(bench)
    await asyncio.sleep(5)
    await replica.die()
    mended(bench)
    bench.cursors.put(KEY, msgspec.json.encode(Cursor()))
    read, heir = bench.bus.read, Bench(bench, incarnation="heir-1")
    downloads = await heir.downloads()

    def slow(stream: str, subject: str, **where: Any) -> Any:
        async def found() -> Any:
            async for stored in read(stream, subject, **where):
                yield stored
            await asyncio.sleep(1)  # meanwhile it is fetched and told

        return found()

    bench.bus.read = slow  # type: ignore[method-assign]
    place = await acquire(Session(BOT), heir.incoming())
    assert place is not None
    assert len(place.seen.records()) == 1
    assert said(bench) == ["+"]
    downloads.stop()


async def test_what_waits_is_told_before_what_comes_after_the_take_over() -> None:
    bench = await ready(batch(image(1), words(2)))
    bench.cdn.has("p1", None)
    replica = await run(bench)
    await asyncio.sleep(5)
    await replica.die()
    gate = asyncio.Event()
    bench.cdn.has("p1", gate, PNG)
    bench.chat.polls.append(batch(words(3), cursor="c"))
    heir = await heir_of(bench)
    await asyncio.sleep(5)
    assert (said(bench), bench.chat.asked[-1]) == ([], "c")
    gate.set()
    await asyncio.sleep(1)
    assert said(bench) == ["+", "t2", "t3"]
    await heir.leave()


async def test_what_a_fenced_poller_has_in_hand_is_told_behind_what_waits() -> None:
    """The next owner tells that; how long it takes depends on the CDN."""
    bench = await ready(batch(image(1)), batch(words(2), cursor="c"))
    bench.cdn.has("p1", None)

    async def freeze(message: Message) -> None:
        if message.payload == words(2):
            bench.bus.on_publish, bench.leases.is_valid = None, False

    bench.bus.on_publish = freeze
    replica = await run(bench)
    await asyncio.sleep(5)
    replica.downloads.stop()
    gate = asyncio.Event()
    bench.cdn.has("p1", gate, PNG)
    heir = await heir_of(bench)
    await asyncio.sleep(1)
    bench.leases.incarnation, bench.leases.is_valid = "me-2", True
    bench.opened.clear()
    bench.leases.changed.notify()
    await asyncio.sleep(3)
    assert said(bench) == []
    gate.set()
    await asyncio.sleep(3)
    assert said(bench) == ["+", "t2"]
    assert replica.poller.done()
    await heir.leave()


async def test_a_zombies_last_words_are_found() -> None:
    """Stored raw by the owner before, after the shard was read: told all the same."""
    bench = await ready()
    bench.cdn.has("p1", PNG)
    replica = await run(bench)
    await asyncio.sleep(5)
    subject = bench.names.raw(shard_of("s1"), BOT)
    headers = {H_SANDBOX: "s1", H_TIME_MS: str(EPOCH_MS), H_SEEN: f"{KEY} {RECORD}"}
    bench.bus.put(subject, image(1), headers)
    await asyncio.sleep(SWEEP_S + 1)
    assert said(bench) == ["+"]
    await replica.leave()


async def test_what_the_owner_before_stored_late_is_told_as_soon_as_the_bot_is_polled() -> None:
    """After the shard was read, before the bot's cursor was given up: no need to wait for the next look."""
    bench = await ready()
    bench.cdn.has("p1", PNG)
    downloads = await bench.downloads()
    subject = bench.names.raw(shard_of("s1"), BOT)
    headers = {H_SANDBOX: "s1", H_TIME_MS: str(EPOCH_MS), H_SEEN: f"{KEY} {RECORD}"}
    bench.bus.put(subject, image(1), headers)
    replica = Replica(bench, downloads)
    await asyncio.sleep(1)
    assert said(bench) == ["+"]
    await replica.leave()


async def test_what_waits_is_not_taken_again_because_it_is_seen_again() -> None:
    bench = await ready(batch(image(1)))
    gate = asyncio.Event()
    bench.cdn.has("p1", gate, PNG)
    with capture_logs() as logs:
        replica = await run(bench, wait_s=1000)
        await asyncio.sleep(3 * SWEEP_S)
        gate.set()
        await asyncio.sleep(2 * SWEEP_S)
    assert (said(bench), bench.cdn.fetched) == (["+"], ["p1"])
    assert "raw.told_before" not in [line["event"] for line in logs]
    await replica.leave()


async def test_of_what_is_done_hardly_anything_is_remembered() -> None:
    """And of what waits everything, however much that is."""
    bench = await ready(*(batch(*(image(50 * n + k) for k in range(50)), cursor=f"c{n}") for n in range(10)))
    for number in range(500):
        bench.cdn.has(f"p{number}", PNG)
    replica = await run(bench)
    await asyncio.sleep(60)
    assert said(bench) == ["+"] * 500
    sizes = {name: len(value) for name, value in vars(replica.downloads).items()
             if isinstance(value, dict | set | deque | Tasks)}  # fmt: skip
    assert sizes == {"_queues": 0, "_waiting": 0, "_done": DONE_KEPT, "_tasks": 1}  # which looks at the stream
    await replica.leave()


async def test_a_raw_message_that_the_stream_had_before_is_looked_for_in_the_inbox() -> None:
    """Somebody else may have told it meanwhile: a zombie, in the last moment."""
    bench = await ready(batch(image(1)))
    ident = f"in:{BOT}:m7497484083968569001"
    replica = await run(bench)
    await asyncio.sleep(0.02)
    bench.bus.put("wechat.inbox.s1", b"{}", {H_MSG_ID: ident})
    bench.bus._ids.clear()
    bench.bus._ids["WECHAT_RAW", ident] = 1
    await asyncio.sleep(5)
    assert (len(bench.bus.found("IN")), bench.cdn.fetched) == (1, [])
    await replica.leave()


async def test_a_message_is_told_once_however_long_it_takes_to_forget_it() -> None:
    bench = await ready(batch(image(1), words(2)))
    bench.cdn.has("p1", PNG)
    delete, failures = bench.bus.delete, iter([True, True])

    async def fails(stream: str, seq: int, *, erase: bool = False) -> None:
        if next(failures, False):
            bench.bus._ids.clear()
            raise Temporary("bus_down")
        await delete(stream, seq)

    bench.bus.delete = fails  # type: ignore[method-assign]
    replica = await run(bench)
    await asyncio.sleep(10)
    assert (said(bench), waiting(bench)) == (["+", "t2"], 0)
    await replica.leave()


async def test_what_nobody_can_read_back_becomes_a_dead_letter() -> None:
    bench = await ready(batch(words(2)))
    bench.bus.put(bench.names.raw(shard_of("s1"), BOT), b"{", {H_SANDBOX: "s1"})
    replica = await run(bench)
    await asyncio.sleep(5)
    assert said(bench) == ["t2"]
    assert (waiting(bench), [dead.data for dead in bench.bus.found("DEAD")]) == (0, [b"{"])
    await replica.leave()


async def test_a_load_that_fails_says_so() -> None:
    bench = await ready()
    bench.bus.unreadable = 1
    with pytest.raises(Temporary):
        await bench.downloads()


async def test_a_bug_ends_no_bots_messages() -> None:
    bench = await ready(batch(image(1), words(2)))
    bench.cdn.has("p1", PNG)
    failures = iter([RuntimeError("a bug"), Temporary("bus_down")])

    async def fails(message: Message) -> None:
        if message.stream == "in" and (problem := next(failures, None)):
            raise problem

    bench.bus.on_publish = fails
    with capture_logs() as logs:
        replica = await run(bench)
        await asyncio.sleep(10)
    assert said(bench) == ["+", "t2"]
    assert "raw.crashed" in [line["event"] for line in logs]
    await replica.leave()


# the binding changes -------------------------------------------------------------------------------------


async def unbind(bench: Bench) -> None:
    await bench.bindings.remove(BOT)


async def move(bench: Bench) -> None:
    await bench.bind("s2")


@pytest.mark.parametrize("change", [unbind, move], ids=["unbound", "moved"])
async def test_a_message_goes_to_the_sandbox_that_it_was_said_to(change: Callable[[Bench], Awaitable[None]]) -> None:
    bench = await ready(batch(image(1), words(2)))
    gate = asyncio.Event()
    bench.cdn.has("p1", gate, PNG)
    replica = await run(bench)
    await asyncio.sleep(1)
    await change(bench)
    gate.set()
    await asyncio.sleep(1)
    assert said(bench) == ["+", "t2"]
    assert {stored.subject for stored in bench.bus.found("IN")} == {"wechat.inbox.s1"}
    assert [inbound.sandbox for inbound in bench.bus.inbound()] == ["s1", "s1"]
    assert bench.bus.inbound()[0].window.remaining == 0
    await replica.leave()


async def test_after_a_move_and_a_crash_it_still_goes_to_the_sandbox_that_it_was_said_to() -> None:
    bench = await ready(batch(image(1)))
    bench.cdn.has("p1", None)
    replica = await run(bench)
    await asyncio.sleep(1)
    await replica.die()
    await bench.bind("s2")
    mended(bench)
    heir = await heir_of(bench)
    await asyncio.sleep(5)
    assert {stored.subject for stored in bench.bus.found("IN")} == {"wechat.inbox.s1"}
    await heir.leave()


async def test_a_message_for_a_shard_of_another_replica_is_left_to_it_and_so_are_those_after_it() -> None:
    """The bot, or the shard, was moved while a poll was out."""
    bench = await ready(batch(words(1), image(2)), batch(words(3), cursor="c"))
    session = Session(BOT)
    poller = asyncio.get_running_loop().create_task(tend(session, bench.incoming()))
    await asyncio.sleep(1)
    assert (said(bench), waiting(bench), bench.chat.asked) == (["t1"], 2, ["", "b", "c"])
    session.leave(now=True)
    await poller
    bench.cdn.has("p2", PNG)
    heir = await heir_of(bench)
    await asyncio.sleep(1)
    assert said(bench) == ["t1", "+", "t3"]
    await heir.leave()


OFF = Options(media=False)


async def test_a_binding_that_wants_no_media_gets_its_messages_at_once() -> None:
    bench = await ready(batch(image(1), words(2)), options=OFF)
    replica = await run(bench)
    await asyncio.sleep(1)
    assert said(bench) == ["off", "t2"]
    assert (bench.cdn.fetched, "raw" in bench.bus.writes) == ([], False)
    await replica.leave()


async def test_media_that_were_not_wanted_are_not_fetched_later_either() -> None:
    bench = await ready(batch(image(1)))
    bench.cdn.has("p1", None)
    replica = await run(bench)
    await asyncio.sleep(1)
    await bench.bind(options=OFF)
    bench.chat.polls.append(batch(image(2), cursor="c"))
    replica.session.cut_off()
    await asyncio.sleep(1)
    assert waiting(bench) == 2
    await replica.die()
    bench.cdn.has("p1", PNG)
    heir = await heir_of(bench)
    await asyncio.sleep(1)
    assert said(bench) == ["+", "off"]
    assert "p2" not in bench.cdn.fetched
    await heir.leave()
