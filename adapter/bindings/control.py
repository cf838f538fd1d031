"""Control commands (bind, unbind, erase): changes bindings, publishes events, answers. Never calls the supervisor.

One consumer on WECHAT_CTL, owned with shard 0. Commands for the same sandbox or bot take effect in the order in which
they were stored. Other commands are processed concurrently.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from itertools import takewhile
from typing import Protocol, TypeAlias

import msgspec
import structlog
from msgspec import structs

from adapter.bindings.registry import Bindings
from adapter.bindings.token_checks import TokenChecks, Verdict
from adapter.contract import messages as contract
from adapter.contract.messages import Bind, BindingChange, BindingEvent, ControlAnswer, Erase, Unbind
from adapter.contract.names import (
    H_ERROR,
    H_ERROR_CODE,
    H_MSG_ID,
    H_REPLY_TO,
    H_SCHEMA,
    check_sandbox,
    is_inbox,
    is_sandbox,
)
from adapter.contract.records import Binding
from adapter.errors import (
    UNDECODABLE,
    AdapterError,
    LeaseLost,
    Refused,
    Temporary,
    Unreadable,
)
from adapter.kit.tasks import TaskSet
from adapter.kit.timing import Clock, backoff
from adapter.observability.events import PERSON_CHANGES, BusAccess, last_person_change, read_binding_events
from adapter.observability.metrics import Metrics
from adapter.ports import Chat, CoreBus, Delivery
from adapter.security.seal import Sealer, bind_context, cursor_context

log = structlog.get_logger()

MAX_BYTES = 262_144
"""Largest command; a larger one becomes a dead letter. A bind may have the longest cursor that a poll returns."""
MAX_BUGS = 5
"""Crashes on a command after which it becomes a dead letter."""
DELETE_ATTEMPTS = 5
BOT_SUFFIX, USER_SUFFIX = "@im.bot", "@im.wechat"
MAX_BATCH = 512
"""Commands in one batch. Commands for different sandboxes and bots are processed concurrently."""
SETTLED_KEPT = 1000
"""Sequences of completed commands that are remembered in case of a redelivery."""
READ_KEPT = 1000
"""Sandboxes whose bots are known to be complete. The bots of other sandboxes are read again."""
_BIND, _UNBIND, _ERASE = msgspec.json.Decoder(Bind), msgspec.json.Decoder(Unbind), msgspec.json.Decoder(Erase)

ControlCommand: TypeAlias = Bind | Unbind | Erase


class Eraser(Protocol):
    """Erases persons."""

    async def run(self, command: Erase, unbound: Collection[str], turn: asyncio.Lock) -> ControlAnswer:
        """Erases a person whose bots `unbound` are unbound. Holds `turn` while no command may be processed. Raises
        Temporary, BusRefused."""

    async def wait_released(self, bots: Collection[str]) -> None:
        """Returns once all received messages of unbound bots are in their inboxes, or after a timeout. Raises
        Temporary."""


class Control:
    """Applies bind, unbind and erase."""

    def __init__(
        self,
        *,
        access: BusAccess,
        bindings: Bindings,
        chat: Chat,
        sealer: Sealer,
        core: CoreBus,
        check: Callable[[], None],
        wait_complete: Callable[[], Awaitable[object]],
        eraser: Eraser,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self._bindings = bindings
        self._events = access.events
        self._chat = chat
        self._sealer = sealer
        self._core = core
        self._history = access.history
        self._names = access.names
        self._ensure_owner = check
        """Raises LeaseLost unless this replica may process commands now. A replica that was stopped or cut off may
        have commands in flight that another has processed since, together with later ones."""
        self._wait_bucket_complete = wait_complete
        """Returns when the bucket of bindings is complete; a write before that would be overwritten by its
        restore."""
        self._eraser = eraser
        self._tasks = TaskSet(_report)
        self._turn = asyncio.Lock()
        """Held while commands are processed."""
        self._clock = clock
        self._metrics = metrics
        self._waiting: list[int] = []
        """Sequences of commands that wait, in the order in which they were stored."""
        self._changed = asyncio.Event()
        """Set when a command or iLink's answer about a token arrives."""
        self._checks = TokenChecks(chat, sealer)
        self._queue: dict[int, Delivery] = {}
        """The newest delivery of each queued command, whose acknowledgement counts."""
        self._settled_sequences: deque[int] = deque(maxlen=SETTLED_KEPT)
        self._can_delete = True
        """Whether the last bind could be erased."""
        self._recently_read: dict[str, BindingEvent | None] = {}
        """Sandboxes whose bots this replica has read as owner, with the last event that bound or unbound a person."""

    def enqueue(self, delivery: Delivery) -> None:
        """Queues a command once. It is redelivered after each connect until its acknowledgement arrives."""
        if delivery.seq not in self._queue:
            self._waiting.append(delivery.seq)
            self._changed.set()
        self._queue[delivery.seq] = delivery

    async def run(self) -> None:
        """Processes commands in batches until cancelled. The next owner gets the remaining commands."""
        self._recently_read.clear()
        try:
            while True:
                await self._changed.wait()
                self._changed.clear()
                while chains := await self._next_chains():
                    async with self._turn, asyncio.TaskGroup() as group:
                        for numbers in chains:
                            group.create_task(self._process_in_order(numbers))
        finally:
            self._tasks.cancel_all()
            self._checks.forget_all()
            self._waiting.clear()
            self._queue.clear()

    async def _next_chains(self) -> list[list[int]]:
        """Takes commands that can run now. Chains run concurrently, and the commands of a chain in sequence. A bind
        whose token check is pending waits, and so do later commands for the same sandbox or bot."""
        batch = self._waiting[:MAX_BATCH]
        if not batch:
            return []
        if len(self._recently_read) >= READ_KEPT:
            self._recently_read.clear()
        seen = {n for n in batch if self._checks.is_known(n)}
        pending = {n for n in batch if self._checks.is_pending(n, self._peek(n), self._changed.set)}
        keys = await self._read_keys(batch, [n for n in batch if n not in pending & seen])
        chains = [[*takewhile(lambda n: n not in pending, numbers)] for numbers in independent(keys)]
        chosen = {number for numbers in chains for number in numbers}
        self._waiting = [number for number in self._waiting if number not in chosen]
        return [numbers for numbers in chains if numbers]

    async def _read_keys(self, batch: Collection[int], unread: Collection[int]) -> dict[int, set[str]]:
        """The sandboxes and bots that each command of a batch touches. Reads those of `unread` first."""
        failures = 0
        while True:
            try:
                await self._refresh(unread)
                keys = {number: self._keys_of(number) for number in batch}
                if any(isinstance(self._peek(number), Erase) for number in batch):
                    return {number: {"erase"} for number in batch}  # an erasure may touch any bot
                return keys
            except Temporary as exc:
                log.warning("control.retrying", reason=exc.reason)
            failures += 1
            await self._clock.sleep(backoff(failures, first_s=0.2, longest_s=5.0))

    def _keys_of(self, number: int) -> set[str]:
        command = self._peek(number)
        if command is None or isinstance(command, Erase):
            return {"unreadable"}
        bound = self._bindings.get(command.bot) if command.bot else None
        sandboxes = {command.sandbox} | ({bound.sandbox} if bound is not None else set())
        return {f"sandbox {sandbox}" for sandbox in sandboxes} | ({f"bot {command.bot}"} if command.bot else set())

    def _peek(self, number: int) -> ControlCommand | None:
        """A queued command, or None if it is unreadable."""
        try:
            return self._decode(self._queue[number])
        except Unreadable:
            return None

    def _decode(self, delivery: Delivery) -> ControlCommand:
        """Raises Unreadable."""
        if len(delivery.data) > MAX_BYTES:
            raise Unreadable("too_large", f"At most {MAX_BYTES} bytes are read.")
        try:
            match delivery.subject.rpartition(".")[2]:
                case "bind":
                    command: ControlCommand = _BIND.decode(delivery.data)
                case "unbind":
                    command = _UNBIND.decode(delivery.data)
                case _:
                    command = _ERASE.decode(delivery.data)
        except UNDECODABLE as exc:
            raise Unreadable("unreadable", str(exc)[:200]) from exc
        return structs.replace(command, id=command.id or delivery.headers.get(H_MSG_ID, "")[:128] or None)

    async def _process_in_order(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            if number not in self._settled_sequences:  # processed again, an old bind would undo a later unbind
                await self._wait_bucket_complete()
                await self._process(number)
            await self._secure_delete(self._queue[number])
            self._settled_sequences.append(number)
            self._checks.forget(number)
            await self._queue.pop(number).ack()

    async def _process(self, number: int) -> None:
        """Processes one command. Waits while the bus is away. A command that keeps crashing becomes a dead letter."""
        failures = bugs = 0
        while True:
            delivery = self._queue[number]
            try:
                if failures:  # the data read for the batch may be outdated
                    await self._refresh([number])
                self._ensure_owner()
                if bugs < MAX_BUGS:
                    await self._apply_and_answer(delivery)
                else:
                    await self._dead_letter(delivery, Unreadable("unreadable", "The adapter fails on this command."))
            except (Temporary, LeaseLost) as exc:
                log.warning("control.retrying", reason=exc.reason)
            except Exception:
                bugs += 1
                log.exception("control.crashed", sequence=number, bugs=bugs)
            else:
                return
            failures += 1
            await self._clock.sleep(backoff(failures, first_s=0.2, longest_s=5.0))

    async def _apply_and_answer(self, delivery: Delivery) -> None:
        """Applies and answers a command. Raises Temporary, LeaseLost."""
        try:
            command = self._decode(delivery)
        except Unreadable as exc:
            self._metrics.schema_violations.labels(kind="ctl").inc()
            await self._dead_letter(delivery, exc)
            return
        if isinstance(command, Erase):
            await self.begin_erase(command, delivery)
            return
        work = self.bind(command, delivery.seq) if isinstance(command, Bind) else self.unbind(command)
        await self._send_answer(delivery, await self._answer_or_refuse(work, command))

    async def _secure_delete(self, delivery: Delivery) -> None:
        """Erases a bind or an erase command from the server's disk, where an acknowledgement alone would leave it: a
        bind holds a token, and an erase command names the person to forget.

        Waits for a stream without a leader. Other failures may mean a missing permission, so after a bind that could
        not be erased each later one gets only one attempt, and the commands behind it do not wait.
        """
        if delivery.subject == self._names.unbind:
            return
        tries = DELETE_ATTEMPTS if self._can_delete else 1
        for failures in range(1, tries + 1):
            try:
                await self._history.delete(self._names.stream_ctl, delivery.seq, erase=True)
            except Temporary as exc:
                self._can_delete, reason = False, exc.reason
            else:
                self._can_delete = True
                return
            if failures < tries:
                await self._clock.sleep(backoff(failures, first_s=0.2))
        log.warning("control.delete_failed", sequence=delivery.seq, reason=reason)

    async def _dead_letter(self, delivery: Delivery, exc: Unreadable) -> None:
        request = delivery.headers.get(H_MSG_ID, "")[:128]
        is_secret = delivery.subject != self._names.unbind
        await self._events.publish_dead_letter(
            "CTL",
            b"" if is_secret else delivery.data,
            subject=delivery.subject,
            headers={} if is_secret else delivery.headers,
            reason=exc.reason,
            detail=exc.detail,
            seq=delivery.seq,
            msg_id=f"dead:ctl:{delivery.seq}:{delivery.time_ms}",
        )
        await self._send_answer(delivery, ControlAnswer(ok=False, id=request, error=exc.detail))

    async def _answer_or_refuse(self, work: Awaitable[ControlAnswer], command: Bind | Unbind) -> ControlAnswer:
        try:
            return await work
        except Refused as exc:
            event = BindingEvent(
                sandbox=command.sandbox,
                bot=command.bot or "",
                change="refused",
                reason=exc.reason,
                detail=exc.detail,
                request=command.id or "",
            )
            await self._events.publish_binding_event(event, ensure_owner_if_delayed=self._ensure_owner)
            log.warning("binding.refused", sandbox=command.sandbox, bot=command.bot, reason=exc.reason)
            return ControlAnswer(ok=False, id=command.id or "", error=exc.detail)

    async def bind(self, command: Bind, sequence: int = 0) -> ControlAnswer:
        """Binds a bot to a sandbox. Another bot of the same user there is replaced.

        Raises Refused, Temporary, LeaseLost.
        """
        check_sandbox(command.sandbox)
        if command.keep_undelivered and command.options.fresh:
            raise Refused("invalid", "`keep_undelivered` and the option `fresh` exclude each other.")
        token = self._open_token(command)
        if command.base_url:
            self._chat.check_base_url(command.base_url)
        before = self._bindings.get(command.bot)
        bound = self._bindings.of_sandbox(command.sandbox)
        binding = self._new_binding(command, token, before)
        replaced = [b for b in bound if binding.user and b.user == binding.user and b.bot != command.bot]
        is_begun = (
            before is not None
            and bool(command.id)
            and before.request == command.id
            and self._sealer.is_same_secret(before.bot, before.token, token)
        )
        """An earlier run wrote the binding and crashed. A refusal now would leave the command half done."""
        displaced = [*replaced, *([before] if before is not None else [])]
        is_checked = not is_begun and await self._check_token(command, token, displaced, sequence)
        binding = await self._with_start_sequences(binding, bound, keep=command.keep_undelivered)
        if command.options.durable:
            await self._core.make_durable(command.sandbox, binding.in_after)
        new = before is None or not self._is_unchanged(before, binding)
        if before is not None and before.sandbox != command.sandbox:  # first: a later put overwrites it
            replay_after = self._replay_start(before.sandbox, [before])
            await self._publish_binding_event(
                before, "unbound", command.id, reason="moved", replay_after=replay_after
            )
            await self._skip_undelivered(before.sandbox, [before])
        if new:
            await self._bindings.put(binding, self._ensure_owner)
        if new or is_begun:
            # published again in case of a crash before the event: the stream drops a duplicate
            await self._publish_binding_event(binding, "bound", command.id, replay_after=binding.in_after)
        for other in replaced:
            await self._publish_binding_event(
                other, "replaced", command.id
            )  # first, so that a crash in between repeats it
            await self._bindings.remove(other.bot, self._ensure_owner)
        return ControlAnswer(
            ok=True,
            id=command.id or "",
            bindings=[binding.info()],
            replaced=[other.bot for other in replaced],
            moved_from=before.sandbox if before is not None and before.sandbox != command.sandbox else "",
            checked=is_checked,
        )

    async def _check_token(self, command: Bind, token: str, displaced: Collection[Binding], sequence: int) -> bool:
        """Whether iLink accepts the token; False if the token is not checked, or iLink does not answer. Raises
        Refused before anything has changed."""
        is_risky = any(
            known.state == "active"
            and not (known.bot == command.bot and self._sealer.is_same_secret(known.bot, known.token, token))
            for known in displaced
        )
        if command.check is False or not (command.check or is_risky):
            return False
        verdict = await self._checks.verdict(sequence, command)
        if verdict is Verdict.DEAD:
            raise Refused("stale_token", "iLink refuses this token (-14). Existing bindings are unchanged.")
        if verdict is Verdict.SILENT and is_risky:
            raise Refused(
                "unchecked",
                "iLink does not answer about this token, and the bind would replace a working token. Try again later,"
                " or bind without the check.",
            )
        return verdict is Verdict.TAKEN

    def _open_token(self, command: Bind) -> str:
        """The bot's token. A bind from a login has it sealed, for this bot and sandbox.

        Raises Refused, also for a bot or user with an invalid id.
        """
        token = self._sealer.open(bind_context(command.sandbox, command.bot), command.bot_token)
        if any(ord(c) < 33 or ord(c) > 126 for c in command.bot + token + (command.user or "")):
            raise Refused("invalid", "Bot, token and user are printable ASCII without spaces.")
        if command.check is not False:
            check_ids(command.bot, token, command.user or "")
        return token

    def _new_binding(self, command: Bind, token: str, before: Binding | None) -> Binding:
        """The binding that a bind makes of the bot's binding `before`."""
        known = before.user if before is not None and before.sandbox == command.sandbox else ""
        return Binding(
            sandbox=command.sandbox,
            bot=command.bot,
            token=self._sealer.seal(command.bot, token),
            user=command.user or known,
            base_url=(command.base_url or "").rstrip("/"),
            options=command.options,
            since_ms=self._clock.now_ms(),
            request=command.id or "",
            start_cursor=self._sealed_start_cursor(command, before),
        )

    async def _with_start_sequences(self, binding: Binding, bound: list[Binding], *, keep: bool) -> Binding:
        """`binding` with the sequences after which its person's messages and commands begin. If no other bot is
        `bound` to the sandbox, its durable consumer skips the messages of former persons.

        Raises Temporary.
        """
        for known in bound:
            if _is_same_person(known, binding):
                return structs.replace(binding, in_after=known.in_after, out_after=known.out_after)
        if binding.sandbox not in self._recently_read:  # an erasure in the same batch removed it
            await self._read_sandbox(binding.sandbox)
        sandbox, last, names = binding.sandbox, self._recently_read[binding.sandbox], self._names
        is_alone = all(other.bot == binding.bot for other in bound)
        is_again = last is not None and _is_same_person(last, binding)
        in_after = out_after = 0
        if bound or (last is not None and not is_again):
            for subject in (
                names.out_plain,
                names.out_of_sandbox(sandbox),
            ):  # in the router's order
                out_after = max(out_after, await self._last_seq(names.stream_out, subject))
        kept_after = last.replay_after if last is not None else 0
        if is_alone and (keep or is_again) and kept_after is not None:
            in_after = kept_after
        else:
            in_after = await self._last_seq(names.stream_in, names.inbox(sandbox))
            if in_after and is_alone and not keep:
                await self._core.move_durable(sandbox, in_after)
                if binding.options.fresh and not is_again:
                    await self._history.purge(names.stream_in, names.inbox(sandbox), up_to=in_after)
        return structs.replace(binding, in_after=in_after, out_after=out_after)

    def _replay_start(self, sandbox: str, gone: Collection[Binding] = ()) -> int | None:
        """Sequence after which a replay begins once `gone` are unbound; None: no person is bound then."""
        stays = [binding for binding in self._bindings.of_sandbox(sandbox) if binding not in gone]
        return min((binding.in_after for binding in stays), default=None)

    async def _skip_undelivered(self, sandbox: str, gone: Collection[Binding] = ()) -> None:
        """Moves the sandbox's durable consumer past all stored messages if no bot except `gone` is bound.

        Raises Temporary.
        """
        after = await self._last_seq(self._names.stream_in, self._names.inbox(sandbox))
        if after and self._replay_start(sandbox, gone) is None:
            await self._core.move_durable(sandbox, after)

    async def _last_seq(self, stream: str, subject: str) -> int:
        """Raises Temporary."""
        last = await self._history.read_last(stream, subject)
        return last.seq if last is not None else 0

    async def unbind(self, command: Unbind) -> ControlAnswer:
        """Unbinds a bot, or all bots of a sandbox. A missing binding is no error. Raises Refused, Temporary,
        LeaseLost."""
        check_sandbox(command.sandbox)
        bound = [b for b in self._bindings.of_sandbox(command.sandbox) if command.bot in (None, "", b.bot)]
        if command.purge and (command.keep_undelivered or self._replay_start(command.sandbox, bound) is not None):
            raise Refused("invalid", "A purge keeps nothing, and no other bot may stay bound to the sandbox.")
        replay_after = self._replay_start(command.sandbox, [] if command.keep_undelivered else bound)
        for binding in bound:
            await self._publish_binding_event(binding, "unbound", command.id, replay_after=replay_after)
            await self._bindings.remove(binding.bot, self._ensure_owner)
        if not command.keep_undelivered:
            await self._skip_undelivered(command.sandbox)
        if command.purge:
            await self._purge_inbox(command.sandbox)
            self._tasks.spawn(self._purge_late(command.sandbox, [binding.bot for binding in bound]))
        return ControlAnswer(ok=True, id=command.id or "", bindings=[binding.info() for binding in bound])

    async def _purge_inbox(self, sandbox: str) -> None:
        """Deletes the messages of former persons, or all messages if no person is bound. Raises Temporary."""
        names = self._names
        up_to = self._replay_start(sandbox)
        if up_to is None:
            up_to = await self._last_seq(names.stream_in, names.inbox(sandbox))
        if up_to:
            await self._history.purge(names.stream_in, names.inbox(sandbox), up_to=up_to)

    async def _purge_late(self, sandbox: str, bots: Collection[str]) -> None:
        """Purges again, because a message that waits for its media is published after the unbind."""
        try:
            await self._eraser.wait_released(bots)
            async with self._turn:
                await self._purge_inbox(sandbox)
        except AdapterError as exc:
            log.warning("inbox.not_purged", sandbox=sandbox, reason=exc.reason)

    async def begin_erase(self, command: Erase, delivery: Delivery) -> None:
        """Unbinds a person's bots and starts the erasure. Later commands do not wait for it.

        Raises Temporary, LeaseLost.
        """
        bound = [b for b in self._bindings if b.user == command.user and command.sandbox in (None, b.sandbox)]
        for binding in [] if command.dry_run else bound:
            await self.unbind(Unbind(sandbox=binding.sandbox, bot=binding.bot, id=command.id))
            self._recently_read.pop(binding.sandbox, None)  # it contains the person's id

        async def finish() -> None:
            answer, reason = ControlAnswer(ok=False, id=command.id or ""), "handed_over"
            try:
                answer = await self._eraser.run(command, [binding.bot for binding in bound], self._turn)
            except AdapterError as exc:
                reason = exc.reason
            finally:  # also when another replica takes the commands over
                if not answer.ok and not answer.error:
                    log.warning("person.not_erased", reason=reason)
                    answer = structs.replace(answer, error=f"The erasure is not complete ({reason}): erase again.")
                bindings = [binding.info() for binding in bound]
                await self._send_answer(delivery, structs.replace(answer, bindings=bindings))

        self._tasks.spawn(finish())

    async def _refresh(self, numbers: Iterable[int]) -> None:
        """Reads the bots of commands, and each of their sandboxes once: the former owner may have bound bots that
        this replica does not know yet. Raises Temporary."""
        found = (self._peek(number) for number in numbers)
        commands = [command for command in found if isinstance(command, Bind | Unbind)]
        bots = {command.bot for command in commands if command.bot}
        await self._bindings.refresh(*bots)
        before = {binding.sandbox for bot in bots if (binding := self._bindings.get(bot)) is not None}
        sandboxes = (before | {command.sandbox for command in commands}).difference(self._recently_read)
        subjects = {self._names.event(sandbox, "binding"): sandbox for sandbox in sandboxes if is_sandbox(sandbox)}
        last_events = await self._history.read_last_of_each(self._names.stream_event, [*subjects])
        for subject in subjects.keys() - {stored.subject for stored in last_events}:
            self._recently_read[subjects[subject]] = None  # no event: the usual case when many are bound
        for stored in last_events:
            await self._read_sandbox(subjects[stored.subject])

    async def _read_sandbox(self, sandbox: str) -> None:
        """Raises Temporary."""
        events = [event async for _, event in read_binding_events(self._history, self._names, sandbox)]
        known = {binding.bot for binding in self._bindings.of_sandbox(sandbox)}
        await self._bindings.refresh(*{event.bot for event in events if event.change == "bound"} - known)
        self._recently_read[sandbox] = last_person_change(events)

    def _sealed_start_cursor(self, command: Bind, before: Binding | None) -> str | None:
        """The sealed cursor. An unchanged cursor keeps its sealed text, because a cursor is applied only once."""
        context, bound = cursor_context(command.bot), before.start_cursor if before is not None else None
        if not command.cursor:
            return command.cursor
        if bound is not None and self._sealer.is_same_secret(context, bound, command.cursor):
            return bound
        return self._sealer.seal(context, command.cursor)

    def _is_unchanged(self, before: Binding, after: Binding) -> bool:
        """Whether a bind changes nothing, so that the poller continues. A bind after a dead token always counts as
        a change."""
        if before.state != "active" or not self._sealer.is_same_secret(before.bot, before.token, after.token):
            return False
        unimportant = {"token": "", "since_ms": 0, "request": "", "event_pending": False}
        return structs.replace(before, **unimportant) == structs.replace(after, **unimportant)

    async def _publish_binding_event(
        self,
        binding: Binding,
        change: BindingChange,
        request: str | None,
        *,
        reason: str = "",
        replay_after: int | None = None,
    ) -> None:
        event = binding.event(change, reason=reason, request=request or "", replay_after=replay_after)
        await self._events.publish_binding_event(event, ensure_owner_if_delayed=self._ensure_owner)
        if change in PERSON_CHANGES and event.sandbox in self._recently_read:
            self._recently_read[event.sandbox] = event
        log.info("binding.changed", change=change, sandbox=binding.sandbox, bot=binding.bot)

    async def _send_answer(self, delivery: Delivery, answer: ControlAnswer) -> None:
        """Answers to the subject in the header Reply-To. It must be an inbox, so that no client can make the adapter
        write elsewhere."""
        reply_to = delivery.headers.get(H_REPLY_TO, "")
        if not is_inbox(reply_to):
            return
        headers = {H_SCHEMA: contract.SCHEMA_VERSION}
        if not answer.ok:
            headers |= {
                H_ERROR: answer.error.encode("ascii", "replace").decode(),
                H_ERROR_CODE: "400",
            }
        try:
            await self._core.publish(reply_to, msgspec.json.encode(answer), headers)
        except AdapterError as exc:
            log.info("control.unanswered", reason=exc.reason)


def check_ids(bot: str, token: str, user: str) -> None:
    """Checks the form that all known ids of iLink have. Raises Refused("invalid")."""
    if not bot.endswith(BOT_SUFFIX):
        raise Refused("invalid", f"A bot's id ends with {BOT_SUFFIX}; bind it unchecked if iLink has others by now.")
    if user and not user.endswith(USER_SUFFIX):
        raise Refused(
            "invalid", f"A user's id ends with {USER_SUFFIX}; bind it unchecked if iLink has others by now."
        )
    owner = token.partition(":")[0]
    if owner.endswith(BOT_SUFFIX) and owner != bot:
        raise Refused("invalid", "The token is another bot's: it begins with the id of its bot.")


def independent(keys: Mapping[int, Collection[str]]) -> list[list[int]]:
    """Groups of numbers in the order of `keys`. Two groups share no key. Each number has at least one key."""
    above: dict[str, str] = {}

    def group_of(key: str) -> str:
        while (higher := above.setdefault(key, key)) != key:
            key = higher
        return key

    for touched in keys.values():
        first, *others = touched
        for other in others:
            above[group_of(other)] = group_of(first)
    groups: dict[str, list[int]] = {}
    for number, touched in keys.items():
        groups.setdefault(group_of(next(iter(touched))), []).append(number)
    return [*groups.values()]


def _report(exc: BaseException) -> None:
    log.error("task.crashed", task="control", exc_info=exc)


def _is_same_person(one: Binding | BindingEvent, other: Binding) -> bool:
    """Whether both belong to the same person. A bot serves one person, who may not be known yet."""
    return one.user == other.user if one.user and other.user else one.bot == other.bot
