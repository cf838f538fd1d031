"""Repeats are found though their ids change; people who repeat themselves are heard."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter.contract.repeats import KEEP, KEEP_MS, SAME_TIME_MS, SIZE, DedupWindow, MessageKeys, bot_of

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


def remember(seen: DedupWindow, *keys: MessageKeys, now_ms: int = NOW) -> None:
    seen.add([one.fingerprint(now_ms) for one in keys])


def again(seen: DedupWindow, now_ms: int = NOW) -> DedupWindow:
    """As the next owner reads it."""
    return DedupWindow(seen.kept(now_ms))


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
def test_a_repeat_differs_from_a_person_who_says_it_twice(row: Row) -> None:
    seen = DedupWindow()
    remember(seen, row.before)
    assert seen.is_repeat(row.after) is row.repeat


@pytest.mark.parametrize("later_ms", [1_000, 8_000, 40 * MINUTE, KEEP_MS])
@pytest.mark.parametrize("row", [row for row in ROWS if row.repeat], ids=lambda row: row.name)
def test_a_repeat_is_found_however_late(row: Row, later_ms: int) -> None:
    """With other traffic in between, also by the replica that takes over."""
    seen = DedupWindow()
    remember(seen, row.before)
    for number in range(KEEP - 1):
        other = say(message=f"m{number}", client=f"c{number}", content=f"w{number}")
        remember(seen, other, now_ms=NOW + later_ms)
    assert again(seen, NOW + later_ms).is_repeat(row.after)


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
def test_where_there_is_neither_an_id_nor_a_time_the_place_decides(
    before: tuple[str, int], after: tuple[str, int], repeat: bool
) -> None:
    seen = DedupWindow()
    remember(seen, NOTHING.with_position(*before))
    found = NOTHING.with_position(*after)
    assert again(seen).is_repeat(found) is repeat
    assert not seen.is_repeat(say(**NAMELESS, sent_at_ms=0, content="beef").with_position(*before)), "other words"
    ids = {NOTHING.with_position(*place).id_for("b@im.bot") for place in (before, after)}
    assert len(ids) == len({before, after})


@pytest.mark.parametrize("field", ["message", "client", "seq", "sent_at_ms"])
def test_the_place_of_what_has_an_id_or_a_time_does_not_count(field: str) -> None:
    keys = msgspec.structs.replace(NOTHING, **{field: getattr(OK, field)})
    assert keys.with_position("b", 0) is keys


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
        remember(seen, keys, now_ms=NOW + number)
    assert seen.is_repeat(it)


@given(st.lists(st.sampled_from(["ok", "yes", "no"]), max_size=60))
def test_distinct_ids_and_times_are_never_swallowed(words: list[str]) -> None:
    """Whatever a person says, and how often."""
    seen = DedupWindow()
    for number, word in enumerate(words):
        keys = MessageKeys(f"m{number}", f"c{number}", f"s{number}", "u", NOW + number, word)
        assert not seen.is_repeat(keys)
        remember(seen, keys, now_ms=NOW + number)


@given(st.lists(any_keys, max_size=40), any_keys)
def test_the_state_survives_its_storage(keys: list[MessageKeys], probe: MessageKeys) -> None:
    seen = DedupWindow()
    remember(seen, *keys)
    assert again(seen).kept(NOW) == seen.kept(NOW)
    assert again(seen).is_repeat(probe) is seen.is_repeat(probe)


@pytest.mark.parametrize("prints", [b"x", OK.fingerprint(NOW)[:-1], OK.fingerprint(NOW) + b"x"])
def test_a_state_of_another_size_counts_as_nothing(prints: bytes) -> None:
    """A record that another version wrote."""
    assert DedupWindow(prints).kept(NOW) == b""


def test_a_hash_across_two_fields_is_no_hash() -> None:
    """The fingerprints are searched as bytes."""
    seen = DedupWindow()
    remember(seen, OK)
    kept = seen.kept(NOW)
    for at in range(1, SIZE):
        shifted = DedupWindow(kept[at:] + kept[:at])
        assert not shifted.is_repeat(OK)


@given(st.lists(st.tuples(any_keys, st.integers(0, KEEP_MS)), max_size=60))
def test_what_is_older_than_an_hour_is_forgotten(said: list[tuple[MessageKeys, int]]) -> None:
    seen, now, fresh = DedupWindow(), NOW, list[tuple[MessageKeys, int]]()
    for keys, later_ms in said:
        now += later_ms
        remember(seen, keys, now_ms=now)
        fresh = [(one, at) for one, at in [*fresh, (keys, now)] if at >= now - KEEP_MS]
        assert seen.kept(now) == b"".join(one.fingerprint(at) for one, at in fresh)


def test_the_state_is_bounded() -> None:
    """5 kB beside the cursor, whatever the ids look like; the oldest go first."""
    seen = DedupWindow()
    many = [
        MessageKeys("m" * 500 + str(number), "c" * 500 + str(number), str(number), "u" * 500, 0, "same")
        for number in range(3 * KEEP)
    ]
    for keys in many:
        remember(seen, keys)
    assert len(seen.kept(NOW)) == KEEP * SIZE <= 5120
    stored = DedupWindow(seen.kept(NOW))
    assert [stored.is_repeat(keys) for keys in many] == [False] * (2 * KEEP) + [True] * KEEP
    assert len(seen) <= 2 * KEEP
    together = DedupWindow()
    remember(together, *many)
    assert together.kept(NOW) == seen.kept(NOW)


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
def test_the_id_of_a_message_names_its_bot(keys: MessageKeys) -> None:
    assert bot_of(keys.id_for("b1@im.bot")) == "b1@im.bot"


@pytest.mark.parametrize("ident", ["", "in", "in:", "in:b1@im.bot", "out:b1@im.bot:m1", "42", "::", "\n"])
def test_another_id_names_none(ident: str) -> None:
    assert bot_of(ident) == ""
