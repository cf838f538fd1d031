"""bind and unbind: in the order in which they were stored, told, answered in an inbox, never with a token."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from adapter.bindings.binder import Binder
from adapter.bindings.control import Control
from adapter.bindings.registry import Bindings
from adapter.bridge.entries import Entry, Secrets, encode_entry, messages_of
from adapter.contract.messages import Bind, BindingEvent, ControlAnswer, Erase
from adapter.contract.names import H_ERROR, H_ERROR_CODE, H_MSG_ID, H_REPLY_TO, to_subject_token
from adapter.contract.records import Binding, PersonKey
from adapter.errors import BusRefused, RecordTooNew, Refused, Temporary
from adapter.ports import BusMessage, StoredMessage
from adapter.security.seal import Sealer, cursor_context
from tests.fakes import Bench, Failing, FakeBucket, FakeDelivery
from tests.newer import made_newer

VIRTUAL_TIME = True

BOT, USER = "b1@im.bot", "u1@im.wechat"
TOKEN = "b1@im.bot:SECRET"
INBOX = "_INBOX.abc.1"


async def erase_nothing(command: Erase) -> ControlAnswer:
    """Nothing is there of anybody."""
    return ControlAnswer(ok=True, id=command.id or "")


Erasing = Callable[[Erase], Awaitable[ControlAnswer]]


class Platform:
    """Publishes control commands, and looks at what comes of them."""

    def __init__(
        self, bench: Bench | None = None, sealer: Sealer | None = None, erase: Erasing = erase_nothing
    ) -> None:
        self.bench = bench or Bench()
        self.complete = asyncio.Event()
        """The bucket of bindings lacks nothing."""
        self.complete.set()
        self._sealer, self._erase = sealer or self.bench.sealer, erase
        self.bench.bindings.add_listener(lambda bot, _before, _after: self.bench.begin_to_close(bot))
        self.deliveries: list[FakeDelivery] = []
        self._start()

    def _start(self) -> None:
        """As the owner of shard 0."""
        self.control = new_control(self.bench, self._sealer, self._erase, self.complete)
        self.task = asyncio.get_running_loop().create_task(self.control.run())

    async def starts_again(self) -> None:
        """Loses the commands, and has them again."""
        self.task.cancel()
        await asyncio.wait([self.task])
        self._start()

    def publish(
        self, verb: str, body: bytes, *, reply_to: str = INBOX, headers: dict[str, str] | None = None
    ) -> FakeDelivery:
        delivery = FakeDelivery(
            f"wechat.ctl.{verb}",
            body,
            seq=next(self.bench.numbers),
            time_ms=self.bench.clock.now_ms(),
            headers={H_REPLY_TO: reply_to} | (headers or {}),
        )
        self.deliveries.append(delivery)
        self.control.enqueue(delivery)
        return delivery

    async def say(self, verb: str, *, headers: dict[str, str] | None = None, **body: Any) -> ControlAnswer:
        """Publishes a command and waits for its answer."""
        before = len(self.bench.core.published)
        delivery = self.publish(verb, msgspec.json.encode(body), headers=headers)
        await asyncio.sleep(1)
        assert delivery.acks == 1
        assert len(self.bench.core.published) == before + 1
        subject, payload, _ = self.bench.core.published[-1]
        assert subject == INBOX
        return msgspec.json.decode(payload, type=ControlAnswer)

    def publish_bind(self, bot: str = BOT) -> FakeDelivery:
        return self.publish("bind", msgspec.json.encode({"sandbox": "s1", "bot": bot, "bot_token": f"{bot}:SECRET"}))

    async def bind(self, *, bot: str = BOT, **fields: Any) -> ControlAnswer:
        token = f"{bot}:SECRET"
        return await self.say("bind", **{"sandbox": "s1", "bot": bot, "bot_token": token, "user": USER, **fields})

    @property
    def bound(self) -> dict[str, str]:
        return {binding.bot: binding.sandbox for binding in self.bench.bindings}

    @property
    def changes(self) -> list[tuple[str, str, str]]:
        return [(event.sandbox, event.bot, event.change) for event in self.bench.bus.events()]

    def binding(self, bot: str = BOT) -> Binding:
        binding = self.bench.bindings.get(bot)
        assert binding is not None
        return binding

    def token(self, bot: str = BOT) -> str:
        return self.bench.sealer.open(bot, self.binding(bot).token)

    def cursor(self) -> str:
        return self.bench.sealer.open(cursor_context(BOT), self.binding().start_cursor or "")


def new_control(
    bench: Bench,
    sealer: Sealer | None = None,
    erase: Erasing = erase_nothing,
    complete: asyncio.Event | None = None,
    outcomes: FakeBucket | None = None,
) -> Control:
    """As the replica makes it for a tenure of shard 0."""
    owner = bench.leases.tenure_of(0)
    binder = Binder(
        bindings=bench.bindings,
        events=bench.events,
        history=bench.bus,
        names=bench.names,
        chat=bench.chat,
        sealer=sealer or bench.sealer,
        persons=bench.persons,
        erase=erase,
        owner=owner,
        clock=bench.clock,
    )

    async def wait_complete() -> None:
        if complete is not None:
            await complete.wait()

    return Control(
        binder,
        bench.bindings,
        bench.logins_bucket if outcomes is None else outcomes,
        bench.events,
        bench.core,
        wait_complete=wait_complete,
        owner=owner,
        clock=bench.clock,
        metrics=bench.metrics,
    )


async def test_a_bind_is_stored_published_as_an_event_and_answered(platform: Platform) -> None:
    answer = await platform.bind(id="r1")
    assert (answer.ok, answer.id, answer.error) == (True, "r1", "")
    assert [(info.sandbox, info.bot, info.user, info.state) for info in answer.bindings] == [
        ("s1", BOT, USER, "active")
    ]
    assert platform.bound == {BOT: "s1"}
    assert platform.token() == TOKEN
    (event,) = platform.bench.bus.events()
    assert (event.sandbox, event.bot, event.user, event.change, event.request) == ("s1", BOT, USER, "bound", "r1")


async def test_the_request_id_is_the_bodys_else_the_headers(platform: Platform) -> None:
    assert (await platform.bind(headers={H_MSG_ID: "h1"})).id == "h1"
    assert (await platform.bind(id="r1", headers={H_MSG_ID: "h1"})).id == "r1"


async def test_a_bind_that_says_nothing_new_disturbs_nobody(platform: Platform) -> None:
    await platform.bind(id="r1")
    revision = platform.bench.bindings_bucket.entries
    before = dict(revision)
    answer = await platform.bind(id="r2")
    assert answer.ok
    assert platform.bench.bindings_bucket.entries == before
    assert platform.changes == [("s1", BOT, "bound")]


@pytest.mark.parametrize("fields", [{"id": "r1"}, {}])
async def test_a_bind_whose_event_fails_behind_its_binding_has_it_when_it_goes_on(
    fields: dict[str, str], platform: Platform
) -> None:
    """Whether its author gave it an id or not."""
    failures = [Temporary("bus_down")]

    async def on_publish(message: BusMessage) -> None:
        if message.stream == "event" and failures:
            raise failures.pop()

    platform.bench.bus.on_publish = on_publish
    assert (await platform.bind(**fields)).ok
    assert platform.changes == [("s1", BOT, "bound")]
    assert (await platform.bind(id="r2")).ok
    assert platform.changes == [("s1", BOT, "bound")], "it says nothing new"


async def test_a_bind_makes_a_dead_login_live_even_with_the_same_token(platform: Platform) -> None:
    await platform.bench.bind(token=TOKEN, state="needs_login", reason="stale_token")
    await platform.bind()
    assert (platform.binding().state, platform.binding().reason) == ("active", "")


async def test_a_known_user_is_not_forgotten_by_a_bind_that_names_none(platform: Platform) -> None:
    await platform.bind()
    await platform.bind(user=None, bot_token="b1@im.bot:NEW")
    assert platform.binding().user == USER


async def test_another_bot_of_the_same_user_replaces_the_old_one(platform: Platform) -> None:
    await platform.bind()
    answer = await platform.bind(bot="b2@im.bot", bot_token="b2@im.bot:x", id="r2")
    assert answer.replaced == [BOT]
    assert platform.bound == {"b2@im.bot": "s1"}
    assert platform.changes == [("s1", BOT, "bound"), ("s1", "b2@im.bot", "bound"), ("s1", BOT, "replaced")]


async def test_the_new_bot_is_there_before_the_old_one_goes(platform: Platform) -> None:
    """Else what is parked for the user would find nobody, and be refused."""
    await platform.bind()
    gone: list[int] = []
    platform.bench.bindings.add_listener(
        lambda bot, _, after: gone.append(len(platform.bound)) if after is None else None
    )
    await platform.bind(bot="b2@im.bot", bot_token="b2@im.bot:x")
    assert gone == [1]


async def test_a_bot_that_moves_to_another_sandbox_leaves_the_first(platform: Platform) -> None:
    await platform.bind(id="r1")
    await platform.bind(sandbox="s2", id="r2")
    assert platform.bound == {BOT: "s2"}
    assert platform.changes == [("s1", BOT, "bound"), ("s1", BOT, "unbound"), ("s2", BOT, "bound")]
    assert [event.reason for event in platform.bench.bus.events()] == ["", "moved", ""]
    assert platform.bench.bindings.of_sandbox("s1") == []


@pytest.mark.parametrize("breaks_off", ["before", "after"])
async def test_a_bot_that_moves_has_one_event_for_its_former_sandbox_despite_a_crash(
    breaks_off: str, platform: Platform
) -> None:
    await platform.bind(id="r1")
    failures, update = [Temporary("bus_down")], platform.bench.bindings_bucket.update

    async def fails_once(key: str, value: bytes, revision: int, **_: Any) -> int:
        if failures and breaks_off == "before":
            raise failures.pop()
        written = await update(key, value, revision)
        if failures:
            raise failures.pop()
        return written

    platform.bench.bindings_bucket.update = fails_once  # type: ignore[method-assign]
    await platform.bind(sandbox="s2", id="r2")
    assert not failures
    assert platform.changes == [("s1", BOT, "bound"), ("s1", BOT, "unbound"), ("s2", BOT, "bound")]


async def test_while_bindings_are_lost_commands_wait(platform: Platform) -> None:
    """What they would write would go once the bucket is restored."""
    platform.complete.clear()
    delivery = platform.publish("bind", msgspec.json.encode({"sandbox": "s1", "bot": BOT, "bot_token": TOKEN}))
    await asyncio.sleep(3600)
    assert (delivery.acks, platform.changes) == (0, [])
    platform.complete.set()
    await asyncio.sleep(1)
    assert (delivery.acks, platform.changes) == (1, [("s1", BOT, "bound")])


async def test_options_and_cursor_are_kept(platform: Platform) -> None:
    await platform.bind(options={"auto_typing": True}, cursor="CAES", base_url="https://ilinkai.wechat.com/")
    binding = platform.binding()
    assert (binding.options.auto_typing, platform.cursor()) == (True, "CAES")
    assert binding.base_url == "https://ilinkai.wechat.com"


async def test_a_cursor_is_sealed_as_the_token_is_in_it_and_a_repeated_bind_keeps_it() -> None:
    sealer = Sealer((bytes(32),))
    platform = Platform(sealer=sealer)
    await platform.bind(cursor="CAES")
    first = platform.binding().start_cursor or ""
    assert "CAES" not in first
    assert sealer.open(cursor_context(BOT), first) == "CAES"
    await platform.bind(cursor="CAES", options={"auto_typing": True}, id="r2")
    assert platform.binding().start_cursor == first
    await platform.bind(cursor="CAEX", id="r3")
    assert sealer.open(cursor_context(BOT), platform.binding().start_cursor or "") == "CAEX"


async def test_an_unbind_of_one_bot_leaves_the_others(platform: Platform) -> None:
    await platform.bind()
    await platform.bind(bot="b2@im.bot", bot_token="b2@im.bot:x", user="u2@im.wechat")
    answer = await platform.say("unbind", sandbox="s1", bot=BOT)
    assert [info.bot for info in answer.bindings] == [BOT]
    assert platform.bound == {"b2@im.bot": "s1"}


async def test_an_unbind_without_a_bot_takes_all_of_the_sandbox(platform: Platform) -> None:
    await platform.bind()
    await platform.bind(bot="b2@im.bot", bot_token="b2@im.bot:x", user="u2@im.wechat")
    await platform.bind(sandbox="s2", bot="b3@im.bot", bot_token="b3@im.bot:x", user="u3@im.wechat")
    answer = await platform.say("unbind", sandbox="s1", id="r9")
    assert [info.bot for info in answer.bindings] == [BOT, "b2@im.bot"]
    assert platform.bound == {"b3@im.bot": "s2"}
    assert platform.changes[-2:] == [("s1", BOT, "unbound"), ("s1", "b2@im.bot", "unbound")]


def next_owner(before: Platform) -> Platform:
    """A replica that has heard of no binding yet."""
    bench = Bench(before.bench)
    bench.bindings = Bindings(bench.bindings_bucket, bench.names)
    bench.bindings_bucket.followers.append(bench.bindings._apply_entry)
    return Platform(bench)


async def test_a_replica_that_has_taken_over_knows_the_bots_that_the_one_before_bound() -> None:
    """Its own copy of the bucket may lag."""
    before = Platform()
    await before.bind()
    answer = await next_owner(before).bind(bot="b2@im.bot", bot_token="b2@im.bot:x")
    assert answer.replaced == [BOT]
    answer = await next_owner(before).say("unbind", sandbox="s1")
    assert [info.bot for info in answer.bindings] == ["b2@im.bot"]
    assert [entry.value for entry in before.bench.bindings_bucket.entries.values()] == [None, None]


async def test_a_command_that_another_owner_has_carried_out_is_not_carried_out_again(platform: Platform) -> None:
    """It was stopped with an unbind in hand; then the bot was unbound and bound again."""
    await platform.bind()
    platform.bench.leases.has_lease = False
    unbind = platform.publish("unbind", b'{"sandbox":"s1"}')
    await asyncio.sleep(30)
    assert (platform.bound, unbind.acks) == ({BOT: "s1"}, 0)
    other = next_owner(platform)
    await other.say("unbind", sandbox="s1")
    await other.bind()
    platform.bench.leases.has_lease = True
    await platform.starts_again()
    await asyncio.sleep(30)
    assert (other.bound, unbind.acks) == ({BOT: "s1"}, 0)


@pytest.mark.parametrize("verb", ["bind", "unbind"])
async def test_an_owner_cut_off_as_it_wrote_changes_nothing_that_another_has_written_since(
    verb: str, platform: Platform
) -> None:
    await platform.bind()

    async def cut_off(_: str) -> None:
        platform.bench.bindings_bucket.on_write = None
        platform.bench.leases.has_lease = False
        await next_owner(platform).bind(sandbox="s9")

    platform.bench.bindings_bucket.on_write = cut_off
    platform.publish(verb, msgspec.json.encode({"sandbox": "s1", "bot": BOT, "bot_token": f"{TOKEN}2"}))
    await asyncio.sleep(30)
    assert platform.bound == {BOT: "s9"}


async def test_an_owner_cut_off_for_long_publishes_no_event_that_is_over(platform: Platform) -> None:
    """Another has told it, and the stream does not know that event's id any more."""
    await platform.bind()

    async def cut_off(_: BusMessage) -> None:
        bus = platform.bench.bus
        bus.on_publish, platform.bench.leases.has_lease = None, False
        other = next_owner(platform)
        await other.say("unbind", sandbox="s1")
        await other.bind(id="again")
        await asyncio.sleep(400)

    platform.bench.bus.on_publish = cut_off
    platform.publish("unbind", b'{"sandbox":"s1"}')
    await asyncio.sleep(600)
    assert [change for _, _, change in platform.changes] == ["bound", "unbound", "bound"]


