"""The commands and persons of one partition, from when this replica owns it until it does not.

`on_delivery` gets each command from the partition's consumer and decides at once whose it is: it joins the queue of
its person, or ends here, if nobody is served by it.

The consumer delivers again what a former owner has not acknowledged. Such a command, and a copy by the router, may
have been worked on: its receipt is looked up before anything is done about it, and where nobody is served by it, it
belongs to whom a former owner was sending it, or had parked it for.
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
from adapter.bridge.handover import Handover, say_polled
from adapter.bridge.inflight import NO_WINDOW, InFlight
from adapter.bridge.leases import Tenure
from adapter.bridge.parts import Parts
from adapter.bridge.person import Person
from adapter.bridge.persons import binding_of
from adapter.bridge.receipts import Address
from adapter.bridge.sender import Phase
from adapter.bridge.sending import CommandResult, QueuedCommand
from adapter.bridge.typing_indicator import TypingIndicators
from adapter.contract.names import H_MSG_ID, command_traceparent, person_token
from adapter.contract.records import Binding, PersonKey
from adapter.errors import (
    AdapterError,
    BusRefused,
    Crashed,
    LeaseLost,
    RecordTooNew,
    Refused,
    Temporary,
    Unreadable,
)
from adapter.kit.tasks import TaskSet
from adapter.ports import Delivery

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
        self._persons: dict[str, dict[PersonKey, Person]] = {}
        """By sandbox."""
        self._tasks = TaskSet("partition")

    def __iter__(self) -> Iterator[Person]:
        return iter([each for of_sandbox in self._persons.values() for each in of_sandbox.values()])

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

    def person(self, binding: Binding) -> Person:
        """The person of a binding, who exists from now on."""
        key = binding.key
        of_sandbox = self._persons.setdefault(key.sandbox, {})
        if (person := of_sandbox.get(key)) is None:
            person = of_sandbox[key] = Person(key, self.parts, self.tenure, self.handover, self.commands, self.typing)
            person.check_binding()
        return person

    def on_binding(self, before: Binding | None, after: Binding | None) -> None:
        """Handles a changed binding, or a change of its token's state."""
        for binding in filter(None, (before, after)):
            person = self.person(binding)
            person.check_binding()
            self._drop_gone(person)

    def _drop_gone(self, person: Person) -> None:
        """Forgets a person whom no binding has any more, once nothing is in hand for them."""
        key, of_sandbox = person.key, self._persons.get(person.key.sandbox, {})
        is_bound = any(each.key == key for each in self.parts.bindings.of_sandbox(key.sandbox))
        if is_bound or not person.sender.is_idle or of_sandbox.get(key) is not person:
            return
        del of_sandbox[key]
        if not of_sandbox:
            del self._persons[key.sandbox]

    async def end_service(self, binding: Binding) -> None:
        """Ends the commands of a person whose binding is closing; `is_service_ended` tells when. Raises Temporary."""
        person = self.person(binding)
        try:
            await person.open()
        except (RecordTooNew, Refused) as exc:  # it stays as it is
            log.info("person.unopenable", sandbox=binding.sandbox, reason=exc.reason)
        person.check_binding()

    def is_service_ended(self, binding: Binding) -> bool:
        """Whether nothing is in hand for the person of a closing binding whom no other bot serves."""
        person = self.person(binding)
        return person.bot is not None or person.sender.is_idle

    async def end_person(self, binding: Binding) -> None:
        """Stores the end of the person's time, unless another bot serves them. Raises Temporary, BusRefused,
        LeaseLost."""
        key = binding.key
        if binding_of(self.parts.bindings, key) is None:
            await self._tell_of_head(self.person(binding))
            await self.parts.persons.end(key)

    async def _tell_of_head(self, person: Person) -> None:
        """Ends what a former owner was sending and the consumer has not brought yet: nothing is left that tells of it
        once the record is gone. One that has its final receipt keeps that."""
        head, parts, sandbox = person.state.head, self.parts, person.key.sandbox
        if head is None or not head.is_partially_sent:
            return
        result = sending.unfinished_result(CommandResult("refused", "not_bound", sending.UNSERVED), head)
        address = Address(sandbox, head.bot, person.user)
        for ref in head.commands:
            trace = command_traceparent("", sandbox, ref.sequence, ref.stored_ms, "")
            await parts.receipts.publish(ref, result, address, NO_WINDOW, trace, ensure_owner=self.tenure.check)

    # deliveries -------------------------------------------------------------------------------------

    def on_delivery(self, delivery: Delivery) -> None:
        """Takes a delivery or redelivery."""
        if self.is_draining:
            return
        if (known := self.commands.commands.get(delivery.seq)) is not None:
            known.delivery = _without_data(delivery)
            return
        ref = identity_of(delivery.headers, delivery.seq, delivery.time_ms)
        command = sending.unread(delivery, ref, delivery.subject.rpartition(".")[2])
        try:
            refusal = self._read(command, delivery)
            if not self.commands.add(command):  # another copy by the router, and the first is in hand
                self.commands.release_body(command)
                self._tasks.spawn(delivery.ack())
                return
            if refusal is None:
                self._place(command)
            else:
                self._tasks.spawn(self._end(command, refusal))
        except Exception as exc:  # the one place where the code may raise for a command that has no person
            log.exception("command.crashed", subject=delivery.subject, sequence=delivery.seq)
            crashed = CommandResult("dead_lettered", "crashed", type(exc).__name__)
            if not command.ref.id:
                command.ref = msgspec.structs.replace(ref, id=str(delivery.seq))
            if self.commands.add(command):
                self._place_unserved(command, crashed)
        finally:
            _without_data(delivery)

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
        if parts.bodies.take(len(delivery.data)):
            command.parts, command.size = read.parts, len(delivery.data)
        return None

    def _place(self, command: QueuedCommand) -> None:
        """Passes a command to its person, or ends it."""
        try:
            binding = self._binding_for(command)
        except Refused as exc:
            self._place_unserved(command, sending.unreadable_result(exc))
        else:
            self.person(binding).sender.enqueue(command)

    def _place_unserved(self, command: QueuedCommand, refusal: CommandResult) -> None:
        """Places a command that nobody serves with whom a former owner was sending it to: at once, since that one's
        queue waits for no command. Else its receipt is looked up."""
        if (person := self._who_has_begun(command)) is not None:
            person.sender.enqueue(command)
        else:
            self._tasks.spawn(self._place_after_look(command, refusal))

    def _binding_for(self, command: QueuedCommand) -> Binding:
        """The binding of the person for whom a command is meant. Raises Refused."""
        bound = self.parts.bindings.serving_sandbox(command.sandbox)
        if command.bot:
            bound = [binding for binding in bound if binding.bot == command.bot]
        if bound and command.user:
            of_user = [binding for binding in bound if binding.user == command.user]
            # who answers as iLink names whom it likes: a user whom a bind has named is nobody else's
            named = person_token(command.sandbox, command.user)
            of_user = [binding for binding in of_user if binding.key.person == named] or of_user
            if not (bound := of_user or [binding for binding in bound if not binding.user]):
                raise Refused("not_bound", sending.UNSERVED)
        if not bound:
            raise Refused("not_bound", "No bot is bound to this sandbox (or not the one named): bind it first.")
        if len({binding.key for binding in bound}) > 1:
            raise Refused("ambiguous_bot", "The sandbox has several bots: name `bot` or `user`.")
        if not (command.user or command.bot) and command.ref.sequence <= bound[0].out_after:
            raise Refused("not_bound", "Another person was bound when the command was stored: name the `user`.")
        return bound[0]

    async def _place_after_look(self, command: QueuedCommand, refusal: CommandResult) -> None:
        """Places a command that nobody serves with whom a former owner has parked it for. Else it ends with
        `refusal`."""
        sandbox, person = command.sandbox, None
        try:
            if not command.is_checked:
                found = await self.commands.find(sandbox, [command])
                if command.sequence in found:
                    await self.commands.acknowledge(command)
                    return
                person = self._who_has_begun(command)
                command.is_checked = True
        except Crashed as exc:  # a former owner may have sent it
            refusal = CommandResult("uncertain", detail=exc.detail)
        if person is not None:
            person.sender.enqueue(command)
        elif refusal.reason == "not_bound" and not (bindings := self.parts.bindings).is_current:
            await bindings.changed.wait_until(lambda: bindings.is_current)
            self._place(command)
        else:
            await self._end(command, refusal)

    def _who_has_begun(self, command: QueuedCommand) -> Person | None:
        """The person to whom a former owner was sending a command, or for whom it has parked it."""
        persons = [*self._persons.get(command.sandbox, {}).values()]
        for person in persons:
            if (head := person.state.head) is not None and head.has_command(command.ref):
                return person
        if command.user or command.bot or not command.parked_for:
            return None
        return next((each for each in persons if each.user == command.parked_for and each.bot is not None), None)

    async def _end(self, command: QueuedCommand, result: CommandResult) -> None:
        """Ends a command that is nobody's."""
        await self.commands.end([(command, result)], Address(command.sandbox, command.bot, command.user))

    # the end ----------------------------------------------------------------------------------------

    async def leave(self) -> None:
        """Starts nothing more, since the partition is given away, and stores what was sent last. Requests that are
        out go on: `wait_sent`."""
        self.is_draining = True
        self._tasks.spawn(self.typing.drain(DRAIN_S))
        for person in self:
            person.sender.stop(at_once=False)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SAVE_S):
                counted = [person.sender for person in self if person.sender.phase is Phase.COUNTED]
                await asyncio.gather(*(sender.wait_ended() for sender in counted))  # they take it back
                unsaved = [each for each in self if each.has_unsaved_sends and not each.sender.is_sending]
                await asyncio.gather(*map(_save_once, unsaved))

    @property
    def sending(self) -> list[Person]:
        """The persons to whom a request is out, or whose receipts are being stored."""
        return [person for person in self if person.sender.is_sending]

    async def wait_sent(self) -> None:
        """Waits for the requests that are out, and tells the next owner of each end."""
        await asyncio.gather(*(self._wait_sent(person) for person in self.sending))
        await self._tasks.wait_ended(DRAIN_S)
        self.stop()
        await self._tasks.wait_ended(CANCEL_GRACE_S)

    async def _wait_sent(self, person: Person) -> None:
        await person.sender.wait_ended()
        await say_polled(self.parts, self.number, person=person.key.key)

    def stop(self) -> None:
        """Stops at once, since the partition is lost."""
        self.is_draining = True
        self.tenure.end()
        self.typing.stop()
        self._tasks.cancel_all()
        for person in self:
            person.sender.stop(at_once=True)
        for command in self.commands.commands.values():
            self.commands.release_body(command)
        self._persons.clear()  # breaks reference cycles

    # memory and metrics -----------------------------------------------------------------------------

    @property
    def tasks(self) -> int:
        """Number of tasks."""
        return len(self._tasks) + sum(each.sender.is_running for each in self)

    @property
    def throttled_bots(self) -> set[str]:
        """Bots with a throttled window (-2)."""
        return {each.state.bot for each in self if each.state.window.throttled_at_ms}

    def evict_idle(self) -> None:
        """Forgets who is gone, and old tickets; called each half minute."""
        for person in self:
            if person.bot is None:
                self._drop_gone(person)
        bindings = self.parts.bindings
        self.typing.evict_idle(lambda bot: bindings.get(bot) is not None)

    def queue_depths(self, parked: Counter[str]) -> tuple[int, int | None]:
        """Adds the parked commands to `parked`, by reason. Returns the number of other commands in flight, and when
        the oldest of them was stored."""
        waiting, commands = 0, self.commands.commands
        for person in self:
            sender = person.sender
            count = sum(each.parked for each in sender.queue) if sender.reason else 0
            parked[sender.reason] += count
            waiting += count
        stored_ms = (each.delivery.time_ms for each in commands.values() if not each.parked)
        return len(commands) - waiting, min(stored_ms, default=None)


def _without_data(delivery: Delivery) -> Delivery:
    delivery.data, delivery.headers = b"", {}
    return delivery


async def _save_once(person: Person) -> None:
    try:
        await person.save()
    except (Temporary, LeaseLost, BusRefused) as exc:
        log.info("person.not_stored", sandbox=person.key.sandbox, reason=exc.reason)
