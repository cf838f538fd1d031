"""The conversations of one shard: hands each command to the one that it is for, and tells them what changes.

After a take-over the commands come again. Which of them has ended is asked of their receipts, in batches; which one
was being sent, and to whom, of the records of the sandbox's conversations. All else was never begun.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

import msgspec
import structlog

from adapter import contract
from adapter.bindings.registry import Bindings
from adapter.conversation import rules, window
from adapter.conversation.actor import ConversationActor, ConversationDeps
from adapter.conversation.commands import Command, Limits, Part
from adapter.conversation.record import ConversationRecord
from adapter.conversation.rules import Bot, CommandResult, Conversation, QueuedCommand
from adapter.crashes import TRIES
from adapter.dedup import bot_of
from adapter.errors import AdapterError, Crashed, LeaseLost, Refused
from adapter.events import Events
from adapter.names import Names
from adapter.outbound.intake import CommandIntake, ReadCommand
from adapter.outbound.ledger import CommandLedger
from adapter.outbound.receipts import Address, Receipts, StoredReceipt, is_final, result_of
from adapter.outbound.trials import Trials
from adapter.outbound.typing_indicator import TypingDeps, TypingIndicators
from adapter.ports import Account, Archive, Bucket, TextReader
from adapter.records import Binding
from adapter.replicas.leases import Leases
from adapter.tasks import Tasks
from adapter.timing import any_of, backoff, first_of

log = structlog.get_logger()

T = TypeVar("T")

PAUSED_S = 5.0
"""How long a wait for the lease lasts before it looks again."""
TYPING_DRAIN_S = 12.0
"""At the end typing is hidden in this time, in which one call may hang, or with the next owner's first answer."""
CANCEL_GRACE_S = 1.0
"""For what is cancelled to end."""


class Sessions(Protocol):
    """What is known of the bots' sessions with iLink."""

    def is_recovering(self, bot: str) -> bool:
        """Whether a bot's token is being tried again: nothing may be sent for it."""

    async def is_alive(self, bot: str) -> bool:
        """Whether iLink takes the bot's token elsewhere. Raises Temporary."""


class OutboundDeps(NamedTuple):
    """What the shards of a replica need."""

    conversation: ConversationDeps
    bindings: Bindings
    leases: Leases
    receipts: Receipts
    events: Events
    history: Archive
    texts: TextReader
    claims: Bucket
    """Where it is noted what an owner is reading, see Trials."""
    sessions: Sessions
    typing: TypingDeps
    names: Names
    limits: Limits
    account: Callable[[Binding], Account]
    """Raises Refused("token_key")."""
    wait_for_pending_binds: Callable[[], Awaitable[None]]
    """Returns once every bind command stored before the call has taken effect. Raises Temporary."""


class Draining(Exception):
    """The service stops: what is in flight stays unacknowledged, and comes again to the next owner."""


class _Before(NamedTuple):
    """What the owner before left of the commands of a sandbox."""

    receipts: dict[int, StoredReceipt]
    """The last of each command, by the commands' sequences."""
    records: dict[str, tuple[ConversationRecord, int]]
    """By user; with their revisions."""
    known: set[int]
    """Sequences that were looked up."""

    def user_of_head(self, sequence: int) -> str | None:
        """To whom a command was being sent; None: to nobody."""
        heads = ((user, record.head) for user, (record, _) in self.records.items() if record.head)
        return next((user for user, head in heads if head.has_command(sequence)), None)


