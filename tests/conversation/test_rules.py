"""Single steps of a conversation: what counts, what is kept, and when it goes on."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from adapter.conversation import rules
from adapter.conversation.record import SENT_TEXT_CHARS, SENT_TEXTS, ConversationRecord, SendProgress, SendWindow
from adapter.conversation.rules import Activity, Bot, CommandResult, Conversation, Effect, Input, SendPolicy
from adapter.conversation.split import MAX_BYTES
from adapter.conversation.window import CLOCK_ERROR_MS, WindowPolicy
from adapter.ports import Uploaded
from tests.conversation.model import BOT, HOUR_MS, MEDIA, REFUSED, command

NOW = 10_000_000
POLICY = SendPolicy(
    window=WindowPolicy(sends=3, hours=1.0, cooldown_s=60.0), gap_ms=1500, attempts=2, merge_chars=100
)


class Talk:
    """A conversation and its clock. Slots are granted, and bodies read back, at once."""

    def __init__(self, *, used: int = 0, policy: SendPolicy = POLICY, **record: Any) -> None:
        opened = SendWindow(id="in:1", opened_ms=NOW, sends_used=used)
        fields: dict[str, Any] = {
            "bot": BOT.id,
            "token": "t",
            "window": opened,
        }
        self.state = Conversation(sandbox="s1", user="u1", record=ConversationRecord(**fields | record), bot=BOT)
        self.now_ms = NOW
        self.policy = policy
        self.effects: list[Effect] = []

    def put(self, event: Input, *, later_ms: int = 0) -> list[Effect]:
        """What follows from an input, and from the slots that it asks for."""
        self.now_ms += later_ms
        self.state, effects = rules.step(self.state, event, self.now_ms, self.policy)
        if any(isinstance(effect, rules.RequestSlot) for effect in effects):
            self.state, more = rules.step(self.state, rules.SlotGranted(), self.now_ms, self.policy)
            effects = [*effects, *more]
        self.effects += effects
        return effects

    def posts(self) -> list[str]:
        return [effect.client_id for effect in self.effects if isinstance(effect, rules.Post)]

    def ends(self) -> list[tuple[int, str, str]]:
        told = [(one.command.sequence, one.result) for one in self.effects if isinstance(one, rules.PublishReceipt)]
        return [(sequence, result.outcome, result.reason) for sequence, result in told]

    @property
    def due_ms(self) -> float:
        return rules.next_deadline_ms(self.state, self.now_ms, self.policy) - self.now_ms


@pytest.fixture
def talk() -> Talk:
    return Talk()


def test_a_repeat_needs_no_room_in_a_window_that_it_is_counted_in() -> None:
    talk = Talk(used=1)
    talk.put(rules.Stored((command(1, "a", "b"),)))
    talk.put(rules.Accepted("m1"))
    talk.put(rules.Deadline(), later_ms=1500)
    assert talk.state.record.window.sends_used == 3
    talk.put(rules.Unanswered())
    talk.put(rules.Deadline(), later_ms=1500)
    assert talk.posts() == ["wechat-nats:k1-0", "wechat-nats:k1-1", "wechat-nats:k1-1"]


def test_the_rest_of_a_command_needs_room_for_one_send_only(talk: Talk) -> None:
    talk.put(rules.Stored((command(1, "a", "b", "c"),)))
    talk.put(rules.Accepted("m1"))
    talk.put(rules.InboundReceived("in:2", "", BOT.id, 0, 2))
    window = msgspec.structs.replace(talk.state.record.window, sends_used=2)
    talk.state = msgspec.structs.replace(talk.state, record=msgspec.structs.replace(talk.state.record, window=window))
    talk.put(rules.Deadline(), later_ms=1500)
    assert talk.posts() == ["wechat-nats:k1-0", "wechat-nats:k1-1"]
    talk.put(rules.Accepted("m2"))
    talk.put(rules.Deadline(), later_ms=1500)
    assert talk.ends() == [(1, "parked", "quota")]


def test_a_request_that_is_repeated_over_another_bot_is_that_bots(talk: Talk) -> None:
    """-14 with nothing unanswered: the next bot begins anew, and then repeats its own request."""
    talk.put(rules.Stored((command(1),)))
    talk.put(rules.TokenRejected(REFUSED))
    talk.put(rules.SessionChecked(is_alive=False))
    talk.put(rules.Bound(Bot("b2", is_usable=True)), later_ms=1500)
    talk.put(rules.Loaded({1: ["t1"]}))
    assert talk.state.record.head is not None
    assert talk.state.record.head.bot == "b2"
    talk.put(rules.Unanswered())
    talk.put(rules.Deadline(), later_ms=1500)
    assert talk.posts() == ["wechat-nats:k1-0"] * 3
    talk.put(rules.Unanswered())
    talk.put(rules.Deadline(), later_ms=1500)
    assert talk.ends()[-1] == (1, "uncertain", "")


def test_the_beginning_of_what_was_sent_is_remembered_under_its_id() -> None:
    talk = Talk(policy=POLICY._replace(window=POLICY.window._replace(sends=0)))
    file = Uploaded("file", "f.txt", 1, 1, "", b"")
    image = Uploaded("image", "secret-name.png", 1, 1, "", b"")
    for number, media in ((1, file), (2, image)):
        talk.put(rules.Stored((command(number, MEDIA),)), later_ms=1500)
        talk.put(rules.UploadDone(media))
        talk.put(rules.Accepted(f"m{number}"))
    talk.put(rules.Stored((command(3),)), later_ms=1500)
    talk.put(rules.Accepted(""))
    for number in range(4, 4 + SENT_TEXTS - 2):
        talk.put(rules.Stored((command(number, f"{number}" * 500),)), later_ms=1500)
        talk.put(rules.Accepted(f"m{number}"))
    sent = talk.state.record.sent
    assert [(one.id, one.kind) for one in sent[:3]] == [("m1", "file"), ("m2", "image"), ("m4", "text")]
    assert "f.txt" in sent[0].text
    assert "secret" not in sent[1].text
    assert sent[2].text == "4" * SENT_TEXT_CHARS
    talk.put(rules.Stored((command(99),)), later_ms=1500)
    talk.put(rules.Accepted("m99"))
    assert [one.id for one in talk.state.record.sent] == ["m2", *(f"m{n}" for n in range(4, 10)), "m99"]


def test_no_text_is_in_a_repr() -> None:
    assert "secret" not in repr(command(1, "secret"))
    assert "secret" not in repr(Conversation(sandbox="s1", user="u1", queue=(command(1, "secret"),)))


def test_requests_keep_their_distance_unless_the_clock_was_set_back(talk: Talk) -> None:
    talk.put(rules.Stored((command(1), command(2), command(3))))
    talk.put(rules.Accepted("m1"))
    assert talk.due_ms == 1500
    talk.put(rules.Deadline(), later_ms=1499)
    assert len(talk.posts()) == 1
    talk.put(rules.Deadline(), later_ms=1)
    assert len(talk.posts()) == 2
    talk.put(rules.Accepted("m2"))
    talk.put(rules.Deadline(), later_ms=1500 - CLOCK_ERROR_MS - 1)
    assert len(talk.posts()) == 3


def test_a_queue_that_waits_is_told_so_piece_by_piece() -> None:
    """What the user writes meanwhile waits for no more than one piece."""
    talk = Talk(token="")
    many = tuple(command(number) for number in range(1, 40))
    talk.put(rules.Stored(many))
    assert len(talk.ends()) == rules.RECEIPTS_PER_STEP
    assert talk.due_ms == 0
    talk.put(rules.Deadline())
    talk.put(rules.Deadline())
    assert talk.ends() == [(number, "parked", "window_closed") for number in range(1, 40)]
    assert all(one.parts is None and one.parked for one in talk.state.queue)
    assert talk.due_ms > HOUR_MS
    assert [one.sequence for one in talk.state.queue] == list(range(1, 40))


@pytest.mark.parametrize(
    ("prepare", "due_ms"),
    [
        ([], math.inf),
        ([rules.Bound(None)], math.inf),
        ([rules.Bound(Bot("b", is_usable=False)), rules.Stored((command(1),))], rules.LOGIN_CHECK_MS),
        ([rules.Stored((command(1),))], 72 * HOUR_MS - NOW),  # its expiry
        ([rules.Stored((command(1, expires_ms=NOW + 900),))], 900),
        ([rules.Stored((command(1),)), rules.Throttled(REFUSED)], 60_000),
        ([rules.Stored((command(1),)), rules.Unanswered()], 1500),
        ([rules.Stored((command(1),)), rules.NotTaken("", 9000)], 9000),
        ([rules.Stored((command(1),)), rules.Accepted("m")], math.inf),
    ],
    ids=["idle", "unbound", "login", "sending", "expires", "throttled", "unanswered", "not taken", "done"],
)
def test_a_conversation_is_looked_at_again_when_something_is_due(
    prepare: list[Input], due_ms: float, talk: Talk
) -> None:
    for event in prepare:
        talk.put(event)
    assert talk.due_ms == due_ms


def test_a_group_is_waited_for_after_a_take_over_and_then_given_up() -> None:
    head = SendProgress(
        commands=[command(1).ref, command(2).ref], client_id_base="k1", bot=BOT.id, digest="d", unanswered_attempts=1
    )
    talk = Talk(head=head)
    talk.put(rules.Stored((command(1),)))
    assert talk.due_ms == rules.GROUP_WAIT_MS
    talk.put(rules.Deadline(), later_ms=rules.GROUP_WAIT_MS - 1)
    assert talk.ends() == []
    talk.put(rules.Deadline(), later_ms=1)
    assert talk.ends() == [(1, "uncertain", "")]
    assert talk.posts() == []


@pytest.mark.parametrize(
    ("outcome", "recent"), [("accepted", ["c0", "c1"]), ("uncertain", ["c0", "c1"]), ("refused", ["c0"])]
)
def test_an_id_is_remembered_where_the_owner_before_may_have_sent_it(outcome: Any, recent: list[str]) -> None:
    head = SendProgress(commands=[command(1).ref], client_id_base="k1", bot=BOT.id, unanswered_attempts=1)
    talk = Talk(head=head, recent=["c0"])
    talk.put(rules.Ended(1, CommandResult(outcome)))
    talk.put(rules.Stored((command(2),)))
    assert talk.state.record.recent == recent
    assert talk.posts() == ["wechat-nats:k2-0"]
    talk.put(rules.Accepted("m2"))
    assert talk.state.record.recent == [*recent, "c2"]


def test_a_slot_that_is_not_needed_any_more_is_given_back(talk: Talk) -> None:
    talk.state, _ = rules.step(talk.state, rules.Stored((command(1),)), NOW, POLICY)
    assert talk.state.activity is Activity.AWAITING_SLOT
    talk.put(rules.Bound(None))
    effects = talk.put(rules.SlotGranted())
    assert [type(effect) for effect in effects] == [rules.ReleaseSlot]
    assert not talk.state.holds_slot


def test_an_answer_without_a_request_changes_nothing(talk: Talk) -> None:
    """Of what was given up: an upload, a read-back, a look at the session."""
    before = talk.state
    for event in (
        *(rules.Accepted("m"), rules.Unanswered(), rules.NotTaken("", 0), rules.Rejected(REFUSED)),
        *(rules.Loaded({1: None}), rules.UploadDone(Uploaded("file", "f", 1, 1, "", b""))),
        rules.SessionChecked(is_alive=False),
    ):
        assert talk.put(event) == []
    assert talk.state == before


def test_typing_is_hidden_once_nothing_can_be_sent_now(talk: Talk) -> None:
    hide = rules.SetTyping(is_on=False)
    talk.put(rules.Stored((command(1), command(2))))
    assert hide not in talk.put(rules.Accepted("m1"))
    talk.put(rules.Deadline(), later_ms=1500)
    assert hide in talk.put(rules.Accepted("m2"))
    assert hide not in talk.put(rules.Deadline(), later_ms=1500)
    talk.put(rules.Stored((command(9),)))
    assert hide not in talk.put(rules.Unanswered())
    talk.put(rules.Deadline(), later_ms=1500)
    assert hide in talk.put(rules.Accepted("m9"))
    talk.now_ms += HOUR_MS
    assert hide in talk.put(rules.Stored((command(3, when_closed="refuse"),)))
    assert hide in talk.put(rules.Bound(None))


def test_the_words_of_the_first_answer_without_an_id_are_told(talk: Talk) -> None:
    talk.put(rules.Stored((command(1, "a", "b", "c"),)))
    for answer in (rules.Accepted("m1", 0), rules.Accepted("", 1, 2, "queued"), rules.Accepted("m3", 0)):
        talk.put(answer)
        talk.put(rules.Deadline(), later_ms=1500)
    (told,) = [one.result for one in talk.effects if isinstance(one, rules.PublishReceipt)]
    assert (told.outcome, told.ret, told.errcode, told.errmsg) == ("accepted_unconfirmed", 1, 2, "queued")
    assert (told.message_ids, told.attempts) == (("m1", "m3"), 3)


def test_a_message_that_may_have_been_sent_is_repeated_without_what_was_parked_since() -> None:
    talk = Talk(token="")
    talk.put(rules.Stored((command(1), command(2))))
    talk.put(rules.InboundReceived("in:2", "t", BOT.id, 0, 2))
    talk.put(rules.Loaded({1: ["t1"], 2: ["t2"]}))
    talk.put(rules.Unanswered())
    talk.put(rules.Deadline(), later_ms=1500)
    talk.put(rules.Throttled(REFUSED))
    talk.put(rules.Stored((command(3),)))
    assert talk.ends()[-1] == (3, "parked", "throttled")
    effects = talk.put(rules.InboundReceived("in:3", "t", BOT.id, 0, 3), later_ms=1500)
    assert [one for one in effects if isinstance(one, rules.Post)] == [rules.Post("wechat-nats:k1-0+1", "t1\n\nt2")]


@pytest.mark.parametrize(
    ("texts", "together"),
    [
        (["a", "b", "c"], 3),
        (["a", "字" * (MAX_BYTES // 6), "字" * (MAX_BYTES // 6)], 2),
        (["字" * (MAX_BYTES // 3 - 4), "b"], 2),
        (["字" * MAX_BYTES, "b"], 1),
        (["a", "```\nopen", "c"], 2),
    ],
    ids=["short", "many bytes", "as many as fit", "one that is long", "open code"],
)
def test_texts_are_merged_as_far_as_they_fit(texts: list[str], together: int) -> None:
    talk = Talk(token="", policy=POLICY._replace(merge_chars=1_000_000))
    talk.put(rules.Stored(tuple(command(number, text) for number, text in enumerate(texts, 1))))
    talk.put(rules.InboundReceived("in:2", "t", BOT.id, 0, 2))
    effects = talk.put(rules.Loaded({number: [text] for number, text in enumerate(texts, 1)}))
    assert [one.content for one in effects if isinstance(one, rules.Post)] == ["\n\n".join(texts[:together])]


def test_attempts_are_counted_anew_for_each_part(talk: Talk) -> None:
    talk.put(rules.Stored((command(1, "a", "b"),)))
    away: list[Input] = [rules.NotTaken("away", 0)] * 3
    for answer in (*away, rules.Accepted("m1"), *away):
        talk.put(answer)
        talk.put(rules.Deadline(), later_ms=1500)
    assert talk.ends() == []
    talk.put(rules.NotTaken("away", 0, is_unreached=True))
    talk.put(rules.Deadline(), later_ms=1500)
    assert talk.ends() == [], "what did not even leave waits as long as the command"
    talk.put(rules.NotTaken("away", 0))
    assert talk.ends() == [(1, "dead_lettered", "unreachable")]


def test_the_record_is_stored_between_parts_and_not_behind_the_last(talk: Talk) -> None:
    """A crash in the pause between two parts must not repeat the first; behind the last the receipt tells."""
    talk.put(rules.Stored((command(1, "a", "b"),)))
    assert rules.Save in map(type, talk.put(rules.Accepted("m1")))
    talk.put(rules.Deadline(), later_ms=1500)
    assert rules.Save not in map(type, talk.put(rules.Accepted("m2")))


@pytest.mark.parametrize("activity", [Activity.LOADING, Activity.UPLOADING, Activity.AWAITING_SLOT])
def test_what_expires_before_its_request_leaves_room_for_the_next(activity: Activity, talk: Talk) -> None:
    first = command(1, *([MEDIA] if activity is Activity.UPLOADING else []), expires_ms=NOW + 60)
    if activity is Activity.LOADING:
        first = msgspec.structs.replace(first, parts=None)
    talk.state, _ = rules.step(talk.state, rules.Stored((first, command(2))), NOW, POLICY)
    assert talk.state.activity is activity
    talk.put(rules.Deadline(), later_ms=60)
    if activity is Activity.AWAITING_SLOT:
        talk.put(rules.SlotGranted())
    assert talk.ends() == [(1, "refused", "expired")]
    assert talk.posts() == ["wechat-nats:k2-0"]


def test_minus_14_is_counted_anew_for_each_command(talk: Talk) -> None:
    for number in (1, 2):
        talk.put(rules.Stored((command(number),)), later_ms=1500)
        talk.put(rules.TokenRejected(REFUSED))
        talk.put(rules.SessionChecked(is_alive=True))
        talk.put(rules.Deadline(), later_ms=1500)
        if number == 1:
            talk.put(rules.Accepted("m1"))
    assert talk.ends() == [(1, "accepted", "")]
    talk.put(rules.TokenRejected(REFUSED))
    talk.put(rules.SessionChecked(is_alive=True))
    assert talk.ends()[1:] == [(2, "refused", "rejected")]
    last = [one.result for one in talk.effects if isinstance(one, rules.PublishReceipt)][-1]
    assert (last.errcode, last.errmsg) == (REFUSED.errcode, REFUSED.errmsg)


def test_a_command_expires_behind_its_request_and_not_while_it_is_out(talk: Talk) -> None:
    talk.put(rules.Stored((command(1, expires_ms=NOW + 60),)))
    talk.put(rules.Deadline(), later_ms=60)
    assert talk.ends() == []
    talk.put(rules.TokenRejected(REFUSED))
    assert talk.ends() == []
    talk.put(rules.SessionChecked(is_alive=True))
    assert talk.ends() == [(1, "refused", "expired")]


def test_a_parked_command_expires_in_time_though_another_one_did_while_it_was_out(talk: Talk) -> None:
    talk.put(rules.Stored((command(1, expires_ms=NOW + 100), command(2, expires_ms=NOW + 60))))
    talk.put(rules.Deadline(), later_ms=60)
    assert talk.ends() == [(2, "refused", "expired")]
    talk.put(rules.Throttled(REFUSED))
    assert talk.due_ms == 40
    talk.put(rules.Deadline(), later_ms=40)
    assert talk.ends()[-1] == (1, "refused", "expired")


def test_an_upload_for_who_was_unbound_is_sent_to_nobody(talk: Talk) -> None:
    talk.put(rules.Stored((command(1, MEDIA),)))
    talk.put(rules.Bound(None))
    talk.put(rules.UploadDone(Uploaded("file", "f", 1, 1, "", b"")))
    assert (talk.state.activity, talk.state.content) == (Activity.IDLE, None)
    assert talk.ends() == [(1, "refused", "not_bound")]
    talk.put(rules.Bound(BOT))
    talk.put(rules.Stored((command(2),)))
    assert [one for one in talk.effects if isinstance(one, rules.Post)] == [rules.Post("wechat-nats:k2-0", "t2")]


def test_an_upload_that_ends_once_its_user_is_bound_again_is_no_other_commands(talk: Talk) -> None:
    talk.put(rules.Stored((command(1, MEDIA),)))
    talk.put(rules.Bound(None))
    talk.put(rules.Bound(BOT))
    talk.put(rules.UploadDone(Uploaded("file", "f", 1, 1, "", b"")))
    assert [type(one) for one in talk.put(rules.Stored((command(2, MEDIA),)))] == [rules.Upload]


# a message that was heard elsewhere --------------------------------------------------------------------


def stored(opened_ms: int, **window: Any) -> ConversationRecord:
    opened = SendWindow(**{"id": "in:2", "opened_ms": opened_ms, "sequence": 2, **window})
    return ConversationRecord(bot="b2", token="new", window=opened)


def test_a_window_that_another_replica_opened_is_adopted_and_an_older_one_is_not() -> None:
    state = Talk(used=2).state
    adopted = rules.adopt_inbound(state, stored(NOW))
    assert (adopted.record.window.id, adopted.record.token, adopted.record.bot) == ("in:2", "new", "b2")
    assert adopted.record.window.sends_used == 0
    known = rules.adopt_inbound(state, stored(NOW, id="in:3", sequence=3))
    assert rules.adopt_inbound(known, stored(NOW + 1)) is known  # the clocks of two replicas differ
    assert rules.adopt_inbound(state, stored(NOW + 1, id="in:1")) is state


def test_a_request_that_is_out_counts_in_the_window_that_another_replica_opened(talk: Talk) -> None:
    talk.put(rules.Stored((command(1),)))
    adopted = rules.adopt_inbound(talk.state, stored(NOW + 5, sends_used=0, sent_at_ms=[NOW + 1]))
    assert (adopted.record.window.sends_used, adopted.record.window.sent_at_ms) == (1, [NOW + 1, NOW])
    adopted = rules.adopt_inbound(talk.state, stored(NOW + 5, sends_used=2))
    assert adopted.record.window.sends_used == 2


def test_a_result_is_reconciled_with_what_was_tried() -> None:
    head = SendProgress(commands=[command(1).ref], client_id_base="k1", bot="b", message_ids=["m"], attempts=3)
    refused = CommandResult("refused", "rejected", "no", attempts=1)
    found = rules.reconcile_with_progress(refused, head, command(1))
    assert (found.outcome, found.message_ids, found.attempts) == ("refused", ("m",), 3)
    tried = msgspec.structs.replace(head, unanswered_attempts=1)
    found = rules.reconcile_with_progress(refused, tried, command(1))
    assert (found.outcome, found.reason) == ("uncertain", "")
    taken = msgspec.structs.replace(head, part=1, unconfirmed=True, ret=0, errmsg="ok")
    found = rules.reconcile_with_progress(refused, taken, command(1))
    assert (found.outcome, found.ret, found.errmsg) == ("accepted_unconfirmed", 0, "ok")
    accepted = CommandResult("accepted", message_ids=("other",))
    assert rules.reconcile_with_progress(accepted, taken, command(1)) is accepted


def test_an_older_command_goes_behind_the_one_that_is_being_sent(talk: Talk) -> None:
    talk.put(rules.Stored((command(6),)))
    assert talk.state.activity is Activity.SENDING
    talk.put(rules.Stored((command(5),)))
    talk.put(rules.Accepted("m6"))
    talk.put(rules.Deadline(), later_ms=1500)
    talk.put(rules.Accepted("m5"))
    assert [sequence for sequence, *_ in talk.ends()] == [6, 5]


def test_no_timer_runs_for_the_end_of_a_window_while_a_request_is_out(talk: Talk) -> None:
    talk.put(rules.Stored((command(1),)))
    assert talk.state.activity is Activity.SENDING
    assert rules.next_deadline_ms(talk.state, talk.now_ms + 86_400_000, talk.policy) > talk.now_ms + 86_400_000
