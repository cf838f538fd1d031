"""The fence of a person's subject on real servers: what a refused write means, the end of a time, and the taking of
persons. The same cases on the fake bus are in tests/inbound/test_receive.py."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any

import msgspec
import nats
import pytest
from nats.aio.msg import Msg

from adapter.bridge.entries import Entry, Secrets, StoredEntry, encode_entry, messages_of, read_entry
from adapter.bridge.person import Person
from adapter.bridge.persons import Persons, StoredPerson, seal_state
from adapter.bridge.receipts import Address, Receipts
from adapter.bridge.receive import Receiver
from adapter.bridge.record import CommandRef, PersonState
from adapter.bridge.sending import CommandResult, unread
from adapter.contract.messages import Inbound
from adapter.contract.names import H_EXPECTED, H_POSITION, H_REASON, person_token
from adapter.contract.records import PersonKey
from adapter.errors import Conflict
from adapter.jetstream import topology
from adapter.jetstream.buckets import KvBucket
from adapter.jetstream.history import LAST_BYTES, StreamHistory, direct_get
from adapter.jetstream.managed_connection import CoreNats
from adapter.jetstream.publisher import Publisher
from adapter.ports import Bus as BusPort
from adapter.ports import BusMessage, PubAck, StoredMessage
from adapter.settings import Settings
from adapter.tools.events import Events
from tests.bus.rig import NAMES, PATIENCE_S, Bus, Rig, rig_on, store_all
from tests.e2e.cluster import NatsCluster
from tests.e2e.lossy import Loss, Lossy
from tests.e2e.memory import in_memory
from tests.e2e.waiting import eventually, until
from tests.fakes import Bench, FakeDelivery, batch
from tests.inbound.pollers import BOT, USER, raw

SINCE = 7
IN = NAMES.stream_in
STREAMS = (IN, NAMES.stream_dead, NAMES.stream_event, f"KV_{NAMES.persons}")
BOTH = pytest.mark.parametrize("copies", [1, 3], ids=["one server", "three servers"])
THREE = pytest.mark.parametrize("copies", [3], ids=["three servers"])


def words(*numbers: int, cursor: str = "b", user: str = USER) -> Any:
    """An answer with the texts t1, t2 …"""
    return batch(*(raw(f"t{number}", number, from_user_id=user) for number in numbers), cursor=cursor)


class Replica:
    """The bridge of one replica on real servers. Its iLink, clock, leases and bindings are fakes, and its own: it
    learns of an end only by the fence."""

    def __init__(
        self, rig: Rig, *, replicated: bool, bus: BusPort | None = None, history: StreamHistory | None = None
    ) -> None:
        self.bench = Bench()
        self.bus: BusPort = bus or rig.publisher
        history = history or StreamHistory(rig.connection, replicated=replicated)
        self.bucket = KvBucket(rig.connection, NAMES.persons, rig.publisher, replicated=replicated)
        self.persons = Persons(self.bus, history, self.bucket, NAMES, self.bench.sealer)
        self.partition = self.bench.partition(
            bus=self.bus,
            core=CoreNats(rig.connection),
            history=history,
            persons=self.persons,
            events=Events(rig.publisher, NAMES, self.bench.clock, self.bench.metrics),
        )

    async def take(self, bot: str = BOT, user: str = USER, since: int = SINCE) -> Person:
        """Binds a bot, and reads its person."""
        person = self.partition.person(await self.bench.bind(bot=bot, user=user, since=since))
        await person.open()
        return person

    async def receive(self, polled: Any, bot: str = BOT) -> None:
        """Stores an answer to a poll that began with what the person knows now."""
        binding = self.bench.bindings.get(bot)
        assert binding is not None
        person = self.partition.person(binding)
        async with asyncio.timeout(PATIENCE_S):
            await Receiver(bot, person, self.partition.parts, polled, binding, person.position).receive()


class Place:
    """Servers, and two replicas that both take themselves for the owner of a person: `mine` reaches its server by a
    way that loses what it is told to."""

    def __init__(self, near: Rig, far: Rig, lossy: Lossy, copies: int) -> None:
        self.near, self.far, self.lossy, self.replicated = near, far, lossy, copies > 1
        self.mine, self.other = self.replica(near), self.replica(far)
        self.key = PersonKey("s1", person_token("s1", USER), SINCE)
        self.subject = NAMES.inbox("s1", self.key.person)
        self.rung: list[tuple[str, str]] = []
        """Position and text of each live message."""

    def replica(self, rig: Rig, **parts: Any) -> Replica:
        return Replica(rig, replicated=self.replicated, **parts)

    async def on_ring(self, msg: Msg) -> None:
        self.rung.append(((msg.headers or {})[H_POSITION], msgspec.json.decode(msg.data, type=Inbound).text))

    async def stored(self, subject: str = "", stream: str = IN) -> list[StoredMessage]:
        history = StreamHistory(self.far.connection, replicated=self.replicated)
        return [stored async for stored in history.read(stream, subject or self.subject)]

    async def entries(self) -> list[StoredEntry]:
        """Of the person, as they can be read."""
        return [read_entry(stored, self.mine.bench.sealer) for stored in await self.stored()]

    async def said(self) -> list[list[str]]:
        """The texts of each entry of the person, an end as "END"."""
        return [
            ["END"] if each.entry.ended else [msgspec.json.decode(one)["text"] for one in each.entry.messages]
            for each in await self.entries()
        ]

    async def dead(self) -> list[str]:
        """The reasons of dead letters."""
        letters = await self.stored(NAMES.dead_letters("*"), NAMES.stream_dead)
        return [letter.headers[H_REASON] for letter in letters]

    async def has_rung(self, *texts: str) -> None:
        """Each of these was rung once, with the place that it has in the stream."""
        await until(lambda: len(self.rung) >= len(texts), "all are rung")
        places = {
            f"{stored.seq}.{number}": msgspec.json.decode(one)["text"]
            for stored in await self.stored()
            for number, one in enumerate(messages_of(stored.data))
        }
        assert sorted(text for _, text in self.rung) == sorted(texts)
        assert all(places[position] == text for position, text in self.rung)

    def lose_ack(self, *, skip: int = 0) -> Loss:
        """Loses an acknowledgement of an entry on its way to `mine`."""
        return self.lossy.lose(b"MSG", b'{"stream":"%b"' % IN.encode(), skip=skip)

    async def change(self, **config: Any) -> None:
        """Changes the stream of entries, as an operator does."""
        found = (await self.far.connection.api_request(f"STREAM.INFO.{IN}"))["config"]
        await self.far.connection.api_request(f"STREAM.UPDATE.{IN}", found | config, timeout_s=15)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsCluster]:
    folder = tmp_path_factory.mktemp("fence") / "nats"
    with in_memory(folder):
        made, loop = NatsCluster(folder), asyncio.new_event_loop()
        loop.run_until_complete(made.__aenter__())
        loop.close()
        yield made
        made.kill()


@pytest.fixture
def copies() -> int:
    return 1


@pytest.fixture
def servers(request: pytest.FixtureRequest, copies: int) -> Settings:
    """Settings for one server of the test's own, or for three that tests share."""
    if copies == 1:
        bus: Bus = request.getfixturevalue("bus")
        return bus.settings
    cluster: NatsCluster = request.getfixturevalue("cluster")
    urls = tuple(node.url for node in cluster.nodes)
    return Settings(nats_url=urls, replicas=3, in_max_bytes=1 << 30, media_store_bytes=1 << 30)