async def test_an_unbind_of_nothing_is_no_error(platform: Platform) -> None:
    answer = await platform.say("unbind", sandbox="s1")
    assert (answer.ok, answer.bindings) == (True, [])
    assert platform.changes == []


# another person ------------------------------------------------------------------------------------------


B2: dict[str, Any] = {"bot": "b2@im.bot", "bot_token": "b2@im.bot:x"}
OTHER: dict[str, Any] = {**B2, "user": "u2@im.wechat"}


def writes(platform: Platform, text: str = "hello") -> None:
    """The persons of s1 write, and one of s2."""
    bench = platform.bench
    keys = {binding.key for binding in bench.bindings if binding.sandbox == "s1"} | {PersonKey("s2", "0" * 16, 1)}
    for key in keys:
        subject = bench.persons.subject(key)
        entry = Entry(since=key.since, messages=[msgspec.Raw(msgspec.json.encode({"text": text}))])
        bench.bus.put(subject, encode_entry(entry, Secrets(), subject, bench.sealer), {})


def inbox(platform: Platform, sandbox: str = "s1") -> list[str]:
    stored = [each for each in platform.bench.bus.found("IN") if each.subject.split(".")[2] == sandbox]
    return [msgspec.json.decode(raw)["text"] for each in stored for raw in messages_of(each.data)]


