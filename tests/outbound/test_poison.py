"""A command that makes the code raise: it has one final receipt and a dead letter, and the others go on in order."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest

from adapter.bridge import partition as outbound
from adapter.bridge import sending, sessions
from adapter.bridge.partition import Partition
from adapter.bridge.parts import Bodies
from adapter.contract.names import H_REASON, H_SUBJECT
from adapter.ports import Account, BusMessage, Content
from tests.capture import ALWAYS, WORDS, Bugs, Capture
from tests.fakes import Bench, FakeDelivery
from tests.outbound.partitions import BOT, STALE, USER, finals, free_slots, parked, ready, user_writes

VIRTUAL_TIME = True

OTHER_BOT, OTHER = "b2@im.bot", "u2@im.wechat"


Fault = Callable[[pytest.MonkeyPatch, Bench, Partition, Bugs], None]
"""Makes a port raise for the command at fault."""


def calling(find: Callable[[Bench, Partition], object], name: str, is_at_fault: Callable[..., bool]) -> Fault:
    """What raises is `name` of the found object, at calls that `is_at_fault`."""

    def fault(patch: pytest.MonkeyPatch, bench: Bench, partition: Partition, bugs: Bugs) -> None:
        owner = find(bench, partition)
        real = getattr(owner, name)

        def fails(*args: Any, **fields: Any) -> Any:
            if is_at_fault(*args, **fields):
                bugs.strike()
            return real(*args, **fields)

        patch.setattr(owner, name, fails)

    return fault


def always(*_: Any, **__: Any) -> bool:
    return True


def is_bad_send(account: Account, *, content: Content, **_: Any) -> bool:
    return isinstance(content, str) and WORDS in content


def once_it_has_left(_: pytest.MonkeyPatch, bench: Bench, __: Partition, bugs: Bugs) -> None:
    async def fails(sent: Any) -> None:
        if WORDS in sent.text:
            bugs.strike()

    bench.chat.on_send = fails


def receipt(patch: pytest.MonkeyPatch, bench: Bench, partition: Partition, bugs: Bugs) -> None:
    async def fails(message: BusMessage) -> None:
        if ".receipt." in message.subject and b'"bad"' in message.payload:
            bugs.strike()

    bench.bus.on_publish = fails


def checking(patch: pytest.MonkeyPatch, bench: Bench, partition: Partition, bugs: Bugs) -> None:
    """iLink says -14 to the command at fault, and notifystart raises."""
    real = bench.chat.send

    async def refuses(account: Account, *, content: Content, **fields: Any) -> Any:
        if is_bad_send(account, content=content) and bugs.left:
            raise STALE
        return await real(account, content=content, **fields)

    patch.setattr(bench.chat, "send", refuses)
    calling(lambda bench, _: bench.chat, "notify", always)(patch, bench, partition, bugs)


def of_bad(*args: Any, **_: Any) -> bool:
    """One of the arguments is about the command at fault."""
    commands = [getattr(one, "ref", None) for one in args]
    heads = [getattr(one, "progress", None) for one in args]
    ids = [ref.id for ref in (*commands, *(ref for head in heads if head for ref in head.commands)) if ref]
    return "bad" in ids


def is_first_bad(queue: Sequence[sending.QueuedCommand], *_: Any) -> bool:
    return queue[0].ref.id == "bad"


def asked_of_bad(_: str, refs: Sequence[Any], __: str) -> bool:
    return "bad" in [ref.id for ref in refs]


TEXT: dict[str, Any] = {"text": WORDS}
FILE: dict[str, Any] = {"items": [{"kind": "file", "name": "a.txt", "data": "aGVsbG8="}]}
OBJECT: dict[str, Any] = {"items": [{"kind": "file", "media": {"object": "s1/x"}}]}
TYPING: dict[str, Any] = {"typing": "on"}
DEAD = ("dead_lettered", "crashed")
SENT = ("accepted", "")
UNCERTAIN = ("uncertain", "")


class Step(NamedTuple):
    """A step of a command at which the code raises."""

    name: str
    fault: Fault
    body: dict[str, Any] = TEXT
    ending: tuple[str, str] = DEAD
    times: int = ALWAYS
    redelivered: bool = False
    """It was delivered before."""
    outlives: int = 2
    """So many strikes leave the command as it is."""


CHAT = lambda bench, _: bench.chat  # noqa: E731
SANDBOX = lambda _, partition: partition._sandbox("s1")  # noqa: E731
SHOWN = lambda _, partition: partition.typing  # noqa: E731
STEPS = [
    Step("read", calling(lambda *_: outbound, "read_command", lambda body, **_: WORDS in body.text), outlives=0),
    Step("place", calling(SANDBOX, "_binding_for", of_bad), outlives=0),
    Step("placed-again", calling(SANDBOX, "_binding_for", of_bad), redelivered=True, outlives=0),
    Step("finals", calling(lambda bench, _: bench.receipts, "find", asked_of_bad), TEXT, UNCERTAIN, redelivered=True),
    Step("decision", calling(lambda *_: sending, "next_message", is_first_bad)),
    Step("record", calling(lambda bench, _: bench.persons, "save", of_bad)),
    Step("slot", calling(lambda bench, _: bench.slots, "try_acquire", always), times=4),
    Step("upload", calling(lambda bench, _: bench.cdn, "upload", always), FILE),
    Step("object", calling(lambda bench, _: bench.objects, "get_info", always), OBJECT),
    Step("before-it-leaves", calling(CHAT, "send", is_bad_send), TEXT, UNCERTAIN, outlives=1),
    Step("once-it-has-left", once_it_has_left, TEXT, UNCERTAIN, outlives=1),
    Step("session", checking),
    Step("ticket", calling(CHAT, "typing_ticket", always), TYPING, SENT),
    Step("shown", calling(CHAT, "show_typing", always), TYPING, SENT),
    Step("typing", calling(SHOWN, "show", always), TYPING),
    Step("hidden", calling(SHOWN, "hide", always), TEXT, SENT),
    Step("receipt", receipt, TEXT, SENT, times=3),
]


def dead(bench: Bench) -> list[tuple[str, str, bytes]]:
    return [(stored.headers[H_REASON], stored.headers[H_SUBJECT], stored.data) for stored in bench.bus.found("DEAD")]


def ended(bench: Bench) -> list[tuple[str, str, str]]:
    return [(receipt.command, receipt.outcome, receipt.reason) for receipt in finals(bench)]


async def two_users() -> tuple[Bench, Partition]:
    bench = Bench()
    await bench.bind()
    await bench.bind(bot=OTHER_BOT, user=OTHER)
    bench.hears()
    bench.hears("s1", OTHER, bot=OTHER_BOT)
    bench.objects.stored["s1/x"] = b"hello"
    return bench, bench.partition(gap_ms=0)


async def three_commands(
    step: Step, times: int, patch: pytest.MonkeyPatch
) -> tuple[Bench, Partition, list[FakeDelivery]]:
    """One before the one at fault, one behind it, and one for another user."""
    bugs = Bugs(0)
    bench, partition = await two_users()
    take = partition.on_delivery
    step.fault(patch, bench, partition, bugs)
    before = bench.command("before", id="before", user=USER)
    take(before)
    await asyncio.sleep(1)
    bugs.left = times
    bad = bench.command(id="bad", user=USER, redelivered=step.redelivered, **step.body)
    take(bad)
    await asyncio.sleep(5 if step.name == "slot" else 0)  # it is not asked for by name
    take(bench.command("for another", id="other", user=OTHER))
    await asyncio.sleep(5 if step.redelivered or step.body is TYPING else 0)  # what is sent ends it
    after = bench.command("after", id="after", user=USER)
    take(after)
    await asyncio.sleep(400)
    bugs.left = 0
    return bench, partition, [before, bad, after]


def check_nothing_is_left(bench: Bench, partition: Partition, deliveries: list[FakeDelivery]) -> None:
    assert partition.queue_depths(Counter()) == (0, None)
    assert partition.tasks == 0
    assert free_slots(bench) == 8
    assert [one.acks for one in deliveries] == [1, 1, 1]
    assert bench.chat.overlaps == 0
    assert len({sent.client_id for sent in bench.chat.sent if sent.text == WORDS}) <= 1


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
async def test_the_command_at_fault_ends_and_the_others_go_on(
    step: Step, captured: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, partition, deliveries = await three_commands(step, step.times, monkeypatch)
    own = [one for one in ended(bench) if one[0] != "other"]
    assert own == [("before", *SENT), ("bad", *step.ending), ("after", *SENT)]
    assert ("other", *SENT) in ended(bench)
    others = [text for text in bench.chat.texts if text in ("before", "after")]
    assert others == ["before", "after"]
    (body,) = [stored.data for stored in bench.bus.found("OUT") if stored.seq == deliveries[1].seq]
    assert dead(bench) == ([("crashed", "wechat.out.s1", body)] if step.ending == DEAD else [])
    assert captured.crashes()
    assert WORDS.encode() not in captured.getvalue()
    check_nothing_is_left(bench, partition, deliveries)


@pytest.mark.parametrize(("step", "times"), [(one, n + 1) for one in STEPS for n in range(one.outlives)])
async def test_a_fault_that_ends_leaves_the_command_as_it_is(
    step: Step, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, partition, deliveries = await three_commands(step, times, monkeypatch)
    own = [one for one in ended(bench) if one[0] != "other"]
    assert own == [("before", *SENT), ("bad", *SENT), ("after", *SENT)]
    assert dead(bench) == []
    if step.body is TEXT:
        assert [one.text for one in bench.chat.taken.values() if one.user == USER] == ["before", WORDS, "after"]
    check_nothing_is_left(bench, partition, deliveries)


# what is no single command's fault --------------------------------------------------------------------------


async def test_commands_wait_while_the_account_cannot_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    bugs = Bugs(ALWAYS)
    bench = Bench()
    await bench.bind()
    await bench.bind(bot=OTHER_BOT, user=OTHER)
    bench.hears()
    bench.hears("s1", OTHER, bot=OTHER_BOT)

    def account(binding: Any, sealer: object) -> Account:
        if binding.bot == BOT:
            bugs.strike()
        return Account(binding.bot, binding.token, "")

    monkeypatch.setattr(sessions, "account_of", account)
    partition = bench.partition(gap_ms=0)
    for text, user in ((WORDS, USER), ("for another", OTHER), ("after", USER)):
        partition.on_delivery(bench.command(text, id=text, user=user))
    await asyncio.sleep(30)
    assert bench.chat.texts == ["for another"]
    assert parked(bench) == [WORDS, "after"]
    bugs.left = 0
    await asyncio.sleep(70)
    assert bench.chat.texts == ["for another", WORDS, "after"]
    assert len(finals(bench)) == 3


async def test_reading_back_that_crashes_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of commands beyond the room of the replica."""
    bench, partition = await ready(gap_ms=0, bodies=Bodies(100))
    bugs = Bugs(2)
    calling(lambda bench, _: bench.bus, "get", always)(monkeypatch, bench, partition, bugs)
    for number in range(20):
        partition.on_delivery(bench.command(f"t{number}", id=f"c{number}"))
    await asyncio.sleep(60)
    assert bugs.left == 0
    assert bench.chat.texts == [f"t{number}" for number in range(10)]  # the window's ten sends
    assert len(parked(bench)) == 10


