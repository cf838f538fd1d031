"""The rules of one conversation as a pure function: `step(conversation, input) -> conversation, effects`.

No clock, no I/O, no awaits: what happens comes in as an input, what is to be done goes out as effects, which the
actor carries out in their order. All decisions about a user's commands are here and nowhere else.

The commands of a user form one queue, in the order in which they were stored. Only its first one (with those that are
merged into it) is worked on. What it does is the conversation's activity:

    activity          on                  goes to
    ----------------  ------------------  -------------------------------------------------------------------
    IDLE              (queue, may send)   LOADING (body not in memory), UPLOADING (media not on the CDN yet),
                                          AWAITING_SLOT, SENDING (slot granted: Save, then Post)
                      (queue, may not)    IDLE: each command is parked or refused, once
    LOADING           Loaded              IDLE
    UPLOADING         UploadDone          IDLE
                      NotTaken, Rejected, as of SENDING
                      TokenRejected
    AWAITING_SLOT     SlotGranted         IDLE, which goes on to SENDING at once
    SENDING           Accepted            IDLE (next part, or the command ends: accepted, accepted_unconfirmed)
                      Unanswered          IDLE (once more with the same client_id; then the command ends: uncertain)
                      NotTaken            IDLE (again after a pause; after many the command ends: dead_lettered)
                      Throttled (-2)      IDLE, window throttled; in a second window the command ends: refused
                      Rejected            IDLE, the command ends: refused; merged ones go one by one
                      TokenRejected (-14) CHECKING_SESSION
    CHECKING_SESSION  SessionChecked      IDLE: alive: once more, then refused; dead: the bot needs a login
    any               Stored              same; the queue is longer
                      InboundReceived     same; a new window, which the actor stores within a second
                      Dispatched          same; how far the inbox has everything, stored so, too
                      Bound               same; to no bot: every command that is not being sent ends, and the record
                                          is stored so that it goes in time (Save)
                      Deadline            same; what expired ends, what waited for time goes on
                      Rested              same; the record is stored (Save)
                      Ended               IDLE; what was merged with a command that the owner before ended ends, too
                      Crashed             IDLE, the command ends: dead_lettered

docs/explanation/conversation.md has the same as a diagram. Why a queue waits (`Conversation.reason`): window_closed,
quota, throttled, needs_login; see `window.send_blocker`.
"""

from __future__ import annotations

import enum
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias

import msgspec

from adapter.content.quotes import placeholder_summary
from adapter.contract.messages import Outcome
from adapter.conversation import window
from adapter.conversation.commands import MERGE_SEPARATOR, MediaPart, Part, client_id
from adapter.conversation.record import (
    DISPATCHED_BOTS_KEPT,
    RECENT_COMMANDS,
    SENT_TEXT_CHARS,
    SENT_TEXTS,
    CommandRef,
    ConversationRecord,
    SendProgress,
    SentText,
)
from adapter.conversation.split import MAX_BYTES, is_open
from adapter.conversation.window import WindowPolicy
from adapter.ports import Content, Uploaded

MAX_RESENDS = 1
"""A request without an answer is repeated so often, with the same client_id: WeChat shows it once
(docs/reference/ilink-protocol.md, "sendmessage")."""
MERGED_AT_ONCE = 32
"""Texts in one merged message, at most: as many ids as a record remembers."""
RECEIPTS_PER_STEP = 16
"""Commands that are parked or refused in one step: a message of the user waits no longer than for these."""
ATTEMPTS = 8
"""They take two minutes: what iLink does not take by then holds up the user's other commands no longer."""
REPEAT_PAUSE_MS = 1000
"""Before a request is made once more that got no answer, or -14 while the session is alive."""
GROUP_WAIT_MS = 10_000
"""After a take-over the commands of a merged message come again within this time, or are gone."""
LOGIN_CHECK_MS = 60_000
"""While a queue waits for a login, the binding is looked at so often, should its news have got lost."""


class SendPolicy(NamedTuple):
    """The settings that sending follows."""

    window: WindowPolicy
    gap_ms: int
    """Least time between two requests to one user."""
    merge_chars: int
    """Parked texts are sent as one message up to so many characters; 0: each on its own."""
    attempts: int = ATTEMPTS
    """How often one request is made while iLink's answers say that nothing was taken."""


class Activity(enum.Enum):
    """What is under way for the first command of the queue."""

    IDLE = "idle"
    LOADING = "loading"
    """Bodies are read back from the bus."""
    UPLOADING = "uploading"
    """Media are on their way to the CDN."""
    AWAITING_SLOT = "awaiting_slot"
    """The requests of others use up what may be out at once."""
    SENDING = "sending"
    """A request is out."""
    CHECKING_SESSION = "checking_session"
    """iLink said -14 to a request: whether the session is alive is being asked."""


class Bot(NamedTuple):
    """The bot that serves the user now."""

    id: str
    is_usable: bool
    """False: its token is refused (-14); nothing is sent before it is alive again, or another bot takes its place."""


class CommandResult(NamedTuple):
    """What became of a command, in the terms of the receipt; outcome `parked` is not final."""

    outcome: Outcome
    reason: str = ""
    detail: str = ""
    message_ids: tuple[str, ...] = ()
    attempts: int = 0
    ret: int | None = None
    errcode: int | None = None
    errmsg: str = ""

    @property
    def is_sent(self) -> bool:
        """iLink took all of it."""
        return self.outcome in ("accepted", "accepted_unconfirmed")

    @property
    def may_be_sent(self) -> bool:
        """It may be on the phone."""
        return self.is_sent or self.outcome == "uncertain"