def bus_at(settings: Settings, url: str) -> Bus:
    bus = Bus.__new__(Bus)
    bus.settings = msgspec.structs.replace(settings, nats_url=(url,))
    return bus


@pytest.fixture
async def place(servers: Settings, copies: int) -> AsyncIterator[Place]:
    first, *_, last = (*servers.nats_url, servers.nats_url[-1])
    async with (
        Lossy(first) as lossy,
        rig_on(bus_at(servers, lossy.url), streams=False) as near,
        rig_on(bus_at(servers, last), streams=False) as far,
    ):
        wanted = [each for each in topology.wanted_streams(NAMES, servers) if each.name in STREAMS]
        for each in wanted:
            await topology.create_stream(far.connection, each)
        made = Place(near, far, lossy, copies)
        nc = await nats.connect(last)
        await nc.subscribe(NAMES.live("s1"), cb=made.on_ring)
        await nc.flush()
        yield made
        await nc.close()
        if copies > 1:
            for each in wanted:
                await far.connection.api_request(f"STREAM.DELETE.{each.name}", timeout_s=15)


# a refused write -----------------------------------------------------------------------------------------


@BOTH
async def test_an_entry_whose_ack_gets_lost_is_stored_and_rung_once(place: Place) -> None:
    await place.mine.take()
    loss = place.lose_ack()
    await place.mine.receive(words(1, 2))
    await place.mine.receive(words(3))
    assert loss.has_happened
    assert await place.said() == [["t1", "t2"], ["t3"]]
    await place.has_rung("t1", "t2", "t3")


