"""Sends a person's commands: one queue, in order, one request at a time.

`run` is one coroutine, which lives while there is work. It takes the first command, waits until that may be sent,
stores what it is about to do, makes the request, publishes the receipt, and acknowledges the command. After each wait
it looks at the state again. What is decided is in `sending` and `window`. This is the one place that parks and
expires commands; what is not due yet waits in `schedule`.

A command stays in `WECHAT_OUT` until its final receipt is stored, so a new owner begins where this one ended.
"""

from __future__ import annotations

import asyncio
import bisect
import enum
import math
from collections.abc import Awaitable, Sequence
from functools import partial

import msgspec
import structlog

from adapter.bridge import sending, window
from adapter.bridge.commands import MERGE_SEPARATOR, MediaPart, client_id
from adapter.bridge.inflight import InFlight
from adapter.bridge.media import StoreAway
from adapter.bridge.pace import Pace
from adapter.bridge.parts import Parts
from adapter.bridge.person import Person
from adapter.bridge.receipts import Address
from adapter.bridge.record import SendProgress
from adapter.bridge.sending import CommandResult, QueuedCommand, ServingBot
from adapter.contract.messages import Window
from adapter.contract.repeats import bot_of
from adapter.errors import (
    AdapterError,
    BusRefused,
    Crashed,
    LeaseLost,
    RecordTooNew,
    Refused,
    SessionExpired,
    StaleRead,
    Temporary,
    Throttled,
    Uncertain,
)
from adapter.ports import Accepted, Content
from adapter.tools.tasks import ATTEMPTS
from adapter.tools.timing import ChangeSignal, backoff

log = structlog.get_logger()

MAX_TOGETHER = 16
"""Most commands that are parked or ended together, so that an inbound message waits for no more than these."""
LONGEST_WAIT_S = 3600.0
"""Longest timer, since the clock may be set and the machine may sleep."""
LOGIN_CHECK_S = 60.0
"""Interval at which a queue that waits for a login looks at the binding, in case its update was lost."""
UNREADABLE_S = 5.0
"""Pause before what cannot be read here is read again: a newer version wrote it, or no known key opens it."""
SESSION_PAUSE_S = 1.0
"""Pause before a request is tried again to which iLink answered -14 although the session is alive."""
LOOK_EVERY_S = 30.0
"""Shortest time between two looks at the newest entry before something is parked."""
SHORTEST_WAIT_S = 0.01
PREPARE_FAILED = "prepare failed"
"""iLink's words with a -2 that may also mean that it has forgotten the bot's session
(docs/reference/ilink-protocol.md, "Refused sends")."""
OTHER_USER = CommandResult(
    "refused", "other_user", "The command answers no message of this person: name the `user` of it."
)
_NOTHING = 0, 0, 0, ""


class Phase(enum.IntEnum):
    """What it does for the first command."""

    WAITING = 0
    """It waits, or prepares a request: nothing is lost if it ends."""
    COUNTED = 1
    """A request is counted, and that is being stored."""
    SENDING = 2
    """The request is out, and has no answer yet."""
    ENDING = 3
    """The answer is there, and its receipts or the record are being stored: a drain lets this end, as a request."""


class _Attempt(msgspec.Struct):
    """What concerns the first command alone."""

    failures: int = 0
    """Requests in a row that iLink did not take."""
    rejections: int = 0
    """Times that iLink answered -14 while the session was alive."""
    has_looked: bool = False
    """The receipt of what is about to be repeated was asked for."""
    content: Content | None = None
    """What the message in progress sends, if it was uploaded or merged here."""
    content_of: tuple[int, int, int, str] = _NOTHING
    """Whose it is: sequence of the first command, number of the part, commands merged with it, bot."""
    refusal: CommandResult | None = None
    """iLink's answer after which the queue waits."""
    refused_in: str = ""
    """The window of that answer."""