class QueuedCommand(msgspec.Struct, frozen=True, kw_only=True):
    """A command that waits for its turn."""

    sequence: int
    """Of the stored message: what is acknowledged, and read back."""
    ref: CommandRef
    """Its identity: of a router's copy, the original's."""
    client_id_base: str
    kind: str = "unreadable"
    """For the metrics: text, media, typing, or unreadable for what is no command."""
    parts: list[Part] | None = None
    """One request each; None: the body is on the bus alone."""
    part_count: int = 0
    chars: int = 0
    """Length of its text, if that is its only part; else 0."""
    expires_ms: int = 0
    when_closed: Literal["park", "refuse"] = "park"
    optional: bool = False
    typing: Literal["", "on", "off"] = ""
    parked: bool = False
    """Its sender was told that it waits."""

    def __repr__(self) -> str:
        return f"QueuedCommand({self.sequence})"  # no text gets into a log or traceback


class Conversation(msgspec.Struct, frozen=True, kw_only=True):
    """The state of one conversation."""

    sandbox: str
    user: str
    """"" while nobody knows the user of the sandbox's bot: nothing can be sent, and the commands wait."""
    record: ConversationRecord = ConversationRecord()
    bot: Bot | None = None
    """None: no bot of the sandbox serves the user."""
    queue: tuple[QueuedCommand, ...] = ()
    """In the order of their sequences; those that are parked come first."""
    activity: Activity = Activity.IDLE
    holds_slot: bool = False
    content: Content | None = None
    """What the request that is out holds, or the uploaded media of the next one."""
    not_before_ms: int = 0
    """No request leaves before: the pace, or the pause after a failure."""
    failures: int = 0
    """Of the first command's requests, in a row, that iLink did not take."""
    token_rejections: int = 0
    """How often iLink said -14 to the first command while the session was alive."""
    head_result: CommandResult | None = None
    """How the owner before ended a command of the message that was being sent; the others in it end so, too."""
    group_due_ms: int = 0
    """After a take-over the commands of one message come again one by one; they are waited for up to here."""
    merge_barrier: int = 0
    """What has a sequence up to this is not merged: iLink refused it so."""
    reason: str = ""
    """Why the queue waits; "": it does not."""
    earliest_expiry_ms: float = math.inf
    """No command of the queue expires before."""
    has_unpublished: bool = False
    """Commands that are to be parked or refused are left for the next step."""
    typing_due: bool = False
    """Something was sent, or has to wait, since the user wrote: typing is hidden once nothing can be sent now."""
    last_answer: CommandResult | None = None
    """iLink's words to the request that made the queue wait."""


# inputs -----------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """Commands of this conversation were stored, or it became known that they are for this user."""

    commands: tuple[QueuedCommand, ...]


class InboundReceived(NamedTuple):
    """The user wrote."""

    message: str
    """Its id on the bus."""
    token: str
    """The context token; "" where iLink gave none."""
    bot: str
    written_ms: int
    """By WeChat's clock; 0: unknown."""
    sequence: int
    """Of the journal record that has the message."""
    received_ms: int | None = None
    """When iLink handed it over, which may be long ago; None: now."""
    show_typing: bool = False


class Dispatched(NamedTuple):
    """The inbox has everything of the user that the bot's journal has up to a sequence."""

    bot: str
    sequence: int


class Bound(NamedTuple):
    """The user is served by this bot now; None: by none of the sandbox."""

    bot: Bot | None


class SlotGranted(NamedTuple):
    """A request may leave."""


class Loaded(NamedTuple):
    """Bodies were read back: parts by sequence; None: the command is gone from the bus."""

    parts: Mapping[int, list[Part] | None]


class UploadDone(NamedTuple):
    """The media of a part are on the CDN."""

    content: Uploaded


class Accepted(NamedTuple):
    """iLink took the request. `message_id` "": iLink gave none, and has often dropped the message
    (docs/reference/ilink-protocol.md, "Success without a message id")."""

    message_id: str
    ret: int | None = None
    errcode: int | None = None
    errmsg: str = ""


class Unanswered(NamedTuple):
    """The request left, and no answer came that can be read."""


class NotTaken(NamedTuple):
    """iLink took nothing, for now. `is_unreached`: the request did not even leave."""

    detail: str
    pause_ms: int
    is_unreached: bool = False


class Throttled(NamedTuple):
    """iLink said -2; `result` has its words."""

    result: CommandResult


class Rejected(NamedTuple):
    """iLink will not take it."""

    result: CommandResult


class TokenRejected(NamedTuple):
    """iLink said -14."""

    result: CommandResult


Answer: TypeAlias = Accepted | Unanswered | NotTaken | Throttled | Rejected | TokenRejected
"""To a request; the last four without Throttled also to an upload."""


class SessionChecked(NamedTuple):
    """Whether the bot's session is alive, after a -14."""

    is_alive: bool


class Deadline(NamedTuple):
    """Time has passed; see `next_deadline_ms`."""


class Rested(NamedTuple):
    """Nothing has happened for a while: what is known is to be stored, so that it can be let go."""


class Ended(NamedTuple):
    """The owner before stored this final receipt of a command that it was sending."""

    sequence: int
    result: CommandResult


class Crashed(NamedTuple):
    """Working on a command raised what nobody expects, several times."""

    detail: str
    sequence: int = 0
    """Of a command that could not be parked; 0: it was the first one."""


Input: TypeAlias = (
    Stored
    | InboundReceived
    | Dispatched
    | Bound
    | SlotGranted
    | Loaded
    | UploadDone
    | Answer
    | SessionChecked
    | Deadline
    | Rested
    | Ended
    | Crashed
)


# effects ----------------------------------------------------------------------------------------------


class Save(NamedTuple):
    """Store the record; nothing that follows is done before."""


class RequestSlot(NamedTuple):
    """Ask for leave to have a request out; the answer is SlotGranted."""


