"""Tasks of one owner: held until they end, and heard of when they crash; and questions that many share."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import weakref

import pytest

from adapter.kit.tasks import SingleFlight, TaskSet

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


async def test_it_waits_for_what_begins_meanwhile_and_no_longer_than_it_was_told() -> None:
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


async def test_a_crash_is_told_and_a_cancellation_is_none() -> None:
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


class Asked:
    """A question whose answer is how often it was asked; it takes a second."""

    def __init__(self) -> None:
        self.times = 0
        self.fails = False
        self.shared = SingleFlight(self._ask)

    async def _ask(self) -> int:
        self.times += 1
        number = self.times
        await asyncio.sleep(1)
        if self.fails:
            raise OSError
        return number


async def test_who_asks_at_about_the_same_time_shares_an_answer_that_is_no_older_than_the_question() -> None:
    asked = Asked()
    async with asyncio.TaskGroup() as group:
        first = [group.create_task(asked.shared.result()) for _ in range(3)]
        await asyncio.sleep(0.5)
        later = [group.create_task(asked.shared.result()) for _ in range(3)]
    assert [task.result() for task in (*first, *later)] == [1, 1, 1, 2, 2, 2]
    assert await asked.shared.result() == 3


async def test_a_question_that_fails_fails_for_those_who_shared_it_and_is_asked_again() -> None:
    asked = Asked()
    asked.fails = True
    assert all(
        isinstance(answer, OSError)
        for answer in await asyncio.gather(*(asked.shared.result() for _ in range(2)), return_exceptions=True)
    )
    assert asked.times == 1
    asked.fails = False
    assert await asked.shared.result() == 2


class Failure(Exception):
    """Of a question; the tests count how many are still held."""


async def test_of_questions_that_go_on_failing_only_the_last_failure_is_held() -> None:
    """In an outage of hours each would hold the one before, with its traceback."""
    failures: weakref.WeakSet[Failure] = weakref.WeakSet()

    def failure() -> Failure:
        failures.add(made := Failure())
        return made

    async def ask() -> None:
        raise failure()

    shared = SingleFlight(ask)
    for _ in range(5):
        with contextlib.suppress(Failure):
            await shared.result()
    gc.collect()
    assert len(failures) == 1


async def test_who_goes_takes_no_answer_from_the_others() -> None:
    asked = Asked()
    gone, stays = (asyncio.ensure_future(asked.shared.result()) for _ in range(2))
    await asyncio.sleep(0.5)
    gone.cancel()
    assert await stays == 1
    with pytest.raises(asyncio.CancelledError):
        await gone
