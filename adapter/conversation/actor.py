"""Carries out what `rules.step` decides for one conversation, and feeds what comes of it back.

Everything that a conversation waits for (a message of the user, a binding, a slot, an upload, an answer, time) is an
input in its mailbox. One task works the mailbox off and ends when it is empty. What is out (a request, an upload, a
read-back) has one task of its own, so that a message of the user is stored although a request hangs. The actor is the
only writer of the conversation's record.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple, Protocol

import structlog

from adapter.conversation import rules
from adapter.conversation.commands import Part
from adapter.conversation.rules import Activity, Bot, CommandResult, Conversation, QueuedCommand, SendPolicy
from adapter.conversation.store import ConversationStore
from adapter.conversation.uploads import StoreAway, Uploads
from adapter.crashes import TRIES
from adapter.errors import (
    AdapterError,
    BusRefused,
    Conflict,
    LeaseLost,
    Refused,
    SessionExpired,
    Temporary,
    Throttled,
    Uncertain,
)
from adapter.metrics import Metrics
from adapter.ports import Account, Chat
from adapter.slots import FairSlots
from adapter.tasks import Tasks
from adapter.timing import Clock, Turns, backoff

log = structlog.get_logger()

LONGEST_TIMER_S = 3600.0
"""The clock is looked at again after so long: it may be set, and the machine may sleep."""
SHORTEST_TIMER_S = 0.01
LEASE_PAUSE_S = 0.2
_WAITS = (Activity.LOADING, Activity.UPLOADING, Activity.AWAITING_SLOT, Activity.CHECKING_SESSION)


class Shard(Protocol):
    """What a conversation needs of the shard that it belongs to."""

    def ensure_owner(self) -> None:
        """Raises LeaseLost unless this replica may work for the shard at this moment."""

    async def wait_owned(self) -> None:
        """Returns when it may again, or after some seconds."""

    def bot_of(self, sandbox: str, user: str, bot: str) -> Bot | None:
        """The bot that serves the user now; `bot`: the one that did last."""

    def account_of(self, sandbox: str, bot: str) -> Account:
        """How a bot of the sandbox is called. Raises Refused."""

    async def is_session_alive(self, bot: str) -> bool:
        """Whether iLink takes the bot's token elsewhere, although it said -14 to a send. Raises Temporary."""

    async def load_bodies(self, sandbox: str, sequences: Sequence[int]) -> dict[int, list[Part] | None]:
        """Parts of commands, read back from the bus; None: it has the command no more. Raises Temporary."""

    async def publish_receipt(self, command: QueuedCommand, result: CommandResult, state: Conversation) -> None:
        """Raises Temporary, LeaseLost."""

    async def acknowledge(self, command: QueuedCommand, *, is_duplicate: bool = False) -> None:
        """The command has ended."""

    def release_body(self, command: QueuedCommand) -> None:
        """Its body is not held in memory any more."""

    def set_typing(self, state: Conversation, command: QueuedCommand | None, *, is_on: bool) -> None:
        """Shows or hides that the bot types."""

    def announce(self, state: Conversation, effect: rules.Announce) -> None:
        """Publishes a window event, in the background."""


class ConversationDeps(NamedTuple):
    """What every conversation of a replica needs."""

    store: ConversationStore
    chat: Chat
    uploads: Uploads
    slots: FairSlots
    policy: SendPolicy
    clock: Clock
    metrics: Metrics
    turns: Turns