@BOTH
async def test_an_entry_whose_ack_gets_lost_is_known_though_another_lies_behind_it(place: Place) -> None:
    await place.mine.take()
    loss = place.lose_ack()
    storing = asyncio.create_task(place.mine.receive(words(1)))
    await until(lambda: loss.has_happened, "the first entry is stored")
    await place.other.take()
    await place.other.receive(words(2))
    await storing
    await place.mine.receive(words(2, 3))
    assert await place.said() == [["t1"], ["t2"], ["t3"]]
    await place.has_rung("t1", "t2", "t3")


@BOTH
@pytest.mark.parametrize("before", [(), (9,)], ids=["nothing before", "an entry before"])
async def test_behind_another_writers_entry_repeats_are_dropped_and_its_cursor_stays(
    place: Place, before: Sequence[int]
) -> None:
    first = await place.mine.take()
    if before:
        await place.mine.receive(words(*before))
    await place.other.take()
    await place.other.receive(words(1, 2, cursor="theirs"))
    await place.other.receive(words(3, cursor="theirs too"))
    await place.mine.receive(words(1, 2, 3, 4, cursor="mine"))
    assert (await place.said())[len(before) :] == [["t1", "t2"], ["t3"], ["t4"]]
    newest = (await place.entries())[-1]
    assert newest.secrets == Secrets("token-4", "theirs too", (), ())
    assert first.state.cursor == "theirs too"
    await place.other.receive(words(4, 5, cursor="theirs at last"))
    assert (await place.said())[-1] == ["t5"]
    assert (await place.entries())[-1].secrets == Secrets("token-5", "theirs too", (), ())


async def end(replica: Replica, key: PersonKey, *, is_forgotten: bool = True, erased: bool = False) -> None:
    """As an unbind does it, or one that was cut behind the end."""
    if is_forgotten:
        await replica.persons.end(key, lambda: None, erased=erased)
    else:
        await replica.persons._store_end(key, lambda: None, erased=erased)


@BOTH
@pytest.mark.parametrize("is_forgotten", [False, True], ids=["ended", "forgotten"])
@pytest.mark.parametrize("before", [(), (9,)], ids=["no entry ever", "an entry before"])
async def test_behind_the_end_of_a_time_a_late_answer_is_dead_letters(
    place: Place, before: Sequence[int], is_forgotten: bool
) -> None:
    """Also where the person never had an entry, so that the writer expects none."""
    person = await place.mine.take()
    if before:
        await place.mine.receive(words(*before))
    await end(place.other, place.key, is_forgotten=is_forgotten)
    await place.mine.receive(words(1, 2))
    assert (await place.said())[0 if is_forgotten else len(before) :] == [["END"]]
    assert (await place.dead(), person.gone) == (["not_bound"] * 2, "not_bound")
    assert len(place.rung) == len(before)


async def test_behind_the_end_by_an_erasure_a_late_answer_is_dropped(place: Place) -> None:
    await place.mine.take()
    await end(place.other, place.key, erased=True)
    await place.mine.receive(words(1, 2))
    assert (await place.said(), await place.dead()) == ([["END"]], [])


@BOTH
@pytest.mark.parametrize("before", [(), (9,)], ids=["no entry ever", "an entry before"])
@pytest.mark.parametrize("begins", ["an end", "the end of another time", "an entry"])
async def test_behind_another_time_a_late_answer_is_dead_letters(
    place: Place, begins: str, before: Sequence[int]
) -> None:
    """The new time goes on as if nothing had come."""
    await place.mine.take()
    if before:
        await place.mine.receive(words(*before))
    if begins == "an end":
        await end(place.other, place.key)
    elif begins == "the end of another time":
        await end(place.other, place.key._replace(since=SINCE + 1), is_forgotten=False)
    await place.other.take(since=SINCE + 2)
    if begins != "the end of another time":
        await place.other.receive(words(5))
    await place.mine.receive(words(1, 2))
    assert await place.dead() == ["not_bound"] * 2
    await place.other.receive(words(6))
    said = [text for texts in await place.said() for text in texts]
    assert said[said.index("END") + 1 if "END" in said else len(before) :] == (
        ["t6"] if begins == "the end of another time" else ["t5", "t6"]
    )


