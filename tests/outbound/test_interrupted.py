"""What is cut off while it waits: slots come back, and nothing of one command is taken for another's."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import pytest

from tests.fakes import FakeDelivery
from tests.outbound.shards import BOT, STALE, USER, free_slots, outcomes, ready

VIRTUAL_TIME = True


async def hang(_: str) -> None:
    await asyncio.Event().wait()


async def test_a_slot_comes_back_if_the_shard_is_lost_while_the_send_is_stored() -> None:
    bench, shard = await ready()
    bench.conversation_bucket.on_write = hang
    shard.intake.on_delivery(bench.command("a"))
    await asyncio.sleep(5)
    assert free_slots(bench) == 7
    shard.stop()
    await asyncio.sleep(5)
    assert free_slots(bench) == 8


@pytest.mark.parametrize("steps", range(8))
async def test_a_slot_comes_back_if_the_shard_is_lost_before_it_is_used(steps: int) -> None:
    bench, shard = await ready()
    slots = bench.slots
    for _ in range(8):
        assert slots.try_acquire("other")
    shard.intake.on_delivery(bench.command("a"))
    await asyncio.sleep(5)
    slots.release("other")
    for _ in range(steps):
        await asyncio.sleep(0)
    shard.stop()
    await asyncio.sleep(1)
    for _ in range(7):
        slots.release("other")
    assert free_slots(bench) == 8


async def test_the_drain_of_a_shard_whose_records_cannot_be_stored_has_an_end() -> None:
    bench, shard = await ready()
    bench.conversation_bucket.on_write = hang
    shard.intake.on_delivery(bench.command("a"))
    await asyncio.sleep(5)
    began = bench.clock.monotonic()
    await shard.drain(20)
    assert bench.clock.monotonic() - began < 100
    assert free_slots(bench) == 8


async def test_the_upload_of_an_expired_command_is_not_taken_for_the_next_one() -> None:
    bench, shard = await ready()
    bench.cdn.took_s = 30.0

    def media(data: bytes, **fields: Any) -> FakeDelivery:
        return bench.command(items=[{"kind": "file", "data": base64.b64encode(data).decode()}], **fields)

    shard.intake.on_delivery(media(b"AAAA", id="a", expires_in_s=20))
    shard.intake.on_delivery(media(b"BBBB", id="b"))
    await asyncio.sleep(120)
    assert outcomes(bench) == [("a", "refused", "expired"), ("b", "accepted", "")]
    data = {f"ref{number}": upload.data for number, upload in enumerate(bench.cdn.uploads, 1)}
    assert [data[sent.media.reference] for sent in bench.chat.sent if sent.media] == [b"BBBB"]


async def test_minus_14_asks_for_the_session_of_the_bot_that_sent() -> None:
    """The user has logged in again, and has not written since."""
    bench, shard = await ready()
    await bench.bind(state="needs_login")
    await bench.bind(bot="b2@im.bot", user=USER)
    bench.chat.sends.extend([STALE] * 20)
    shard.intake.on_delivery(bench.command("a", id="a"))
    await asyncio.sleep(400)
    assert outcomes(bench) == [("a", "refused", "rejected")]
    assert {sent.bot for sent in bench.chat.sent} == {"b2@im.bot"}


async def test_a_bot_that_is_not_polled_does_not_keep_a_command_from_expiring() -> None:
    bench, shard = await ready()
    bench.chat.notify_fails = STALE
    bench.chat.sends.extend([STALE] * 20)
    shard.intake.on_delivery(bench.command("a", id="a", bot=BOT, expires_in_s=60))
    await asyncio.sleep(400)
    assert [(command, outcome) for command, outcome, _ in outcomes(bench)][-1] == ("a", "refused")
