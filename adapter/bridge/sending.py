"""What becomes of a person's commands: pure decisions, which `sender.Sender` carries out.

The commands of a user form one queue, in the order of their sequences. Only its head is worked on: the first command,
with the commands that are merged into its message. The head may be sent when a bot with a live token serves the user
and the window has room (`blocker`). Otherwise the queue waits, and each command is told so once (`parked`), or ends
as refused. Nothing here has a clock or does I/O.

    iLink's answer to a request     what follows
    ------------------------------  --------------------------------------------------------------------------
    accepted                        the next part, or the commands of the message end
    none, or one of a gateway       one repeat with the same client_id (`repeat_due_s`), then `uncertain`
    not taken                       tried again after a pause, until the command expires
    -2, -12, -13                    the window is throttled; throttled in a second window: refused
    -14                             the session is tested: alive: one more try, then refused; dead: the queue waits
    refused                         the command ends; commands that were merged are sent one by one
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from adapter.bridge import window
from adapter.bridge.commands import MERGE_SEPARATOR, Part, client_id_base
from adapter.bridge.record import (
    RECENT_COMMANDS,
    SENT_TEXT_CHARS,
    SENT_TEXTS,
    CommandRef,
    PersonState,
    SendProgress,
    SentText,
)
from adapter.bridge.texts import closing_fence
from adapter.bridge.window import WindowPolicy
from adapter.contract.messages import Bind, Erase, Outcome, Unbind
from adapter.contract.names import author_traceparent
from adapter.contract.quotes import placeholder_summary
from adapter.errors import AdapterError, Crashed, Refused, Throttled, Uncertain, Unreadable
from adapter.ports import Accepted, Account, Content, Delivery

MAX_RESENDS = 1
"""Repeats of a request that got no answer. They have the same client_id, by which clients expect WeChat to show the
message once (docs/reference/ilink-protocol.md, "sendmessage")."""
REPEAT_AFTER_S = 3.0
"""Least time between the end of a request without an answer and its repeat."""
REPEAT_LATEST_S = 300.0
"""Time after a first request without an answer at which it is repeated although iLink has answered nobody since."""
AFTER_UNCERTAIN_S = (60.0, 3600.0)
"""Pause of a user after an `uncertain`, which doubles with each further one, and the longest one."""
MERGED_AT_ONCE = 32
"""Most texts in one merged message."""
CONTROL = ("bind", "unbind", "erase")
"""What the owner of a sandbox applies, in order among its commands."""


class SendPolicy(msgspec.Struct, frozen=True):
    """Settings of sending."""

    window: WindowPolicy
    gap_ms: int
    """Least time between two requests to one user."""
    merge_chars: int
    """Most characters of a message merged from parked texts, which fit whatever they are; 0: no merging."""


class ServingBot(msgspec.Struct, frozen=True):
    """The bot that serves a user."""

    id: str
    is_usable: bool
    """False: iLink refuses the bot's token (-14). Nothing is sent until iLink takes it again or the bot changes."""
    account: Account = Account("", "", "")
    """Its token is "" if it cannot be opened."""


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
    repeat_of: int = 0
    http_status: int = 0
    bots: tuple[str, ...] = ()
    counts: Mapping[str, int] = {}
    left: Mapping[str, int] = {}
    unlearned: int = 0

    @property
    def is_sent(self) -> bool:
        """iLink accepted all parts."""
        return self.outcome in ("accepted", "accepted_unconfirmed")

    @property
    def may_be_sent(self) -> bool:
        """The message may be on the user's phone."""
        return self.is_sent or self.outcome == "uncertain"


EXPIRED = CommandResult("refused", "expired", "It was not sent in time.")
CANCELLED = CommandResult("refused", "cancelled", "A later command has taken it back.")
NOT_FOUND = CommandResult("refused", "not_found", "No command with this id waits.")
SCHEDULED = CommandResult("parked", "scheduled", "It is sent at its time.")
UNSERVED = CommandResult("refused", "not_bound", "No bot of the sandbox serves this user, or not any more.")


