"""Tasks of one owner: held until they end, and heard of when they crash; and questions that many share."""

from __future__ import annotations

import asyncio
import gc
import weakref

from structlog.testing import capture_logs

from adapter.errors import LeaseLost
from adapter.tools.tasks import TaskSet

VIRTUAL_TIME = True


async def test_nothing_is_lost_that_nobody_else_holds() -> None:
    found = TaskSet("test")
    done: list[int] = []
    awaited: list[weakref.ref[asyncio.Future[int]]] = []

    async def work() -> None:
        only_here = asyncio.get_running_loop().create_future()
        awaited.append(weakref.ref(only_here))
        done.append(await only_here)

    found.spawn(work())
    await asyncio.sleep(0)
    gc.collect()
    future = awaited[0]()
    assert future is not None, "the task was collected, and what it waited for with it"
    future.set_result(1)
    assert await found.wait_ended()
    assert (done, len(found)) == ([1], 0)


async def test_it_waits_for_what_begins_meanwhile_and_no_longer_than_its_limit() -> None:
    found = TaskSet("test")
    loop = asyncio.get_running_loop()

    async def first() -> None:
        await asyncio.sleep(1)
        found.spawn(asyncio.sleep(2))

    found.spawn(first())
    began = loop.time()
    assert not await found.wait_ended(2.5)
    assert loop.time() - began == 2.5
    assert await found.wait_ended(10)
    assert loop.time() - began == 3
    assert await found.wait_ended(0), "there is nothing to wait for"


async def test_a_crash_is_logged_and_a_cancellation_or_a_lost_lease_is_none() -> None:
    found = TaskSet("test")

    async def crash(exc: Exception) -> None:
        raise exc

    with capture_logs() as logs:
        found.spawn(crash(ValueError("of a bug")))
        found.spawn(crash(LeaseLost("lease_lost")))
        found.spawn(asyncio.sleep(3600))
        await asyncio.sleep(1)
        found.cancel_all()
        assert await found.wait_ended()
    assert [(entry["event"], entry["task"], str(entry["exc_info"])) for entry in logs] == [
        ("task.crashed", "test", "of a bug")
    ]
