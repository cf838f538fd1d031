"""The inbox is the journal: what a new owner reads of it, and who gets what it finds."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from adapter.contract.names import H_BOT, H_MSG_ID, H_SEALED, H_SEEN, conversation_key, shard_of, to_subject_token
from adapter.ilink.translate import read_message
from adapter.inbound.checkpoint import lowered_checkpoint
from adapter.inbound.poller import State
from adapter.outbound.inbox import Folds
from adapter.outbound.store import seal_record
from adapter.ports import StoredMessage
from tests.fakes import Bench, batch, ready
from tests.fakes.bus import Kept
from tests.inbound.pollers import BOT, USER, Poller, Replica, polls, raw, set_owner, start_poller, successor_of, texts

VIRTUAL_TIME = True

OTHER_BOT, OTHER = "b2@im.bot", "u2@im.wechat"


async def left_behind(*numbers: int, **binding: Any) -> Bench:
    """The next owner of a bot that was killed, whose checkpoint lacks these messages, and whose conversation, too."""
    bench = await ready(batch(*(raw(f"t{number}", number) for number in numbers)), **binding)
    replica = Replica(bench)
    await asyncio.sleep(0.2)
    await replica.die()
    assert (len(texts(bench)), bench.conversation_bucket.entries) == (len(numbers), {})
    return successor_of(bench)


def spied(bench: Bench) -> list[tuple[str, int]]:
    """The reads of inboxes from now on: subject and sequence behind which they begin."""
    reads, read = list[tuple[str, int]](), bench.bus.read

    def noted(stream: str, subject: str, **where: Any) -> Any:
        if stream == "WECHAT_IN" and "after" in where:
            reads.append((subject, where["after"]))
        return read(stream, subject, **where)

    bench.bus.read = noted  # type: ignore[method-assign]
    return reads


# bots ----------------------------------------------------------------------------------------------------


async def test_a_taking_learns_fingerprints_and_position_and_writes_them(poller: Poller) -> None:
    successor = await left_behind(1, 2, 3)
    assert (await successor.checkpoint()).position.prints == b""
    session = poller(successor)
    await asyncio.sleep(1)
    position = (await successor.checkpoint()).position
    assert (position.inbox_seq, len(position.prints) > 0, session.state) == (3, True, State.POLLING)
    successor.chat.polls.append(batch(raw("t2", 2, message_id=99, client_id="x", seq=99), raw("t4", 4), cursor="c"))
    session.cancel_poll()
    await asyncio.sleep(5)
    assert texts(successor) == ["t1", "t2", "t3", "t4"]


async def test_nothing_is_read_where_nothing_is_newer(poller: Poller) -> None:
    """Of ten thousand bots, most are silent."""
    bench = await ready(batch(raw()))
    await polls(bench)
    successor = successor_of(bench)
    reads = spied(successor)
    writes = len(successor.bus.writes)
    poller(successor)
    await asyncio.sleep(1)
    assert (reads, successor.chat.polling) == ([], 1)
    assert successor.bus.writes[writes:].count("checkpoint") == 1, "its name"


async def test_a_late_message_is_known_below_newer_ones_that_were_published_here(poller: Poller) -> None:
    """A replica that had lost the bot stored it, and announced that."""
    bench = await ready(batch(raw("t1", 1)))
    session = poller(bench)
    await asyncio.sleep(1)
    (first,) = bench.bus.found("IN")
    late = read_message(raw("t9", 9))
    seen = base64.b64encode(late.keys.fingerprint(bench.clock.now_ms())).decode()
    body = msgspec.structs.replace(bench.bus.inbound()[0], id="in:late", text="t9")
    bench.bus.put(first.subject, msgspec.json.encode(body), {H_BOT: BOT, H_SEEN: seen})
    bench.chat.polls.append(batch(raw("t2", 2), cursor="c"))
    session.cancel_poll()
    await asyncio.sleep(1)
    session.on_released()
    session.cancel_poll()
    await asyncio.sleep(1)
    bench.chat.polls.append(batch(raw("t9", 9, message_id=77, client_id="x", seq=77), cursor="d"))
    session.cancel_poll()
    await asyncio.sleep(5)
    assert texts(bench) == ["t1", "t9", "t2"]


async def test_a_bot_is_taken_once_what_the_inbox_has_is_known(
    poller: Poller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then a former owner's message may open a window, so nothing is parked or refused for want of one."""
    successor = await left_behind(1)
    held, read = asyncio.Event(), successor.bus.read

    async def slow(stream: str, subject: str, **where: Any) -> Any:
        if stream == "WECHAT_IN":
            await held.wait()
        async for stored in read(stream, subject, **where):
            yield stored

    monkeypatch.setattr(successor.bus, "read", slow)
    session = poller(successor)
    await asyncio.sleep(5)
    assert (session.checkpoint is not None, session.session.is_taken) == (True, False)
    held.set()
    await asyncio.sleep(1)
    assert session.session.is_taken


