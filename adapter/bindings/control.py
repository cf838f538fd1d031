"""Control commands (bind, unbind, erase): changes bindings, publishes events, answers. Never calls the supervisor.

One consumer on WECHAT_CTL, owned with shard 0. Commands for the same sandbox or bot take effect in the order in which
they were stored. Other commands are processed concurrently.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable
from itertools import takewhile

import msgspec
import structlog
from msgspec import structs

from adapter.bindings.binder import Binder, ControlDeps
from adapter.bindings.queue import CommandQueue, decode, independent
from adapter.contract import messages as contract
from adapter.contract.messages import Bind, BindingEvent, ControlAnswer, Erase, Unbind
from adapter.contract.names import H_ERROR, H_ERROR_CODE, H_MSG_ID, H_REPLY_TO, H_SCHEMA, is_inbox
from adapter.errors import AdapterError, LeaseLost, Refused, Temporary, Unreadable
from adapter.kit.tasks import TaskSet
from adapter.kit.timing import backoff
from adapter.ports import CoreBus, Delivery

log = structlog.get_logger()

MAX_BUGS = 5
"""Crashes on a command after which it becomes a dead letter."""
FAILS = "The adapter fails on this command."
MAX_BATCH = 512
"""Commands in one batch. Commands for different sandboxes and bots are processed concurrently."""


class Control:
    """Applies bind, unbind and erase."""

    def __init__(self, deps: ControlDeps) -> None:
        self.queue = CommandQueue()
        self.binder = Binder(deps)
        self._deps = deps
        self._tasks = TaskSet(_report)
        self._turn = asyncio.Lock()
        """Held while commands are processed."""

    def enqueue(self, delivery: Delivery) -> None:
        self.queue.add(delivery)

    async def run(self) -> None:
        """Processes commands in batches until cancelled. The next owner gets the remaining commands."""
        self.binder.sandboxes.clear()
        try:
            while True:
                await self.queue.changed.wait()
                self.queue.changed.clear()
                while chains := await self._next_chains():
                    async with self._turn, asyncio.TaskGroup() as group:
                        for numbers in chains:
                            group.create_task(self._process_in_order(numbers))
        finally:
            self._tasks.cancel_all()
            self.binder.checks.forget_all()
            self.queue.clear()

    async def _next_chains(self) -> list[list[int]]:
        """Takes commands that can run now. Chains run concurrently, and the commands of a chain in sequence. A bind
        whose token check is pending waits, and so do later commands for the same sandbox or bot."""
        batch, checks = self.queue.waiting[:MAX_BATCH], self.binder.checks
        if not batch:
            return []
        seen = {n for n in batch if checks.is_known(n)}
        pending = {n for n in batch if checks.is_pending(n, self.queue.command(n), self.queue.changed.set)}
        keys = await self._read_keys(batch, [n for n in batch if n not in pending & seen])
        chains = [[*takewhile(lambda n: n not in pending, numbers)] for numbers in independent(keys)]
        self.queue.take({number for numbers in chains for number in numbers})
        return [numbers for numbers in chains if numbers]

    async def _read_keys(self, batch: Collection[int], unread: Collection[int]) -> dict[int, set[str]]:
        """The sandboxes and bots that each command of a batch touches. Reads those of `unread` first."""
        failures = 0
        while True:
            try:
                await self._refresh(unread)
                keys = {number: self._keys_of(number) for number in batch}
                if any(isinstance(self.queue.command(number), Erase) for number in batch):
                    return {number: {"erase"} for number in batch}  # an erasure may touch any bot
                return keys
            except Temporary as exc:
                log.warning("control.retrying", reason=exc.reason)
            failures += 1
            await self._deps.clock.sleep(backoff(failures, first_s=0.2, longest_s=5.0))

    async def _refresh(self, numbers: Iterable[int]) -> None:
        """Reads the bots and sandboxes of commands. Raises Temporary."""
        commands = (self.queue.command(number) for number in numbers)
        await self.binder.sandboxes.refresh(each for each in commands if isinstance(each, Bind | Unbind))

    def _keys_of(self, number: int) -> set[str]:
        command = self.queue.command(number)
        if command is None or isinstance(command, Erase):
            return {"unreadable"}
        bound = self._deps.bindings.get(command.bot) if command.bot else None
        sandboxes = {command.sandbox} | ({bound.sandbox} if bound is not None else set())
        return {f"sandbox {sandbox}" for sandbox in sandboxes} | ({f"bot {command.bot}"} if command.bot else set())

    async def _process_in_order(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            if not self.queue.is_settled(number):  # processed again, an old bind would undo a later unbind
                await self._deps.wait_complete()
                await self._process(number)
            self.binder.checks.forget(number)
            await self.queue.settle(number)

    async def _process(self, number: int) -> None:
        """Processes one command. Waits while the bus is away. A command that keeps crashing becomes a dead letter."""
        failures = bugs = 0
        while True:
            delivery = self.queue.delivery(number)
            try:
                if failures:  # the data read for the batch may be outdated
                    await self._refresh([number])
                self._deps.ensure_owner()
                if bugs < MAX_BUGS:
                    await self._apply_and_answer(delivery)
                else:
                    await self._dead_letter(delivery, Unreadable("unreadable", FAILS))
            except (Temporary, LeaseLost) as exc:
                log.warning("control.retrying", reason=exc.reason)
            except Exception:
                bugs += 1
                log.exception("control.crashed", sequence=number, bugs=bugs)
            else:
                return
            failures += 1
            await self._deps.clock.sleep(backoff(failures, first_s=0.2, longest_s=5.0))

    async def _apply_and_answer(self, delivery: Delivery) -> None:
        """Applies and answers a command. Raises Temporary, LeaseLost."""
        try:
            command = decode(delivery)
        except Unreadable as exc:
            self._deps.metrics.schema_violations.labels(kind="ctl").inc()
            await self._dead_letter(delivery, exc)
            return
        if isinstance(command, Erase):
            await self._begin_erase(command, delivery)
            return
        try:
            if isinstance(command, Bind):
                answer = await self.binder.bind(command, delivery.seq)
            else:
                answer = await self.binder.unbind(command)
                if command.purge:
                    self._tasks.spawn(self._purge_late(command.sandbox, [info.bot for info in answer.bindings]))
        except Refused as exc:
            answer = await self._refuse(command, exc)
        await _send_answer(self._deps.core, delivery, answer)

    async def _refuse(self, command: Bind | Unbind, exc: Refused) -> ControlAnswer:
        event = BindingEvent(
            sandbox=command.sandbox,
            bot=command.bot or "",
            change="refused",
            reason=exc.reason,
            detail=exc.detail,
            request=command.id or "",
        )
        await self._deps.access.events.publish_binding_event(event, ensure_owner_if_delayed=self._deps.ensure_owner)
        log.warning("binding.refused", sandbox=command.sandbox, bot=command.bot, reason=exc.reason)
        return ControlAnswer(ok=False, id=command.id or "", error=exc.detail)

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
        await _send_answer(self._deps.core, delivery, ControlAnswer(ok=False, id=request, error=exc.detail))

    async def _purge_late(self, sandbox: str, bots: Collection[str]) -> None:
        """Purges again, because a message that waits for its media is published after the unbind."""
        try:
            await self._deps.eraser.wait_released(bots)
            async with self._turn:
                await self.binder.purge_inbox(sandbox)
        except AdapterError as exc:
            log.warning("inbox.not_purged", sandbox=sandbox, reason=exc.reason)

    async def _begin_erase(self, command: Erase, delivery: Delivery) -> None:
        """Unbinds a person's bots and starts the erasure. Later commands do not wait for it.

        Raises Temporary, LeaseLost.
        """
        bound = [b for b in self._deps.bindings if b.user == command.user and command.sandbox in (None, b.sandbox)]
        for binding in [] if command.dry_run else bound:
            await self.binder.unbind(Unbind(sandbox=binding.sandbox, bot=binding.bot, id=command.id))
            self.binder.sandboxes.forget(binding.sandbox)  # it contains the person's id

        async def finish() -> None:
            answer, reason = ControlAnswer(ok=False, id=command.id or ""), "handed_over"
            try:
                answer = await self._deps.eraser.run(command, [binding.bot for binding in bound], self._turn)
            except AdapterError as exc:
                reason = exc.reason
            finally:  # also when another replica takes the commands over
                if not answer.ok and not answer.error:
                    log.warning("person.not_erased", reason=reason)
                    answer = structs.replace(answer, error=f"The erasure is not complete ({reason}): erase again.")
                bindings = [binding.info() for binding in bound]
                await _send_answer(self._deps.core, delivery, structs.replace(answer, bindings=bindings))

        self._tasks.spawn(finish())


async def _send_answer(core: CoreBus, delivery: Delivery, answer: ControlAnswer) -> None:
    """Answers to the subject in the header Reply-To. It must be an inbox, so that no client can make the adapter
    write elsewhere."""
    reply_to = delivery.headers.get(H_REPLY_TO, "")
    if not is_inbox(reply_to):
        return
    headers = {H_SCHEMA: contract.SCHEMA_VERSION}
    if not answer.ok:
        headers |= {H_ERROR: answer.error.encode("ascii", "replace").decode(), H_ERROR_CODE: "400"}
    try:
        await core.publish(reply_to, msgspec.json.encode(answer), headers)
    except AdapterError as exc:
        log.info("control.unanswered", reason=exc.reason)


def _is_secret(delivery: Delivery) -> bool:
    """Whether it holds a token, or names a person to forget."""
    return not delivery.subject.endswith(".unbind")


def _report(exc: BaseException) -> None:
    log.error("task.crashed", task="control", exc_info=exc)