def orders(platform: Platform) -> int:
    """A command of s1 is stored and taken, and one of another sandbox; the last sequence of the stream."""
    bus, names = platform.bench.bus, platform.bench.names
    bus.put(names.out("s1"), b"{}", {})
    last = bus.put(names.out("s2"), b"{}", {})
    bus.kept = [kept for kept in bus.kept if kept.stored.seq != last or kept.stream != names.stream_out]
    return last


async def test_an_unbind_of_one_of_two_persons_costs_the_other_nothing(platform: Platform) -> None:
    await platform.bind()
    await platform.bind(**OTHER)
    writes(platform)
    assert inbox(platform) == ["hello"] * 2
    await platform.say("unbind", sandbox="s1", bot=BOT)
    assert inbox(platform) == ["hello"]
    await platform.say("unbind", sandbox="s1")
    assert (inbox(platform), inbox(platform, "s2")) == ([], ["hello"])


async def test_who_stays_gets_no_command_that_may_have_meant_who_leaves(platform: Platform) -> None:
    await platform.bind()
    await platform.bind(**OTHER)
    command = orders(platform)
    await platform.say("unbind", sandbox="s1", bot=BOT)
    assert platform.binding("b2@im.bot").out_after == command


async def test_an_unbind_waits_for_the_owner_of_the_shard_and_other_persons_for_nothing(platform: Platform) -> None:
    await platform.bind()
    writes(platform)
    platform.bench.leases.owned.discard(platform.bench.names.partition_of("s1"))
    unbind = platform.publish("unbind", b'{"sandbox":"s1","id":"u1"}')
    behind = platform.publish("bind", msgspec.json.encode({"sandbox": "s1", "bot": "b2@im.bot", "bot_token": "t"}))
    await asyncio.sleep(30)
    assert (await platform.bind(sandbox="s2", bot="b3@im.bot", user="u3@im.wechat")).ok
    await asyncio.sleep(40)
    answers = [msgspec.json.decode(payload, type=ControlAnswer) for _, payload, _ in platform.bench.core.published]
    assert [(answer.id, answer.pending) for answer in answers if answer.id == "u1"] == [("u1", True)]
    assert (unbind.acks, behind.acks, inbox(platform)) == (0, 0, ["hello"])
    assert platform.binding().closing == unbind.seq
    platform.bench.leases.owned.add(platform.bench.names.partition_of("s1"))
    platform.bench.begin_to_close(BOT)
    await asyncio.sleep(1)
    assert (unbind.acks, behind.acks, inbox(platform)) == (1, 1, [])
    assert platform.bound == {"b2@im.bot": "s1", "b3@im.bot": "s2"}


