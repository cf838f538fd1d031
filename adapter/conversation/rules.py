"""The rules of one conversation as a pure function: `step(conversation, input) -> conversation, effects`.

The function has no clock, no I/O and no awaits. An input says what happened. The effects say what to do, and the
actor carries them out in their order. Every decision about a user's commands is made in this module.

The commands of a user form one queue, in the order of their sequences. Only the head of the queue is worked on: the
first command, with the commands that are merged into its message. `Activity` says what is under way for the head:

    activity          input               next activity
    ----------------  ------------------  -------------------------------------------------------------------
    IDLE              (send allowed)      LOADING (body not in memory), UPLOADING (media not on the CDN),
                                          AWAITING_SLOT, SENDING (slot granted: Save, then Post)
                      (send blocked)      IDLE: each command is parked or refused, once
    LOADING           Loaded              IDLE
    UPLOADING         UploadDone          IDLE
                      NotTaken, Rejected, as in SENDING
                      TokenRejected
    AWAITING_SLOT     SlotGranted         IDLE, then SENDING in the same step
    SENDING           Accepted            IDLE: next part, or the command ends (accepted, accepted_unconfirmed)
                      Unanswered          IDLE: one repeat with the same client_id, then the command ends (uncertain)
                      NotTaken            IDLE: retry after a pause; after many retries it ends (dead_lettered)
                      Throttled (-2)      IDLE: the window is throttled; in a second window the command ends (refused)
                      Rejected            IDLE: the command ends (refused); merged commands are sent one by one
                      TokenRejected (-14) CHECKING_SESSION
    CHECKING_SESSION  SessionChecked      IDLE: session alive: one retry, then refused; dead: the bot needs a login
    any               Stored              unchanged; commands join the queue
                      InboundReceived     unchanged; a new window opens, which the actor stores within a second
                      Bound               unchanged; without a bot every command that is not being sent ends, and the
                                          record is stored with a time to live (Save)
                      Deadline            unchanged; expired commands end, and the queue is examined again
                      Rested              unchanged; the record is stored (Save)
                      Ended               IDLE: commands merged with one that the previous owner ended end like it
                      Crashed             IDLE: the command ends (dead_lettered)

`Conversation.reason` says why a queue waits: window_closed, quota, throttled or needs_login (`window.send_blocker`).
docs/explanation/conversation.md has the diagram.
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
    BOTS_KEPT,
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
"""Repeats of a request that got no answer. They have the same client_id, by which clients expect WeChat to show the
message once (docs/reference/ilink-protocol.md, "sendmessage")."""
MERGED_AT_ONCE = 32
"""Most texts in one merged message. A record remembers as many ids."""
RECEIPTS_PER_STEP = 16
"""Most commands that are parked or refused in one step, so that an inbound message waits for no more than these."""
ATTEMPTS = 8
"""They take two minutes. A command that iLink does not accept by then must not delay the user's other commands."""
REPEAT_PAUSE_MS = 1000
"""Pause before the repeat of a request that got no answer, or got -14 while the session is alive."""
GROUP_WAIT_MS = 10_000
"""After a takeover, commands of a merged message that are not redelivered within this time are gone."""
LOGIN_CHECK_MS = 60_000
"""Interval at which a queue that waits for a login checks the binding, in case its update was lost."""


class SendPolicy(NamedTuple):
    """Settings of sending."""

    window: WindowPolicy
    gap_ms: int
    """Least time between two requests to one user."""
    merge_chars: int
    """Most characters of a message merged from parked texts; 0: no merging."""
    attempts: int = ATTEMPTS
    """Requests for one part that iLink may fail to take before the command is given up."""


class Activity(enum.Enum):
    """What is under way for the head of the queue."""

    IDLE = "idle"
    LOADING = "loading"
    """Bodies are being read from the bus."""
    UPLOADING = "uploading"
    """Media are being uploaded to the CDN."""
    AWAITING_SLOT = "awaiting_slot"
    """The limit of concurrent requests is reached."""
    SENDING = "sending"
    """A request is out."""
    CHECKING_SESSION = "checking_session"
    """iLink answered -14; a probe finds out whether the session is alive."""


class Bot(msgspec.Struct, frozen=True):
    """The bot that serves the user now."""

    id: str
    is_usable: bool
    """False: iLink refuses the bot's token (-14). Nothing is sent until iLink takes it again or the bot changes."""
    serves_other: bool = False
    """The user is not the one of its binding."""


class CommandResult(msgspec.Struct, frozen=True):
    """Result of a command in the terms of its receipt. The outcome `parked` is not final."""

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
        """iLink accepted all parts."""
        return self.outcome in ("accepted", "accepted_unconfirmed")

    @property
    def may_be_sent(self) -> bool:
        """The message may be on the user's phone."""
        return self.is_sent or self.outcome == "uncertain"


