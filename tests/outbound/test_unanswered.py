"""A request without an answer: repeated once, with the same client_id, as soon as iLink answers somebody."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import deque
from copy import copy

import pytest

from adapter.bridge.partition import Partition
from adapter.bridge.receipts import Address
from adapter.bridge.sending import CommandResult
from adapter.errors import AdapterError, Temporary, Uncertain
from tests.fakes import Bench
from tests.fakes.ilink import BASE_URL, Sent
from tests.outbound.partitions import FIRST, THROTTLED, TIMEOUT, USER, finals, ready, user_writes
from tests.outbound.test_sequences import next_owner

VIRTUAL_TIME = True

OTHER_BOT, OTHER = "b2@im.bot", "u2@im.wechat"
RESET = Uncertain("network", "the server closed the connection")
AWAY = Temporary("network")


async def silent(
    answer: AdapterError = TIMEOUT, *, base_url: str = "", is_asked_in_vain: bool = True
) -> tuple[Bench, Partition]:
    """A user whose request has had no answer right now, and another one. `base_url`: of the other's bot.
    `is_asked_in_vain`: iLink does not answer `notifystart` either."""
    bench, partition = await ready()
    await bench.bind(bot=OTHER_BOT, user=OTHER, base_url=base_url)
    bench.hears(user=OTHER, bot=OTHER_BOT)
    bench.chat.sends_to[USER] = deque([answer])
    bench.chat.notify_fails = AWAY if is_asked_in_vain else None
    partition.on_delivery(bench.command("hi", id="c1", user=USER))
    await asyncio.sleep(1)
    return bench, partition


async def another_is_sent(bench: Bench, partition: Partition) -> None:
    partition.on_delivery(bench.command("for another", user=OTHER))
    await asyncio.sleep(1)


def posted_at(bench: Bench, user: str = USER) -> list[int]:
    """Seconds of the requests of a user, from the first one."""
    at = [sent.at_s for sent in bench.chat.sent if sent.user == user]
    return [round(each - at[0]) for each in at]


async def test_it_is_repeated_after_five_minutes_although_ilink_answers_nobody() -> None:
    bench, _ = await silent()
    await asyncio.sleep(400)
    assert posted_at(bench) == [0, 300]
    assert len({sent.client_id for sent in bench.chat.sent}) == 1
    assert [(one.command, one.outcome, one.attempts) for one in finals(bench)] == [("c1", "accepted", 2)]
    assert 28 <= len(bench.chat.notified) <= 31, "iLink is asked every ten seconds"


@pytest.mark.parametrize(("after_s", "repeated_s"), [(0, 3), (100, 101)], ids=["soon", "later"])
async def test_it_is_repeated_once_ilink_has_accepted_anybodys(after_s: int, repeated_s: int) -> None:
    bench, partition = await silent()
    await asyncio.sleep(after_s)
    await another_is_sent(bench, partition)
    await asyncio.sleep(400)
    assert posted_at(bench) == [0, repeated_s]


@pytest.mark.parametrize("answer", [TIMEOUT, RESET, Uncertain("http_5xx", "HTTP 502")], ids=lambda each: each.reason)
async def test_one_person_alone_is_sent_to_within_ten_seconds(answer: Uncertain) -> None:
    """Nobody else sends, so iLink is asked by notifystart."""
    bench, _ = await silent(answer, is_asked_in_vain=False)
    await asyncio.sleep(9)
    assert posted_at(bench) == [0, 3]
    assert [one.outcome for one in finals(bench)] == ["accepted"]


async def test_a_poll_that_is_answered_counts_after_a_lost_connection_alone() -> None:
    for answer, repeated_s in ((RESET, 5), (TIMEOUT, 300)):
        bench, _ = await silent(answer)
        await asyncio.sleep(4)
        bench.replica.edges.successes.note(BASE_URL, False, 0.0)
        await asyncio.sleep(400)
        assert posted_at(bench) == [0, repeated_s]


async def test_what_was_accepted_before_says_nothing_of_ilink_now() -> None:
    bench, partition = await silent()
    await asyncio.sleep(400)
    bench.chat.sends_to[USER] = deque([TIMEOUT])
    await another_is_sent(bench, partition)
    partition.on_delivery(bench.command("again", user=USER))
    await asyncio.sleep(400)
    assert posted_at(bench)[2:] == [402, 702]


@pytest.mark.parametrize(
    ("base_url", "repeated_s"), [("https://other.weixin.qq.com", 300), ("https://ilinkai.weixin.qq.com", 3)]
)
async def test_another_ilink_says_nothing_of_this_one_and_the_default_has_one_name(
    base_url: str, repeated_s: int
) -> None:
    bench, partition = await silent(base_url=base_url)
    await another_is_sent(bench, partition)
    await asyncio.sleep(400)
    assert posted_at(bench) == [0, repeated_s]


async def test_a_message_of_the_user_does_not_hasten_it() -> None:
    bench, _ = await silent()
    await asyncio.sleep(10)
    await user_writes(bench)
    await asyncio.sleep(400)
    assert posted_at(bench) == [0, 300]
    assert bench.record().window.sends_used == 1, "it may be the first request that this window counts"


async def test_a_repeat_that_meets_a_throttle_is_uncertain() -> None:
    """The first request may have used the last send."""
    bench, partition = await silent()
    bench.chat.sends_to[USER].append(THROTTLED)
    await another_is_sent(bench, partition)
    await asyncio.sleep(400)
    assert [(one.outcome, one.attempts) for one in finals(bench) if one.command == "c1"] == [("uncertain", 2)]


@pytest.mark.parametrize("is_taken", [True, False], ids=["at once", "after a pause"])
async def test_the_receipt_is_asked_for_right_before_a_repeat(is_taken: bool) -> None:
    """Another owner may have ended the command, and not have stored that in the record."""
    bench, partition = await silent()
    if not is_taken:
        bench.chat.sends_to[USER].append(Temporary("http_5xx", "HTTP 503", retry_after_s=60))
        await another_is_sent(bench, partition)
        await asyncio.sleep(3)
        assert posted_at(bench) == [0, 3]
    (command,) = (each.queue[0] for each in partition.senders if each.person.user == USER)
    accepted, to = CommandResult("accepted"), Address("s1", user=USER)
    await bench.receipts.tell(copy(command), accepted, to, lambda: None)
    posted = len(posted_at(bench))
    await another_is_sent(bench, partition)
    await asyncio.sleep(400)
    assert len(posted_at(bench)) == posted
    assert not any(each.queue for each in partition.senders)


async def test_after_an_uncertain_the_person_waits_longer_each_time_until_one_is_answered() -> None:
    bench, partition = await silent()
    bench.chat.sends_to[USER].extend([TIMEOUT] * 5)
    for number in range(4):
        partition.on_delivery(bench.command(f"next {number}", id=f"n{number}", user=USER))
    for _ in range(900):
        bench.replica.edges.successes.note(BASE_URL, True, 0.0)
        await asyncio.sleep(1)
    at = posted_at(bench)
    assert [after - before for before, after in itertools.pairwise(at)] == [
        pytest.approx(pause, abs=2) for pause in (3, 60, 3, 120, 3, 240, 1.5)
    ]
    outcomes = {one.command: one.outcome for one in finals(bench)}
    assert [outcomes[each] for each in ("c1", "n0", "n1", "n2", "n3")] == ["uncertain"] * 3 + ["accepted"] * 2


async def test_an_idle_person_is_held_back_all_the_same() -> None:
    """What is idle is dropped from memory each half minute, and read again."""
    bench, partition = await silent()
    bench.chat.sends_to[USER].append(TIMEOUT)
    await another_is_sent(bench, partition)
    await asyncio.sleep(5)
    assert [one.outcome for one in finals(bench) if one.command == "c1"] == ["uncertain"]
    partition.evict_idle()
    partition.on_delivery(bench.command("next", id="n0", user=USER))
    await asyncio.sleep(30)
    assert len(posted_at(bench)) == 2
    await asyncio.sleep(40)
    assert len(posted_at(bench)) == 3


async def test_no_queue_that_waits_for_a_login_has_ilink_asked() -> None:
    bench, _ = await silent()
    await bench.bind(state="needs_login")
    await asyncio.sleep(3600)
    assert bench.chat.notified == []


async def test_the_next_owner_repeats_what_was_out_as_the_former_one_died() -> None:
    bench, partition = await ready()
    hold = bench.chat.hold_sends[USER] = asyncio.Event()
    partition.on_delivery(bench.command("hi", id="c1"))
    await asyncio.sleep(1)
    hold.set()
    bench.chat.hold_sends.clear()
    bench.chat.sends.append(FIRST)
    next_owner(bench, partition)
    await asyncio.sleep(9)
    assert posted_at(bench) == [0, 4]
    assert [(one.outcome, one.attempts) for one in finals(bench)] == [("accepted", 2)]


# an iLink that is away for all ---------------------------------------------------------------------------


class Outage:
    """What becomes of requests until `until_s`, by the bench's clock."""

    def __init__(self, bench: Bench, until_s: float, answer: AdapterError, *, took_s: float, share: float) -> None:
        self._bench, self._answer, self._took_s, self._share = bench, answer, took_s, share
        self._until = bench.clock.monotonic() + until_s
        self._random = random.Random(7)
        bench.chat.on_send = self.meet

    async def meet(self, _: Sent) -> None:
        if self._bench.clock.monotonic() < self._until:
            self._bench.chat.notify_fails = AWAY if self._share == 1 else None
            if self._random.random() < self._share:
                await asyncio.sleep(self._took_s)
                raise self._answer
        else:
            self._bench.chat.notify_fails = None


