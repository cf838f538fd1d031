"""What large answers take: shares of one budget, a thread, and never the time or the memory of small ones."""

from __future__ import annotations

import asyncio
import gc
import gzip
import threading
import zlib
from collections.abc import AsyncIterator
from types import FrameType

import pytest

from adapter.errors import Temporary, Uncertain
from adapter.ilink.budget import SMALL, ByteBudget
from adapter.ilink.client import ILink
from adapter.ilink.connection import Connection
from adapter.ilink.protocol import ANSWER_BYTES, OTHER_BYTES, Reply, Request
from adapter.ilink.tls import ResumingContext
from adapter.ilink.transport import Transport
from adapter.observability.metrics import Metrics
from adapter.ports import Account
from tests.e2e.waiting import until
from tests.fakes import Wire
from tests.ilink.test_transport import RESOLVER, Server, server

__all__ = ["server"]

LARGE = 3 * SMALL


class Reading(Wire):
    """A transport that may be told to stop reading."""

    paused = False

    def pause_reading(self) -> None:
        self.paused = True


def answer(body: bytes, *headers: str) -> bytes:
    lines = "".join(f"{header}\r\n" for header in (*headers, f"Content-Length: {len(body)}"))
    return f"HTTP/1.1 200 OK\r\n{lines}\r\n".encode() + body


@pytest.fixture
def budget() -> ByteBudget:
    return ByteBudget(2 * LARGE)


@pytest.fixture
async def transport(budget: ByteBudget) -> AsyncIterator[Transport]:
    made = Transport(tls=ResumingContext(), budget=budget, resolver=RESOLVER)
    yield made
    await made.close()
    budget.close()


async def ask(transport: Transport, server: Server, *, timeout_s: float = 30.0) -> Reply:
    return await transport.exchange(server.url, Request("x", "", {}, b"{}", largest=LARGE), timeout_s)


# shares ------------------------------------------------------------------------------------------------------


async def test_shares_are_given_in_turn_and_a_small_one_overtakes_no_large_one() -> None:
    budget = ByteBudget(100)
    first, large, small = budget.reserve(60), budget.reserve(80), budget.reserve(10)
    assert (first.done(), large.done(), small.done(), budget.free) == (True, False, False, 40)
    first.result().shrink(25)
    assert not large.done()
    first.result().release()
    assert (large.done(), small.done(), budget.free) == (True, True, 10)
    first.result().release()
    assert budget.free == 10, "what is released twice counts once"


async def test_one_that_is_larger_than_the_budget_gets_the_whole() -> None:
    budget = ByteBudget(100)
    small, large = budget.reserve(1), budget.reserve(1000)
    assert not large.done()
    small.result().release()
    assert large.result().size == 100


async def test_who_waits_no_more_takes_nothing() -> None:
    budget = ByteBudget(100)
    first, second, third = (budget.reserve(100) for _ in range(3))
    second.cancel()
    first.result().release()
    assert third.done()


async def test_a_share_that_nobody_holds_comes_back_whatever_thread_it_ends_in() -> None:
    budget = ByteBudget(100)
    budget.reserve(100).result()
    await until(lambda: budget.free == 100, "it came back")
    held = [budget.reserve(100).result()]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    await until(lambda: budget.free == 100, "it came back")


# answers -----------------------------------------------------------------------------------------------------


async def test_an_answer_of_usual_size_takes_no_share(
    server: Server, transport: Transport, budget: ByteBudget
) -> None:
    taken = budget.reserve(2 * LARGE).result()
    server.answer = Server.say(answer(b"x" * SMALL))
    assert (await ask(transport, server)).share is None
    server.answer = Server.say(answer(gzip.compress(b"x" * SMALL), "Content-Encoding: gzip"))
    reply = await ask(transport, server)
    assert (len(reply.body), reply.share) == (SMALL, None)
    taken.release()


