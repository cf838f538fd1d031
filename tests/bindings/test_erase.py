"""erase: the person is unbound first; what is stored of them is deleted beside what follows, and the receipt names
nobody."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from adapter.bridge.entries import Entry, Secrets, encode_entry
from adapter.contract.messages import Erase
from adapter.contract.names import H_ORIGINAL, H_REPLY_TO
from adapter.errors import BusRefused
from adapter.ports import StoredMessage
from adapter.tools.seal import bind_context
from tests.bindings.platform import BOT, INBOX, USER, Platform
from tests.fakes import FakeDelivery

VIRTUAL_TIME = True


async def bound() -> Platform:
    """The person has a bot in two sandboxes, and somebody else has one. All have written, and got an answer."""
    platform = Platform()
    await platform.bind()
    await platform.bind(sandbox="s2", bot="b2@im.bot")
    await platform.bind(sandbox="s2", bot="b3@im.bot", user="other@im.wechat")
    for bot, user in ((BOT, USER), ("b2@im.bot", USER), ("b3@im.bot", "other@im.wechat")):
        sandbox = platform.bound[bot]
        await platform.bench.wrote(f"in:{bot}", bot=bot, user=user)
        platform.partition(sandbox).on_delivery(platform.bench.command("hi", sandbox=sandbox, id=bot, user=user))
    await asyncio.sleep(10)
    return platform


def named(platform: Platform) -> list[tuple[str, str]]:
    """Where the person or a bot of theirs is named, in streams and buckets; the sandbox of each."""
    bench = platform.bench
    names = (USER.encode(), BOT.encode(), b"b2@im.bot")
    found = [
        (kept.stream, kept.stored.subject.split(".")[2])
        for kept in bench.bus.kept
        if kept.stream != "WECHAT_OUT"
        and any(name in kept.stored.data + str(kept.stored.headers).encode() for name in names)
    ]
    for bucket in (bench.bindings_bucket, bench.person_bucket, bench.logins_bucket):
        found += [
            (bucket.label, entry.key)
            for entry in bucket.entries.values()
            if any(name in (entry.value or b"") for name in names)
        ]
    return found


async def settled(platform: Platform) -> None:
    """What the erase for all sandboxes has published is delivered."""
    for _ in range(20):
        for stored in platform.bench.bus.found("OUT"):
            if H_ORIGINAL in stored.headers:
                deliver(platform, stored)
        await asyncio.sleep(5)


def deliver(platform: Platform, stored: StoredMessage) -> FakeDelivery:
    sandbox = stored.subject.rpartition(".")[2]
    delivery = FakeDelivery(
        stored.subject, stored.data, seq=stored.seq, time_ms=stored.time_ms, headers=stored.headers
    )
    platform.partition(sandbox).on_delivery(delivery)
    return delivery


async def test_a_person_is_unbound_and_everything_of_theirs_goes() -> None:
    platform = await bound()
    assert named(platform)
    receipt = await platform.say("erase", user=USER, id="e1")
    assert (receipt.outcome, receipt.command, receipt.left) == ("applied", "e1", {})
    assert receipt.counts.keys() >= {"event", "receipt"}
    assert (receipt.user, receipt.bot, receipt.bots) == ("", "", [])
    assert platform.bound == {"b2@im.bot": "s2", "b3@im.bot": "s2"}
    assert [place for place in named(platform) if "s1" in place[1]] == []
    assert [each.user for each in platform.bench.bus.receipts()] == [USER, "other@im.wechat"]


async def test_a_dry_run_counts_and_unbinds_nobody() -> None:
    platform = await bound()
    before = named(platform)
    receipt = await platform.say("erase", user=USER, dry_run=True)
    assert (receipt.outcome, receipt.counts["receipt"]) == ("applied", 1)
    everywhere = await platform.say("erase", sandbox="_", user=USER, dry_run=True)
    assert everywhere.counts["receipt"] == 2
    assert (named(platform), len(platform.bound)) == (before, 3)


async def test_an_erase_for_all_sandboxes_is_one_in_each_and_ends_with_them() -> None:
    platform = await bound()
    delivery = platform.publish("erase", sandbox="_", user=USER, id="e1")
    await asyncio.sleep(10)
    said = [stored for stored in platform.bench.bus.found("OUT") if H_ORIGINAL in stored.headers]
    assert [stored.subject.rpartition(".")[2] for stored in said] == ["s1", "s2"]
    assert {stored.headers[H_ORIGINAL] for stored in said} == {f"{delivery.seq}.{delivery.time_ms}"}
    assert delivery.acks == 0
    await settled(platform)
    assert (delivery.acks, platform.bound) == (1, {"b3@im.bot": "s2"})
    assert named(platform) == []
    receipts = {each.sandbox: each for each in platform.bench.bus.receipts("erase")}
    assert {each.sequence for each in receipts.values()} == {delivery.seq}
    assert receipts["_"].counts["receipt"] == 2
    again = await platform.say("erase", sandbox="_", user=USER, id="e2")
    assert (again.outcome, again.counts) == ("applied", {})


async def test_one_for_all_sandboxes_that_comes_again_publishes_nothing_that_has_ended() -> None:
    platform = await bound()
    delivery = platform.publish("erase", sandbox="_", user=USER, id="e1")
    await asyncio.sleep(5)
    deliver(platform, next(each for each in platform.bench.bus.found("OUT") if H_ORIGINAL in each.headers))
    await asyncio.sleep(5)
    platform.bench.bus.kept = [kept for kept in platform.bench.bus.kept if H_ORIGINAL not in kept.stored.headers]
    platform.bench.bus.forget_ids()
    later = platform.next_owner()
    for sandbox in ("_", "s1", "s2"):
        await later.begin(sandbox)
    repeated = later.again(delivery)
    await asyncio.sleep(5)
    said = [stored for stored in later.bench.bus.found("OUT") if H_ORIGINAL in stored.headers]
    assert [stored.subject.rpartition(".")[2] for stored in said] == ["s2"]
    await settled(later)
    assert (repeated.acks, later.bound, named(later)) == (1, {"b3@im.bot": "s2"}, [])


async def test_who_is_bound_behind_an_erase_for_all_sandboxes_is_spared() -> None:
    """It is applied in the person's sandbox after their new bind."""
    platform = await bound()
    platform.publish("erase", sandbox="_", user=USER, id="e1")
    await asyncio.sleep(5)
    await platform.say("unbind", all=True)
    bind = await platform.bind()
    await settled(platform)
    assert platform.bound == {BOT: "s1", "b3@im.bot": "s2"}
    assert platform.binding().since == bind.sequence
    assert [event.change for event in platform.bench.bus.events() if event.sandbox == "s1"] == ["bound"]
    assert [each.sequence for each in platform.bench.bus.receipts("bind") if each.sandbox == "s1"] == [bind.sequence]


