"""What is decided about a user's commands, row by row. The window's own decisions are in test_window.py."""

from __future__ import annotations

from typing import Any

import msgspec

from adapter.bridge import sending
from adapter.bridge.record import (
    RECENT_COMMANDS,
    SENT_TEXT_CHARS,
    SENT_TEXTS,
    CommandRef,
    PersonState,
    SendProgress,
    SendWindow,
    SentText,
)
from adapter.bridge.sending import (
    CommandResult,
    QueuedCommand,
    SendPolicy,
    ServingBot,
)
from adapter.bridge.window import WindowPolicy
from adapter.errors import AdapterError, Refused, SessionExpired, Temporary, Throttled, Uncertain
from adapter.ports import Accepted, Content, MediaKind, Uploaded
from tests.fakes import FakeDelivery
from tests.outbound.partitions import rows

NOW = 1_000_000_000
POLICY = SendPolicy(window=WindowPolicy(sends=10, hours=24.0), gap_ms=0, merge_chars=100)
BOT = ServingBot("b1", is_usable=True)
YES = Accepted("m1", 0, None, "")
NO_ID = Accepted(None, 0, 7, "sure")


def ref(number: int, *, ident: str = "", named: bool = True) -> CommandRef:
    return CommandRef(sequence=number, stored_ms=NOW, id=ident or f"c{number}", is_named=named)


def command(number: int, text: str = "hello", *, ident: str = "", **fields: Any) -> QueuedCommand:
    made: dict[str, Any] = {
        "sequence": number,
        "ref": ref(number, ident=ident),
        "sandbox": "s1",
        "client_id_base": f"base{number}",
        "kind": "text",
        "parts": [text],
        "part_count": 1,
        "chars": len(text),
        "expires_ms": NOW + 1000,
        "delivery": FakeDelivery("wechat.out.s1", b"", seq=number, time_ms=NOW),
    }
    return QueuedCommand(**made | fields)


def parked(*numbers: int, text: str = "hello", **fields: Any) -> list[QueuedCommand]:
    return [command(number, text, parked=True, **fields) for number in numbers]


def under_way(*numbers: int, **fields: Any) -> SendProgress:
    """A message with these commands whose request was made once, and counted."""
    made: dict[str, Any] = {
        "commands": [ref(number) for number in numbers],
        "client_id_base": f"base{numbers[0]}",
        "bot": "b1",
        "attempts": 1,
        "unanswered_attempts": 1,
        "counted_in_window": "in:1",
    }
    return SendProgress(**made | fields)


def record(progress: SendProgress | None = None, *, used: int = 0, **fields: Any) -> PersonState:
    window = {name: fields.pop(name) for name in list(fields) if name in SendWindow.__struct_fields__}
    opened = SendWindow(**{"id": "in:1", "opened_ms": NOW, "sends_used": used, **window})
    return PersonState(**{"bot": "b1", "token": "t", "window": opened, "progress": progress, **fields})


def numbers(commands: list[QueuedCommand]) -> list[int]:
    return [each.sequence for each in commands]


# before a request -------------------------------------------------------------------------------------

HALF: dict[str, Any] = {"part": 1, "unanswered_attempts": 0}


@rows(
    "first, known, bot, reason",
    {
        "an open window lets it go": (command(1), record(), BOT, ""),
        "a bot whose token is refused sends nothing": (
            command(1),
            record(),
            ServingBot("b1", is_usable=False),
            "needs_login",
        ),
        "nor does it show typing": (
            command(1, typing="on"),
            record(),
            ServingBot("b1", is_usable=False),
            "needs_login",
        ),
        "typing needs no window": (command(1, typing="on"), record(opened_ms=0), BOT, ""),
        "a message needs one": (command(1), record(opened_ms=0), BOT, "window_closed"),
        "a window without a token is none": (command(1), record(token=""), BOT, "window_closed"),
        "all parts must fit before the first": (command(1, part_count=3), record(used=8), BOT, "quota"),
        "parts that fit go": (command(1, part_count=2), record(used=8), BOT, ""),
        "the rest of a command needs room for the next part": (
            (command(1, part_count=3), record(under_way(1, **HALF), used=9), BOT, "")
        ),
        "the rest waits where there is none": (
            (command(1, part_count=3), record(under_way(1, **HALF), used=10), BOT, "quota")
        ),
        "a repeat was counted before": (command(1), record(under_way(1), used=10), BOT, ""),
        "a repeat in a later window needs room there": (
            (command(1), record(under_way(1, counted_in_window="in:0"), used=10), BOT, "quota")
        ),
        "a message that was not begun does not count as begun": (
            (command(1, part_count=3), record(under_way(1, unanswered_attempts=0), used=8), BOT, "quota")
        ),
        "the progress of another command is none of it": (
            (command(2, part_count=3), record(under_way(1), used=8), BOT, "quota")
        ),
        "a -2 blocks what was counted before as well": (
            (command(1), record(under_way(1), throttled_at_ms=NOW), BOT, "throttled")
        ),
    },
)
def test_whether_the_head_may_be_sent(first: QueuedCommand, known: PersonState, bot: ServingBot, reason: str) -> None:
    assert sending.blocker(first, known, bot, POLICY, NOW) == reason