async def test_a_poller_that_ends_while_it_reads_the_inbox_leaves_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A late message is announced as the shard is handed over."""
    bench = await ready(batch(raw("t1", 1)))
    session, task = start_poller(bench)
    await asyncio.sleep(1)
    (first,) = bench.bus.found("IN")
    body = msgspec.structs.replace(bench.bus.inbound()[0], id="in:late", text="t9")
    seen = base64.b64encode(read_message(raw("t9", 9)).keys.fingerprint(bench.clock.now_ms())).decode()
    bench.bus.put(first.subject, msgspec.json.encode(body), {H_BOT: BOT, H_SEEN: seen})
    held, read = asyncio.Event(), bench.bus.read

    async def slow(stream: str, subject: str, **where: Any) -> Any:
        if stream == "WECHAT_IN":
            await held.wait()
        async for stored in read(stream, subject, **where):
            yield stored

    monkeypatch.setattr(bench.bus, "read", slow)
    session.on_released()
    await asyncio.sleep(1)
    session.stop(immediately=True)
    await task
    held.set()
    await asyncio.sleep(5)
    assert (await bench.checkpoint()).owner == ""


async def never(*_: Any) -> None:
    await asyncio.Event().wait()


async def test_the_messages_of_another_bot_are_not_this_ones(poller: Poller) -> None:
    """Two bots of a sandbox may get the same words at the same time."""
    successor = await left_behind(1)
    await successor.bind(bot=OTHER_BOT, user=OTHER)
    session, task = start_poller(successor)
    other = successor.new_poller(OTHER_BOT)
    successor.chat.poll = never  # type: ignore[method-assign,assignment]
    other_task = asyncio.create_task(other.run())
    await asyncio.sleep(5)
    assert session.checkpoint is not None
    assert other.checkpoint is not None
    now_ms = successor.clock.now_ms()
    assert (len(session.checkpoint.seen.kept(now_ms)) > 0, other.checkpoint.seen.kept(now_ms)) == (True, b"")
    for one, ended in ((session, task), (other, other_task)):
        one.stop(immediately=True)
        await ended


async def test_a_bot_that_moved_while_nobody_had_it_knows_what_its_former_sandbox_got(poller: Poller) -> None:
    """Its last owner may have died before it wrote the checkpoint."""
    successor = await left_behind(1, 2)
    await successor.bind("s2")
    successor.chat.polls.append(batch(raw("t2", 2, message_id=99, client_id="x"), raw("t3", 3), cursor="c"))
    poller(successor)
    await asyncio.sleep(5)
    assert [(one.sandbox, one.text) for one in successor.bus.inbound()] == [("s1", "t1"), ("s1", "t2"), ("s2", "t3")]
    assert (await successor.checkpoint()).position.sandbox == "s2"


async def test_a_position_above_the_stream_stops_the_polls_until_it_is_lowered(poller: Poller) -> None:
    """As after a restore of an old backup: what comes would be taken for known."""
    bench = await ready()
    await set_owner(bench, "", sandbox="s1", inbox_seq=2)
    bench.bus.put("wechat.inbox.s1", b"{}", {})
    session = poller(bench)
    await asyncio.sleep(120)
    assert (bench.chat.asked, session.state) == ([], State.RETRYING)
    assert session.why.startswith("inbox_set_back:")
    assert "doctor --fix" in session.why
    bench.bus.put("wechat.inbox.s9", b"{}", {})
    await asyncio.sleep(60)
    assert session.state is State.POLLING


async def test_polls_begin_once_the_position_is_lowered_in_the_bucket(poller: Poller) -> None:
    """`doctor --fix` lowers it there, while the poller runs; no memory of the old one is written over it."""
    bench = await ready()
    bench.bus.put("wechat.inbox.s1", b"{}", {})
    await set_owner(bench, "", sandbox="s1", inbox_seq=500)
    session, task = start_poller(bench)
    await asyncio.sleep(30)
    assert (bench.chat.asked, session.why[:15]) == ([], "inbox_set_back:")
    (entry,) = bench.checkpoint_bucket.entries.values()
    assert entry.value is not None
    lowered = lowered_checkpoint(BOT, entry.value, 1, bench.sealer)
    assert lowered is not None
    bench.checkpoint_bucket.put(entry.key, lowered)
    await asyncio.sleep(120)
    assert (session.state, bench.chat.polling) == (State.POLLING, 1)
    session.stop(immediately=True)
    await task
    assert (await bench.checkpoint()).position.inbox_seq == 1


async def test_an_inbox_that_is_slow_to_read_delays_no_other() -> None:
    bench = await ready()
    for sandbox in ("slow", "beside", "later"):
        bench.bus.put(f"wechat.inbox.{sandbox}", b'{"id":"in:1","user":"u"}', {})
    read, is_free = bench.bus.read, asyncio.Event()

    async def slowly(stream: str, subject: str, **where: Any) -> AsyncIterator[StoredMessage]:
        if subject.endswith("slow") and "after" in where:
            await is_free.wait()
        async for stored in read(stream, subject, **where):
            yield stored

    bench.bus.read = slowly  # type: ignore[method-assign]
    folds = Folds(bench.replica.inboxes, lambda *_: None)
    slow, beside = (asyncio.create_task(folds.newest_of(sandbox, "u", 0)) for sandbox in ("slow", "beside"))
    await asyncio.sleep(1)
    later = asyncio.create_task(folds.newest_of("later", "u", 0))
    await asyncio.sleep(1)
    assert (slow.done(), beside.done(), later.done()) == (False, True, True)
    is_free.set()
    assert all(await asyncio.gather(slow, beside, later))


# conversations -------------------------------------------------------------------------------------------


async def test_an_open_conversation_gets_token_and_window_of_what_the_fold_finds(poller: Poller) -> None:
    """Also while a command of it waits for the window."""
    bench = await ready(batch(raw("t1", 1)))
    successor = successor_of(bench)
    successor.shard().on_delivery(successor.command("answer", id="c1"))
    await asyncio.sleep(60)
    assert [one.outcome for one in successor.bus.receipts()] == ["parked"]
    replica = Replica(bench)
    await asyncio.sleep(0.2)
    await replica.die()
    poller(successor)
    await asyncio.sleep(5)
    assert [one.outcome for one in successor.bus.receipts()] == ["parked", "accepted"]
    assert [sent.context_token for sent in successor.chat.sent] == ["token-1"]
    assert (successor.record().inbox_seq, successor.record().window.id[-3:]) == (1, "001")


async def test_a_conversation_that_is_opened_later_folds_for_itself() -> None:
    """Commands need not wait for a poller to catch up; this bot has none."""
    successor = await left_behind(1, 2)
    opened_ms = successor.clock.now_ms()
    await asyncio.sleep(3600)
    successor.shard().on_delivery(successor.command("answer", id="c1", when_closed="refuse"))
    await asyncio.sleep(5)
    assert [one.outcome for one in successor.bus.receipts()] == ["accepted"]
    assert [sent.context_token for sent in successor.chat.sent] == ["token-2"]
    record = successor.record()
    assert (record.inbox_seq, record.bots) == (2, [BOT])
    assert opened_ms - 1000 < record.window.opened_ms <= opened_ms


async def test_a_conversation_takes_each_message_once(poller: Poller) -> None:
    """Here the record knows it, and the checkpoint does not: sends that were made since are not given back."""
    bench = await ready(batch(raw("t1", 1)))
    replica = Replica(bench)
    await asyncio.sleep(2)
    await replica.die()
    record = bench.record()
    assert record.inbox_seq == 1
    spent = msgspec.structs.replace(record, window=msgspec.structs.replace(record.window, sends_used=7))
    key = conversation_key("s1", USER)
    bench.conversation_bucket.put(key, seal_record(key, spent, bench.sealer))
    successor = successor_of(bench)
    successor.shard().on_delivery(successor.command("answer", id="c1"))
    poller(successor)
    await asyncio.sleep(5)
    assert (texts(successor), successor.record().window.sends_used) == (["t1"], 8)


async def test_a_conversation_with_a_position_above_the_stream_waits_until_it_is_lowered(poller: Poller) -> None:
    """As after a loss of the stream's end: its record is written sooner than the checkpoint. Else what its user
    writes would be taken for known, and no window would open."""
    bench = await ready(batch(raw("t1", 1)))
    replica = Replica(bench)
    await asyncio.sleep(5)
    await replica.die()
    last = bench.bus.found("IN")[-1].seq
    bench.hears(inbox_seq=last + 40, sends_used=10)
    successor = successor_of(bench)
    successor.chat.polls.append(batch(raw("t2", 2), cursor="c"))
    session = poller(successor)
    await asyncio.sleep(600)
    assert (texts(successor), session.state) == (["t1"], State.STORING)
    assert successor.replica.inboxes.set_back.startswith(f"A position ({last + 40}) is above")
    successor.hears(inbox_seq=last, sends_used=10)
    await asyncio.sleep(120)
    assert (texts(successor), session.state) == (["t1", "t2"], State.POLLING)
    assert (successor.record().token, successor.record().window.sends_used) == ("token-2", 0)


@pytest.mark.parametrize(("user", "was_open"), [(USER, False), (USER, True), (OTHER, False)])
async def test_token_and_window_of_an_erased_person_do_not_come_back(user: str, was_open: bool) -> None:
    """What the replica read of the inbox outlives what is in it. The bot may have served others than its user."""
    bench = await ready(batch(raw("t1", 1, from_user_id=user)))
    replica = Replica(bench)
    await asyncio.sleep(0.2)
    await replica.die()
    successor = successor_of(bench)
    session, task = start_poller(successor)
    await asyncio.sleep(5)
    shard, binding = successor.shards[shard_of("s1")], successor.bindings.get(BOT)
    assert binding is not None
    if was_open:
        await shard.conversation("s1", USER)
        await asyncio.sleep(5)
        assert successor.record().token == "token-1"
    session.stop(immediately=True)
    await task
    await successor.close()
    await successor.bus.purge("WECHAT_IN", "wechat.inbox.s1", up_to=1)
    await successor.conversation_bucket.delete(conversation_key("s1", user))
    await successor.checkpoint_bucket.delete(to_subject_token(BOT))
    await successor.bindings.remove(BOT)
    shard.evict_idle()
    await successor.bind(bot=OTHER_BOT, user=user)
    shard.on_delivery(successor.command("answer", id="c1", when_closed="refuse"))
    await asyncio.sleep(5)
    assert [(one.outcome, one.reason) for one in successor.bus.receipts()] == [("refused", "window_closed")]
    assert successor.chat.sent == []


async def test_the_token_of_another_bots_message_is_not_taken_over() -> None:
    """The user's newest message came over their new bot, and has none."""
    successor = await left_behind(1)
    (stored,) = successor.bus.found("IN")
    await successor.bindings.remove(BOT)
    await successor.bind(bot=OTHER_BOT)
    headers = {H_BOT: OTHER_BOT, H_SEEN: stored.headers[H_SEEN], H_MSG_ID: "in:b2@im.bot:2"}
    successor.bus.put(stored.subject, stored.data, headers)
    successor.shard().on_delivery(successor.command("answer", id="c1"))
    await asyncio.sleep(5)
    assert successor.record().token == ""


