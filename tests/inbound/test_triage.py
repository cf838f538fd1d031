"""What becomes of each message that iLink hands over: it is told, or a repeat, or the bot's own, or a dead letter."""

from __future__ import annotations

from typing import Any

import pytest
from structlog.testing import capture_logs

from adapter.content.dedup import DedupWindow
from adapter.contract.messages import UnsupportedItem
from adapter.contract.names import conversation_key
from adapter.errors import BusRefused
from adapter.ilink.translate import read_message
from adapter.inbound.triage import Triage
from adapter.kit.crashes import ATTEMPTS
from adapter.kit.timing import PerTickLimiter
from adapter.ports import InboundMessage
from tests.fakes import EPOCH_MS, Rounds, batch, ready
from tests.inbound.downloads import NOTHING
from tests.inbound.pollers import BOT, USER, polls, raw, texts

VIRTUAL_TIME = True

TRIAGE = Triage(read_message, PerTickLimiter(4).wait_turn)


async def judged(*answers: list[bytes], triage: Triage = TRIAGE, place: str = "") -> list[list[str]]:
    """What the messages of answers are, one answer after the other. `place`: of all of them; "": one of its own."""
    seen, found = DedupWindow(), []
    for number, answer in enumerate(answers):
        judgements = await triage.classify(BOT, answer, place or f"c{number}", 0, seen, EPOCH_MS)
        assert [one.raw for one in judgements] == answer
        assert [one.number for one in judgements] == list(range(len(answer)))
        found.append([one.outcome for one in judgements])
    return found


REPEATS: list[tuple[str, dict[str, Any]]] = [
    ("same-ids", {}),
    ("new-message-id", {"message_id": 99}),
    ("empty-message-id", {"message_id": ""}),
    ("new-token", {"context_token": "other"}),
    ("every-id-new", {"message_id": 99, "client_id": "wx-99", "seq": 99, "context_token": "other"}),
]


@pytest.mark.parametrize("fields", [row[1] for row in REPEATS], ids=[row[0] for row in REPEATS])
async def test_a_repeat_is_known_in_the_same_answer_and_in_a_later_one(fields: dict[str, Any]) -> None:
    assert await judged([raw("ok")], [raw("ok", **fields)]) == [["new"], ["duplicate"]]
    assert await judged([raw("ok"), raw("ok", **fields)]) == [["new", "duplicate"]]


async def test_a_repeat_far_down_a_huge_answer_is_known() -> None:
    many = [raw(f"t{number}", number) for number in range(300)]
    (found,) = await judged([*many, raw("t0", 0, message_id=99, client_id="wx-x", seq=999)])
    assert found == [*["new"] * 300, "duplicate"]


async def test_a_person_who_says_it_twice_is_heard_twice() -> None:
    assert await judged([raw("ok", 1)], [raw("ok", 2)]) == [["new"], ["new"]]


async def test_the_same_words_without_ids_and_times_are_heard_as_often_as_they_are_said() -> None:
    ok = raw("ok", **NOTHING)
    assert await judged([ok, ok], [ok]) == [["new", "new"], ["new"]]


async def test_a_page_without_ids_and_times_that_comes_again_is_a_repeat() -> None:
    page = [raw("ok", **NOTHING), raw("ok", **NOTHING)]
    assert await judged(page, page, place="b") == [["new", "new"], ["duplicate", "duplicate"]]


async def test_the_same_words_without_ids_and_times_have_different_ids_on_the_bus() -> None:
    """Which is how the bus would take them for one."""
    ok = raw("ok", **NOTHING)
    bench = await ready(batch(ok, ok), batch(ok, cursor="c"), batch(ok, cursor="c"))
    await polls(bench)
    assert texts(bench) == ["ok", "ok", "ok"]
    assert len({inbound.id for inbound in bench.bus.inbound()}) == 3


@pytest.mark.parametrize("message_type", [None, 0, 1, 2])
async def test_what_the_bot_itself_sent_is_an_echo_whatever_its_type(message_type: int | None) -> None:
    mine = raw("mine", from_user_id=BOT, message_type=message_type)
    assert await judged([mine, raw("its own", 2, message_type=2), raw("yours", 3)]) == [["echo", "echo", "new"]]


async def test_a_bots_user_is_learned_from_their_first_message_and_not_from_an_echo() -> None:
    bench = await ready(batch(raw("mine", from_user_id=BOT), raw("yours", 2)), user="")
    await polls(bench)
    assert texts(bench) == ["yours"]
    assert [binding.user for binding in bench.bindings] == [USER]