async def test_an_answer_in_hand_of_who_learns_of_the_end_meanwhile_is_dead_letters(place: Place) -> None:
    """As of an owner that is told of another replica's entry: what they know must not let them pass the fence."""
    person = await place.mine.take()
    await end(place.other, place.key, is_forgotten=False)
    await person.read_newest()
    assert person.gone == "not_bound"
    await place.mine.receive(words(1, 2))
    assert (await place.said(), await place.dead()) == ([["END"]], ["not_bound"] * 2)


async def test_a_second_answer_behind_the_end_is_dead_letters_too(place: Place) -> None:
    """As of a person with two bots, of which each has an answer in hand."""
    await place.mine.take()
    await end(place.other, place.key, is_forgotten=False)
    await place.mine.receive(words(1))
    await place.mine.receive(words(2))
    assert (await place.said(), await place.dead()) == ([["END"]], ["not_bound"] * 2)


async def age(place: Place) -> None:
    config = (await place.far.connection.api_request(f"STREAM.INFO.{IN}"))["config"]
    usual = {name: config[name] for name in ("max_age", "duplicate_window")}
    await place.change(max_age=100_000_000, duplicate_window=100_000_000)
    await gone(place)
    await place.change(**usual)


async def evict(place: Place) -> None:
    """Others' entries fill the stream."""
    await place.change(max_bytes=8192)
    await place.other.take("b2@im.bot", "u2@im.wechat")
    number = 0
    while await place.stored():
        number += 1
        await place.other.receive(words(number, user="u2@im.wechat"), "b2@im.bot")


async def delete_newest(place: Place) -> None:
    *_, newest = await place.stored()
    await place.far.history.delete(IN, newest.seq)


async def delete_all(place: Place) -> None:
    for stored in await place.stored():
        await place.far.history.delete(IN, stored.seq)


async def make_anew(place: Place, *kept: StoredMessage, first: int = 1) -> None:
    config = (await place.far.connection.api_request(f"STREAM.INFO.{IN}"))["config"]
    await place.far.connection.api_request(f"STREAM.DELETE.{IN}", timeout_s=15)
    await place.far.connection.api_request(f"STREAM.CREATE.{IN}", config | {"first_seq": first}, timeout_s=15)
    for each in kept:
        await place.far.publisher.store(BusMessage("in", each.subject, each.data, {}))


async def restore(place: Place) -> None:
    """An older copy of the stream, whose sequences are below what the writer knows."""
    oldest, *_ = await place.stored()
    await make_anew(place, oldest)


async def restore_above(place: Place) -> None:
    oldest, newest = await place.stored()
    await make_anew(place, oldest, first=newest.seq + 100)


async def gone(place: Place) -> None:
    async def is_gone() -> bool:
        return not await place.stored()

    await eventually(is_gone, "the person's entries are gone")


@BOTH
@pytest.mark.parametrize(
    ("lose", "left"),
    [
        (age, 0),
        (evict, 0),
        (delete_newest, 1),
        (delete_all, 0),
        (make_anew, 0),
        (restore, 1),
        (restore_above, 1),
    ],
    ids=["aged", "evicted", "newest deleted", "all deleted", "made anew", "restored", "restored above"],
)
async def test_where_what_was_stored_is_gone_an_answer_is_stored_behind_what_is_there(
    place: Place, lose: Callable[[Place], Awaitable[None]], left: int
) -> None:
    """And what memory knows is no news."""
    await place.mine.take()
    await place.mine.receive(words(1))
    await place.mine.receive(words(2, cursor="c"))
    await lose(place)
    await place.mine.receive(words(2, 3, cursor="d"))
    await place.mine.receive(words(4, cursor="e"))
    assert await place.said() == [["t1"]] * left + [["t3"], ["t4"]]
    assert await place.dead() == []