@pytest.mark.parametrize("problem", [KeyError("a bug"), RecordTooNew("record_too_new")])
async def test_an_unbind_goes_on_once_the_owner_can_confirm_it(problem: Exception, platform: Platform) -> None:
    """Nobody else tries it again while the owner lives."""
    await platform.bind()
    persons, fails = platform.bench.persons, Failing(4, problem)
    end = persons.end

    async def fails_first(key: PersonKey, **fields: Any) -> None:
        await fails()
        await end(key, **fields)

    persons.end = fails_first  # type: ignore[method-assign]
    unbind = platform.publish("unbind", b'{"sandbox":"s1"}')
    await asyncio.sleep(200)
    assert (unbind.acks, platform.bound) == (1, {})


async def test_a_new_owner_of_the_control_commands_carries_on_with_what_is_closing(platform: Platform) -> None:
    await platform.bind()
    platform.bench.leases.owned.discard(platform.bench.names.partition_of("s1"))
    unbind = platform.publish("unbind", b'{"sandbox":"s1"}')
    await asyncio.sleep(1)
    platform.task.cancel()
    later = next_owner(platform)
    later.control.enqueue(unbind.again())
    await asyncio.sleep(1)
    assert (later.bound, [change for *_, change in later.changes]) == ({}, ["bound", "unbound"])


