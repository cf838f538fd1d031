"""`adapter.agent` and a server: what it asks of `next`, outages, and loops that are left. Nobody sends what the
sandbox stores. `tests/e2e/test_agent_module.py` has it before an adapter."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg

from adapter.agent import Message, Sandbox
from adapter.agent import reader as reader_module
from adapter.agent import runner as runner_module
from adapter.agent import sandbox as sandbox_module
from adapter.agent.reader import WINDOW
from adapter.agent.runner import Answer, Runner, Sessions, Turn
from adapter.agent.texts import TEXTS, Command, command_of
from adapter.bridge.record import RECENT_COMMANDS
from adapter.contract.messages import Inbound, NextPage, Outbound, TextItem
from adapter.contract.names import H_POSITION, position
from adapter.errors import BusRefused, Refused
from adapter.jetstream.managed_connection import connect_options
from tests.bus.rig import NAMES, PATIENCE_S, Rig
from tests.e2e.waiting import eventually, until
from tests.next_standin import NextStandIn


class Person:
    """Writes to sandbox s1."""

    def __init__(self, rig: Rig, nc: Client) -> None:
        self.rig = rig
        self.nc = nc
        self.adapter = NextStandIn(nc, NAMES, "s1")
        self.said = 0

    async def say(self, count: int = 1, *, user: str = "u1", ring: bool = True, text: str = "") -> None:
        """The default texts are the numbers from one on; so are the ids, and the entries' sequences, in hundreds."""
        words = text
        for _ in range(count):
            self.said += 1
            text = words or str(self.said)
            message = Inbound(
                id=str(self.said),
                sandbox="s1",
                bot="b1",
                user=user,
                sent_at_ms=0,
                received_at_ms=0,
                text=text,
                items=[TextItem(text=text)],
            )
            await self.adapter.store(self.said * 100, msgspec.json.encode(message), ring=ring)

    async def commands(self) -> list[dict[str, Any]]:
        """What the sandbox has stored."""
        return [msgspec.json.decode(data) for data in await self.rig.read(NAMES.stream_out, ">")]

    async def confirmed(self, text: int) -> None:
        await until(lambda: self.adapter.handled == text * 100, f"{text} is confirmed")


@pytest.fixture
async def person(rig: Rig) -> AsyncIterator[Person]:
    nc = await rig.bus.client()
    made = Person(rig, nc)
    await made.adapter.start()
    yield made
    await nc.close()


@contextlib.asynccontextmanager
async def opened(person: Person) -> AsyncIterator[Sandbox]:
    async with asyncio.timeout(PATIENCE_S), Sandbox("s1", person.rig.bus.settings) as sandbox:
        yield sandbox


@contextlib.asynccontextmanager
async def handling(sandbox: Sandbox, handler: Any) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(sandbox.run(handler))
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait({task})


async def test_a_ring_that_is_lost_delays_a_message_and_no_more(
    person: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "ASK_S", 0.2)
    monkeypatch.setattr(reader_module, "TICK_S", 0.1)
    async with opened(person) as sandbox:
        await until(lambda: len(person.adapter.queries) > 0, "it asks")
        await person.say(ring=False)
        assert (await anext(aiter(sandbox))).text == "1"


async def test_it_asks_when_the_connection_is_back_since_rings_were_lost(person: Person) -> None:
    async with opened(person) as sandbox:
        waiting = asyncio.ensure_future(anext(aiter(sandbox)))
        await until(lambda: len(person.adapter.queries) > 0, "it has asked")
        person.rig.bus.kill()
        await person.say(ring=False)
        await person.rig.bus.start()
        async with asyncio.timeout(reader_module.ASK_S / 2):
            assert (await waiting).text == "1"


async def test_a_message_at_work_keeps_the_position_and_the_others_go_on_up_to_the_window(person: Person) -> None:
    gate, done = asyncio.Event(), []

    async def handle(message: Message) -> None:
        if message.user == "slow":
            await gate.wait()
        done.append(int(message.text))

    async with opened(person) as sandbox, handling(sandbox, handle):
        await person.say(user="slow")
        await person.say(WINDOW + 8, user="quick")
        await until(lambda: len(done) == WINDOW - 1, "the others are handled")
        asked = len(person.adapter.queries)
        await person.say(user="quick")
        await until(lambda: len(person.adapter.queries) > asked, "it asks again")
        assert done == list(range(2, WINDOW + 1))
        assert person.adapter.handled < 100
        gate.set()
        await person.confirmed(WINDOW + 10)
    assert sorted(done) == list(range(1, WINDOW + 11))


