"""What a message costs, in what can be counted the same on every machine: writes, reads, tasks and function calls.

Seconds belong into tests/bench. Here a change that makes each message dearer, or dearer as state grows, is noticed by
its numbers. The bounds leave a tenth for other versions of Python and of what is installed; tighten them with care.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Awaitable, Coroutine
from types import FrameType
from typing import Any, NamedTuple

import pytest

from adapter.contract import BindingEvent
from adapter.inbound.cursors import acquire, give_back
from adapter.inbound.poller import poll_forever
from adapter.inbound.sessions import Session
from adapter.outbound.router import Router
from adapter.ports import Polled
from tests.fakes import LIMITS as TAKEN
from tests.fakes import Bench, EndOfScript, FakeDelivery, raw_message

VIRTUAL_TIME = True

BOT, USER = "b1@im.bot", "u1@im.wechat"
LIMITS = {
    "a message by itself": 138,
    "a message in a batch": 37,
    "a command": 152,
    "a command on plain wechat.out": 23,
}
"""Calls: a little above what they were when this was last looked at."""


class Cost(NamedTuple):
    """Of one message."""

    calls: float
    """Of Python functions in adapter/; what libraries do is theirs."""
    tasks: float
    writes: Counter[str]


async def measured(bench: Bench, work: Awaitable[Any], messages: int) -> Cost:
    """What `work` costs, per message; fakes and tests do not count."""
    calls = tasks = 0
    loop = asyncio.get_running_loop()

    def see(frame: FrameType, event: str, _: Any) -> None:
        nonlocal calls
        if event == "call" and "/adapter/" in frame.f_code.co_filename:
            calls += 1

    def make(
        loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any], **options: Any
    ) -> asyncio.Task[Any]:
        nonlocal tasks
        tasks += 1
        return asyncio.Task(coroutine, loop=loop, **options)

    before = Counter(bench.bus.writes)
    loop.set_task_factory(make)  # type: ignore[arg-type]
    sys.setprofile(see)
    try:
        await work
    finally:
        sys.setprofile(None)
        loop.set_task_factory(None)
    writes = Counter(bench.bus.writes)
    writes.subtract(before)
    return Cost(calls / messages, tasks / messages, +writes)


def batch(number: int, size: int) -> Polled:
    """Messages of one user, none like another."""
    numbers = range(number * size, (number + 1) * size)
    messages = [raw_message(index, {"type": 1, "text_item": {"text": f"hello {index}"}}) for index in numbers]
    return Polled(messages, f"cursor {number}", 35_000)


async def among(others: int) -> Bench:
    """One bot, and others that the replica knows, each with a user."""
    bench = Bench()
    await bench.bind()
    for number in range(others):
        await bench.bind(f"other{number}", f"o{number}@im.bot", f"ou{number}@im.wechat")
        bench.hears(f"o{number}@im.bot", f"ou{number}@im.wechat")
        await bench.contexts.peer(f"o{number}@im.bot", f"ou{number}@im.wechat")
    return bench


async def inbound(*, size: int, batches: int = 20, others: int = 0) -> Cost:
    """Of a message in batches of `size`, among `others` bots and users that the replica knows."""
    bench = await among(others)
    bench.chat.polls.extend(batch(number, size) for number in range(batches + 1))
    bench.chat.script_ends = True
    session, needs = Session(BOT), bench.incoming()
    place = await acquire(session, needs)
    assert place is not None

    async def poll() -> None:
        with pytest.raises(EndOfScript):
            await poll_forever(session, place, needs)

    return await measured(bench, poll(), (batches + 1) * size)


async def outbound(*, commands: int = 40, queued: int = 0, parked: int = 0, users: int = 0) -> Cost:
    """Of a command of one user, while others of the shard wait: commands queued, or parked, or users known."""
    bench = Bench()
    await bench.bind()
    bench.hears(used=-1000)
    await bench.bind("s1", "b2@im.bot", "slow@im.wechat")
    bench.hears("b2@im.bot", "slow@im.wechat", used=-1000)
    await bench.bind("s1", "b3@im.bot", "closed@im.wechat")
    for number in range(users):
        bench.hears(BOT, f"known{number}@im.wechat")
        await bench.contexts.peer(BOT, f"known{number}@im.wechat")
    shard = bench.shard(gap_s=0.0, parked_per_user=100_000, parked_per_sandbox=100_000)
    await shard.load()
    if queued:
        bench.chat.hold_sends["slow@im.wechat"] = asyncio.Event()
    for number in range(queued):
        shard.on_delivery(bench.command(f"later {number}", user="slow@im.wechat", id=f"q{number}"))
    for number in range(parked):
        shard.on_delivery(bench.command(f"parked {number}", user="closed@im.wechat", id=f"p{number}"))
    await asyncio.sleep(1)
    done = len(bench.chat.sent)

    async def send() -> None:
        for number in range(commands):
            shard.on_delivery(bench.command(f"hi {number}", user=USER, id=f"c{number}"))
            await asyncio.sleep(1)

    cost = await measured(bench, send(), commands)
    assert [sent.text for sent in bench.chat.sent[done:]] == [f"hi {number}" for number in range(commands)]
    shard.stop()
    return cost


async def test_a_message_by_itself_costs_three_writes() -> None:
    cost = await inbound(size=1, batches=40)
    assert cost.writes == {"token": 41, "in": 41, "cursor": 41 + 1}, "and now and then what was seen, apart"
    assert cost.tasks == 0
    assert cost.calls <= LIMITS["a message by itself"]


async def test_in_a_batch_a_message_costs_one_write_and_no_task() -> None:
    cost = await inbound(size=20)
    assert cost.writes == {"token": 21, "in": 420, "cursor": 21 + 4}, "with every fifth what was seen, apart"
    assert cost.tasks == 0
    assert cost.calls <= LIMITS["a message in a batch"]


async def test_a_message_costs_the_same_whoever_else_there_is() -> None:
    await inbound(size=1)  # fills the caches of names, which are empty where this test is the first
    alone, among_many = await inbound(size=1), await inbound(size=1, others=500)
    assert among_many == alone


async def lines_of(work: Awaitable[object]) -> int:
    """Lines of adapter/ that run. A loop counts, though it calls nothing."""
    lines = 0

    def see(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal lines
        if "/adapter/" not in frame.f_code.co_filename:
            return None
        lines += event == "line"
        return see

    sys.settrace(see)
    try:
        await work
    finally:
        sys.settrace(None)
    return lines


async def handed_on(others: int) -> int:
    """Lines that run as a bot is taken over and given back."""
    bench = await among(others)
    session, needs = Session(BOT), bench.incoming()

    async def hand_on() -> None:
        assert await acquire(session, needs) is not None
        await give_back(session, needs)

    return await lines_of(hand_on())


async def loaded(others: int) -> int:
    """Lines that run as a shard is taken over, of which a user is known from the last time."""
    bench = await among(others)
    bench.hears()
    await bench.contexts.peer(BOT, USER)
    shard = bench.shard()
    lines = await lines_of(shard.load())
    assert bench.contexts.loaded(BOT, USER) is None
    shard.stop()
    return lines


async def test_a_bot_is_taken_over_at_the_same_cost_whoever_else_there_is() -> None:
    """Or ten thousand at once cost a hundred times what a thousand do."""
    alone, among_many = await handed_on(0), await handed_on(500)
    assert alone > 50
    assert among_many <= alone + 50


async def test_a_shard_is_taken_over_at_the_same_cost_whoever_else_there_is() -> None:
    """Or those of a replica that was killed look at all its bots for each of them, before they poll any."""
    alone, among_many = await loaded(0), await loaded(500)
    assert alone > 20
    assert among_many <= alone + 50


async def test_a_command_costs_a_record_a_receipt_and_a_note_for_quotes() -> None:
    cost = await outbound()
    assert cost.writes == {"token": 40, "event": 40, "quote": 40}
    assert cost.calls <= LIMITS["a command"]


@pytest.mark.parametrize(
    ("state", "dearer"),
    [({"queued": 400}, 1.25), ({"parked": 400}, 1.01), ({"users": 400}, 1.01)],
    ids=["queued: it is read back", "parked", "users"],
)
async def test_a_command_costs_the_same_whatever_waits_for_others(state: dict[str, int], dearer: float) -> None:
    alone, among_many = await outbound(), await outbound(**state)
    assert among_many.calls <= alone.calls * dearer
    assert among_many.writes == alone.writes


@pytest.mark.parametrize("is_named", [True, False], ids=["users named", "users learned"])
async def test_the_first_commands_of_many_users_of_a_sandbox_read_what_is_theirs_once(is_named: bool) -> None:
    """Whether the user had another bot before is in the events of the sandbox's bindings, which name no user that was
    learned only after that."""
    users, bench = 200, Bench()
    for number in range(users):
        bot, user = f"b{number}@im.bot", f"u{number}@im.wechat"
        await bench.bind("s1", bot, user)
        bench.hears(bot, user)
        told = BindingEvent(sandbox="s1", bot=bot, change="bound", user=user if is_named else "")
        await bench.events.binding(told)
    shard = bench.shard()
    for number in range(users):
        shard.on_delivery(bench.command("hi", bot=f"b{number}@im.bot", id=f"c{number}"))
    await asyncio.sleep(60)
    assert len(bench.chat.sent) == users
    assert bench.bus.read_back <= 2 * users, "each event, and each command that waited for room, once"
    assert bench.contexts_bucket.reads == users, "of each user one record"
    shard.stop()


async def test_a_command_on_plain_wechat_out_costs_a_copy_more_and_no_task() -> None:
    bench = Bench()
    router = Router(bench.bus, bench.receipts, bench.names, TAKEN, lambda: None, bench.clock, bench.metrics)

    async def route() -> None:
        for number in range(40):
            body = b'{"sandbox":"s1","text":"hi %d"}' % number
            await router.route(FakeDelivery("wechat.out", body, seq=number + 1, time_ms=bench.clock.now_ms()))

    cost = await measured(bench, route(), 40)
    assert cost.writes == {"out": 40}
    assert cost.tasks == 0
    assert cost.calls <= LIMITS["a command on plain wechat.out"]
