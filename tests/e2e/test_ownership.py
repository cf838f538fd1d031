"""Exactly one owner per bot, also where a replica dies, or is stopped and goes on as if nothing had happened.

Each replica reaches the simulator by an address of its own, so that its records tell who asked.
"""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from nats.aio.client import Client

from adapter.contract.messages import Unbind
from adapter.contract.records import Lease
from tests.e2e.audit import Said, audit
from tests.e2e.hole import Hole
from tests.e2e.lossy import Lossy
from tests.e2e.reading import NAMES, inbox, stream
from tests.e2e.test_nats_failures import change
from tests.e2e.world import AdapterProcess, World, eventually, time_ms, until, world

BOTS = 16
HOLD_MS = 1500
LEASE_S = "4"
ENTRY, RECORD = b"HPUB wechat.inbox.", b"HPUB $KV.wechat_persons."
FORGETS_S = 1.0
"""After this time the inboxes' stream stores a message once more, though its id was there."""


class Two(NamedTuple):
    """Two replicas, and the address under which the simulator sees each."""

    first: AdapterProcess
    second: AdapterProcess
    first_host: str
    second_host: str


async def two_replicas(made: World, nc: Client, **first_environ: str) -> Two:
    """Both serve some of the bots."""
    second_url = await made.sim.open_second_host()
    first = await made.add_adapter(WECHAT_NATS_LEASE_S=LEASE_S, **first_environ)
    second = await made.add_adapter(WECHAT_NATS_LEASE_S=LEASE_S, WECHAT_NATS_ILINK_BASE_URL=second_url)
    two = Two(first, second, made.sim.url.rpartition("/")[2], second_url.rpartition("/")[2])
    for number in range(BOTS):
        await made.bind(nc, f"s{number}", made.sim.add_bot())
    await until(lambda: set(pollers(made).values()) == {two.first_host, two.second_host}, "both poll")
    await until(lambda: made.sim.stats().parked == BOTS, "all are polled")
    return two


def asked(made: World, endpoint: str, *, since_ms: float = 0.0) -> list[tuple[str, str, float]]:
    """Bot, address and time of the requests to an endpoint."""
    found = made.sim.requests(endpoint)
    return [(one.bot, one.headers["Host"], one.at_ms) for one in found if one.at_ms >= since_ms]


def pollers(made: World, *, since_ms: float = 0.0) -> dict[str, str]:
    """The address from which each bot was polled last."""
    return {bot: host for bot, host, _ in asked(made, "getupdates", since_ms=since_ms)}


async def records(nc: Client, bucket: str) -> dict[str, tuple[int, bytes]]:
    """Revision and value of each key, as the one server has them."""
    return await newest(nc, f"KV_{bucket}", f"$KV.{bucket}.>")


async def newest(nc: Client, name: str, subjects: str) -> dict[str, tuple[int, bytes]]:
    """Sequence and body of each subject's newest message, by the subject's last token."""
    found = {}
    for subject in dict.fromkeys(subject for subject, _ in await stream(nc, name, subjects)):
        reply = await nc.request(
            f"$JS.API.STREAM.MSG.GET.{name}", msgspec.json.encode({"last_by_subj": subject}), timeout=10
        )
        message = msgspec.json.decode(reply.data, type=dict[str, Any])["message"]
        value = msgspec.json.decode(msgspec.json.encode(message.get("data", "")), type=bytes)
        found[subject.rpartition(".")[2]] = int(message["seq"]), value
    return found


async def owners(nc: Client) -> dict[str, str]:
    """The owner of each partition."""
    keys = {key: value for key, (_, value) in (await records(nc, NAMES.leases)).items() if key.isdigit()}
    return {number: msgspec.json.decode(value, type=Lease).owner for number, value in keys.items()}


def times(adapter: AdapterProcess, event: str) -> list[float]:
    """When a replica logged an event: Unix milliseconds."""
    return [time_ms(line) for line in adapter.lines(event)]


async def forget_ids_soon(nc: Client) -> None:
    """The server forgets the ids of inbound messages long before a lease has run out."""
    await change(nc, NAMES.stream_in, duplicate_window=int(FORGETS_S * 1e9))