class ReleaseSlot(NamedTuple):
    """Give it back."""


class Load(NamedTuple):
    """Read bodies back; the answer is Loaded."""

    sequences: list[int]


class Upload(NamedTuple):
    """Bring media to the CDN; the answer is UploadDone or an Answer."""

    client_id: str
    media: MediaPart


class Post(NamedTuple):
    """Make the request, which gives the slot back in the end; the answer is an Answer."""

    client_id: str
    content: Content


class CheckSession(NamedTuple):
    """Find out whether the bot's session is alive; the answer is SessionChecked."""


class PublishReceipt(NamedTuple):
    """Store a receipt."""

    command: QueuedCommand
    result: CommandResult


class Acknowledge(NamedTuple):
    """The command has ended: take it off the bus. `is_duplicate`: it was sent before, and has no receipt."""

    command: QueuedCommand
    is_duplicate: bool = False


class ReleaseBody(NamedTuple):
    """The body of a command that waits is not kept in memory any more."""

    command: QueuedCommand


class SetTyping(NamedTuple):
    """Show or hide that the bot types: for a command, which then ends by itself, or None: for the user's message, or
    since the answer was sent."""

    command: QueuedCommand | None
    is_on: bool


class Announce(NamedTuple):
    """Tell the sandbox that the window changed."""

    change: Literal["opened", "low", "closed"]
    reason: str


Effect: TypeAlias = (
    Save
    | RequestSlot
    | ReleaseSlot
    | Load
    | Upload
    | Post
    | CheckSession
    | PublishReceipt
    | Acknowledge
    | ReleaseBody
    | SetTyping
    | Announce
)


# the step ---------------------------------------------------------------------------------------------


def step(
    conversation: Conversation, event: Input, now_ms: int, policy: SendPolicy
) -> tuple[Conversation, list[Effect]]:
    """The conversation after `event`, and what is to be done for it, in this order."""
    effects: list[Effect] = []
    conversation = _apply_event(conversation, event, now_ms, policy, effects)
    conversation = _advance_queue(conversation, now_ms, policy, effects)
    is_idle = conversation.activity is Activity.IDLE
    if conversation.holds_slot and is_idle:
        conversation = _replaced(conversation, holds_slot=False)
        effects.append(ReleaseSlot())
    if conversation.typing_due and is_idle and (not conversation.queue or conversation.reason):
        conversation = _replaced(conversation, typing_due=False)
        effects.append(SetTyping(None, is_on=False))
    conversation = _announce_window(conversation, now_ms, policy, effects)
    conversation = _note_service(conversation, effects)
    return conversation, _with_one_save(effects)


def _with_one_save(effects: list[Effect]) -> list[Effect]:
    """The record is stored once, right before the request, else at the end: a send that has ended in memory must not
    be forgotten before its receipts are stored."""
    others = [effect for effect in effects if not isinstance(effect, Save)]
    if len(others) == len(effects):
        return effects
    at = next((index for index, effect in enumerate(others) if isinstance(effect, Post)), len(others))
    return [*others[:at], Save(), *others[at:]]


def next_deadline_ms(conversation: Conversation, now_ms: int, policy: SendPolicy) -> float:
    """When the conversation has to be looked at again although nothing happens; inf: never."""
    record, due = conversation.record, conversation.earliest_expiry_ms
    is_sending = conversation.activity is Activity.SENDING  # the window is told of once that has ended
    if record.announced in ("open", "low") and conversation.bot is not None and not is_sending:
        due = min(due, window.closes_at_ms(record.window, policy.window))
    if not conversation.queue or conversation.activity is not Activity.IDLE:
        return due
    if conversation.has_unpublished:
        return now_ms
    match conversation.reason:
        case "":
            return min(due, max(conversation.not_before_ms, conversation.group_due_ms))
        case "needs_login":
            return min(due, now_ms + LOGIN_CHECK_MS)
        case "throttled":
            return min(due, window.probes_at_ms(record.window, policy.window))
        case _:
            return due


def _replaced(conversation: Conversation, **changes: object) -> Conversation:
    return msgspec.structs.replace(conversation, **changes)


def _apply_event(
    conversation: Conversation, event: Input, now_ms: int, policy: SendPolicy, effects: list[Effect]
) -> Conversation:
    """What an input changes by itself; `_advance_queue` decides what follows from it."""
    activity = conversation.activity
    match event:
        case Stored(commands):
            commands = _without_copies(conversation, commands, effects)
            if not commands:
                return conversation
            effects += [ReleaseBody(one) for one in commands if one.parked]  # by the owner before
            commands = tuple(msgspec.structs.replace(one, parts=None) if one.parked else one for one in commands)
            queue = (*conversation.queue, *commands)
            if conversation.queue and commands[0].sequence < conversation.queue[-1].sequence:
                begun = _first_group(conversation) if _is_begun(conversation) else ()
                rest = [one for one in queue if one not in begun]
                queue = (*begun, *sorted(rest, key=lambda one: one.sequence))
                if queue[0] is not conversation.queue[0]:  # what it waits for is not the first one's
                    conversation = _replaced(conversation, activity=Activity.IDLE, content=None)
            earliest_ms = min(conversation.earliest_expiry_ms, *(one.expires_ms for one in commands))
            return _replaced(conversation, queue=queue, earliest_expiry_ms=earliest_ms)
        case Dispatched(bot, sequence):
            return note_dispatched(conversation, bot, sequence)
        case InboundReceived():
            return _on_inbound_received(conversation, event, now_ms, effects)
        case Bound(bot):
            return _replaced(conversation, bot=bot)
        case SlotGranted():
            is_awaited = activity is Activity.AWAITING_SLOT
            return _replaced(conversation, holds_slot=True, activity=Activity.IDLE if is_awaited else activity)
        case Loaded(parts):
            if activity is Activity.LOADING:
                return _on_loaded(conversation, parts, effects)
        case UploadDone(content):
            if activity is Activity.UPLOADING:
                return _replaced(conversation, content=content, activity=Activity.IDLE)
        case SessionChecked(is_alive):
            if activity is Activity.CHECKING_SESSION:
                return _on_session_checked(conversation, now_ms, effects, is_alive=is_alive)
        case Ended(sequence, result):
            return _on_ended(conversation, sequence, result)
        case Crashed() if activity is Activity.SENDING:
            pass  # what is out ends by its answer
        case Crashed(detail, sequence) if sequence and [one.sequence for one in conversation.queue[:1]] != [sequence]:
            ended = [one for one in conversation.queue if one.sequence == sequence]
            return _end_commands(conversation, ended, CommandResult("dead_lettered", "crashed", detail), effects)
        case Crashed(detail):
            group = _group_to_send(conversation, policy) if activity is Activity.LOADING else ()
            if len(group) > 1 and conversation.record.head is None:  # each is read by itself: one is at fault
                return _replaced(conversation, activity=Activity.IDLE, merge_barrier=group[-1].sequence)
            return _end_first(conversation, CommandResult("dead_lettered", "crashed", detail), effects)
        case Deadline():
            pass
        case Rested():
            effects.append(Save())
        case _ if activity in (Activity.SENDING, Activity.UPLOADING):
            return _on_answer(conversation, event, now_ms, policy, effects)
    return conversation


