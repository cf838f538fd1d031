"""What an erasure finds of a person, and what it leaves to others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec
import pytest

from adapter.bridge.entries import encode_end
from adapter.bridge.erasure import Erasure
from adapter.bridge.sending import CommandResult
from adapter.contract.names import H_MSG_ID, H_SANDBOX, H_USER, Names, person_token
from adapter.errors import LeaseLost, Temporary
from tests.fakes import Bench

VIRTUAL_TIME = True

USER, BOT = "u1@im.wechat", "b1@im.bot"


def record_of(names: Names, sandbox: str, name: str) -> str:
    return f"$KV.{names.persons}.{sandbox}.{person_token(sandbox, name)}"


def entry(user: str, bot: str, *bots: str) -> bytes:
    """One whose messages these bots have brought."""
    messages = [{"bot": each, "sandbox": "s1", "text": "words"} for each in bots or (bot,)]
    return msgspec.json.encode({"v": 1, "since": 1, "user": user, "bot": bot, "messages": messages})


class Place:
    """A bus with what one person has left, and a little of another."""

    def __init__(self) -> None:
        self.bench = bench = Bench()
        names = bench.names
        for user, bot in ((USER, BOT), ("u2@im.wechat", "b2@im.bot")):
            about = msgspec.json.encode({"user": user, "bot": bot, "sandbox": "s1", "command": f"c-{user}"})
            bench.bus.put(names.inbox("s1", person_token("s1", user)), entry(user, bot), {})
            bench.bus.put(record_of(names, "s1", user), msgspec.json.encode({"v": 1, "user": user}), {})
            bench.bus.put(names.receipt("s1", f"c-{user}", 1), about, {})
            bench.bus.put(names.event("s1", "binding"), msgspec.json.encode({"bot": bot, "sandbox": "s1"}), {})
            bench.bus.put(names.dead_letters("WECHAT_IN"), b"raw", {H_MSG_ID: f"dead:{bot}:x", H_SANDBOX: "s1"})
            bench.bus.put(names.dead_letters("WECHAT_OUT"), b"{", {H_USER: user, H_SANDBOX: "s1"})

    async def erase(self, *, number: int = 100, check: Callable[[], None] = lambda: None) -> CommandResult:
        """`number`: the place of the erase in the stream."""
        bench = self.bench
        erasure = Erasure(bench.bus, bench.bus, bench.receipts, bench.names, bench.bindings, {}, bench.clock)
        return await erasure.erase(USER, "s1", number, check)

    @property
    def kept(self) -> int:
        """Messages on the bus."""
        return len(self.bench.bus.kept)


ALL = {"person": 1, "message": 1, "receipt": 1, "event": 1, "dead_letter": 2}


async def test_what_is_theirs_goes_overwritten_and_the_rest_stays() -> None:
    place = Place()
    answer = await place.erase()
    assert (answer.outcome, answer.counts, answer.left) == ("applied", ALL, {})
    assert place.kept == 6
    assert len(place.bench.bus.erased) == 6


async def test_a_sealed_dead_letter_is_theirs_by_the_user_that_it_names() -> None:
    """Nothing else on the bus names its bot, and nobody can look for the user in its bytes."""
    place = Place()
    sealed = place.bench.sealer.seal_bytes("dead x", f'{{"from_user_id":"{USER}"}}'.encode())
    for user in (USER, "u2@im.wechat"):
        headers = {H_MSG_ID: "dead:b9@im.bot:x", H_SANDBOX: "s1", H_USER: user}
        place.bench.bus.put(place.bench.names.dead_letters("WECHAT_IN"), sealed, headers)
    answer = await place.erase()
    assert (answer.outcome, answer.counts["dead_letter"], place.kept) == ("applied", 3, 6 + 1)


@pytest.mark.parametrize("done", [0, 3, 5])
async def test_one_that_was_cut_is_finished_by_the_next(done: int) -> None:
    place = Place()

    async def fail_after_some() -> None:
        if len(place.bench.bus.erased) > done:
            raise Temporary("bus_timeout")

    place.bench.bus.on_delete = fail_after_some
    with pytest.raises(Temporary):
        await place.erase()
    assert place.kept == 12 - done
    place.bench.bus.on_delete = None
    assert (await place.erase()).outcome == "applied"
    assert place.kept == 6


@pytest.mark.parametrize("writes", ["command", "receipt"])
async def test_a_sandbox_that_goes_on_naming_the_person_keeps_no_erasure_incomplete(writes: str) -> None:
    place = Place()
    names, about = place.bench.names, msgspec.json.encode({"user": USER, "sandbox": "s1", "command": "late"})
    subject = names.out("s1") if writes == "command" else names.receipt("s1", "late")
    place.bench.bus.put(subject, about, {})

    async def go_on() -> None:
        place.bench.bus.put(subject, about, {})

    place.bench.bus.on_delete = go_on
    answer = await place.erase()
    assert (answer.outcome, answer.left) == ("applied", {})


@pytest.mark.parametrize(
    "place_of",
    [
        lambda names: names.receipt("s1", "r1", 1),
        lambda names: names.out("s1"),
    ],
    ids=["receipt", "command"],
)
async def test_a_sandbox_that_names_the_bot_of_another_person_erases_nothing_of_theirs(
    place_of: Callable[[Names], str],
) -> None:
    """It chooses the user and the bot of its commands, and so those of all that the adapter stores about them."""
    place = Place()
    about = {"user": USER, "bot": "b2@im.bot", "sandbox": "s1", "command": "r1"}
    place.bench.bus.put(place_of(place.bench.names), msgspec.json.encode(about), {})
    answer = await place.erase()
    assert (answer.outcome, answer.left) == ("applied", {})
    assert sum(answer.counts.values()) == sum(ALL.values()) + 1
    assert place.kept == 6


async def test_the_bots_that_brought_a_persons_messages_are_theirs() -> None:
    """An entry has those of a former bot, too."""
    place = Place()
    names = place.bench.names
    subject = names.inbox("s1", person_token("s1", USER))
    place.bench.bus.put(subject, entry(USER, BOT, "b4@im.bot", BOT), {})
    headers = {H_MSG_ID: "dead:b4@im.bot:x", H_SANDBOX: "s1"}
    place.bench.bus.put(names.dead_letters("WECHAT_IN"), b"raw", headers)
    assert (await place.erase()).counts == ALL | {"message": 2, "dead_letter": 3}


async def test_the_end_of_a_persons_time_stays_since_it_names_nobody() -> None:
    """Late writes meet it."""
    place = Place()
    place.bench.bus.put(place.bench.names.inbox("s1", person_token("s1", USER)), encode_end(1, erased=True), {})
    answer = await place.erase()
    assert (answer.outcome, answer.counts, place.kept) == ("applied", ALL, 6 + 1)


async def test_what_was_stored_before_the_bots_user_was_known_is_theirs() -> None:
    """The bot's name is that of the person then."""
    place = Place()
    names = place.bench.names
    binding = {"user": USER, "bot": "b5@im.bot", "sandbox": "s1"}
    place.bench.bus.put(f"$KV.{names.bindings}.b5", msgspec.json.encode(binding), {})
    for bot in ("b5@im.bot", "b6@im.bot"):
        place.bench.bus.put(names.inbox("s1", person_token("s1", bot)), entry("", bot), {})
        place.bench.bus.put(record_of(names, "s1", bot), msgspec.json.encode({"v": 1, "user": ""}), {})
    answer = await place.erase()
    assert (answer.outcome, answer.counts, place.kept) == ("applied", ALL | {"person": 2, "message": 2}, 6 + 3)


