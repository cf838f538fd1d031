"""Texts that take their time are read in a process of its own, which may be killed at any moment."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import uvloop

from adapter.errors import Refused
from adapter.outbound.text_worker import TextWorker
from tests.e2e.waiting import until

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture
async def worker() -> AsyncIterator[TextWorker]:
    made = TextWorker()
    made.limit_s = 60.0
    yield made
    await made.close()


def pid_of(worker: TextWorker) -> int:
    """Of its process; 0: it has none."""
    return worker._process.pid if worker._process else 0


async def test_it_says_what_a_reader_would_see(worker: TextWorker) -> None:
    assert await worker.render_plain(["**a** and [b](http://c)", "", "好 😀"]) == ["a and b (http://c)", "", "好 😀"]
    assert await worker.render_plain(["- x\n" * 10_000]) == [("- x\n" * 10_000).strip()]


async def test_jobs_are_done_in_turn_by_one_process(worker: TextWorker) -> None:
    texts = [f"*{number}*" for number in range(20)]
    assert await asyncio.gather(*(worker.render_plain([text]) for text in texts)) == [[text[1:-1]] for text in texts]
    first = pid_of(worker)
    await worker.render_plain(["a"])
    assert pid_of(worker) == first


async def test_what_does_not_end_is_killed_and_refused_and_the_next_is_read(worker: TextWorker) -> None:
    await worker.render_plain(["a"])
    stuck = pid_of(worker)
    os.kill(stuck, signal.SIGSTOP)
    worker.limit_s = 0.2
    with pytest.raises(Refused) as caught:
        await worker.render_plain(["a"])
    assert caught.value.reason == "too_long"
    await until(lambda: not Path(f"/proc/{stuck}").exists(), "it is gone")
    worker.limit_s = 60.0
    assert await worker.render_plain(["*a*"]) == ["a"]


async def test_what_somebody_killed_is_started_anew(worker: TextWorker) -> None:
    await worker.render_plain(["a"])
    os.kill(pid_of(worker), signal.SIGKILL)
    assert await worker.render_plain(["*a*"]) == ["a"]

    killed = pid_of(worker)
    os.kill(killed, signal.SIGSTOP)
    reading = asyncio.create_task(worker.render_plain(["*b*"]))
    await until(worker._turn.locked, "it is being read")
    os.kill(killed, signal.SIGKILL)
    assert await reading == ["b"]
    assert pid_of(worker) != killed


async def test_what_ends_the_process_twice_is_refused(worker: TextWorker) -> None:
    killed: list[int] = []

    async def kill() -> None:
        while True:
            if (pid := pid_of(worker)) and pid not in killed:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
            await asyncio.sleep(0)

    killing = asyncio.create_task(kill())
    with pytest.raises(Refused):
        await worker.render_plain(["a"])
    killing.cancel()
    assert len(killed) == 2
    assert await worker.render_plain(["*a*"]) == ["a"]


async def test_who_is_cancelled_leaves_no_answer_for_the_next(worker: TextWorker) -> None:
    await worker.render_plain(["a"])
    os.kill(pid_of(worker), signal.SIGSTOP)
    reading = asyncio.create_task(worker.render_plain(["of another"]))
    await until(worker._turn.locked, "it is being read")
    reading.cancel()
    await asyncio.wait([reading])
    assert await worker.render_plain(["*a*"]) == ["a"]


async def test_it_has_no_secrets_and_hears_no_ctrl_c(worker: TextWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WECHAT_NATS_TOKEN_KEY", "of nobody's concern")
    await worker.render_plain(["a"])
    environ = Path(f"/proc/{pid_of(worker)}/environ").read_bytes()  # noqa: ASYNC240 -- no disk
    assert b"WECHAT_NATS_TOKEN_KEY" not in environ
    assert os.getpgid(pid_of(worker)) != os.getpgid(0)


ORPHAN = """
import asyncio, os
from adapter.outbound.text_worker import TextWorker

async def main():
    worker = TextWorker()
    await worker.render_plain(["a"])
    print(worker._process.pid, flush=True)
    os._exit(1)

asyncio.run(main())
"""


async def test_it_ends_with_whoever_started_it() -> None:
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", ORPHAN, stdout=asyncio.subprocess.PIPE)
    told, _ = await parent.communicate()
    orphan = int(told)
    await until(lambda: not Path(f"/proc/{orphan}").exists() or "Z" in stat_of(orphan), "it has ended")


def stat_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
    except OSError:
        return "Z"
