"""A bot's HTTP client lives as long as somebody uses it, and no longer."""

from __future__ import annotations

import asyncio

from adapter.ilink.pool import Pool

VIRTUAL_TIME = True

IDLE_S = 60.0


class Clients:
    """Makes clients, which are numbers here, and notes which were closed."""

    def __init__(self) -> None:
        self.made = 0
        self.closed: list[int] = []
        self.pool: Pool[int] = Pool(self.close, idle_s=IDLE_S)

    def make(self) -> int:
        self.made += 1
        return self.made

    async def close(self, client: int) -> None:
        self.closed.append(client)

    async def call(self, name: str, seconds: float = 0.0) -> int:
        with self.pool.use(name, self.make) as client:
            await asyncio.sleep(seconds)
            return client


async def test_calls_of_one_bot_share_a_client() -> None:
    clients = Clients()
    assert [await clients.call("a"), await clients.call("b"), await clients.call("a")] == [1, 2, 1]


async def test_a_client_that_nobody_uses_is_closed() -> None:
    clients = Clients()
    for number in range(100):
        await clients.call(f"b{number}")
    assert len(clients.pool) == 100
    await asyncio.sleep(IDLE_S + 1)
    assert len(clients.pool) == 0
    assert len(clients.closed) == 100
    assert await clients.call("b1") == 101


async def test_a_poll_that_waits_for_long_keeps_its_client() -> None:
    clients = Clients()
    poll = asyncio.create_task(clients.call("a", 10 * IDLE_S))
    await asyncio.sleep(0)
    await clients.call("b")
    await asyncio.sleep(5 * IDLE_S)
    assert clients.closed == [2]
    await clients.call("a")  # a send beside the poll ends
    await asyncio.sleep(2 * IDLE_S)
    assert clients.closed == [2]
    await poll
    await asyncio.sleep(IDLE_S + 1)
    assert clients.closed == [2, 1]


async def test_idleness_counts_from_the_last_use() -> None:
    clients = Clients()
    for _ in range(5):
        await clients.call("a")
        await clients.call("b")
        await asyncio.sleep(IDLE_S - 1)
    assert clients.closed == []
    await clients.call("a")
    await asyncio.sleep(IDLE_S - 1)
    assert clients.closed == [2]


async def test_what_is_dropped_in_use_is_another_client_s_end() -> None:
    """A connection that is dead is closed under its poll; the end of that poll says nothing about the next client."""
    clients = Clients()
    poll = asyncio.create_task(clients.call("a", IDLE_S / 2))
    await asyncio.sleep(0)
    await clients.pool.drop("a")
    assert clients.closed == [1]
    other = asyncio.create_task(clients.call("a", 10 * IDLE_S))
    await poll
    await asyncio.sleep(5 * IDLE_S)
    assert clients.closed == [1]
    assert await other == 2


async def test_all_are_closed_at_the_end() -> None:
    clients = Clients()
    poll = asyncio.create_task(clients.call("a", IDLE_S))
    await asyncio.sleep(0)
    await clients.call("b")
    await clients.pool.close()
    await poll
    await asyncio.sleep(2 * IDLE_S)
    assert sorted(clients.closed) == [1, 2]
    assert len(clients.pool) == 0