@rows(
    "waits, reason, is_head, expected",
    {
        "a command is parked": (command(1), "quota", True, ("parked", "quota")),
        "one behind it as well": (command(2), "throttled", False, ("parked", "throttled")),
        "one that does not want to wait is refused": (
            (command(1, when_closed="refuse"), "window_closed", False, ("refused", "window_closed"))
        ),
        "typing waits for its bot": (command(1, typing="on"), "needs_login", True, ("parked", "needs_login")),
        "typing behind another is refused": (command(2, typing="on"), "quota", False, ("refused", "quota")),
    },
)
def test_the_receipt_of_a_command_whose_queue_waits(
    waits: QueuedCommand, reason: str, is_head: bool, expected: tuple[str, str]
) -> None:
    result = sending.while_blocked(waits, reason, is_head=is_head)
    assert (result.outcome, result.reason) == expected


@rows(
    "over_s, posted_s, is_answering, due_s",
    {
        "three seconds after its end if iLink answers others": (1.0, 16.0, True, 2.0),
        "at once if it answers them later": (40.0, 55.0, True, -37.0),
        "five minutes after the first one if iLink answers nobody": (40.0, 55.0, False, 245.0),
        "three seconds after its end also then": (1.0, 299.0, False, 2.0),
    },
)
def test_when_a_request_without_an_answer_is_repeated(
    over_s: float, posted_s: float, is_answering: bool, due_s: float
) -> None:
    assert sending.repeat_due_s(over_s, posted_s, is_answering=is_answering) == due_s


@rows(
    "progress, bot, may",
    {
        "one that had no answer once": (under_way(1), "b1", True),
        "not one that had none twice": (under_way(1, unanswered_attempts=2), "b1", False),
        "not through another bot": (under_way(1), "b2", False),
        "what iLink did not take, through any bot": (under_way(1, unanswered_attempts=0), "b2", True),
    },
)
def test_which_request_may_be_made_again(progress: SendProgress, bot: str, may: bool) -> None:
    assert sending.is_repeatable(progress, bot) is may


@rows(
    "queue, known, group",
    {
        "none without a message": (parked(1), record(), []),
        "none of an empty queue": ([], record(under_way(1)), []),
        "none if another command stands before": (parked(1, 2), record(under_way(2)), []),
        "those of the message": (parked(1, 2, 3), record(under_way(1, 3)), [1, 3]),
        "no more than were merged": (parked(*range(1, 41)), record(under_way(*range(1, 41))), list(range(1, 33))),
    },
)
def test_which_commands_are_of_the_message_under_way(
    queue: list[QueuedCommand], known: PersonState, group: list[int]
) -> None:
    assert numbers(sending.in_progress(queue, known)) == group


NAMESAKES = [*parked(1), command(2, ident="c1", parked=True)]