def _is_begun(conversation: Conversation) -> bool:
    """Whether a request of the first command may have left: none goes before it any more."""
    progress, first = conversation.record.head, conversation.queue[0]
    if conversation.activity in (Activity.SENDING, Activity.CHECKING_SESSION):
        return True
    return bool(progress and progress.is_partially_sent and progress.has_command(first.ref.sequence))


def _without_copies(
    conversation: Conversation, commands: tuple[QueuedCommand, ...], effects: list[Effect]
) -> tuple[QueuedCommand, ...]:
    """Drops what the router copied once more while the copy before it waits: both are the same command."""
    if all(one.sequence == one.ref.sequence for one in commands):
        return commands
    known = {one.ref for one in conversation.queue}
    copies = [one for one in commands if one.sequence != one.ref.sequence and one.ref in known]
    effects += [Acknowledge(one, is_duplicate=True) for one in copies]
    return tuple(one for one in commands if one not in copies)


def _on_inbound_received(
    conversation: Conversation, inbound: InboundReceived, now_ms: int, effects: list[Effect]
) -> Conversation:
    if (
        conversation.record.dispatched_to.get(inbound.bot, 0) >= inbound.sequence
    ):  # read back from the journal once more
        return conversation
    record = window.on_inbound(
        conversation.record,
        message=inbound.message,
        token=inbound.token,
        bot=inbound.bot,
        now_ms=now_ms,
        received_ms=now_ms if inbound.received_ms is None else min(now_ms, inbound.received_ms),
        written_ms=inbound.written_ms,
        in_flight=int(conversation.activity is Activity.SENDING),
        sequence=inbound.sequence,
    )
    if inbound.show_typing:
        effects.append(SetTyping(None, is_on=True))
        record = msgspec.structs.replace(record, typing=True)
    return _replaced(conversation, record=record, typing_due=False, last_answer=None)


def note_dispatched(conversation: Conversation, bot: str, sequence: int) -> Conversation:
    """What `Dispatched` changes, from which nothing else follows."""
    if conversation.record.dispatched_to.get(bot, 0) >= sequence:  # read back from the journal once more
        return conversation
    others = [(name, to) for name, to in conversation.record.dispatched_to.items() if name != bot]
    dispatched_to = dict([*others[1 - DISPATCHED_BOTS_KEPT :], (bot, sequence)])
    return _replaced(conversation, record=msgspec.structs.replace(conversation.record, dispatched_to=dispatched_to))


def _on_loaded(
    conversation: Conversation, parts: Mapping[int, list[Part] | None], effects: list[Effect]
) -> Conversation:
    queue: list[QueuedCommand] = []
    for command in conversation.queue:
        body = parts.get(command.sequence, command.parts)
        if command.sequence in parts and body is None:  # an operator has dropped it
            effects.append(Acknowledge(command))
        else:
            queue.append(msgspec.structs.replace(command, parts=body))
    return _replaced(conversation, queue=tuple(queue), activity=Activity.IDLE)


# what iLink answers -----------------------------------------------------------------------------------


def _on_answer(
    conversation: Conversation, answer: Answer, now_ms: int, policy: SendPolicy, effects: list[Effect]
) -> Conversation:
    """To a request, which was counted, or to an upload, which was not."""
    progress, was_sent = conversation.record.head, conversation.activity is Activity.SENDING
    conversation = _replaced(conversation, activity=Activity.IDLE, last_answer=None)
    if was_sent and progress is not None:
        match answer:
            case Accepted():
                return _on_accepted(conversation, progress, answer, now_ms, effects)
            case Unanswered():
                record = window.record_answer_time(conversation.record, now_ms)
                return _pause_until(_replaced(conversation, record=record), now_ms + REPEAT_PAUSE_MS)
            case Throttled(result):
                return _on_throttled(conversation, progress, result, now_ms, effects)
        conversation = _replaced(conversation, record=window.undo_attempt(conversation.record, progress))
    match answer:
        case NotTaken():
            return _retry_or_give_up(conversation, answer, now_ms, policy, effects)
        case TokenRejected(result):  # a question, not a verdict: a malformed body is answered so, too
            effects.append(CheckSession())
            return _replaced(conversation, activity=Activity.CHECKING_SESSION, last_answer=result)
        case Rejected(result):
            if progress is not None and (split_head := _split_merged(conversation, progress.commands[-1])):
                return split_head
            return _end_first(conversation, result, effects)
    return conversation


