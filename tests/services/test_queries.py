"""What can be asked: answers without tokens, pages that end, errors that say what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from adapter.bridge.entries import Entry, OpenedWindow, Secrets, encode_entry
from adapter.bridge.presence import Replicas, ReplicaStatus
from adapter.contract.messages import BindingsPage, ReplayPage, Window
from adapter.contract.names import person_token
from adapter.errors import Refused, Temporary
from adapter.ports import SandboxRequest
from adapter.services.health import BotHealth
from adapter.services.queries import REPLAY_BYTES, Queries, of_sandbox
from tests.fakes import WINDOW, Bench

VIRTUAL_TIME = True

BOT, USER = "b1@im.bot", "u1@im.wechat"


class Nobody(Replicas):
    """None answers."""

    def __init__(self) -> None: ...

    async def query(self, bots: Sequence[str]) -> tuple[list[ReplicaStatus], int]:
        return [], 1


def queries(bench: Bench) -> Queries:
    health = BotHealth(Nobody(), bench.persons, WINDOW, bench.clock)
    return Queries(bench.bindings, health, bench.receipts, bench.bus, bench.names, bench.metrics)


def ask(**body: Any) -> bytes:
    return msgspec.json.encode(body)


async def listed(bench: Bench, **body: Any) -> BindingsPage:
    return msgspec.json.decode(await queries(bench).list_bindings(ask(**body)), type=BindingsPage)


async def crowd(count: int) -> Bench:
    bench = Bench()
    for number in range(count):
        await bench.bind(
            sandbox=f"s{number % 3}", bot=f"b{number:03}@im.bot", user=f"u{number}@im.wechat", token="SECRET"
        )
    return bench


async def test_the_list_comes_in_pages_that_end() -> None:
    bench = await crowd(25)
    found: list[str] = []
    after, pages = "", 0
    while True:
        page = await listed(bench, after=after, limit=10)
        found += [info.bot for info in page.bindings]
        pages += 1
        after = page.next
        if not after:
            break
    assert found == [f"b{number:03}@im.bot" for number in range(25)]
    assert pages == 3


async def test_how_bots_fare_is_said_where_that_is_asked() -> None:
    bench = await crowd(3)
    assert [info.health for info in (await listed(bench)).bindings] == [None] * 3
    page = await listed(bench, health=True, limit=2)
    assert [info.health and info.health.status for info in page.bindings] == ["unknown"] * 2
    assert page.next == "b001@im.bot"


async def test_the_list_can_be_filtered() -> None:
    bench = await crowd(9)
    assert [info.bot for info in (await listed(bench, sandbox="s1")).bindings] == [
        "b001@im.bot",
        "b004@im.bot",
        "b007@im.bot",
    ]
    assert [info.sandbox for info in (await listed(bench, bot="b004@im.bot")).bindings] == ["s1"]
    assert (await listed(bench, sandbox="nobody")).bindings == []


async def test_no_answer_holds_a_token() -> None:
    bench = await crowd(3)
    bench.hears("b001@im.bot", "u1@im.wechat", token="SECRET")
    asked = queries(bench)
    answers = [
        await asked.list_bindings(b""),
        await asked.get_bindings(ask(bot="b001@im.bot")),
        await asked.window(ask(sandbox="s1")),
    ]
    assert b"SECRET" not in b"".join(answers)


REFUSED: list[tuple[str, str, bytes, str]] = [
    ("get-nothing-named", "get_bindings", ask(), "invalid"),
    ("get-unknown-bot", "get_bindings", ask(bot="nobody"), "not_bound"),
    ("get-bot-of-another-sandbox", "get_bindings", ask(sandbox="s2", bot="b001@im.bot"), "not_bound"),
    ("window-of-several", "window", ask(sandbox="s1"), "invalid"),
    ("window-unknown-user", "window", ask(sandbox="s1", user="nobody"), "not_bound"),
    ("window-bot-of-another-sandbox", "window", ask(sandbox="s2", bot="b001@im.bot"), "not_bound"),
    ("list-no-json", "list_bindings", b"hello", "invalid"),
    ("list-limit-too-high", "list_bindings", ask(limit=1001), "invalid"),
    ("list-nested-without-end", "list_bindings", b'{"bot":' + b"[" * 5000, "invalid"),
    ("replay-of-all", "replay", ask(sandbox="*"), "invalid"),
    ("replay-with-a-line-end", "replay", ask(sandbox="s1\n"), "invalid"),
    ("replay-after-a-number", "replay", ask(sandbox="s1", after=17), "invalid"),
    ("replay-after-no-position", "replay", ask(sandbox="s1", after=f"{2**64 - 1}.0"), "invalid"),
    ("replay-since-nanoseconds", "replay", ask(sandbox="s1", since_ms=1_790_000_000_000_000_000), "invalid"),
]


@pytest.mark.parametrize(("verb", "body", "reason"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
async def test_a_question_that_has_no_answer_is_refused(verb: str, body: bytes, reason: str) -> None:
    bench = await crowd(9)
    with pytest.raises(Refused) as caught:
        await getattr(queries(bench), verb)(body)
    assert caught.value.reason == reason
    assert caught.value.detail


async def test_the_window_of_a_user_whom_a_newer_version_serves_is_not_known() -> None:
    bench = await crowd(1)
    (binding,) = bench.bindings.of_sandbox("s0")
    bench.hears("s0", binding.user, newer=True)
    with pytest.raises(Temporary) as caught:
        await queries(bench).window(ask(sandbox="s0"))
    assert (caught.value.reason, "version 2" in caught.value.detail) == ("record_too_new", True)


def asked_as(subject_ends: str, **body: Any) -> SandboxRequest:
    return SandboxRequest(subject_ends, {}, ask(**body))


@pytest.mark.parametrize("body", [{}, {"sandbox": "s1"}], ids=["left out", "named too"])
async def test_the_subject_says_whose_window_and_messages_are_asked_for(body: dict[str, Any], bench: Bench) -> None:
    await bench.bind()
    await bench.bind(sandbox="s2", bot="b2@im.bot", user="u2@im.wechat")
    bench.hears(sends_used=4)
    fill(bench, 2)
    answer = await of_sandbox(queries(bench).window)(asked_as("s1", **body))
    assert msgspec.json.decode(answer.data, type=Window).remaining == 6
    page = msgspec.json.decode(
        (await of_sandbox(queries(bench).replay)(asked_as("s1", **body))).data, type=ReplayPage
    )
    assert numbers(page) == [0, 1]


@pytest.mark.parametrize("verb", ["window", "replay"])
@pytest.mark.parametrize(
    ("subject_ends", "body"),
    [
        ("s1", {"sandbox": "s2"}),
        ("s1", {"sandbox": "*"}),
        ("s1", {"sandbox": ["s1"]}),
        ("", {}),
        ("s1\n", {}),
    ],
)
async def test_a_sandbox_cannot_ask_in_the_name_of_another(
    verb: str, subject_ends: str, body: dict[str, Any]
) -> None:
    bench = await crowd(9)
    fill(bench, 2)
    with pytest.raises(Refused) as caught:
        await of_sandbox(getattr(queries(bench), verb))(asked_as(subject_ends, **body))
    assert caught.value.reason == "invalid"


async def test_what_is_absent_and_what_is_others_look_the_same() -> None:
    bench = await crowd(9)
    said = set()
    for body in ({"bot": "b002@im.bot"}, {"bot": "nobody@im.bot"}):
        with pytest.raises(Refused) as caught:
            await of_sandbox(queries(bench).window)(asked_as("s1", **body))
        said.add((caught.value.reason, caught.value.detail))
    assert len(said) == 1


async def test_the_window_of_one_of_several_is_named_by_bot_or_user() -> None:
    bench = await crowd(9)
    bench.hears("s1", "u4@im.wechat", bot="b004@im.bot", sends_used=4)
    asked = queries(bench)
    by_bot = await asked.window(ask(sandbox="s1", bot="b004@im.bot"))
    by_user = await asked.window(ask(sandbox="s1", user="u4@im.wechat"))
    assert by_bot == by_user
    assert msgspec.json.decode(by_bot, type=Window).remaining == 6


async def test_the_window_of_a_message_that_was_under_way_counts_what_was_sent_meanwhile(bench: Bench) -> None:
    """Its entry is newer than the record."""
    await bench.bind()
    now_ms = bench.clock.now_ms()
    bench.hears(opened_ms=now_ms - 9000, sends_used=3, sent_at_ms=[now_ms - 8000, now_ms - 2000, now_ms - 1000])
    (binding,) = bench.bindings
    opened = OpenedWindow("in:2", now_ms - 5000, now_ms)
    entry, secrets = Entry(since=binding.since, bot=binding.bot, window=opened), Secrets("AARz")
    subject = bench.names.inbox("s1", person_token("s1", "u1@im.wechat"))
    bench.bus.put(subject, encode_entry(entry, secrets, subject, bench.sealer), {})
    answer = await queries(bench).window(ask(sandbox="s1"))
    assert msgspec.json.decode(answer, type=Window).remaining == 8


async def test_a_window_that_time_has_closed_is_closed(bench: Bench) -> None:
    await bench.bind()
    bench.hears()
    await bench.clock.sleep(23 * 3600)
    answer = await queries(bench).window(ask(sandbox="s1"))
    assert msgspec.json.decode(answer, type=Window) == Window(remaining=0)


def fill(bench: Bench, count: int, size: int = 10) -> None:
    """Two in each entry, of two persons by turns."""
    for first in range(0, count, 2):
        for sandbox in ("s1", "s2"):
            numbers = range(first, min(first + 2, count))
            messages = [{"n": number, "text": "x" * size} for number in numbers]
            subject = bench.names.inbox(sandbox, person_token(sandbox, f"u{first // 2 % 2}"))
            bench.bus.put(subject, msgspec.json.encode({"since": 1, "messages": messages}), {})


async def replayed(bench: Bench, **body: Any) -> ReplayPage:
    return msgspec.json.decode(await queries(bench).replay(ask(sandbox="s1", **body)), type=ReplayPage)


def numbers(page: ReplayPage) -> list[int]:
    return [msgspec.json.decode(replayed.message)["n"] for replayed in page.messages]


async def test_a_replay_is_the_sandboxs_own_in_pages_that_end(bench: Bench) -> None:
    fill(bench, 25)
    first = await replayed(bench, limit=10)
    second = await replayed(bench, limit=10, after=first.next)
    third = await replayed(bench, limit=10, after=second.next)
    assert numbers(first) + numbers(second) + numbers(third) == list(range(25))
    assert third.next == ""
    fourth = await replayed(bench, limit=10, after=third.messages[-1].position)
    assert (fourth.messages, fourth.next) == ([], "")


async def test_a_page_of_a_replay_may_end_within_an_entry(bench: Bench) -> None:
    fill(bench, 7)
    found, page = [], await replayed(bench, limit=3)
    found += numbers(page)
    while page.next:
        page = await replayed(bench, limit=3, after=page.next)
        found += numbers(page)
    assert found == list(range(7))


async def test_pages_of_a_replay_go_on_where_the_question_still_names_its_start(bench: Bench) -> None:
    since_ms = bench.clock.now_ms()
    fill(bench, 15)
    first = await replayed(bench, limit=10, since_ms=since_ms)
    second = await replayed(bench, limit=10, since_ms=since_ms, after=first.next)
    assert numbers(first) + numbers(second) == list(range(15))


async def test_a_page_of_a_replay_stays_below_the_limit_of_a_message(bench: Bench) -> None:
    fill(bench, 10, size=200_000)
    data = await queries(bench).replay(ask(sandbox="s1"))
    assert len(data) < REPLAY_BYTES + 200_000
    page = msgspec.json.decode(data, type=ReplayPage)
    assert numbers(page) == [0, 1]
    assert numbers(await replayed(bench, after=page.next)) == [2, 3]


async def test_one_message_larger_than_a_page_is_a_page_of_its_own(bench: Bench) -> None:
    fill(bench, 3, size=REPLAY_BYTES + 1)
    page = await replayed(bench)
    assert numbers(page) == [0]
    assert page.next


async def test_a_replay_can_begin_at_a_time(bench: Bench) -> None:
    fill(bench, 3)
    await bench.clock.sleep(60)
    since_ms = bench.clock.now_ms()
    fill(bench, 2)
    assert numbers(await replayed(bench, since_ms=since_ms)) == [0, 1]