async def test_what_is_no_message_of_anybody_is_unreadable_and_the_others_go_on() -> None:
    bench = await ready(batch(raw("one", 1), b'{"message_id":5}', b"[]", raw("two", 2)))
    await polls(bench)
    assert texts(bench) == ["one", "two"]
    assert [dead.data for dead in bench.bus.found("DEAD")] == [b'{"message_id":5}', b"[]"]
    assert {dead.headers["Wechat-Reason"] for dead in bench.bus.found("DEAD")} == {"unreadable"}


async def test_a_field_of_a_wrong_type_costs_no_words() -> None:
    """What was lost is kept whole for a person."""
    lossy = raw("two", 2, context_token=[1])
    bench = await ready(batch(raw("one", 1, create_time_ms=1789000000000.0), lossy, raw("three", 3, group_id=True)))
    await polls(bench)
    assert texts(bench) == ["one", "two", "three"]
    assert [dead.data for dead in bench.bus.found("DEAD")][:1] == [lossy]


async def test_a_broken_message_is_told_as_unsupported_and_kept_whole() -> None:
    broken = raw("x", 2, item_list="nothing")
    bench = await ready(batch(raw("one", 1), broken, raw("three", 3)))
    await polls(bench)
    assert texts(bench) == ["one", "", "three"]
    assert bench.bus.inbound()[1].items == [UnsupportedItem(type=0, reason="malformed")]
    (dead,) = bench.bus.found("DEAD")
    assert (dead.data, dead.subject, dead.headers["Wechat-Reason"]) == (broken, "wechat.dead.WECHAT_IN", "unreadable")


async def test_a_dead_letter_that_cannot_be_kept_stops_nobody() -> None:
    bench = await ready(batch(b"[]", raw("two", 2)))
    bench.bus.refuse = lambda message: BusRefused(10047, "no space") if message.stream == "dead" else None
    with capture_logs() as logs:
        await polls(bench)
    assert texts(bench) == ["two"]
    assert "dead_letter.refused" in [line["event"] for line in logs]


async def test_what_was_written_in_a_group_is_kept_and_told_to_nobody() -> None:
    """An answer might be shown to the group, or to a stranger: who speaks there is not who scanned the code."""
    strange = raw("hello all", 1, group_id="7@chatroom", from_user_id="stranger@im.wechat")
    theirs = raw("to all", 2, group_id="7@chatroom")
    again = raw("to all", 2, group_id="7@chatroom", message_id=5)
    bench = await ready(batch(strange, theirs, raw("to you", 3)), batch(again, cursor="c"), user="")
    await polls(bench)
    assert texts(bench) == ["to you"]
    assert [dead.data for dead in bench.bus.found("DEAD")] == [strange, theirs]
    assert {dead.headers["Wechat-Reason"] for dead in bench.bus.found("DEAD")} == {"group"}
    assert [binding.user for binding in bench.bindings] == [USER]
    actors = list(bench.processors[next(iter(bench.processors))])
    assert [(actor.state.user, actor.state.record.token) for actor in actors] == [(USER, "token-3")]
    assert set(bench.conversation_bucket.entries) <= {conversation_key("s1", USER)}


async def test_a_message_at_which_the_translator_raises_is_crashed_and_the_others_judged() -> None:
    tried = 0

    def read(message: bytes) -> InboundMessage:
        nonlocal tried
        if b"poison" in message:
            tried += 1
            raise RuntimeError("a bug")
        return read_message(message)

    answer = [raw("one", 1), raw("poison", 2), raw("three", 3)]
    assert await judged(answer, answer, triage=TRIAGE._replace(read_message=read)) == [
        ["new", "crashed", "new"],
        ["duplicate", "crashed", "duplicate"],
    ]
    assert tried == 2 * ATTEMPTS


async def test_a_huge_answer_is_judged_a_little_in_each_round_of_the_event_loop() -> None:
    """All at once would take longer than the lease."""
    rounds = Rounds()

    def read(message: bytes) -> InboundMessage:
        rounds.note("read")
        return read_message(message)

    triage = TRIAGE._replace(read_message=read, turn=PerTickLimiter(1).wait_turn)
    await judged([raw(f"t{number}", number) for number in range(1000)], triage=triage)
    assert max(rounds.seen["read"].values()) < 200
