"""One sandbox of a partition: applies what binds, unbinds and erases its persons, and finds the person of a command.

All that is said to a sandbox has one order, that of the stream. While a bind, unbind or erase is being applied, what
comes behind it waits. One with sequence S means only persons whose time began before S, and a command only persons
whose time began before it. Each step finds it done if it comes again, and the final receipt is looked for first.

    bind     store the binding → person begins or goes on → event
    unbind   cut the poll → end the commands that wait → store the end of the person's time → event → delete
    erase    an unbind, then, beside what follows, deletions
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import TypeVar

import msgspec
import structlog
from msgspec import structs

from adapter.bridge import controls, sending
from adapter.bridge.handover import Handover
from adapter.bridge.inflight import InFlight
from adapter.bridge.leases import Tenure
from adapter.bridge.parts import Parts
from adapter.bridge.person import Person
from adapter.bridge.receipts import Address
from adapter.bridge.record import Gone
from adapter.bridge.schedule import Schedule
from adapter.bridge.sender import Sender
from adapter.bridge.sending import CommandResult, QueuedCommand
from adapter.bridge.typing_indicator import TypingIndicators
from adapter.contract import messages as contract
from adapter.contract.messages import Bind, BindingChange, Erase, Unbind
from adapter.contract.names import (
    H_REPLY_TO,
    H_SCHEMA,
    UNROUTED,
    is_inbox,
    person_token,
)
from adapter.contract.records import Binding, PersonKey
from adapter.errors import AdapterError, Crashed, LeaseLost, Refused, StaleRead, Temporary
from adapter.tools.tasks import TaskSet

log = structlog.get_logger()

T = TypeVar("T")

GONE = "No bot is bound to this sandbox (or not the one named): bind it first."


class Sandbox:
    """What a partition has in memory of one sandbox."""

    def __init__(
        self,
        name: str,
        parts: Parts,
        tenure: Tenure,
        handover: Handover,
        commands: InFlight,
        typing: TypingIndicators,
        tasks: TaskSet,
    ) -> None:
        """`tasks`: where what takes time runs."""
        self.name = name
        self.senders: dict[PersonKey, Sender] = {}
        """Of the persons, whom they know."""
        self.schedule = Schedule(parts.clock, self._on_due)
        self._parts = parts
        self._tenure = tenure
        self._handover = handover
        self._commands = commands
        self._typing = typing
        self._tasks = tasks
        self._controls: dict[int, QueuedCommand] = {}
        """Binds, unbinds and erases without a final receipt, by their own sequences."""
        self._is_held = False
        """One of them is being applied."""
        self._waiting: list[QueuedCommand] = []
        """What came behind it."""

    # persons ----------------------------------------------------------------------------------------

    def person(self, binding: Binding) -> Person:
        """The person of a binding, who exists from now on."""
        return self._sender(binding).person

    def _sender(self, binding: Binding) -> Sender:
        key = binding.key
        if (sender := self.senders.get(key)) is None:
            on_change = partial(self._on_change, key)
            person = Person(key, self._parts, self._tenure, self._handover, self._typing, on_change)
            person.check_binding()
            sender = self.senders[key] = Sender(person, self._parts, self._commands)
        return sender

    def _on_change(self, key: PersonKey) -> None:
        if (sender := self.senders.get(key)) is not None:  # a poll that was kept may know a person who is gone here
            sender.on_change()

    def on_binding(self, binding: Binding) -> None:
        """Handles a change of a binding, or of its token's state."""
        person = self.person(binding)
        person.check_binding()
        self.drop_gone(person)

    def drop_gone(self, person: Person) -> None:
        """Forgets a person whom no binding has any more, once nothing is in hand for them."""
        is_bound = any(each.key == person.key for each in self._bindings())
        sender = self.senders.get(person.key)
        if sender is not None and sender.person is person and sender.is_idle and not is_bound:
            del self.senders[person.key]

    async def drop_all_replaced(self) -> None:
        """Of two bots of one person, which a bind has left that came to no end, the later one goes on. Raises
        Temporary, LeaseLost."""
        if not (self._is_held or self._controls):
            for binding in self._bindings():
                await self.drop_replaced(binding)

    @property
    def is_empty(self) -> bool:
        """Nothing has to be remembered."""
        return not (self.senders or self._controls or self._is_held or self.schedule)

    @property
    def controls(self) -> Iterable[QueuedCommand]:
        return self._controls.values()

    def _bindings(self) -> list[Binding]:
        return self._parts.bindings.of_sandbox(self.name)

    # order ------------------------------------------------------------------------------------------

    def take(self, command: QueuedCommand, result: CommandResult | None = None) -> None:
        """Takes a command, bind, unbind or erase. `result`: how it ends without being worked on."""
        is_control = command.kind in sending.CONTROL
        if is_control:
            self._controls[command.sequence] = command
        if result is not None and is_control:
            self._tasks.spawn(self._finish(command, result))
        elif result is not None and result.reason == "crashed":  # a former owner may have begun it
            self._place_unserved(command, result)
        elif result is not None:
            self._tasks.spawn(self._end(command, result))
        elif self._is_held:
            self._waiting.append(command)
        elif is_control:
            self._is_held = True
            self._tasks.spawn(self._run(command))
        elif command.cancel:
            self._tasks.spawn(self._cancel(command))
        else:
            self._place(command)

    def in_hand(self, sequence: int) -> QueuedCommand | None:
        """The bind, unbind or erase of this sequence that has no final receipt."""
        return self._controls.get(sequence)

    async def _run(self, control: QueuedCommand) -> None:
        """Applies a bind, unbind or erase, then takes what came behind it. Raises LeaseLost."""
        try:
            if control.is_checked or not await self._commands.find(self.name, [control]):
                result = await self._persist(partial(self._apply, control), control)
                if result is None:
                    self._tasks.spawn(self._erase(control))
                else:
                    await self._finish(control, result)
            else:
                await self._answer(control)
        except Crashed as exc:
            await self._give_up(control, exc)
        except LeaseLost:
            raise
        except Exception:  # its receipt is stored, or it comes again to the next owner: what is behind it goes on
            log.exception("control.crashed", sandbox=self.name, sequence=control.sequence)
        self._is_held = False
        waiting, self._waiting = self._waiting, []
        for command in waiting:
            self.take(command)

    async def _give_up(self, control: QueuedCommand, exc: Crashed) -> None:
        """Ends one that crashes the code. The persons go on as their bindings say. Raises LeaseLost."""
        with contextlib.suppress(Crashed):
            await self._persist(partial(self._reopen, control.ref.sequence), control)
        await self._finish(control, sending.crashed_result(exc))

    async def _finish(self, control: QueuedCommand, result: CommandResult) -> None:
        """Publishes the final receipt, answers, and acknowledges. Raises LeaseLost."""
        bind = control.control if isinstance(control.control, Bind) else None
        address = Address(self.name, control.bot, (bind.user or "") if bind is not None else "")
        if result.outcome == "refused":
            log.warning("control.refused", sandbox=self.name, verb=control.kind, reason=result.reason)
        if await self._commands.tell_final(control, result, address):
            await self._answer(control)
        else:
            del self._controls[control.sequence]

    async def _answer(self, control: QueuedCommand) -> None:
        """Acknowledges one that has its final receipt. The receipt also goes to the subject in the header Reply-To,
        which must be an inbox, so that nobody can make the adapter write elsewhere."""
        parts, ref, reply_to = self._parts, control.ref, control.delivery.headers.get(H_REPLY_TO, "")
        if is_inbox(reply_to):
            last = partial(parts.receipts.last, self.name, ref.id, ref.sequence, control.kind)
            try:
                if (receipt := await last()) is not None:
                    headers = {H_SCHEMA: contract.SCHEMA_VERSION}
                    await parts.core.publish(reply_to, msgspec.json.encode(receipt), headers)
            except AdapterError as exc:
                log.info("control.unanswered", sandbox=self.name, reason=exc.reason)
        if control.kind != "unbind":
            # An acknowledged message stays on the disk until its file is rewritten, and this one has a token or names
            # whom to forget. An ack may get lost, too, and an erase behind a bind deletes the bind's receipt.
            work = partial(parts.history.delete, parts.names.stream_out, control.sequence, erase=True)
            with contextlib.suppress(Crashed):
                await self._persist(work, control)
        self._controls.pop(control.sequence, None)
        await control.delivery.ack()

    async def _apply(self, control: QueuedCommand) -> CommandResult | None:
        """Applies it; None: an erase, whose deletions are left. Raises Temporary, BusRefused, LeaseLost."""
        await self._parts.wait_bindings()
        try:
            match control.control:
                case Bind():
                    return await self._bind(control, control.control)
                case Unbind():
                    return await self._unbind(control, control.control)
                case Erase() if control.control.dry_run:
                    return await self._parts.erasure.count(control.control.user, self.name)
                case Erase():
                    leaving = [each for each in self._before(control) if each.user == control.control.user]
                    await self._leave(leaving, control, "erased")
            return None
        except Refused as exc:
            return sending.unreadable_result(exc)

    # bind -------------------------------------------------------------------------------------------

    async def _bind(self, control: QueuedCommand, bind: Bind) -> CommandResult:
        """Binds a bot. Another bot of the same user here is replaced. Raises Refused before anything has changed."""
        bindings, number = self._parts.bindings, control.sequence
        parts, token = self._parts, controls.open_token(self.name, bind, self._parts.sealer)
        if bind.base_url:
            self._parts.chat.check_base_url(bind.base_url)
        bindings.ensure_known(bind.bot)

        def make(now: Binding | None) -> Binding | None:
            self._tenure.check()
            if now is not None and now.sandbox == self.name and now.bound >= number:  # it was applied
                return None
            others = [each for each in self._bindings() if each.bot != bind.bot and bind.user == each.user != ""]
            made = controls.new_binding(self.name, bind, now, others, token, number, parts)
            return None if now is not None and controls.is_unchanged(now, made, parts.sealer) else made

        await bindings.change(bind.bot, make)
        bindings.ensure_known(bind.bot)  # a newer version may have written meanwhile
        if (binding := bindings.get(bind.bot)) is None:
            raise Temporary("binding_gone")  # by a later owner, or by hand
        if binding.bound == number:
            await self._announce(binding, "bound", control)
        replaced = await self.drop_replaced(binding)
        return CommandResult("applied", bots=tuple(replaced))

    async def drop_replaced(self, binding: Binding) -> list[str]:
        """Ends the other bots of a person; the one that was bound last goes on. Returns them. Raises Temporary,
        LeaseLost."""
        others = [each for each in self._bindings() if each.key == binding.key and each.bound < binding.bound]
        others = [each for each in others if each.state != "too_new"]
        for each in others:
            await self._announce(each, "replaced", cause=f"{binding.bound}")  # first: a crash in between repeats it
            await self._parts.bindings.remove(each.bot, self._tenure.check)
        return [each.bot for each in others]

    # unbind and erase -------------------------------------------------------------------------------

    async def _unbind(self, control: QueuedCommand, unbind: Unbind) -> CommandResult:
        """Unbinds a bot, or all bots of the sandbox. That there is none is no error."""
        if not (unbind.bot or unbind.all):
            raise Refused("invalid", "An unbind names a `bot`, or says `all`: true.")
        leaving = [each for each in self._before(control) if unbind.all or each.bot == unbind.bot]
        await self._leave(leaving, control, "not_bound")
        return CommandResult("applied", bots=tuple(control.bots))

    async def _erase(self, control: QueuedCommand) -> None:
        """Deletes what is stored of a person who was unbound, beside what follows. Raises LeaseLost."""
        erase, erasure, check = control.control, self._parts.erasure, self._tenure.check
        assert isinstance(erase, Erase)
        work = partial(erasure.erase, erase.user, self.name, control.ref.sequence, check)
        if self.name == UNROUTED:
            work = partial(erasure.erase_everywhere, erase, control.ref, check)
        try:
            result = await self._persist(work, control)
        except Crashed as exc:
            result = sending.crashed_result(exc)
        await self._finish(control, result)

    def _before(self, control: QueuedCommand) -> list[Binding]:
        """The bindings of persons whose time began before it. Raises Refused: a newer version wrote one of them."""
        found = [each for each in self._bindings() if each.since < control.ref.sequence]
        for binding in found:
            self._parts.bindings.ensure_known(binding.bot)
        return found

    async def _leave(self, leaving: Sequence[Binding], control: QueuedCommand, gone: Gone) -> None:
        """Ends the service of bots and the time of their persons. Raises Temporary, BusRefused, LeaseLost."""
        parts, check = self._parts, self._tenure.check
        keys = {each.key for each in leaving}
        senders = [self._sender(each) for each in {each.key: each for each in leaving}.values()]
        self.schedule.move(lambda _, sender: sender in senders)
        for sender in senders:
            sender.person.leave(gone)
        for binding in (each for each in self._bindings() if each.key in keys):
            await parts.sessions.end_poll(binding.bot, gone)
        for sender in senders:
            await sender.wait_idle()
            check()
            await parts.persons.end(sender.person.key, check, erased=gone == "erased")
        for binding in leaving:
            await self._announce(binding, "unbound", control)
            if binding.bot not in control.bots:
                control.bots.append(binding.bot)
            await parts.bindings.remove(binding.bot, check)
        # a former owner cuts their polls now; a bind must not poll beside
        handover, tenure, bots = self._handover, self._tenure, {control.bot, *control.bots} - {""}
        await handover.changed.wait_until(
            lambda: tenure.is_over or all(map(handover.may_poll, bots)), also=tenure.changed
        )
        check()

    async def _reopen(self, number: int) -> None:
        """Lets the persons go on whom a bind, unbind or erase has not ended. One whose end is stored begins a new
        time. Raises Temporary, LeaseLost."""
        parts = self._parts
        for binding in self._bindings():
            key = binding.key
            if key.since < number and await parts.persons.has_ended(key):
                await parts.bindings.update(binding.bot, partial(self._with_new_time, key, number))
            elif (sender := self.senders.get(key)) is not None and sender.person.gone:
                sender.person.leave("")
        parts.bindings.changed.notify_all()  # pollers wait

    def _with_new_time(self, key: PersonKey, number: int, now: Binding) -> Binding | None:
        self._tenure.check()
        return structs.replace(now, since=number) if now.key == key else None

    async def _announce(
        self, binding: Binding, change: BindingChange, control: QueuedCommand | None = None, cause: str = ""
    ) -> None:
        """Publishes an event. A repeat after a crash is a duplicate, which the stream drops."""
        event = binding.event(change, request=control.ref.id if control is not None else "")
        cause = cause or (f"{control.ref.sequence}" if control is not None else "")
        await self._parts.events.publish_binding_event(event, cause=cause, ensure_owner=self._tenure.check)
        log.info("binding.changed", change=change, sandbox=binding.sandbox, bot=binding.bot)

    # commands ---------------------------------------------------------------------------------------

    def _place(self, command: QueuedCommand) -> None:
        """Passes a command to its person, or ends it."""
        try:
            binding = self._binding_for(command)
        except Refused as exc:
            self._place_unserved(command, sending.unreadable_result(exc))
        except Exception as exc:  # no person is known whose queue would end it
            log.exception("command.crashed", sandbox=self.name, sequence=command.sequence)
            self._place_unserved(command, sending.crashed_result(exc))
        else:
            sender = self._sender(binding)
            if self.schedule.is_due(command):
                sender.enqueue(command)
            else:
                self.schedule.add(command, sender)
                self._tasks.spawn(self._say_scheduled(command, sender))

    async def _say_scheduled(self, command: QueuedCommand, sender: Sender) -> None:
        """Tells that a command waits for its time, unless a former owner has. Raises LeaseLost."""
        try:
            if not command.is_checked and command.sequence in await self._commands.find(self.name, [command]):
                self.schedule.move(lambda each, _: each is command)  # it has ended, which its queue finds
                return
            command.is_checked = True
            if not command.receipt:
                await self._commands.tell(command, sending.SCHEDULED, sender.address, sender.shown)
        except (Crashed, StaleRead) as exc:
            log.info("command.not_told", sandbox=self.name, sequence=command.sequence, reason=exc.reason)
        else:
            command.parked = not self.schedule.is_due(command)
            self._commands.release_body(command)

    def _on_due(self, command: QueuedCommand) -> None:
        command.parked = False  # it is told anew if it has to wait longer
        self.take(command)

    async def _cancel(self, cancel: QueuedCommand) -> None:
        """Takes back the earlier commands with an id that have not ended. Raises LeaseLost."""
        ident, before = cancel.cancel, cancel.ref.sequence
        self.schedule.move(lambda each, _: each.ref.id == ident and each.ref.sequence < before)
        found = [each for sender in self.senders.values() for each in sender.cancel(ident, before)]
        for command in found:
            await self._commands.wait_ended(command)
        try:  # a former owner may have ended them
            last = await self._persist(partial(self._parts.receipts.last, self.name, ident, None), cancel)
        except Crashed as exc:
            await self._end(cancel, sending.crashed_result(exc))
            return
        is_done = last is not None and last.reason == sending.CANCELLED.reason
        await self._end(cancel, CommandResult("applied") if is_done else sending.NOT_FOUND)

    def _place_unserved(self, command: QueuedCommand, refusal: CommandResult) -> None:
        """Places a command that nobody serves with whom a former owner was sending it to: at once, since that one's
        queue waits for no command. Else its receipt is looked up."""
        if (sender := self._who_has_begun(command)) is not None:
            sender.enqueue(command)
        else:
            self._tasks.spawn(self._place_after_look(command, refusal))

    def _binding_for(self, command: QueuedCommand) -> Binding:
        """The binding of the person for whom a command is meant, who was bound when it was stored. Raises Refused."""
        bound = [each for each in self._bindings() if each.since < command.ref.sequence]
        if command.bot:
            bound = [binding for binding in bound if binding.bot == command.bot]
        if bound and command.user:
            of_user = [binding for binding in bound if binding.user == command.user]
            # who answers as iLink names whom it likes: a user whom a bind has named is nobody else's
            named = person_token(self.name, command.user)
            of_user = [binding for binding in of_user if binding.key.person == named] or of_user
            if not (bound := of_user or [binding for binding in bound if not binding.user]):
                raise Refused("not_bound", sending.UNSERVED.detail)
        if not bound:
            raise Refused("not_bound", GONE)
        if len({binding.key for binding in bound}) > 1:
            raise Refused("ambiguous_bot", "The sandbox has several bots: name `bot` or `user`.")
        return bound[0]

    async def _end(self, command: QueuedCommand, result: CommandResult) -> None:
        """Ends a command that is nobody's. Raises LeaseLost."""
        await self._commands.end([(command, result)], Address(self.name, command.bot, command.user))

    async def _place_after_look(self, command: QueuedCommand, refusal: CommandResult) -> None:
        """Places a command that nobody serves with whom a former owner has parked it for. Else it ends with
        `refusal`. Raises LeaseLost."""
        sender = None
        try:
            if not command.is_checked:
                if command.sequence in await self._commands.find(self.name, [command]):
                    await self._commands.acknowledge(command)
                    return
                sender = self._who_has_begun(command)
                command.is_checked = True
        except Crashed as exc:  # a former owner may have sent it
            refusal = CommandResult("uncertain", detail=exc.detail)
        if sender is not None:
            sender.enqueue(command)
        else:
            await self._end(command, refusal)

    def _who_has_begun(self, command: QueuedCommand) -> Sender | None:
        """That of the person to whom a former owner was sending a command, or for whom it has parked it."""
        sequence = command.ref.sequence
        senders = [each for each in self.senders.values() if each.person.key.since < sequence]
        for sender in senders:
            if (head := sender.person.state.progress) is not None and head.has_command(command.ref):
                return sender
        if command.user or command.bot or not command.parked_for:
            return None
        former = (each for each in senders if each.person.user == command.parked_for)
        return next((each for each in former if each.person.bot is not None), None)

    def _persist(self, work: Callable[[], Awaitable[T]], control: QueuedCommand) -> Awaitable[T]:
        """Raises LeaseLost, Crashed."""
        return self._tenure.persist(work, control.kind, sandbox=self.name, sequence=control.sequence)
