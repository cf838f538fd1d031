"""Repeats are found though their ids change; people who repeat themselves are heard."""

from __future__ import annotations

import gc
import tracemalloc
from typing import Any, NamedTuple

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter.content.dedup import (
    KEEP_AT_MOST,
    KEEP_LONG,
    KEEP_MS,
    MERGED_AT_ONCE,
    RECENT_MS,
    SAME_TIME_MS,
    BatchDedup,
    DedupWindow,
    MessageKeys,
    bot_of,
)
from adapter.contract.names import digest

NOW = 1_789_000_000_000
MINUTE = 60_000
OK = MessageKeys(
    message="7497484083968569736", client="wx-1", seq="42", user="u@im.wechat", sent_at_ms=NOW, content="c0ffee"
)
"""Somebody says "ok"."""


class Row(NamedTuple):
    name: str
    before: MessageKeys
    after: MessageKeys
    repeat: bool


def take(seen: DedupWindow, keys: MessageKeys) -> None:
    """As the adapter does with what iLink sends."""
    if not seen.is_repeat(keys):
        seen.add_all([keys], NOW)


def say(**fields: Any) -> MessageKeys:
    return msgspec.structs.replace(OK, **fields)


OTHER_IDS = {"message": "99", "client": "wx-9", "seq": "50"}
NAMELESS = {"message": "", "client": "", "seq": ""}

