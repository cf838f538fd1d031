"""Large answers: read up to a cap, those of a host one after the other, and refused above it with the reason."""

from __future__ import annotations

import asyncio
import gzip
import time
import zlib
from collections.abc import AsyncIterator
from types import FrameType

import pytest

from adapter.errors import Temporary
from adapter.ilink.client import READ_BYTES_PER_S, SMALL, ILink
from adapter.ilink.protocol import ANSWER_BYTES, COMMAS, OTHER_BYTES, IlinkReply
from adapter.ports import Account, Polled
from adapter.tools.metrics import Metrics
from tests.e2e.waiting import until
from tests.ilink.test_connection import Server, server

__all__ = ["server"]

FRAME = b'{"ret":0,"msgs":[{"a":"%b"}],"get_updates_buf":"b"}'
LARGEST = b"x" * (ANSWER_BYTES - len(FRAME) + 2)
"""Fills an answer to the last byte that it may have."""


def answer(body: bytes, *headers: str) -> bytes:
    lines = "".join(f"{header}\r\n" for header in (*headers, f"Content-Length: {len(body)}"))
    return f"HTTP/1.1 200 OK\r\n{lines}\r\n".encode() + body


def packed(body: bytes) -> bytes:
    return answer(gzip.compress(body, 1), "Content-Encoding: gzip")


@pytest.fixture
async def ilink(server: Server) -> AsyncIterator[ILink]:
    base = server.url.removesuffix("/ilink/bot/x")
    made = ILink(
        Metrics(),
        default_base_url=base,
        allowed_hosts=("127.0.0.1", "localhost"),
        poll_margin_s=30.0,
        send_timeout_s=30.0,
    )
    yield made
    await made.close()


async def poll(ilink: ILink, bot: str = "b1@im.bot", base: str = "") -> Polled:
    polled = await ilink.poll(Account(bot, "token", base), "", 1000)
    assert polled is not None
    return polled


@pytest.mark.parametrize("write", [answer, packed], ids=["plain", "packed"])
async def test_the_largest_answer_to_a_poll_is_read(server: Server, ilink: ILink, write: object) -> None:
    server.answer = Server.say((packed if write is packed else answer)(FRAME % LARGEST))
    assert await poll(ilink) == Polled([b'{"a":"%b"}' % LARGEST], "b", 35_000)


@pytest.mark.parametrize(
    ("raw", "detail"),
    [
        (answer(FRAME % (LARGEST + b"x")), f"the answer exceeds {ANSWER_BYTES} bytes"),
        (packed(FRAME % (LARGEST + b"x")), f"the answer exceeds {ANSWER_BYTES} bytes"),
        (answer(zlib.compress(bytes(60_000_000)), "Content-Encoding: deflate"),
         f"the answer exceeds {ANSWER_BYTES} bytes"),
        (answer(b"hello", "Content-Encoding: gzip"), "the answer cannot be unpacked"),
        (answer(gzip.compress(FRAME % LARGEST, 1)[:-1], "Content-Encoding: gzip"), "the packed answer ends early"),
        (answer(gzip.compress(FRAME)[:-1], "Content-Encoding: gzip"), "the packed answer ends early"),
        (packed(b'{"msgs":[%b]}' % b",".join([b"{}"] * (COMMAS + 2))), "the answer has too many messages"),
        (packed(b'{"msgs":[%b]}' % b",".join([b"0"] * 4_000_000)), "the answer has too many messages"),
    ],
    ids=["plain", "packed", "a bomb", "no gzip", "cut", "small and cut", "messages", "numbers"],
)  # fmt: skip
async def test_an_answer_above_a_limit_or_cut_is_refused_with_that_reason(
    server: Server, ilink: ILink, raw: bytes, detail: str
) -> None:
    server.answer = Server.say(raw)
    with pytest.raises(Temporary) as caught:
        await poll(ilink)
    assert (caught.value.reason, caught.value.detail) == ("unreadable", detail)


async def test_a_hundred_thousand_messages_of_one_answer_are_read(server: Server, ilink: ILink) -> None:
    server.answer = Server.say(packed(b'{"msgs":[%b]}' % b",".join([b"{}"] * 100_000)))
    assert (await poll(ilink)).messages == [b"{}"] * 100_000


async def test_an_answer_to_any_other_call_is_smaller(server: Server, ilink: ILink) -> None:
    body = b'{"ret":0,"x":"%b"}' % (b"x" * OTHER_BYTES)
    for raw in (answer(body), packed(body)):
        server.answer = Server.say(raw)
        with pytest.raises(Temporary):
            await ilink.notify(Account("b1@im.bot", "token", ""), start=True)


async def test_large_answers_are_read_one_after_the_other_and_small_ones_pass_them(
    server: Server, ilink: ILink
) -> None:
    body = FRAME % LARGEST
    server.answer = Server.say(packed(body))
    began = time.monotonic()
    large = [asyncio.create_task(poll(ilink)) for _ in range(4)]
    await until(lambda: len(server.heads) == len(large), "all have asked")
    server.answer = Server.say(packed(FRAME % b"small"))
    for _ in range(10):
        await poll(ilink)
    assert not all(task.done() for task in large)
    await asyncio.gather(*large)
    assert time.monotonic() - began >= len(large) * len(body) / READ_BYTES_PER_S


async def test_large_answers_of_one_host_delay_no_other_hosts(server: Server, ilink: ILink) -> None:
    """Theirs are told as in hand while they wait, so that no poll is cut then."""
    server.answer = Server.say(packed(FRAME % LARGEST))
    hostile = [asyncio.create_task(poll(ilink, f"b{number}@im.bot")) for number in range(4)]
    await until(lambda: all(ilink.has_answer(f"b{number}@im.bot") for number in range(4)), "all wait for their turn")
    other = server.url.removesuffix("/ilink/bot/x").replace("127.0.0.1", "localhost")
    server.answer = Server.say(packed(FRAME % (b"x" * 2 * SMALL)))
    await poll(ilink, "other@im.bot", other)
    assert sum(task.done() for task in hostile) <= 1
    await asyncio.gather(*hostile)
    assert not any(ilink.has_answer(f"b{number}@im.bot") for number in range(4))


async def test_who_waits_after_a_large_answer_that_cannot_be_read_does_not_keep_it(
    server: Server, ilink: ILink
) -> None:
    server.answer = Server.say(answer(b'{"msgs":[' + b" " * 200_000))
    with pytest.raises(Temporary) as caught:
        await poll(ilink)
    frames: list[FrameType] = []
    problem: BaseException | None = caught.value
    while problem is not None:
        trace = problem.__traceback__
        while trace is not None:
            frames.append(trace.tb_frame)
            trace = trace.tb_next
        problem = problem.__cause__
    kept = [value for frame in frames for value in frame.f_locals.values() if isinstance(value, IlinkReply)]
    assert frames
    assert not [reply for reply in kept if len(reply.body) > SMALL]
