"""Tasks of one owner: held until they end, and heard of when they crash; and questions that many share."""

from __future__ import annotations

import asyncio
import gc
import weakref

from adapter.kit.tasks import TaskSet

VIRTUAL_TIME = True


def tasks() -> tuple[TaskSet, list[BaseException]]:
    failures: list[BaseException] = []
    return TaskSet(failures.append), failures


async def test_nothing_is_lost_that_nobody_else_holds() -> None:
    found, failures = tasks()
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
    assert (done, failures, len(found)) == ([1], [], 0)


async def test_it_waits_for_what_begins_meanwhile_and_no_longer_than_its_limit() -> None:
    found, _ = tasks()
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


async def test_a_crash_is_reported_and_a_cancellation_is_none() -> None:
    found, failures = tasks()

    async def crash() -> None:
        raise ValueError("of a bug")

    found.spawn(crash())
    found.spawn(asyncio.sleep(3600))
    await asyncio.sleep(1)
    assert [str(exc) for exc in failures] == ["of a bug"]
    found.cancel_all()
    assert await found.wait_ended()
    assert len(failures) == 1