ROWS = [
    Row("same-ids", OK, OK, repeat=True),
    Row("new-message-id", OK, say(message="99"), repeat=True),
    Row("empty-message-id", OK, say(message=""), repeat=True),
    Row("empty-message-id-and-new-seq", OK, say(message="", seq="50"), repeat=True),
    Row("message-id-came-later", say(message=""), OK, repeat=True),
    Row("every-id-new-same-time", OK, say(**OTHER_IDS), repeat=True),
    Row("no-ids-same-time", OK, say(**NAMELESS), repeat=True),
    Row("only-the-seq-is-left", OK, say(message="", client="", sent_at_ms=0), repeat=True),
    Row("same-message-id-other-words", OK, say(client="wx-9", content="beef"), repeat=True),
    Row("no-ids-time-near", say(**NAMELESS), say(**NAMELESS, sent_at_ms=NOW + SAME_TIME_MS - 1), repeat=True),
    Row("ids-are-gone-time-near", OK, say(**NAMELESS, sent_at_ms=NOW + SAME_TIME_MS - 1), repeat=True),
    Row("twice-by-a-person", OK, say(**OTHER_IDS, sent_at_ms=NOW + 1), repeat=False),
    Row("twice-by-a-person-a-minute-later", OK, say(**OTHER_IDS, sent_at_ms=NOW + MINUTE), repeat=False),
    Row("other-words-same-time", OK, say(**OTHER_IDS, content="beef"), repeat=False),
    Row("other-user-same-words", OK, say(**OTHER_IDS, user="v@im.wechat"), repeat=False),
    Row("same-client-other-words", OK, say(message="99", content="beef"), repeat=False),
    Row("same-seq-other-ids", OK, say(message="99", client="wx-9", sent_at_ms=NOW + 1), repeat=False),
    Row("no-ids-a-second-apart", say(**NAMELESS), say(**NAMELESS, sent_at_ms=NOW + SAME_TIME_MS), repeat=False),
    Row("no-ids-and-no-time", say(**NAMELESS, sent_at_ms=0), say(**NAMELESS, sent_at_ms=0), repeat=False),
    Row("new-ids-and-no-time", say(sent_at_ms=0), say(**OTHER_IDS, sent_at_ms=0), repeat=False),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_repeat_is_told_from_a_person_who_says_it_twice(row: Row) -> None:
    seen, batch = DedupWindow(), BatchDedup()
    seen.add_all([row.before], NOW)
    batch.add(row.before)
    assert seen.is_repeat(row.after) is batch.is_repeat(row.after) is row.repeat


@pytest.mark.parametrize("later_ms", [1_000, 8_000, 40 * MINUTE, 60 * MINUTE, KEEP_MS - 1])
@pytest.mark.parametrize("row", [row for row in ROWS if row.repeat], ids=lambda row: row.name)
def test_a_repeat_is_found_however_late(row: Row, later_ms: int) -> None:
    """With other traffic in between, also by the replica that takes over."""
    seen = DedupWindow()
    seen.add_all([row.before], NOW)
    for number in range(50):
        seen.add_all([say(message=f"m{number}", client=f"c{number}", content=f"w{number}")], NOW + later_ms)
    assert DedupWindow(seen.fingerprints()).is_repeat(row.after)


def test_what_nobody_said_is_no_repeat() -> None:
    assert not DedupWindow().is_repeat(OK)


NOTHING = say(**NAMELESS, sent_at_ms=0)


@pytest.mark.parametrize(
    ("before", "after", "repeat"),
    [
        (("b", 0), ("b", 0), True),
        (("b", 0), ("c", 0), False),
        (("b", 0), ("b", 1), False),
        (("b", 1), ("b1", 0), False),
    ],
    ids=["the same place", "another answer", "another place", "no mix-up"],
)
def test_where_there_is_neither_an_id_nor_a_time_the_place_tells(
    before: tuple[str, int], after: tuple[str, int], repeat: bool
) -> None:
    seen, batch = DedupWindow(), BatchDedup()
    seen.add_all([NOTHING.with_position(*before)], NOW)
    batch.add(NOTHING.with_position(*before))
    found = NOTHING.with_position(*after)
    assert DedupWindow(seen.fingerprints()).is_repeat(found) is batch.is_repeat(found) is repeat
    assert not seen.is_repeat(say(**NAMELESS, sent_at_ms=0, content="beef").with_position(*before)), "other words"
    ids = {NOTHING.with_position(*place).id_for("b@im.bot") for place in (before, after)}
    assert len(ids) == len({before, after})


@pytest.mark.parametrize("field", ["message", "client", "seq", "sent_at_ms"])
def test_the_place_of_what_has_an_id_or_a_time_does_not_count(field: str) -> None:
    keys = msgspec.structs.replace(NOTHING, **{field: getattr(OK, field)})
    assert keys.with_position("b", 0) is keys


def test_ids_longer_than_a_header_should_be_are_hashed() -> None:
    assert len(say(message="9" * 1000).id_for("b@im.bot")) < 40
    assert len(say(**NAMELESS).id_for("b@im.bot")) < 40


def test_a_digest_names_the_same_bytes_the_same() -> None:
    assert digest(b"x") == digest(b"x") != digest(b"y")


# properties ----------------------------------------------------------------------------------------------


ids = st.one_of(st.just(""), st.text(min_size=1, max_size=8))
any_keys = st.builds(
    MessageKeys,
    message=ids,
    client=ids,
    seq=ids,
    user=st.sampled_from(["u", "v", "u|v"]),
    sent_at_ms=st.one_of(st.just(0), st.integers(NOW - MINUTE, NOW + MINUTE)),
    content=st.sampled_from(["a", "b", "|"]),
)
named_keys = any_keys.filter(lambda keys: bool(keys.message))


@given(st.lists(any_keys, max_size=40), named_keys, st.lists(any_keys, max_size=40))
def test_a_repeat_with_the_same_message_id_is_always_found(
    before: list[MessageKeys], it: MessageKeys, after: list[MessageKeys]
) -> None:
    seen = DedupWindow()
    for number, keys in enumerate([*before, it, *after]):
        seen.add_all([keys], NOW + number)
    assert seen.is_repeat(it)


@given(st.lists(st.sampled_from(["ok", "yes", "no"]), max_size=60))
def test_distinct_ids_and_times_are_never_swallowed(words: list[str]) -> None:
    """Whatever a person says, and how often."""
    seen = DedupWindow()
    for number, word in enumerate(words):
        keys = MessageKeys(f"m{number}", f"c{number}", f"s{number}", "u", NOW + number, word)
        assert not seen.is_repeat(keys)
        seen.add_all([keys], NOW + number)


@given(st.lists(any_keys, max_size=40), any_keys)
def test_the_state_survives_its_storage(keys: list[MessageKeys], probe: MessageKeys) -> None:
    seen = DedupWindow()
    for one in keys:
        take(seen, one)
    again = DedupWindow(seen.fingerprints())
    assert again.fingerprints() == seen.fingerprints()
    assert again.is_repeat(probe) is seen.is_repeat(probe)


def test_what_was_kept_and_is_forgotten_is_not_taken_for_new() -> None:
    seen = DedupWindow()
    for number in range(KEEP_AT_MOST):
        seen.add_all([say(message=str(number))], NOW)
    seen.unsaved = 0
    seen.add_all([say(message="new")], NOW + 2 * KEEP_MS)
    seen.forget_old(NOW + 2 * KEEP_MS)
    assert seen.unsaved == 1
    assert seen.fingerprints() == [say(message="new").fingerprint(NOW + 2 * KEEP_MS)]


def test_hashes_that_begin_alike_are_told_apart() -> None:
    """The index has 16 bits of each hash."""
    seen: dict[str, MessageKeys] = {}
    pairs = 0
    for number in range(2000):
        keys = MessageKeys(f"m{number}", "", "", "u", 0, f"words {number}")
        for start in (f"id {keys.hashed[0][:4]}", f"content {keys.hashed[3][:4]}"):
            if (other := seen.setdefault(start, keys)) is not keys:
                window = DedupWindow()
                window.add_all([other], NOW)
                assert not window.is_repeat(keys)
                assert window.is_repeat(other)
                pairs += 1
    assert pairs > 10


@given(st.lists(st.tuples(any_keys, st.integers(0, 3 * KEEP_MS)), max_size=60))
def test_what_is_older_than_a_day_is_forgotten(said: list[tuple[MessageKeys, int]]) -> None:
    seen = DedupWindow()
    now = NOW
    for keys, later_ms in said:
        now += later_ms
        seen.add_all([keys], now)
        seen.forget_old(now)
        assert all(int(record.rpartition("|")[2]) >= now - KEEP_MS for record in seen.fingerprints())


def test_the_state_is_bounded() -> None:
    """About 50 kB beside the cursor, whatever the ids look like; the oldest go first."""
    seen = DedupWindow()
    for number in range(3 * KEEP_AT_MOST):
        keys = MessageKeys("m" * 500 + str(number), "c" * 500 + str(number), str(number), "u" * 500, NOW, "same")
        seen.add_all([keys], NOW)
    assert len(seen.fingerprints()) < KEEP_AT_MOST + MERGED_AT_ONCE
    seen.forget_old(NOW)
    assert len(seen.fingerprints()) == KEEP_AT_MOST
    assert sum(len(record) for record in seen.fingerprints()) < 50_000
    assert not seen.is_repeat(MessageKeys("m" * 500 + "0", "", "", "u", 0, ""))
    assert seen.is_repeat(MessageKeys("m" * 500 + str(3 * KEEP_AT_MOST - 1), "", "", "u", 0, ""))


def test_a_bot_s_memory_is_small() -> None:
    """Ten thousand bots have one each. As objects it took 180 kB, as the lines that are stored a tenth of that."""
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        bots = [DedupWindow() for _ in range(5)]
        for seen in bots:
            for number in range(2 * KEEP_LONG):
                keys = MessageKeys(f"m{number}", f"c{number}", f"s{number}", "u", NOW + number, f"w{number}")
                seen.add_all([keys], NOW)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (after - before) / len(bots) < 60_000


def test_beyond_the_usual_number_what_was_seen_lately_is_remembered() -> None:
    """iLink repeats up to an hour later, all of it, in pages: what comes next must not be forgotten for it."""
    seen = DedupWindow()
    for number in range(KEEP_LONG + 100):
        seen.add_all([say(message=str(number), sent_at_ms=NOW + 10_000 * number)], NOW)
    assert len(seen.fingerprints()) == KEEP_LONG + 100
    seen.add_all([say(message="later")], NOW + RECENT_MS + 1)
    seen.forget_old(NOW + RECENT_MS + 1)
    assert len(seen.fingerprints()) == KEEP_LONG


@given(st.lists(any_keys, max_size=40), any_keys)
def test_a_batch_and_the_memory_of_it_think_alike(keys: list[MessageKeys], probe: MessageKeys) -> None:
    seen, batch = DedupWindow(), BatchDedup()
    for one in keys:
        seen.add_all([one], NOW)
        batch.add(one)
    assert seen.is_repeat(probe) is batch.is_repeat(probe)


@given(st.lists(any_keys, max_size=40), st.lists(any_keys, max_size=40), any_keys)
def test_many_at_once_are_remembered_as_one_by_one(
    before: list[MessageKeys], many: list[MessageKeys], probe: MessageKeys
) -> None:
    apart, together, batch, new = DedupWindow(), DedupWindow(), BatchDedup(), list[MessageKeys]()
    for seen in (apart, together):
        for keys in before:
            take(seen, keys)
        seen.unsaved = 0
    for keys in many:
        if not (apart.is_repeat(keys) or batch.is_repeat(keys)):
            batch.add(keys)
            new.append(keys)
    records = [apart.add_all([keys], NOW + 1)[0] for keys in new]
    assert together.add_all(new, NOW + 1) == records
    assert (together.fingerprints(), together.unsaved) == (apart.fingerprints(), apart.unsaved)
    assert together.is_repeat(probe) is apart.is_repeat(probe)


def test_more_at_once_than_are_remembered_leave_the_newest() -> None:
    seen = DedupWindow()
    many = [say(message=str(number), client=f"c{number}", sent_at_ms=0) for number in range(KEEP_AT_MOST + 5)]
    assert seen.add_all(many, NOW)[5:] == seen.fingerprints()
    assert not seen.is_repeat(many[4])
    assert seen.is_repeat(many[5])


def test_other_words_under_the_same_seq_are_another_message() -> None:
    """A server may give each the same; by one id for both the bus would drop the second."""
    first, again = say(message="", client=""), say(message="", client="", sent_at_ms=NOW + MINUTE)
    other = say(message="", client="", content="beef")
    assert first.id_for("b1@im.bot") == again.id_for("b1@im.bot") != other.id_for("b1@im.bot")
    assert len(say(message="", client="", seq="9" * 1000).id_for("b@im.bot")) < 40


def test_ids_that_a_header_would_change_stay_apart() -> None:
    idents = ["a b", "a\rb", "a\tb", " a b", "ab", "é"]
    assert len({say(message=ident).id_for("b1@im.bot") for ident in idents}) == len(idents)
    assert all(
        " " not in made and made.isascii() for ident in idents if (made := say(message=ident).id_for("b1@im.bot"))
    )


@pytest.mark.parametrize(
    "keys", [OK, say(message=""), say(message="", client=""), say(**NAMELESS), say(message="a:b", client="c:d")]
)
def test_the_id_of_a_message_tells_its_bot(keys: MessageKeys) -> None:
    assert bot_of(keys.id_for("b1@im.bot")) == "b1@im.bot"


@pytest.mark.parametrize("ident", ["", "in", "in:", "in:b1@im.bot", "out:b1@im.bot:m1", "42", "::", "\n"])
def test_another_id_tells_none(ident: str) -> None:
    assert bot_of(ident) == ""