class Meanwhile(StreamHistory):
    """Something happens once, right after the reading of what lies behind an expectation."""

    happens: Callable[[], Awaitable[object]] | None = None

    async def read(self, stream: str, subject: str, **where: Any) -> AsyncIterator[StoredMessage]:  # type: ignore[override]
        async for stored in super().read(stream, subject, **where):
            yield stored
        if "after" in where and (happens := self.happens) is not None:
            self.happens = None
            await happens()


@BOTH
@pytest.mark.parametrize("what", ["an end", "an entry", "another time"])
async def test_what_is_stored_while_a_refused_write_is_looked_into_is_not_passed_over(
    place: Place, what: str
) -> None:
    """Nothing lies behind the expectation at first, as where the entry was deleted, or another write was in process
    (10164)."""
    history = Meanwhile(place.near.connection, replicated=place.replicated)
    mine = place.replica(place.near, history=history)
    await mine.take()
    await mine.receive(words(1))
    await delete_newest(place)

    async def happen() -> None:
        if what == "an end":
            await end(place.other, place.key, is_forgotten=False)
            return
        await place.other.take(since=SINCE if what == "an entry" else SINCE + 1)
        await place.other.receive(words(2))

    history.happens = happen
    await mine.receive(words(2, 3))
    assert history.happens is None
    wanted = {"an end": [["END"]], "an entry": [["t2"], ["t3"]], "another time": [["t2"]]}[what]
    letters = {"an end": 2, "an entry": 0, "another time": 2}[what]
    assert (await place.said(), await place.dead()) == (wanted, ["not_bound"] * letters)