class QueuedCommand(msgspec.Struct, kw_only=True, eq=False):
    """A command in flight: delivered, and without a final receipt. A bind, unbind or erase is one, too."""

    sequence: int
    """Its own in the stream: counts for the order, the acknowledgement, and to read it again."""
    ref: CommandRef
    """Its identity. For a copy by the router it is that of the original."""
    sandbox: str
    client_id_base: str
    bot: str = ""
    """As its author names it."""
    user: str = ""
    """As its author names them."""
    kind: Literal["text", "media", "typing", "cancel", "unreadable", "bind", "unbind", "erase"] = "unreadable"
    """Metrics label; unreadable for a message that is no command."""
    control: Bind | Unbind | Erase | None = None
    """What is to be applied; None: it is a command to send."""
    bots: list[str] = []
    """Those that it has unbound."""
    parts: list[Part] | None = None
    """One request each; None: the body is only on the bus."""
    part_count: int = 0
    chars: int = 0
    """Length of the text if the text is the only part, else 0."""
    expires_ms: int = 0
    send_at_ms: int = 0
    """It is not sent before."""
    cancel: str = ""
    """Id of the command to take back; "": it is one to send."""
    is_cancelled: bool = False
    when_closed: Literal["park", "refuse"] = "park"
    typing: Literal["", "on", "off"] = ""
    reply_to: str = ""
    """The inbound message that it answers; "" for none, and for what is too long to be one."""
    is_checked: bool = False
    """It is known to be new, or its receipt was looked up: nobody has worked on it before."""
    parked: bool = False
    """The sandbox has a receipt `parked` for it."""
    parked_for: str = ""
    """The user to whom the former owner wanted to send it when it parked it."""
    receipt: int = 0
    """Sequence of its newest receipt; 0: none is known."""
    traceparent: str = ""
    """Its author's."""
    delivery: Delivery
    size: int = 0
    """Bytes of the body in memory."""

    def __repr__(self) -> str:
        return f"QueuedCommand({self.sequence})"  # no text gets into a log or traceback

    @property
    def verb(self) -> str:
        """The word in the subject of its receipts."""
        return self.kind if self.kind in CONTROL else "receipt"


def unread(delivery: Delivery, ref: CommandRef, sandbox: str) -> QueuedCommand:
    """A command before its body is read. `ref`: its identity, whose `id` the body may name."""
    return QueuedCommand(
        sequence=delivery.seq,
        ref=ref,
        sandbox=sandbox,
        client_id_base=client_id_base(sandbox, ref.sequence, ref.stored_ms),
        traceparent=author_traceparent(delivery.headers),
        delivery=delivery,
    )


def unreadable_result(exc: Refused | Unreadable) -> CommandResult:
    """How a command ends that cannot be read, or is for nobody."""
    return CommandResult("refused" if isinstance(exc, Refused) else "dead_lettered", exc.reason, exc.detail)


def crashed_result(exc: BaseException) -> CommandResult:
    """How a command ends at which the code raises."""
    detail = exc.detail if isinstance(exc, Crashed) else type(exc).__name__
    return CommandResult("dead_lettered", "crashed", detail)


# before a request -------------------------------------------------------------------------------------


def blocker(command: QueuedCommand, record: PersonState, bot: ServingBot, policy: SendPolicy, now_ms: int) -> str:
    """Why the head may not be sent now; "" if it may. All its parts must fit before its first request. A repeat was
    counted before."""
    if not bot.is_usable:
        return "needs_login"
    if command.typing:
        return ""
    progress, needed = record.progress, command.part_count
    if progress is not None and progress.is_partially_sent and progress.has_command(command.ref):
        is_counted = progress.unanswered_attempts and progress.counted_in_window == record.window.id
        needed = 0 if is_counted else 1
    return window.send_blocker(record, now_ms, policy.window, needed=needed)


def while_blocked(command: QueuedCommand, reason: str, *, is_head: bool) -> CommandResult:
    """What a command is told whose queue waits: that it is parked, or refused."""
    if command.typing and not is_head:
        return CommandResult("refused", reason)
    return CommandResult("refused" if command.when_closed == "refuse" else "parked", reason)


def repeat_due_s(over_s: float, posted_s: float, *, is_answering: bool) -> float:
    """Seconds until a request without an answer may be repeated. `over_s`: since it was over, `posted_s`: since the
    first one was made. `is_answering`: iLink has answered somebody with success since (`pace.Successes`)."""
    earliest = REPEAT_AFTER_S - over_s
    return earliest if is_answering else max(earliest, REPEAT_LATEST_S - posted_s)


