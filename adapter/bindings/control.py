"""Control commands (bind, unbind, erase): one applier, the owner of partition 0, applies them in their stored order.

A command claims all its keys at once: its bot, its sandbox, the bot's present sandbox, a person who is named. It
waits for earlier commands that have or want one of them. Commands without common keys are applied at the same time,
so that one that waits (for an owner's confirmation, for NATS) delays no other person.

The outcome of a command is remembered for a day. A command that was applied is not applied again, whether it is
delivered again or stored again with the same id: an old bind would undo a later unbind.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeAlias

import msgspec
import structlog
from msgspec import structs

from adapter.bindings.binder import Binder
from adapter.bindings.registry import Bindings
from adapter.contract import messages as contract
from adapter.contract.messages import Bind, BindingEvent, ControlAnswer, Erase, Unbind
from adapter.contract.names import H_ERROR, H_ERROR_CODE, H_MSG_ID, H_REPLY_TO, H_SCHEMA, in_words, is_inbox
from adapter.contract.records import ControlOutcome
from adapter.errors import (
    UNDECODABLE,
    AdapterError,
    BusRefused,
    Crashed,
    LeaseLost,
    RecordTooNew,
    Refused,
    Temporary,
    Unreadable,
)
from adapter.kit.persist import Owner, persist
from adapter.kit.tasks import TaskSet
from adapter.kit.timing import Clock
from adapter.observability.events import Events
from adapter.observability.metrics import Metrics
from adapter.ports import Bucket, CoreBus, Delivery, Entry

log = structlog.get_logger()

MAX_BYTES = 262_144
"""Largest command; a larger one becomes a dead letter. A bind may have the longest cursor that a poll returns."""
PENDING_S = 60.0
"""Time after which an author is told that a command takes longer."""
OUTCOME = "control."
"""Beginning of the keys of outcomes in the bucket `logins`, which forgets after a day."""
ControlCommand: TypeAlias = Bind | Unbind | Erase
_KINDS: dict[str, type[ControlCommand]] = {"bind": Bind, "unbind": Unbind, "erase": Erase}


class Control:
    """Applies commands during one tenure of partition 0."""

    def __init__(
        self,
        binder: Binder,
        bindings: Bindings,
        outcomes: Bucket,
        events: Events,
        core: CoreBus,
        *,
        wait_complete: Callable[[], Awaitable[object]],
        owner: Owner,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        """`wait_complete` returns when the bucket of bindings is complete; a write
        before that would be overwritten by its restore. `owner`: its check raises LeaseLost on a replica that was cut
        off: another one may have applied its commands, and later ones."""
        self._binder = binder
        self._bindings = bindings
        self._outcomes = outcomes
        self._events = events
        self._core = core
        self._wait_complete = wait_complete
        self._owner = owner
        self._clock = clock
        self._metrics = metrics
        self._tasks = TaskSet("control")
        self._changed = asyncio.Event()
        """Set when a command arrives or ends."""
        self._deliveries: dict[int, Delivery] = {}
        """The newest delivery of each command that has not ended, whose acknowledgement counts, by sequence."""
        self._waiting: dict[int, ControlCommand | Unreadable] = {}
        """Commands that have not begun, in their order."""
        self._claims: dict[int, set[str]] = {}
        """Keys of the commands that have begun."""

    # order ------------------------------------------------------------------------------------------

    def enqueue(self, delivery: Delivery) -> None:
        """Queues a command once. It is redelivered after each connect until its acknowledgement arrives."""
        if delivery.seq not in self._deliveries:
            try:
                self._waiting[delivery.seq] = decode(delivery)
            except Unreadable as exc:
                self._waiting[delivery.seq] = exc
            self._changed.set()
        self._deliveries[delivery.seq] = delivery

    async def run(self) -> None:
        """Applies commands until cancelled. The next owner gets those that have not ended."""
        try:
            # the copy of the bucket here may lag behind what the former owner of partition 0 wrote last
            await persist(self._bindings.reload, self._owner, self._clock, "control.reload")
            while True:
                await self._changed.wait()
                self._changed.clear()
                self._begin_ready()
        finally:
            self._tasks.cancel_all()

    def _begin_ready(self) -> None:
        """Begins each waiting command whose keys no earlier command has or wants."""
        blocked = set[str]().union(*self._claims.values())
        for number, command in list(self._waiting.items()):
            keys = self._keys_of(command)
            if not keys & blocked:
                del self._waiting[number]
                self._claims[number] = keys
                self._tasks.spawn(self._process(number, command))
            blocked |= keys

    def _keys_of(self, command: ControlCommand | Unreadable) -> set[str]:
        if isinstance(command, Erase):
            bound = [each for each in self._bindings if each.user == command.user]
            named = {command.sandbox} if command.sandbox else {each.sandbox for each in bound}
            return {
                f"user {command.user}",
                *(f"sandbox {sandbox}" for sandbox in named),
                *(f"bot {each.bot}" for each in bound),
            }
        if isinstance(command, Unreadable):
            return set()
        keys = {f"sandbox {command.sandbox}"}
        if command.bot:
            keys.add(f"bot {command.bot}")
            if present := self._bindings.get(command.bot):
                keys.add(f"sandbox {present.sandbox}")
        if isinstance(command, Bind) and command.user:
            keys.add(f"user {command.user}")
        return keys

    async def _process(self, number: int, command: ControlCommand | Unreadable) -> None:
        """Applies one command, and acknowledges it. One that keeps crashing becomes a dead letter."""
        pending = self._tasks.spawn(self._answer_pending(number))
        try:
            await self._wait_complete()
            work = partial(self._apply, number, command)
            try:
                await persist(work, self._owner, self._clock, "control", sequence=number)
            except Crashed as exc:
                work = partial(self._give_up, number, exc)
                await persist(work, self._owner, self._clock, "control.give_up", sequence=number)
            await self._deliveries.pop(number).ack()
        except LeaseLost:  # it is delivered to the next owner
            log.info("control.lease_lost", sequence=number)
        finally:
            pending.cancel()
            self._claims.pop(number, None)
            self._changed.set()

    # one command ------------------------------------------------------------------------------------

    async def _apply(self, number: int, command: ControlCommand | Unreadable) -> None:
        """Applies and answers a command. Raises Temporary, LeaseLost."""
        self._owner.check()
        delivery, binder, reason = self._deliveries[number], self._binder, None
        if isinstance(command, Unreadable):
            self._metrics.schema_violations.labels(kind="ctl").inc()
            await self._dead_letter(delivery, command)
            return
        key = _outcome_key(command, f"#{delivery.seq}.{delivery.time_ms}")
        entry = await self._outcomes.get(key)
        is_dry = isinstance(command, Erase) and command.dry_run
        known = None if is_dry else _outcome_in(entry)
        if known is not None and (known.answer.ok or known.sequence == number):
            bound = self._bindings.get(command.bot) if isinstance(command, Bind) else None
            now = [bound.info()] if bound is not None and bound.sandbox == command.sandbox else []
            await self._answer(delivery, structs.replace(known.answer, bindings=now))
            return
        try:
            if isinstance(command, Bind):
                answer = await binder.bind(command, number)
            elif isinstance(command, Unbind):
                answer = await binder.unbind(command, number)
            else:
                answer = await binder.erase(command, number)
        except RecordTooNew as exc:
            raise Temporary(exc.reason, exc.detail) from exc  # until this replica is replaced, too
        except (Refused, BusRefused) as exc:
            await binder.reopen(number)
            answer, reason = await self._refuse(command, exc), exc.reason
        if not is_dry:
            kept = structs.replace(answer, bindings=[], replaced=[])  # what would name persons and their bots
            outcome = ControlOutcome(sequence=number, answer=kept, reason=reason)
            self._owner.check()
            await self._outcomes.update(key, msgspec.json.encode(outcome), entry.revision if entry else 0)
        await self._answer(delivery, answer)

    async def _refuse(self, command: ControlCommand, exc: Refused | BusRefused) -> ControlAnswer:
        if not isinstance(command, Erase):
            event = BindingEvent(
                sandbox=command.sandbox,
                bot=command.bot or "",
                change="refused",
                reason=exc.reason,
                detail=exc.detail,
                request=command.id or "",
            )
            await self._events.publish_binding_event(event, ensure_owner=self._owner.check)
            log.warning("binding.refused", sandbox=command.sandbox, bot=command.bot, reason=exc.reason)
        return ControlAnswer(ok=False, id=command.id or "", error=exc.detail)

    async def _give_up(self, number: int, exc: Crashed) -> None:
        """Raises Temporary."""
        await self._binder.reopen(number)
        await self._dead_letter(self._deliveries[number], exc)

    async def _dead_letter(self, delivery: Delivery, exc: Unreadable | Crashed) -> None:
        is_secret = not delivery.subject.endswith(".unbind")  # it holds a token, or names a person to forget
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
        await self._answer(delivery, ControlAnswer(ok=False, id=_id_of(delivery), error=exc.detail))

    async def _answer_pending(self, number: int) -> None:
        """Tells the author of a command that it takes longer."""
        await self._clock.sleep(PENDING_S)
        log.warning("control.pending", sequence=number)
        delivery = self._deliveries[number]
        advice = "It is not done after a minute: a replica or NATS is away, or there is much to erase. It goes on."
        await self._answer(delivery, ControlAnswer(ok=False, id=_id_of(delivery), pending=True, error=advice))

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
            await self._core.publish(reply_to, msgspec.json.encode(answer), headers)
        except AdapterError as exc:
            log.info("control.unanswered", reason=exc.reason)


def decode(delivery: Delivery) -> ControlCommand:
    """Raises Unreadable."""
    if len(delivery.data) > MAX_BYTES:
        raise Unreadable("too_large", f"At most {MAX_BYTES} bytes are read.")
    try:
        command = msgspec.json.decode(delivery.data, type=_KINDS[delivery.subject.rpartition(".")[2]])
    except UNDECODABLE as exc:
        raise Unreadable("unreadable", in_words(exc)) from exc
    return structs.replace(command, id=_id_of(delivery) or None)


class _Named(msgspec.Struct):
    id: contract.CommandId | None = None


def _id_of(delivery: Delivery) -> str:
    """The id of a command, also of one that cannot be read."""
    with contextlib.suppress(*UNDECODABLE):
        if ident := msgspec.json.decode(delivery.data, type=_Named).id:
            return ident
    return delivery.headers.get(H_MSG_ID, "")[:128]


async def find_outcome(bucket: Bucket, command: ControlCommand) -> ControlOutcome | None:
    """What became of a command with an id, if it has ended within a day. Raises Temporary."""
    return _outcome_in(await bucket.get(_outcome_key(command)))


def _outcome_in(entry: Entry | None) -> ControlOutcome | None:
    if entry is None or entry.value is None:
        return None
    try:
        return msgspec.json.decode(entry.value, type=ControlOutcome)
    except UNDECODABLE:  # of a newer version: the command is applied again
        return None


def _outcome_key(command: ControlCommand, own_id: str = "") -> str:
    """`own_id`: stands for a missing id. One used for several persons or bots is another command for each."""
    meant = command.user if isinstance(command, Erase) else command.bot or ""
    ident = f"{type(command).__name__} {command.sandbox} {meant} {command.id or own_id}"
    return OUTCOME + hashlib.sha256(ident.encode()).hexdigest()[:32]