@rows(
    "queue, known, alone_up_to, group",
    {
        "what was not parked goes alone": ([command(1), *parked(2)], record(), 0, [1]),
        "parked texts go together": (parked(1, 2, 3), record(), 0, [1, 2, 3]),
        "up to one that was not parked": ([*parked(1, 2), command(3), *parked(4)], record(), 0, [1, 2]),
        "up to one with several parts or media": ([*parked(1), *parked(2, chars=0), *parked(3)], record(), 0, [1]),
        "such a one goes alone": ([*parked(1, chars=0), *parked(2)], record(), 0, [1]),
        "as long as their lengths and separators fit": (parked(1, 2, 3, text="x" * 32), record(), 0, [1, 2, 3]),
        "one that does not fit waits": (parked(1, 2, 3, text="x" * 33), record(), 0, [1, 2]),
        "one longer than a message goes alone": (parked(1, 2, text="x" * 101), record(), 0, [1]),
        "a second one with an id waits for the first": (NAMESAKES, record(), 0, [1]),
        "also if the first is not the message's first": (
            [*parked(1, 2), command(3, ident="c2", parked=True)],
            record(),
            0,
            [1, 2],
        ),
        "one whose id was sent lately waits": (parked(1, 2), record(recent=[ref(9, ident="c2")]), 0, [1]),
        "what was refused together goes one by one": (parked(1, 2, 3), record(), 2, [1]),
        "the last of them, too": (parked(2, 3), record(), 2, [2]),
        "what came after that goes together": (parked(3, 4), record(), 2, [3, 4]),
        "what may have been sent is repeated without what was parked since": (
            (parked(1, 2, 3), record(under_way(1, 2)), 0, [1, 2])
        ),
        "it keeps together though it was refused together before": (
            (parked(1, 2, 3), record(under_way(1, 2)), 9, [1, 2])
        ),
        "what was not taken may grow": (
            parked(1, 2, 3),
            record(under_way(1, 2, unanswered_attempts=0)),
            0,
            [1, 2, 3],
        ),
    },
)
def test_what_goes_into_the_next_message(
    queue: list[QueuedCommand], known: PersonState, alone_up_to: int, group: list[int]
) -> None:
    assert numbers(sending.next_message(queue, known, POLICY, alone_up_to)) == group


def test_no_more_than_thirty_two_texts_go_together() -> None:
    wide = msgspec.structs.replace(POLICY, merge_chars=10_000)
    assert len(sending.next_message(parked(*range(1, 41)), record(), wide, 0)) == 32


@rows(
    "texts, together",
    {
        "all texts": (["a", "b", "c"], 3),
        "nothing behind a text that ends within code": (["a", "```\ncode", "b"], 2),
        "more behind code that is closed": (["a", "```\ncode\n```", "b"], 3),
    },
)
def test_no_text_becomes_part_of_the_code_before_it(texts: list[str], together: int) -> None:
    group = [command(number, text) for number, text in enumerate(texts, 1)]
    assert numbers(sending.mergeable_prefix(group)) == numbers(group[:together])


@rows(
    "known, group, bot, progress",
    {
        "a new message has the first command's client_id": (
            (
                record(),
                parked(1, 2),
                "b1",
                SendProgress(commands=[ref(1), ref(2)], client_id_base="base1", bot="b1", merged=1),
            )
        ),
        "what is left of a message that may have been sent keeps its client_id": (
            (record(under_way(1, 2, merged=1)), parked(2), "b1", under_way(1, 2, merged=1))
        ),
        "the same commands go on where they were": (record(under_way(1, 2)), parked(1, 2), "b1", under_way(1, 2)),
        "through another bot it is that one's": (
            (record(under_way(1, attempts=3, **HALF)), [command(1)], "b2", under_way(1, attempts=3, bot="b2", **HALF))
        ),
        "other commands are another message": (
            (
                record(under_way(1, 2, unanswered_attempts=0)),
                parked(1),
                "b1",
                SendProgress(commands=[ref(1)], client_id_base="base1", bot="b1"),
            )
        ),
    },
)
def test_the_progress_of_the_message_that_is_about_to_be_sent(
    known: PersonState, group: list[QueuedCommand], bot: str, progress: SendProgress
) -> None:
    assert sending.begun(group, known, bot) == progress


# after a request --------------------------------------------------------------------------------------

LATER = NOW + 500


