"""Services: who answers, what an error says, and that nobody takes all the room."""

from __future__ import annotations

import asyncio
from collections import Counter
from functools import partial

import nats
import pytest
from nats.aio.msg import Msg
from structlog.testing import capture_logs

from adapter.contract.names import H_ERROR, H_ERROR_CODE, H_SCHEMA
from adapter.errors import Refused, Temporary
from adapter.jetstream.managed_connection import ManagedConnection
from adapter.jetstream.microservice import (
    MAX_IN_FLIGHT_PER_SANDBOX,
    MAX_REPLAYS,
    REFUSALS_PER_S,
    Handler,
    Services,
)
from adapter.ports import SandboxRequest, SandboxResponse
from adapter.tools.metrics import Metrics
from tests.bus.rig import NAMES, PATIENCE_S, Bus
from tests.e2e.waiting import until


async def answer_of(bus: Bus, verb: str, payload: bytes = b"") -> tuple[bytes, dict[str, str]]:
    nc = await bus.client()
    msg = await nc.request(NAMES.svc(verb), payload, timeout=5)
    await nc.close()
    return msg.data, msg.headers or {}


async def serve(bus: Bus, group: asyncio.TaskGroup) -> tuple[ManagedConnection, asyncio.Task[None]]:
    async def echo(data: bytes) -> bytes:
        return data

    async def not_bound(data: bytes) -> bytes:
        raise Refused("not_bound", "Nothing is bound\nunder that näme.")

    async def invalid(data: bytes) -> bytes:
        raise Refused("invalid", "Name a `bot`.")

    async def away(data: bytes) -> bytes:
        raise Temporary("bus_down")

    async def bug(data: bytes) -> bytes:
        raise RuntimeError("SECRET")

    connection = ManagedConnection(bus.settings, "service")
    handlers: dict[str, Handler] = {
        "echo": echo,
        "not.bound": not_bound,
        "invalid": invalid,
        "away": away,
        "bug": bug,
    }
    Services(connection, NAMES, handlers, Metrics(), version="1.2.3", instance="r1")
    task = group.create_task(connection.run())
    await connection.wait_connected(PATIENCE_S)
    return connection, task


async def test_services_answer_and_errors_say_what_to_do_in_headers(bus: Bus) -> None:
    async with asyncio.TaskGroup() as group:
        _, task = await serve(bus, group)
        data, headers = await answer_of(bus, "echo", b"hello")
        assert (data, headers[H_SCHEMA]) == (b"hello", "1")
        found = {}
        for verb in ("not.bound", "invalid", "away", "bug"):
            data, headers = await answer_of(bus, verb)
            found[verb] = headers[H_ERROR_CODE]
            assert headers[H_ERROR]
            assert "SECRET" not in str(headers) + data.decode()
        assert found == {"not.bound": "404", "invalid": "400", "away": "503", "bug": "500"}
        task.cancel()


async def test_requests_without_an_inbox_are_counted_and_some_are_logged(bus: Bus) -> None:
    """A line each would be another flood, and cost more than the request."""
    many = 200

    async def own(_: SandboxRequest) -> SandboxResponse:
        return SandboxResponse(b"", {})

    async def echo(data: bytes) -> bytes:
        return data

    async with asyncio.TaskGroup() as group:
        connection, metrics = ManagedConnection(bus.settings, "service"), Metrics()
        Services(connection, NAMES, {"echo": echo}, metrics, version="1.0.0", instance="r", of_sandbox={"own": own})
        task = group.create_task(connection.run())
        await connection.wait_connected(PATIENCE_S)
        nc = await bus.client()
        with capture_logs() as logs:
            for _ in range(many):
                await nc.publish(NAMES.svc("echo"), b"")
                await nc.publish(NAMES.svc("own.s1"), b"", reply="wechat.out.s2")
            refused = partial(metrics.value, "service_refusals_total", reason="reply")
            await until(lambda: refused() == 2 * many, "all are counted")
        assert logs[0]["event"] == "service.reply_refused"
        assert len(logs) < many, "one in a second"
        assert (await nc.request(NAMES.svc("echo"), b"x", timeout=PATIENCE_S)).data == b"x"
        await nc.close()
        task.cancel()


@pytest.mark.parametrize(
    ("inbox", "is_answered"),
    [
        ("_INBOX.x.1", True), ("_INBOX_s1.x", True), ("_INBOX_operator.x", True), ("_INBOX_service.x", True),
        ("_INBOX_s2.x", False), ("_INBOX_s10.x", False), ("_INBOX_adapter.x", False),
        ("x_INBOX.x", False), ("_INBOXES", False), ("wechat.out.s2", False),
    ],
)  # fmt: skip
async def test_the_answers_of_a_sandbox_go_to_inboxes_of_its_own(bus: Bus, inbox: str, is_answered: bool) -> None:
    """Or to the default one, and to those of who may ask for any sandbox."""

    async def own(_: SandboxRequest) -> SandboxResponse:
        return SandboxResponse(b"answer", {})

    answers: list[bytes] = []

    async def on_message(msg: Msg) -> None:
        answers.append(msg.data)

    async with asyncio.TaskGroup() as group:
        connection, metrics = ManagedConnection(bus.settings, "service"), Metrics()
        Services(connection, NAMES, {}, metrics, version="1.0.0", instance="r", of_sandbox={"own": own})
        task = group.create_task(connection.run())
        await connection.wait_connected(PATIENCE_S)
        nc = await bus.client()
        await nc.subscribe(inbox, cb=on_message)
        await nc.publish(NAMES.svc("own.s1"), b"", reply=inbox)
        refused = partial(metrics.value, "service_refusals_total", reason="reply")
        await until(lambda: bool(answers) or bool(refused()), "it is answered or refused")
        assert (answers, refused()) == (([b"answer"], 0) if is_answered else ([], 1))
        await nc.close()
        task.cancel()