async def test_an_unbind_that_breaks_the_adapter_opens_what_it_had_closed(platform: Platform) -> None:
    """The end of the person's time is stored by then, so another one begins."""
    await platform.bind()
    publish = platform.bench.events.publish_binding_event

    async def bug(event: BindingEvent, **options: Any) -> None:
        if event.change == "unbound":
            raise RuntimeError("a bug")
        await publish(event, **options)

    platform.bench.events.publish_binding_event = bug  # type: ignore[method-assign]
    unbind = platform.publish("unbind", b'{"sandbox":"s1"}')
    await asyncio.sleep(120)
    binding = platform.binding()
    assert (unbind.acks, binding.closing, binding.since) == (1, None, unbind.seq)
    assert len(platform.bench.bus.found("DEAD")) == 1


async def test_a_command_that_waits_for_another_person_delays_no_unbind(platform: Platform) -> None:
    bench = platform.bench
    await bench.bind(user="")
    await bench.bind(bot="b2@im.bot", user="")
    bench.shard().on_delivery(bench.command("hi", id="c1", bot="b2@im.bot"))
    await asyncio.sleep(5)
    assert bench.bus.receipts()[-1].outcome == "parked"
    assert (await platform.say("unbind", sandbox="s1", bot=BOT)).ok
    assert bench.bus.receipts()[-1].outcome == "parked"


@pytest.mark.parametrize("verb", ["unbind", "erase", "bind"])
async def test_a_binding_that_a_newer_version_wrote_is_closed_by_that_version_alone(
    verb: str, platform: Platform
) -> None:
    await platform.bind()
    key = to_subject_token(BOT)
    text = made_newer(platform.bench.bindings_bucket.entries[key].value or b"")
    platform.bench.bindings_bucket.put(key, text)
    writes(platform)
    bodies: dict[str, dict[str, Any]] = {
        "unbind": {"sandbox": "s1"},
        "erase": {"user": USER},
        "bind": {"sandbox": "s2", "bot": BOT, "bot_token": TOKEN},
    }
    answer = await platform.say(verb, **bodies[verb])
    assert (answer.ok, "newer version" in answer.error) == (False, True)
    assert platform.bench.bindings_bucket.entries[key].value == text
    assert inbox(platform) == ["hello"]


async def test_an_owner_frozen_before_it_ends_a_person_deletes_nothing_new(
    platform: Platform,
) -> None:
    await platform.bind()
    writes(platform)
    read_last, frozen = platform.bench.bus.read_last, False

    async def freezes(stream: str, subject: str) -> StoredMessage | None:
        nonlocal frozen
        if not frozen and stream == platform.bench.names.stream_in:
            frozen = True
            platform.bench.leases.has_lease = False
            other = next_owner(platform)
            other.bench.bindings_bucket.followers.append(other.bench.replica.bindings._apply_entry)
            await other.say("unbind", sandbox="s1", id="u2")
            await other.bind(**OTHER)
            writes(platform, "of the next one")
        return await read_last(stream, subject)

    platform.bench.bus.read_last = freezes  # type: ignore[method-assign]
    platform.publish("unbind", b'{"sandbox":"s1","id":"u1"}')
    await asyncio.sleep(30)
    assert frozen
    assert inbox(platform) == ["of the next one"]


async def test_an_unbind_does_not_wait_for_a_binding_that_nobody_can_read(platform: Platform) -> None:
    await platform.bind()
    platform.bench.bindings_bucket.put(to_subject_token(BOT), b"no binding")
    assert (await platform.say("unbind", sandbox="s1")).ok
    assert (await platform.bind()).ok


AGAIN: list[tuple[str, dict[str, Any]]] = [
    ("the-same-bot", {"options": {"auto_typing": True}}),
    ("the-same-bot-without-its-user", {"user": None, "options": {"auto_typing": True}}),
    ("another-bot", {"bot": "b2@im.bot", "bot_token": "b2@im.bot:x"}),
]


