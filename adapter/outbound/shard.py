"""The commands of one shard, from when this replica owns it until it does not.

`on_delivery` gets each command from the shard's consumer and decides at once whose it is: it joins the queue of its
conversation, or ends here, before anything is opened, if nobody is served by it. Commands of a bot whose user is not
known wait here (`_held`), where they expire. A command stays unacknowledged in `WECHAT_OUT` until its final receipt
is stored. The body of one that waits for its user, or for which there is no room, is dropped, and read again by its
sequence when its turn comes.

The consumer delivers again what a former owner has not acknowledged. Such a command, and a copy by the router, may
have been worked on: its receipt is looked up before anything is done about it, and where nobody is served by it, the
sandbox's records are searched for it, since a command that was being sent belongs to that conversation.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import TypeVar

import msgspec
import structlog

from adapter.bindings.registry import Bindings
from adapter.contract.names import (
    H_MSG_ID,
    Names,
)
from adapter.contract.records import Binding
from adapter.errors import (
    BusRefused,
    Crashed,
    LeaseLost,
    RecordTooNew,
    Refused,
    StaleRead,
    Temporary,
    Unreadable,
)
from adapter.kit.batches import Batches
from adapter.kit.persist import persist
from adapter.kit.slots import FairSlots
from adapter.kit.tasks import TaskSet
from adapter.kit.timing import Clock, PerTickLimiter
from adapter.observability.events import Events
from adapter.observability.metrics import Metrics
from adapter.outbound import sending, window
from adapter.outbound.commands import (
    PEER,
    Limits,
    Part,
    command_id,
    decode_command,
    identity_of,
    read_command,
    salvage_ids,
)
from adapter.outbound.conversation import Conversation
from adapter.outbound.inbox import Folds, InboxReader
from adapter.outbound.receipts import Address, Receipts, is_final, result_of
from adapter.outbound.record import CommandRef, ConversationRecord
from adapter.outbound.sending import CommandResult, QueuedCommand, SendPolicy, ServingBot
from adapter.outbound.sessions import BotSessions, Successes
from adapter.outbound.store import ConversationStore
from adapter.outbound.typing_indicator import TypingIndicators
from adapter.outbound.uploads import Uploads
from adapter.outbound.window import InboundReceived
from adapter.ownership.leases import Leases
from adapter.ownership.tenure import Tenure
from adapter.ports import Account, Chat, Delivery, History
from adapter.security.seal import Sealer

log = structlog.get_logger()

T = TypeVar("T")

BODY_BYTES = 8 * 1024 * 1024
"""Bytes of bodies that a shard holds in memory."""
STORED_WITHIN_S = 1.0
"""Delay before an inbound message is stored in its record. It covers later messages."""
MISSING_CONFIRM_S = 10.0
"""Time after which a waiting command that the stream does not have is gone. A cluster that is losing its leaders may
not show all messages, and later commands overtake one that is taken for gone."""
DRAIN_S, CANCEL_GRACE_S = 5.0, 1.0
"""Time to hide typing indicators and store records at the end, and for cancelled tasks to end."""
MAX_REPLY_TO = 256
"""Most characters of an inbound message's id: a bot's name, and iLink's id of it or a digest."""


class OutboundDeps(msgspec.Struct, frozen=True):
    """What the shards of a replica need."""

    events: Events
    history: History
    names: Names
    store: ConversationStore
    chat: Chat
    uploads: Uploads
    slots: Mapping[str, FairSlots]
    """Requests to sendmessage that may be out at the same time, by base URL: one that hangs delays no other."""
    policy: SendPolicy
    limits: Limits
    receipts: Receipts
    bindings: Bindings
    leases: Leases
    sessions: BotSessions
    successes: Successes
    sealer: Sealer
    inboxes: InboxReader
    ticks: PerTickLimiter
    clock: Clock
    metrics: Metrics