def test_the_adapter_drops_as_many_repeats_as_may_come_again() -> None:
    assert WINDOW <= RECENT_COMMANDS


async def test_one_request_is_under_way_however_often_it_rings(person: Person) -> None:
    person.adapter.delay_s = 0.02
    async with opened(person) as sandbox:
        messages = aiter(sandbox)
        for _ in range(10):
            await person.say(5)
            for _ in range(5):
                await anext(messages)
    assert person.adapter.most_under_way == 1
    assert len(person.adapter.queries) < 50


async def test_the_end_confirms_what_is_finished(person: Person) -> None:
    await person.say(3)
    async with opened(person) as sandbox:
        messages = aiter(sandbox)
        for _ in range(3):
            await anext(messages)
        person.adapter.delay_s = 0.5  # it ends while the confirmation is under way
    assert person.adapter.handled == 200


async def test_a_request_without_an_answer_is_repeated_and_a_late_answer_counts(
    person: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first request to open comes to a replica that stands still. It opens again behind the reader's back."""
    monkeypatch.setattr(reader_module, "ANSWER_S", 0.1)
    held: list[Msg] = []

    def disturb(number: int, msg: Msg) -> bool:
        if number == 1:
            held.append(msg)
        return number == 1

    person.adapter.disturb = disturb
    async with opened(person) as sandbox:
        messages = aiter(sandbox)
        await person.say()
        assert (await anext(messages)).text == "1"
        person.adapter.reader += 1
        await person.nc.publish(
            held[0].reply, msgspec.json.encode(NextPage(reader=person.adapter.reader, messages=[]))
        )
        await until(lambda: sandbox._reader._number == person.adapter.reader, "it has the answer")
        await person.say()
        assert (await anext(messages)).text == "2"


@pytest.mark.parametrize("code", ["429", "503"])
async def test_an_adapter_that_has_no_time_is_asked_again(person: Person, code: str) -> None:
    def disturb(number: int, msg: Msg) -> bool:
        if number == 1:
            asyncio.ensure_future(person.adapter.refuse(msg, code, "Ask again later."))  # noqa: RUF006
        return number == 1

    person.adapter.disturb = disturb
    await person.say()
    async with opened(person) as sandbox:
        assert (await anext(aiter(sandbox))).text == "1"


async def test_any_other_refusal_ends_it(person: Person) -> None:
    def disturb(_: int, msg: Msg) -> bool:
        asyncio.ensure_future(person.adapter.refuse(msg, "400", "No such position."))  # noqa: RUF006
        return True

    person.adapter.disturb = disturb
    async with opened(person) as sandbox:
        with pytest.raises(Refused, match="No such position"):
            await anext(aiter(sandbox))


async def test_a_ring_is_a_message_with_a_position_that_was_not_read(
    person: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others may be anybody's, and what was read needs no request."""
    monkeypatch.setattr(reader_module, "TICK_S", 60.0)
    await person.say()
    async with opened(person) as sandbox:
        messages = aiter(sandbox)
        await anext(messages)
        waiting: asyncio.Future[Message] = asyncio.ensure_future(anext(messages))
        await until(lambda: len(person.adapter.queries) == 2, "the first is confirmed")
        rings: list[dict[str, str] | None] = [None, {}, {H_POSITION: "x"}, {H_POSITION: position(100, 0)}]
        for headers in rings:
            await person.nc.publish(NAMES.live("s1"), b"{}", headers=headers)
        await person.nc.flush()
        await asyncio.sleep(0.5)
        assert len(person.adapter.queries) == 2
        await person.say()
        assert (await waiting).text == "2"


async def test_what_is_gone_is_said_and_what_cannot_be_read_is_skipped(person: Person) -> None:
    person.said = 6
    person.adapter.first = position(700, 0)
    await person.adapter.store(700, b'{"v": 2}')
    person.said = 7
    await person.say()
    done: list[str] = []

    async def handle(message: Message) -> None:
        done.append(message.text)

    with structlog.testing.capture_logs() as logs:
        async with opened(person) as sandbox, handling(sandbox, handle):
            await person.confirmed(8)
            person.adapter.first = ""
            await person.say()
            await person.adapter.store(1000, b'{"v": 2}')
            await person.confirmed(10)
    assert done == ["8", "9"]
    events = [line["event"] for line in logs]
    assert (events.count("sandbox.gap"), events.count("sandbox.unreadable")) == (1, 2)


async def test_a_reply_waits_for_the_bus_however_long_it_is_away(
    person: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a try or a request that the client keeps for later: its buffer would be full at some time."""
    lost = asyncio.Event()

    async def on_lost() -> None:
        lost.set()

    monkeypatch.setattr(
        "adapter.agent.connection.connect_options",
        lambda *arguments: connect_options(*arguments) | {"pending_size": 10, "disconnected_cb": on_lost},
    )
    monkeypatch.setattr(reader_module, "ANSWER_S", 0.1)
    await person.say()
    bus = person.rig.bus
    async with opened(person) as sandbox:
        messages = aiter(sandbox)
        message = await anext(messages)
        person.adapter.disturb = lambda *_: True
        asked = len(person.adapter.queries)
        await person.nc.publish(NAMES.live("s1"), headers={H_POSITION: position(700, 0)})
        await until(lambda: len(person.adapter.queries) > asked + 1, "it repeats a request")
        bus.kill()
        await lost.wait()
        replying = asyncio.create_task(message.reply("x" * 200))
        await bus.start()
        await replying
        await eventually_connected(person)
        person.adapter.disturb = lambda *_: False
        await person.say(ring=False)  # it asks by itself when the connection is back
        assert (await anext(messages)).text == "2"
    assert [command["text"] for command in await person.commands()] == ["x" * 200]


async def eventually_connected(person: Person) -> None:
    async def connected() -> bool:
        return person.nc.is_connected

    await eventually(connected, "the adapter is back, too")
    await person.nc.flush()


async def test_a_command_is_stored_by_one_request_and_again_where_the_stream_has_no_time(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox_module, "FULL_S", 0.1)
    nc = await rig.bus.client()
    await nc.jetstream().delete_stream(NAMES.stream_out)
    answers = [
        b'{"error":{"code":429,"err_code":10167,"description":"too many requests"}}',
        b'{"error":{"code":503,"err_code":10077,"description":"maximum messages per subject exceeded"}}',
        b"not JetStream's",
        b'{"stream":"WECHAT_OUT","seq":7}',
        b'{"error":{"code":400,"err_code":10054,"description":"message size exceeds maximum allowed"}}',
    ]
    bodies: list[bytes] = []

    async def on_publish(msg: Msg) -> None:
        bodies.append(msg.data)
        await msg.respond(answers.pop(0))

    await nc.subscribe(NAMES.out("s1"), cb=on_publish)
    await nc.flush()
    async with Sandbox("s1", rig.bus.settings) as sandbox:
        await sandbox.send(Outbound(id="c1", text="hello"))
        assert len(bodies) == 4
        assert len(set(bodies)) == 1
        with pytest.raises(BusRefused, match="10054"):
            await sandbox.send(Outbound(id="c2", text="hello"))
    await nc.close()


async def test_a_loop_that_is_left_has_its_message_again_and_first(person: Person) -> None:
    await person.say(3)
    texts = []
    async with opened(person) as sandbox:
        for _ in range(2):
            async for message in sandbox:
                texts.append(message.text)
                break

        async for message in sandbox:
            texts.append(message.text)
            if message.text == "3":
                break
    assert texts == ["1", "1", "1", "2", "3"]
    assert person.adapter.handled == 200


async def test_a_message_on_which_the_handler_raises_costs_an_apology_and_no_more(person: Person) -> None:
    """Also where it raises the cancellation of a task of its own."""
    done: list[str] = []

    async def handle(message: Message) -> None:
        if message.text == "1":
            raise ZeroDivisionError("a secret of u1")
        if message.text == "2":
            gone = asyncio.ensure_future(asyncio.sleep(60))
            gone.cancel()
            await gone
        done.append(message.text)

    with structlog.testing.capture_logs() as logs:
        async with opened(person) as sandbox, handling(sandbox, handle) as running:
            await person.say(3)
            await person.say(user="u2")
            await person.confirmed(4)
            assert not running.done()
    assert sorted(done) == ["3", "4"]
    told = [(command["id"], command["user"], command["text"]) for command in await person.commands()]
    assert told == [(f"agent-{number}-sorry", "u1", TEXTS["en"].sorry) for number in (1, 2)]
    crashes = [(line["message"], line["exc_info"]) for line in logs if line["event"] == "agent.crashed"]
    assert crashes == [("1", True), ("2", True)]


@pytest.mark.parametrize(
    ("text", "command"),
    [
        *((text, "help") for text in ("/help", " /HELP\n", "帮助", "、帮助", "／help")),
        *((text, "new") for text in ("/new", "、new", "／ＮＥＷ", "新对话", "\u3000/新对话")),
        *((text, "stop") for text in ("/stop", "、stop", "停止")),
        *((text, None) for text in ("", "、", "new", "/new please", "/model", "请停止", "、、new")),
    ],
)
def test_a_command_is_the_whole_text_as_any_keyboard_writes_it(text: str, command: Command | None) -> None:
    assert command_of(text) == command


@contextlib.asynccontextmanager
async def answered_by(person: Person, agent: Any, **options: Any) -> AsyncIterator[None]:
    async with opened(person) as sandbox:
        running = asyncio.create_task(Runner(sandbox, agent, Sessions("s1"), **options).run())
        try:
            yield
        finally:
            running.cancel()
            await asyncio.wait({running})


async def told(person: Person, count: int) -> list[tuple[str, str]]:
    """What persons have been told, by user, once there is so much."""

    async def enough() -> bool:
        return len([command for command in await person.commands() if "typing" not in command]) >= count

    await eventually(enough, f"{count} are stored")
    return [(command["user"], command["text"]) for command in await person.commands() if "typing" not in command]


async def test_who_waits_is_told_once_that_the_agent_is_at_work(
    person: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But not a person whose answer the agent waits for."""
    monkeypatch.setattr(runner_module, "TYPING_AFTER_S", 0.0)
    monkeypatch.setattr(runner_module, "TYPING_S", 0.05)
    texts = TEXTS["en"]

    async def agent(turn: Turn) -> Answer:
        if turn.message.user == "u1":
            await asyncio.sleep(1)
            return Answer("done")
        return Answer(await turn.ask("Which?", (), "q1"))

    async with answered_by(person, agent, welcome=""):
        await person.say(user="u2")
        await person.say(user="u1")
        assert sorted(await told(person, 3)) == [("u1", texts.working), ("u1", "done"), ("u2", "Which?")]
        await person.say(user="u2", text="both")
        assert (await told(person, 4))[3] == ("u2", "both")
    assert [one["id"] for one in await person.commands() if one.get("text") == texts.working] == ["agent-2-still"]


async def test_what_only_a_terminal_understands_does_not_reach_a_person(person: Person) -> None:
    async def agent(_turn: Turn) -> Answer:
        return Answer("\x1b[1;32mgreen\x1b[0m\x00 and\r\n\ttabbed\x07")

    async with answered_by(person, agent, welcome=""):
        await person.say()
        assert await told(person, 1) == [("u1", "green and\n\ttabbed")]


async def test_a_new_conversation_does_not_wait_for_an_answer_in_the_old_one(person: Person) -> None:
    async def agent(turn: Turn) -> Answer:
        return Answer(await turn.ask("Which?", (), "q1") if turn.message.text == "ask" else "done")

    async with answered_by(person, agent):
        await person.say(text="ask")
        assert [text for _, text in await told(person, 2)] == [TEXTS["en"].welcome, "Which?"]
        await person.say(text="/new")
        await person.say(text="hello")
        assert [text for _, text in await told(person, 4)][2:] == [TEXTS["en"].new, "done"]
