"""The sandboxes of one partition, from when this replica owns it until it does not.

`on_delivery` gets all that is said to them from the partition's consumer, in order, and passes it to its sandbox.

The consumer delivers again what a former owner has not acknowledged. Such a command, and a copy by the router, may
have been worked on: its receipt is looked up before anything is done about it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterator

import msgspec
import structlog

from adapter.bridge import sending
from adapter.bridge.commands import PEER, command_id, decode_command, identity_of, read_command, salvage_ids
from adapter.bridge.controls import read_control
from adapter.bridge.handover import Handover, say_polled
from adapter.bridge.inflight import InFlight
from adapter.bridge.leases import Tenure
from adapter.bridge.parts import Parts
from adapter.bridge.person import Person
from adapter.bridge.sandbox import Sandbox
from adapter.bridge.sender import Phase, Sender
from adapter.bridge.sending import CommandResult, QueuedCommand
from adapter.bridge.typing_indicator import TypingIndicators
from adapter.contract.names import H_MSG_ID
from adapter.contract.records import Binding
from adapter.errors import AdapterError, BusRefused, LeaseLost, Refused, Temporary, Unreadable
from adapter.ports import Delivery
from adapter.tools.tasks import TaskSet

log = structlog.get_logger()

DRAIN_S, CANCEL_GRACE_S = 5.0, 1.0
"""Time to hide typing indicators at the end, and for cancelled tasks to end."""
SAVE_S = 0.5
"""Longest time for which a partition that is given away waits for records. They say what a person may quote."""
MAX_REPLY_TO = 256
"""Most characters of an inbound message's id: a bot's name, and iLink's id of it or a digest."""