def is_repeatable(progress: SendProgress, bot: str) -> bool:
    """Whether the request under way may be made, again if it had no answer. Through another bot it would be a second
    message on the phone."""
    return not progress.unanswered_attempts or (progress.unanswered_attempts <= MAX_RESENDS and progress.bot == bot)


def in_progress(queue: Sequence[QueuedCommand], record: PersonState) -> list[QueuedCommand]:
    """The commands of the message in progress that are in the queue; empty if the first one is not of it."""
    progress = record.progress
    if progress is None or not queue or not progress.has_command(queue[0].ref):
        return []
    return [command for command in queue[:MERGED_AT_ONCE] if progress.has_command(command.ref)]


def next_message(
    queue: Sequence[QueuedCommand], record: PersonState, policy: SendPolicy, alone_up_to: int
) -> list[QueuedCommand]:
    """The first command, and the parked texts after it that fit into its message by their lengths.

    `alone_up_to`: commands up to this sequence are not merged, since iLink refused them merged.
    """
    first = queue[0]
    if record.progress is not None and record.progress.is_partially_sent:
        return in_progress(queue, record)
    if not first.parked or first.sequence <= alone_up_to or not first.chars:
        return [first]
    group, chars = [first], first.chars
    ids = {first.ref.id, *(ref.id for ref in record.recent)}
    for command in queue[1:MERGED_AT_ONCE]:
        chars += len(MERGE_SEPARATOR) + command.chars
        if not command.parked or not command.chars or command.ref.id in ids or chars > policy.merge_chars:
            break
        ids.add(command.ref.id)
        group.append(command)
    return group


def mergeable_prefix(group: list[QueuedCommand]) -> list[QueuedCommand]:
    """The commands up to one that leaves a code fence open: the next text would become part of its code."""
    for count, command in enumerate(group, 1):
        if closing_fence(only_text(command)):
            return group[:count]
    return group


def only_text(command: QueuedCommand) -> str:
    part = command.parts[0] if command.parts else ""
    return part if isinstance(part, str) else ""


def begun(group: Sequence[QueuedCommand], record: PersonState, bot: str) -> SendProgress:
    """The progress of the message that is about to be sent."""
    progress, refs = record.progress, [command.ref for command in group]
    if progress is None or (progress.commands != refs and not progress.is_partially_sent):
        base = group[0].client_id_base
        return SendProgress(commands=refs, client_id_base=base, bot=bot, merged=len(refs) - 1)
    return progress if progress.bot == bot else msgspec.structs.replace(progress, bot=bot)


def earlier(command: QueuedCommand, record: PersonState) -> CommandRef | None:
    """The earlier command whose id the command has from its author."""
    if not command.ref.is_named:
        return None
    return next((ref for ref in record.recent if ref.id == command.ref.id), None)


# after a request --------------------------------------------------------------------------------------


def after_answer(record: PersonState, answer: Accepted | AdapterError, content: Content, now_ms: int) -> PersonState:
    """The record after iLink's answer to the request under way, or after its failure."""
    progress = record.progress
    assert progress is not None
    if isinstance(answer, AdapterError):
        progress = msgspec.structs.replace(progress, http_status=answer.http_status)
    match answer:
        case Accepted():
            return _after_accepted(record, progress, answer, content, now_ms)
        case Uncertain():
            return window.record_unanswered(record, progress, now_ms, was_reset=answer.reason == "network")
        case Throttled():
            record = window.record_throttled(record, progress, now_ms)
        case _:
            record = window.undo_attempt(record, progress)
    progress = record.progress
    if isinstance(answer, Refused) and progress is not None and not progress.is_partially_sent:
        # of a merged message the first command is tried alone, so that the one at fault is found
        record = msgspec.structs.replace(
            record, progress=msgspec.structs.replace(progress, commands=progress.commands[:1], merged=0)
        )
    return record


