"""Work of a conversation that takes time: at most one request to sendmessage, and at most one wait for another
input."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeAlias

import msgspec
import structlog

from adapter.conversation import rules
from adapter.conversation.memory import ConversationMemory
from adapter.conversation.rules import CommandResult
from adapter.conversation.shard import ConversationDeps, ShardPort
from adapter.conversation.uploads import StoreAway
from adapter.errors import AdapterError, LeaseLost, Refused, SessionExpired, Temporary, Throttled, Uncertain
from adapter.kit.crashes import ATTEMPTS
from adapter.kit.tasks import TaskSet
from adapter.kit.timing import LEASE_RETRY_S, Clock, backoff

log = structlog.get_logger()

WorkEffect: TypeAlias = rules.Post | rules.RequestSlot | rules.Load | rules.Upload | rules.CheckSession
"""Effects that take time; their result is an input."""


async def repeat_until_done(
    name: str, work: Callable[[], Awaitable[None]], sandbox: str, shard: ShardPort, clock: Clock
) -> Exception | None:
    """Retries until the work succeeds. Returns the exception of a bug that raises in every attempt."""
    crashes = failures = 0
    while True:
        try:
            await work()
        except LeaseLost:  # a paused lease may come back; if it is lost, the shard stops the actor
            await shard.wait_owned()
            await clock.sleep(LEASE_RETRY_S)
        except AdapterError as exc:
            failures += 1
            log.warning("conversation.retrying", sandbox=sandbox, work=name, reason=exc.reason)
            await clock.sleep(backoff(failures, first_s=0.2, longest_s=5.0))
        except Exception as exc:
            crashes += 1
            log.exception("conversation.crashed", sandbox=sandbox, work=name, crashes=crashes)
            if crashes == ATTEMPTS:
                return exc
            await clock.sleep(backoff(crashes, first_s=0.5))
        else:
            return None


class Put(Protocol):
    """Queues an input in the mailbox."""

    def __call__(self, event: rules.Input, *, is_wanted: Callable[[], bool] | None = None) -> None:
        """`is_wanted`: checked when the input's turn comes; None: always wanted."""