class Shard:
    """What one owned shard has in memory. It ends with `drain` or `stop`."""

    def __init__(self, number: int, deps: OutboundDeps) -> None:
        self.number = number
        self.deps = deps
        self.tenure = Tenure(number, deps.leases, deps.ticks.wait_tick)
        self.is_draining = False
        self.folds = Folds(deps.inboxes, self._on_folded)
        self.typing = TypingIndicators(deps.chat, deps.clock, self.tenure.check)
        self._conversations: dict[str, dict[str, Conversation]] = {}
        """By sandbox and user."""
        self._commands: dict[int, QueuedCommand] = {}
        """All in flight, by the sequences of their identities."""
        self._held: dict[str, dict[int, QueuedCommand]] = {}
        """By bot and sequence: commands of bots whose users are not known."""
        self._heads: dict[str, dict[int, str]] = {}
        """By sandbox: the users to whom former owners were sending commands, by sequence."""
        self._body_bytes = 0
        self._missing = (-math.inf, -math.inf)
        """Span of monotonic time in which commands were missing on the bus, so that only the first of many missing
        ones takes long."""
        self._unstored: dict[Conversation, None] = {}
        """Conversations whose record lacks an inbound message."""
        self._head_reads = Batches(partial(_read_heads, deps.store))
        self._records = Batches(partial(_read_records, deps.store))
        self._tasks = TaskSet("shard")

    def __iter__(self) -> Iterator[Conversation]:
        return iter([each for of_sandbox in self._conversations.values() for each in of_sandbox.values()])

    def ensure_owner(self) -> None:
        """Raises LeaseLost unless this replica owns the shard now."""
        self.tenure.check()

    # deliveries -------------------------------------------------------------------------------------

    def on_delivery(self, delivery: Delivery) -> None:
        """Takes a delivery or redelivery."""
        if self.is_draining:
            return
        sandbox, sealer = delivery.subject.rpartition(".")[2], self.deps.sealer
        ref = identity_of(delivery.headers, delivery.data, sandbox, delivery.seq, delivery.time_ms, sealer)
        known = self._commands.get(ref.sequence)
        if known is not None and known.sequence == delivery.seq:
            known.delivery = _without_data(delivery)
        elif known is not None:  # another copy by the router, and the first is in hand
            self._tasks.spawn(delivery.ack())
        else:
            if not delivery.redelivered:
                self.deps.metrics.outbound_received.inc()
            command = self._commands[ref.sequence] = sending.unread(delivery, ref, sandbox)
            try:
                refusal = self._read(command, delivery)
                if refusal is None:
                    self._place(command)
                else:
                    self._tasks.spawn(self._end(command, refusal))
            except Exception as exc:  # the one place where the code may raise for a command that has no conversation
                log.exception("command.crashed", subject=delivery.subject, sequence=delivery.seq)
                crashed = CommandResult("dead_lettered", "crashed", type(exc).__name__)
                if not command.ref.id:
                    command.ref = msgspec.structs.replace(ref, id=str(delivery.seq))
                self._tasks.spawn(self._place_after_look(command, crashed))
            finally:
                _without_data(delivery)

    def _read(self, command: QueuedCommand, delivery: Delivery) -> CommandResult | None:
        """Reads the body. Returns how the command ends if it is none."""
        deps, ref, unreadable = self.deps, command.ref, None
        try:
            body = decode_command(delivery.data, deps.limits)
        except Unreadable as exc:
            body, unreadable = salvage_ids(delivery.data, deps.limits), exc
        ident = command_id(body.id, ref.id, delivery.headers.get(H_MSG_ID, ""), delivery.seq)
        is_named = bool(body.id) and not body.typing  # showing it again is no repeat
        command.ref = msgspec.structs.replace(ref, id=ident, is_named=is_named)
        command.reply_to = body.reply_to if body.reply_to and len(body.reply_to) <= MAX_REPLY_TO else ""
        command.is_checked = not delivery.is_old and ref.sequence == delivery.seq
        try:
            if unreadable is not None:
                raise unreadable
            read = read_command(body, sandbox=command.sandbox, stored_ms=ref.stored_ms, limits=deps.limits)
        except (Refused, Unreadable) as exc:
            deps.metrics.schema_violations.labels(kind="out").inc()
            command.user = body.user if body.user and PEER.fullmatch(body.user) else ""  # whom the receipt names
            return sending.unreadable_result(exc)
        only = read.parts[0] if len(read.parts) == 1 else None
        command.bot, command.user, command.kind, command.typing = read.bot, read.user, read.kind, read.typing
        command.part_count, command.chars = len(read.parts), len(only) if isinstance(only, str) else 0
        command.expires_ms, command.when_closed = read.expires_ms, read.when_closed
        if self._body_bytes + len(delivery.data) <= BODY_BYTES:
            command.parts, command.size = read.parts, len(delivery.data)
            self._body_bytes += command.size
        return None

    def _place(self, command: QueuedCommand) -> None:
        """Passes a command to its conversation, holds it, or ends it."""
        try:
            binding = self._binding_for(command)
        except Refused as exc:
            self._tasks.spawn(self._place_after_look(command, sending.unreadable_result(exc)))
            return
        if binding.user:
            self._conversation(command.sandbox, binding.user).enqueue(command)
        elif not command.is_checked:
            self._tasks.spawn(self._place_after_look(command, None))
        else:
            self._hold(command, binding.bot)

    def _hold(self, command: QueuedCommand, bot: str) -> None:
        """Parks a command until the bot's user is known (`on_binding`), or it expires."""
        told = sending.while_blocked(command, "window_closed", is_head=True)
        if told.outcome == "refused":
            self._tasks.spawn(self._end(command, told))
            return
        self._held.setdefault(bot, {})[command.sequence] = command
        if not command.parked:
            self._tasks.spawn(self._park(command, told))
        self._expire(command, bot)

    def _expire(self, command: QueuedCommand, bot: str) -> None:
        """Ends a command on hold when it has expired."""
        commands = self._held.get(bot, {})
        if commands.get(command.sequence) is not command:
            return
        left_ms = command.expires_ms - self.deps.clock.now_ms()
        if left_ms > 0:
            asyncio.get_running_loop().call_later(left_ms / 1000, self._expire, command, bot)
            return
        del commands[command.sequence]
        if not commands:
            del self._held[bot]
        self._tasks.spawn(self._end(command, CommandResult("refused", "expired", sending.EXPIRED)))

    def _binding_for(self, command: QueuedCommand) -> Binding:
        """The binding of the person for whom a command is meant. Raises Refused."""
        bound = self.deps.bindings.serving_sandbox(command.sandbox)
        if command.bot:
            bound = [binding for binding in bound if binding.bot == command.bot]
        if bound and command.user:
            of_user = [binding for binding in bound if binding.user == command.user]
            if not (bound := of_user or [binding for binding in bound if not binding.user]):
                raise Refused("not_bound", sending.UNSERVED)
        if not bound:
            raise Refused("not_bound", "No bot is bound to this sandbox (or not the one named): bind it first.")
        if len(bound) > 1 and {binding.user for binding in bound} != {bound[0].user or None}:
            raise Refused("ambiguous_bot", "The sandbox has several bots: name `bot` or `user`.")
        if not (command.user or command.bot) and command.ref.sequence <= bound[0].out_after:
            raise Refused("not_bound", "Another person was bound when the command was stored: name the `user`.")
        return bound[0]

    async def _place_after_look(self, command: QueuedCommand, refusal: CommandResult | None) -> None:
        """Places a command whose user is not served or not known: with whom a former owner was sending it to, or has
        parked it for. Else it ends with `refusal`; None: it is held."""
        sandbox, user = command.sandbox, ""
        try:
            if not command.is_checked:
                found = await self._persist(lambda: self.find_receipts(sandbox, [command]), command)
                if command.sequence in found:
                    await self.acknowledge(command)
                    return
                heads = await self._persist(lambda: self._heads_of(sandbox), command)
                user = heads.get(command.ref.sequence, "")
                if not (user or command.user or command.bot) and command.parked_for:
                    is_served = self.deps.bindings.serving_user(sandbox, command.parked_for)
                    user = command.parked_for if is_served else ""
                command.is_checked = True
        except Crashed as exc:  # a former owner may have sent it
            refusal = CommandResult("uncertain", detail=exc.detail)
        if user:
            self._conversation(sandbox, user).enqueue(command)
        elif refusal is None:
            self._place(command)
        elif refusal.reason == "not_bound" and not (bindings := self.deps.bindings).is_current:
            await bindings.changed.wait_until(lambda: bindings.is_current)
            self._place(command)
        else:
            await self._end(command, refusal)

    async def _heads_of(self, sandbox: str) -> dict[int, str]:
        """The users to whom former owners were sending commands, by sequence. Raises Temporary."""
        if (heads := self._heads.get(sandbox)) is None:
            heads = self._heads[sandbox] = await self._head_reads.get(sandbox) or {}
        return heads

    async def _park(self, command: QueuedCommand, told: CommandResult) -> None:
        tell, address = self.deps.receipts.tell, Address(command.sandbox)
        try:
            await self._persist(lambda: tell(command, told, address, self.tenure.check), command)
        except StaleRead:
            command.is_checked = False  # it is looked up when its turn comes
        except Crashed:  # it is told its end
            return
        command.parked = True
        self.release_body(command)

    async def _end(self, command: QueuedCommand, result: CommandResult) -> None:
        """Ends a command that is in no conversation."""
        tell, address = self.deps.receipts.tell, Address(command.sandbox, command.bot, command.user)
        try:
            await self._persist(lambda: tell(command, result, address, self.tenure.check), command)
        except Crashed:
            log.error("command.abandoned", sandbox=command.sandbox, sequence=command.sequence)
            self.release_body(command)
        else:
            await self.acknowledge(command)

    def _persist(self, work: Callable[[], Awaitable[T]], command: QueuedCommand) -> Awaitable[T]:
        """Raises LeaseLost, Crashed."""
        return persist(
            work, self.tenure, self.deps.clock, "command", sandbox=command.sandbox, sequence=command.sequence
        )

    # conversations ----------------------------------------------------------------------------------

    def _conversation(self, sandbox: str, user: str) -> Conversation:
        """The conversation, which exists from now on; it loads its record itself."""
        of_sandbox = self._conversations.setdefault(sandbox, {})
        if (conversation := of_sandbox.get(user)) is None:
            conversation = of_sandbox[user] = Conversation(self, sandbox, user)
        return conversation

    def loaded(self, sandbox: str, user: str) -> Conversation | None:
        """The conversation, if it is here with its record."""
        conversation = self._conversations.get(sandbox, {}).get(user)
        return conversation if conversation is not None and conversation.is_loaded else None

    async def conversation(self, sandbox: str, user: str) -> Conversation:
        """The conversation of a user whom a bot serves, with its record. Raises Temporary, RecordTooNew."""
        conversation = self._conversation(sandbox, user)
        if not conversation.is_loaded:
            conversation.holds += 1  # it is not dropped meanwhile
            try:
                await self.load(conversation)
            finally:
                conversation.holds -= 1
        return conversation

    async def load(self, conversation: Conversation) -> None:
        """Gives a conversation its record and the newest message behind it; many are read in one request. Raises
        Temporary, RecordTooNew."""
        sandbox, user = conversation.sandbox, conversation.user
        record, revision = await self._record_of(sandbox, user)
        newest = await self.folds.newest_of(sandbox, user, record.inbox_seq)
        conversation.on_loaded(record, revision, newest)

    async def _record_of(self, sandbox: str, user: str) -> tuple[ConversationRecord, int]:
        """The record and its revision. Raises Temporary, RecordTooNew."""
        found = await self._records.get((sandbox, user))
        if isinstance(found, RecordTooNew):
            raise found
        return found or (ConversationRecord(), 0)

    def forget_reads(self, sandbox: str) -> None:
        """Forgets what was read of a sandbox, since some of it was stale."""
        self.folds.forget(sandbox)
        self._heads.pop(sandbox, None)

    def _on_folded(self, sandbox: str, user: str, newest: InboundReceived) -> None:
        """Another owner published a message, and the conversation may be open here already."""
        conversation = self._conversations.get(sandbox, {}).get(user)
        if conversation is not None and conversation.is_loaded:
            conversation.on_inbound(newest)

    async def newest_inbound(self, conversation: Conversation) -> InboundReceived | None:
        """A message that a former owner, which may still poll, has published behind what the conversation knows.
        Raises Temporary."""
        bot = conversation.bot
        if bot is None or self.deps.sessions.is_polled_here(bot.id):
            return None
        return await self.folds.newest_of(
            conversation.sandbox, conversation.user, conversation.record.inbox_seq, again=True
        )

    def store_soon(self, conversation: Conversation) -> None:
        """Stores its record within a second, with those of others."""
        if not self._unstored:
            asyncio.get_running_loop().call_later(STORED_WITHIN_S, self._store_all)
        self._unstored[conversation] = None

    def _store_all(self) -> None:
        unstored, self._unstored = self._unstored, {}
        for conversation in unstored:
            conversation.store()

    # bots -------------------------------------------------------------------------------------------

    def bot_of(self, sandbox: str, user: str, bot: str) -> ServingBot | None:
        """The bot that serves a user now. `bot`: the last one."""
        bots = [self._serving_bot(each) for each in self.deps.bindings.serving_user(sandbox, user)]
        return min(bots, key=lambda each: (not each.is_usable, each.id != bot), default=None)

    def _serving_bot(self, binding: Binding) -> ServingBot:
        sessions, account = self.deps.sessions, Account(binding.bot, "", self.deps.sessions.base_url(binding))
        try:
            account = sessions.account(binding)
        except Refused:  # its token cannot be opened
            pass
        except Exception:  # a bug that no command caused: commands wait, and a timer checks again
            log.exception("account.crashed", bot=binding.bot)
        is_active = binding.state == "active" and not sessions.is_recovering(binding.bot)
        return ServingBot(binding.bot, is_active and bool(account.token), account)

    def restart_session(self, bot: str) -> None:
        self._tasks.spawn(self.deps.sessions.restart(bot))

    def show_typing(self, conversation: Conversation) -> None:
        """Shows the typing indicator. Best effort."""
        bot = conversation.bot
        if bot is not None and bot.account.token:
            self.typing.show(bot.account, conversation.sandbox, conversation.user, conversation.record.token)

    def on_binding(self, sandbox: str, bot: str, users: Collection[str]) -> None:
        """Handles a changed binding, or a change of its token's state. `users`: its users before and after."""
        binding = self.deps.bindings.serving(bot)
        is_served = binding is not None and binding.sandbox == sandbox
        if not is_served:
            self.folds.forget(sandbox)
        if bot in self._held and not (is_served and binding is not None and not binding.user):
            for command in self._held.pop(bot).values():
                self._place(command)
        of_sandbox = self._conversations.get(sandbox, {})
        for user, conversation in list(of_sandbox.items()):  # a sandbox may have thousands of users
            if is_served and conversation.record.unserved and self._is_idle(conversation):
                self.drop_idle(conversation)  # its record may have been erased, so it is read again
            elif user in users or bot in (conversation.record.bot, conversation.bot and conversation.bot.id):
                conversation.on_binding()

    async def end_service(self, binding: Binding) -> None:
        """Ends the commands of a bot whose binding is closing; `is_service_ended` tells when. Raises Temporary."""
        if binding.user:
            with contextlib.suppress(RecordTooNew):  # it stays as it is
                await self.conversation(binding.sandbox, binding.user)
        for conversation in self._unserved_of(binding):
            conversation.on_binding()

    def is_service_ended(self, binding: Binding) -> bool:
        """Whether the conversations of a bot that serves nobody have no command and nothing in flight, and their
        records are stored. Has them stored otherwise."""
        ended = True
        for conversation in self._unserved_of(binding):
            ended = ended and not (conversation.is_running or conversation.queue or conversation.is_dirty)
            conversation.store()
        return ended and binding.bot not in self._held

    def _unserved_of(self, binding: Binding) -> list[Conversation]:
        """The conversations of the bot's users, without users whom another bot serves."""
        return [
            each
            for each in self._conversations.get(binding.sandbox, {}).values()
            if (binding.bot == each.record.bot or binding.user == each.user)
            and self.bot_of(binding.sandbox, each.user, each.record.bot) is None
        ]

    # for conversations ------------------------------------------------------------------------------

    def is_in_flight(self, ref: CommandRef) -> bool:
        """Whether a command was delivered, and has no final receipt."""
        return ref.sequence in self._commands

    async def find_receipts(self, sandbox: str, commands: Sequence[QueuedCommand]) -> dict[int, CommandResult]:
        """The results of commands that have a final receipt, by their own sequences. Those that were parked are
        marked. Raises Temporary."""
        stored = await self.deps.receipts.find(sandbox, [command.ref for command in commands])
        found = {}
        for command in commands:
            if (last := stored.get(command.ref.sequence)) is None:
                continue
            if is_final(last.receipt):
                found[command.sequence] = result_of(last.receipt)
                if not command.delivery.redelivered:  # another copy of a command that has ended
                    self.deps.metrics.outbound_messages.child(command.kind, "duplicate", "none").inc()
                continue
            command.receipt, command.parked, command.parked_for = last.sequence, True, last.receipt.user
            self.release_body(command)
        return found

    async def result_of_repeat(self, sandbox: str, first: CommandRef) -> CommandResult | None:
        """The result of a command whose id an earlier one had; None: that one was refused after all. Raises
        Temporary."""
        receipt = await self.deps.receipts.last(sandbox, first.id, first.sequence)
        if receipt is None or not is_final(receipt):
            detail = "An earlier command with this id was sent, or may have been, and its receipt is gone."
            return CommandResult("uncertain", detail=detail, repeat_of=first.sequence)
        if receipt.outcome == "refused":  # its owner ended before it could store that
            return None
        return msgspec.structs.replace(result_of(receipt), repeat_of=first.sequence)

    def publish_receipt(
        self, command: QueuedCommand, result: CommandResult, conversation: Conversation
    ) -> Awaitable[None]:
        """Raises Temporary, LeaseLost."""
        bot = conversation.bot.id if conversation.bot is not None else conversation.record.bot
        shown = window.visible_window(conversation.record, self.deps.clock.now_ms(), self.deps.policy.window)
        address = Address(conversation.sandbox, bot, conversation.user)
        return self.deps.receipts.tell(command, result, address, self.tenure.check, shown)

    async def acknowledge(self, command: QueuedCommand) -> None:
        """Removes an ended command from the bus."""
        self.release_body(command)
        if self._commands.pop(command.ref.sequence, None) is not None:
            await command.delivery.ack()

    def release_body(self, command: QueuedCommand) -> None:
        """Drops the body of a command that waits for its user, or has ended."""
        self._body_bytes -= command.size
        command.parts, command.size = None, 0

    async def read_bodies(
        self, sandbox: str, commands: Sequence[QueuedCommand]
    ) -> Mapping[int, list[Part] | CommandResult | None]:
        """The parts of commands; how a command ends that cannot be read; None: it is gone from the bus. Raises
        Temporary, also while a missing command may only be hidden."""
        deps, now = self.deps, self.deps.clock.monotonic()
        bodies: dict[int, list[Part] | CommandResult | None] = {}
        for command in commands:
            stored = await deps.history.get(deps.names.stream_out, command.sequence)
            bodies[command.sequence] = self._parts_of(sandbox, stored.data) if stored else None
            if stored:
                self._body_bytes += len(stored.data) - command.size
                command.size = len(stored.data)
        if None in bodies.values():
            since, last = self._missing
            self._missing = since if now - last < MISSING_CONFIRM_S else now, now
            if now - self._missing[0] < MISSING_CONFIRM_S:
                raise Temporary("command_missing")
        return bodies

    def _parts_of(self, sandbox: str, data: bytes) -> list[Part] | CommandResult:
        """An adapter of another version, which parked the command, may have accepted what this one does not."""
        try:
            body = decode_command(data, self.deps.limits)
            return read_command(body, sandbox=sandbox, stored_ms=0, limits=self.deps.limits).parts
        except (Refused, Unreadable) as exc:
            return sending.unreadable_result(exc)

    # the end ----------------------------------------------------------------------------------------

    async def drain(self, grace_s: float) -> None:
        """Starts nothing more, gives requests `grace_s` seconds, stores the records, and stops."""
        self.is_draining = True
        self._held.clear()
        self._tasks.spawn(self.typing.drain(min(grace_s, DRAIN_S)))
        running = [task for each in self if (task := each.drain()) is not None]
        if running:
            await asyncio.wait(running, timeout=grace_s)
        for conversation in self:
            if conversation.is_loaded and conversation.is_dirty:
                self._tasks.spawn(_save_once(conversation))
        if not await self._tasks.wait_ended(min(grace_s, DRAIN_S)):
            log.warning("commands.cancelled", shard=self.number, tasks=len(self._tasks))
        self.stop()
        await self._tasks.wait_ended(CANCEL_GRACE_S)

    def stop(self) -> None:
        """Stops at once, since the shard is lost."""
        self.is_draining = True
        self.tenure.end()
        self.typing.stop()
        self.folds.stop()
        self._tasks.cancel_all()
        for conversation in self:
            conversation.stop()
        self._conversations.clear()  # breaks reference cycles

    # memory and metrics -----------------------------------------------------------------------------

    @property
    def tasks(self) -> int:
        """Number of tasks."""
        return len(self._tasks) + sum(each.is_running for each in self)

    @property
    def throttled_bots(self) -> set[str]:
        """Bots with a throttled window (-2)."""
        return {each.record.bot for each in self if each.record.window.throttled_at_ms}

    def _is_idle(self, conversation: Conversation) -> bool:
        is_at_rest = not (conversation.is_running or conversation.queue or conversation.holds)
        return is_at_rest and not (conversation.is_dirty or conversation.is_held_back)

    def drop_idle(self, conversation: Conversation) -> None:
        """Drops a conversation that can be read again."""
        of_sandbox = self._conversations.get(conversation.sandbox, {})
        if self._is_idle(conversation) and of_sandbox.get(conversation.user) is conversation:
            del of_sandbox[conversation.user]
            if not of_sandbox:
                del self._conversations[conversation.sandbox]

    def evict_idle(self) -> None:
        """Drops what can be read again. A record that is not stored yet is stored first, as after the last command of
        a conversation; called each half minute."""
        for conversation in self:
            conversation.store()
            self.drop_idle(conversation)
        bindings = self.deps.bindings
        self.typing.evict_idle(lambda bot: bindings.get(bot) is not None)

    def queue_depths(self, parked: Counter[str]) -> tuple[int, int | None]:
        """Adds the parked commands to `parked`, by reason. Returns the number of other commands in flight, and when
        the oldest of them was stored."""
        waiting = 0
        for conversation in self:
            count = sum(each.parked for each in conversation.queue) if conversation.reason else 0
            parked[conversation.reason] += count
            waiting += count
        held = sum(each.parked for commands in self._held.values() for each in commands.values())
        parked["window_closed"] += held
        waiting += held
        stored_ms = (each.delivery.time_ms for each in self._commands.values() if not each.parked)
        return len(self._commands) - waiting, min(stored_ms, default=None)


async def _read_heads(store: ConversationStore, sandboxes: Sequence[str]) -> Mapping[str, dict[int, str]]:
    """By sandbox: the users to whom commands were being sent, by sequence."""
    found: dict[str, dict[int, str]] = {}
    for sandbox in sandboxes:
        heads = ((user, record.head) for user, (record, _) in (await store.load_sandbox(sandbox)).items())
        found[sandbox] = {ref.sequence: user for user, head in heads if head for ref in head.commands}
    return found


async def _read_records(
    store: ConversationStore, users: Sequence[tuple[str, str]]
) -> Mapping[tuple[str, str], tuple[ConversationRecord, int] | RecordTooNew]:
    found = await store.load_all(users)
    return {user: found[user] or RecordTooNew("record_too_new") for user in found}


def _without_data(delivery: Delivery) -> Delivery:
    delivery.data, delivery.headers = b"", {}
    return delivery


async def _save_once(conversation: Conversation) -> None:
    try:
        await conversation.save()
    except (Temporary, LeaseLost, BusRefused) as exc:
        log.warning("conversation.not_stored", sandbox=conversation.sandbox, reason=exc.reason)