async def test_the_deletions_hold_up_nobody_and_leave_what_a_later_bind_owns() -> None:
    platform = await bound()
    may_end = asyncio.Event()
    platform.bench.bus.on_delete = may_end.wait  # type: ignore[assignment]
    erase = platform.publish("erase", user=USER)
    bind = platform.publish_bind(user=USER)
    await asyncio.sleep(10)
    assert (erase.acks, bind.acks, platform.binding().since) == (0, 1, bind.seq)
    await platform.bench.wrote("in:2")
    platform.partition().on_delivery(platform.bench.command("again", id="later"))
    await asyncio.sleep(5)
    may_end.set()
    await asyncio.sleep(10)
    assert erase.acks == 1
    assert platform.bound == {BOT: "s1", "b2@im.bot": "s2", "b3@im.bot": "s2"}
    assert [each.command for each in platform.bench.bus.receipts() if each.sandbox == "s1"] == ["later"]
    assert [event.change for event in platform.bench.bus.events() if event.sandbox == "s1"] == ["bound"]


@pytest.mark.parametrize("done", range(6))
async def test_one_that_is_cut_is_carried_on_by_the_next_owner(done: int) -> None:
    """What names the person's bots is deleted last."""
    platform = await bound()
    left = done

    async def freeze() -> None:
        nonlocal left
        if not left:
            await asyncio.Event().wait()
        left -= 1

    platform.bench.bus.on_delete = freeze
    erase = platform.publish("erase", user=USER)
    await asyncio.sleep(10)
    later = platform.next_owner()
    later.bench.bus.on_delete = None
    await later.begin()
    repeated = later.again(erase)
    await asyncio.sleep(10)
    assert repeated.acks == 1
    assert [place for place in named(later) if "s1" in place[1]] == []