def _on_accepted(
    conversation: Conversation, progress: SendProgress, answer: Accepted, now_ms: int, effects: list[Effect]
) -> Conversation:
    if not progress.unconfirmed:
        progress = msgspec.structs.replace(progress, ret=answer.ret, errcode=answer.errcode, errmsg=answer.errmsg)
    progress = msgspec.structs.replace(
        progress,
        part=progress.part + 1,
        unanswered_attempts=0,
        message_ids=[*progress.message_ids, *filter(None, [answer.message_id])],
        unconfirmed=progress.unconfirmed or not answer.message_id,
    )
    record = window.record_accepted(conversation.record, progress, now_ms)
    if answer.message_id and conversation.content is not None:
        record = _remember_sent(record, answer.message_id, conversation.content)
    if conversation.queue and progress.part < conversation.queue[0].part_count:
        effects.append(Save())  # the pause before the next request is long
    return _replaced(conversation, record=record, content=None, failures=0)


def _remember_sent(record: ConversationRecord, message_id: str, content: Content) -> ConversationRecord:
    """The record with the beginning of what iLink took under an id."""
    if isinstance(content, str):
        kind, text = "text", content[:SENT_TEXT_CHARS]
    else:
        kind, text = content.kind, placeholder_summary(content.kind, content.name if content.kind == "file" else "")
    sent = [*record.sent, SentText(id=message_id, kind=kind, text=text)][-SENT_TEXTS:]
    return msgspec.structs.replace(record, sent=sent)


def _on_throttled(
    conversation: Conversation, progress: SendProgress, result: CommandResult, now_ms: int, effects: list[Effect]
) -> Conversation:
    """-2: quiet until the user writes. Refused again in another window, the command itself is at fault.

    Of merged commands the first goes alone the next time, so that each fault is found.
    """
    is_second = progress.throttled_in_window not in ("", progress.counted_in_window)
    record = window.record_throttled(conversation.record, progress, now_ms)
    conversation = _replaced(conversation, record=record, last_answer=result)
    if is_second:
        return _end_first(conversation, result, effects)
    effects.append(Save())
    return _split_merged(conversation, progress.commands[0]) or conversation


def _split_merged(conversation: Conversation, last: CommandRef) -> Conversation | None:
    """Takes merged commands apart of which nothing may have been sent: those up to `last` are sent by themselves."""
    progress = conversation.record.head
    if progress is None or len(progress.commands) == 1 or progress.is_partially_sent:
        return None
    first = msgspec.structs.replace(progress, commands=progress.commands[:1], digest="")
    barrier = next((one.sequence for one in conversation.queue if one.ref == last), 0)
    return _replaced(
        conversation,
        record=msgspec.structs.replace(conversation.record, head=first),
        merge_barrier=max(conversation.merge_barrier, barrier),
    )


def _on_session_checked(
    conversation: Conversation, now_ms: int, effects: list[Effect], *, is_alive: bool
) -> Conversation:
    """Alive: the command is tried once more, then refused. Dead: it waits for the login."""
    answer = conversation.last_answer or CommandResult("refused")
    conversation = _replaced(conversation, activity=Activity.IDLE, last_answer=None)
    if not is_alive:
        effects.append(Save())  # a login may take hours, and the next bot repeats nothing unanswered
        bot = conversation.bot._replace(is_usable=False) if conversation.bot else None
        return _replaced(conversation, bot=bot, last_answer=answer)
    if conversation.token_rejections:
        return _end_first(conversation, answer._replace(outcome="refused", reason="rejected"), effects)
    return _pause_until(_replaced(conversation, token_rejections=1), now_ms + REPEAT_PAUSE_MS)


def _retry_or_give_up(
    conversation: Conversation, answer: NotTaken, now_ms: int, policy: SendPolicy, effects: list[Effect]
) -> Conversation:
    """iLink took nothing. What did not even leave waits as long as the command; else a number of attempts."""
    failures = conversation.failures + 1
    conversation = _pause_until(_replaced(conversation, failures=failures), now_ms + answer.pause_ms)
    if answer.is_unreached or failures < policy.attempts * conversation.queue[0].part_count:
        return conversation
    return _end_first(conversation, CommandResult("dead_lettered", "unreachable", answer.detail), effects)


def _pause_until(conversation: Conversation, until_ms: int) -> Conversation:
    return _replaced(conversation, not_before_ms=max(conversation.not_before_ms, until_ms))


# how commands end -------------------------------------------------------------------------------------


def _end_commands(
    conversation: Conversation, commands: Sequence[QueuedCommand], result: CommandResult, effects: list[Effect]
) -> Conversation:
    """Ends commands: all receipts before the first acknowledgement, so that whoever goes on after a crash finds them.

    What the send under way has reached counts more than `result`.
    """
    progress, shared = conversation.record.head, None
    for command in commands:
        published = result
        if progress is not None and progress.has_command(command.ref.sequence):
            shared = published = conversation.head_result or reconcile_with_progress(result, progress, command)
        effects.append(PublishReceipt(command, published))
    effects += [Acknowledge(command) for command in commands]
    is_first = bool(commands) and commands[0] is conversation.queue[0]
    conversation = _without_commands(conversation, {command.sequence for command in commands})
    if progress is None or shared is None:
        return _reset_progress(conversation) if is_first else conversation
    ended = {command.ref.sequence for command in commands}
    if shared.may_be_sent and any(one.sequence not in ended for one in progress.commands):
        return _replaced(conversation, head_result=shared)  # the others come yet: after a take-over one by one
    return _close_head(conversation, may_be_sent=shared.may_be_sent)