class QueuedCommand(msgspec.Struct, frozen=True, kw_only=True):
    """A command in the queue."""

    sequence: int
    """Stream sequence of the message, used to acknowledge it and to read it again."""
    ref: CommandRef
    """Identity of the command. For a copy by the router it is that of the original."""
    client_id_base: str
    kind: str = "unreadable"
    """Metrics label: text, media, typing; unreadable for a message that is no command."""
    parts: list[Part] | None = None
    """One request each; None: the body is only on the bus."""
    part_count: int = 0
    chars: int = 0
    """Length of the text if the text is the only part, else 0."""
    expires_ms: int = 0
    when_closed: Literal["park", "refuse"] = "park"
    optional: bool = False
    typing: Literal["", "on", "off"] = ""
    reply_to: str = ""
    """The inbound message that it answers; "" for none, and for what is too long to be one."""
    parked: bool = False
    """The sandbox has a receipt `parked` for it."""

    def __repr__(self) -> str:
        return f"QueuedCommand({self.sequence})"  # no text gets into a log or traceback


class Conversation(msgspec.Struct, frozen=True, kw_only=True):
    """The state of one conversation."""

    sandbox: str
    user: str
    """"" while the user of the sandbox's bot is unknown; the commands wait."""
    record: ConversationRecord = ConversationRecord()
    bot: Bot | None = None
    """None: no bot of the sandbox serves the user."""
    queue: tuple[QueuedCommand, ...] = ()
    """In the order of sequences. Parked commands come first."""
    activity: Activity = Activity.IDLE
    holds_slot: bool = False
    content: Content | None = None
    """Content of the request under way, or the uploaded media of the next request."""
    not_before_ms: int = 0
    """Earliest time of the next request: the send gap, or the pause after a failure."""
    failures: int = 0
    """Consecutive requests for the head that iLink did not take."""
    token_rejections: int = 0
    """Times that iLink answered -14 for the head while the session was alive."""
    head_result: CommandResult | None = None
    """Result with which the previous owner ended a command of the message under way; the others in it share it."""
    group_due_ms: int = 0
    """Until when the missing commands of a merged message are awaited after a takeover."""
    merge_barrier: int = 0
    """Commands up to this sequence are not merged, since iLink refused them merged."""
    reason: str = ""
    """Why the queue waits; "" if it does not."""
    earliest_expiry_ms: float = math.inf
    """Earliest expiry of a command in the queue."""
    has_unpublished: bool = False
    """Commands remain to be parked or refused in the next step."""
    last_answer: CommandResult | None = None
    """iLink's answer to the request after which the queue waits."""


# inputs -----------------------------------------------------------------------------------------------


class Stored(msgspec.Struct, frozen=True):
    """Commands for this user were stored, or stored commands turned out to be for this user."""

    commands: tuple[QueuedCommand, ...]


class InboundReceived(msgspec.Struct, frozen=True):
    """The user wrote."""

    message: str
    """Message id on the bus."""
    token: str
    """Context token; "" if iLink gave none."""
    bot: str
    written_ms: int
    """WeChat's clock; 0: unknown."""
    sequence: int
    """Sequence of the message in the sandbox's inbox. A message is applied once."""
    received_ms: int | None = None
    """When iLink delivered the message, possibly long ago; None: now."""


class Bound(msgspec.Struct, frozen=True):
    """The bot that serves the user changed; None: no bot of the sandbox does."""

    bot: Bot | None


class SlotGranted(msgspec.Struct, frozen=True):
    """One request may be made."""


Body: TypeAlias = list[Part] | CommandResult | None
"""The parts of a command; how a command ends that cannot be read; None: the command is gone from the bus."""


class Loaded(msgspec.Struct, frozen=True):
    """Bodies were read, by sequence."""

    bodies: Mapping[int, Body]


class UploadDone(msgspec.Struct, frozen=True):
    """The media of a part are on the CDN."""

    content: Uploaded


class Accepted(msgspec.Struct, frozen=True):
    """iLink accepted the request. Without a `message_id` iLink has often dropped the message
    (docs/reference/ilink-protocol.md, "Success without a message id")."""

    message_id: str
    ret: int | None = None
    errcode: int | None = None
    errmsg: str = ""


class Unanswered(msgspec.Struct, frozen=True):
    """The request was sent, and no readable answer came."""


class NotTaken(msgspec.Struct, frozen=True):
    """iLink did not take the request for now. `is_unreached`: the request was never sent, or what stands in front of
    iLink turned it away."""

    detail: str
    pause_ms: int
    is_unreached: bool = False


class Throttled(msgspec.Struct, frozen=True):
    """iLink answered -2, with the details in `result`."""

    result: CommandResult


class Rejected(msgspec.Struct, frozen=True):
    """iLink refused the request for good."""

    result: CommandResult


class TokenRejected(msgspec.Struct, frozen=True):
    """iLink answered -14."""

    result: CommandResult