async def people(count: int) -> tuple[Bench, Partition]:
    bench, partition = await ready()
    for number in range(2, count + 1):
        user, bot = f"u{number}@im.wechat", f"b{number}@im.bot"
        await bench.bind(bot=bot, user=user)
        bench.hears(user=user, bot=bot)
    return bench, partition


@pytest.mark.parametrize(
    ("until_s", "answer", "took_s"),
    [(100, TIMEOUT, 15.0), (60, Uncertain("http_5xx", "HTTP 502"), 0.0), (30, RESET, 0.0)],
    ids=["a hang", "502", "accepts and resets"],
)
async def test_an_outage_of_two_minutes_ends_no_command(until_s: float, answer: Uncertain, took_s: float) -> None:
    bench, partition = await people(20)
    Outage(bench, until_s, answer, took_s=took_s, share=1)
    heals = asyncio.get_running_loop().call_later(until_s, setattr, bench.chat, "notify_fails", None)
    for number in range(1, 21):
        for text in ("a", "b"):
            partition.on_delivery(bench.command(text, id=f"{text}{number}", user=f"u{number}@im.wechat"))
    await asyncio.sleep(until_s + 30)
    assert heals.when() < asyncio.get_running_loop().time()
    assert {one.outcome for one in finals(bench)} == {"accepted"}
    assert len(finals(bench)) == 40
    assert max(map(len, (posted_at(bench, f"u{number}@im.wechat") for number in range(1, 21)))) <= 3


async def test_a_tenth_of_sends_lost_under_load_holds_nobody_for_long() -> None:
    bench, partition = await people(60)
    Outage(bench, 40, TIMEOUT, took_s=15.0, share=0.1)
    for second in range(40):
        for number in range(1, 61):
            if number % 10 == second % 10:
                user = f"u{number}@im.wechat"
                partition.on_delivery(bench.command("hi", id=f"{user}.{second}", user=user))
        await asyncio.sleep(1)
    await asyncio.sleep(30)
    ended = {one.command: one.outcome for one in finals(bench)}
    behind = {command.partition(".")[0] for command, outcome in ended.items() if outcome == "uncertain"}
    # the id of a user has a dot, so the users are compared by their beginnings
    waiting = {
        one.delivery.seq
        for each in partition.senders
        for one in each.queue
        if not each.person.user.startswith(tuple(behind) or " ")
    }
    assert waiting == set()
    await asyncio.sleep(120)
    assert len(finals(bench)) == 240