@rows(
    "progress, answer, after",
    {
        "accepted is the next part": (
            (under_way(1), YES, under_way(1, part=1, unanswered_attempts=0, message_ids=["m1"], ret=0))
        ),
        "the next part adds its id": (
            (
                under_way(1, part=1, message_ids=["m0"], ret=0),
                YES,
                under_way(1, part=2, unanswered_attempts=0, message_ids=["m0", "m1"], ret=0),
            )
        ),
        "accepted without an id is unconfirmed": (
            (
                under_way(1),
                NO_ID,
                under_way(1, part=1, unanswered_attempts=0, unconfirmed=True, ret=0, errcode=7, errmsg="sure"),
            )
        ),
        "the first answer without an id is the one that is told": (
            (
                under_way(1, part=1, unconfirmed=True, ret=0, errcode=7, errmsg="sure"),
                YES,
                under_way(
                    1,
                    part=2,
                    unanswered_attempts=0,
                    unconfirmed=True,
                    message_ids=["m1"],
                    ret=0,
                    errcode=7,
                    errmsg="sure",
                ),
            )
        ),
        "a silence is one": (under_way(1), Uncertain("timeout"), under_way(1)),
        "a lost connection is known": (under_way(1), Uncertain("network"), under_way(1, was_reset=True)),
        "what was not taken is taken back": (
            (under_way(1, 2), Temporary("unavailable"), under_way(1, 2, unanswered_attempts=0))
        ),
        "what was not taken leaves an earlier silence": (
            (under_way(1, unanswered_attempts=2), Temporary("unavailable"), under_way(1))
        ),
        "of what was refused the first is tried alone": (
            (under_way(1, 2, merged=1), Refused("rejected"), under_way(1, unanswered_attempts=0))
        ),
        "of what may have been sent nothing is taken out": (
            (under_way(1, 2, unanswered_attempts=2), Refused("rejected"), under_way(1, 2))
        ),
        "a -14 takes it back": (under_way(1), SessionExpired("needs_login"), under_way(1, unanswered_attempts=0)),
        "a -2 is that of its window": (
            (under_way(1), Throttled("throttled"), under_way(1, unanswered_attempts=0, throttled_in_window="in:1"))
        ),
        "a -2 to an earlier window is that one's": (
            (
                under_way(1, counted_in_window="in:0"),
                Throttled("throttled"),
                under_way(1, unanswered_attempts=0, counted_in_window="in:0", throttled_in_window="in:0"),
            )
        ),
    },
)
def test_the_progress_after_an_answer(
    progress: SendProgress, answer: Accepted | AdapterError, after: SendProgress
) -> None:
    found = sending.after_answer(record(progress, used=1, sent_at_ms=[NOW]), answer, "hello", LATER)
    assert found.progress == after


@rows(
    "progress, answer, used, throttled_at_ms, sent_at_ms",
    {
        "accepted stays counted": (under_way(1), YES, 1, 0, [LATER]),
        "so does silence, up to its end": (under_way(1), Uncertain("timeout"), 1, 5, [LATER]),
        "what was not taken does not": (under_way(1), Temporary("unavailable"), 0, 5, []),
        "unless one before it may have been": (
            (under_way(1, unanswered_attempts=2), Temporary("unavailable"), 1, 5, [NOW])
        ),
        "what was refused does not": (under_way(1), Refused("rejected"), 0, 5, []),
        "a -2 does not, and closes the window": (under_way(1), Throttled("throttled"), 0, NOW, []),
        "a -2 to an earlier window closes none": (
            (under_way(1, counted_in_window="in:0"), Throttled("throttled"), 0, 5, [])
        ),
    },
)
def test_the_window_after_an_answer(
    progress: SendProgress,
    answer: Accepted | AdapterError,
    used: int,
    throttled_at_ms: int,
    sent_at_ms: list[int],
) -> None:
    before = record(progress, used=1, sent_at_ms=[NOW], throttled_at_ms=5)
    window = sending.after_answer(before, answer, "hello", LATER).window
    assert (window.sends_used, window.throttled_at_ms, window.sent_at_ms) == (used, throttled_at_ms, sent_at_ms)


def media(kind: MediaKind, name: str = "") -> Uploaded:
    return Uploaded(kind, name, 1, 16, "ref", bytes(16))


@rows(
    "answer, content, sent",
    {
        "the beginning of a text is remembered for quotes": (
            (YES, "x" * 999, [SentText(id="m1", kind="text", text="x" * SENT_TEXT_CHARS)])
        ),
        "of media their kind": (YES, media("image"), [SentText(id="m1", kind="image", text="[image]")]),
        "of a file its name, too": (
            YES,
            media("file", "a.txt"),
            [SentText(id="m1", kind="file", text="[file] a.txt")],
        ),
        "not the name of an image": (YES, media("image", "a.png"), [SentText(id="m1", kind="image", text="[image]")]),
        "what has no id cannot be quoted": (NO_ID, "hello", []),
        "what was not accepted is not remembered": (Uncertain("timeout"), "hello", []),
    },
)
def test_what_is_remembered_of_what_was_sent(
    answer: Accepted | AdapterError, content: Content, sent: list[SentText]
) -> None:
    assert sending.after_answer(record(under_way(1)), answer, content, LATER).sent == sent