@pytest.mark.parametrize("fields", [row[1] for row in AGAIN], ids=[row[0] for row in AGAIN])
async def test_the_same_person_keeps_what_was_parked(fields: dict[str, Any], platform: Platform) -> None:
    """A new login, or other options."""
    await platform.bind()
    orders(platform)
    writes(platform)
    later = next_owner(platform)
    await later.bind(**fields)
    (binding,) = later.bench.bindings.of_sandbox("s1")
    assert (binding.out_after, inbox(platform)) == (0, ["hello"])


@pytest.mark.parametrize("known", ["nobody", "another", "unbound"])
async def test_another_person_gets_no_command_of_before(known: str, platform: Platform) -> None:
    if known != "nobody":
        await platform.bind()
    command = orders(platform)
    if known == "unbound":
        await platform.say("unbind", sandbox="s1")
    await platform.bind(**OTHER)
    assert platform.binding("b2@im.bot").out_after == command


async def test_a_bot_that_turns_out_to_be_of_another_person_begins_anew(platform: Platform) -> None:
    await platform.bind()
    command = orders(platform)
    await platform.bind(user="u2@im.wechat")
    assert platform.binding().out_after == command


# refused -------------------------------------------------------------------------------------------------


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("url-of-a-stranger", {"base_url": "https://evil.example"}, "url"),
    ("bot-with-a-space", {"bot": "b 1"}, "invalid"),
    ("token-with-a-line-break", {"bot_token": "x\r\nX-Evil: 1"}, "invalid"),
]