Answer: TypeAlias = Accepted | Unanswered | NotTaken | Throttled | Rejected | TokenRejected
"""Answer to a request. An upload has the same ones except Accepted, Unanswered and Throttled."""


class SessionChecked(msgspec.Struct, frozen=True):
    """Result of the probe after a -14."""

    is_alive: bool


class Deadline(msgspec.Struct, frozen=True):
    """A deadline passed (`next_deadline_ms`)."""


class Rested(msgspec.Struct, frozen=True):
    """The conversation was idle for a while: the state is stored so that memory can drop it."""


class Ended(msgspec.Struct, frozen=True):
    """The previous owner stored this final receipt for a command of the message under way."""

    sequence: int
    result: CommandResult


class Crashed(msgspec.Struct, frozen=True):
    """Work on a command raised an unexpected error several times."""

    detail: str
    sequence: int = 0
    """Sequence of a command that could not be parked; 0: the head."""


Input: TypeAlias = (
    Stored
    | InboundReceived
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


class Save(msgspec.Struct, frozen=True):
    """Store the record before any later effect."""


class RequestSlot(msgspec.Struct, frozen=True):
    """Request a slot for one request; the answer is SlotGranted."""


class ReleaseSlot(msgspec.Struct, frozen=True):
    """Release the slot."""


class Load(msgspec.Struct, frozen=True):
    """Read bodies from the bus; the answer is Loaded."""

    sequences: list[int]


class Upload(msgspec.Struct, frozen=True):
    """Upload media to the CDN; the answer is UploadDone or an Answer."""

    media: MediaPart


class Post(msgspec.Struct, frozen=True):
    """Make the request, which releases the slot at its end; the answer is an Answer."""

    client_id: str
    content: Content


class CheckSession(msgspec.Struct, frozen=True):
    """Probe the bot's session; the answer is SessionChecked."""


class PublishReceipt(msgspec.Struct, frozen=True):
    """Publish a receipt."""

    command: QueuedCommand
    result: CommandResult


class Acknowledge(msgspec.Struct, frozen=True):
    """Remove an ended command from the bus. `is_duplicate`: it was sent earlier and gets no receipt."""

    command: QueuedCommand
    is_duplicate: bool = False


class ReleaseBody(msgspec.Struct, frozen=True):
    """Drop the body of a waiting command from memory."""

    command: QueuedCommand


class SetTyping(msgspec.Struct, frozen=True):
    """Show or hide the typing indicator."""

    is_on: bool


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
)


# the step ---------------------------------------------------------------------------------------------


def step(
    conversation: Conversation, event: Input, now_ms: int, policy: SendPolicy
) -> tuple[Conversation, list[Effect]]:
    """The conversation after `event`, and the effects to carry out in this order."""
    effects: list[Effect] = []
    conversation = _apply_event(conversation, event, now_ms, policy, effects)
    conversation = _advance_queue(conversation, now_ms, policy, effects)
    is_idle = conversation.activity is Activity.IDLE
    if conversation.holds_slot and is_idle:
        conversation = _replaced(conversation, holds_slot=False)
        effects.append(ReleaseSlot())
    if effects and is_idle and (not conversation.queue or conversation.reason) and _ends_typing(effects):
        effects.append(SetTyping(is_on=False))
    conversation = _note_service(conversation, effects)
    return conversation, _with_one_save(effects)


def _ends_typing(effects: list[Effect]) -> bool:
    """Whether the last command that has ended or is parked is another than one that shows the typing indicator."""
    last = next((effect for effect in reversed(effects) if isinstance(effect, PublishReceipt)), None)
    return last is not None and not (last.command.typing == "on" and last.result.is_sent)


def _with_one_save(effects: list[Effect]) -> list[Effect]:
    """Moves Save right before the request, or else to the end: a send that ended in memory must stay in the stored
    record until its receipts are stored."""
    others = [effect for effect in effects if not isinstance(effect, Save)]
    if len(others) == len(effects):
        return effects
    at = next((index for index, effect in enumerate(others) if isinstance(effect, Post)), len(others))
    return [*others[:at], Save(), *others[at:]]


def may_send_at_once(conversation: Conversation, stored: Stored) -> bool:
    """Whether a request may follow at once. A slot that is taken before saves a step; `step` releases it if it is not
    needed."""
    first = stored.commands[0]
    is_free = not conversation.queue and conversation.activity is Activity.IDLE and not conversation.holds_slot
    return is_free and first.kind == "text" and first.parts is not None and not first.parked


def with_slot(conversation: Conversation) -> Conversation:
    """The conversation, which holds a slot for one request."""
    return _replaced(conversation, holds_slot=True)


