"""Consumers: order, resets, and who owns what was delivered."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from adapter.jetstream import topology
from adapter.jetstream.consumer import PER_TURN, Consumer, Delivery
from adapter.ports import BusMessage
from tests.bus.rig import NAMES, PATIENCE_S, STATUS, Fence, Rig, control
from tests.e2e.waiting import eventually, until


class Counted(Consumer):
    """Knows how often it was reset."""

    resets = 0
    on_reset: Callable[[], None] = staticmethod(lambda: None)

    async def reset(self) -> None:
        await super().reset()
        self.resets += 1
        self.on_reset()


class Reader:
    """What a partition's consumer delivers."""

    def __init__(
        self,
        rig: Rig,
        *,
        room: int = 8,
        name: str = topology.ROUTER,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.got: list[Delivery] = []
        stream, config = topology.consumer_config(NAMES, name)
        self.stream, self.name, config = stream, name, config | {"max_ack_pending": room}
        self.consumer = Counted(rig.connection, stream, config, check=check)
        self.task = rig.spawn(self.consumer.run(self.got.append))

    @property
    def resets(self) -> int:
        return self.consumer.resets

    @property
    def texts(self) -> list[str]:
        return [delivery.data.decode() for delivery in self.got]

    async def unacknowledged(self) -> int:
        """How many the server holds for unacknowledged. An acknowledgement has no answer of its own."""
        info = await self.consumer.connection.api_request(f"CONSUMER.INFO.{self.stream}.{self.name}")
        return int(info["num_ack_pending"])

    async def have(self, count: int) -> None:
        await until(lambda: len(self.got) >= count, f"{count} deliveries")


async def test_a_consumer_delivers_in_order_and_no_more_than_there_is_room_for(rig: Rig) -> None:
    texts = [str(number) for number in range(30)]
    await control(rig, *texts)
    reader = Reader(rig, room=8)
    await reader.have(8)
    await asyncio.sleep(0.1)
    assert reader.texts == texts[:8]
    for number in range(30):
        await reader.have(number + 1)
        await reader.got[number].ack()
    assert reader.texts == texts
    assert not any(delivery.redelivered for delivery in reader.got)


async def test_a_delivery_with_a_status_among_its_headers_is_one_as_any_other(rig: Rig) -> None:
    await control(rig)
    for number, headers in enumerate(STATUS):
        await rig.publisher.store(BusMessage("out", NAMES.out_plain, str(number).encode(), headers))
    reader = Reader(rig)
    await reader.have(len(STATUS))
    assert (reader.texts, reader.resets) == (["0", "1", "2", "3", "4"], 1)


async def test_the_next_owner_gets_what_is_unsettled_in_order_as_redelivered(rig: Rig) -> None:
    texts = [str(number) for number in range(6)]
    await control(rig, *texts)
    first = Reader(rig)
    await first.have(6)
    for number in (0, 2):
        await first.got[number].ack()

    async def settled() -> bool:  # the server may answer others before it has looked at an acknowledgement
        return await first.unacknowledged() == 4

    await eventually(settled, "both are acknowledged")
    first.task.cancel()
    await asyncio.wait([first.task])
    await rig.publisher.store(BusMessage("out", NAMES.out_plain, b"new", {}))

    successor = Reader(rig)
    await successor.have(5)
    assert successor.texts == ["1", "3", "4", "5", "new"]
    assert [delivery.redelivered for delivery in successor.got] == [True] * 4 + [False]


async def test_an_owner_cut_off_before_it_reads_knows_what_was_in_flight_before(rig: Rig) -> None:
    """The reset takes the server's memory of what was delivered; ours must outlast it."""
    await control(rig, "0", "1")
    first = Reader(rig)
    await first.have(2)
    first.task.cancel()
    await asyncio.wait([first.task])

    successor = Reader(rig)

    def cut() -> None:
        if successor.resets == 1:
            rig.bus.kill()
            rig.spawn(rig.bus.start())

    successor.consumer.on_reset = cut
    await successor.have(2)
    assert successor.resets == 2
    assert [(delivery.data, delivery.redelivered) for delivery in successor.got] == [(b"0", True), (b"1", True)]


async def test_a_command_is_on_no_disk_once_all_are_acknowledged(rig: Rig, tmp_path: Path) -> None:
    """A bind has a token. A command that waits keeps the file with the others."""
    await control(rig)
    reader = Reader(rig, room=512)

    def on_disk() -> set[bytes]:
        return {
            found
            for path in (tmp_path / "nats").rglob("*.blk")
            for found in re.findall(rb"token \d+", path.read_bytes())
        }

    for begun in (0, 60):  # later blocks begin with tombstones
        await control(rig, *(f"token {number} {'x' * 10_000}" for number in range(60)))
        await reader.have(begun + 60)
        *others, last = random.Random(begun).sample(reader.got[begun:], 60)
        for delivery in others:
            await delivery.ack()
        assert len(on_disk()) == 60
        await last.ack()
        await until(lambda: not on_disk(), "no command is on the disk")


async def test_a_kill_of_the_server_brings_what_is_unsettled_again_in_order(rig: Rig) -> None:
    """And what was acknowledged just before: the server writes that to its disk up to a tenth of a second later."""
    await control(rig, "0", "1", "2")
    reader = Reader(rig)
    await reader.have(3)
    await reader.got[0].ack()
    async with asyncio.timeout(60):
        while await reader.unacknowledged() != 2:
            await asyncio.sleep(0.01)
    rig.bus.kill()
    await rig.bus.start()
    await until(lambda: reader.texts[3:][-1:] == ["2"], "what is unsettled")
    assert reader.texts[3:] in (["1", "2"], ["0", "1", "2"])
    assert reader.resets == 2
    assert all(delivery.redelivered for delivery in reader.got[3:])
    count = len(reader.got)
    await rig.publisher.store(BusMessage("out", NAMES.out_plain, b"3", {}))
    await reader.have(count + 1)
    assert reader.texts[count:] == ["3"]


@pytest.mark.parametrize("more", [True, False], ids=["seen at the next delivery", "seen at a heartbeat"])
async def test_a_delivery_that_got_lost_on_its_way_comes_again_before_what_is_after_it(
    rig: Rig, more: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the consumer's leader dies with it: here somebody else gets it."""
    if not more:
        monkeypatch.setattr("adapter.jetstream.consumer.HEARTBEAT_S", 0.2)
    monkeypatch.setattr("adapter.jetstream.consumer.BATCH", 1)
    monkeypatch.setattr("adapter.jetstream.consumer.REQUEST_AT", 0)
    await control(rig, "0")
    reader = Reader(rig)
    await reader.have(1)
    thief = await rig.connection.client().subscribe(rig.connection.client().new_inbox())
    pull = f"$JS.API.CONSUMER.MSG.NEXT.{NAMES.stream_out}.{topology.ROUTER}"
    await rig.connection.publish(pull, b'{"batch":1}', reply=thief.subject)
    texts = ["0"]
    while not thief.pending_msgs:  # the server gives one to each that waits
        texts.append(str(len(texts)))
        await control(rig, texts[-1])
        await until(lambda: thief.pending_msgs + len(reader.got) == len(texts), "somebody has got it")
    before = len(reader.got)
    if more:
        texts.append(str(len(texts)))
        await control(rig, texts[-1])
    await reader.have(before + len(texts))
    assert reader.texts == [*texts[:before], *texts]
    assert reader.resets == 2


async def test_what_a_pull_of_another_takes_before_the_reset_is_answered_comes_again(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server under load delivers first, and then says in its answer how much it has delivered."""
    monkeypatch.setattr("adapter.jetstream.consumer.HEARTBEAT_S", 0.2)
    await control(rig, "0", "1")
    thief = await rig.connection.client().subscribe(rig.connection.client().new_inbox())
    pull = f"$JS.API.CONSUMER.MSG.NEXT.{NAMES.stream_out}.{topology.ROUTER}"
    api, resets = rig.connection.api_request, 0

    async def slow(verb: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        nonlocal resets
        answer = await api(verb, *args, **kwargs)
        resets += verb.startswith("CONSUMER.RESET")
        if resets == 1 and verb.startswith("CONSUMER.RESET"):
            await rig.connection.publish(pull, b'{"batch":2}', reply=thief.subject)
            assert [(await thief.next_msg(timeout=30)).data for _ in range(2)] == [b"0", b"1"]
            return await api(verb.replace("RESET", "INFO"))
        return answer

    monkeypatch.setattr(rig.connection, "api_request", slow)
    reader = Reader(rig)
    await reader.have(2)
    assert reader.texts == ["0", "1"]
    assert resets == 2


async def test_an_owner_that_was_frozen_takes_nothing_from_the_one_after_it(rig: Rig) -> None:
    """It thaws, finds its consumer silent or its connection gone, and would reset it: what it then took would be
    missing for the new owner, and its numbers would fit, as it takes just as many as the new owner has had."""
    texts = [str(number) for number in range(8)]
    await control(rig, *texts)
    successor = Reader(rig, room=8)
    await successor.have(8)
    await successor.got[0].ack()
    await rig.publisher.store(BusMessage("out", NAMES.out_plain, b"8", {}))
    async with asyncio.timeout(PATIENCE_S):
        while await successor.unacknowledged() != 8:
            await asyncio.sleep(0.01)

    ensure_owner = Fence(lost_from=1)
    thawed = Reader(rig, room=8, check=ensure_owner)
    await until(lambda: ensure_owner.asked > 3 or len(thawed.got) == 8, "it tried")
    thawed.task.cancel()
    await asyncio.wait([thawed.task])
    await successor.got[1].ack()
    await rig.publisher.store(BusMessage("out", NAMES.out_plain, b"9", {}))
    await successor.have(10)
    assert successor.texts == [*texts, "8", "9"]
    assert thawed.got == []


@pytest.mark.parametrize("before", [1, 2, 3], ids=["before it looks", "before its reset", "before its pull"])
async def test_an_owner_that_loses_its_lease_on_the_way_stops_there(rig: Rig, before: int) -> None:
    await control(rig, "0")
    successor = Reader(rig)
    await successor.have(1)
    ensure_owner = Fence(lost_from=before)
    loser = Reader(rig, check=ensure_owner)
    await until(lambda: ensure_owner.asked > before + 2, "it tried again")
    assert loser.got == []
    assert loser.resets == (before == 3)
    ensure_owner.lost_from = float("inf")  # it was only paused
    await loser.have(1)
    assert loser.texts == ["0"]


async def test_a_consumer_that_is_deleted_is_made_again_and_takes_nothing_for_new(rig: Rig) -> None:
    """The one before it may have delivered what is still there; what comes later is new."""
    await control(rig, "0", "1")
    first = Reader(rig)
    await first.have(2)
    await first.got[0].ack()
    while len(await rig.read(NAMES.stream_out, NAMES.out_plain)) > 1:
        await asyncio.sleep(0.01)
    first.task.cancel()
    await rig.connection.api_request(f"CONSUMER.DELETE.{NAMES.stream_out}.{topology.ROUTER}")
    successor = Reader(rig)
    await successor.have(1)
    await control(rig, "2")
    await successor.have(2)
    assert [(delivery.data, delivery.is_old) for delivery in successor.got] == [(b"1", True), (b"2", False)]


async def test_a_shards_consumer_which_no_server_keeps_is_made_again_after_a_kill(rig: Rig) -> None:
    """What was delivered before comes again, in order, and is said to."""
    name = topology.partition_consumer(NAMES.partition_of("s1"))
    reader = Reader(rig, name=name)
    for text in (b"0", b"1", b"2"):
        await rig.publisher.store(BusMessage("out", NAMES.out("s1"), text, {}))
    await reader.have(3)
    await reader.got[0].ack()
    while len(await rig.read(NAMES.stream_out, NAMES.out_of_sandbox("s1"))) > 2:
        await asyncio.sleep(0.01)
    rig.bus.kill()
    await rig.bus.start()
    await reader.have(5)
    await rig.publisher.store(BusMessage("out", NAMES.out("s1"), b"3", {}))
    await reader.have(6)
    later = [(delivery.data, delivery.redelivered) for delivery in reader.got[3:]]
    assert later == [(b"1", True), (b"2", True), (b"3", False)]


async def test_a_paused_consumer_is_reported_when_it_is_read(rig: Rig) -> None:
    first = Reader(rig)
    await until(lambda: first.resets > 0, "there is a consumer")
    first.task.cancel()
    await asyncio.wait([first.task])
    await control(rig, "0")
    pause = f"CONSUMER.PAUSE.{NAMES.stream_out}.{topology.ROUTER}"
    await rig.connection.api_request(pause, {"pause_until": "2999-01-01T00:00:00Z"})
    with capture_logs() as logs:
        reader = Reader(rig)
        await until(lambda: reader.resets > 0, "it is read")
    assert [line["event"] for line in logs] == ["consumer.paused"]
    await rig.connection.api_request(pause, {})
    await reader.have(1)


async def test_a_stream_made_again_goes_on_above_its_old_sequences(rig: Rig) -> None:
    await control(rig, "0", "1")
    last = await rig.history.read_last(NAMES.stream_out, NAMES.out_plain)
    await rig.connection.api_request(f"STREAM.DELETE.{NAMES.stream_out}")
    await topology.ensure_topology(rig.connection, NAMES, rig.bus.settings)
    assert last is not None
    assert await rig.first(NAMES.stream_out) > last.seq


async def test_a_backlog_is_delivered_in_turns(rig: Rig) -> None:
    """All in one turn of the event loop would hold it up."""
    await control(rig, *map(str, range(300)))
    reader, most, before = Reader(rig, room=300), 0, 0
    while len(reader.got) < 300:
        most, before = max(most, len(reader.got) - before), len(reader.got)
        await asyncio.sleep(0)
    assert most == PER_TURN
    assert reader.texts == [*map(str, range(300))]
