"""What is cut off while it waits: slots come back, and nothing of one command is taken for another's."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

from structlog.testing import capture_logs

from adapter.contract.names import person_token
from adapter.errors import Temporary
from tests.fakes import Bench, FakeDelivery, settle
from tests.outbound.partitions import BOT, STALE, THROTTLED, USER, free_slots, outcomes, ready, user_writes

VIRTUAL_TIME = True

AGAIN = "b2@im.bot"
"""The next bot of the same user."""


async def hang(_: str) -> None:
    await asyncio.Event().wait()


def media(bench: Bench, data: bytes, **fields: Any) -> FakeDelivery:
    """A command for a file."""
    return bench.command(items=[{"kind": "file", "data": base64.b64encode(data).decode()}], **fields)


async def test_the_drain_of_a_shard_whose_records_cannot_be_stored_has_an_end() -> None:
    bench, partition = await ready()
    bench.person_bucket.on_write = hang
    partition.on_delivery(bench.command("a"))
    await asyncio.sleep(5)
    began = bench.clock.monotonic()
    await bench.drain(20)
    assert bench.clock.monotonic() - began < 25
    await settle()
    assert free_slots(bench) == 8


async def test_the_upload_of_an_expired_command_is_not_taken_for_the_next_one() -> None:
    bench, partition = await ready()
    bench.cdn.took_s = 30.0

    partition.on_delivery(media(bench, b"AAAA", id="a", expires_in_s=20))
    partition.on_delivery(media(bench, b"BBBB", id="b"))
    await asyncio.sleep(120)
    assert outcomes(bench) == [("a", "refused", "expired"), ("b", "accepted", "")]
    data = {f"ref{number}": upload.data for number, upload in enumerate(bench.cdn.uploads, 1)}
    assert [data[sent.media.reference] for sent in bench.chat.sent if sent.media] == [b"BBBB"]


async def test_minus_14_asks_for_the_session_of_the_bot_that_sent() -> None:
    bench, partition = await ready()
    await bench.bind(state="needs_login")
    await bench.bind(bot="b2@im.bot", user=USER)
    await user_writes(bench, bot="b2@im.bot")
    bench.chat.sends.extend([STALE] * 20)
    partition.on_delivery(bench.command("a", id="a"))
    await asyncio.sleep(400)
    assert outcomes(bench) == [("a", "refused", "rejected")]
    assert {sent.bot for sent in bench.chat.sent} == {"b2@im.bot"}


async def test_a_new_bot_of_the_user_uploads_what_its_predecessor_could_not_send() -> None:
    bench, partition = await ready()
    bench.chat.sends.append(Temporary("network"))
    partition.on_delivery(media(bench, b"AAAA", id="file"))
    await asyncio.sleep(0.5)
    await bench.bind(bot=AGAIN)
    await bench.bindings.remove(BOT)
    await user_writes(bench, bot=AGAIN)
    await asyncio.sleep(30)
    assert [upload.bot for upload in bench.cdn.uploads] == [BOT, AGAIN]
    sent = [(sent.bot, sent.media.reference) for sent in bench.chat.sent if sent.media]
    assert sent == [(BOT, "ref1"), (AGAIN, "ref2")]
    assert outcomes(bench) == [("file", "parked", "window_closed"), ("file", "accepted", "")]


async def test_what_was_uploaded_before_it_was_parked_is_uploaded_again() -> None:
    """iLink keeps uploads for a time that nobody knows."""
    bench, partition = await ready()
    bench.chat.sends.append(THROTTLED)
    partition.on_delivery(media(bench, b"AAAA", id="file"))
    await asyncio.sleep(40 * 3600)
    await user_writes(bench)
    await asyncio.sleep(30)
    assert [sent.media.reference for sent in bench.chat.sent if sent.media] == ["ref1", "ref2"]
    assert outcomes(bench) == [("file", "parked", "throttled"), ("file", "accepted", "")]


async def test_a_person_who_is_erased_as_their_send_is_stored_gets_nothing() -> None:
    bench, partition = await ready()

    async def erase(_: str) -> None:
        bench.person_bucket.on_write = None
        bench.person_bucket.put(f"s1.{person_token('s1', USER)}", None)

    bench.person_bucket.on_write = erase
    with capture_logs() as logs:
        partition.on_delivery(bench.command("hi", id="c1"))
        await asyncio.sleep(10)
    assert bench.chat.sent == []
    assert outcomes(bench) == [("c1", "refused", "not_bound")]
    assert [line for line in logs if line["event"].endswith("crashed")] == []
