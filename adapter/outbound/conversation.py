"""One conversation: the commands for one user of one sandbox, and what iLink lets be sent to them.

`on_inbound`, `enqueue` and `on_binding` change the state at once and never wait. `run` is one coroutine, which lives
while there is work. It takes the first command, waits until that may be sent, stores what it is about to do, makes
the request, publishes the receipt, and acknowledges the command. After each wait it looks at the state again. What is
decided is in `sending` and `window`.

The conversation is the only writer of its record. A command stays in `WECHAT_OUT` until its final receipt is stored,
so a new owner begins where this one ended.
"""

from __future__ import annotations

import asyncio
import bisect
import math
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import msgspec
import structlog

from adapter.content.dedup import bot_of
from adapter.errors import (
    AdapterError,
    BusRefused,
    Conflict,
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
from adapter.kit.persist import ATTEMPTS, persist
from adapter.kit.timing import ChangeSignal, backoff
from adapter.outbound import sending, window
from adapter.outbound.commands import MERGE_SEPARATOR, MediaPart, client_id
from adapter.outbound.record import ConversationRecord, SendProgress
from adapter.outbound.sending import CommandResult, QueuedCommand, ServingBot
from adapter.outbound.uploads import StoreAway
from adapter.outbound.window import InboundReceived
from adapter.ports import Accepted, Content

if TYPE_CHECKING:
    from adapter.outbound.shard import Shard

log = structlog.get_logger()

T = TypeVar("T")

MAX_TOGETHER = 16
"""Most commands that are parked or ended together, so that an inbound message waits for no more than these."""
LONGEST_WAIT_S = 3600.0
"""Longest timer, since the clock may be set and the machine may sleep."""
LOGIN_CHECK_S = 60.0
"""Interval at which a queue that waits for a login looks at the binding, in case its update was lost."""
TOO_NEW_S = 5.0
"""Pause before a record that only a newer replica can read is read again. Its shard mostly moves there."""
SESSION_PAUSE_S = 1.0
"""Pause before a request is tried again to which iLink answered -14 although the session is alive."""
LOST_HEAD_S = 1.0
"""Interval at which a queue looks again whose head is somebody else's."""
SHORTEST_WAIT_S = 0.01
PREPARE_FAILED = "prepare failed"
"""iLink's words with a -2 that may also mean that it has forgotten the bot's session
(docs/reference/ilink-protocol.md, "Refused sends")."""
OTHER_USER = CommandResult(
    "refused", "other_user", "The command answers no message of this person: name the `user` of it."
)
_NOTHING = 0, 0, 0, ""


class Conversation:
    """One user of one sandbox."""

    def __init__(self, shard: Shard, sandbox: str, user: str) -> None:
        self.sandbox = sandbox
        self.user = user
        self.record = ConversationRecord()
        self.bot: ServingBot | None = None
        """None: no bot of the sandbox serves the user."""
        self.queue: list[QueuedCommand] = []
        """In the order of their sequences."""
        self._expires_ms = math.inf
        """No command expires before."""
        self.reason = ""
        """Why the queue waits; "" if it does not."""
        self.holds = 0
        """Pollers that are publishing a message of the user, which the conversation takes then."""
        self.is_loaded = False
        self.is_sending = False
        """A request is counted, and has no answer yet."""
        self._shard = shard
        self._task: asyncio.Task[None] | None = None
        self._is_acting = False
        """From the slot for a request until its receipts are stored: a drain lets this end."""
        self._must_store = False
        self._changed = ChangeSignal()
        self._version = 0
        """Number of changes by others."""
        self._stored = self.record
        """The record as the bucket has it."""
        self._revision = 0
        self._written = self.record
        """The record as it was written last, perhaps without an answer."""
        self._not_before = -math.inf
        """Earliest monotonic time of the next request: the gap, or the pause after a failure."""
        self._failures = 0
        """Requests for the head in a row that iLink did not take."""
        self._rejections = 0
        """Times that iLink answered -14 for the head while the session was alive."""
        self._posted_at = self._unanswered_at = -math.inf
        """Monotonic times at which the request under way was made first, and was over without an answer; or at which
        the record was read that says so."""
        self._has_looked = False
        """The receipt of what is about to be repeated was asked for."""
        self._uncertain = 0
        """Commands in a row that ended `uncertain`."""
        self._content: Content | None = None
        """What the message in progress sends, if it was uploaded or merged here."""
        self._content_of = _NOTHING
        """Whose it is: sequence of the first command, number of the part, commands merged with it, bot."""
        self._alone_up_to = 0
        self._refusal: CommandResult | None = None
        """iLink's answer after which the queue waits."""

    # what others tell it ----------------------------------------------------------------------------

    def on_inbound(self, inbound: InboundReceived) -> None:
        """Takes a message of the user."""
        if inbound.sequence <= self.record.inbox_seq:
            return
        now_ms = self._shard.deps.clock.now_ms()
        self.record = window.open_window(self.record, inbound, now_ms, int(self.is_sending))
        self._refusal = None
        if self.bot is None:
            self.on_binding()
        self._forget_other_token()
        self._change()
        self._shard.store_soon(self)

    def on_repeat(self, message: str, bot: str, token: str) -> None:
        """iLink has repeated a message, possibly with a newer token, which counts if no later message came."""
        if token and (message, bot) == (self.record.window.id, self.record.bot) and token != self.record.token:
            self.record = msgspec.structs.replace(self.record, token=token)
            self._forget_other_token()
            self._shard.store_soon(self)

    def enqueue(self, command: QueuedCommand) -> None:
        """Takes a command. One whose message is in progress goes first all the same."""
        queue = self.queue
        if not queue or queue[-1].sequence < command.sequence:
            queue.append(command)
        else:
            bisect.insort(queue, command, key=lambda each: each.sequence)
        self._expires_ms = min(self._expires_ms, command.expires_ms)
        self._change()

    def on_binding(self) -> None:
        """Looks at which bot serves the user now. The token of another bot is forgotten."""
        if not self.is_loaded:
            return
        former, self.bot = self.bot, self._shard.bot_of(self.sandbox, self.user, self.record.bot)
        unserved = self.bot is None
        is_there = not unserved or self._revision or self.record.bots  # else they have never written
        if is_there and unserved != self.record.unserved:  # it gets a time to live, or loses it
            self.record = msgspec.structs.replace(self.record, unserved=unserved)
            self._must_store = True
        elif self.bot == former:
            return
        self._forget_other_token()
        if self.bot is None:
            self._shard.typing.hide(self.sandbox, self.user)
        self._change()

    def store(self) -> None:
        """Stores the record if it has changed."""
        if self.is_dirty:
            self._must_store = True
            self._change()

    def on_loaded(self, record: ConversationRecord, revision: int, newest: InboundReceived | None) -> None:
        """Takes its record. `newest`: a message of the inbox that the record does not know."""
        if self.is_loaded:
            return
        if not record.bot and (serving := self._shard.bot_of(self.sandbox, self.user, "")) is not None:
            record = msgspec.structs.replace(record, bot=serving.id)
        self.record = self._stored = record
        self._revision, self.is_loaded = revision, True
        self._posted_at = self._unanswered_at = self._shard.deps.clock.monotonic()
        self.on_binding()
        if newest is not None:
            self.on_inbound(newest)

    def _forget_other_token(self) -> None:
        if self.bot is not None and self.record.bot != self.bot.id:
            self.record = msgspec.structs.replace(self.record, bot=self.bot.id, token="")

    def _change(self) -> None:
        """Has `run` look at the state."""
        self._version += 1
        if self._task is not None:
            self._changed.notify_all()
        elif (self.queue or self._must_store) and not self._shard.is_draining:
            self._task = asyncio.get_running_loop().create_task(self.run())

    @property
    def is_dirty(self) -> bool:
        """The record differs from the stored one."""
        return self.record is not self._stored and self.record != self._stored

    @property
    def is_stopped(self) -> bool:
        """It takes nothing any more: the shard is given up, or another replica's."""
        return self._shard.is_draining

    @property
    def is_running(self) -> bool:
        return self._task is not None

    @property
    def is_held_back(self) -> bool:
        """A command ended `uncertain`, and none was answered since, which no record says."""
        return self._uncertain > 0 and self.bot is not None

    def drain(self) -> asyncio.Task[None] | None:
        """Lets a request under way end, and nothing else. The shard takes no more commands."""
        if self._task is not None and not self._is_acting:
            self._task.cancel()
        return self._task

    def stop(self) -> None:
        """Ends at once, since the shard is another replica's."""
        if self._task is not None:
            self._task.cancel()

    # the loop ---------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Works until no command is left and the record is stored. Between "nothing to do" and its end nothing is
        awaited, so nothing is missed."""
        try:
            if not self.is_loaded:
                await self._open()
            crashes = failures = 0
            while self.is_loaded and (self.queue or self._must_store) and not self._shard.is_draining:
                head = self.queue[0] if self.queue else None
                try:
                    await self._step()
                    failures = 0
                except LeaseLost:
                    await self._shard.tenure.valid()
                except StaleRead:
                    await self._open()
                except Exception as exc:
                    if isinstance(exc, Temporary | BusRefused):  # the bus or the object store is away
                        failures += 1
                        said = {"reason": exc.reason, "detail": exc.detail}
                        log.warning("conversation.retrying", sandbox=self.sandbox, **said)
                        await self._shard.deps.clock.sleep(backoff(failures, first_s=0.2, longest_s=5.0))
                        continue
                    crashes = crashes + 1 if self.queue and self.queue[0] is head else 1
                    log.exception("conversation.crashed", sandbox=self.sandbox, crashes=crashes)
                    await self._after_crash(exc, crashes)
                finally:
                    self._is_acting = False
        except LeaseLost:
            log.debug("conversation.fenced", sandbox=self.sandbox)
        finally:
            self._task = None
            if self.bot is None:  # a sandbox may name any number of users
                self._shard.drop_idle(self)

    async def _after_crash(self, exc: Exception, crashes: int) -> None:
        """The third crash ends the first command. Commands that were merged are tried one by one before."""
        if self.queue and crashes >= ATTEMPTS:
            await self._end([(self.queue[0], _crashed(self.queue[0], type(exc).__name__))])
            return
        if self.queue:
            self._alone_up_to = max(self._alone_up_to, self.queue[: sending.MERGED_AT_ONCE][-1].sequence)
        await self._shard.deps.clock.sleep(backoff(crashes, first_s=0.5))

    async def _open(self) -> None:
        """Reads the record, and what the inbox has behind it."""
        while not self.is_loaded:
            try:
                await self._persist(lambda: self._shard.load(self), "open")
            except RecordTooNew:
                now_ms, result = self._shard.deps.clock.now_ms(), CommandResult("refused", "expired", sending.EXPIRED)
                # one that a former owner may have begun stands in the record, and is for who can read it
                expired = [each for each in self.queue if each.is_checked and each.expires_ms <= now_ms]
                await self._end([(command, result) for command in expired])
                await self._shard.deps.clock.sleep(TOO_NEW_S)
            except Crashed as exc:
                await self._end([(each, _crashed(each, exc.detail)) for each in self.queue])
                if not self.queue:
                    return

    async def _step(self) -> None:
        """Does the next thing for the first command."""
        shard, deps, queue = self._shard, self._shard.deps, self.queue
        await deps.ticks.wait_tick()
        if self._must_store:
            self._must_store = False
            await self._save()
        if not queue:
            return
        now_ms, seen = deps.clock.now_ms(), self._version
        head, progress, self.reason = queue[0], self.record.head, ""
        if self._expires_ms <= now_ms:
            await self._end_expired(now_ms)
        elif not head.is_checked:
            await self._look_up(queue[:MAX_TOGETHER])
        elif self.bot is None and not (bindings := deps.bindings).is_current:
            await bindings.changed.wait_until(lambda: bindings.is_current)
            self.on_binding()
        elif self.bot is None:
            result = CommandResult("refused", "not_bound", sending.UNSERVED)
            await self._end([(command, result) for command in queue[:MAX_TOGETHER]])
        elif progress is not None and not progress.has_command(head.ref.sequence):
            await self._find_head(progress, seen)
        elif ended := self._end_of(head, self.bot):
            await self._end([(command, ended) for command in sending.in_progress(queue, self.record) or [head]])
        elif progress is None and sending.earlier(head, self.record) is not None:
            if (repeated := await self._result_of_repeat(head)) is not None:
                await self._end([(head, repeated)])
        elif reason := sending.blocker(head, self.record, self.bot, deps.policy, now_ms):
            self.reason = reason
            await self._wait_blocked(head, reason, seen)
        elif head.typing:
            if head.typing == "on":
                shard.show_typing(self)
            await self._end([(head, CommandResult("accepted"))])
        elif (due_s := self._next_due_s(self.bot)) > 0:
            await self._wait(due_s, seen, self.bot)
        elif progress is not None and progress.unanswered_attempts and not self._has_looked:
            self._has_looked = True  # another owner may have ended it since
            for command in (group := sending.in_progress(queue, self.record)):
                command.is_checked = False
            await self._look_up(group)
        else:
            await self._send(self.bot, seen)

    async def _find_head(self, progress: SendProgress, seen: int) -> None:
        """Puts the commands of the message in progress first, waits for them, or finds that they are over."""
        if any(progress.has_command(command.ref.sequence) for command in self.queue):
            self.queue.sort(key=lambda each: (not progress.has_command(each.ref.sequence), each.sequence))
        elif any(map(self._shard.is_in_flight, progress.commands)):  # they are looked up before they come here
            await self._wait(LOST_HEAD_S, seen)
        else:  # the previous owner ended them, and did not store that
            self.record = sending.without_lost_head(self.record)
            self._begin_head()

    async def _end_expired(self, now_ms: int) -> None:
        result = CommandResult("refused", "expired", sending.EXPIRED)
        expired = sending.expired(self.queue, self.record, now_ms)[: sending.MERGED_AT_ONCE]
        if expired:
            await self._end([(command, await self._result_of_repeat(command) or result) for command in expired])
        else:
            self._expires_ms = min(command.expires_ms for command in self.queue)

    async def _look_up(self, commands: Sequence[QueuedCommand]) -> None:
        """Finds the receipts of commands that somebody may have worked on before, and ends those that are over."""
        asked = [command for command in commands if not command.is_checked]
        found = await self._persist(lambda: self._shard.find_receipts(self.sandbox, asked), "receipts")
        for command in asked:
            command.is_checked = True
            if (result := found.get(command.sequence)) is None or command not in self.queue:
                continue
            group = sending.in_progress(self.queue, self.record)
            self._leave(command, result)
            await self._shard.acknowledge(command)
            if result.may_be_sent and command in group:  # one message, one answer
                await self._end([(each, result) for each in group if each is not command])

    def _end_of(self, head: QueuedCommand, bot: ServingBot) -> CommandResult | None:
        """The result of a command for which no request is to be made; None: one is, unless it repeats a command."""
        progress = self.record.head
        if progress is not None:
            if progress.part >= head.part_count:
                return sending.accepted_result(progress)
            is_foreign = progress.merged and progress.is_partially_sent and self._content_of[0] != head.sequence
            if is_foreign or not sending.is_repeatable(progress, bot.id):
                detail = "iLink gave no answer that can be read, and is not asked again: that might show it twice."
                return CommandResult("uncertain", "", detail)
            return None
        return OTHER_USER if self._answers_other(head) else None

    async def _result_of_repeat(self, command: QueuedCommand) -> CommandResult | None:
        """The result of a command whose id an earlier one had that may have been sent. None: it is no repeat."""
        if (first := sending.earlier(command, self.record)) is None:
            return None
        result = await self._persist(lambda: self._shard.result_of_repeat(self.sandbox, first), "repeat")
        if result is None:  # it was refused, and its owner could not store that
            recent = [ref for ref in self.record.recent if ref != first]
            self.record = msgspec.structs.replace(self.record, recent=recent)
        elif first.sequence == command.ref.sequence:  # it has ended, and its receipt could not be stored
            return msgspec.structs.replace(result, repeat_of=0)
        return result

    # waiting ----------------------------------------------------------------------------------------

    def _next_due_s(self, bot: ServingBot) -> float:
        """Seconds until the next request may be made."""
        now = self._shard.deps.clock.monotonic()
        due_s, progress = self._not_before - now, self.record.head
        if progress is not None and progress.unanswered_attempts:
            over_s, posted_s = now - self._unanswered_at, now - self._posted_at
            is_answering = self._is_answering(bot, progress)
            due_s = max(due_s, sending.repeat_due_s(over_s, posted_s, is_answering=is_answering))
        return due_s

    def _is_answering(self, bot: ServingBot, progress: SendProgress) -> bool:
        """Whether iLink has answered a request of anybody that began since it left one of this user without an
        answer: after a lost connection any request, else a send."""
        successes = self._shard.deps.successes
        return successes.since(bot.account.base_url, self._unanswered_at, of_any=progress.was_reset)

    async def _wait(self, due_s: float, seen: int, bot: ServingBot | None = None) -> None:
        """Waits until something is due or has changed. `bot`: through which a request is to be made. For a repeat
        iLink is asked meanwhile whether it answers."""
        deps = self._shard.deps
        expiry_s = (self._expires_ms - deps.clock.now_ms()) / 1000
        due_s = max(SHORTEST_WAIT_S, min(due_s, expiry_s, LONGEST_WAIT_S))
        progress = self.record.head
        if bot is None or progress is None or not progress.unanswered_attempts or self._is_answering(bot, progress):
            await self._changed.wait_until(lambda: self._version != seen, due_s)
            return
        ask_s = sending.REPEAT_AFTER_S + self._unanswered_at - deps.clock.monotonic()
        if ask_s <= 0:
            ask_s = deps.successes.ask(deps.chat, bot.account, (self.sandbox, self.user))
        await self._changed.wait_until(
            lambda: self._version != seen or self._is_answering(bot, progress),
            min(due_s, ask_s),
            also=deps.successes.changed,
        )

    async def _wait_blocked(self, head: QueuedCommand, reason: str, seen: int) -> None:
        """Parks or refuses what was told nothing yet; then waits for a change."""
        deps, queue = self._shard.deps, self.queue
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
                due_s = (window.probes_at_ms(self.record.window, deps.policy.window) - deps.clock.now_ms()) / 1000
            await self._wait(due_s, seen)
            self.on_binding()

    async def _look_behind(self) -> None:
        """Before something is parked or refused: a former owner may have published what opens the window."""
        try:
            newest = await self._shard.newest_inbound(self)
        except Temporary as exc:
            log.info("conversation.retrying", sandbox=self.sandbox, work="look", reason=exc.reason)
            return
        if newest is not None:
            self.on_inbound(newest)

    def _told(self, command: QueuedCommand, head: QueuedCommand, reason: str) -> CommandResult:
        """What a command is told that has to wait. The first one is told what iLink answered."""
        if self._answers_other(command):
            return OTHER_USER
        result = sending.while_blocked(command, reason, is_head=command is head)
        answer, self._refusal = self._refusal, None
        if answer is None:
            return result
        return msgspec.structs.replace(answer, outcome=result.outcome, reason=result.reason)

    def _answers_other(self, command: QueuedCommand) -> bool:
        """Whether a command answers a message that this person has not written."""
        if not command.reply_to:
            return False
        author, bot = bot_of(command.reply_to), self.bot.id if self.bot is not None else ""
        return bool(author) and author not in (bot, self.record.bot, *self.record.bots)

    async def _park_or_end(self, command: QueuedCommand, result: CommandResult) -> None:
        if result.outcome == "parked":
            try:
                await self._publish_receipt(command, result)
            except StaleRead:
                command.is_checked = False
                return
            except Crashed as exc:
                result = CommandResult("dead_lettered", exc.reason, exc.detail)
            else:
                command.parked = True
                self._content_of = _NOTHING  # what was uploaded may be gone when its turn comes
                self._shard.release_body(command)
                self._shard.typing.hide(self.sandbox, self.user)
                return
        await self._end([(command, result)])

    # sending ----------------------------------------------------------------------------------------

    async def _send(self, bot: ServingBot, seen: int) -> None:
        """Makes the next request for the first command, or the step that has to come before it."""
        deps = self._shard.deps
        group = sending.next_message(self.queue, self.record, deps.policy, self._alone_up_to)
        if missing := [command for command in group if command.parts is None]:
            await self._read(missing)
            return
        is_begun = self.record.head is not None and self.record.head.is_partially_sent
        if len(group) > 1 and not is_begun:
            group = sending.mergeable_prefix(group, deps.policy.merge_bytes)
        progress = sending.begun(group, self.record, bot.id)
        content_of = group[0].sequence, progress.part, progress.merged, bot.id
        if progress.merged and not is_begun:
            self._content, self._content_of = MERGE_SEPARATOR.join(map(sending.only_text, group)), content_of
        content = self._content if self._content_of == content_of else None
        if content is None:
            part = (group[0].parts or [])[progress.part]
            if isinstance(part, MediaPart):
                await self._upload(part, bot, group, content_of)
                return
            content = part
        slots = deps.slots[bot.account.base_url]
        if not (is_free := slots.try_acquire(self.sandbox)):
            await slots.acquire(self.sandbox)
        try:
            if not is_free and (
                sending.blocker(group[0], self.record, bot, deps.policy, deps.clock.now_ms())
                or not self._is_wanted(bot, group)
            ):
                return
            self._is_acting = True
            answer = await self._request(bot, progress, content, group)
        finally:
            slots.release(self.sandbox)
            self.is_sending = False
        if answer is not None:
            await self._after(answer, bot, group, content)

    def _is_wanted(self, bot: ServingBot, group: list[QueuedCommand]) -> bool:
        """Whether a message may still be sent after something was awaited."""
        is_same = self.bot == bot and self.queue[:1] == group[:1] and not self._shard.is_draining
        return is_same and min([each.expires_ms for each in group]) > self._shard.deps.clock.now_ms()

    async def _request(
        self, bot: ServingBot, progress: SendProgress, content: Content, group: list[QueuedCommand]
    ) -> Accepted | AdapterError | None:
        """Counts and stores the request, and makes it. None: it was not made, and is taken back."""
        shard, deps = self._shard, self._shard.deps
        self.is_sending = True
        if not progress.unanswered_attempts:
            self._posted_at = deps.clock.monotonic()
        self.record = window.record_attempt(self.record, progress, deps.clock.now_ms())
        self._not_before = deps.clock.monotonic() + deps.policy.gap_ms / 1000
        try:
            while self._stored is not self.record:  # a token is in the bucket before a request uses it
                await self.save()
            is_wanted = self.record.head is not None and self._is_wanted(bot, group)
        except BaseException:
            self._take_back()
            raise
        if not is_wanted:
            self._take_back()
            return None
        deps.successes.note_post(bot.account.base_url, (self.sandbox, self.user))
        try:
            return await deps.chat.send(
                bot.account,
                user=self.user,
                client_id=client_id(progress.client_id_base, progress.part, progress.merged),
                context_token=self.record.token,
                content=content,
                check=shard.tenure.check,
            )
        except LeaseLost:
            self._take_back()
            raise
        except AdapterError as exc:
            return exc

    def _take_back(self) -> None:
        if (head := self.record.head) is not None:  # an erasure may have ended it
            self.record = window.undo_attempt(self.record, msgspec.structs.replace(head, attempts=head.attempts - 1))
        self._not_before = -math.inf

    def _after(
        self, answer: Accepted | AdapterError, bot: ServingBot, group: list[QueuedCommand], content: Content
    ) -> Awaitable[None]:
        """Does what iLink's answer asks for."""
        deps, before = self._shard.deps, self.record.head
        assert before is not None
        self.record = sending.after_answer(self.record, answer, content, deps.clock.now_ms())
        self._has_looked = False
        self._uncertain = self._uncertain if isinstance(answer, Uncertain | Temporary) else 0
        if isinstance(answer, Accepted):
            self._failures = 0
            progress = self.record.head
            if progress is not None and progress.part >= group[0].part_count:
                result = sending.accepted_result(progress)
                return self._end([(command, result) for command in group])
            return self._save()  # the pause before the next part is long
        if isinstance(answer, Throttled):
            self._report(answer, bot, before)
            refusal = sending.refusal(answer, before.attempts)
            if sending.is_throttled_again(before) or before.unanswered_attempts > 1:  # the first may be the last send
                return self._end([(command, refusal) for command in group])
            self._refusal = refusal
            self._alone_up_to = max(self._alone_up_to, group[0].sequence)
            if answer.errmsg == PREPARE_FAILED:
                self._shard.restart_session(bot.id)
            return self._save()
        return self._after_failure(answer, bot, group, attempts=before.attempts)

    async def _after_failure(
        self,
        answer: AdapterError,
        bot: ServingBot,
        group: list[QueuedCommand],
        *,
        attempts: int = 0,
        is_upload: bool = False,
    ) -> None:
        """Does what the failure of a request or an upload asks for."""
        deps, progress = self._shard.deps, self.record.head
        self._report(answer, bot, progress)
        if isinstance(answer, SessionExpired):
            await self._check_session(answer, bot, group, attempts)
        elif isinstance(answer, Refused):
            if len(group) > 1 and progress is not None and not progress.is_partially_sent:
                self._alone_up_to = max(self._alone_up_to, group[-1].sequence)
                await self._save()
                return
            refusal = sending.refusal(answer, attempts)
            refusal = msgspec.structs.replace(refusal, reason="media") if is_upload else refusal
            await self._end([(command, refusal) for command in group])
        elif isinstance(answer, Uncertain) and not is_upload:
            deps.metrics.outbound_retries.labels(reason=answer.reason).inc()
            self._unanswered_at = deps.clock.monotonic()
            await self._save()  # the pause before its repeat is long
        else:
            deps.metrics.outbound_retries.labels(reason=answer.reason).inc()
            self._failures += 1
            pause_s = getattr(answer, "retry_after_s", None) or backoff(self._failures)
            pause_s += deps.clock.jitter(pause_s / 4)
            self._not_before = max(self._not_before, deps.clock.monotonic() + pause_s)
            if not is_upload:  # if the owner ends now, the next one must not take it for sent
                await self._save()

    async def _check_session(
        self, answer: SessionExpired, bot: ServingBot, group: list[QueuedCommand], attempts: int
    ) -> None:
        """-14 to a send is no proof of a dead session: iLink answers a malformed body with it, too."""
        deps, refusal = self._shard.deps, sending.refusal(answer, attempts)
        self._is_acting = False
        if not await self._persist(lambda: deps.sessions.is_alive(bot.id), "session"):
            if self.bot is not None and self.bot.id == bot.id:
                self.bot = msgspec.structs.replace(self.bot, is_usable=False)
            self._refusal = msgspec.structs.replace(refusal, reason="needs_login")
            await self._save()  # a login may take hours, and another bot repeats no unanswered request
        elif self._rejections:
            refusal = msgspec.structs.replace(refusal, reason="rejected")
            await self._end([(command, refusal) for command in group])
        else:
            self._rejections = 1
            self._not_before = max(self._not_before, deps.clock.monotonic() + SESSION_PAUSE_S)

    async def _read(self, commands: Sequence[QueuedCommand]) -> None:
        """Reads the bodies of commands from the bus."""
        bodies = await self._persist(lambda: self._shard.read_bodies(self.sandbox, commands), "bodies")
        for command in commands:
            body = bodies[command.sequence]
            if body is None:  # an operator has dropped it
                self._leave(command, None)
                await self._shard.acknowledge(command)
            elif isinstance(body, CommandResult):
                await self._end([(command, body)])
            else:
                command.parts = body

    async def _upload(
        self, part: MediaPart, bot: ServingBot, group: list[QueuedCommand], content_of: tuple[int, int, int, str]
    ) -> None:
        try:
            self._content = await self._shard.deps.uploads.upload_media(part, bot.account, self.sandbox, self.user)
            self._content_of = content_of
        except (StoreAway, LeaseLost):
            raise
        except AdapterError as exc:
            if exc.reason == "http_5xx" and not self._failures:  # some last until iLink has a new session
                self._shard.restart_session(bot.id)
            await self._after_failure(exc, bot, group, is_upload=True)

    def _report(self, answer: AdapterError, bot: ServingBot, progress: SendProgress | None) -> None:
        raw = {}
        if isinstance(answer, Refused):
            raw = {"ret": answer.ret, "errcode": answer.errcode, "errmsg": answer.errmsg}
        log.info(
            "send.retrying" if isinstance(answer, Temporary) else "send.failed",
            bot=bot.id,
            host=self._shard.deps.chat.host_of(bot.account.base_url),
            sandbox=self.sandbox,
            commands=[ref.id for ref in progress.commands] if progress else [],
            failure=type(answer).__name__,
            reason=answer.reason,
            detail=answer.detail,
            **raw,
        )

    # the end of commands ----------------------------------------------------------------------------

    async def _end(self, ends: Sequence[tuple[QueuedCommand, CommandResult]]) -> None:
        """Publishes final receipts, then acknowledges the commands. All receipts come first: a new owner that finds
        one of a merged message knows the result of the others."""
        ends = [(command, sending.final_result(result, self.record, command)) for command, result in ends]
        is_unanswered = self.record.head is not None and self.record.head.unanswered_attempts > 0
        if len(ends) == 1:
            told = [await self._publish_final(*ends[0])]
        else:
            told = await asyncio.gather(*(self._publish_final(command, result) for command, result in ends))
        for (command, result), is_told in zip(ends, told, strict=True):
            self._leave(command, result)
            if is_told:
                await self._shard.acknowledge(command)
        if not ends:
            return
        command, result = ends[-1]
        if is_unanswered and result.outcome == "uncertain":
            self._uncertain += 1
            first_s, longest_s = sending.AFTER_UNCERTAIN_S
            pause_s = backoff(self._uncertain, first_s=first_s, longest_s=longest_s)
            self._not_before = self._shard.deps.clock.monotonic() + pause_s
        if (not self.queue or self.reason) and not (command.typing == "on" and result.is_sent):
            self._shard.typing.hide(self.sandbox, self.user)

    async def _publish_final(self, command: QueuedCommand, result: CommandResult) -> bool:
        """Publishes a final receipt. False: a bug prevents it, and the command comes again to the next owner."""
        try:
            await self._publish_receipt(command, result)
        except Crashed as exc:
            bare = CommandResult("dead_lettered", exc.reason, exc.detail)
            if result.may_be_sent:  # no dead letter, which somebody might send again
                bare = CommandResult(result.outcome, message_ids=result.message_ids, attempts=result.attempts)
            try:
                await self._publish_receipt(command, bare)
            except Crashed:
                log.error("command.abandoned", sandbox=self.sandbox, sequence=command.sequence)
                self._shard.release_body(command)
                return False
        return True

    def _publish_receipt(self, command: QueuedCommand, result: CommandResult) -> Awaitable[None]:
        """Publishes a receipt. Raises LeaseLost, Crashed."""
        return self._persist(partial(self._shard.publish_receipt, command, result, self), "receipt")

    def _leave(self, command: QueuedCommand, result: CommandResult | None) -> None:
        """Takes a command from the queue. `result`: of its final receipt; None: it has none.

        Stores nothing. The record without the command goes along with the next write: for the next send, after the
        user's next message (`Shard.store_soon`), or by `Shard.evict_idle`. A new owner that finds the command in the
        stored record finds its receipt, too.
        """
        is_first = self.queue[0] is command
        self.queue.remove(command)
        is_refused = result is None or result.outcome == "refused" or bool(result.repeat_of)
        self.record = sending.with_ended(self.record, command.ref, is_refused=is_refused)
        if is_first:
            self._begin_head()

    def _begin_head(self) -> None:
        """Forgets what concerned the former head."""
        self._content, self._content_of, self._refusal = None, _NOTHING, None
        self._failures = self._rejections = 0
        self._has_looked = False

    # the record -------------------------------------------------------------------------------------

    def _save(self) -> Awaitable[None]:
        return self._persist(self.save, "record")

    async def save(self) -> None:
        """Stores the record. Raises Temporary, LeaseLost; StaleRead, after which it has to be read again."""
        shard, store = self._shard, self._shard.deps.store
        while True:
            shard.tenure.check()
            written, self._written = self._written, self.record
            record = self.record
            try:
                self._revision = await store.save(self.sandbox, self.user, record, self._revision)
            except Conflict:
                shard.tenure.check()
                had_record = bool(self._revision)
                stored, self._revision = await store.load(self.sandbox, self.user)
                shard.tenure.check()  # the read may be slow, and the record that of a new owner
                if had_record and stored == ConversationRecord():
                    # the person was erased meanwhile: nothing comes back from memory
                    self.record = self._stored = ConversationRecord(unserved=self.bot is None)
                    return
                if stored != written:
                    self._forget_reads()
                    raise StaleRead("stale_read", "the record is newer than what was read of it") from None
            else:
                self._stored = record
                return

    def _forget_reads(self) -> None:
        """Forgets what was read: a server that had lost its leadership may have answered. No request was made by it,
        since each is stored first. What came meanwhile is in the inbox."""
        self.is_loaded, self.bot = False, None
        self._begin_head()
        for command in self.queue:
            command.is_checked = False
        self._shard.forget_reads(self.sandbox)

    def _persist(self, work: Callable[[], Awaitable[T]], name: str) -> Awaitable[T]:
        """Raises LeaseLost, Crashed, RecordTooNew, StaleRead."""
        return persist(work, self._shard.tenure, self._shard.deps.clock, name, sandbox=self.sandbox)


def _crashed(command: QueuedCommand, detail: str) -> CommandResult:
    """How a command ends at which the code raises. What is not known to be new may have been sent."""
    if not command.is_checked:
        return CommandResult("uncertain", detail=detail)
    return CommandResult("dead_lettered", "crashed", detail)
