"""What a message, a command and an idle bot cost: writes and bytes through the ports, and memory. Each bound is a
tenth above what was measured; a change that needs more has to say why."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from collections import Counter

from adapter.ports import Account, Polled
from tests.bindings.platform import Platform
from tests.fakes import Bench, batch, ready
from tests.inbound.pollers import polls, raw, texts
from tests.outbound import partitions

VIRTUAL_TIME = True

MESSAGES = 100
IDLE_BOTS = 50


def stored_bytes(bench: Bench, stream: str) -> int:
    """Payloads and headers of what a stream has."""
    return sum(
        len(stored.data) + sum(len(name) + len(value) + 4 for name, value in stored.headers.items())
        for stored in bench.bus.found(stream)
    )


async def inbound_message(per_answer: int) -> Bench:
    """The user has written MESSAGES messages, a second's worth."""
    answers = [
        batch(*(raw("hello there", first + number) for number in range(per_answer)), cursor=f"c{first}")
        for first in range(0, MESSAGES, per_answer)
    ]
    bench = await ready(*answers)
    await polls(bench)
    assert len(texts(bench)) == MESSAGES
    return bench


async def test_an_answer_costs_one_write() -> None:
    assert Counter((await inbound_message(1)).bus.writes) == {"in": MESSAGES}
    assert Counter((await inbound_message(20)).bus.writes) == {"in": MESSAGES // 20}


async def test_the_bytes_of_a_message() -> None:
    bench = await inbound_message(20)
    assert stored_bytes(bench, "IN") / MESSAGES < 520


async def test_a_command_costs_a_write_before_it_and_a_receipt() -> None:
    bench, partition = await partitions.ready(gap_ms=0, sends=0)
    bench.bus.writes.clear()
    for number in range(MESSAGES):
        partition.on_delivery(bench.command("hello there", id=f"c{number}"))
    await asyncio.sleep(60)
    assert len(bench.chat.texts) == MESSAGES
    assert [receipt.outcome for receipt in bench.bus.receipts()] == ["accepted"] * MESSAGES
    assert Counter(bench.bus.writes) == {"person": MESSAGES, "event": MESSAGES}
    assert stored_bytes(bench, "EVENT") / MESSAGES < 470
    entry = next(iter(bench.person_bucket.entries.values()))
    assert entry.value is not None
    assert len(entry.value) < 2000


async def test_a_bind_costs_binding_event_and_receipt_and_is_overwritten() -> None:
    bench = (platform := Platform()).bench
    await platform.bind()
    assert (Counter(bench.bus.writes), bench.bus.erased) == ({"binding": 1, "event": 2}, [("WECHAT_OUT", 1)])


class Silence:
    """iLink, where nobody writes."""

    async def poll(self, account: Account, cursor: str, hold_ms: int) -> Polled:
        await asyncio.sleep(hold_ms / 1000)
        return batch(cursor=None)

    async def notify(self, account: Account, *, start: bool) -> None: ...


async def test_an_idle_bot_writes_nothing_and_takes_little_memory() -> None:
    """An hour of empty polls."""
    bench = Bench()
    for number in range(IDLE_BOTS):
        await bench.bind(sandbox=f"s{number}", bot=f"b{number}@im.bot", user=f"u{number}@im.wechat")
    bench.bus.writes.clear()
    gc.collect()
    tracemalloc.start()
    chat = Silence()
    sessions = [bench.new_poller(f"b{number}@im.bot", chat=chat) for number in range(IDLE_BOTS)]
    tasks = [asyncio.get_running_loop().create_task(session.run()) for session in sessions]
    await asyncio.sleep(3600)
    gc.collect()
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert bench.bus.writes == []
    assert size / IDLE_BOTS < 18_000
    for task in tasks:
        task.cancel()