def _close_head(conversation: Conversation, *, may_be_sent: bool) -> Conversation:
    """The send under way has ended. Not `may_be_sent`: with the same id a command may be tried again."""
    record = conversation.record
    ids = [one.id for one in record.head.commands] if may_be_sent and record.head else []
    recent = [*(one for one in record.recent if one not in ids), *ids][-RECENT_COMMANDS:]
    record = msgspec.structs.replace(record, head=None, recent=recent)
    return _reset_progress(_replaced(conversation, record=record))


def _reset_progress(conversation: Conversation) -> Conversation:
    """What is known of the first command's requests does not hold for the next one's."""
    return _replaced(
        conversation,
        content=None,
        failures=0,
        token_rejections=0,
        head_result=None,
        group_due_ms=0,
        last_answer=None,
    )


def _end_first(conversation: Conversation, result: CommandResult, effects: list[Effect]) -> Conversation:
    """Ends the first command, with those that are in one message with it."""
    conversation = _replaced(conversation, activity=Activity.IDLE, content=None)
    return _end_commands(conversation, _first_group(conversation), result, effects)


def _on_ended(conversation: Conversation, sequence: int, result: CommandResult) -> Conversation:
    """Those that were merged with it share its outcome, unless nothing was sent of them."""
    progress = conversation.record.head
    if progress is None or not progress.has_command(sequence):
        return conversation
    if not result.may_be_sent:
        return _close_head(conversation, may_be_sent=False)
    return _replaced(conversation, head_result=result)


def _expire_commands(conversation: Conversation, now_ms: int, effects: list[Effect]) -> Conversation:
    """Ends what waited too long. Commands of one message that may have been sent expire together, with the last."""
    group = _first_group(conversation)
    progress = conversation.record.head
    together_ms: float = max((one.expires_ms for one in group), default=0)
    if conversation.activity in (Activity.SENDING, Activity.CHECKING_SESSION):
        together_ms = math.inf
    elif progress is None or not progress.is_partially_sent:
        group = ()

    def expires_ms(one: QueuedCommand) -> float:
        return together_ms if one in group else one.expires_ms

    overdue = [one for one in conversation.queue if expires_ms(one) <= now_ms]
    sent = [one for one in overdue if one not in group and one.ref.id in conversation.record.recent]
    effects += [Acknowledge(one, is_duplicate=True) for one in sent]
    conversation = _without_commands(conversation, {one.sequence for one in sent})
    overdue = [one for one in overdue if one not in sent]
    if overdue and overdue[0] is conversation.queue[0]:
        conversation = _replaced(conversation, activity=Activity.IDLE, content=None)
    conversation = _end_commands(
        conversation, overdue, CommandResult("refused", "expired", "It was not sent in time."), effects
    )
    return _replaced(conversation, earliest_expiry_ms=min(map(expires_ms, conversation.queue), default=math.inf))


def _end_unbound(conversation: Conversation, effects: list[Effect]) -> Conversation:
    """Ends what waits for a user whom no bot serves any more; what is being sent ends by its answer."""
    under_way = _first_group(conversation) if conversation.activity is Activity.SENDING else ()
    ended = [one for one in conversation.queue if one not in under_way]
    if not under_way:
        conversation = _replaced(conversation, activity=Activity.IDLE, content=None)
    return _end_commands(conversation, ended, CommandResult("refused", "not_bound", "The bot was unbound."), effects)


def reconcile_with_progress(result: CommandResult, progress: SendProgress, command: QueuedCommand) -> CommandResult:
    """What is told of a command that ends, given what was tried of it before.

    A request that got no answer may have been taken: then it cannot be called refused. And all may have been taken,
    only that nobody could be told of it in time.
    """
    if result.is_sent:
        return result
    if progress.part >= command.part_count:
        return _accepted_result(progress)
    attempts = max(result.attempts, progress.attempts)
    result = result._replace(message_ids=tuple(progress.message_ids), attempts=attempts)
    if not progress.unanswered_attempts or result.outcome == "uncertain":
        return result
    detail = f"It may have been sent: an earlier request got no answer. Later: {result.detail}"
    return result._replace(outcome="uncertain", reason="", detail=detail)


def _accepted_result(progress: SendProgress) -> CommandResult:
    """iLink has taken every part."""
    return CommandResult(
        "accepted_unconfirmed" if progress.unconfirmed else "accepted",
        message_ids=tuple(progress.message_ids),
        attempts=progress.attempts,
        ret=progress.ret,
        errcode=progress.errcode,
        errmsg=progress.errmsg,
    )


# what comes next --------------------------------------------------------------------------------------