async def test_deletions_that_the_bus_refuses_are_tried_again() -> None:
    platform = await bound()
    refusals = 3

    async def refuse() -> None:
        nonlocal refusals
        if refusals:
            refusals -= 1
            raise BusRefused(10059, "stream not found")

    platform.bench.bus.on_delete = refuse
    erase = platform.publish("erase", user=USER)
    await asyncio.sleep(60)
    assert (erase.acks, refusals) == (1, 0)
    assert [place for place in named(platform) if "s1" in place[1]] == []


@pytest.mark.parametrize("body", [b"no json", b'{"user":""}', b'{"sandbox":"s1"}'])
async def test_what_cannot_be_read_becomes_a_dead_letter_without_its_words(body: bytes, platform: Platform) -> None:
    platform.publish("erase", body)
    await asyncio.sleep(1)
    (letter,) = platform.bench.bus.found("DEAD")
    assert letter.data == b""
    assert USER not in repr(Erase(user=USER))


async def test_deletions_that_break_the_adapter_are_a_dead_letter_and_bind_nobody() -> None:
    platform = await bound()

    async def bug() -> None:
        raise RuntimeError("a bug")

    platform.bench.bus.on_delete = bug
    erase = platform.publish("erase", user=USER, headers={"Authorization": USER})
    await asyncio.sleep(120)
    assert (erase.acks, BOT in platform.bound) == (1, False)
    (receipt,) = platform.bench.bus.receipts("erase")
    assert receipt.outcome == "dead_lettered"
    (letter,) = platform.bench.bus.found("DEAD")
    assert USER not in str(letter.headers)


async def test_an_erase_says_who_may_still_be_theirs(platform: Platform) -> None:
    """A bot whose user is not known may be the person's, who has not written yet."""
    for number, user in enumerate(["", "", "u9@im.wechat"], 7):
        await platform.bench.bind(f"s{number}", bot=f"b{number}@im.bot", user=user)
    wanted: list[tuple[str, dict[str, Any]]] = [("_", {"dry_run": True}), ("_", {}), ("s8", {}), ("s9", {})]
    said = [await platform.say("erase", sandbox=sandbox, user=USER, **fields) for sandbox, fields in wanted]
    assert [receipt.unlearned for receipt in said] == [2, 2, 1, 0]
    assert msgspec.json.decode(platform.bench.core.published[-1][1])["outcome"] == "applied"
    assert {subject for subject, _, _ in platform.bench.core.published} == {INBOX}
    assert H_REPLY_TO


async def test_a_login_s_bind_is_deleted_since_an_erase_deletes_its_receipt() -> None:
    """Else one whose ack got lost would be applied again behind the erase. Its token is sealed."""
    platform = Platform()
    sealed = platform.bench.sealer.seal(bind_context("s1", BOT), f"{BOT}:SECRET")
    bind = platform.publish_bind(bot_token=sealed, user=USER)
    await asyncio.sleep(5)
    assert (platform.bound, bind.acks, platform.bench.bus.found("OUT")) == ({BOT: "s1"}, 1, [])


async def test_a_server_s_clock_that_is_ahead_keeps_no_message_of_who_was_erased() -> None:
    """The leaders of two streams have two clocks. An entry names the time of its person itself."""
    platform = Platform()
    bench = platform.bench
    bind = await platform.bind()
    subject = bench.persons.subject(platform.binding().key)
    words = [msgspec.Raw(msgspec.json.encode({"text": "of who was erased", "user": USER}))]
    entry = Entry(since=bind.sequence, user=USER, messages=words)
    bench.bus.put(subject, encode_entry(entry, Secrets(), subject, bench.sealer), {})
    kept = bench.bus.kept[-1]
    bench.bus.kept[-1] = kept._replace(stored=kept.stored._replace(time_ms=kept.stored.time_ms + 1000))
    erase = platform.publish("erase", user=USER)
    platform.publish_bind(user=USER)
    await asyncio.sleep(30)
    assert erase.acks == 1
    assert [each for each in bench.bus.found("IN") if b"of who was erased" in each.data] == []