async def freeze_and_look(made: World, *, mode: str) -> None:
    nc = await made.nc()
    two = await two_replicas(made, nc)
    await forget_ids_soon(nc)
    theirs = {bot for bot, host in pollers(made).items() if host == two.first_host}
    sandboxes = sorted(sandbox for sandbox, record in made.bots.items() if record.bot in theirs)
    for sandbox in sandboxes:
        made.say(sandbox, "before")
        await made.command(nc, sandbox, f"{sandbox}.0")
    await made.settle(nc)
    await until(lambda: made.sim.stats().parked == BOTS, "all polls wait: none is about to leave")

    two.first.signal(signal.SIGSTOP)
    stopped_ms = made.sim.now_ms
    for number in range(1, 4):  # the first ones go into the sockets of the one that is stopped
        for sandbox in sandboxes:
            made.say(sandbox, f"meanwhile {number}")
            await made.command(nc, sandbox, f"{sandbox}.{number}")

    def taken_over() -> bool:
        return all(pollers(made, since_ms=stopped_ms).get(bot) == two.second_host for bot in theirs)

    await until(taken_over, "the other replica polls all of them")
    await made.settle(nc, lossy=mode == "ack_on_delivery")
    assert len({*(await owners(nc)).values()}) == 1, "the other replica owns every partition"

    thawed_ms = made.sim.now_ms
    claimed = len(times(two.first, "partitions.taken"))
    two.first.signal(signal.SIGCONT)
    # what it does after its next taking, it does as a new owner
    await until(lambda: len(times(two.first, "partitions.taken")) > claimed, "it has a share again")
    assert times(two.first, "lease.lost")
    since_ms = times(two.first, "partitions.taken")[claimed]
    for endpoint in ("getupdates", "sendmessage", "sendtyping"):
        late = [
            one for one in asked(made, endpoint, since_ms=thawed_ms) if one[1] == two.first_host and one[2] < since_ms
        ]
        assert late == [], f"{endpoint} by one that had lost its bots"

    await made.settle(nc)
    meanwhile = {Said(sandbox, text) for sandbox in sandboxes for text in made.said[sandbox] if text != "before"}
    result = await audit(made, nc, may_be_late=meanwhile if mode == "ack_on_delivery" else set())
    assert result.faults() == []
    assert result.stored == sum(map(len, made.said.values()))


@pytest.mark.parametrize("mode", ["cursor_replay", pytest.param("ack_on_delivery", marks=pytest.mark.slow)])
async def test_a_replica_that_was_stopped_neither_polls_nor_sends_nor_moves_a_cursor_after(
    tmp_path: Path, mode: str
) -> None:
    """Until another has taken over; messages and commands for its bots lie in its sockets when it goes on. Both its
    lease and the ids of what the other has published meanwhile are gone by then."""
    async with world(tmp_path, hold_ms=HOLD_MS, cursor_mode=mode) as made:
        await freeze_and_look(made, mode=mode)


@pytest.mark.parametrize("mode", ["cursor_replay", "ack_on_delivery"])
async def test_a_publish_that_a_stopped_replica_repeats_is_stored_once(tmp_path: Path, mode: str) -> None:
    """It was lost on its way. Where iLink repeats the message, the other replica has published it by then, and the
    server has forgotten its id; where it does not, nobody else has it."""
    async with world(tmp_path, hold_ms=HOLD_MS, cursor_mode=mode) as made, Lossy(made.url) as lossy:
        nc = await made.nc()
        two = await two_replicas(made, nc, NATS_URL=lossy.url)
        await forget_ids_soon(nc)
        shared_ms = made.sim.now_ms  # a poll that began before may be the last one of a bot that is handed over
        await until(lambda: len(pollers(made, since_ms=shared_ms)) == len(made.bots), "each is polled anew")
        theirs = {bot for bot, host in pollers(made, since_ms=shared_ms).items() if host == two.first_host}
        sandbox = min(sandbox for sandbox, record in made.bots.items() if record.bot in theirs)
        made.say(sandbox, "before")
        await made.settle(nc)
        loss = lossy.lose(b"HPUB wechat.inbox.")
        made.say(sandbox, "lost on its way")
        await until(lambda: loss.has_happened, "it is lost")
        two.first.signal(signal.SIGSTOP)
        stopped_ms, bot = made.sim.now_ms, made.bots[sandbox].bot
        await until(lambda: pollers(made, since_ms=stopped_ms).get(bot) == two.second_host, "the other polls the bot")
        made.say(sandbox, "told to the other")
        await made.settle(nc, lossy=mode == "ack_on_delivery")
        await asyncio.sleep(3 * FORGETS_S)  # the length of the pause, not a wait for something
        two.first.signal(signal.SIGCONT)
        await until(lambda: times(two.first, "lease.lost") != [], "it knows that it has lost the bot")
        await made.settle(nc)
        made.say(sandbox, "after")
        await made.settle(nc)
        late = {Said(sandbox, "lost on its way")} if mode == "ack_on_delivery" else set()
        result = await audit(made, nc, may_be_late=late)
        assert result.faults() == []
        assert result.stored == 4