async def test_what_crashes_at_each_attempt_is_tried_three_times(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, partition = await ready(gap_ms=0, bodies=Bodies(0))
    bugs = Bugs(ALWAYS)
    calling(lambda bench, _: bench.bus, "get", always)(monkeypatch, bench, partition, bugs)
    partition.on_delivery(bench.command("hi", id="c1"))
    await asyncio.sleep(60)
    assert [(one.command, one.outcome) for one in finals(bench)] == [("c1", "dead_lettered")]
    assert ALWAYS - bugs.left == 3 + 1  # once for the dead letter


async def test_a_receipt_that_cannot_be_written_at_all_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command stays on the bus for the next owner, who does not send it again."""
    bench, partition = await ready(gap_ms=0)
    bugs = Bugs(ALWAYS)
    receipt(monkeypatch, bench, partition, bugs)
    bad = bench.command(WORDS, id="bad")
    partition.on_delivery(bad)
    partition.on_delivery(bench.command("after", id="after"))
    await asyncio.sleep(60)
    assert ended(bench) == [("after", *SENT)]
    assert bad.acks == 0
    assert partition.tasks == 0
    partition.stop()
    bugs.left = 0
    heir = Bench(bench, instance="heir-1")
    heir.redeliver(heir.partition(gap_ms=0))
    await asyncio.sleep(30)
    assert bench.chat.texts == [WORDS, "after"]
    assert [(one.command, one.outcome, one.repeat_of) for one in finals(bench)][1:] == [("bad", "uncertain", 0)]
    assert all(one.acks for one in bench.deliveries)


async def test_a_command_that_comes_as_another_ends_that_made_opening_raise_is_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench, partition = await ready()
    bugs = Bugs(3)
    calling(lambda bench, _: bench.persons, "load", always)(monkeypatch, bench, partition, bugs)

    async def slow(_: BusMessage) -> None:
        await asyncio.sleep(1)

    bench.bus.on_publish = slow
    partition.on_delivery(bench.command(WORDS, id="bad"))
    while bugs.left:
        await asyncio.sleep(0.1)
    partition.on_delivery(bench.command("after", id="after"))
    await asyncio.sleep(30)
    assert ended(bench) == [("bad", *DEAD), ("after", *SENT)]
    assert bench.chat.texts == ["after"]
    assert partition.tasks == 0


async def test_the_request_that_is_out_ends_by_its_answer_though_a_message_cannot_be_saved() -> None:
    bench, partition = await ready(gap_ms=0)
    hold = bench.chat.hold_sends[USER] = asyncio.Event()
    for text in (WORDS, "after"):
        partition.on_delivery(bench.command(text, id=text))
    await asyncio.sleep(1)
    bugs = Bugs(ALWAYS)

    async def fails(key: str) -> None:
        bugs.strike()

    bench.person_bucket.on_write = fails
    await user_writes(bench)
    bugs.left = 0
    await asyncio.sleep(10)
    hold.set()
    await asyncio.sleep(10)
    assert bench.chat.texts == [WORDS, "after"]
    assert bench.chat.overlaps == 0
    assert ended(bench) == [(WORDS, *SENT), ("after", *SENT)]
    assert free_slots(bench) == 8


# what is parked ----------------------------------------------------------------------------------------------


async def three_parked(**changes: Any) -> tuple[Bench, Partition]:
    bench, partition = await ready(is_open=False, gap_ms=0, **changes)
    for text in ("before", WORDS, "after"):
        partition.on_delivery(bench.command(text, id="bad" if text == WORDS else text))
    return bench, partition


async def test_a_command_that_cannot_be_parked_ends_and_the_others_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, partition = await three_parked()
    receipt(monkeypatch, bench, partition, Bugs(3))
    await asyncio.sleep(30)
    assert parked(bench) == ["before", "after"]
    assert ended(bench) == [("bad", *DEAD)]
    await user_writes(bench)
    await asyncio.sleep(30)
    assert bench.chat.texts == ["before", "after"]
    assert ended(bench) == [("bad", *DEAD), ("before", *SENT), ("after", *SENT)]
    assert partition.queue_depths(Counter()) == (0, None)


@pytest.mark.parametrize("merge_chars", [0, 3000])
@pytest.mark.parametrize("times", [2, ALWAYS])
async def test_of_what_cannot_be_read_back_the_one_at_fault_ends_alone(
    merge_chars: int, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, partition = await three_parked(merge_chars=merge_chars)
    await asyncio.sleep(5)
    load = calling(
        lambda _, partition: partition.commands, "_read", lambda commands: 2 in [one.sequence for one in commands]
    )
    load(monkeypatch, bench, partition, Bugs(times))
    await user_writes(bench)
    await asyncio.sleep(60)
    texts = [text for sent in bench.chat.texts for text in sent.split("\n\n")]
    assert texts == (["before", "after"] if times == ALWAYS else ["before", WORDS, "after"])
    ending = DEAD if times == ALWAYS else SENT
    assert ended(bench) == [("before", *SENT), ("bad", *ending), ("after", *SENT)]
    assert partition.queue_depths(Counter()) == (0, None)


async def test_merged_texts_that_may_have_left_are_all_uncertain(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, partition = await three_parked(merge_chars=3000)
    await asyncio.sleep(5)
    once_it_has_left(monkeypatch, bench, partition, Bugs(ALWAYS))
    await user_writes(bench)
    partition.on_delivery(bench.command("last", id="last"))
    await asyncio.sleep(400)
    assert ended(bench) == [*((one, *UNCERTAIN) for one in ("before", "bad", "after")), ("last", *SENT)]
    assert len({sent.client_id for sent in bench.chat.sent if WORDS in sent.text}) == 1
