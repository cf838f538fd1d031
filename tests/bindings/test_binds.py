"""bind and unbind: applied in the order in which they were stored, ended by a receipt, never with a token."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from adapter.bridge.entries import Entry, Secrets, encode_entry, messages_of
from adapter.contract.messages import Bind, BindingEvent, Receipt
from adapter.contract.names import H_COMMAND, H_MSG_ID, H_ORIGINAL, H_REPLY_TO, person_token, to_subject_token
from adapter.contract.records import Binding
from adapter.errors import BusRefused, Temporary
from adapter.ports import BusMessage
from adapter.tools.seal import Sealer, cursor_context
from tests.bindings.platform import BOT, OTHER, TOKEN, USER, Platform
from tests.fakes import Bench, Failing, FakeDelivery
from tests.newer import made_newer

VIRTUAL_TIME = True


async def test_a_bind_is_stored_and_ended_by_an_event_and_a_receipt(platform: Platform) -> None:
    receipt = await platform.bind(id="r1")
    assert (receipt.command, receipt.sandbox, receipt.outcome, receipt.reason) == ("r1", "s1", "applied", "")
    assert (receipt.bot, receipt.user, receipt.bots) == (BOT, USER, [])
    assert (platform.bound, platform.token()) == ({BOT: "s1"}, TOKEN)
    binding = platform.binding()
    assert (binding.since, binding.bound, binding.person) == (receipt.sequence,) * 2 + (person_token("s1", USER),)
    (event,) = platform.bench.bus.events()
    assert (event.sandbox, event.bot, event.user, event.change, event.request) == ("s1", BOT, USER, "bound", "r1")
    (stored,) = [each for each in platform.bench.bus.found("EVENT") if ".bind." in each.subject]
    assert stored.subject == f"wechat.event.s1.bind.r1.{receipt.sequence}"


async def test_the_id_is_the_bodys_else_the_headers_else_the_sequence(platform: Platform) -> None:
    assert (await platform.bind(headers={H_MSG_ID: "h1"})).command == "h1"
    assert (await platform.bind(id="r1", headers={H_MSG_ID: "h1"})).command == "r1"
    receipt = await platform.say("unbind", all=True)
    assert receipt.command == str(receipt.sequence)


async def test_a_bind_that_says_nothing_new_disturbs_nobody(platform: Platform) -> None:
    await platform.bind(id="r1")
    before = dict(platform.bench.bindings_bucket.entries)
    assert (await platform.bind(id="r2")).outcome == "applied"
    assert platform.bench.bindings_bucket.entries == before
    assert platform.changes == [("s1", BOT, "bound")]


async def test_a_bind_makes_a_dead_login_live_even_with_the_same_token(platform: Platform) -> None:
    await platform.bench.bind(token=TOKEN, state="needs_login", reason="stale_token")
    await platform.bind()
    assert (platform.binding().state, platform.binding().reason) == ("active", "")


async def test_a_known_user_is_not_forgotten_by_a_bind_that_names_none(platform: Platform) -> None:
    await platform.bind()
    await platform.bind(user=None, bot_token="b1@im.bot:NEW")
    assert platform.binding().user == USER


@pytest.mark.parametrize("crosses", ["the bind", "the learning"])
async def test_a_user_who_is_learned_while_a_bind_is_stored_is_kept(crosses: str, platform: Platform) -> None:
    """The other write comes between the read and the write of one. Bare commands go on."""
    bench = platform.bench
    await platform.bind(user=None)
    await bench.wrote("in:1")
    again = bench.command(verb="bind", bot=BOT, bot_token=f"{BOT}:NEWER")

    async def learn() -> None:
        """As the poller does."""
        await bench.bindings.update(BOT, lambda now: None if now.user else msgspec.structs.replace(now, user=USER))

    async def bind() -> None:
        platform.partition().on_delivery(again)
        while not again.acks:
            await asyncio.sleep(0.1)

    first, other = (bind, learn) if crosses == "the bind" else (learn, bind)

    async def cross(_: str) -> None:
        bench.bindings_bucket.on_write = None
        await other()

    bench.bindings_bucket.on_write = cross
    await first()
    binding = platform.binding()
    assert (binding.user, platform.token(), binding.person) == (USER, f"{BOT}:NEWER", person_token("s1", BOT))
    assert bench.bindings_bucket.on_write is None
    platform.partition().on_delivery(bench.command("words", id="c1"))
    platform.partition().on_delivery(bench.command("more words", id="c2", user=USER))
    await asyncio.sleep(5)
    assert [(each.command, each.outcome) for each in bench.bus.receipts()] == [("c1", "accepted"), ("c2", "accepted")]


async def test_another_bot_of_the_same_user_replaces_the_old_one_and_keeps_the_person(platform: Platform) -> None:
    first = await platform.bind()
    receipt = await platform.bind(bot="b2@im.bot", id="r2")
    assert receipt.bots == [BOT]
    assert platform.bound == {"b2@im.bot": "s1"}
    assert platform.binding("b2@im.bot").since == first.sequence
    assert platform.changes == [("s1", BOT, "bound"), ("s1", "b2@im.bot", "bound"), ("s1", BOT, "replaced")]


async def test_the_new_bot_is_there_before_the_old_one_goes(platform: Platform) -> None:
    """Else what is parked for the user would find nobody, and be refused."""
    await platform.bind()
    gone: list[int] = []
    platform.bench.bindings.add_listener(
        lambda bot, _, after: gone.append(len(platform.bound)) if after is None else None
    )
    await platform.bind(bot="b2@im.bot")
    assert gone == [1]


async def test_of_two_bots_of_one_person_the_later_one_is_left(platform: Platform) -> None:
    """The bind ended in between, and is a dead letter."""
    await platform.bench.bind(person="p", bound=1, since=1)
    await platform.bench.bind(bot="b2@im.bot", person="p", bound=2, since=1)
    later = platform.next_owner()
    await later.begin()
    later.partition().evict_idle()
    await asyncio.sleep(1)
    assert later.bound == {"b2@im.bot": "s1"}
    assert later.changes == [("s1", BOT, "replaced")]


ELSEWHERE: list[tuple[str, dict[str, Any]]] = [
    ("another-sandbox", {"sandbox": "s2"}),
    ("another-user", {"user": "u9@im.wechat"}),
    ("a-user-who-has-another-bot", {"bot": "b3@im.bot", "user": "u2@im.wechat"}),
]


@pytest.mark.parametrize("fields", [row[1] for row in ELSEWHERE], ids=[row[0] for row in ELSEWHERE])
async def test_a_bot_that_somebody_else_has_is_to_be_unbound_first(
    fields: dict[str, Any], platform: Platform
) -> None:
    await platform.bind()
    await platform.bind(**OTHER)
    await platform.bind(bot="b3@im.bot", user=None)
    before = dict(platform.bench.bindings_bucket.entries)
    receipt = await platform.bind(**fields)
    assert (receipt.outcome, receipt.reason, "unbind it" in receipt.detail) == ("refused", "bound_elsewhere", True)
    assert platform.bench.bindings_bucket.entries == before


async def test_a_bind_that_names_the_user_of_a_bot_without_one_is_its_learning(platform: Platform) -> None:
    first = await platform.bind(user=None)
    await platform.bind()
    binding = platform.binding()
    assert (binding.user, binding.since, binding.person) == (USER, first.sequence, person_token("s1", BOT))


async def test_two_owners_that_bind_one_bot_at_once_leave_it_to_one_sandbox(platform: Platform) -> None:
    deliveries = [platform.publish_bind(sandbox=sandbox, id=sandbox) for sandbox in ("s1", "s2", "s3")]
    await asyncio.sleep(10)
    assert [delivery.acks for delivery in deliveries] == [1, 1, 1]
    outcomes = {receipt.command: receipt.outcome for receipt in platform.bench.bus.receipts("bind")}
    assert sorted(outcomes.values()) == ["applied", "refused", "refused"]
    assert outcomes[platform.bound[BOT]] == "applied"


async def test_while_bindings_are_lost_binds_wait(platform: Platform) -> None:
    """What they would write would go once the bucket is restored."""
    complete = asyncio.Event()

    async def wait() -> None:
        await complete.wait()

    platform.bench.partition(wait_bindings=wait)
    delivery = platform.publish_bind()
    await asyncio.sleep(3600)
    assert (delivery.acks, platform.changes) == (0, [])
    complete.set()
    await asyncio.sleep(1)
    assert (delivery.acks, platform.changes) == (1, [("s1", BOT, "bound")])


async def test_options_and_cursor_are_kept(platform: Platform) -> None:
    await platform.bind(options={"auto_typing": True}, cursor="CAES", base_url="https://ilinkai.wechat.com/")
    binding = platform.binding()
    assert (binding.options.auto_typing, platform.cursor()) == (True, "CAES")
    assert binding.base_url == "https://ilinkai.wechat.com"


async def test_a_cursor_is_sealed_as_the_token_is_in_it_and_a_repeated_bind_keeps_it(platform: Platform) -> None:
    await platform.bind(cursor="CAES")
    first = platform.binding().start_cursor or ""
    assert "CAES" not in first
    assert platform.bench.sealer.open(cursor_context(BOT), first) == "CAES"
    await platform.bind(cursor="CAES", options={"auto_typing": True}, id="r2")
    assert platform.binding().start_cursor == first
    await platform.bind(cursor="CAEX", id="r3")
    assert platform.cursor() == "CAEX"


# unbind --------------------------------------------------------------------------------------------------


async def test_an_unbind_of_one_bot_leaves_the_others(platform: Platform) -> None:
    await platform.bind()
    await platform.bind(**OTHER)
    receipt = await platform.say("unbind", bot=BOT)
    assert (receipt.outcome, receipt.bots, platform.bound) == ("applied", [BOT], {"b2@im.bot": "s1"})


async def test_an_unbind_of_all_takes_those_of_the_sandbox(platform: Platform) -> None:
    await platform.bind()
    await platform.bind(**OTHER)
    await platform.bind(sandbox="s2", bot="b3@im.bot", user="u3@im.wechat")
    receipt = await platform.say("unbind", all=True, id="r9")
    assert (receipt.bots, platform.bound) == ([BOT, "b2@im.bot"], {"b3@im.bot": "s2"})
    assert platform.changes[-2:] == [("s1", BOT, "unbound"), ("s1", "b2@im.bot", "unbound")]


async def test_an_unbind_that_names_nobody_is_refused(platform: Platform) -> None:
    """One that forgot the bot must not unbind everybody."""
    await platform.bind()
    receipt = await platform.say("unbind")
    assert (receipt.outcome, receipt.reason, platform.bound) == ("refused", "invalid", {BOT: "s1"})


@pytest.mark.parametrize("fields", [{"all": True}, {"bot": BOT}])
async def test_an_unbind_that_finds_nobody_is_applied(fields: dict[str, Any], platform: Platform) -> None:
    await platform.bind(sandbox="s2")
    receipt = await platform.say("unbind", **fields)
    assert (receipt.outcome, receipt.bots, platform.bound) == ("applied", [], {BOT: "s2"})


def writes(platform: Platform, text: str = "hello") -> None:
    """The persons of s1 write, and one of s2."""
    bench = platform.bench
    for binding in [each for each in bench.bindings if each.sandbox in ("s1", "s2")]:
        subject = bench.persons.subject(binding.key)
        entry = Entry(since=binding.since, messages=[msgspec.Raw(msgspec.json.encode({"text": text}))])
        bench.bus.put(subject, encode_entry(entry, Secrets(), subject, bench.sealer), {})


def inbox(platform: Platform, sandbox: str = "s1") -> list[str]:
    stored = [each for each in platform.bench.bus.found("IN") if each.subject.split(".")[2] == sandbox]
    return [msgspec.json.decode(raw)["text"] for each in stored for raw in messages_of(each.data)]


async def test_an_unbind_of_one_of_two_persons_costs_the_other_nothing(platform: Platform) -> None:
    await platform.bind()
    await platform.bind(**OTHER)
    await platform.bind(sandbox="s2", bot="b3@im.bot", user="u3@im.wechat")
    writes(platform)
    assert inbox(platform) == ["hello"] * 2
    await platform.say("unbind", bot=BOT)
    assert inbox(platform) == ["hello"]
    await platform.say("unbind", all=True)
    assert (inbox(platform), inbox(platform, "s2")) == ([], ["hello"])


async def test_an_unbind_ends_what_waits_for_the_person_behind_a_request_that_is_out(platform: Platform) -> None:
    bench = platform.bench
    await platform.bind()
    await bench.wrote("in:1")
    bench.chat.took_s = 20
    partition = platform.partition()
    for number in range(3):
        partition.on_delivery(bench.command(f"words {number}", id=f"c{number}"))
    await asyncio.sleep(5)
    delivery = platform.publish("unbind", all=True)
    await asyncio.sleep(5)
    assert (delivery.acks, bench.bus.receipts()) == (0, [])
    await asyncio.sleep(20)
    assert delivery.acks == 1
    ends = [(each.command, each.outcome, each.reason) for each in bench.bus.receipts()]
    assert ends == [("c0", "accepted", ""), ("c1", "refused", "not_bound"), ("c2", "refused", "not_bound")]


async def test_only_the_sandbox_waits_while_it_is_unbound(platform: Platform) -> None:
    """Its own commands, and binds behind it, wait; those of another sandbox of the partition do not."""
    bench = platform.bench
    number = bench.names.partition_of("s1")
    near = next(name for name in (f"n{at}" for at in range(999)) if bench.names.partition_of(name) == number)
    await platform.bind()
    await platform.bind(sandbox=near, **OTHER)
    await bench.wrote("in:1")
    await bench.wrote("in:2", bot="b2@im.bot", user="u2@im.wechat")
    bench.chat.took_s = 20
    partition = platform.partition()
    partition.on_delivery(bench.command("words", id="a"))
    await asyncio.sleep(1)
    bench.chat.took_s = 0
    unbind = platform.publish("unbind", all=True)
    bind = platform.publish_bind("b3@im.bot", user="u3@im.wechat")
    partition.on_delivery(bench.command("for the next one", id="b", user="u3@im.wechat"))
    partition.on_delivery(bench.command("near", sandbox=near, id="c"))
    await asyncio.sleep(5)
    assert (unbind.acks, bind.acks) == (0, 0)
    assert [(each.command, each.outcome) for each in bench.bus.receipts()] == [("c", "accepted")]
    await asyncio.sleep(20)
    assert (unbind.acks, bind.acks) == (1, 1)
    ends = {each.command: (each.outcome, each.reason) for each in bench.bus.receipts()}
    assert (ends["a"], ends["b"]) == (("accepted", ""), ("parked", "window_closed"))


async def test_an_unbind_waits_for_an_answer_that_is_being_stored(platform: Platform) -> None:
    """Its ring would come behind the end, when the next person's agent listens."""
    bench = platform.bench
    await platform.bind()
    session = bench.replica.parts.sessions.polled.get(BOT)
    assert session is not None
    session.is_polling = True
    unbind = platform.publish("unbind", all=True)
    await asyncio.sleep(30)
    assert (unbind.acks, bench.polled_now) == (0, [BOT])
    session.is_polling = False
    bench.replica.parts.sessions.changed.notify_all()
    await asyncio.sleep(1)
    assert unbind.acks == 1