def next_deadline_ms(conversation: Conversation, now_ms: int, policy: SendPolicy) -> float:
    """When the next Deadline is due; inf: never."""
    record, due = conversation.record, conversation.earliest_expiry_ms
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
    """The direct changes of an input. `_advance_queue` decides what follows."""
    activity = conversation.activity
    match event:
        case Stored(commands):
            commands = _without_copies(conversation, commands, effects)
            if not commands:
                return conversation
            effects += [ReleaseBody(command) for command in commands if command.parked]  # by the previous owner
            commands = tuple(
                msgspec.structs.replace(command, parts=None) if command.parked else command for command in commands
            )
            queue = (*conversation.queue, *commands)
            if conversation.queue and commands[0].sequence < conversation.queue[-1].sequence:
                begun = _first_group(conversation) if _is_begun(conversation) else ()
                rest = [command for command in queue if command not in begun]
                queue = (*begun, *sorted(rest, key=lambda command: command.sequence))
                if queue[0] is not conversation.queue[0]:  # the activity belonged to the former head
                    conversation = _replaced(conversation, activity=Activity.IDLE, content=None)
            earliest_ms = min(conversation.earliest_expiry_ms, *(command.expires_ms for command in commands))
            return _replaced(conversation, queue=queue, earliest_expiry_ms=earliest_ms)
        case InboundReceived():
            return _on_inbound_received(conversation, event, now_ms)
        case Bound(bot):
            if bot is None:
                effects.append(SetTyping(is_on=False))
            return _replaced(conversation, bot=bot)
        case SlotGranted():
            is_awaited = activity is Activity.AWAITING_SLOT
            return _replaced(conversation, holds_slot=True, activity=Activity.IDLE if is_awaited else activity)
        case Loaded(bodies):
            if activity is Activity.LOADING:
                return _on_loaded(conversation, bodies, effects)
        case UploadDone(content):
            if activity is Activity.UPLOADING:
                return _replaced(conversation, content=content, activity=Activity.IDLE)
        case SessionChecked(is_alive):
            if activity is Activity.CHECKING_SESSION:
                return _on_session_checked(conversation, now_ms, effects, is_alive=is_alive)
        case Ended(sequence, result):
            return _on_ended(conversation, sequence, result)
        case Crashed() if activity is Activity.SENDING:
            pass  # the answer to the request under way ends the command
        case Crashed(detail, sequence) if sequence and [command.sequence for command in conversation.queue[:1]] != [
            sequence
        ]:
            ended = [command for command in conversation.queue if command.sequence == sequence]
            return _end_commands(conversation, ended, CommandResult("dead_lettered", "crashed", detail), effects)
        case Crashed(detail):
            group = _group_to_send(conversation, policy) if activity is Activity.LOADING else ()
            if len(group) > 1 and conversation.record.head is None:  # one of them is at fault: each is loaded alone
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
    """Whether a request for the head may have been sent; then no command is put before it."""
    progress, first = conversation.record.head, conversation.queue[0]
    if conversation.activity in (Activity.SENDING, Activity.CHECKING_SESSION):
        return True
    return bool(progress and progress.is_partially_sent and progress.has_command(first.ref.sequence))


def _without_copies(
    conversation: Conversation, commands: tuple[QueuedCommand, ...], effects: list[Effect]
) -> tuple[QueuedCommand, ...]:
    """Drops a copy by the router while an earlier copy of the same command is in the queue."""
    if all(command.sequence == command.ref.sequence for command in commands):
        return commands
    known = {command.ref for command in conversation.queue}
    copies = [command for command in commands if command.sequence != command.ref.sequence and command.ref in known]
    effects += [Acknowledge(command, is_duplicate=True) for command in copies]
    return tuple(command for command in commands if command not in copies)


def _on_inbound_received(conversation: Conversation, inbound: InboundReceived, now_ms: int) -> Conversation:
    if inbound.sequence <= conversation.record.inbox_seq:
        return conversation
    in_flight = int(conversation.activity is Activity.SENDING)
    return _replaced(
        conversation, record=apply_inbound(conversation.record, inbound, now_ms, in_flight), last_answer=None
    )


def apply_inbound(
    record: ConversationRecord, inbound: InboundReceived, now_ms: int, in_flight: int
) -> ConversationRecord:
    """The record after a message of the user. `in_flight`: requests that have no answer yet."""
    record = window.on_inbound(
        record,
        message=inbound.message,
        token=inbound.token,
        bot=inbound.bot,
        now_ms=now_ms,
        received_ms=now_ms if inbound.received_ms is None else min(now_ms, inbound.received_ms),
        written_ms=inbound.written_ms,
        in_flight=in_flight,
        sequence=inbound.sequence,
    )
    bots = record.bots
    if bots[-1:] != [inbound.bot]:
        bots = [*(bot for bot in bots if bot != inbound.bot), inbound.bot][-BOTS_KEPT:]
    return msgspec.structs.replace(record, inbox_seq=max(record.inbox_seq, inbound.sequence), bots=bots)


def renew_token(conversation: Conversation, message: str, token: str) -> Conversation:
    """iLink has repeated a message, possibly with a newer token, which counts if no later message came."""
    record = conversation.record
    if not token or message != record.window.id or token == record.token:
        return conversation
    return _replaced(conversation, record=msgspec.structs.replace(record, token=token))