class Noting:
    """A publisher's writes, with the codes of those that are refused as conflicts."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        self.codes: Counter[int] = Counter()

    async def store(self, message: BusMessage) -> PubAck:
        try:
            return await self._publisher.store(message)
        except Conflict as exc:
            self.codes[exc.code] += 1
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._publisher, name)


@THREE
async def test_writers_at_the_same_time_store_each_message_once_and_in_their_order(place: Place) -> None:
    """Some of their writes are refused since another one of the subject is in process (10164)."""
    bus: Any = Noting(place.near.publisher)
    mine = place.replica(place.near, bus=bus)
    await mine.take()
    await place.other.take()
    rounds = 0
    async with asyncio.timeout(PATIENCE_S):
        while not bus.codes[10164]:
            ours, theirs = 10_000 + 2 * rounds, 50_000 + 2 * rounds
            await asyncio.gather(
                mine.receive(words(ours, ours + 1)),
                place.other.receive(words(theirs, theirs + 1)),
            )
            rounds += 1
    said = [text for texts in await place.said() for text in texts]
    for first in (10_000, 50_000):
        wanted = [f"t{number}" for number in range(first, first + 2 * rounds)]
        assert [text for text in said if text in wanted] == wanted
    assert len(said) == 4 * rounds
    await place.has_rung(*said)


@BOTH
@pytest.mark.parametrize("skip", [0, 1, 2])
async def test_a_long_answer_of_whose_entries_one_ack_gets_lost_is_stored_once(place: Place, skip: int) -> None:
    await place.mine.take()
    loss = place.lose_ack(skip=skip)
    await place.mine.receive(words(*range(250), cursor="b"))
    assert loss.has_happened
    texts = [f"t{number}" for number in range(250)]
    assert await place.said() == [texts[:100], texts[100:200], texts[200:]]
    assert [each.secrets and each.secrets.cursor for each in await place.entries()] == ["", "", "b"]
    await place.has_rung(*texts)


@pytest.mark.parametrize(("copies", "races"), [(1, 200), (3, 50)], ids=["one server", "three servers"])
async def test_nothing_of_a_writer_comes_behind_the_end_of_a_time(place: Place, races: int) -> None:
    """It writes as fast as it can while its persons end and are forgotten: half of them had no entry."""
    persons: dict[str, Person] = {}
    for number in range(races):
        bot, user = f"b{number}@im.bot", f"u{number}@im.wechat"
        persons[bot] = await place.mine.take(bot, user, since=number + 1)
        if number % 2:
            await place.mine.receive(words(1, user=user), bot)

    async def write(bot: str) -> None:
        number, person = 10, persons[bot]
        while not person.gone:
            await place.mine.receive(words(number, user=person.user), bot)
            number += 1

    async def end_soon(number: int, key: PersonKey) -> None:
        await asyncio.sleep(number % 7 * 0.002)
        await end(place.other, key)

    async def race(number: int, bot: str) -> None:
        async with asyncio.timeout(2 * PATIENCE_S):
            await asyncio.gather(write(bot), end_soon(number, persons[bot].key))

    numbered = list(enumerate(persons))
    for start in range(0, races, 10):
        await asyncio.gather(*(race(*each) for each in numbered[start : start + 10]))
    subjects = map(place.mine.persons.subject, (each.key for each in persons.values()))
    left: dict[str, list[bool]] = {subject: [] for subject in subjects}
    for stored in await place.stored(NAMES.inbox("s1")):
        left[stored.subject].append(read_entry(stored, place.mine.bench.sealer).entry.ended)
    assert list(left.values()) == [[True]] * races
    assert Counter(await place.dead()) == {"not_bound": races}
    assert len(place.rung) > races // 2, "some were stored before their end"
    records = await place.other.bucket.get_all([each.key.key for each in persons.values()])
    assert [entry.value for entry in records] == [None] * races


# taking --------------------------------------------------------------------------------------------------


async def store_persons(place: Place, count: int, *, size: int = 10) -> list[PersonKey]:
    """Persons with an entry and a record each."""
    keys, sealer = [], place.mine.bench.sealer
    writes, records = [], []
    for number in range(count):
        user = f"u{number}@im.wechat"
        key = PersonKey(f"s{number % 7}", person_token(f"s{number % 7}", user), number + 1)
        subject = NAMES.inbox(key.sandbox, key.person)
        entry = Entry(since=key.since, user=user, bot="b", messages=[msgspec.Raw(b'"%b"' % (b"a" * size))])
        payload = encode_entry(entry, Secrets(f"token {number}", f"cursor {number}"), subject, sealer)
        writes.append(BusMessage("in", subject, payload, {H_EXPECTED: "0"}))
        records.append((key, seal_state(key, user, PersonState(bot=f"b{number}"), sealer)))
        keys.append(key)
    for start in range(0, count, 256):
        acks = await store_all(place.far.publisher, writes[start : start + 256])
        assert all(isinstance(ack, PubAck) for ack in acks)
        part = records[start : start + 256]
        await asyncio.gather(*(place.other.bucket.update(key.key, value, 0) for key, value in part))
    return keys


def is_whole(keys: Sequence[PersonKey], found: Any) -> bool:
    """Whether entry and record of each person are there."""
    return list(found) == list(keys) and all(
        isinstance(each, StoredPerson)
        and each.entry is not None
        and each.entry.secrets == Secrets(f"token {key.since - 1}", f"cursor {key.since - 1}")
        and each.entry.sequence == each.last
        and each.state == PersonState(bot=f"b{key.since - 1}")
        and each.revision
        for key, each in found.items()
    )


@pytest.mark.parametrize(("replicated", "most"), [(False, 8), (True, 24)], ids=["one copy", "several copies"])
async def test_a_thousand_persons_are_taken_by_a_few_requests(place: Place, replicated: bool, most: int) -> None:
    keys = await store_persons(place, 1000)
    asked: list[str] = []

    async def on_request(msg: Msg) -> None:
        asked.append(msg.subject)

    place.replicated = replicated
    heir, nc = place.replica(place.near), await nats.connect(place.far.bus.settings.nats_url[0])
    await nc.subscribe("$JS.API.>", cb=on_request)
    await nc.flush()
    found = await heir.persons.load_all(keys)
    await nc.flush()
    assert is_whole(keys, found)
    assert 0 < len(asked) <= most
    await nc.close()


@THREE
async def test_a_thousand_persons_are_taken_from_three_servers_right_after_they_are_stored(place: Place) -> None:
    keys = await store_persons(place, 1000)
    assert is_whole(keys, await place.replica(place.near).persons.load_all(keys))


async def test_persons_with_large_entries_are_taken_whole(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Together they are more than a server may have waiting for one connection."""
    keys = await store_persons(place, 200, size=400_000)
    sizes: list[int] = []

    async def measured(connection: Any, of: str, body: dict[str, Any]) -> tuple[list[StoredMessage], dict[str, str]]:
        messages, end = await direct_get(connection, of, body)
        sizes.append(sum(len(stored.data) for stored in messages))
        return messages, end

    monkeypatch.setattr("adapter.jetstream.history.direct_get", measured)
    assert is_whole(keys, await place.replica(place.near).persons.load_all(keys))
    assert max(sizes) < LAST_BYTES + 500_000