async def test_a_record_is_marked_as_deleted_also_where_there_was_none(platform: Platform) -> None:
    """A former owner that has never saved expects no record."""
    await platform.bind()
    await platform.say("unbind", all=True)
    key = f"s1.{person_token('s1', USER)}"
    entry = platform.bench.person_bucket.entries[key]
    assert (entry.value, platform.bench.person_bucket.ttls[key] > 0) == (None, True)


async def test_who_was_unbound_writes_nothing_over_the_mark(platform: Platform) -> None:
    """A replica that was frozen before its save goes on behind the unbind: with a record, and without one."""
    await platform.bind()
    late = await platform.bench.person()
    late.state = msgspec.structs.replace(late.state, token="late")
    await platform.say("unbind", all=True)
    marked = dict(platform.bench.person_bucket.entries)
    with pytest.raises(Temporary, match="stale_read"):
        await late.save()
    assert (platform.bench.person_bucket.entries, late.gone) == (marked, "not_bound")
    await platform.bind()
    again = await platform.bench.person()
    await again.save()
    saved = dict(platform.bench.person_bucket.entries)
    with pytest.raises(Temporary, match="stale_read"):
        await late.save()
    assert platform.bench.person_bucket.entries == saved


# whose a command is --------------------------------------------------------------------------------------