def _advance_queue(
    conversation: Conversation, now_ms: int, policy: SendPolicy, effects: list[Effect]
) -> Conversation:
    """Goes on with the queue as far as nothing has to be waited for."""
    if conversation.activity is Activity.IDLE and conversation.record.head is not None:
        # while its request was out it did not expire
        expiries = [one.expires_ms for one in _first_group(conversation)]
        earliest_ms = min([conversation.earliest_expiry_ms, *expiries])
        conversation = _replaced(conversation, earliest_expiry_ms=earliest_ms)
    if conversation.earliest_expiry_ms <= now_ms:
        conversation = _expire_commands(conversation, now_ms, effects)
    if conversation.bot is None:
        conversation = _end_unbound(conversation, effects)
    conversation = _replaced(conversation, has_unpublished=False)
    while conversation.activity is Activity.IDLE and conversation.queue:
        first, progress = conversation.queue[0], conversation.record.head
        if progress is not None and not progress.has_command(first.ref.sequence):
            # the owner before ended it, without having stored that
            conversation = _close_head(conversation, may_be_sent=progress.is_partially_sent)
            continue
        if ended := _end_without_sending(conversation, first, progress, effects):
            conversation = ended
            continue
        blocked = _blocked_reason(conversation, first, now_ms, policy)
        if blocked == "reserved" or (blocked and (first.when_closed == "refuse" or first.typing)):
            answer = conversation.last_answer or CommandResult("refused")
            conversation = _end_first(conversation, answer._replace(outcome="refused", reason=blocked), effects)
            conversation = _replaced(conversation, typing_due=True)
            continue
        conversation = _replaced(conversation, reason=blocked)
        if blocked:
            return _park_waiting(conversation, blocked, effects)
        if 0 < conversation.not_before_ms - now_ms <= window.CLOCK_ERROR_MS:
            return conversation
        if _is_group_incomplete(conversation):
            due_ms = conversation.group_due_ms or now_ms + GROUP_WAIT_MS
            conversation = _replaced(conversation, group_due_ms=due_ms)
            if now_ms < due_ms:
                return conversation
        conversation = _send_next(conversation, now_ms, policy, effects)
    return conversation if conversation.queue else _replaced(conversation, reason="", earliest_expiry_ms=math.inf)


def _is_group_incomplete(conversation: Conversation) -> bool:
    """Whether commands are missing that are in the message which may have been sent."""
    progress = conversation.record.head
    if progress is None or not progress.is_partially_sent:
        return False
    return len(_first_group(conversation)) < len(progress.commands)


def _end_without_sending(
    conversation: Conversation, first: QueuedCommand, progress: SendProgress | None, effects: list[Effect]
) -> Conversation | None:
    """Ends the first command where nothing has to be sent for that; None: something has."""
    if first.typing:
        if not (_is_usable(conversation) and conversation.user):
            return None
        effects.append(SetTyping(first, is_on=first.typing == "on"))
        conversation = _without_commands(conversation, {first.sequence})
        if first.typing == "off":
            return conversation
        if not conversation.record.typing:
            effects.append(Save())  # the next owner has to know that something may have to be hidden
        record = msgspec.structs.replace(conversation.record, typing=True)
        return _replaced(conversation, record=record, typing_due=False)
    if progress is None:
        if first.ref.id not in conversation.record.recent:
            return None
        effects.append(Acknowledge(first, is_duplicate=True))
        return _without_commands(conversation, {first.sequence})
    if conversation.head_result or progress.part >= first.part_count:
        return _end_first(conversation, conversation.head_result or _accepted_result(progress), effects)
    bot = conversation.bot.id if conversation.bot else ""
    is_repeatable = progress.unanswered_attempts <= MAX_RESENDS and progress.bot == bot
    if not progress.unanswered_attempts or is_repeatable:
        return None
    # over another bot it would be another message on the phone
    detail = "iLink gave no answer that can be read, and is not asked again: that might show it twice."
    return _end_first(conversation, CommandResult("uncertain", "", detail), effects)


def _is_usable(conversation: Conversation) -> bool:
    return conversation.bot is not None and conversation.bot.is_usable


def _blocked_reason(conversation: Conversation, first: QueuedCommand, now_ms: int, policy: SendPolicy) -> str:
    """Why the first command may not be sent now; "" if it may. Before its first request, all its parts must fit; a
    repeat was counted already."""
    if not _is_usable(conversation):
        return "needs_login"
    if first.typing:
        return "window_closed"  # the user is not known yet
    record, progress = conversation.record, conversation.record.head
    needed, optional = first.part_count, first.optional
    if progress is not None and progress.is_partially_sent:
        is_counted = progress.unanswered_attempts and progress.counted_in_window == record.window.id
        needed, optional = 0 if is_counted else 1, False
    return window.send_blocker(record, now_ms, policy.window, needed=needed, optional=optional)


def _park_waiting(conversation: Conversation, reason: str, effects: list[Effect]) -> Conversation:
    """The queue waits: parks each command that was not parked, or refuses it where it does not want to wait."""
    queue, answer = conversation.queue, conversation.last_answer or CommandResult("parked")
    start = len(queue)
    while start and not queue[start - 1].parked:
        start -= 1
    some = queue[start : start + RECEIPTS_PER_STEP]
    parked: list[QueuedCommand] = []
    for command in some:
        is_reserved = command.optional and reason == "quota"
        if command.when_closed == "refuse" or command.typing or is_reserved:
            result = CommandResult("refused", "reserved" if is_reserved else reason)
            conversation = _end_commands(conversation, [command], result, effects)
        else:
            result = answer._replace(outcome="parked", reason=reason)
            effects += [PublishReceipt(command, result), ReleaseBody(command)]
            parked.append(msgspec.structs.replace(command, parts=None, parked=True))
            answer = CommandResult("parked")
    rest = queue[start + RECEIPTS_PER_STEP :]
    return _replaced(
        conversation,
        queue=(*queue[:start], *parked, *rest),
        has_unpublished=bool(rest),
        typing_due=conversation.typing_due or bool(some),
        content=None,
        last_answer=None,
    )