@pytest.mark.parametrize("what", [ENTRY, RECORD], ids=["an-entry", "a-record"])
@pytest.mark.parametrize("who", ["another", "the-same"])
async def test_what_a_stopped_replica_stores_of_a_person_who_has_left_is_refused(
    tmp_path: Path, who: str, what: bytes
) -> None:
    """It is on its way while another replica unbinds the person and binds the next one, or the same one again; it was
    the person's first, so that the server knows of none before it."""
    async with world(tmp_path, hold_ms=HOLD_MS, cursor_mode="cursor_replay") as made, Lossy(made.url) as lossy:
        nc, bot = await made.nc(), made.sim.add_bot()
        first = await made.add_adapter(NATS_URL=lossy.url, WECHAT_NATS_LEASE_S=LEASE_S)
        assert (await made.bind(nc, "s1", bot)).outcome == "applied"
        await forget_ids_soon(nc)
        await until(lambda: made.sim.stats().parked == 1, "it is polled")
        late = lossy.lose(what)
        made.say("s1", "of who leaves")
        if what == RECORD:
            await made.settle(nc)
            await made.command(nc, "s1", "c1")  # what it may send is in the record before it is sent
        await until(lambda: late.has_happened, "it is on its way")
        first.signal(signal.SIGSTOP)

        await made.add_adapter(WECHAT_NATS_LEASE_S=LEASE_S)
        assert (await made.control(nc, "s1", Unbind(all=True))).bots == [bot.bot]
        if who == "another":
            bot = made.sim.add_bot()
        assert (await made.bind(nc, "s1", bot)).outcome == "applied"
        if who == "the-same":

            async def is_told_again() -> bool:
                return [message.text for message in await inbox(nc, "s1")] == ["of who leaves"]

            await eventually(is_told_again, "iLink has told it again to whom it was written")
        before = [await stream(nc, NAMES.stream_in, ">"), await records(nc, NAMES.persons)]
        refusal = lossy.lose(b"wrong last")
        await late.arrive()
        await until(lambda: refusal.has_happened, "the server refuses it")
        assert [await stream(nc, NAMES.stream_in, ">"), await records(nc, NAMES.persons)] == before
        first.signal(signal.SIGCONT)
        await until(lambda: times(first, "lease.lost") != [], "it knows that it has lost the bot")
        made.say("s1", "of the next one")
        await made.settle(nc, lossy=True)
        texts = [message.text for message in await inbox(nc, "s1")]
        assert texts.count("of the next one") == 1
        assert texts.count("of who leaves") == (who == "the-same")
        assert made.sim.violations(kind="concurrent_polls") == []


async def test_after_a_kill_9_the_others_poll_all_bots_and_no_bot_is_polled_twice(tmp_path: Path) -> None:
    async with world(tmp_path, hold_ms=HOLD_MS, cursor_mode="cursor_replay") as made:
        nc = await made.nc()
        two = await two_replicas(made, nc)
        await two.first.kill()
        killed_ms = made.sim.now_ms
        await until(
            lambda: set(pollers(made, since_ms=killed_ms)) == {one.bot for one in made.bots.values()},
            "all are polled",
        )
        assert set(pollers(made, since_ms=killed_ms).values()) == {two.second_host}
        assert made.sim.violations(kind="concurrent_polls") == []


async def test_a_replica_that_leaves_without_nats_stops_polling_before_the_other_begins(
    tmp_path: Path,
) -> None:
    """To say that it leaves takes longer there than its lease lasts."""
    async with world(tmp_path, hold_ms=15_000, cursor_mode="cursor_replay") as made:
        nc = await made.nc()
        async with Hole(made.url) as hole:
            two = await two_replicas(made, nc, NATS_URL=hole.url)
            hole.swallow()
            await until(lambda: NAMES.leases.encode() in hole.swallowed, "a renewal gets no answer")
            two.first.signal(signal.SIGTERM)
            since_ms, bots = made.sim.now_ms, {one.bot for one in made.bots.values()}
            theirs = {bot for bot, host in pollers(made).items() if host == two.first_host}
            await until(lambda: theirs <= set(pollers(made, since_ms=since_ms)), "the other polls them")
            assert set(pollers(made, since_ms=since_ms).values()) == {two.second_host}
            await until(lambda: made.sim.stats().parked == len(bots), "all are polled")
            assert made.sim.violations(kind="concurrent_polls") == []
            await two.first.kill()


async def test_eight_seconds_without_nats_keep_every_owner(tmp_path: Path) -> None:
    """All pause, nobody takes over, all go on, and all polls are there again."""
    async with world(tmp_path, hold_ms=HOLD_MS, cursor_mode="cursor_replay") as made:
        nc = await made.nc()
        two = await two_replicas(made, nc)

        async def shared() -> bool:
            counts = Counter((await owners(nc)).values())
            return len(counts) == 2 and "" not in counts and max(counts.values()) == counts.total() / 2

        await eventually(shared, "each has its share, so that none moves any more")
        shared_ms, bots = made.sim.now_ms, {one.bot for one in made.bots.values()}
        await until(lambda: set(pollers(made, since_ms=shared_ms)) == bots, "and each bot is polled from there")
        before, polled_by = await owners(nc), pollers(made)
        made.server.kill()
        await asyncio.sleep(8)  # the length of the outage, not a wait for something
        await made.server.start()
        back_ms = made.sim.now_ms
        await until(lambda: set(pollers(made, since_ms=back_ms)) == bots, "all are polled")
        assert pollers(made, since_ms=back_ms) == polled_by
        assert await owners(nc) == before
        for adapter in (two.first, two.second):
            assert len(times(adapter, "lease.paused")) == 1
            assert times(adapter, "lease.lost") == []
        assert made.sim.violations(kind="concurrent_polls") == []