async def test_a_command_of_before_a_bind_never_reaches_whom_it_has_bound(platform: Platform) -> None:
    """As a copy by the router may: it has the place of its original."""
    bench = platform.bench
    old = bench.command("for whoever was there", id="c1", user=USER)
    await platform.bind()
    await bench.wrote("in:1")
    platform.partition().on_delivery(old)
    await asyncio.sleep(5)
    (receipt,) = bench.bus.receipts()
    assert (receipt.outcome, receipt.reason, bench.chat.sent) == ("refused", "not_bound", [])


BEFORE_AND_AFTER: list[tuple[str, dict[str, Any], tuple[str, str]]] = [
    ("one-is-left", {}, ("accepted", USER)),
    ("it-names-the-later-one", {"user": "u2@im.wechat"}, ("refused", "not_bound")),
    ("it-names-the-later-bot", {"bot": "b2@im.bot"}, ("refused", "not_bound")),
]


@pytest.mark.parametrize(
    ("fields", "end"), [row[1:] for row in BEFORE_AND_AFTER], ids=[row[0] for row in BEFORE_AND_AFTER]
)
async def test_a_command_is_for_who_was_bound_when_it_was_stored(
    fields: dict[str, Any], end: tuple[str, str], platform: Platform
) -> None:
    bench = platform.bench
    await platform.bind()
    await bench.wrote("in:1")
    old = bench.command("words", id="c1", **fields)
    await platform.bind(**OTHER)
    platform.partition().on_delivery(old)
    await asyncio.sleep(5)
    (receipt,) = bench.bus.receipts()
    assert (receipt.outcome, receipt.reason or receipt.user) == end