def _send_next(conversation: Conversation, now_ms: int, policy: SendPolicy, effects: list[Effect]) -> Conversation:
    """The next request for the first command, or what has to come before it."""
    group = _group_to_send(conversation, policy)
    if missing := [one.sequence for one in group if one.parts is None]:
        effects.append(Load(missing))
        return _replaced(conversation, activity=Activity.LOADING)
    progress, bot = conversation.record.head, conversation.bot.id if conversation.bot else ""
    parts: list[Part] = group[0].parts or []
    digest = ""
    if len(group) > 1:
        group = _mergeable_prefix(group) if progress is None or len(progress.commands) == 1 else group
        text = MERGE_SEPARATOR.join(_only_text(one) for one in group)
        parts, digest = [text], _text_digest(text) if len(group) > 1 else ""
    if progress is not None and (len(group), digest) != (len(progress.commands), progress.digest):
        if progress.is_partially_sent:
            detail = "It may have been sent, together with commands that are gone."
            return _end_first(conversation, CommandResult("uncertain", "", detail), effects)
        progress = None
    if progress is None:
        refs = [one.ref for one in group]
        progress = SendProgress(commands=refs, client_id_base=group[0].client_id_base, bot=bot, digest=digest)
    part = parts[progress.part]
    ident = client_id(progress.client_id_base, progress.part, len(group) - 1)
    if isinstance(part, MediaPart) and conversation.content is None:
        effects.append(Upload(ident, part))
        return _replaced(conversation, activity=Activity.UPLOADING)
    if not conversation.holds_slot:
        effects.append(RequestSlot())
        return _replaced(conversation, activity=Activity.AWAITING_SLOT)
    content = part if isinstance(part, str) else conversation.content
    assert content is not None
    effects += [Save(), Post(ident, content)]
    progress = msgspec.structs.replace(progress, bot=bot)
    return _replaced(
        conversation,
        record=window.record_attempt(conversation.record, progress, now_ms),
        activity=Activity.SENDING,
        holds_slot=False,
        typing_due=True,
        content=content,
        not_before_ms=now_ms + policy.gap_ms,
    )


def _group_to_send(conversation: Conversation, policy: SendPolicy) -> tuple[QueuedCommand, ...]:
    """The first command and those whose texts may go in the same message, as far as their lengths tell.

    A message that may have been sent holds the same ones again.
    """
    first, progress = conversation.queue[0], conversation.record.head
    if progress is not None:
        return _first_group(conversation)
    if not first.parked or first.sequence <= conversation.merge_barrier or not _is_mergeable(first):
        return (first,)
    group, chars, ids = [first], first.chars, {first.ref.id, *conversation.record.recent}
    for one in conversation.queue[1:MERGED_AT_ONCE]:
        chars += len(MERGE_SEPARATOR) + one.chars
        if not one.parked or not _is_mergeable(one) or one.ref.id in ids or chars > policy.merge_chars:
            break
        ids.add(one.ref.id)
        group.append(one)
    return tuple(group)


def _is_mergeable(command: QueuedCommand) -> bool:
    return bool(command.chars) and not command.optional


def _mergeable_prefix(group: tuple[QueuedCommand, ...]) -> tuple[QueuedCommand, ...]:
    """Those that really go together, now that their texts are known."""
    size = 0
    for count, one in enumerate(group):
        text = _only_text(one)
        size += len(text.encode()) + len(MERGE_SEPARATOR)
        if count and size > MAX_BYTES:
            return group[:count]
        if is_open(text):  # the next text would become part of its code
            return group[: count + 1]
    return group


def _first_group(conversation: Conversation) -> tuple[QueuedCommand, ...]:
    """The first command, and those that are in one message with it."""
    progress, queue = conversation.record.head, conversation.queue
    if progress is None or not queue or not progress.has_command(queue[0].ref.sequence):
        return queue[:1]
    if len(progress.commands) == 1:
        return queue[:1]
    return tuple(one for one in queue[:MERGED_AT_ONCE] if progress.has_command(one.ref.sequence))


def _only_text(command: QueuedCommand) -> str:
    part = command.parts[0] if command.parts else ""
    return part if isinstance(part, str) else ""


def _text_digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _without_commands(conversation: Conversation, sequences: set[int]) -> Conversation:
    queue = conversation.queue
    if len(sequences) == 1 and queue and queue[0].sequence in sequences:
        return _replaced(conversation, queue=queue[1:])
    return _replaced(conversation, queue=tuple(one for one in queue if one.sequence not in sequences))


def _note_service(conversation: Conversation, effects: list[Effect]) -> Conversation:
    """The record of a user whom no bot serves goes in time; that of one who is served again stays."""
    is_unserved = conversation.bot is None
    if not conversation.user or conversation.record.unserved == is_unserved:
        return conversation
    effects.append(Save())
    return _replaced(conversation, record=msgspec.structs.replace(conversation.record, unserved=is_unserved))


def _announce_window(
    conversation: Conversation, now_ms: int, policy: SendPolicy, effects: list[Effect]
) -> Conversation:
    """Tells the sandbox of a changed window, once no request is out that may count against it or not."""
    record = conversation.record
    if conversation.bot is None or conversation.activity is Activity.SENDING or not record.window.opened_ms:
        return conversation
    current, reason = window.phase(record, now_ms, policy.window)
    change = window.phase_change(record.announced, current)
    if change:
        effects.append(Announce(change, reason))
    elif record.announced == "" or record.announced_window == record.window.id:
        return conversation
    record = msgspec.structs.replace(record, announced=current, announced_window=record.window.id)
    return _replaced(conversation, record=record)


def adopt_inbound(conversation: Conversation, stored: ConversationRecord) -> Conversation:
    """What the shard's owner before stored last, which may have heard more of the user: window and token."""
    record, known, opened = conversation.record, conversation.record.window, stored.window
    if opened.id == known.id or opened.sequence < known.sequence:
        return conversation
    if record.head is not None and record.head.unanswered_attempts:
        sent_at_ms = [*opened.sent_at_ms, *known.sent_at_ms[-1:]]
        opened = msgspec.structs.replace(opened, sends_used=max(opened.sends_used, 1), sent_at_ms=sent_at_ms)
    record = msgspec.structs.replace(record, window=opened, token=stored.token, bot=stored.bot)
    return _replaced(conversation, record=record, typing_due=False)