class Sender:
    """Sends for one person."""

    def __init__(self, person: Person, parts: Parts, commands: InFlight) -> None:
        self.person = person
        self.queue: list[QueuedCommand] = []
        """In the order of their sequences, but those of the message in progress first."""
        self.reason = ""
        """Why the queue waits; "" if it does not."""
        self.phase = Phase.WAITING
        self._parts = parts
        self._tenure = person.tenure
        self._commands = commands
        self._task: asyncio.Task[None] | None = None
        self._is_leaving = False
        """Nothing more is begun: another replica may own the person."""
        self._changed = ChangeSignal()
        self._version = 0
        """Number of changes by others."""
        self._expires_ms = math.inf
        """No command expires before: thousands may wait."""
        self._alone_up_to = 0
        """Commands up to this sequence are not merged."""
        self._user = person.user
        """The person's user, as it was when the queue was looked at last."""
        self._attempt = _Attempt()
        self._pace = Pace(parts.clock, parts.successes)
        self._looked_at = -math.inf
        """Monotonic time at which the newest entry was read before something was parked."""

    # what others tell it ----------------------------------------------------------------------------

    def enqueue(self, command: QueuedCommand) -> None:
        """Takes a command. One whose message is in progress goes first all the same."""
        bisect.insort(self.queue, command, key=lambda each: each.sequence)
        self._expires_ms = min(self._expires_ms, command.expires_ms)
        self.on_change()

    def cancel(self, ident: str, before: int) -> list[QueuedCommand]:
        """Has the commands with an id end that were stored before, and returns them. Parts that are sent stay."""
        found = [each for each in self.queue if each.ref.id == ident and each.ref.sequence < before]
        for command in found:
            command.is_cancelled, command.expires_ms = True, 0
        if found:
            self._expires_ms = 0
            self.on_change()
        return found

    def on_change(self) -> None:
        """Has `run` look at the state, since somebody else has changed it."""
        if self.person.bot is None:
            self.person.hide_typing()
        self._version += 1
        if self._task is not None:
            self._changed.notify_all()
        elif (self.queue or self.person.is_save_due) and not self._is_leaving:
            self._task = asyncio.get_running_loop().create_task(self.run())

    @property
    def is_running(self) -> bool:
        return self._task is not None

    @property
    def is_idle(self) -> bool:
        """Nothing is in its hands."""
        return self._task is None and not self.queue

    @property
    def is_sending(self) -> bool:
        """A request is out, or what follows from its answer is being stored."""
        return self._task is not None and self.phase is not Phase.WAITING

    async def wait_idle(self) -> None:
        """Returns when nothing is in its hands. Raises LeaseLost if it has stopped before."""
        while not self.is_idle:
            if self._task is None:
                raise LeaseLost("lease_lost", self.person.key.sandbox)
            await asyncio.wait([self._task])

    def stop(self, *, at_once: bool) -> None:
        """Ends, `at_once` where the partition is another replica's, else behind a request under way."""
        self._is_leaving = True
        if self._task is not None and (at_once or self.phase is Phase.WAITING):
            self._task.cancel()

    async def wait_ended(self) -> None:
        """Returns when it does nothing more."""
        if self._task is not None:
            await asyncio.wait([self._task])

    def _enter(self, phase: Phase) -> None:
        self.phase = phase
        self.person.is_posting = phase in (Phase.COUNTED, Phase.SENDING)

    # the loop ---------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Works until no command is left and the record is stored. Between "nothing to do" and its end nothing is
        awaited, so nothing is missed."""
        clock, sandbox = self._parts.clock, self.person.key.sandbox
        crashes = failures = 0
        try:
            while (self.queue or self.person.is_save_due) and not self._is_leaving:
                head = self.queue[0] if self.queue else None
                self._enter(Phase.WAITING)
                try:
                    await self._step()
                    failures = 0
                except LeaseLost:
                    await self._tenure.valid()
                except StaleRead:  # what was decided by the older record counts no more
                    self.person.take_newer_record()
                    self._attempt = _Attempt()
                    for command in self.queue:
                        command.is_checked = False
                except (Temporary, BusRefused) as exc:  # the bus or the object store is away
                    failures += 1
                    log.warning("person.retrying", sandbox=sandbox, reason=exc.reason, detail=exc.detail)
                    await clock.sleep(backoff(failures, first_s=0.2, longest_s=5.0))
                except Exception as exc:
                    crashes = crashes + 1 if self.queue and self.queue[0] is head else 1
                    if not isinstance(exc, Crashed):
                        log.exception("person.crashed", sandbox=sandbox, crashes=crashes)
                    elif head is not None and (not head.parked or head.sequence <= self._alone_up_to):
                        crashes = ATTEMPTS  # it was tried alone, and often enough
                    await self._after_crash(exc.__cause__ or exc, crashes)
        except LeaseLost:
            log.debug("person.fenced", sandbox=sandbox)
        finally:
            self._task = None
            self._enter(Phase.WAITING)

    async def _after_crash(self, exc: BaseException, crashes: int) -> None:
        """The third crash ends the first command. Commands that were merged are tried one by one before."""
        if self.queue and crashes >= ATTEMPTS:
            await self._end([(self.queue[0], _crashed(self.queue[0], exc))])
            return
        if self.queue:
            self._alone_up_to = max(self._alone_up_to, self.queue[: sending.MERGED_AT_ONCE][-1].sequence)
        await self._parts.clock.sleep(backoff(crashes, first_s=0.5))

    async def _open(self) -> bool:
        """Reads entry and record. False: they cannot be read here, and nothing is sent until they can. Raises
        Temporary, LeaseLost."""
        try:
            await self.person.open()
        except (RecordTooNew, Refused):
            now_ms, unserved = self._parts.clock.now_ms(), sending.UNSERVED if self.person.bot is None else None
            over = [each for each in self.queue if unserved or each.expires_ms <= now_ms]
            if not over:
                left_s = [(each.expires_ms - now_ms) / 1000 for each in self.queue]
                await self._parts.clock.sleep(min([UNREADABLE_S, *left_s]))
            # the record may say that a former owner has begun them; one that has ended keeps its receipt
            unknown = CommandResult("uncertain", detail="A former owner may have sent it: its record is unreadable.")
            known = [(each, unserved or sending.overdue_result(each)) for each in over[:MAX_TOGETHER]]
            await self._end([(each, result if each.is_checked else unknown) for each, result in known])
            return False
        return True

    async def _step(self) -> None:
        """Does the next thing for the first command."""
        parts, person, queue = self._parts, self.person, self.queue
        await parts.ticks.wait_tick()
        if not (handover := person.handover).may_send(person.key.key):  # a former owner may still send to them
            await handover.changed.wait_until(lambda: handover.may_send(person.key.key) or self._tenure.is_over)
            self._tenure.check()
        if not person.is_open and not await self._open():
            return
        if person.is_save_due:
            person.is_save_due = False
            await self._save()
        if not queue:
            return
        now_ms, seen = parts.clock.now_ms(), self._version
        if person.user != self._user:  # what waits may name another one, and is looked at one by one
            self._user, self._alone_up_to = person.user, max(self._alone_up_to, queue[-1].sequence)
        head, progress, self.reason = queue[0], person.state.progress, ""
        if self._expires_ms <= now_ms:
            await self._end_expired(now_ms)
        elif not head.is_checked:
            await self._look_up(queue[:MAX_TOGETHER])
        elif person.bot is None:
            await self._end([(command, sending.UNSERVED) for command in queue[:MAX_TOGETHER]])
        elif progress is not None and not progress.has_command(head.ref):
            self._find_head(progress)
        elif ended := self._end_of(head, person.bot):
            await self._end([(command, ended) for command in sending.in_progress(queue, person.state) or [head]])
        elif progress is None and sending.earlier(head, person.state) is not None:
            if (repeated := await self._result_of_repeat(head)) is not None:
                await self._end([(head, repeated)])
        elif reason := sending.blocker(head, person.state, person.bot, parts.policy, now_ms):
            self.reason = reason
            await self._wait_blocked(head, reason, seen)
        elif head.typing:
            if head.typing == "on":
                person.show_typing()
            await self._end([(head, CommandResult("accepted"))])
        elif (due_s := self._pace.due_s(person.bot.account.base_url, progress)) > 0:
            await self._wait(due_s, seen, person.bot)
        elif progress is not None and progress.unanswered_attempts and not self._attempt.has_looked:
            self._attempt.has_looked = True  # another owner may have ended it since
            for command in (group := sending.in_progress(queue, person.state)):
                command.is_checked = False
            await self._look_up(group)
        else:
            await self._send(person.bot)

    def _find_head(self, progress: SendProgress) -> None:
        """Puts the commands of the message in progress first, or finds that they are over."""
        if any(progress.has_command(command.ref) for command in self.queue):
            self.queue.sort(key=lambda each: (not progress.has_command(each.ref), each.sequence))
        else:  # the previous owner ended them, and did not store that
            self.person.state = sending.without_lost_head(self.person.state)
            self._attempt = _Attempt()

    async def _end_expired(self, now_ms: int) -> None:
        expired = sending.expired(self.queue, self.person.state, now_ms)[: sending.MERGED_AT_ONCE]
        if any(not command.is_checked for command in expired):
            await self._look_up(expired)
            return
        repeats = [(command, await self._result_of_repeat(command)) for command in expired]
        await self._end([(command, repeat or sending.overdue_result(command)) for command, repeat in repeats])
        self._expires_ms = min((command.expires_ms for command in self.queue), default=math.inf)

    async def _look_up(self, commands: Sequence[QueuedCommand]) -> None:
        """Finds the receipts of commands that somebody may have worked on before, and ends those that are over."""
        asked = [command for command in commands if not command.is_checked]
        found = await self._commands.find(self.person.key.sandbox, asked)
        for command in asked:
            command.is_checked = True
            if (result := found.get(command.sequence)) is None or command not in self.queue:
                continue
            group = sending.in_progress(self.queue, self.person.state)
            self._leave(command, result)
            await self._commands.acknowledge(command)
            if result.may_be_sent and command in group:  # one message, one answer
                await self._end([(each, result) for each in group if each is not command])

    def _end_of(self, head: QueuedCommand, bot: ServingBot) -> CommandResult | None:
        """The result of a command for which no request is to be made; None: one is, unless it repeats a command."""
        progress = self.person.state.progress
        if progress is not None:
            if progress.part >= head.part_count:
                return sending.accepted_result(progress)
            is_foreign = (
                progress.merged and progress.is_partially_sent and self._attempt.content_of[0] != head.sequence
            )
            if is_foreign or not sending.is_repeatable(progress, bot.id):
                detail = "iLink gave no answer that can be read, and is not asked again: that might show it twice."
                return CommandResult("uncertain", "", detail)
            return None
        if head.user and self.person.user not in ("", head.user):
            return sending.UNSERVED
        return OTHER_USER if self._answers_other(head) else None

    async def _result_of_repeat(self, command: QueuedCommand) -> CommandResult | None:
        """The result of a command whose id an earlier one had that may have been sent. None: it is no repeat."""
        person = self.person
        if (first := sending.earlier(command, person.state)) is None:
            return None
        result = await self._commands.result_of_repeat(command, first)
        if result is None:  # it was refused, and its owner could not store that
            recent = [ref for ref in person.state.recent if ref != first]
            person.state = msgspec.structs.replace(person.state, recent=recent)
        elif first.sequence == command.ref.sequence:  # it has ended, and its receipt could not be stored
            return msgspec.structs.replace(result, repeat_of=0)
        return result

    # waiting ----------------------------------------------------------------------------------------

    async def _wait(self, due_s: float, seen: int, bot: ServingBot | None = None) -> None:
        """Waits until something is due or has changed. `bot`: through which a request is to be made. For a repeat
        iLink is asked meanwhile whether it answers."""
        parts, progress = self._parts, self.person.state.progress
        expiry_s = (self._expires_ms - parts.clock.now_ms()) / 1000
        due_s = max(SHORTEST_WAIT_S, min(due_s, expiry_s, LONGEST_WAIT_S))
        if bot is None or progress is None or not progress.unanswered_attempts:
            await self._changed.wait_until(lambda: self._version != seen, due_s)
            return
        base_url, pace = bot.account.base_url, self._pace
        if not (is_answering := pace.is_answering(base_url, progress)):
            due_s = min(due_s, pace.ask_s(parts.chat, bot.account, self.person.key))
        await self._changed.wait_until(
            lambda: self._version != seen or pace.is_answering(base_url, progress) is not is_answering,
            due_s,
            also=parts.successes.changed,
        )

    async def _wait_blocked(self, head: QueuedCommand, reason: str, seen: int) -> None:
        """Parks or refuses what was told nothing yet; then waits for a change."""
        parts, queue = self._parts, self.queue
        unparked = [each for each in queue if not each.parked][:MAX_TOGETHER]
        if any(not command.is_checked for command in unparked):
            await self._look_up(unparked)
            return
        if unparked and reason != "needs_login":
            await self._look_behind()
            if self._version != seen:
                return
        told = [(each, self._told(each, head, reason)) for each in unparked]
        if told:
            await asyncio.gather(*(self._park_or_end(each, result) for each, result in told))
        else:
            due_s = LOGIN_CHECK_S if reason == "needs_login" else math.inf
            if reason == "throttled":
                probes_ms = window.probes_at_ms(self.person.state.window, parts.policy.window)
                due_s = (probes_ms - parts.clock.now_ms()) / 1000
            await self._wait(due_s, seen)
            self.person.check_binding()

    async def _look_behind(self) -> None:
        """Before something is parked or refused: another replica may have stored what opens the window, if it holds
        an older poll."""
        now, person = self._parts.clock.monotonic(), self.person
        is_here = person.bot is not None and self._parts.sessions.is_polled_here(person.bot.id)
        if is_here or now - self._looked_at < LOOK_EVERY_S:
            return
        self._looked_at = now
        try:
            await person.read_newest()
        except (Temporary, Refused) as exc:
            log.info("person.retrying", sandbox=person.key.sandbox, work="look", reason=exc.reason)

    def _told(self, command: QueuedCommand, head: QueuedCommand, reason: str) -> CommandResult:
        """What a command is told that has to wait. The first one is told what iLink answered."""
        if self._answers_other(command):
            return OTHER_USER
        result = sending.while_blocked(command, reason, is_head=command is head)
        if command is not head:
            return result
        answer, self._attempt.refusal = self._attempt.refusal, None
        if answer is None or self._attempt.refused_in != self.person.state.window.id:  # the user has written since
            return result
        return msgspec.structs.replace(answer, outcome=result.outcome, reason=result.reason)

    def _answers_other(self, command: QueuedCommand) -> bool:
        """Whether a command answers a message that this person has not written."""
        if not command.reply_to:
            return False
        author, bot, state = bot_of(command.reply_to), self.person.bot, self.person.state
        return bool(author) and author not in (bot.id if bot is not None else "", state.bot, *state.bots)

    async def _park_or_end(self, command: QueuedCommand, result: CommandResult) -> None:
        if result.outcome == "parked":
            try:
                await self._commands.tell(command, result, self.address, self.shown)
            except StaleRead:
                command.is_checked = False
                return
            except Crashed as exc:
                result = sending.crashed_result(exc)
            else:
                command.parked = True
                self._attempt.content_of = _NOTHING  # what was uploaded may be gone when its turn comes
                self._commands.release_body(command)
                self.person.hide_typing()
                return
        await self._end([(command, result)])

    # sending ----------------------------------------------------------------------------------------

    async def _send(self, bot: ServingBot) -> None:
        """Makes the next request for the first command, or the step that has to come before it."""
        parts, person = self._parts, self.person
        group = sending.next_message(self.queue, person.state, parts.policy, self._alone_up_to)
        if missing := [command for command in group if command.parts is None]:
            await self._read(missing)
            return
        is_begun = person.state.progress is not None and person.state.progress.is_partially_sent
        if len(group) > 1 and not is_begun:
            group = sending.mergeable_prefix(group)
        progress, head = sending.begun(group, person.state, bot.id), self._attempt
        content_of = group[0].sequence, progress.part, progress.merged, bot.id
        if progress.merged and not is_begun:
            head.content, head.content_of = MERGE_SEPARATOR.join(map(sending.only_text, group)), content_of
        content = head.content if head.content_of == content_of else None
        if content is None:
            part = (group[0].parts or [])[progress.part]
            if isinstance(part, MediaPart):
                await self._upload(part, bot, group, content_of)
                return
            content = part
        async with parts.slots[bot.account.base_url].slot(person.key.sandbox):
            now_ms = parts.clock.now_ms()
            if sending.blocker(group[0], person.state, bot, parts.policy, now_ms) or not self._is_wanted(bot, group):
                return
            self._enter(Phase.COUNTED)
            try:
                answer = await self._request(bot, progress, content, group)
            finally:
                self._enter(Phase.ENDING)
        if answer is not None:
            await self._after(answer, bot, group, content)

    def _is_wanted(self, bot: ServingBot, group: list[QueuedCommand]) -> bool:
        """Whether a message may still be sent after something was awaited."""
        is_same = self.person.bot == bot and self.queue[:1] == group[:1] and not self._is_leaving
        return is_same and min([each.expires_ms for each in group]) > self._parts.clock.now_ms()

    async def _request(
        self, bot: ServingBot, progress: SendProgress, content: Content, group: list[QueuedCommand]
    ) -> Accepted | AdapterError | None:
        """Counts and stores the request, and makes it. None: it was not made, and is taken back."""
        parts, person, clock = self._parts, self.person, self._parts.clock
        person.state = window.record_attempt(person.state, progress, clock.now_ms())
        self._pace.on_post(parts.policy.gap_ms / 1000, is_repeat=bool(progress.unanswered_attempts))
        try:
            while not person.is_saved:  # a token is in the bucket before a request uses it
                await person.save()
            is_wanted = person.state.progress is not None and self._is_wanted(bot, group)
        except BaseException:
            self._take_back()
            raise
        if not is_wanted:
            self._take_back()
            return None
        self._enter(Phase.SENDING)
        parts.successes.note_post(bot.account.base_url, person.key)
        try:
            return await parts.chat.send(
                bot.account,
                user=person.user,
                client_id=client_id(progress.client_id_base, progress.part, progress.merged),
                context_token=person.state.token,
                content=content,
                check=self._tenure.check,
            )
        except LeaseLost:
            self._take_back()
            raise
        except AdapterError as exc:
            return exc

    def _take_back(self) -> None:
        state = self.person.state
        if (head := state.progress) is not None:  # an erasure may have ended it
            undone = msgspec.structs.replace(head, attempts=head.attempts - 1)
            self.person.state = window.undo_attempt(state, undone)
        self._pace.on_taken_back()

    def _after(
        self, answer: Accepted | AdapterError, bot: ServingBot, group: list[QueuedCommand], content: Content
    ) -> Awaitable[None]:
        """Does what iLink's answer asks for."""
        person, before = self.person, self.person.state.progress
        assert before is not None
        person.state = sending.after_answer(person.state, answer, content, self._parts.clock.now_ms())
        self._attempt.has_looked = False
        if not isinstance(answer, Uncertain | Temporary):
            self._pace.on_answered()
        if isinstance(answer, Accepted):
            self._attempt.failures = 0
            progress = person.state.progress
            if progress is not None and progress.part >= group[0].part_count:
                result = sending.accepted_result(progress)
                return self._end([(command, result) for command in group])
            return self._save()  # the pause before the next part is long
        if isinstance(answer, Throttled):
            self._report(answer, bot, before)
            refusal = sending.refusal(answer, before)
            if sending.is_throttled_again(before) or before.unanswered_attempts > 1:  # the first may be the last send
                return self._end([(command, refusal) for command in group])
            self._attempt.refusal, self._attempt.refused_in = refusal, person.state.window.id
            self._alone_up_to = max(self._alone_up_to, group[0].sequence)
            if answer.errmsg == PREPARE_FAILED:
                self._parts.sessions.restart_soon(bot.id)
            return self._save()
        return self._after_failure(answer, bot, group)

    async def _after_failure(
        self, answer: AdapterError, bot: ServingBot, group: list[QueuedCommand], *, is_upload: bool = False
    ) -> None:
        """Does what the failure of a request or an upload asks for."""
        parts, progress = self._parts, self.person.state.progress
        self._report(answer, bot, progress)
        if isinstance(answer, SessionExpired):
            await self._check_session(answer, bot, group)
        elif isinstance(answer, Refused):
            if len(group) > 1 and progress is not None and not progress.is_partially_sent:
                self._alone_up_to = max(self._alone_up_to, group[-1].sequence)
                await self._save()
                return
            refusal = sending.refusal(answer, progress)
            refusal = msgspec.structs.replace(refusal, reason="media") if is_upload else refusal
            await self._end([(command, refusal) for command in group])
        elif isinstance(answer, Uncertain) and not is_upload:
            parts.metrics.outbound_retries.labels(reason=answer.reason).inc()
            self._pace.on_silence()
            await self._save()  # the pause before its repeat is long
        else:
            parts.metrics.outbound_retries.labels(reason=answer.reason).inc()
            self._attempt.failures += 1
            pause_s = getattr(answer, "retry_after_s", None) or backoff(self._attempt.failures)
            self._pace.pause(pause_s + parts.clock.jitter(pause_s / 4))
            if not is_upload:  # if the owner ends now, the next one must not take it for sent
                await self._save()

    async def _check_session(self, answer: SessionExpired, bot: ServingBot, group: list[QueuedCommand]) -> None:
        """-14 to a send is no proof of a dead session: iLink answers a malformed body with it, too."""
        person, sessions = self.person, self._parts.sessions
        refusal = sending.refusal(answer, person.state.progress)
        self._enter(Phase.WAITING)
        work = partial(sessions.is_alive, bot.id, lambda: person.bot is None)
        if not await self._tenure.persist(work, "session", sandbox=person.key.sandbox):
            if person.bot is not None and person.bot.id == bot.id:
                person.bot = msgspec.structs.replace(person.bot, is_usable=False)
            self._attempt.refusal = msgspec.structs.replace(refusal, reason="needs_login")
            self._attempt.refused_in = person.state.window.id
            await self._save()  # a login may take hours, and another bot repeats no unanswered request
        elif self._attempt.rejections:
            refusal = msgspec.structs.replace(refusal, reason="rejected")
            await self._end([(command, refusal) for command in group])
        else:
            self._attempt.rejections = 1
            self._pace.pause(SESSION_PAUSE_S)

    async def _read(self, commands: Sequence[QueuedCommand]) -> None:
        """Reads the bodies of commands from the bus."""
        bodies = await self._commands.read(commands)
        for command in commands:
            body = bodies[command.sequence]
            if body is None:  # an operator has dropped it
                self._leave(command, None)
                await self._commands.acknowledge(command)
            elif isinstance(body, CommandResult):
                await self._end([(command, body)])
            else:
                command.parts = body

    async def _upload(
        self, part: MediaPart, bot: ServingBot, group: list[QueuedCommand], content_of: tuple[int, int, int, str]
    ) -> None:
        person, head = self.person, self._attempt
        try:
            head.content = await self._parts.uploads.upload_media(part, bot.account, person.key.sandbox, person.user)
            head.content_of = content_of
        except (StoreAway, LeaseLost):
            raise
        except AdapterError as exc:
            if exc.reason == "http_5xx" and not head.failures:  # some last until iLink has a new session
                self._parts.sessions.restart_soon(bot.id)
            await self._after_failure(exc, bot, group, is_upload=True)

    def _report(self, answer: AdapterError, bot: ServingBot, progress: SendProgress | None) -> None:
        raw = {}
        if isinstance(answer, Refused):
            raw = {"ret": answer.ret, "errcode": answer.errcode, "errmsg": answer.errmsg}
        log.info(
            "send.retrying" if isinstance(answer, Temporary) else "send.failed",
            bot=bot.id,
            host=self._parts.chat.host_of(bot.account.base_url),
            sandbox=self.person.key.sandbox,
            commands=[ref.id for ref in progress.commands] if progress else [],
            failure=type(answer).__name__,
            reason=answer.reason,
            detail=answer.detail,
            **raw,
        )

    # the end of commands ----------------------------------------------------------------------------

    async def _end(self, ends: Sequence[tuple[QueuedCommand, CommandResult]]) -> None:
        """Ends commands, which leave the queue."""
        if not ends:
            return
        person, progress = self.person, self.person.state.progress
        ends = [(command, sending.final_result(result, person.state, command)) for command, result in ends]
        await self._commands.end(ends, self.address, self.shown, on_told=self._leave)
        command, result = ends[-1]
        if progress is not None and progress.unanswered_attempts and result.outcome == "uncertain":
            self._pace.on_uncertain()
        if (not self.queue or self.reason) and not (command.typing == "on" and result.is_sent):
            person.hide_typing()

    @property
    def address(self) -> Address:
        """The person as receipts name them."""
        person = self.person
        return Address(person.key.sandbox, person.bot.id if person.bot is not None else person.state.bot, person.user)

    @property
    def shown(self) -> Window:
        """The window as receipts show it."""
        parts = self._parts
        return window.visible_window(self.person.state, parts.clock.now_ms(), parts.policy.window)

    def _leave(self, command: QueuedCommand, result: CommandResult | None) -> None:
        """Takes a command from the queue. `result`: of its final receipt; None: it has none.

        Stores nothing. The record without the command goes along with the next send. A new owner that finds the
        command in the stored record finds its receipt, too.
        """
        if command not in self.queue:
            return
        is_first = self.queue[0] is command
        self.queue.remove(command)
        is_refused = result is None or result.outcome == "refused" or bool(result.repeat_of)
        self.person.state = sending.with_ended(self.person.state, command.ref, is_refused=is_refused)
        if is_first:
            self._attempt = _Attempt()

    def _save(self) -> Awaitable[None]:
        """Raises LeaseLost, Crashed, StaleRead."""
        return self._tenure.persist(self.person.save, "record", sandbox=self.person.key.sandbox)


def _crashed(command: QueuedCommand, exc: BaseException) -> CommandResult:
    """How a command ends at which the code raises. What is not known to be new may have been sent."""
    if not command.is_checked:
        return CommandResult("uncertain", detail=type(exc).__name__)
    return sending.crashed_result(exc)