def test_the_last_texts_are_remembered() -> None:
    known = record(under_way(1), sent=[SentText(id=f"m-{number}", kind="text", text="") for number in range(8)])
    sent = sending.after_answer(known, YES, "hello", LATER).sent
    assert [each.id for each in sent] == [*(f"m-{number}" for number in range(1, SENT_TEXTS)), "m1"]


@rows(
    "before, is_again",
    {
        "the first -2 is no fault of the command": (under_way(1), False),
        "nor a second one in the same window": (under_way(1, throttled_in_window="in:1"), False),
        "one in a later window is": (under_way(1, throttled_in_window="in:0"), True),
    },
)
def test_a_command_is_at_fault_that_meets_a_minus_2_in_two_windows(before: SendProgress, is_again: bool) -> None:
    assert sending.is_throttled_again(before) is is_again


@rows(
    "answer, reason",
    {
        "a refusal has its reason": (Refused("invalid", "bad", ret=-3, errmsg="no"), "invalid"),
        "a -2 is a throttle, whatever it says": (Throttled("quota", "bad", ret=-2, errmsg="no"), "throttled"),
    },
)
def test_a_refusal_has_what_ilink_said(answer: Refused, reason: str) -> None:
    result = sending.refusal(answer, under_way(1, attempts=2))
    assert (result.outcome, result.reason, result.detail, result.attempts) == ("refused", reason, "bad", 2)
    assert (result.ret, result.errcode, result.errmsg) == (answer.ret, None, "no")


# how commands end -------------------------------------------------------------------------------------

SOON: dict[str, Any] = {"expires_ms": NOW}
LATE: dict[str, Any] = {"expires_ms": NOW + 1}


@rows(
    "queue, known, ended",
    {
        "nothing before its time": ([command(1, **LATE)], record(), []),
        "at its time, wherever it stands": ([command(1, **LATE), command(2, **SOON)], record(), [2]),
        "one of a message that was not taken alone": (
            ([command(1, **SOON), command(2, **LATE)], record(under_way(1, 2, unanswered_attempts=0)), [1])
        ),
        "all of a message that may have been sent with the first": (
            ([command(1, **LATE), command(2, **SOON), command(3, **LATE)], record(under_way(1, 2)), [1, 2])
        ),
        "others beside them": (
            [command(1, **SOON), command(2, **LATE), command(3, **SOON)],
            record(under_way(1)),
            [1, 3],
        ),
        "none of them for the sake of others": (
            ([command(1, **LATE), command(2, **LATE), command(3, **SOON)], record(under_way(1, 2)), [3])
        ),
    },
)
def test_which_commands_have_waited_too_long(
    queue: list[QueuedCommand], known: PersonState, ended: list[int]
) -> None:
    assert numbers(sending.expired(queue, known, NOW)) == ended


EXPIRED = CommandResult("refused", "expired", "too late")
UNSURE = "An earlier request got no answer, so the message may have been sent. Last answer: too late"