@pytest.mark.parametrize("packed", [False, True])
async def test_a_large_answer_holds_its_share_until_that_is_released(
    server: Server, transport: Transport, budget: ByteBudget, packed: bool
) -> None:
    body = bytes(LARGE - 1)
    server.answer = Server.say(answer(gzip.compress(body), "Content-Encoding: gzip") if packed else answer(body))
    reply = await ask(transport, server)
    assert reply.body == body
    assert reply.share is not None
    await until(lambda: budget.free == LARGE + 1, "what it did not need is back")
    reply.share.release()
    assert budget.free == 2 * LARGE


async def test_a_large_answer_waits_for_its_share_and_the_wait_costs_neither_it_nor_others(
    server: Server, budget: ByteBudget
) -> None:
    """Not for longer than it may take, by its own clock, which stands still meanwhile."""
    transport = Transport(tls=ResumingContext(), budget=budget, resolver=RESOLVER)
    taken = budget.reserve(2 * LARGE).result()
    body = bytes(range(256)) * (LARGE // 256)
    written = asyncio.Event()

    async def slowly(writer: asyncio.StreamWriter) -> None:
        whole = answer(body)
        writer.write(whole[: 2 * SMALL])
        await writer.drain()
        written.set()
        writer.write(whole[2 * SMALL :])
        await writer.drain()

    server.answer = slowly
    large = asyncio.create_task(ask(transport, server, timeout_s=0.5))
    await written.wait()
    server.answer = Server.say(answer(b"small"))
    begun = asyncio.get_running_loop().time()
    while asyncio.get_running_loop().time() < begun + 1.0:  # twice as long as it may take
        assert (await ask(transport, server)).body == b"small"
    assert not large.done()
    taken.release()
    assert (await large).body == body
    await transport.close()


async def test_a_large_answer_that_is_given_up_gives_its_share_back(
    server: Server, transport: Transport, budget: ByteBudget
) -> None:
    hung_up = answer(bytes(LARGE))[: 2 * SMALL + 1000]
    for raw, close in ((hung_up, True), (answer(bytes(LARGE), "Content-Encoding: gzip"), False)):
        server.answer = Server.say(raw, close=close)
        with pytest.raises(Uncertain):
            await ask(transport, server)
        gc.collect()
        await until(lambda: budget.free == 2 * LARGE, "it came back")
    server.answer = Server.say(hung_up)
    asking = asyncio.create_task(ask(transport, server))
    await until(lambda: budget.free < 2 * LARGE, "it has its share")
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    del asking
    gc.collect()
    await until(lambda: budget.free == 2 * LARGE, "it came back")


async def test_a_large_answer_of_unknown_length_that_is_not_read_on_is_none(budget: ByteBudget) -> None:
    connection, wire = Connection(budget), Reading()
    connection.connection_made(wire)
    taken = budget.reserve(2 * LARGE).result()
    asking = asyncio.create_task(connection.send_request(b"request", 30, LARGE))
    await asyncio.sleep(0)
    connection.data_received(b"HTTP/1.1 200 OK\r\n\r\n" + bytes(2 * SMALL))
    assert wire.paused
    connection.connection_lost(None)
    with pytest.raises(Uncertain):
        await asking
    taken.release()
    assert budget.free == budget.size


async def test_an_answer_that_has_come_is_not_lost_by_a_cancellation(
    server: Server, transport: Transport, budget: ByteBudget
) -> None:
    """iLink may count it as delivered. Here its share comes a moment after the cancellation."""
    taken = budget.reserve(2 * LARGE).result()
    packed = gzip.compress(bytes(LARGE))
    assert len(packed) < SMALL, "it is read whole without a share, and unpacked with one"
    server.answer = Server.say(answer(packed, "Content-Encoding: gzip"))
    asking = asyncio.create_task(ask(transport, server))
    await until(lambda: bool(budget._waiters), "it waits for its share")
    asking.cancel()
    await asyncio.sleep(0)
    taken.release()
    assert (await asking).body == bytes(LARGE)


async def test_a_byte_a_chunk_takes_no_more_memory_than_the_answer_has_bytes(
    server: Server, budget: ByteBudget
) -> None:
    transport = Transport(tls=ResumingContext(), budget=budget, resolver=RESOLVER)
    chunks = b"1\r\nx\r\n" * LARGE + b"0\r\n\r\n"
    server.answer = Server.say(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks)
    assert (await ask(transport, server)).body == b"x" * LARGE
    await transport.close()


async def test_an_answer_that_is_not_large_is_repaired_elsewhere_where_that_takes_long(server: Server) -> None:
    base = server.url.removesuffix("/ilink/bot/x")
    ilink = ILink(
        Metrics(), default_base_url=base, allowed_hosts=("127.0.0.1",), poll_margin_s=10.0, send_timeout_s=10.0
    )
    server.answer = Server.say(answer(b'{"ret":0,"msgs":[{"a":"%b"}]}' % (b"\x01" * 20_000)))
    polled = await ilink.poll(Account("b1@im.bot", "token", base), "", 1000)
    assert polled is not None
    assert (polled.messages, polled.share) == ([b'{"a":"%b"}' % (b"\\u0001" * 20_000)], None)
    assert ilink._budget._thread._threads, "it has a thread"
    await ilink.close()


# polls -------------------------------------------------------------------------------------------------------


async def test_an_answer_to_a_poll_may_be_larger_than_any_other_answer(server: Server) -> None:
    """Above it is no crash: whoever asks waits, and asks again."""
    base = server.url.removesuffix("/ilink/bot/x")
    ilink = ILink(
        Metrics(), default_base_url=base, allowed_hosts=("127.0.0.1",), poll_margin_s=10.0, send_timeout_s=10.0
    )
    account = Account("b1@im.bot", "token", base)
    frame = b'{"ret":0,"msgs":[{"a":"%b"}],"get_updates_buf":"b"}'
    filler = b"x" * (ANSWER_BYTES - len(frame) + 2)
    server.answer = Server.say(answer(frame % filler))
    polled = await ilink.poll(account, "", 1000)
    assert polled is not None
    assert (polled.messages, polled.cursor) == ([b'{"a":"%b"}' % filler], "b")
    assert polled.share is not None
    polled.share.release()
    for body, encoding in ((frame % (filler + b"x"), ""), (zlib.compress(bytes(60_000_000)), "deflate")):
        server.answer = Server.say(answer(body, *([f"Content-Encoding: {encoding}"] if encoding else [])))
        with pytest.raises(Temporary) as caught:
            await ilink.poll(account, "", 1000)
        assert (caught.value.reason, caught.value.detail) == (
            "unreadable",
            f"the answer exceeds {ANSWER_BYTES} bytes",
        )
    server.answer = Server.say(answer(b'{"ret":0,"x":"%b"}' % (b"x" * OTHER_BYTES)))
    with pytest.raises(Temporary):
        await ilink.notify(account, start=True)
    gc.collect()
    await until(lambda: ilink._budget.free == ilink._budget.size, "all shares are back")
    await ilink.close()


async def test_who_waits_after_a_large_answer_that_cannot_be_read_does_not_keep_it(server: Server) -> None:
    base = server.url.removesuffix("/ilink/bot/x")
    ilink = ILink(
        Metrics(), default_base_url=base, allowed_hosts=("127.0.0.1",), poll_margin_s=10.0, send_timeout_s=10.0
    )
    server.answer = Server.say(answer(b'{"msgs":[' + b" " * LARGE))
    with pytest.raises(Temporary) as caught:
        await ilink.poll(Account("b1@im.bot", "token", base), "", 1000)
    frames: list[FrameType] = []
    problem: BaseException | None = caught.value
    while problem is not None:
        trace = problem.__traceback__
        while trace is not None:
            frames.append(trace.tb_frame)
            trace = trace.tb_next
        problem = problem.__cause__
    kept = [value for frame in frames for value in frame.f_locals.values() if isinstance(value, Reply)]
    assert frames
    assert not [reply for reply in kept if len(reply.body) > SMALL]
    await ilink.close()