async def test_the_same_person_keeps_what_was_parked(platform: Platform) -> None:
    """A new login, or other options."""
    bench = platform.bench
    await platform.bind()
    platform.partition().on_delivery(bench.command("words", id="c1"))
    await asyncio.sleep(5)
    await platform.bind(options={"auto_typing": True})
    await platform.bind(bot="b2@im.bot")
    await bench.wrote("in:1", bot="b2@im.bot")
    await asyncio.sleep(5)
    assert [each.outcome for each in bench.bus.receipts()] == ["parked", "accepted"]


# refused -------------------------------------------------------------------------------------------------


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("url-of-a-stranger", {"base_url": "https://evil.example"}, "url"),
    ("bot-with-a-space", {"bot": "b 1"}, "invalid"),
    ("token-with-a-line-break", {"bot_token": "x\r\nX-Evil: 1"}, "invalid"),
]


@pytest.mark.parametrize(("fields", "reason"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
async def test_a_bind_that_cannot_be_is_refused(fields: dict[str, Any], reason: str, platform: Platform) -> None:
    receipt = await platform.bind(headers={H_MSG_ID: "h1"}, **fields)
    assert (receipt.outcome, receipt.reason, receipt.command) == ("refused", reason, "h1")
    assert receipt.detail
    assert (platform.bound, platform.changes) == ({}, [])


@pytest.mark.parametrize(("sandbox", "outcome"), [("s1", "applied"), ("s2", "refused")])
@pytest.mark.parametrize("verb", ["bind", "unbind", "erase"])
async def test_a_sandbox_in_the_body_is_the_subjects(
    verb: str, sandbox: str, outcome: str, platform: Platform
) -> None:
    body = {"sandbox": sandbox, "bot": BOT, "bot_token": TOKEN, "user": USER}
    delivery = platform.publish(verb, msgspec.json.encode(body))
    await asyncio.sleep(5)
    (receipt,) = platform.bench.bus.receipts(verb)
    assert (delivery.acks, receipt.outcome) == (1, outcome)


@pytest.mark.parametrize("sandbox", ["S1", "_", "sö"])
async def test_a_name_that_is_no_sandboxs_is_refused(sandbox: str, platform: Platform) -> None:
    receipt = await platform.bind(sandbox=sandbox)
    assert (receipt.outcome, receipt.reason, platform.bound) == ("refused", "invalid", {})


UNREADABLE = [
    ("no-json", b"hello", "h1", "unreadable"),
    ("no-token", b'{"id":"r1","bot":"b1@im.bot"}', "r1", "unreadable"),
    ("sandbox-with-a-dot", b'{"id":"r1","sandbox":"s.1","bot":"b","bot_token":"SECRET"}', "r1", "unreadable"),
    ("bot-too-long", msgspec.json.encode({"id": 1, "bot": "b" * 129, "bot_token": "SECRET"}), "h1", "unreadable"),
    ("nested-without-end", b'{"sandbox":' + b"[" * 5000, "h1", "unreadable"),
    ("too-large", b'{"id":"r1","bot":"b","bot_token":"' + b"x" * 263_000 + b'"}', "r1", "too_large"),
]


@pytest.mark.parametrize(
    ("body", "ident", "reason"), [row[1:] for row in UNREADABLE], ids=[row[0] for row in UNREADABLE]
)
async def test_what_is_no_bind_is_put_aside_without_its_secret(
    body: bytes, ident: str, reason: str, platform: Platform
) -> None:
    delivery = platform.publish("bind", body, headers={"Authorization": "SECRET", H_MSG_ID: "h1"})
    await asyncio.sleep(1)
    assert delivery.acks == 1
    (dead,) = platform.bench.bus.found("DEAD")
    assert (dead.subject, dead.data) == ("wechat.dead.WECHAT_OUT", b"")
    assert "SECRET" not in str(dead.headers)
    assert H_REPLY_TO not in dead.headers
    receipt = msgspec.json.decode(platform.bench.core.published[-1][1], type=Receipt)
    assert (receipt.outcome, receipt.reason, receipt.command) == ("dead_lettered", reason, ident)
    assert "SECRET" not in receipt.detail
    assert "regex" not in receipt.detail
    assert ("1 to 64 characters of a-z, 0-9, - and _" in receipt.detail) == (b"s.1" in body)


async def test_an_unbind_that_nobody_can_read_is_kept_whole(platform: Platform) -> None:
    """It holds no secret."""
    platform.publish("unbind", b'{"sandbox":5}')
    await asyncio.sleep(1)
    (dead,) = platform.bench.bus.found("DEAD")
    assert (dead.data, dead.headers["Wechat-Subject"]) == (b'{"sandbox":5}', "wechat.unbind.s1")


@pytest.mark.parametrize("verb", ["unbind", "erase", "bind"])
async def test_a_binding_that_a_newer_version_wrote_is_left_to_that_version(verb: str, platform: Platform) -> None:
    await platform.bind()
    key = to_subject_token(BOT)
    text = made_newer(platform.bench.bindings_bucket.entries[key].value or b"")
    platform.bench.bindings_bucket.put(key, text)
    writes(platform)
    bodies: dict[str, dict[str, Any]] = {
        "unbind": {"all": True},
        "erase": {"user": USER},
        "bind": {"bot": BOT, "bot_token": TOKEN},
    }
    receipt = await platform.say(verb, **bodies[verb])
    assert (receipt.outcome, receipt.reason, "newer version" in receipt.detail) == ("refused", "too_new", True)
    assert platform.bench.bindings_bucket.entries[key].value == text
    assert inbox(platform) == ["hello"]


# answers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reply_to",
    ["", "wechat.out.s1", "wechat.bind.s1", "$JS.API.STREAM.DELETE.WECHAT_IN", "_INBOX.*", "_INBOX.>", "_INBOX.a b",
     "_INBOX.a\r\nPUB x 0", "_INBOX", "_INBOX.", "_INBOX..a", "_INBOX.a.", "_INBOX.ä", "inbox.a",
     "_INBOX." + "a" * 300],
)  # fmt: skip
async def test_an_answer_goes_to_an_inbox_or_nowhere(reply_to: str, platform: Platform) -> None:
    """The adapter may write where its caller may not: nobody borrows that."""
    delivery = platform.publish("bind", reply_to=reply_to, bot=BOT, bot_token=TOKEN)
    await asyncio.sleep(1)
    assert platform.bench.core.published == []
    assert (delivery.acks, platform.bound) == (1, {BOT: "s1"})


async def test_an_answer_that_nobody_receives_is_no_failure(platform: Platform) -> None:

    async def fail(subject: str, payload: bytes, headers: dict[str, str]) -> None:
        raise Temporary("bus_down")

    platform.bench.core.publish = fail  # type: ignore[method-assign]
    delivery = platform.publish("unbind", all=True)
    await asyncio.sleep(1)
    assert delivery.acks == 1


# order, repeats and trouble ------------------------------------------------------------------------------


async def test_they_take_effect_in_the_order_in_which_they_were_stored(platform: Platform) -> None:
    for number in range(5):
        platform.publish_bind(id=f"b{number}")
        platform.publish("unbind", all=True, id=f"u{number}")
    await asyncio.sleep(5)
    assert [change for *_, change in platform.changes] == ["bound", "unbound"] * 5
    assert platform.bound == {}


SAID: dict[str, dict[str, Any]] = {
    "bind": {"bot": BOT, "bot_token": f"{BOT}:NEWER", "user": USER},
    "unbind": {"all": True},
    "erase": {"user": USER},
}


def stored(platform: Platform) -> list[object]:
    """All that is stored but what is said."""
    bench = platform.bench
    buckets = [dict(bucket.entries) for bucket in (bench.bindings_bucket, bench.person_bucket)]
    return [*buckets, [kept.stored for kept in bench.bus.kept if kept.stream != "WECHAT_OUT"]]


@pytest.mark.parametrize("taken_over", [False, True], ids=["same-owner", "next-owner"])
@pytest.mark.parametrize(
    ("first", "later"), [pair for pair in itertools.product(SAID, SAID) if pair != ("bind", "erase")]
)
async def test_one_whose_ack_was_lost_is_not_applied_behind_a_later_one(
    first: str, later: str, taken_over: bool
) -> None:
    """An old bind would undo the unbind after it, and an old unbind or erase the bind."""
    platform = Platform()
    await platform.bind(id="b0")
    writes(platform)
    old = platform.publish_bind(user=USER) if first == "bind" else platform.publish(first, **SAID[first])
    await asyncio.sleep(5)
    await platform.say(later, **SAID[later])
    writes(platform, "hello again")
    before = stored(platform)
    owner = platform.next_owner() if taken_over else platform
    await owner.begin()
    repeated = owner.again(old)
    await asyncio.sleep(30)
    assert repeated.acks == 1
    assert stored(owner) == before


async def test_an_unbind_means_nobody_who_was_bound_behind_it(platform: Platform) -> None:
    """Its receipt is gone, which is kept for days."""
    unbind = platform.publish("unbind", all=True)
    await asyncio.sleep(5)
    await platform.bind()
    platform.bench.bus.kept = [kept for kept in platform.bench.bus.kept if ".unbind." not in kept.stored.subject]
    repeated = platform.again(unbind)
    await asyncio.sleep(5)
    assert (repeated.acks, platform.bound) == (1, {BOT: "s1"})


async def test_one_that_comes_again_while_it_is_applied_is_settled_by_its_newest_delivery(platform: Platform) -> None:
    bind = platform.publish_bind()
    repeated = platform.again(bind)
    await asyncio.sleep(5)
    assert (bind.acks, repeated.acks) == (0, 1)
    assert platform.changes == [("s1", BOT, "bound")]


async def test_the_next_owner_knows_the_bots_that_the_one_before_has_bound(platform: Platform) -> None:
    """Its own copy of the bucket may lag."""
    await platform.bind()
    later = platform.next_owner()
    await later.begin()
    assert (await later.bind(bot="b2@im.bot")).bots == [BOT]
    later = later.next_owner()
    await later.begin()
    assert (await later.say("unbind", all=True)).bots == ["b2@im.bot"]
    assert [entry.value for entry in platform.bench.bindings_bucket.entries.values()] == [None, None]


@pytest.mark.parametrize("stream", ["event", "person", "in"])
async def test_what_fails_is_tried_again(stream: str, platform: Platform) -> None:
    await platform.bind()
    fails = Failing(3, Temporary("bus_down"))

    async def on_publish(message: BusMessage) -> None:
        if message.stream == stream:
            await fails()

    platform.bench.bus.on_publish = on_publish
    if stream == "person":
        platform.bench.person_bucket.on_write = fails
    delivery = platform.publish("unbind", all=True)
    await asyncio.sleep(30)
    assert (fails.left, delivery.acks, platform.bound) == (0, 1, {})


async def test_a_bind_that_breaks_the_adapter_is_put_aside_and_the_next_one_goes(platform: Platform) -> None:

    async def bug(key: str) -> None:
        if key.startswith("bad"):
            raise RuntimeError("a bug")

    platform.bench.bindings_bucket.on_write = bug
    with capture_logs() as logs:
        bad = platform.publish_bind("bad@im.bot")
        platform.publish_bind()
        await asyncio.sleep(120)
    assert "work.crashed" in [line["event"] for line in logs]
    assert (bad.acks, platform.bound) == (1, {BOT: "s1"})
    assert [each.outcome for each in platform.bench.bus.receipts("bind")] == ["dead_lettered", "applied"]
    (dead,) = platform.bench.bus.found("DEAD")
    assert dead.data == b""


@pytest.mark.parametrize("ended", [False, True])
async def test_who_was_to_be_unbound_goes_on_where_the_unbind_breaks_the_adapter(
    ended: bool, platform: Platform
) -> None:
    """A person whose end is stored by then begins a new time."""
    bench = platform.bench
    first = await platform.bind()
    await bench.wrote("in:1")
    publish, end = bench.events.publish_binding_event, bench.persons.end

    async def bug(event: BindingEvent, **options: Any) -> None:
        if event.change == "unbound":
            raise RuntimeError("a bug")
        await publish(event, **options)

    async def bug_before(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    if ended:
        bench.events.publish_binding_event = bug  # type: ignore[method-assign]
    else:
        bench.persons.end = bug_before  # type: ignore[method-assign]
    unbind = platform.publish("unbind", all=True)
    behind = bench.command("words", id="c1")
    platform.partition().on_delivery(behind)
    await asyncio.sleep(120)
    assert (unbind.acks, len(bench.bus.found("DEAD"))) == (1, 1)
    assert platform.binding().since == (unbind.seq if ended else first.sequence)
    person = await bench.person()
    assert (person.gone, person.bot is not None) == ("", True)
    assert [each.outcome for each in bench.bus.receipts()] == ["parked" if ended else "accepted"]
    bench.persons.end = end  # type: ignore[method-assign]
    bench.events.publish_binding_event = publish  # type: ignore[method-assign]
    assert (await platform.say("unbind", all=True)).bots == [BOT]


async def test_an_event_that_the_bus_refuses_stops_nothing(platform: Platform) -> None:
    bench = platform.bench
    bench.bus.refuse = lambda message: (
        BusRefused(10054, "too large") if message.subject.endswith(".binding") else None
    )
    assert (await platform.bind()).outcome == "applied"


async def test_a_full_event_stream_is_waited_for(platform: Platform) -> None:
    full = BusRefused(10077, "maximum bytes exceeded")
    platform.bench.bus.refuse = lambda message: full if message.stream == "event" else None
    delivery = platform.publish_bind()
    await asyncio.sleep(30)
    assert delivery.acks == 0
    platform.bench.bus.refuse = lambda message: None
    await asyncio.sleep(30)
    assert (delivery.acks, platform.changes) == (1, [("s1", BOT, "bound")])


@pytest.mark.parametrize("when", ["before", "behind", "ended", "taken over"])
@pytest.mark.parametrize("verb", SAID)
async def test_a_command_that_names_its_sequence_and_id_stops_none(verb: str, when: str) -> None:
    """A sandbox may set these headers. Receipts of both have subjects of their own."""
    platform = Platform()
    bench = platform.bench
    await platform.bind(id="b0")
    await bench.wrote("in:1")
    said = bench.command(verb=verb, data=msgspec.json.encode(SAID[verb] | {"id": "r1"}))

    def name_it() -> FakeDelivery:
        headers = {H_ORIGINAL: f"{said.seq}.{said.time_ms}", H_COMMAND: "r1"}
        naming = bench.command("words", id="r1", headers=headers)
        platform.partition().on_delivery(naming)
        return naming

    naming = [name_it()] if when == "before" else []
    await asyncio.sleep(2)
    platform.partition().on_delivery(said)
    naming += [name_it()] if when == "behind" else []
    await asyncio.sleep(5)
    naming += [name_it()] if when == "ended" else []
    if when == "taken over":
        assert said.acks == 1
        platform = platform.next_owner()
        await platform.begin()
        if verb == "bind":
            await platform.bench.wrote("in:2")
        naming.append(name_it())
        said = platform.again(said)
    await asyncio.sleep(30)
    assert (said.acks, [each.acks for each in naming]) == (1, [1])
    (receipt,) = [each for each in bench.bus.receipts(verb) if each.sequence == said.seq]
    assert (receipt.command, receipt.outcome) == ("r1", "applied")
    assert platform.bound == ({BOT: "s1"} if verb == "bind" else {})
    if verb == "bind":
        assert platform.token() == f"{BOT}:NEWER"


# secrets -------------------------------------------------------------------------------------------------


async def test_no_token_is_in_a_receipt_an_event_a_log_or_a_repr(platform: Platform) -> None:
    with capture_logs() as logs:
        await platform.bind()
        await platform.bind(bot_token="b1@im.bot:SECRET2")
        await platform.bind(base_url="https://evil.example")
        platform.publish("bind", sandbox="S1", bot=BOT, bot_token=TOKEN)
        await asyncio.sleep(1)
        await platform.say("unbind", all=True)
    bench = platform.bench
    said = [payload for _, payload, _ in bench.core.published]
    stored = [k.stored.data + str(k.stored.headers).encode() for k in bench.bus.kept if k.stream != "WECHAT_OUT"]
    sealed = [entry.value or b"" for entry in bench.bindings_bucket.entries.values()]
    for data in (*said, *stored, *sealed, str(logs).encode(), repr(list(bench.bindings)).encode()):
        assert b"SECRET" not in data


def test_a_bind_shows_no_token() -> None:
    """Nor does what holds one: a repr ends in logs and tracebacks."""
    bind = Bind(bot=BOT, bot_token=TOKEN)
    assert "SECRET" not in f"{bind!r} {bind} {[bind]}"
    assert "SECRET" not in repr(Binding(sandbox="s1", bot=BOT, token=TOKEN))


async def test_a_bind_of_a_login_has_its_token_sealed_for_bot_and_sandbox() -> None:
    platform = Platform(Bench())
    sealed = platform.bench.sealer.seal(f"bind s1 {BOT}", TOKEN)
    assert (await platform.bind(bot_token=sealed)).outcome == "applied"
    assert platform.token() == TOKEN
    await platform.say("unbind", all=True)
    assert (await platform.bind(sandbox="s2", bot_token=sealed)).reason == "token_key"
    assert Sealer((bytes(32),)).sealing_of(sealed) == "sealed"
