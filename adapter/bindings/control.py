"""Control commands (bind, unbind, erase): one applier, the owner of shard 0, applies them in their stored order.

A command claims all its keys at once: its bot, its sandbox, the bot's present sandbox, a person who is named. It
waits for earlier commands that have or want one of them. Commands without common keys are applied at the same time,
so that one that waits (for iLink's answer about a token, an owner's confirmation, NATS) delays no other person.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TypeAlias

import msgspec
import structlog
from msgspec import structs

from adapter.bindings.binder import Binder, ControlDeps, ControlRequest
from adapter.contract import messages as contract
from adapter.contract.messages import Bind, BindingEvent, ControlAnswer, Erase, Unbind
from adapter.contract.names import H_ERROR, H_ERROR_CODE, H_MSG_ID, H_REPLY_TO, H_SCHEMA, is_inbox
from adapter.errors import UNDECODABLE, AdapterError, BusRefused, LeaseLost, Refused, Temporary, Unreadable
from adapter.kit.tasks import TaskSet
from adapter.kit.timing import backoff
from adapter.ports import Delivery

log = structlog.get_logger()

MAX_BUGS = 5
"""Crashes on a command after which it becomes a dead letter."""
FAILS = "The adapter fails on this command."
MAX_BYTES = 262_144
"""Largest command; a larger one becomes a dead letter. A bind may have the longest cursor that a poll returns."""
SETTLED_KEPT = 1000
"""Sequences of completed commands that are remembered in case of a redelivery."""
ControlCommand: TypeAlias = Bind | Unbind | Erase
_KINDS: dict[str, type[ControlCommand]] = {"bind": Bind, "unbind": Unbind, "erase": Erase}


class Control:
    """Applies bind, unbind and erase."""

    def __init__(self, deps: ControlDeps) -> None:
        self._deps = deps
        self._binder = Binder(deps)
        self._tasks = TaskSet(_report)
        self._changed = asyncio.Event()
        """Set when a command arrives or ends."""
        self._deliveries: dict[int, Delivery] = {}
        """The newest delivery of each command that has not ended, whose acknowledgement counts, by sequence."""
        self._waiting: dict[int, ControlCommand | None] = {}
        """Commands that have not begun, in their order; None: unreadable."""
        self._claims: dict[int, set[str]] = {}
        """Keys of the commands that have begun."""
        self._settled: deque[int] = deque(maxlen=SETTLED_KEPT)

    def enqueue(self, delivery: Delivery) -> None:
        """Queues a command once. It is redelivered after each connect until its acknowledgement arrives."""
        if delivery.seq not in self._deliveries:
            try:
                self._waiting[delivery.seq] = decode(delivery)
            except Unreadable:
                self._waiting[delivery.seq] = None
            self._changed.set()
        self._deliveries[delivery.seq] = delivery

    async def run(self) -> None:
        """Applies commands until cancelled. The next owner gets those that have not ended."""
        try:
            await self._reload()
            while True:
                await self._changed.wait()
                self._changed.clear()
                self._begin_ready()
        finally:
            self._tasks.cancel_all()
            for kept in (self._deliveries, self._waiting, self._claims):
                kept.clear()

    async def _reload(self) -> None:
        """Reads what the former owner of shard 0 wrote last."""
        failures = 0
        while True:
            try:
                return await self._deps.bindings.reload()
            except Temporary as exc:
                log.warning("control.retrying", reason=exc.reason)
            failures += 1
            await self._deps.clock.sleep(backoff(failures, first_s=0.2, longest_s=5.0))

    def _begin_ready(self) -> None:
        """Begins each waiting command whose keys no earlier command has or wants."""
        blocked = set[str]().union(*self._claims.values())
        for number, command in list(self._waiting.items()):
            keys = self._keys_of(command)
            if not keys & blocked:
                del self._waiting[number]
                self._claims[number] = keys
                self._tasks.spawn(self._process(number))
            blocked |= keys

    def _keys_of(self, command: ControlCommand | None) -> set[str]:
        if isinstance(command, Erase):
            bound = [each for each in self._deps.bindings if each.user == command.user]
            named = {command.sandbox} if command.sandbox else {each.sandbox for each in bound}
            return {
                f"user {command.user}",
                *(f"sandbox {sandbox}" for sandbox in named),
                *(f"bot {each.bot}" for each in bound),
            }
        if command is None:
            return set()
        keys = {f"sandbox {command.sandbox}"}
        if command.bot:
            keys.add(f"bot {command.bot}")
            if present := self._deps.bindings.get(command.bot):
                keys.add(f"sandbox {present.sandbox}")
        if isinstance(command, Bind) and command.user:
            keys.add(f"user {command.user}")
        return keys

    async def _process(self, number: int) -> None:
        """Applies one command, and acknowledges it."""
        if number not in self._settled:  # applied again, an old bind would undo a later unbind
            await self._deps.wait_complete()
            await self._apply_until_done(number)
        self._settled.append(number)
        try:
            await self._deliveries.pop(number).ack()
        finally:
            self._claims.pop(number, None)
            self._changed.set()

    async def _apply_until_done(self, number: int) -> None:
        """Waits while the bus is away. A command that keeps crashing becomes a dead letter."""
        failures = bugs = 0
        while True:
            delivery = self._deliveries[number]
            try:
                self._deps.ensure_owner()
                if bugs < MAX_BUGS:
                    await self._apply_and_answer(delivery)
                else:
                    await self._reopen(number)
                    await self._dead_letter(delivery, Unreadable("unreadable", FAILS))
            except (Temporary, LeaseLost) as exc:
                log.warning("control.retrying", sequence=number, reason=exc.reason)
            except Exception:
                bugs += 1
                log.exception("control.crashed", sequence=number, bugs=bugs)
            else:
                return
            failures += 1
            await self._deps.clock.sleep(backoff(failures, first_s=0.2, longest_s=5.0))

    async def _reopen(self, number: int) -> None:
        """Raises Temporary."""
        try:
            await self._binder.reopen(number)
        except BusRefused as exc:
            log.error("binding.not_reopened", sequence=number, detail=exc.detail)

    async def _apply_and_answer(self, delivery: Delivery) -> None:
        """Applies and answers a command. Raises Temporary, LeaseLost."""
        try:
            command = decode(delivery)
        except Unreadable as exc:
            self._deps.metrics.schema_violations.labels(kind="ctl").inc()
            await self._dead_letter(delivery, exc)
            return

        async def on_pending() -> None:
            log.warning("control.pending", sequence=delivery.seq)
            detail = "An owner has not confirmed yet that the bot is released; the work goes on."
            await self._answer(delivery, ControlAnswer(ok=False, id=request.id, pending=True, error=detail))

        request = ControlRequest(delivery.seq, command.id or "", on_pending)
        try:
            if isinstance(command, Bind):
                answer = await self._binder.bind(command, request)
            elif isinstance(command, Unbind):
                answer = await self._binder.unbind(command, request)
            else:
                answer = await self._erase_person(command, request)
        except Refused as exc:
            await self._reopen(delivery.seq)
            answer = await self._refuse(command, exc)
        await self._answer(delivery, answer)

    async def _refuse(self, command: ControlCommand, exc: Refused) -> ControlAnswer:
        if not isinstance(command, Erase):
            event = BindingEvent(
                sandbox=command.sandbox,
                bot=command.bot or "",
                change="refused",
                reason=exc.reason,
                detail=exc.detail,
                request=command.id or "",
            )
            events, ensure_owner = self._deps.access.events, self._deps.ensure_owner
            await events.publish_binding_event(event, ensure_owner=ensure_owner)
            log.warning("binding.refused", sandbox=command.sandbox, bot=command.bot, reason=exc.reason)
        return ControlAnswer(ok=False, id=command.id or "", error=exc.detail)

    async def _erase_person(self, command: Erase, request: ControlRequest) -> ControlAnswer:
        """Unbinds a person and erases what is theirs; messages one by one, since a purge leaves them on the disk.
        Raises Temporary, LeaseLost."""
        if command.dry_run:
            return await self._deps.eraser.run(command)
        bound = [b for b in self._deps.bindings if b.user == command.user and command.sandbox in (None, b.sandbox)]
        sandboxes = sorted({binding.sandbox for binding in bound})
        self._binder.ensure_known(sandboxes)
        await self._binder.close(bound, request)
        for sandbox in sandboxes:
            await self._binder.exclude_earlier_commands(sandbox, bound)
        await self._binder.announce_end(bound, request)  # its event is erased, too
        try:
            answer = await self._deps.eraser.run(command)
            for sandbox in sandboxes:
                await self._binder.empty_inbox(sandbox, bound)
        except BusRefused as exc:
            advice = f"The erasure is not complete ({exc.reason}): erase again."
            answer = ControlAnswer(ok=False, id=request.id, error=advice)
        await self._binder.delete(bound)  # last: an erasure that is cut finds them again
        return structs.replace(answer, bindings=[binding.info() for binding in bound])

    async def _dead_letter(self, delivery: Delivery, exc: Unreadable) -> None:
        request = delivery.headers.get(H_MSG_ID, "")[:128]
        is_secret = _is_secret(delivery)
        await self._deps.access.events.publish_dead_letter(
            "CTL",
            b"" if is_secret else delivery.data,
            subject=delivery.subject,
            headers={} if is_secret else delivery.headers,
            reason=exc.reason,
            detail=exc.detail,
            seq=delivery.seq,
            msg_id=f"dead:ctl:{delivery.seq}:{delivery.time_ms}",
        )
        await self._answer(delivery, ControlAnswer(ok=False, id=request, error=exc.detail))

    async def _answer(self, delivery: Delivery, answer: ControlAnswer) -> None:
        """Answers to the subject in the header Reply-To. It must be an inbox, so that no client can make the adapter
        write elsewhere."""
        reply_to = delivery.headers.get(H_REPLY_TO, "")
        if not is_inbox(reply_to):
            return
        headers = {H_SCHEMA: contract.SCHEMA_VERSION}
        if not answer.ok:
            headers |= {H_ERROR: answer.error.encode("ascii", "replace").decode(), H_ERROR_CODE: "400"}
        try:
            await self._deps.core.publish(reply_to, msgspec.json.encode(answer), headers)
        except AdapterError as exc:
            log.info("control.unanswered", reason=exc.reason)


def decode(delivery: Delivery) -> ControlCommand:
    """Raises Unreadable."""
    if len(delivery.data) > MAX_BYTES:
        raise Unreadable("too_large", f"At most {MAX_BYTES} bytes are read.")
    try:
        command = msgspec.json.decode(delivery.data, type=_KINDS[delivery.subject.rpartition(".")[2]])
    except UNDECODABLE as exc:
        raise Unreadable("unreadable", str(exc)[:200]) from exc
    return structs.replace(command, id=command.id or delivery.headers.get(H_MSG_ID, "")[:128] or None)


def _is_secret(delivery: Delivery) -> bool:
    """Whether it holds a token, or names a person to forget."""
    return not delivery.subject.endswith(".unbind")


def _report(exc: BaseException) -> None:
    log.error("task.crashed", task="control", exc_info=exc)