async def test_of_two_replicas_one_answers(bus: Bus) -> None:
    async with asyncio.TaskGroup() as group:
        tasks = [(await serve(bus, group))[1] for _ in range(2)]
        nc = await bus.client()
        inbox = nc.new_inbox()
        answers = await nc.subscribe(inbox)
        await nc.publish(NAMES.svc("echo"), b"x", reply=inbox)
        await answers.next_msg(5)
        with pytest.raises(nats.errors.TimeoutError):
            await answers.next_msg(0.1)
        await nc.close()
        for task in tasks:
            task.cancel()


async def test_a_sandbox_that_asks_without_end_leaves_room_for_the_others(bus: Bus) -> None:
    """It is told so, but not without end; when its requests are answered it may ask again."""
    held = asyncio.Event()
    served: list[str] = []
    refusals: Counter[str] = Counter()
    asked = MAX_IN_FLIGHT_PER_SANDBOX + 2 * REFUSALS_PER_S

    async def slow(asked: SandboxRequest) -> SandboxResponse:
        served.append(asked.sandbox)
        if asked.sandbox == "bad":
            await held.wait()
        return SandboxResponse(b"done", {})

    async def on_answer(msg: Msg) -> None:
        refusals[(msg.headers or {}).get(H_ERROR_CODE, "")] += 1

    async with asyncio.TaskGroup() as group:
        connection, metrics = ManagedConnection(bus.settings, "service"), Metrics()
        Services(connection, NAMES, {}, metrics, version="1.0.0", instance="r1", of_sandbox={"slow": slow})
        task = group.create_task(connection.run())
        await connection.wait_connected(PATIENCE_S)
        nc = await bus.client()
        inbox = nc.new_inbox()
        await nc.subscribe(inbox, cb=on_answer)
        for _ in range(asked):
            await nc.publish(f"{NAMES.svc('slow')}.bad", b"", reply=inbox)
        answer = await nc.request(f"{NAMES.svc('slow')}.good", b"", timeout=PATIENCE_S)
        assert answer.data == b"done"
        assert metrics.value("service_refusals_total", reason="busy") == asked - MAX_IN_FLIGHT_PER_SANDBOX
        await until(lambda: refusals["429"] >= REFUSALS_PER_S, "it is told")
        held.set()
        await until(lambda: refusals[""] == MAX_IN_FLIGHT_PER_SANDBOX, "what was taken is answered")
        assert (await nc.request(f"{NAMES.svc('slow')}.bad", b"", timeout=PATIENCE_S)).data == b"done"
        assert Counter(served) == {"bad": MAX_IN_FLIGHT_PER_SANDBOX + 1, "good": 1}
        # all of it was read within a second; on a slow machine, within two
        assert refusals["429"] in (REFUSALS_PER_S, asked - MAX_IN_FLIGHT_PER_SANDBOX)
        await nc.close()
        task.cancel()


async def test_replays_are_read_a_few_at_a_time_and_what_waits_takes_no_room(bus: Bus) -> None:
    """Those of one sandbox one after the other, those of others beside them."""
    held = asyncio.Event()
    reading: Counter[str] = Counter()
    answers: Counter[str] = Counter()

    async def replay(asked: SandboxRequest) -> SandboxResponse:
        reading[asked.sandbox] += 1
        await held.wait()
        reading[asked.sandbox] -= 1
        return SandboxResponse(b"page", {})

    async def window(asked: SandboxRequest) -> SandboxResponse:
        return SandboxResponse(b"open", {})

    async def on_answer(msg: Msg) -> None:
        answers[msg.data.decode()] += 1

    async with asyncio.TaskGroup() as group:
        connection, metrics = ManagedConnection(bus.settings, "service"), Metrics()
        of_sandbox = {"replay": replay, "window": window}
        Services(connection, NAMES, {}, metrics, version="1.0.0", instance="r1", of_sandbox=of_sandbox)
        task = group.create_task(connection.run())
        await connection.wait_connected(PATIENCE_S)
        nc = await bus.client()
        inbox = nc.new_inbox()
        await nc.subscribe(inbox, cb=on_answer)

        async def ask(sandbox: str, times: int = 1) -> None:
            for _ in range(times):
                await nc.publish(f"{NAMES.svc('replay')}.{sandbox}", b"", reply=inbox)
            # read behind the replays, so these are waiting or being read now
            await nc.request(f"{NAMES.svc('window')}.{sandbox}", b"", timeout=PATIENCE_S)

        await ask("bad", 3)
        assert reading == {"bad": 1}
        for number in range(2 * MAX_REPLAYS):
            await ask(f"s{number}")
        assert reading.total() == MAX_REPLAYS
        held.set()
        await until(lambda: answers["page"] == 3 + 2 * MAX_REPLAYS, "all are answered")
        await nc.close()
        task.cancel()