async def test_what_was_said_behind_the_erase_and_a_later_time_of_the_person_stay() -> None:
    """A frozen run meets what a later bind has brought."""
    place = Place()
    names, bench = place.bench.names, place.bench
    about = msgspec.json.encode({"user": USER, "bot": BOT, "sandbox": "s1", "command": "late"})
    late = [bench.bus.put(names.out(sandbox), about, {}) for sandbox in ("s2", "s2", "s1")][-1]
    await bench.bind(since=late + 1)
    await asyncio.sleep(1)
    said = {H_MSG_ID: f"binding:{BOT}:bound:{late + 1}"}
    bench.bus.put(names.event("s1", "binding"), msgspec.json.encode({"bot": BOT, "sandbox": "s1"}), said)
    bench.bus.put(names.receipt("s1", "late", late), about, {})
    bench.bus.put(names.dead_letters("WECHAT_OUT"), b"{", {H_USER: USER, H_SANDBOX: "s1"})
    before = place.kept
    answer = await place.erase(number=late - 1)
    assert (answer.outcome, answer.counts, answer.left) == ("applied", ALL, {})
    assert place.kept == before - 6


async def test_who_has_lost_the_partition_deletes_nothing_more() -> None:
    place = Place()

    def lost() -> None:
        raise LeaseLost("lease_lost")

    with pytest.raises(LeaseLost):
        await place.erase(check=lost)
    assert place.kept == 12