class Partition:
    """What one owned partition has in memory. It ends with `leave` or `stop`."""

    def __init__(self, tenure: Tenure, parts: Parts) -> None:
        self.number = tenure.number
        self.parts = parts
        self.tenure = tenure
        self.handover = Handover(tenure, parts)
        self.is_draining = False
        self.commands = InFlight(parts, self.tenure)
        self.typing = TypingIndicators(parts.chat, parts.clock, tenure.check)
        self._sandboxes: dict[str, Sandbox] = {}
        self._tasks = TaskSet("partition")

    def __iter__(self) -> Iterator[Person]:
        return iter([sender.person for sender in self.senders])

    @property
    def senders(self) -> list[Sender]:
        return [each for sandbox in self._sandboxes.values() for each in sandbox.senders.values()]

    # persons ----------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Reads what is stored of all its persons, hundreds in a request. Who cannot be read is read again when there
        is something to do. Raises Temporary."""
        bindings = self.parts.bindings
        stored = await self.parts.persons.load_all([*{binding.key for binding in bindings.of_partition(self.number)}])
        # some may have gone meanwhile
        bound = {binding.key: binding for binding in bindings.of_partition(self.number)}
        for number, (key, found) in enumerate(stored.items()):
            if key not in bound:
                continue
            person = self.person(bound[key])
            if not isinstance(found, AdapterError):
                person.restore(found)
            if number % 200 == 199:
                await asyncio.sleep(0)  # thousands must not delay the renewal

    def _sandbox(self, name: str) -> Sandbox:
        if (sandbox := self._sandboxes.get(name)) is None:
            new = Sandbox(name, self.parts, self.tenure, self.handover, self.commands, self.typing, self._tasks)
            sandbox = self._sandboxes[name] = new
        return sandbox

    def person(self, binding: Binding) -> Person:
        """The person of a binding, who exists from now on."""
        return self._sandbox(binding.sandbox).person(binding)

    def on_binding(self, before: Binding | None, after: Binding | None) -> None:
        """Handles a changed binding, or a change of its token's state."""
        for binding in filter(None, (before, after)):
            self._sandbox(binding.sandbox).on_binding(binding)

    # deliveries -------------------------------------------------------------------------------------

    def on_delivery(self, delivery: Delivery) -> None:
        """Takes a delivery or redelivery."""
        if self.is_draining:
            return
        verb, name = delivery.subject.split(".")[-2:]
        sandbox = self._sandbox(name)
        if verb in sending.CONTROL:
            self._on_control(delivery, verb, sandbox)
            return
        if (known := self.commands.commands.get(delivery.seq)) is not None:
            known.delivery = _without_data(delivery)
            return
        ref = identity_of(delivery.headers, delivery.seq, delivery.time_ms)
        command = sending.unread(delivery, ref, name)
        try:
            result = self._read(command, delivery)
        except Exception as exc:
            log.exception("command.crashed", subject=delivery.subject, sequence=delivery.seq)
            result = sending.crashed_result(exc)
            if not command.ref.id:
                command.ref = msgspec.structs.replace(ref, id=str(delivery.seq))
        if self.commands.add(command):
            sandbox.take(command, result)
        else:  # another copy by the router, and the first is in hand
            self.commands.release_body(command)
            self._tasks.spawn(delivery.ack())
        _without_data(delivery)

    def _on_control(self, delivery: Delivery, verb: str, sandbox: Sandbox) -> None:
        """Takes a bind, unbind or erase."""
        if (known := sandbox.in_hand(delivery.seq)) is not None:
            known.delivery = delivery
            return
        if not delivery.redelivered:
            self.parts.metrics.outbound_received.inc()
        ref = identity_of(delivery.headers, delivery.seq, delivery.time_ms)
        command = sending.unread(delivery, ref, sandbox.name)
        command.kind = verb  # type: ignore[assignment] # one of sending.CONTROL
        command.is_checked = not delivery.is_old and ref.sequence == delivery.seq
        result = read_control(command)
        if result is not None:
            self.parts.metrics.schema_violations.labels(kind="out").inc()
        sandbox.take(command, result)

    def _read(self, command: QueuedCommand, delivery: Delivery) -> CommandResult | None:
        """Reads the body. Returns how the command ends if it is none."""
        parts, ref, unreadable = self.parts, command.ref, None
        try:
            body = decode_command(delivery.data, parts.limits)
        except Unreadable as exc:
            body, unreadable = salvage_ids(delivery.data, parts.limits), exc
        ident = command_id(body.id, ref.id, delivery.headers.get(H_MSG_ID, ""), delivery.seq)
        is_named = bool(body.id) and not body.typing  # showing it again is no repeat
        command.ref = msgspec.structs.replace(ref, id=ident, is_named=is_named)
        command.reply_to = body.reply_to if body.reply_to and len(body.reply_to) <= MAX_REPLY_TO else ""
        command.is_checked = not delivery.is_old and ref.sequence == delivery.seq
        try:
            if unreadable is not None:
                raise unreadable
            read = read_command(body, sandbox=command.sandbox, stored_ms=ref.stored_ms, limits=parts.limits)
        except (Refused, Unreadable) as exc:
            parts.metrics.schema_violations.labels(kind="out").inc()
            command.user = body.user if body.user and PEER.fullmatch(body.user) else ""  # whom the receipt names
            return sending.unreadable_result(exc)
        only = read.parts[0] if len(read.parts) == 1 else None
        command.bot, command.user, command.kind, command.typing = read.bot, read.user, read.kind, read.typing
        command.part_count, command.chars = len(read.parts), len(only) if isinstance(only, str) else 0
        command.expires_ms, command.when_closed = read.expires_ms, read.when_closed
        command.send_at_ms, command.cancel = read.send_at_ms, read.cancel
        if parts.bodies.take(len(delivery.data)):
            command.parts, command.size = read.parts, len(delivery.data)
        return None

    # the end ----------------------------------------------------------------------------------------

    async def leave(self) -> None:
        """Starts nothing more, since the partition is given away, and stores what was sent last. Requests that are
        out go on: `wait_sent`."""
        self.is_draining = True
        self._tasks.spawn(self.typing.drain(DRAIN_S))
        for sandbox in self._sandboxes.values():
            sandbox.schedule.stop()
        for sender in self.senders:
            sender.stop(at_once=False)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SAVE_S):
                counted = [sender for sender in self.senders if sender.phase is Phase.COUNTED]
                await asyncio.gather(*(sender.wait_ended() for sender in counted))  # they take it back
                quiet = [sender.person for sender in self.senders if not sender.is_sending]
                await asyncio.gather(*(_save_once(person) for person in quiet if person.has_unsaved_sends))

    @property
    def sending(self) -> list[Sender]:
        """Those with a request that is out, or whose receipts are being stored."""
        return [sender for sender in self.senders if sender.is_sending]

    async def wait_sent(self) -> None:
        """Waits for the requests that are out, and tells the next owner of each end."""
        await asyncio.gather(*(self._wait_sent(sender) for sender in self.sending))
        await self._tasks.wait_ended(DRAIN_S)
        self.stop()
        await self._tasks.wait_ended(CANCEL_GRACE_S)

    async def _wait_sent(self, sender: Sender) -> None:
        await sender.wait_ended()
        await say_polled(self.parts, self.number, person=sender.person.key.key)

    def stop(self) -> None:
        """Stops at once, since the partition is lost."""
        self.is_draining = True
        self.tenure.end()
        self.typing.stop()
        self._tasks.cancel_all()
        for sender in self.senders:
            sender.stop(at_once=True)
        for command in self.commands.commands.values():
            self.commands.release_body(command)
        for sandbox in self._sandboxes.values():
            sandbox.schedule.stop()
        self._sandboxes.clear()  # breaks reference cycles

    # memory and metrics -----------------------------------------------------------------------------

    @property
    def tasks(self) -> int:
        """Number of tasks."""
        return len(self._tasks) + sum(sender.is_running for sender in self.senders)

    @property
    def throttled_bots(self) -> set[str]:
        """Bots with a throttled window (-2)."""
        return {each.state.bot for each in self if each.state.window.throttled_at_ms}

    def evict_idle(self) -> None:
        """Forgets who is gone, and old tickets; called each half minute."""
        for name, sandbox in [*self._sandboxes.items()]:
            for sender in [each for each in sandbox.senders.values() if each.person.bot is None]:
                sandbox.drop_gone(sender.person)
            if sandbox.is_empty:
                del self._sandboxes[name]
            elif len(bound := self.parts.bindings.of_sandbox(name)) > len({each.key for each in bound}):
                self._tasks.spawn(self._drop_replaced(sandbox))
        bindings = self.parts.bindings
        self.typing.evict_idle(lambda bot: bindings.get(bot) is not None)

    async def _drop_replaced(self, sandbox: Sandbox) -> None:
        with contextlib.suppress(Temporary, BusRefused, LeaseLost):  # later
            await sandbox.drop_all_replaced()

    def queue_depths(self, parked: Counter[str]) -> tuple[int, int | None]:
        """Adds the parked commands to `parked`, by reason. Returns the number of others in flight, with binds and the
        like, and when the oldest of them was stored."""
        waiting, commands = 0, self.commands.commands
        for sender in self.senders:
            count = sum(each.parked for each in sender.queue) if sender.reason else 0
            parked[sender.reason] += count
            waiting += count
        controls = [each for sandbox in self._sandboxes.values() for each in sandbox.controls]
        scheduled = sum(len(sandbox.schedule) for sandbox in self._sandboxes.values())
        parked[sending.SCHEDULED.reason] += scheduled
        in_work = [each for each in (*commands.values(), *controls) if not each.parked]
        since_ms = [max(each.delivery.time_ms, each.send_at_ms) for each in in_work]
        return len(commands) + len(controls) - waiting - scheduled, min(since_ms, default=None)


def _without_data(delivery: Delivery) -> Delivery:
    delivery.data, delivery.headers = b"", {}
    return delivery


async def _save_once(person: Person) -> None:
    try:
        await person.save()
    except (Temporary, LeaseLost, BusRefused) as exc:
        log.info("person.not_stored", sandbox=person.key.sandbox, reason=exc.reason)