class OutstandingWork:
    """Runs effects in the background and puts their results into the mailbox."""

    def __init__(
        self,
        memory: ConversationMemory,
        shard: ShardPort,
        deps: ConversationDeps,
        put: Put,
    ) -> None:
        self._memory = memory
        self._shard = shard
        self._deps = deps
        self._put = put
        self._request = TaskSet(report_crash)
        """At most one request to sendmessage."""
        self._wait = TaskSet(report_crash)
        """At most one upload, read of bodies, wait for a slot or probe of the session. A new one cancels the one
        before."""
        self._wait_number = 0
        """Number of the current wait; results of earlier ones are dropped."""
        self._draining = False
        self._slots_held = 0
        """Slots granted and not released."""

    @property
    def tasks(self) -> int:
        return len(self._wait) + len(self._request)

    def cancel_wait(self) -> None:
        """Cancels the wait, whose result is not wanted any more."""
        self._wait.cancel_all()
        self._wait_number += 1

    def cancel(self) -> None:
        self._wait.cancel_all()
        self._request.cancel_all()
        while self._slots_held:
            self.release_slot()

    def release_slot(self) -> None:
        if self._slots_held:
            self._slots_held -= 1
            self._deps.slots.release(self._memory.state.sandbox)

    async def drain(self, grace_s: float) -> None:
        """Starts nothing more, and gives the current request `grace_s` seconds."""
        self._draining = True
        self._wait.cancel_all()
        await self._request.wait_ended(grace_s)

    def start(self, effect: WorkEffect) -> None:
        match effect:
            case rules.Post() if self._draining:
                self.release_slot()
                self._put(rules.NotTaken("", 0, is_unreached=True))
            case rules.Post():
                self._request.spawn(self._post(effect))
            case rules.RequestSlot():
                if self.try_acquire_slot():
                    self._put(rules.SlotGranted())
                else:
                    self._spawn_wait(effect, self._await_slot)
            case rules.Load(sequences):
                self._spawn_wait(effect, lambda: self._load(sequences))
            case rules.Upload():
                self._spawn_wait(effect, lambda: self._upload(effect))
            case rules.CheckSession():
                self._spawn_wait(effect, self._check_session)

    def _spawn_wait(self, effect: WorkEffect, work: Callable[[], Awaitable[None]]) -> None:
        async def run() -> None:
            if (
                crash := await repeat_until_done(
                    type(effect).__name__, work, self._memory.state.sandbox, self._shard, self._deps.clock
                )
            ) is not None:
                self._put_if_awaited(rules.Crashed(type(crash).__name__))

        self.cancel_wait()
        if not self._draining:
            self._wait.spawn(run())

    def _put_if_awaited(self, event: rules.Input) -> None:
        """Queues a result unless another wait has begun when its turn comes."""
        number = self._wait_number
        self._put(event, is_wanted=lambda: number == self._wait_number)

    def try_acquire_slot(self) -> bool:
        """Takes a slot if there is one at once."""
        if self._draining:
            return False
        is_free = self._deps.slots.try_acquire(self._memory.state.sandbox)
        self._slots_held += is_free
        return is_free

    async def _await_slot(self) -> None:
        await self._deps.slots.acquire(self._memory.state.sandbox)
        self._slots_held += 1
        if self._draining:
            self.release_slot()
        else:
            self._put(rules.SlotGranted())

    async def _load(self, sequences: Sequence[int]) -> None:
        self._put_if_awaited(rules.Loaded(await self._shard.load_bodies(self._memory.state.sandbox, sequences)))

    async def _check_session(self) -> None:
        self._put_if_awaited(rules.SessionChecked(await self._shard.is_session_alive(self._memory.serving_bot)))

    async def _upload(self, upload: rules.Upload) -> None:
        """Uploads media. Raises unexpected errors."""
        try:
            sandbox, user = self._memory.state.sandbox, self._memory.state.user
            account = self._shard.account_of(sandbox, self._memory.serving_bot)
            content = await self._deps.uploads.upload_media(upload.media, account, sandbox, user)
        except StoreAway:
            raise
        except AdapterError as exc:
            self._put_if_awaited(_as_answer(exc, self._memory, self._deps, "media"))
        else:
            self._put_if_awaited(rules.UploadDone(content))

    async def _post(self, post: rules.Post) -> None:
        """Makes the request and releases its slot."""
        state = self._memory.state
        answer: rules.Answer = rules.Unanswered()
        try:
            accepted = await self._deps.chat.send(
                self._shard.account_of(state.sandbox, self._memory.serving_bot),
                user=state.user,
                client_id=post.client_id,
                context_token=state.record.token,
                content=post.content,
                check=self._shard.ensure_owner,
            )
            answer = rules.Accepted(accepted.message_id, accepted.ret, accepted.errcode, accepted.errmsg)
        except AdapterError as exc:
            answer = _as_answer(exc, self._memory, self._deps)
        except Exception:  # a bug: the request may have been sent
            log.exception("send.crashed", bot=self._memory.serving_bot, sandbox=state.sandbox)
        finally:
            self.release_slot()
        self._put(answer)


def _as_answer(
    exc: AdapterError, memory: ConversationMemory, deps: ConversationDeps, reason: str = ""
) -> rules.Answer:
    """The input for a failed request or upload. `reason`: replaces the reason of a refusal."""
    bot, state, progress = memory.serving_bot, memory.state, memory.state.record.head
    answer = {"ret": exc.ret, "errcode": exc.errcode, "errmsg": exc.errmsg} if isinstance(exc, Refused) else {}
    commands = [command.id for command in progress.commands] if progress else []
    log.info(
        "send.failed",
        bot=bot,
        sandbox=state.sandbox,
        commands=commands,
        failure=type(exc).__name__,
        reason=exc.reason,
        **answer,
    )
    if isinstance(exc, Refused):
        attempts = progress.attempts if progress else 0
        reason = reason or exc.reason
        result = CommandResult("refused", reason, exc.detail, (), attempts, exc.ret, exc.errcode, exc.errmsg)
        match exc:
            case SessionExpired():
                return rules.TokenRejected(msgspec.structs.replace(result, reason="needs_login"))
            case Throttled():
                return rules.Throttled(msgspec.structs.replace(result, reason="throttled"))
            case _:
                return rules.Rejected(result)
    if isinstance(exc, LeaseLost):
        return rules.NotTaken("The lease was lost.", int(LEASE_RETRY_S * 1000), is_unreached=True)
    deps.metrics.outbound_retries.labels(reason=exc.reason).inc()
    if isinstance(exc, Uncertain):
        return rules.Unanswered()
    pause_s = backoff(state.failures + 1)
    if isinstance(exc, Temporary) and exc.retry_after_s:
        pause_s = exc.retry_after_s
    pause_ms = int((pause_s + deps.clock.jitter(pause_s / 4)) * 1000)
    return rules.NotTaken(exc.detail, pause_ms, is_unreached=exc.reason in ("network", "http_4xx"))


def report_crash(exc: BaseException) -> None:
    log.error("task.crashed", task="conversation", exc_info=exc)