async def test_bots_and_conversations_of_a_sandbox_share_one_read(poller: Poller) -> None:
    successor = await left_behind(1, 2)
    reads = spied(successor)
    shard = successor.shard()
    for number in range(5):
        shard.on_delivery(successor.command("answer", id=f"c{number}"))
    poller(successor)
    await asyncio.sleep(5)
    assert len(reads) == 1
    assert [one.outcome for one in successor.bus.receipts()].count("accepted") > 0


# what cannot be read -------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["data", "sealed", "seen"])
async def test_an_unreadable_message_in_an_inbox_costs_only_its_own_state(damage: str, poller: Poller) -> None:
    """By another hand, or where a key is gone."""
    successor = await left_behind(1, 2)
    kept = next(one for one in successor.bus.kept if one.stream == "WECHAT_IN" and one.stored.seq == 2)
    stored, headers = kept.stored, dict(kept.stored.headers)
    data = b"garbage" if damage == "data" else stored.data
    if damage == "sealed":
        headers[H_SEALED] = headers[H_SEALED][:-8] + "AAAAAAAA"
    if damage == "seen":
        headers[H_SEEN] = "???"
    changed = StoredMessage(stored.subject, stored.seq, headers, data, stored.time_ms)
    successor.bus.kept = [
        Kept(one.stream, changed, one.time_ms) if one is kept else one for one in successor.bus.kept
    ]
    with capture_logs() as logs:
        session = poller(successor)
        await asyncio.sleep(1)
        successor.shards[shard_of("s1")].on_delivery(successor.command("answer", id="c1"))
        await asyncio.sleep(5)
    assert session.state is State.POLLING
    known = {"data": "token-1", "sealed": "token-1", "seen": "token-2"}
    assert [sent.context_token for sent in successor.chat.sent] == [known[damage]]
    logged = [line["event"] for line in logs if line["log_level"] == "error"]
    assert set(logged) == {"data": {"inbox.unreadable"}, "sealed": {"inbox.unopenable"}}.get(damage, set())


