"""The records of conversations as they are stored: sealed, each under its own key."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from structlog.testing import capture_logs

from adapter.contract.names import conversation_key
from adapter.errors import RecordTooNew
from adapter.outbound.record import CommandRef, ConversationRecord, SendProgress, SendWindow, SentText
from adapter.outbound.store import ConversationStore
from adapter.security.seal import Sealer
from tests.fakes import FakeBucket
from tests.newer import made_newer

VIRTUAL_TIME = True

OLD, NEW = bytes(32), bytes(range(32))
U1, U2 = "u1@im.wechat", "u2@im.wechat"
PRIVATE = ("AARzToken", "what was sent", "c-of-the-head", "c-of-before", "in:7")
RECORD = ConversationRecord(
    bot="b1@im.bot",
    token="AARzToken",
    window=SendWindow(id="in:7", sequence=7, opened_ms=1000, sends_used=1, sent_at_ms=[1500]),
    inbox_seq=7,
    bots=["b1@im.bot"],
    head=SendProgress(
        commands=[CommandRef(sequence=3, stored_ms=1, id="c-of-the-head")], client_id_base="x", bot="b"
    ),
    recent=[CommandRef(sequence=2, stored_ms=1, id="c-of-before", is_named=True)],
    sent=[SentText(id="m1", kind="text", text="what was sent")],
)


class Stores(NamedTuple):
    """One bucket, and stores with different keys on it, of which the first has written two users' records."""

    bucket: FakeBucket
    writer: ConversationStore
    reader: ConversationStore

    def copy(self, one: str, other: str) -> None:
        """Puts the value of one user under the key of another one."""
        value = self.bucket.entries[conversation_key("s1", one)].value
        self.bucket.put(conversation_key("s1", other), value)


async def stores(written_with: tuple[bytes, ...] = (NEW,), read_with: tuple[bytes, ...] = (NEW,)) -> Stores:
    bucket = FakeBucket()
    writer, reader = [ConversationStore(bucket, Sealer(keys)) for keys in (written_with, read_with)]
    for user in (U1, U2):
        await writer.save("s1", user, RECORD, 0)
    return Stores(bucket, writer, reader)


async def test_a_record_is_read_in_each_way_as_it_was_written_with_its_revision() -> None:
    made = await stores()
    assert await made.reader.load("s1", U1) == (RECORD, 1)
    absent = ("s1", "u3@im.wechat")
    assert await made.reader.load(*absent) == (ConversationRecord(), 0)
    assert await made.reader.load_all([("s1", U2), ("s1", U1), absent]) == {
        ("s1", U1): (RECORD, 1),
        ("s1", U2): (RECORD, 2),
    }
    assert await made.reader.load_sandbox("s1") == {U1: (RECORD, 1), U2: (RECORD, 2)}
    made.bucket.put(conversation_key("s1", U1), None)
    erased = await made.reader.load_all([("s1", U1)])
    assert erased == {("s1", U1): (ConversationRecord(), 3)}, "the revision counts for the next write"


async def test_of_what_a_record_says_only_the_bots_are_stored_in_clear() -> None:
    """An erasure needs them, whatever the key."""
    made = await stores()
    for entry in made.bucket.entries.values():
        assert entry.value is not None
        assert entry.value.startswith(b'{"v":1,"bots":["b1@im.bot"],"sealed":"')
        assert [secret for secret in PRIVATE if secret.encode() in entry.value] == []


async def test_a_record_is_of_no_use_under_the_key_of_another_user() -> None:
    made = await stores()
    made.copy(U1, U2)
    made.copy(U1, "u3@im.wechat")
    with capture_logs() as logs:
        assert await made.reader.load_sandbox("s1") == {
            U1: (RECORD, 1),
            U2: (ConversationRecord(), 3),
            "u3@im.wechat": (ConversationRecord(), 4),
        }
    assert [line["event"] for line in logs] == ["conversation.unopenable"] * 2


@pytest.mark.parametrize(("before", "after"), [((OLD,), (OLD, NEW)), ((OLD, NEW), (NEW, OLD))])
async def test_neighbouring_steps_of_a_rotation_read_what_the_other_wrote(
    before: tuple[bytes, ...], after: tuple[bytes, ...]
) -> None:
    for one, other in ((before, after), (after, before)):
        made = await stores(one, other)
        assert await made.reader.load("s1", U1) == (RECORD, 1)


async def test_a_record_that_was_written_after_the_rotation_needs_the_new_key_only() -> None:
    made = await stores((OLD,), (NEW, OLD))
    record, revision = await made.reader.load("s1", U1)
    await made.reader.save("s1", U1, record, revision)
    last = ConversationStore(made.bucket, Sealer((NEW,)))
    assert await last.load("s1", U1) == (RECORD, 3)
    assert await last.load("s1", U2) == (ConversationRecord(), 2)


@pytest.mark.parametrize(
    ("value", "event"),
    [
        (None, "conversation.unopenable"),
        (b'{"v":1,"token":"AARz"}', "conversation.unopenable"),
        (b'{"v":1,"sealed":"no base64"}', "conversation.unreadable"),
        (b"\xff\xfe", "conversation.unreadable"),
    ],
    ids=["another key", "not sealed", "no base64", "garbage"],
)
async def test_what_cannot_be_opened_counts_as_empty_is_said_once_and_overwritten(
    value: bytes | None, event: str
) -> None:
    made = await stores((OLD,))
    if value is not None:
        for user in (U1, U2):
            made.bucket.put(conversation_key("s1", user), value)
    shared = ConversationStore(made.bucket, Sealer((NEW,)))
    with capture_logs() as logs:
        for _ in range(3):
            empty, revision = await made.reader.load("s1", U1)
            found = await shared.load_all([("s1", U1), ("s1", U2)])
            assert (await shared.load_sandbox("s1"))[U1] == (empty, revision)
    assert empty == ConversationRecord()
    assert found["s1", U1] == (empty, revision)
    assert [(line["event"], line["log_level"], line["sandbox"]) for line in logs] == [(event, "error", "s1")] * 2
    assert len({line["conversation"] for line in logs}) == 2
    assert [secret for secret in (*PRIVATE, U1, U2) if secret in str(logs)] == []
    saved = await made.reader.save("s1", U1, RECORD, revision)
    assert await made.reader.load("s1", U1) == (RECORD, saved)


async def test_what_a_newer_version_wrote_is_left_out_and_known_to_be_there() -> None:
    made = await stores()
    key = conversation_key("s1", U1)
    made.bucket.put(key, made_newer(made.bucket.entries[key].value or b"", sealed=["of another form"]))
    with capture_logs() as logs:
        with pytest.raises(RecordTooNew):
            await made.reader.load("s1", U1)
        assert await made.reader.load_all([("s1", U1), ("s1", U2)]) == {("s1", U1): None, ("s1", U2): (RECORD, 2)}
        assert await made.reader.load_sandbox("s1") == {U2: (RECORD, 2)}
    assert [line["event"] for line in logs] == ["record.too_new"]