def _after_accepted(
    record: PersonState, progress: SendProgress, answer: Accepted, content: Content, now_ms: int
) -> PersonState:
    told: Accepted | SendProgress = progress if progress.unconfirmed else answer
    ident, sent = answer.message_id, record.sent
    progress = msgspec.structs.replace(
        progress,
        ret=told.ret,
        errcode=told.errcode,
        errmsg=told.errmsg,
        http_status=0,
        part=progress.part + 1,
        unanswered_attempts=0,
        message_ids=[*progress.message_ids, ident] if ident else progress.message_ids,
        unconfirmed=progress.unconfirmed or not ident,
    )
    if ident:
        if isinstance(content, str):
            kind, text = "text", content[:SENT_TEXT_CHARS]
        else:
            name = content.name if content.kind == "file" else ""
            kind, text = content.kind, placeholder_summary(content.kind, name)
        sent = [*sent, SentText(id=ident, kind=kind, text=text)][-SENT_TEXTS:]
    return msgspec.structs.replace(
        record, window=window.accepted(record.window, now_ms), progress=progress, sent=sent
    )


def is_throttled_again(before: SendProgress) -> bool:
    """Whether a -2 met a command that had one in an earlier window: it is itself at fault. `before` the answer."""
    return before.throttled_in_window not in ("", before.counted_in_window)


def refusal(answer: Refused, progress: SendProgress | None) -> CommandResult:
    """iLink's refusal as the result of a command; None: it was asked for nothing before."""
    reason = "throttled" if isinstance(answer, Throttled) else answer.reason
    raw, attempts = (answer.ret, answer.errcode, answer.errmsg), progress.attempts if progress else 0
    return CommandResult("refused", reason, answer.detail, (), attempts, *raw, http_status=answer.http_status)


# how commands end -------------------------------------------------------------------------------------


def overdue_result(command: QueuedCommand) -> CommandResult:
    """How a command ends that is not sent any more."""
    return CANCELLED if command.is_cancelled else EXPIRED


def expired(queue: Sequence[QueuedCommand], record: PersonState, now_ms: int) -> list[QueuedCommand]:
    """The commands that have waited too long. Those of a message that may have been sent end together."""
    group = in_progress(queue, record) if record.progress is not None and record.progress.is_partially_sent else []
    ended = group if any(command.expires_ms <= now_ms for command in group) else []
    return ended + [command for command in queue if command.expires_ms <= now_ms and command not in group]


def final_result(result: CommandResult, record: PersonState, command: QueuedCommand) -> CommandResult:
    """The result to publish for a command that ends with `result`, given its progress.

    A command with an unanswered request cannot be called refused: iLink may have taken it. Every part may have been
    accepted although the receipt was not published in time.
    """
    progress = record.progress
    if result.is_sent or progress is None or not progress.has_command(command.ref):
        return result
    if progress.part and progress.part >= command.part_count:
        return accepted_result(progress)
    return unfinished_result(result, progress)


def unfinished_result(result: CommandResult, progress: SendProgress) -> CommandResult:
    """The result of a command that ends with `result` before all of its parts were accepted."""
    attempts = max(result.attempts, progress.attempts)
    ids, status = tuple(progress.message_ids), result.http_status or progress.http_status
    result = msgspec.structs.replace(result, message_ids=ids, attempts=attempts, http_status=status)
    if not progress.unanswered_attempts or result.outcome == "uncertain":
        return result
    detail = f"An earlier request got no answer, so the message may have been sent. Last answer: {result.detail}"
    return msgspec.structs.replace(result, outcome="uncertain", reason="", detail=detail)


def accepted_result(progress: SendProgress) -> CommandResult:
    """The result when iLink accepted every part."""
    return CommandResult(
        "accepted_unconfirmed" if progress.unconfirmed else "accepted",
        message_ids=tuple(progress.message_ids),
        attempts=progress.attempts,
        ret=progress.ret,
        errcode=progress.errcode,
        errmsg=progress.errmsg,
    )


def with_ended(record: PersonState, ref: CommandRef, *, is_refused: bool) -> PersonState:
    """The record after a command has its final receipt. Not refused: an author's id may not be used again."""
    head, recent = record.progress, record.recent
    if head is not None:
        rest = [each for each in head.commands if each != ref]
        head = msgspec.structs.replace(head, commands=rest) if rest else None
    if ref.is_named and not is_refused:
        recent = [*(each for each in recent if each.id != ref.id), ref][-RECENT_COMMANDS:]
    return msgspec.structs.replace(record, progress=head, recent=recent)


def without_lost_head(record: PersonState) -> PersonState:
    """The record without a message whose commands are over: the previous owner ended them, and did not store that."""
    assert record.progress is not None
    for ref in record.progress.commands:
        record = with_ended(record, ref, is_refused=not record.progress.is_partially_sent)
    return record