class ShardCommandProcessor:
    """One shard, as long as this replica owns it."""

    def __init__(self, shard: int, deps: OutboundDeps) -> None:
        self.shard = shard
        self._deps = deps
        self._conversations: dict[str, dict[str, ConversationActor]] = {}
        """By sandbox and user; by `_unknown_user` of the bot while its user is not known."""
        self._loading: dict[tuple[str, str], asyncio.Future[None]] = {}
        self._unplaced: dict[str, deque[ReadCommand]] = {}
        """Per sandbox, in order: commands whose conversation is not known yet, and those behind them."""
        self._accounts: dict[str, tuple[Binding, Account]] = {}
        self._tasks = Tasks(partial(_report, shard))
        self._draining = asyncio.Event()
        self._lost = False
        self.typing = TypingIndicators(shard, deps.typing)
        clock, metrics = deps.conversation.clock, deps.conversation.metrics
        self.commands = CommandLedger(
            deps.receipts, deps.events, deps.history, deps.names, deps.limits, deps.texts, clock, metrics
        )
        self.intake = CommandIntake(
            self.commands,
            deps.history,
            deps.names,
            deps.limits,
            clock,
            metrics,
            deps.texts,
            Trials(deps.claims, shard) if shard in deps.leases.inherited else None,
            self.ensure_owner,
            self._draining,
            self._tasks,
        )
        self.intake.on_command = self._place_or_queue
        self.intake.on_unreadable = self._end_soon

    # whom a command is for --------------------------------------------------------------------------

    def _place_or_queue(self, read: ReadCommand) -> None:
        """Hands a command to its conversation at once where that is known; else behind the others of its sandbox."""
        sandbox = read.command.sandbox
        if sandbox not in self._unplaced:
            if not read.redelivered:
                with contextlib.suppress(Refused):
                    binding = _find_binding(read.command, self._deps.bindings)
                    user = read.command.user or binding.user or _unknown_user(binding.bot)
                    actor = self._conversations.get(sandbox, {}).get(user)
                    if actor and _is_surely_for(read.command, binding):
                        actor.put(rules.Stored((read.queued,)))
                        return
            self._unplaced[sandbox] = deque()
            self._tasks.spawn(self._place_all(sandbox))
        self._unplaced[sandbox].append(read)

    async def _place_all(self, sandbox: str) -> None:
        """Hands the commands of a sandbox to their conversations, in order."""
        waiting, before, one_by_one = self._unplaced[sandbox], _Before({}, {}, set()), False
        while waiting:
            asked = [waiting[0]] if one_by_one else waiting
            try:
                await self._retry(sandbox, partial(self._look_up, sandbox, asked, before))
                await self._retry(sandbox, partial(self._place, waiting[0], before))
            except Crashed as exc:
                if not one_by_one:  # which one is at fault shows then
                    one_by_one = True
                    continue
                await self._end_crashed(waiting[0], exc)
            waiting.popleft()
        del self._unplaced[sandbox]

    async def _end_crashed(self, read: ReadCommand, exc: Crashed) -> None:
        """What cannot be handed to its conversation ends. The owner before may have sent it."""
        command, result = read.command, CommandResult("dead_lettered", exc.reason, exc.detail)
        if read.redelivered:
            result = result._replace(outcome="uncertain", reason="")
        with contextlib.suppress(Crashed):  # without a receipt it comes again to the next owner
            await self._end(read.queued, result, Address(command.sandbox, command.bot, command.user))

    async def _look_up(self, sandbox: str, waiting: Iterable[ReadCommand], before: _Before) -> None:
        """What the owner before did with those commands that were delivered before. Raises Temporary."""
        refs = [read.queued.ref for read in waiting if read.redelivered]
        refs = [ref for ref in refs if ref.sequence not in before.known]
        if not refs:
            return
        records = await self._deps.conversation.store.load_sandbox(sandbox)
        heads = {user: record.head.commands for user, (record, _) in records.items() if record.head}
        asked = {ref.sequence: ref for ref in (*refs, *(ref for head in heads.values() for ref in head))}
        receipts = await self._deps.receipts.find(sandbox, asked.values())
        for user, head in heads.items():
            if user not in before.records:
                actor = await self._conversation(sandbox, user, known=records[user])
                for ref in head:
                    if (stored := receipts.get(ref.sequence)) and is_final(stored.receipt):
                        actor.put(rules.Ended(ref.sequence, result_of(stored.receipt)))
        before.receipts.update(receipts)
        before.records.update(records)
        before.known.update(ref.sequence for ref in refs)

    async def _place(self, read: ReadCommand, before: _Before) -> None:
        """Raises Temporary."""
        command, queued, sequence = read.command, read.queued, read.queued.ref.sequence
        sent_to = before.user_of_head(sequence) if read.redelivered else None
        if stored := before.receipts.get(sequence):
            if is_final(stored.receipt):
                await self.commands.acknowledge(queued)
                return
            self.commands.adopt_receipt(queued, stored.sequence)
            queued = msgspec.structs.replace(queued, parked=True)
        if sent_to is not None:  # whatever is bound now
            actor = await self._conversation(command.sandbox, sent_to, known=before.records.get(sent_to))
        else:
            try:
                binding = await self._find_person(command)
            except Refused as exc:
                result = CommandResult("refused", exc.reason, exc.detail)
                await self._end(queued, result, Address(command.sandbox, command.bot, command.user))
                return
            user = command.user or binding.user
            actor = await self._conversation(command.sandbox, user, binding.bot, known=before.records.get(user))
        actor.put(rules.Stored((queued,)))

    async def _find_person(self, command: Command) -> Binding:
        """The binding that a command is meant for. Raises Temporary; Refused also where another person was meant:
        each would see what was meant for the other."""
        try:
            binding = _find_binding(command, self._deps.bindings)
        except Refused:
            await self._deps.wait_for_pending_binds()
            binding = _find_binding(command, self._deps.bindings)
        if _is_older(command, binding):
            raise Refused("not_bound", "The person who was bound as it was stored is not bound now: name the `user`.")
        if not _is_answer_to(command, binding):
            authors = await self._find_authors(command)
            if authors and (command.user or binding.user) not in authors:
                raise Refused(
                    "other_user", "It answers another person than it goes to: name the `user` of the message."
                )
        return binding

    async def _find_authors(self, command: Command) -> set[str]:
        """Who may have written the message that a command answers; none: that is not known. Raises Temporary."""
        bot = bot_of(command.reply_to)
        records = await self._deps.conversation.store.load_sandbox(command.sandbox)
        authors = {user for user, (record, _) in records.items() if record.bot == bot}
        if binding := self._deps.bindings.get(bot):  # it may serve another sandbox
            authors.add(binding.user)
        return authors - {""}

    # conversations ----------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[ConversationActor]:
        return iter([actor for actors in self._conversations.values() for actor in actors.values()])

    async def conversation(self, binding: Binding, user: str) -> ConversationActor:
        """The conversation of a bot's user, read from the bucket the first time. Raises Temporary."""
        return await self._conversation(binding.sandbox, user, binding.bot)

    async def _conversation(
        self, sandbox: str, user: str, bot: str = "", *, known: tuple[ConversationRecord, int] | None = None
    ) -> ConversationActor:
        """`known`: its record, where that was read just now. Raises Temporary."""
        key = user or _unknown_user(bot)
        while (actor := self._conversations.get(sandbox, {}).get(key)) is None:
            if (loading := self._loading.get((sandbox, key))) is not None:
                await asyncio.wait([loading])
                continue
            loading = self._loading[sandbox, key] = asyncio.get_running_loop().create_future()
            try:
                record, revision = ConversationRecord(), 0
                if user:
                    record, revision = known or await self._deps.conversation.store.load(sandbox, user)
                record = record if record.bot else ConversationRecord(bot=bot)
                state = Conversation(
                    sandbox=sandbox, user=user, record=record, bot=self.bot_of(sandbox, user, record.bot)
                )
                actor = ConversationActor(state, revision, self, self._deps.conversation)
                self._conversations.setdefault(sandbox, {})[key] = actor
                if self._draining.is_set():  # none begins any more
                    actor.stop()
            finally:
                del self._loading[sandbox, key]
                loading.set_result(None)
        return actor

    def on_heard(self, binding: Binding, user: str) -> None:
        self.typing.retry_ticket(binding.bot, user)

    def record_in_memory(self, sandbox: str, user: str) -> ConversationRecord | None:
        """A record as its conversation knows it; None where it was not read."""
        actor = self._conversations.get(sandbox, {}).get(user)
        return actor.state.record if actor else None

    async def wake(self, binding: Binding) -> None:
        """Reads the conversation of a bot that is polled here from now on: its window may have changed, and a poller
        that ends elsewhere may have heard the user. Raises Temporary."""
        if binding.user:
            await (await self.conversation(binding, binding.user)).adopt_stored()

    def on_binding(self, sandbox: str) -> None:
        """A binding of the sandbox changed, or what is known of its token."""
        self.typing.rebound(sandbox)
        for key, actor in list(self._conversations.get(sandbox, {}).items()):
            binding = self._deps.bindings.get(key.removeprefix(_UNKNOWN))
            if not actor.state.user and binding is not None and binding.sandbox == sandbox and binding.user:
                del self._conversations[sandbox][key]  # its user became known
                if queue := actor.take_queue():
                    self._tasks.spawn(self._move(binding, queue))
            else:
                actor.refresh_bot()

    async def _move(self, binding: Binding, queue: tuple[QueuedCommand, ...]) -> None:
        try:
            actor = await self._retry(binding.sandbox, lambda: self.conversation(binding, binding.user))
        except Crashed as exc:
            result = CommandResult("dead_lettered", exc.reason, exc.detail)
            for command in queue:
                self._end_soon(command, result, Address(binding.sandbox, binding.bot, binding.user))
        else:
            actor.put(rules.Stored(queue))

    # actor.Shard --------------------------------------------------------------------------------------

    def ensure_owner(self) -> None:
        if self._lost:
            raise LeaseLost("lease_lost", f"shard {self.shard}")
        self._deps.leases.check(self.shard)

    async def wait_owned(self) -> None:
        await any_of(self._deps.leases.held(self.shard), self._draining.wait(), timeout_s=PAUSED_S)

    def bot_of(self, sandbox: str, user: str, bot: str) -> Bot | None:
        bound = self._deps.bindings.of_sandbox(sandbox)
        found = [binding for binding in bound if user and binding.user == user]
        found = found or [binding for binding in bound if binding.bot == bot]
        if not found:
            return None
        best = next((binding for binding in found if self._is_usable(binding)), found[0])
        return Bot(best.bot, self._is_usable(best))

    def _is_usable(self, binding: Binding) -> bool:
        if binding.state == "needs_login" or self._deps.sessions.is_recovering(binding.bot):
            return False
        try:
            self.account_of(binding.sandbox, binding.bot)
        except Refused:  # its token cannot be opened
            return False
        except Exception:  # a bug, and no command's: they wait, and it is looked at again
            log.exception("account.crashed", bot=binding.bot)
            return False
        return True

    def account_of(self, sandbox: str, bot: str) -> Account:
        binding = self._deps.bindings.get(bot)
        if binding is None or binding.sandbox != sandbox:
            raise Refused("not_bound", "The bot serves this sandbox no more.")
        known = self._accounts.get(bot)
        if known is None or known[0] is not binding:  # a token is opened once, not for each send
            known = self._accounts[bot] = binding, self._deps.account(binding)
        return known[1]

    async def is_session_alive(self, bot: str) -> bool:
        return await self._deps.sessions.is_alive(bot)

    async def load_bodies(self, sandbox: str, sequences: Sequence[int]) -> dict[int, list[Part] | None]:
        return await self.commands.load_bodies(sandbox, sequences)

    async def publish_receipt(self, command: QueuedCommand, result: CommandResult, state: Conversation) -> None:
        address = Address(state.sandbox, state.bot.id if state.bot else state.record.bot, state.user)
        await self.commands.publish_receipt(command, result, address, self._shown(state))

    async def acknowledge(self, command: QueuedCommand, *, is_duplicate: bool = False) -> None:
        if is_duplicate:
            log.info("command.duplicate", shard=self.shard, command=command.ref.id)
            self._deps.conversation.metrics.outbound_messages.of(command.kind, "duplicate", "none").inc()
        await self.commands.acknowledge(command)

    def release_body(self, command: QueuedCommand) -> None:
        self.commands.release_body(command)

    def set_typing(self, state: Conversation, command: QueuedCommand | None, *, is_on: bool) -> None:
        binding = self._deps.bindings.get(state.bot.id) if state.bot else None
        if binding is None:
            if command is not None:
                gone = CommandResult("refused", "not_bound", "The bot serves this sandbox no more.")
                self._end_soon(command, gone, Address(state.sandbox, state.record.bot, state.user))
            return
        user, token = state.user, state.record.token
        if command is not None:
            taken = (self.typing.show if is_on else self.typing.hide)(binding, user, token)
            self._tasks.spawn(self._end_typing(command, state, taken))
        elif is_on:
            self.typing.begin(binding, user, token)
        else:
            self.typing.hide_if_visible(binding, user, token, shown_before=state.record.typing)

    def announce(self, state: Conversation, effect: rules.Announce) -> None:
        event = contract.WindowEvent(
            sandbox=state.sandbox,
            bot=state.bot.id if state.bot else state.record.bot,
            user=state.user,
            change=effect.change,
            reason=effect.reason,
            window=self._shown(state),
        )
        which = f"{state.record.window.id}:{effect.change}:{effect.reason}:{state.record.window.sends_used}"
        ident = f"window:{state.sandbox}:{state.user}:{which}"
        self._tasks.spawn(self._deps.events.window(event, msg_id=ident))  # no send waits for it

    def _shown(self, state: Conversation) -> contract.Window:
        deps = self._deps.conversation
        return window.shown(state.record, deps.clock.now_ms(), deps.policy.window)

    # what ends outside of conversations ---------------------------------------------------------------

    async def _end_typing(self, command: QueuedCommand, state: Conversation, taken: asyncio.Future[None]) -> None:
        """Ends a typing command once iLink took it, or did not."""
        result = CommandResult("accepted")
        try:
            await taken
        except Refused as exc:
            result = CommandResult("refused", exc.reason, exc.detail, (), 0, exc.ret, exc.errcode, exc.errmsg)
        except Crashed as exc:
            result = CommandResult("dead_lettered", exc.reason, exc.detail)
        bot = state.bot.id if state.bot else state.record.bot
        await self._end(command, result, Address(state.sandbox, bot, state.user), self._shown(state))

    def _end_soon(self, command: QueuedCommand, result: CommandResult, address: Address) -> None:
        self._tasks.spawn(self._end(command, result, address))

    async def _end(
        self,
        command: QueuedCommand,
        result: CommandResult,
        address: Address,
        shown: contract.Window = contract.Window(),  # noqa: B008 - frozen
    ) -> None:
        """Raises Draining, Crashed."""

        async def publish() -> None:
            self.ensure_owner()
            await self.commands.publish_receipt(command, result, address, shown)

        await self._retry(address.sandbox, publish)
        await self.commands.acknowledge(command)

    async def _retry(self, sandbox: str, work: Callable[[], Awaitable[T]]) -> T:
        """Tries until it is done. Raises Draining; Crashed at a bug that stays."""
        failures = crashes = 0
        while True:
            failures += 1
            try:
                return await work()
            except (Crashed, Draining):
                raise
            except AdapterError as exc:
                log.warning("command.retrying", sandbox=sandbox, reason=exc.reason, failures=failures)
            except Exception as exc:
                crashes += 1
                log.exception("command.crashed", sandbox=sandbox, crashes=crashes)
                if crashes == TRIES:
                    raise Crashed from exc
            if await first_of(self._draining, backoff(failures, first_s=0.2, longest_s=5.0)):
                raise Draining

    # the end ------------------------------------------------------------------------------------------

    async def drain(self, grace_s: float) -> None:
        """Starts nothing new; requests that are out get `grace_s` seconds to end."""
        self._draining.set()
        self._tasks.spawn(self.typing.drain(min(grace_s, TYPING_DRAIN_S)))
        await asyncio.gather(*(actor.drain(grace_s) for actor in self))
        if not await self._tasks.ended(grace_s):
            log.warning("commands.cancelled", shard=self.shard, tasks=len(self._tasks))
        self.stop()
        await self._tasks.ended(CANCEL_GRACE_S)

    def stop(self) -> None:
        """The shard is lost: everything ends now."""
        self._lost = True
        self._draining.set()
        self.typing.stop()
        for actor in self:
            actor.stop()
        self._conversations.clear()  # no cycle is left for the garbage collector
        self.intake.stop()
        self._tasks.cancel()

    # memory and metrics -------------------------------------------------------------------------------

    @property
    def tasks(self) -> int:
        """How many tasks work here."""
        return len(self._tasks) + sum(actor.tasks for actor in self)

    @property
    def throttled_bots(self) -> set[str]:
        """The bots whose users iLink takes no messages for (-2)."""
        records = (actor.state.record for actor in self)
        return {record.bot for record in records if record.window.throttled_at_ms}

    def evict_idle(self) -> None:
        """Lets go of conversations for which nothing waits and nothing is due; they are read back when needed."""
        for sandbox, actors in list(self._conversations.items()):
            for key in [key for key, actor in actors.items() if actor.is_idle]:
                actors.pop(key).stop()
            if not actors:
                del self._conversations[sandbox]
        self._accounts = {bot: known for bot, known in self._accounts.items() if self._deps.bindings.get(bot)}
        self.typing.evict_idle()

    def queue_depths(self, parked: Counter[str]) -> tuple[int, int | None]:
        """Adds what is parked, by reason; commands in flight otherwise, and when the oldest of them was stored."""
        waiting = 0
        for actor in self:
            count = sum(1 for one in actor.state.queue if one.parked) if actor.state.reason else 0
            parked[actor.state.reason] += count
            waiting += count
        in_flight, oldest_ms = self.commands.depth()
        return in_flight - waiting, oldest_ms