@rows(
    "result, known, parts, expected",
    {
        "refused if nothing was tried": (EXPIRED, record(), 1, EXPIRED),
        "refused if another message was": (EXPIRED, record(under_way(9)), 1, EXPIRED),
        "with the requests that were made": (
            (
                EXPIRED,
                record(under_way(1, attempts=4, unanswered_attempts=0)),
                1,
                CommandResult("refused", "expired", "too late", attempts=4),
            )
        ),
        "with the parts that were accepted": (
            (
                EXPIRED,
                record(under_way(1, message_ids=["m0"], **HALF)),
                2,
                CommandResult("refused", "expired", "too late", ("m0",), attempts=1),
            )
        ),
        "accepted if every part was": (
            (
                EXPIRED,
                record(under_way(1, message_ids=["m0"], ret=0, **HALF)),
                1,
                CommandResult("accepted", message_ids=("m0",), attempts=1, ret=0),
            )
        ),
        "refused if its parts are not known": (
            EXPIRED,
            record(under_way(1, unanswered_attempts=0)),
            0,
            CommandResult("refused", "expired", "too late", attempts=1),
        ),
        "uncertain if a request had no answer": (
            (EXPIRED, record(under_way(1)), 1, CommandResult("uncertain", detail=UNSURE, attempts=1))
        ),
        "no dead letter of it either": (
            (
                CommandResult("dead_lettered", "crashed", "too late"),
                record(under_way(1)),
                1,
                CommandResult("uncertain", detail=UNSURE, attempts=1),
            )
        ),
        "a dead letter of what iLink did not take": (
            (
                CommandResult("dead_lettered", "crashed"),
                record(under_way(1, unanswered_attempts=0)),
                1,
                CommandResult("dead_lettered", "crashed", attempts=1),
            )
        ),
        "uncertain in its own words": (
            (
                CommandResult("uncertain", detail="why"),
                record(under_way(1)),
                1,
                CommandResult("uncertain", detail="why", attempts=1),
            )
        ),
        "accepted stays accepted": (
            (
                CommandResult("accepted", message_ids=("m9",), attempts=9),
                record(under_way(1)),
                1,
                CommandResult("accepted", message_ids=("m9",), attempts=9),
            )
        ),
    },
)
def test_the_receipt_of_a_command_at_its_end(
    result: CommandResult, known: PersonState, parts: int, expected: CommandResult
) -> None:
    assert sending.final_result(result, known, command(1, part_count=parts)) == expected


@rows(
    "progress, outcome",
    {
        "accepted with an id for each part": (under_way(1, message_ids=["m1"]), "accepted"),
        "unconfirmed if one has none": (under_way(1, message_ids=["m1"], unconfirmed=True), "accepted_unconfirmed"),
    },
)
def test_an_accepted_receipt_has_ilinks_answer(progress: SendProgress, outcome: str) -> None:
    progress = msgspec.structs.replace(progress, ret=0, errcode=7, errmsg="sure")
    result = sending.accepted_result(progress)
    assert result == CommandResult(
        outcome,  # type: ignore[arg-type]
        message_ids=("m1",),
        attempts=1,
        ret=0,
        errcode=7,
        errmsg="sure",
    )
    assert (result.is_sent, result.may_be_sent) == (True, True)


OLD = [ref(number + 100) for number in range(RECENT_COMMANDS)]


@rows(
    "known, ended, is_refused, progress, recent",
    {
        "its id may not be used again": (record(), ref(1), False, None, [ref(1)]),
        "unless it was refused": (record(), ref(1), True, None, []),
        "or the id is none of its author's": (record(), ref(1, named=False), False, None, []),
        "the last ids are kept": (record(recent=OLD), ref(1), False, None, [*OLD[1:], ref(1)]),
        "the newest use of an id counts": (record(recent=OLD), OLD[0], False, None, [*OLD[1:], OLD[0]]),
        "nothing of it is under way": (record(under_way(1)), ref(1), False, None, [ref(1)]),
        "the others of its message are": (
            record(under_way(1, 2)),
            ref(1),
            True,
            under_way(1, 2, commands=[ref(2)]),
            [],
        ),
        "another message is": (record(under_way(2)), ref(1), True, under_way(2), []),
    },
)
def test_the_record_after_a_command_has_ended(
    known: PersonState,
    ended: CommandRef,
    is_refused: bool,
    progress: SendProgress | None,
    recent: list[CommandRef],
) -> None:
    after = sending.with_ended(known, ended, is_refused=is_refused)
    assert (after.progress, after.recent) == (progress, recent)


@rows(
    "progress, recent",
    {
        "what may have been sent is not sent again under its ids": (under_way(1, 2), [ref(1), ref(2)]),
        "what was not taken may be": (under_way(1, 2, unanswered_attempts=0), []),
        "what was sent in part is not": (under_way(1, **HALF), [ref(1)]),
    },
)
def test_the_record_after_a_former_owner_ended_the_message(progress: SendProgress, recent: list[CommandRef]) -> None:
    after = sending.without_lost_head(record(progress))
    assert (after.progress, after.recent) == (None, recent)


def test_no_text_is_in_a_repr() -> None:
    sent = SentText(id="m1", kind="text", text="secret")
    things = [command(1, "secret"), record(sent=[sent], token="secret"), sent]
    assert not any("secret" in repr(thing) for thing in things)