def _on_loaded(conversation: Conversation, bodies: Mapping[int, Body], effects: list[Effect]) -> Conversation:
    queue: list[QueuedCommand] = []
    unreadable: list[tuple[QueuedCommand, CommandResult]] = []
    for command in conversation.queue:
        match bodies.get(command.sequence, command.parts):
            case None if command.sequence in bodies:  # an operator has dropped it
                effects.append(Acknowledge(command))
            case CommandResult() as result:
                unreadable.append((command, result))
                queue.append(command)
            case parts:
                queue.append(msgspec.structs.replace(command, parts=parts))
    conversation = _replaced(conversation, queue=tuple(queue), activity=Activity.IDLE)
    for command, result in unreadable:
        conversation = _end_commands(conversation, [command], result, effects)
    return conversation


# what iLink answers -----------------------------------------------------------------------------------


def _on_answer(
    conversation: Conversation, answer: Answer, now_ms: int, policy: SendPolicy, effects: list[Effect]
) -> Conversation:
    """An answer to a request was counted before; an answer to an upload was not."""
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
        case TokenRejected(result):  # not proof of a dead session: iLink answers a malformed body with -14, too
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
    answered = progress if progress.unconfirmed else answer
    progress = msgspec.structs.replace(
        progress,
        ret=answered.ret,
        errcode=answered.errcode,
        errmsg=answered.errmsg,
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
    """Remembers the beginning of a sent text under iLink's id."""
    if isinstance(content, str):
        kind, text = "text", content[:SENT_TEXT_CHARS]
    else:
        kind, text = content.kind, placeholder_summary(content.kind, content.name if content.kind == "file" else "")
    sent = [*record.sent, SentText(id=message_id, kind=kind, text=text)][-SENT_TEXTS:]
    return msgspec.structs.replace(record, sent=sent)


def _on_throttled(
    conversation: Conversation, progress: SendProgress, result: CommandResult, now_ms: int, effects: list[Effect]
) -> Conversation:
    """-2: nothing is sent until the user writes. A command that is throttled in a second window is itself at fault.

    The first command of a merged message is sent alone next time, so that the command at fault is found.
    """
    is_second = progress.throttled_in_window not in ("", progress.counted_in_window)
    record = window.record_throttled(conversation.record, progress, now_ms)
    conversation = _replaced(conversation, record=record, last_answer=result)
    if is_second:
        return _end_first(conversation, result, effects)
    effects.append(Save())
    return _split_merged(conversation, progress.commands[0]) or conversation


def _split_merged(conversation: Conversation, last: CommandRef) -> Conversation | None:
    """Splits a merged message of which nothing may have been sent. The commands up to `last` are then sent alone."""
    progress = conversation.record.head
    if progress is None or len(progress.commands) == 1 or progress.is_partially_sent:
        return None
    first = msgspec.structs.replace(progress, commands=progress.commands[:1], digest="")
    barrier = next((command.sequence for command in conversation.queue if command.ref == last), 0)
    return _replaced(
        conversation,
        record=msgspec.structs.replace(conversation.record, head=first),
        merge_barrier=max(conversation.merge_barrier, barrier),
    )


def _on_session_checked(
    conversation: Conversation, now_ms: int, effects: list[Effect], *, is_alive: bool
) -> Conversation:
    """Session alive: the command is retried once, then refused. Session dead: the queue waits for a login."""
    answer = conversation.last_answer or CommandResult("refused")
    conversation = _replaced(conversation, activity=Activity.IDLE, last_answer=None)
    if not is_alive:
        effects.append(Save())  # a login may take hours, and another bot repeats no unanswered request
        bot = msgspec.structs.replace(conversation.bot, is_usable=False) if conversation.bot else None
        return _replaced(conversation, bot=bot, last_answer=answer)
    if conversation.token_rejections:
        refused = msgspec.structs.replace(answer, outcome="refused", reason="rejected")
        return _end_first(conversation, refused, effects)
    return _pause_until(_replaced(conversation, token_rejections=1), now_ms + REPEAT_PAUSE_MS)


def _retry_or_give_up(
    conversation: Conversation, answer: NotTaken, now_ms: int, policy: SendPolicy, effects: list[Effect]
) -> Conversation:
    """A command that could not reach iLink is retried until it expires; any other, for a number of attempts."""
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
    """Ends commands with `result`, unless the progress of the send under way tells more.

    All receipts come before the first acknowledgement, so that a new owner finds them after a crash.
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
        return _reset_progress(conversation, conversation.record) if is_first else conversation
    ended = {command.ref.sequence for command in commands}
    if shared.may_be_sent and any(command.sequence not in ended for command in progress.commands):
        return _replaced(conversation, head_result=shared)  # the others are redelivered after the takeover
    return _close_head(conversation, may_be_sent=shared.may_be_sent)


def _close_head(conversation: Conversation, *, may_be_sent: bool) -> Conversation:
    """Ends the send under way. Not `may_be_sent`: a command with the same id may be tried again."""
    record = conversation.record
    ids = [command.id for command in record.head.commands] if may_be_sent and record.head else []
    others = record.recent
    if any(ident in others for ident in ids):
        others = [ident for ident in others if ident not in ids]
    record = msgspec.structs.replace(record, head=None, recent=[*others, *ids][-RECENT_COMMANDS:])
    return _reset_progress(conversation, record)


def _reset_progress(conversation: Conversation, record: ConversationRecord) -> Conversation:
    """Forgets the progress of the former head. `record`: the new record."""
    return _replaced(
        conversation,
        record=record,
        content=None,
        failures=0,
        token_rejections=0,
        head_result=None,
        group_due_ms=0,
        last_answer=None,
    )


def _end_first(conversation: Conversation, result: CommandResult, effects: list[Effect]) -> Conversation:
    """Ends the first command and those merged into its message."""
    if conversation.activity is not Activity.IDLE or conversation.content is not None:
        conversation = _replaced(conversation, activity=Activity.IDLE, content=None)
    return _end_commands(conversation, _first_group(conversation), result, effects)


def _on_ended(conversation: Conversation, sequence: int, result: CommandResult) -> Conversation:
    """Commands of the same message share the outcome, unless nothing of the message was sent."""
    progress = conversation.record.head
    if progress is None or not progress.has_command(sequence):
        return conversation
    if not result.may_be_sent:
        return _close_head(conversation, may_be_sent=False)
    return _replaced(conversation, head_result=result)


def _expire_commands(conversation: Conversation, now_ms: int, effects: list[Effect]) -> Conversation:
    """Ends expired commands. Commands of a message that may have been sent expire together, with the last of them."""
    group = _first_group(conversation)
    progress = conversation.record.head
    together_ms: float = max((command.expires_ms for command in group), default=0)
    if conversation.activity in (Activity.SENDING, Activity.CHECKING_SESSION):
        together_ms = math.inf
    elif progress is None or not progress.is_partially_sent:
        group = ()

    def expires_ms(command: QueuedCommand) -> float:
        return together_ms if command in group else command.expires_ms

    overdue = [command for command in conversation.queue if expires_ms(command) <= now_ms]
    sent = [command for command in overdue if command not in group and command.ref.id in conversation.record.recent]
    effects += [Acknowledge(command, is_duplicate=True) for command in sent]
    conversation = _without_commands(conversation, {command.sequence for command in sent})
    overdue = [command for command in overdue if command not in sent]
    if overdue and overdue[0] is conversation.queue[0]:
        conversation = _replaced(conversation, activity=Activity.IDLE, content=None)
    conversation = _end_commands(
        conversation, overdue, CommandResult("refused", "expired", "It was not sent in time."), effects
    )
    return _replaced(conversation, earliest_expiry_ms=min(map(expires_ms, conversation.queue), default=math.inf))


def _end_unbound(conversation: Conversation, effects: list[Effect]) -> Conversation:
    """Ends the commands of a user whom no bot serves any more. The request under way ends by its answer."""
    under_way = _first_group(conversation) if conversation.activity is Activity.SENDING else ()
    ended = [command for command in conversation.queue if command not in under_way]
    if not under_way:
        conversation = _replaced(conversation, activity=Activity.IDLE, content=None)
    return _end_commands(conversation, ended, CommandResult("refused", "not_bound", "The bot was unbound."), effects)


def reconcile_with_progress(result: CommandResult, progress: SendProgress, command: QueuedCommand) -> CommandResult:
    """The result to publish for a command that ends with `result`, given its progress.

    A command with an unanswered request cannot be called refused: iLink may have taken it. Every part may have been
    accepted although the receipt was not published in time.
    """
    if result.is_sent:
        return result
    if progress.part >= command.part_count:
        return _accepted_result(progress)
    attempts = max(result.attempts, progress.attempts)
    result = msgspec.structs.replace(result, message_ids=tuple(progress.message_ids), attempts=attempts)
    if not progress.unanswered_attempts or result.outcome == "uncertain":
        return result
    detail = f"An earlier request got no answer, so the message may have been sent. Last answer: {result.detail}"
    return msgspec.structs.replace(result, outcome="uncertain", reason="", detail=detail)


def _accepted_result(progress: SendProgress) -> CommandResult:
    """The result when iLink accepted every part."""
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
    """Works on the queue until something has to be awaited."""
    if conversation.activity is Activity.IDLE and conversation.record.head is not None:
        # a command does not expire while its request is under way
        expiries = [command.expires_ms for command in _first_group(conversation)]
        earliest_ms = min([conversation.earliest_expiry_ms, *expiries])
        conversation = _replaced(conversation, earliest_expiry_ms=earliest_ms)
    if conversation.earliest_expiry_ms <= now_ms:
        conversation = _expire_commands(conversation, now_ms, effects)
    if conversation.bot is None:
        conversation = _end_unbound(conversation, effects)
    if conversation.has_unpublished:
        conversation = _replaced(conversation, has_unpublished=False)
    while conversation.activity is Activity.IDLE and conversation.queue:
        first, progress = conversation.queue[0], conversation.record.head
        if progress is not None and not progress.has_command(first.ref.sequence):
            # the previous owner ended it and did not store that
            conversation = _close_head(conversation, may_be_sent=progress.is_partially_sent)
            continue
        if ended := _end_without_sending(conversation, first, progress, effects):
            conversation = ended
            continue
        blocked = _blocked_reason(conversation, first, now_ms, policy)
        if blocked == "reserved" or (blocked and first.when_closed == "refuse"):
            answer = conversation.last_answer or CommandResult("refused")
            refused = msgspec.structs.replace(answer, outcome="refused", reason=blocked)
            conversation = _end_first(conversation, refused, effects)
            continue
        if conversation.reason != blocked:
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
    if conversation.queue or (not conversation.reason and conversation.earliest_expiry_ms == math.inf):
        return conversation
    return _replaced(conversation, reason="", earliest_expiry_ms=math.inf)


def _is_group_incomplete(conversation: Conversation) -> bool:
    """Whether commands of a message that may have been sent are not redelivered yet."""
    progress = conversation.record.head
    if progress is None or not progress.is_partially_sent:
        return False
    return len(_first_group(conversation)) < len(progress.commands)


def _end_without_sending(
    conversation: Conversation, first: QueuedCommand, progress: SendProgress | None, effects: list[Effect]
) -> Conversation | None:
    """Ends the first command if nothing has to be sent for it; None: something has."""
    if first.typing:
        if not (_is_usable(conversation) and conversation.user):
            return None
        if first.typing == "on":
            effects.append(SetTyping(is_on=True))
        return _end_commands(conversation, [first], CommandResult("accepted"), effects)
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
    # through another bot it would be a second message on the phone
    detail = "iLink gave no answer that can be read, and is not asked again: that might show it twice."
    return _end_first(conversation, CommandResult("uncertain", "", detail), effects)


def _is_usable(conversation: Conversation) -> bool:
    return conversation.bot is not None and conversation.bot.is_usable


def _blocked_reason(conversation: Conversation, first: QueuedCommand, now_ms: int, policy: SendPolicy) -> str:
    """Why the first command may not be sent now; "" if it may. All its parts must fit before its first request. A
    repeat was counted before."""
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
    """Parks each new command of a queue that waits, or refuses it if its author does not want it parked."""
    queue, answer = conversation.queue, conversation.last_answer or CommandResult("parked")
    start = len(queue)
    while start and not queue[start - 1].parked:
        start -= 1
    some = queue[start : start + RECEIPTS_PER_STEP]
    parked: list[QueuedCommand] = []
    for command in some:
        is_reserved = command.optional and reason == "quota"
        if command.when_closed == "refuse" or is_reserved:
            why = "window_closed" if command.typing else "reserved" if is_reserved else reason
            result = CommandResult("refused", why)
            conversation = _end_commands(conversation, [command], result, effects)
        else:
            result = msgspec.structs.replace(answer, outcome="parked", reason=reason)
            effects += [PublishReceipt(command, result), ReleaseBody(command)]
            parked.append(msgspec.structs.replace(command, parts=None, parked=True))
            answer = CommandResult("parked")
    rest = queue[start + RECEIPTS_PER_STEP :]
    return _replaced(
        conversation,
        queue=(*queue[:start], *parked, *rest),
        has_unpublished=bool(rest),
        content=None,
        last_answer=None,
    )


def _send_next(conversation: Conversation, now_ms: int, policy: SendPolicy, effects: list[Effect]) -> Conversation:
    """Makes the next request for the first command, or the step that has to come before it."""
    group = _group_to_send(conversation, policy)
    if missing := [command.sequence for command in group if command.parts is None]:
        effects.append(Load(missing))
        return _replaced(conversation, activity=Activity.LOADING)
    progress, bot = conversation.record.head, conversation.bot.id if conversation.bot else ""
    parts: list[Part] = group[0].parts or []
    digest = ""
    if len(group) > 1:
        group = _mergeable_prefix(group) if progress is None or len(progress.commands) == 1 else group
        text = MERGE_SEPARATOR.join(_only_text(command) for command in group)
        parts, digest = [text], _text_digest(text) if len(group) > 1 else ""
    if progress is not None and (len(group), digest) != (len(progress.commands), progress.digest):
        if progress.is_partially_sent:
            detail = "It may have been sent, together with commands that are gone."
            return _end_first(conversation, CommandResult("uncertain", "", detail), effects)
        progress = None
    if progress is None:
        refs = [command.ref for command in group]
        progress = SendProgress(commands=refs, client_id_base=group[0].client_id_base, bot=bot, digest=digest)
    part = parts[progress.part]
    if isinstance(part, MediaPart) and conversation.content is None:
        effects.append(Upload(part))
        return _replaced(conversation, activity=Activity.UPLOADING)
    if not conversation.holds_slot:
        effects.append(RequestSlot())
        return _replaced(conversation, activity=Activity.AWAITING_SLOT)
    content = part if isinstance(part, str) else conversation.content
    assert content is not None
    ident = client_id(progress.client_id_base, progress.part, len(group) - 1)
    effects += [Save(), Post(ident, content)]
    if progress.bot != bot:
        progress = msgspec.structs.replace(progress, bot=bot)
    return _replaced(
        conversation,
        record=window.record_attempt(conversation.record, progress, now_ms),
        activity=Activity.SENDING,
        holds_slot=False,
        content=content,
        not_before_ms=now_ms + policy.gap_ms,
    )


def _group_to_send(conversation: Conversation, policy: SendPolicy) -> tuple[QueuedCommand, ...]:
    """The first command and the parked texts after it that fit into its message by their lengths.

    A message that may have been sent is repeated with the same commands.
    """
    first, progress = conversation.queue[0], conversation.record.head
    if progress is not None:
        return _first_group(conversation)
    if not first.parked or first.sequence <= conversation.merge_barrier or not _is_mergeable(first):
        return (first,)
    group, chars, ids = [first], first.chars, {first.ref.id, *conversation.record.recent}
    for command in conversation.queue[1:MERGED_AT_ONCE]:
        chars += len(MERGE_SEPARATOR) + command.chars
        if not command.parked or not _is_mergeable(command) or command.ref.id in ids or chars > policy.merge_chars:
            break
        ids.add(command.ref.id)
        group.append(command)
    return tuple(group)


def _is_mergeable(command: QueuedCommand) -> bool:
    return bool(command.chars) and not command.optional


def _mergeable_prefix(group: tuple[QueuedCommand, ...]) -> tuple[QueuedCommand, ...]:
    """The commands that fit into one message by their texts."""
    size = 0
    for count, command in enumerate(group):
        text = _only_text(command)
        size += len(text.encode()) + len(MERGE_SEPARATOR)
        if count and size > MAX_BYTES:
            return group[:count]
        if is_open(text):  # the next text would become part of its code
            return group[: count + 1]
    return group


def _first_group(conversation: Conversation) -> tuple[QueuedCommand, ...]:
    """The first command and those merged into its message."""
    progress, queue = conversation.record.head, conversation.queue
    if progress is None or not queue or not progress.has_command(queue[0].ref.sequence):
        return queue[:1]
    if len(progress.commands) == 1:
        return queue[:1]
    return tuple(command for command in queue[:MERGED_AT_ONCE] if progress.has_command(command.ref.sequence))


def _only_text(command: QueuedCommand) -> str:
    part = command.parts[0] if command.parts else ""
    return part if isinstance(part, str) else ""


def _text_digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _without_commands(conversation: Conversation, sequences: set[int]) -> Conversation:
    queue = conversation.queue
    if len(sequences) == 1 and queue and queue[0].sequence in sequences:
        return _replaced(conversation, queue=queue[1:])
    return _replaced(conversation, queue=tuple(command for command in queue if command.sequence not in sequences))


def _note_service(conversation: Conversation, effects: list[Effect]) -> Conversation:
    """Marks the record of a user whom no bot serves, or only as another than its own, which gives it a time to live,
    and unmarks it."""
    bot, record = conversation.bot, conversation.record
    is_unserved, is_other = bot is None, bot is not None and bot.serves_other
    if not conversation.user or (record.unserved, record.other) == (is_unserved, is_other):
        return conversation
    effects.append(Save())
    marked = msgspec.structs.replace(record, unserved=is_unserved, other=is_other)
    return _replaced(conversation, record=marked)


def adopt_inbound(conversation: Conversation, stored: ConversationRecord) -> Conversation:
    """Takes over window and token from the record that the previous owner stored last, if they are newer."""
    record, known, opened = conversation.record, conversation.record.window, stored.window
    if opened.id == known.id or opened.sequence < known.sequence:
        return conversation
    if record.head is not None and record.head.unanswered_attempts:
        sent_at_ms = [*opened.sent_at_ms, *known.sent_at_ms[-1:]]
        opened = msgspec.structs.replace(opened, sends_used=max(opened.sends_used, 1), sent_at_ms=sent_at_ms)
    record = msgspec.structs.replace(
        record,
        window=opened,
        token=stored.token,
        bot=stored.bot,
        bots=stored.bots,
        inbox_seq=max(record.inbox_seq, stored.inbox_seq),
    )
    return _replaced(conversation, record=record)