class Lag:
    """The first two reads of a stream's newest messages are answered by a server that lags: it knows nothing, or only
    what lies below a sequence."""

    def __init__(self, stream: str, below: int | None) -> None:
        self.asked = 0
        self._stream = stream
        self._below = below

    async def direct_get(
        self, connection: Any, of: str, body: dict[str, Any]
    ) -> tuple[list[StoredMessage], dict[str, str]]:
        if of == self._stream and "multi_last" in body:
            self.asked += 1
            if self.asked <= 2:
                if self._below is None:
                    return [], {"Status": "404", "Description": "No Results"}
                body |= {"up_to_seq": self._below}
        return await direct_get(connection, of, body)


@pytest.mark.parametrize("lags", ["empty", "old"])
@pytest.mark.parametrize("stream", [IN, f"KV_{NAMES.persons}"], ids=["entries", "records"])
async def test_a_server_that_lags_is_not_believed(
    place: Place, lags: str, stream: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next server that answers has all. What the first one knows ends before the persons, or among them."""
    keys = await store_persons(place, 20)
    first, _ = await place.far.history.first_and_last(stream)
    lag = Lag(stream, None if lags == "empty" else first + 9)
    monkeypatch.setattr("adapter.jetstream.history.direct_get", lag.direct_get)
    place.replicated = True
    assert is_whole(keys, await place.replica(place.near).persons.load_all(keys))
    assert lag.asked == 3


@pytest.mark.parametrize("lags", ["empty", "old"])
async def test_receipts_are_found_though_a_server_lags(
    place: Place, lags: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next owner would send again what has its receipt."""
    clock, metrics = place.other.bench.clock, place.other.bench.metrics
    events, history = Events(place.far.publisher, NAMES, clock, metrics), place.far.history
    refs = [CommandRef(sequence=number, stored_ms=5, id=f"c{number}") for number in range(1, 21)]
    for ref in refs:
        command = unread(FakeDelivery("wechat.out.s1", b"", seq=ref.sequence, time_ms=5), ref, "s1")
        told = Receipts(events, history, NAMES, clock, metrics)
        await told.tell(command, CommandResult("accepted"), Address("s1"), lambda: None)
    first, _ = await history.first_and_last(NAMES.stream_event)
    lag = Lag(NAMES.stream_event, None if lags == "empty" else first + 9)
    monkeypatch.setattr("adapter.jetstream.history.direct_get", lag.direct_get)
    of_copies = StreamHistory(place.near.connection, replicated=True)
    found = await Receipts(events, of_copies, NAMES, clock, metrics).find("s1", refs)
    assert list(found) == refs
    assert lag.asked == 3


async def test_a_part_of_an_answer_by_a_server_that_lags_is_not_believed(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer that ends by size is continued by another server, which has all."""
    keys = await store_persons(place, 20)
    _, last = await place.far.history.first_and_last(IN)
    newest = []
    for key in keys[:2]:
        subject = NAMES.inbox(key.sandbox, key.person)
        payload = encode_entry(Entry(since=key.since), Secrets(), subject, place.mine.bench.sealer)
        newest.append((await place.far.publisher.store(BusMessage("in", subject, payload, {}))).seq)
    asked = 0

    async def lagging(connection: Any, of: str, body: dict[str, Any]) -> tuple[list[StoredMessage], dict[str, str]]:
        nonlocal asked
        if of == IN and "multi_last" in body:
            asked += 1
            if asked == 1:
                body |= {"up_to_seq": last, "max_bytes": 1}
        return await direct_get(connection, of, body)

    monkeypatch.setattr("adapter.jetstream.history.direct_get", lagging)
    place.replicated = True
    found = await place.replica(place.near).persons.load_all(keys)
    assert [getattr(found[key], "last", 0) for key in keys[:2]] == newest
    assert asked > 1


@THREE
async def test_a_look_finds_what_another_server_has_just_acknowledged(place: Place) -> None:
    """Each entry at once, whichever server answers."""
    person = await place.mine.take()
    await place.other.take()
    for number in range(100):
        await place.other.receive(words(number))
        await person.read_newest()
        (*_, newest) = await place.stored()
        assert person.position == newest.seq