_UNKNOWN = "\0"


def _unknown_user(bot: str) -> str:
    """Key of the conversation of a bot whose user is not known."""
    return _UNKNOWN + bot


def _find_binding(command: Command, bindings: Bindings) -> Binding:
    """The binding that a command is meant for. Raises Refused("not_bound"), Refused("ambiguous_bot")."""
    bound = bindings.of_sandbox(command.sandbox)
    if command.bot:
        bound = [binding for binding in bound if binding.bot == command.bot]
    elif command.user and len(bound) > 1:
        bound = [binding for binding in bound if binding.user == command.user]
    if not bound:
        raise Refused("not_bound", "No bot is bound to this sandbox (or not the one named): bind it first.")
    if len(bound) == 1:
        return bound[0]
    alive = [binding for binding in bound if binding.state == "active"]
    if len(alive) == 1 and {binding.user for binding in bound} == {alive[0].user or None}:
        return alive[0]  # the others wait for a login of their user, which has taken place with this one
    raise Refused("ambiguous_bot", "The sandbox has several bots: name `bot` or `user`.")


def _is_surely_for(command: Command, binding: Binding) -> bool:
    """Whether a command is meant for the person of this binding, without a look at whom the sandbox served before."""
    return _is_answer_to(command, binding) and not _is_older(command, binding)


def _is_older(command: Command, binding: Binding) -> bool:
    """Whether a command that names nobody was stored when another person was bound."""
    return not (command.user or command.bot) and command.sequence <= binding.out_after


def _is_answer_to(command: Command, binding: Binding) -> bool:
    """Whether a command answers nothing, or what the person of this binding wrote to its bot."""
    bot = bot_of(command.reply_to)
    return not bot or (bot == binding.bot and command.user in ("", binding.user))


def _report(shard: int, exc: BaseException) -> None:
    if not isinstance(exc, Draining):
        log.error("task.crashed", shard=shard, exc_info=exc)