async def test_the_sealed_part_of_another_message_gives_no_token() -> None:
    """Nobody gets another person's token by a copied header."""
    successor = await left_behind(1, 2)
    first, second = [one for one in successor.bus.kept if one.stream == "WECHAT_IN"]
    headers = second.stored.headers | {H_SEALED: first.stored.headers[H_SEALED]}
    stored = second.stored
    swapped = Kept(
        "WECHAT_IN", StoredMessage(stored.subject, 2, headers, stored.data, stored.time_ms), second.time_ms
    )
    successor.bus.kept = [first, swapped]
    successor.shard().on_delivery(successor.command("answer", id="c1"))
    await asyncio.sleep(5)
    assert [sent.context_token for sent in successor.chat.sent] == ["token-1"], "the last one that opens"


async def test_the_newest_of_many_inboxes_are_asked_for_in_one_request() -> None:
    bench = await ready()
    asked: list[int] = []
    read = bench.bus.read_last_of_each

    async def counted(stream: str, subjects: Sequence[str]) -> list[StoredMessage]:
        asked.append(len(subjects))
        return await read(stream, subjects)

    bench.bus.read_last_of_each = counted  # type: ignore[method-assign]
    inboxes = bench.replica.inbound.inboxes
    found = await asyncio.gather(*(inboxes.newest(f"s{number}") for number in range(100)))
    assert (found, len(asked) <= 2, sum(asked)) == ([0] * 100, True, 100)