class ConversationActor:
    """One conversation at work."""

    def __init__(self, conversation: Conversation, revision: int, shard: Shard, deps: ConversationDeps) -> None:
        self.state = conversation
        self._revision = revision
        self._stored = conversation.record
        self._shard = shard
        self._deps = deps
        self._mailbox: deque[tuple[rules.Input, asyncio.Future[None] | None]] = deque()
        self._task: asyncio.Task[None] | None = None
        self._request = Tasks(_report)
        """At most one: a request to sendmessage."""
        self._wait = Tasks(_report)
        """At most one: an upload, a read-back, a wait for a slot, a question whether the session is alive."""
        self._timer: asyncio.TimerHandle | None = None
        self._draining = False
        self._stopped = False
        self._unreceipted: set[int] = set()
        """Sequences of commands whose receipts could not even be made: they are not acknowledged."""

    # what others say --------------------------------------------------------------------------------

    def put(self, event: rules.Input, done: asyncio.Future[None] | None = None) -> None:
        """Queues an input. `done` is set once what follows from it has happened, but for what is out then."""
        if self._stopped:
            _fail(done, self.state.sandbox)
            return
        self._mailbox.append((event, done))
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def hear(self, heard: rules.Heard) -> None:
        """The user wrote: returns once the record is stored. Raises LeaseLost, and what the rules raise of it."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.put(heard, done)
        await done

    def refresh_bot(self) -> None:
        """Looks which bot serves the user now."""
        state = self.state
        self.put(rules.Bound(self._shard.bot_of(state.sandbox, state.user, state.record.bot)))

    async def adopt_stored(self) -> None:
        """Reads the record anew: a poller that ends at another replica may have heard the user. Raises Temporary."""
        record, revision = await self._deps.store.load(self.state.sandbox, self.state.user)
        if revision > self._revision:
            self._revision = revision
            self.state = rules.adopt_inbound(self.state, record)
        self.put(rules.Deadline())

    def take_queue(self) -> tuple[QueuedCommand, ...]:
        """Ends the conversation and hands over its commands, in order."""
        mailed = [one for event, _ in self._mailbox if isinstance(event, rules.Stored) for one in event.commands]
        self.stop()
        return (*self.state.queue, *mailed)

    @property
    def is_idle(self) -> bool:
        """Nothing waits, nothing is out, no event is due: it can be let go, and read back when it is needed."""
        return not (self.tasks or self._mailbox or self.state.queue or self._timer or self.is_dirty)

    @property
    def is_dirty(self) -> bool:
        """The record was not stored as it is known here."""
        return self.state.record != self._stored

    @property
    def tasks(self) -> int:
        """How many work for it."""
        return len(self._wait) + len(self._request) + (self._task is not None)

    async def drain(self, grace_s: float) -> None:
        """Starts no request any more; one that is out gets `grace_s` seconds. Then the record is stored."""
        self._draining = True
        self._wait.cancel()
        await self._request.ended(grace_s)
        if self._task is not None:  # the answer is worked off, its receipt published
            await asyncio.wait([self._task], timeout=grace_s)
        if self._revision and self.is_dirty and not self._stopped:
            try:
                await self._save()
            except (Temporary, LeaseLost, BusRefused) as exc:
                log.warning("conversation.not_stored", sandbox=self.state.sandbox, reason=exc.reason)
        self.stop()

    def stop(self) -> None:
        """The shard is lost, or given away: everything ends now."""
        self._stopped = True
        self._set_timer(math.inf)
        self._wait.cancel()
        self._request.cancel()
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
        for _, done in self._mailbox:
            _fail(done, self.state.sandbox)
        self._mailbox.clear()

    # the mailbox ------------------------------------------------------------------------------------

    async def _run(self) -> None:
        done: asyncio.Future[None] | None = None
        try:
            while self._mailbox:
                await self._deps.turns.next()
                event, done = self._mailbox.popleft()
                try:
                    await self._handle(event)
                except Exception as exc:  # what is behind in the mailbox goes on
                    log.exception("conversation.crashed", sandbox=self.state.sandbox, input=type(event).__name__)
                    if done is not None and not done.done():
                        done.set_exception(exc)
                if done is not None and not done.done():
                    done.set_result(None)
        finally:
            self._task = None
            _fail(done, self.state.sandbox)
        if not self._stopped:
            now_ms = self._deps.clock.now_ms()
            self._set_timer(rules.next_deadline_ms(self.state, now_ms, self._deps.policy) - now_ms)

    def _set_timer(self, in_ms: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if in_ms < math.inf:
            seconds = min(LONGEST_TIMER_S, max(SHORTEST_TIMER_S, in_ms / 1000))
            self._timer = asyncio.get_running_loop().call_later(seconds, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.refresh_bot()
        self.put(rules.Deadline())

    async def _handle(self, event: rules.Input) -> None:
        """One step. An input that makes the rules raise ends the commands that it is about as dead letters."""
        try:
            await self._step(event)
        except Exception as exc:
            log.exception("conversation.crashed", sandbox=self.state.sandbox, input=type(event).__name__)
            if isinstance(event, rules.Stored):  # they are in no queue yet
                for command in event.commands:
                    await self._end_crashed(command, exc)
            else:
                await self._step(rules.Crashed(type(exc).__name__))
                if isinstance(event, rules.Heard):  # its sender counts on it that it is stored
                    await self._step(event)

    async def _step(self, event: rules.Input) -> None:
        now_ms = self._deps.clock.now_ms()
        self.state, effects = rules.step(self.state, event, now_ms, self._deps.policy)
        if self.state.activity not in _WAITS:
            self._wait.cancel()
        for effect in effects:
            if (crash := await self._carry_out(effect)) is None:
                continue
            if not isinstance(effect, rules.Save):
                await self._give_up(effect, crash)
            elif any(isinstance(one, rules.Post) for one in effects):
                self._deps.slots.release(self.state.sandbox)
                self.put(rules.NotTaken("", 0, is_unreached=True))
                self.put(rules.Crashed(type(crash).__name__))
                return  # a request must not leave that is not stored

    async def _give_up(self, effect: rules.Effect, crash: Exception) -> None:
        """What a bug keeps from being done: the command that it was for ends as a dead letter."""
        match effect:
            case rules.PublishReceipt(command, result):
                if result.outcome == "parked":  # it is in the queue yet
                    self.put(rules.Crashed(type(crash).__name__, command.sequence))
                    return
                if result.reason != "crashed":
                    await self._end_crashed(command, crash, result)
                self._unreceipted.add(command.sequence)  # ended just now, or not at all
                self._shard.release_body(command)  # those behind it need its share of the memory
            case rules.SetTyping(rules.QueuedCommand() as command):  # it is in the queue no more
                await self._end_crashed(command, crash)
            case rules.RequestSlot() | rules.Load() | rules.Upload() | rules.CheckSession() | rules.Post():
                self.put(rules.Crashed(type(crash).__name__))
            case _:
                pass  # the first command of the queue does not wait for it

    async def _end_crashed(self, command: QueuedCommand, crash: Exception, told: CommandResult | None = None) -> None:
        """`told`: what could not be told of it. What may be on the phone is not called dead."""
        result = CommandResult("dead_lettered", "crashed", type(crash).__name__)
        if told is not None and told.may_be_sent:
            result = CommandResult(told.outcome, message_ids=told.message_ids, attempts=told.attempts)
        if await self._carry_out(rules.PublishReceipt(command, result)) is None:
            await self._carry_out(rules.Acknowledge(command))

    # effects ----------------------------------------------------------------------------------------

    async def _carry_out(self, effect: rules.Effect) -> Exception | None:
        """None once it is done; what it raised several times, if that is a bug."""
        return await self._retry(type(effect).__name__, lambda: self._perform(effect))

    async def _retry(self, what: str, work: Callable[[], Awaitable[None]]) -> Exception | None:
        """Tries until it is done. What raises what nobody expects is tried a few times, and then returned."""
        crashes = failures = 0
        while True:
            try:
                await work()
            except LeaseLost:  # paused: it may come back; lost: somebody stops us
                await self._shard.wait_owned()
                await self._deps.clock.sleep(LEASE_PAUSE_S)
            except AdapterError as exc:
                failures += 1
                log.warning("conversation.retrying", sandbox=self.state.sandbox, work=what, reason=exc.reason)
                await self._deps.clock.sleep(backoff(failures, first_s=0.2, longest_s=5.0))
            except Exception as exc:
                crashes += 1
                log.exception("conversation.crashed", sandbox=self.state.sandbox, work=what, crashes=crashes)
                if crashes == TRIES:
                    return exc
                await self._deps.clock.sleep(backoff(crashes, first_s=0.5))
            else:
                return None

    async def _perform(self, effect: rules.Effect) -> None:
        """Raises Temporary, LeaseLost, BusRefused."""
        shard, state = self._shard, self.state
        match effect:
            case rules.Save():
                await self._save()
            case rules.Post() if self._draining:
                self._deps.slots.release(state.sandbox)
                self.put(rules.NotTaken("", 0, is_unreached=True))
            case rules.Post():
                self._request.spawn(self._post(effect))
            case rules.PublishReceipt(command, result):
                if not result.is_sent:
                    shard.ensure_owner()  # only the owner may say so: the next one may have more luck
                await shard.publish_receipt(command, result, state)
            case rules.Acknowledge(command, is_duplicate):
                if command.sequence not in self._unreceipted:
                    await shard.acknowledge(command, is_duplicate=is_duplicate)
            case rules.RequestSlot():
                if self._deps.slots.try_acquire(state.sandbox):
                    self._grant_slot()
                else:
                    self._spawn_wait("RequestSlot", self._await_slot)
            case rules.ReleaseSlot():
                self._deps.slots.release(state.sandbox)
            case rules.Load(sequences):
                self._spawn_wait("Load", lambda: self._load(sequences))
            case rules.Upload():
                self._spawn_wait("Upload", lambda: self._upload(effect))
            case rules.CheckSession():
                self._spawn_wait("CheckSession", self._check_session)
            case rules.ReleaseBody(command):
                shard.release_body(command)
            case rules.SetTyping(typed, is_on):
                shard.set_typing(state, typed, is_on=is_on)
            case rules.Announce():
                shard.announce(state, effect)

    async def _save(self) -> None:
        """Stores the record. Raises Temporary, LeaseLost."""
        store, state = self._deps.store, self.state
        while True:
            self._shard.ensure_owner()
            record = self.state.record
            try:
                self._revision = await store.save(state.sandbox, state.user, record, self._revision)
            except Conflict:
                self._shard.ensure_owner()
                stored, self._revision = await store.load(state.sandbox, state.user)
                self._shard.ensure_owner()  # the answer may be late, and the record that of an owner after us
                self.state = rules.adopt_inbound(self.state, stored)
            else:
                self._stored = record
                return

    # what is out ------------------------------------------------------------------------------------

    def _spawn_wait(self, what: str, work: Callable[[], Awaitable[None]]) -> None:
        async def run() -> None:
            if (crash := await self._retry(what, work)) is not None:
                self.put(rules.Crashed(type(crash).__name__))

        if not self._draining:
            self._wait.spawn(run())

    def _grant_slot(self) -> None:
        if self._draining:
            self._deps.slots.release(self.state.sandbox)
        else:
            self.put(rules.SlotGranted())

    async def _await_slot(self) -> None:
        await self._deps.slots.acquire(self.state.sandbox)
        self._grant_slot()

    async def _load(self, sequences: Sequence[int]) -> None:
        self.put(rules.Loaded(await self._shard.load_bodies(self.state.sandbox, sequences)))

    async def _check_session(self) -> None:
        self.put(rules.SessionChecked(await self._shard.is_session_alive(self.state.record.bot)))

    async def _upload(self, upload: rules.Upload) -> None:
        """Raises what nobody expects."""
        try:
            account = self._shard.account_of(self.state.sandbox, self._bot)
            sandbox, user = self.state.sandbox, self.state.user
            content = await self._deps.uploads.bring(upload.client_id, upload.media, account, sandbox, user)
        except StoreAway:
            raise
        except AdapterError as exc:
            self.put(self._as_answer(exc, "media"))
        else:
            self.put(rules.UploadDone(content))

    async def _post(self, post: rules.Post) -> None:
        """Makes the request, and gives its slot back."""
        state = self.state
        answer: rules.Answer = rules.Unanswered()
        try:
            accepted = await self._deps.chat.send(
                self._shard.account_of(state.sandbox, self._bot),
                user=state.user,
                client_id=post.client_id,
                context_token=state.record.token,
                content=post.content,
                check=self._shard.ensure_owner,
            )
            answer = rules.Accepted(accepted.message_id, accepted.ret, accepted.errcode, accepted.errmsg)
        except AdapterError as exc:
            answer = self._as_answer(exc)
        except Exception:  # a bug: it may have left
            log.exception("send.crashed", bot=self._bot, sandbox=state.sandbox)
        finally:
            self._deps.slots.release(state.sandbox)
        self.put(answer)

    @property
    def _bot(self) -> str:
        return self.state.bot.id if self.state.bot else self.state.record.bot

    def _as_answer(self, exc: AdapterError, reason: str = "") -> rules.Answer:
        """What a failed request, or upload, is to the rules. `reason`: of a refusal."""
        bot, progress = self._bot, self.state.record.head
        said = {"ret": exc.ret, "errcode": exc.errcode, "errmsg": exc.errmsg} if isinstance(exc, Refused) else {}
        failure = type(exc).__name__
        log.info("send.failed", bot=bot, sandbox=self.state.sandbox, failure=failure, reason=exc.reason, **said)
        if isinstance(exc, Refused):
            attempts = progress.attempts if progress else 0
            reason = reason or exc.reason
            result = CommandResult("refused", reason, exc.detail, (), attempts, exc.ret, exc.errcode, exc.errmsg)
            match exc:
                case SessionExpired():
                    return rules.TokenRejected(result._replace(reason="needs_login"))
                case Throttled():
                    return rules.Throttled(result._replace(reason="throttled"))
                case _:
                    return rules.Rejected(result)
        if isinstance(exc, LeaseLost):
            return rules.NotTaken("The lease was lost.", int(LEASE_PAUSE_S * 1000), is_unreached=True)
        self._deps.metrics.outbound_retries.labels(reason=exc.reason).inc()
        if isinstance(exc, Uncertain):
            return rules.Unanswered()
        pause_s = backoff(self.state.failures + 1)
        if isinstance(exc, Temporary) and exc.retry_after_s:
            pause_s = exc.retry_after_s
        pause_ms = int((pause_s + self._deps.clock.jitter(pause_s / 4)) * 1000)
        return rules.NotTaken(exc.detail, pause_ms, is_unreached=exc.reason == "network")


def _fail(done: asyncio.Future[None] | None, sandbox: str) -> None:
    if done is not None and not done.done():
        done.set_exception(LeaseLost("shard_lost", sandbox))


def _report(exc: BaseException) -> None:
    log.error("task.crashed", task="conversation", exc_info=exc)