@pytest.mark.parametrize(("fields", "reason"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
async def test_a_bind_that_cannot_be_is_refused_with_an_event_and_an_answer(
    fields: dict[str, Any], reason: str, platform: Platform
) -> None:
    answer = await platform.bind(headers={H_MSG_ID: "h1"}, **fields)
    assert (answer.ok, answer.id) == (False, "h1")
    assert answer.error
    (event,) = platform.bench.bus.events()
    assert (event.sandbox, event.change, event.reason, event.request) == ("s1", "refused", reason, "h1")
    assert platform.bound == {}
    headers = platform.bench.core.published[-1][2]
    assert (headers[H_ERROR], headers[H_ERROR_CODE]) == (answer.error.encode("ascii", "replace").decode(), "400")


UNREADABLE = [
    ("no-json", b"hello", "h1"),
    ("no-token", b'{"id":"r1","sandbox":"s1","bot":"b1@im.bot"}', "r1"),
    ("sandbox-with-a-dot", b'{"id":"r1","sandbox":"s.1","bot":"b","bot_token":"SECRET"}', "r1"),
    ("bot-too-long", msgspec.json.encode({"id": 1, "sandbox": "s1", "bot": "b" * 129, "bot_token": "SECRET"}), "h1"),
    ("nested-without-end", b'{"sandbox":' + b"[" * 5000, "h1"),
    ("too-large", b'{"id":"r1","sandbox":"s1","bot":"b","bot_token":"' + b"x" * 263_000 + b'"}', "r1"),
]


@pytest.mark.parametrize(("body", "ident"), [row[1:] for row in UNREADABLE], ids=[row[0] for row in UNREADABLE])
async def test_what_is_no_bind_is_put_aside_without_its_secret_and_answered(
    body: bytes, ident: str, platform: Platform
) -> None:
    delivery = platform.publish("bind", body, headers={"Authorization": "SECRET", H_MSG_ID: "h1"})
    await asyncio.sleep(1)
    assert delivery.acks == 1
    (dead,) = platform.bench.bus.found("DEAD")
    assert (dead.subject, dead.data) == ("wechat.dead.WECHAT_CTL", b"")
    assert "SECRET" not in str(dead.headers)
    answer = msgspec.json.decode(platform.bench.core.published[-1][1], type=ControlAnswer)
    assert (answer.ok, answer.id) == (False, ident)
    assert "SECRET" not in answer.error
    assert "regex" not in answer.error
    assert ("1 to 64 characters of a-z, 0-9, - and _" in answer.error) == (b"s.1" in body)
    assert H_REPLY_TO not in dead.headers


async def test_an_unbind_that_nobody_can_read_is_kept_whole(platform: Platform) -> None:
    """It holds no secret."""
    platform.publish("unbind", b'{"sandbox":5}')
    await asyncio.sleep(1)
    assert platform.bench.bus.found("DEAD")[0].data == b'{"sandbox":5}'


# answers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reply_to",
    ["", "wechat.out.s1", "wechat.ctl.bind", "$JS.API.STREAM.DELETE.WECHAT_IN", "_INBOX.*", "_INBOX.>", "_INBOX.a b",
     "_INBOX.a\r\nPUB x 0", "_INBOX", "_INBOX.", "_INBOX..a", "_INBOX.a.", "_INBOX.ä", "inbox.a",
     "_INBOX." + "a" * 300],
)  # fmt: skip
async def test_an_answer_goes_to_an_inbox_or_nowhere(reply_to: str, platform: Platform) -> None:
    """The adapter may write where its caller may not: nobody borrows that."""
    body = msgspec.json.encode({"sandbox": "s1", "bot": BOT, "bot_token": TOKEN})
    delivery = platform.publish("bind", body, reply_to=reply_to)
    await asyncio.sleep(1)
    assert platform.bench.core.published == []
    assert delivery.acks == 1
    assert platform.bound == {BOT: "s1"}


async def test_an_answer_that_nobody_receives_is_no_failure(platform: Platform) -> None:

    async def fail(subject: str, payload: bytes, headers: dict[str, str]) -> None:
        raise Temporary("bus_down")

    platform.bench.core.publish = fail  # type: ignore[method-assign]
    delivery = platform.publish("unbind", b'{"sandbox":"s1"}')
    await asyncio.sleep(1)
    assert delivery.acks == 1


# order, repeats and trouble ------------------------------------------------------------------------------


async def test_commands_take_effect_in_the_order_in_which_they_were_stored(platform: Platform) -> None:
    for number in range(5):
        bind = {"sandbox": "s1", "bot": BOT, "bot_token": TOKEN, "id": f"b{number}"}
        platform.publish("bind", msgspec.json.encode(bind))
        platform.publish("unbind", msgspec.json.encode({"sandbox": "s1", "id": f"u{number}"}))
    await asyncio.sleep(5)
    assert [change for *_, change in platform.changes] == ["bound", "unbound"] * 5
    assert platform.bound == {}


async def test_an_old_bind_that_comes_again_does_not_undo_the_unbind_after_it(platform: Platform) -> None:
    """Its ack got lost with the connection, and everything unsettled comes again."""
    bind = platform.publish("bind", msgspec.json.encode({"sandbox": "s1", "bot": BOT, "bot_token": TOKEN}))
    platform.publish("unbind", b'{"sandbox":"s1"}')
    await asyncio.sleep(1)
    repeated = bind.again()
    platform.control.enqueue(repeated)
    await asyncio.sleep(1)
    assert platform.bound == {}
    assert repeated.acks == 1


@pytest.mark.parametrize("taken_over", [False, True])
async def test_a_bind_with_an_id_of_the_last_day_is_answered_and_not_applied(
    taken_over: bool, platform: Platform
) -> None:
    """Whoever asked had no answer, and an unbind has come since."""
    first = await platform.bind(id="r1")
    assert (await platform.bind(id="r1")).bindings == first.bindings
    await platform.say("unbind", sandbox="s1", id="r1")
    later = next_owner(platform) if taken_over else platform
    again = await later.bind(id="r1", bot_token="b1@im.bot:WRONG")
    assert (again.ok, again.id, again.bindings, later.bound) == (True, "r1", [], {})
    assert (await later.bind(id="r2")).ok
    assert later.bound == {BOT: "s1"}


async def test_a_refused_bind_may_be_tried_again_with_its_id(platform: Platform) -> None:
    assert not (await platform.bind(id="r1", base_url="https://evil.example")).ok
    assert (await platform.bind(id="r1")).ok
    assert platform.bound == {BOT: "s1"}


async def test_an_id_that_was_used_for_several_persons_is_a_command_for_each() -> None:
    """As the number of a ticket may be. Otherwise the second person would be reported as erased, and was not."""
    erased: list[str] = []
    counted: list[str] = []

    async def erase(command: Erase) -> ControlAnswer:
        (counted if command.dry_run else erased).append(command.user)
        return ControlAnswer(ok=True, id=command.id or "")

    platform = Platform(erase=erase)
    for number in (1, 2, 2):
        assert (await platform.bind(bot=f"b{number}@im.bot", user=f"u{number}@im.wechat", id="t1")).ok
    assert set(platform.bound) == {BOT, "b2@im.bot"}
    for number in (1, 2, 2):
        assert (await platform.say("erase", user=f"u{number}@im.wechat", id="t2")).ok
    assert erased == [USER, "u2@im.wechat"]
    await platform.say("erase", user=USER, id="t2", dry_run=True)
    assert (erased, counted) == ([USER, "u2@im.wechat"], [USER])  # whether something is left is looked up


async def test_what_is_remembered_of_a_command_names_nobody(platform: Platform) -> None:
    await platform.bind(id="r1")
    await platform.bind(bot="b2@im.bot", id="r2")
    await platform.say("unbind", sandbox="s1", id="r3")
    stored = [entry.value or b"" for entry in platform.bench.logins_bucket.entries.values()]
    assert len(stored) == 3
    for name in (BOT, "b2@im.bot", USER, "SECRET"):
        assert not any(name.encode() in value for value in stored)


async def test_a_command_that_comes_again_while_it_waits_is_settled_by_its_newest_delivery(
    platform: Platform,
) -> None:
    bind = platform.publish("bind", msgspec.json.encode({"sandbox": "s1", "bot": BOT, "bot_token": TOKEN}))
    repeated = bind.again()
    platform.control.enqueue(repeated)
    await asyncio.sleep(1)
    assert (bind.acks, repeated.acks) == (0, 1)
    assert platform.changes == [("s1", BOT, "bound")]


async def test_a_command_that_breaks_the_adapter_is_put_aside_and_the_next_one_goes(platform: Platform) -> None:

    async def bug(key: str) -> None:
        if key.startswith("bad"):
            raise RuntimeError("a bug")

    platform.bench.bindings_bucket.on_write = bug
    with capture_logs() as logs:
        bad = platform.publish(
            "bind", msgspec.json.encode({"sandbox": "s1", "bot": "bad@im.bot", "bot_token": "SECRET"})
        )
        platform.publish("bind", msgspec.json.encode({"sandbox": "s1", "bot": BOT, "bot_token": TOKEN}))
        await asyncio.sleep(120)
    assert "work.crashed" in [line["event"] for line in logs]
    assert bad.acks == 1
    assert platform.bound == {BOT: "s1"}
    assert len(platform.bench.bus.found("DEAD")) == 1


async def test_an_event_that_the_bus_refuses_stops_nothing(platform: Platform) -> None:
    platform.bench.bus.refuse = lambda message: BusRefused(10054, "too large") if message.stream == "event" else None
    assert (await platform.bind()).ok


async def test_a_full_event_stream_is_waited_for(platform: Platform) -> None:
    full = BusRefused(10077, "maximum bytes exceeded")
    platform.bench.bus.refuse = lambda message: full if message.stream == "event" else None
    body = msgspec.json.encode({"sandbox": "s1", "bot": BOT, "bot_token": TOKEN, "user": USER})
    delivery = platform.publish("bind", body)
    await asyncio.sleep(30)
    assert delivery.acks == 0
    platform.bench.bus.refuse = lambda message: None
    await asyncio.sleep(30)
    assert delivery.acks == 1
    assert platform.changes == [("s1", BOT, "bound")]


# secrets -------------------------------------------------------------------------------------------------


async def test_no_token_is_in_an_answer_an_event_a_log_or_a_repr() -> None:
    sealer = Sealer((bytes(32),))
    platform = Platform(sealer=sealer)
    with capture_logs() as logs:
        await platform.bind()
        await platform.bind(bot_token="b1@im.bot:SECRET2")
        await platform.bind(base_url="https://evil.example")
        platform.publish("bind", msgspec.json.encode({"sandbox": "S1", "bot": BOT, "bot_token": TOKEN}))
        await asyncio.sleep(1)
        await platform.say("unbind", sandbox="s1")
    said = [payload for _, payload, _ in platform.bench.core.published]
    stored = [kept.stored.data + str(kept.stored.headers).encode() for kept in platform.bench.bus.kept]
    sealed = [entry.value or b"" for entry in platform.bench.bindings_bucket.entries.values()]
    for data in (*said, *stored, *sealed, str(logs).encode(), repr(list(platform.bench.bindings)).encode()):
        assert b"SECRET" not in data


def test_a_bind_shows_no_token() -> None:
    """Nor does what holds one: a repr ends in logs and tracebacks."""
    bind = Bind(sandbox="s1", bot=BOT, bot_token=TOKEN)
    assert "SECRET" not in f"{bind!r} {bind} {[bind]}"
    assert "SECRET" not in repr(Binding(sandbox="s1", bot=BOT, token=TOKEN))


async def test_a_token_is_sealed_for_its_bot_and_opened_by_any_key() -> None:
    """Rotation: the first key seals, all open."""
    old, new = bytes(32), bytes([1] * 32)
    stored = Sealer((old,)).seal(BOT, TOKEN)
    assert TOKEN not in stored
    assert Sealer((new, old)).open(BOT, stored) == TOKEN
    assert Sealer((new, old)).seal(BOT, TOKEN).split(".")[1] != stored.split(".")[1]
    assert Sealer((new,)).open_given(BOT, "plain:token") == "plain:token"


@pytest.mark.parametrize(
    ("keys", "bot", "change"),
    [
        ((), BOT, lambda stored: stored),
        ((bytes([1] * 32),), BOT, lambda stored: stored),
        ((bytes(32),), "b2@im.bot", lambda stored: stored),
        ((bytes(32),), BOT, lambda stored: stored[:-8] + "AAAAAAA="),
        ((bytes(32),), BOT, lambda stored: stored[:20]),
        ((bytes(32),), BOT, lambda stored: stored.rpartition(".")[0] + ".ä"),
        ((bytes(32),), BOT, lambda stored: stored.rpartition(".")[0] + "."),
        ((bytes(32),), BOT, lambda stored: "s1."),
        ((bytes(32),), BOT, lambda stored: TOKEN),
        ((bytes(32),), BOT, lambda stored: stored.rpartition(".")[0] + "." + base64.b64encode(b"x" * 13).decode()),
    ],
    ids=[
        "no-key",
        "other-key",
        "other-bot",
        "changed",
        "cut",
        "no-base64",
        "empty",
        "only-a-mark",
        "in-clear",
        "too-short",
    ],
)
async def test_a_token_that_no_key_opens_is_refused(keys: tuple[bytes, ...], bot: str, change: Any) -> None:
    stored = change(Sealer((bytes(32),)).seal(BOT, TOKEN))
    with pytest.raises(Refused) as caught:
        Sealer(keys).open(bot, stored)
    assert caught.value.reason == "token_key"
    assert "SECRET" not in str(caught.value)
