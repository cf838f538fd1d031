"""Finds the conversation that each command of a shard is for.

After a takeover the commands are redelivered. Their receipts say which of them have ended, and are read in batches.
The records of the sandbox's conversations say which one was being sent, and to whom. The others were never started.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import msgspec

from adapter.bindings.registry import Bindings
from adapter.content.dedup import bot_of
from adapter.contract.records import Binding
from adapter.conversation import rules
from adapter.conversation.commands import Command
from adapter.conversation.record import ConversationRecord
from adapter.conversation.rules import CommandResult, QueuedCommand
from adapter.conversation.store import ConversationStore
from adapter.errors import Crashed, RecordTooNew, Refused, Temporary
from adapter.kit.tasks import TaskSet
from adapter.outbound.endings import CommandEndings
from adapter.outbound.ledger import CommandLedger
from adapter.outbound.open_conversations import OpenConversations, unknown_user
from adapter.outbound.reading import ReadCommand
from adapter.outbound.receipts import Address, Receipts, StoredReceipt, is_final, result_of

HELD_LOOK_S = 5.0
"""Between two looks at a record that only a newer replica knows. It mostly ends with the shard's next owner."""


class _PreviousOwner(NamedTuple):
    """What the previous owner stored about the commands of a sandbox."""

    receipts: dict[int, StoredReceipt]
    """The newest receipt of each command, by the command's sequence."""
    records: dict[str, tuple[ConversationRecord, int]]
    """Records and revisions, by user."""
    known: set[int]
    """Sequences that were looked up."""

    def user_of_head(self, sequence: int) -> str | None:
        """The user to whom a command was being sent; None: none."""
        heads = ((user, record.head) for user, (record, _) in self.records.items() if record.head)
        return next((user for user, head in heads if head.has_command(sequence)), None)


class CommandPlacement:
    """Passes the commands of one shard to their conversations."""

    def __init__(
        self,
        conversations: OpenConversations,
        bindings: Bindings,
        store: ConversationStore,
        receipts: Receipts,
        ledger: CommandLedger,
        endings: CommandEndings,
        tasks: TaskSet,
    ) -> None:
        self._conversations = conversations
        self._bindings = bindings
        self._store = store
        self._receipts = receipts
        self._ledger = ledger
        self._endings = endings
        self._tasks = tasks
        self._unplaced: dict[str, deque[ReadCommand]] = {}
        """By sandbox, in order: commands whose conversation is not known yet, and those behind them."""
        self._held: dict[tuple[str, str], deque[QueuedCommand]] = {}
        """By sandbox and user, in order: commands of users whose records only a newer replica knows."""

    def put(self, read: ReadCommand) -> None:
        """Passes a command to its conversation if that is known, or queues it behind others of its sandbox."""
        sandbox = read.command.sandbox
        if sandbox not in self._unplaced:
            if not read.redelivered:
                with contextlib.suppress(Refused):
                    binding = _find_binding(read.command, self._bindings)
                    user = read.command.user or binding.user or unknown_user(binding.bot)
                    actor = self._conversations.get(sandbox, user)
                    is_held = (sandbox, user) in self._held
                    if actor and not is_held and _is_surely_for(read.command, binding):
                        actor.put(rules.Stored((read.queued,)))
                        return
            self._unplaced[sandbox] = deque()
            self._tasks.spawn(self._place_all(sandbox))
        self._unplaced[sandbox].append(read)

    async def _place_all(self, sandbox: str) -> None:
        """Passes the queued commands of a sandbox to their conversations, in order."""
        waiting, previous, one_by_one = self._unplaced[sandbox], _PreviousOwner({}, {}, set()), False
        while waiting:
            batch = [waiting[0]] if one_by_one else waiting
            try:
                await self._endings.retry(sandbox, partial(self._look_up, sandbox, batch, previous))
                await self._endings.retry(sandbox, partial(self._place, waiting[0], previous))
            except Crashed as exc:
                if not one_by_one:  # one by one, to find the command at fault shows then
                    one_by_one = True
                    continue
                await self._end_crashed(waiting[0], exc)
            waiting.popleft()
        del self._unplaced[sandbox]

    async def _end_crashed(self, read: ReadCommand, exc: Crashed) -> None:
        """Ends a command that cannot be placed. The previous owner may have sent it."""
        command, result = read.command, CommandResult("dead_lettered", exc.reason, exc.detail)
        if read.redelivered:
            result = msgspec.structs.replace(result, outcome="uncertain", reason="")
        with contextlib.suppress(Crashed):  # without a receipt it is redelivered to the next owner
            await self._endings.end(read.queued, result, Address(command.sandbox, command.bot, command.user))

    async def _look_up(self, sandbox: str, waiting: Iterable[ReadCommand], previous: _PreviousOwner) -> None:
        """Loads what the previous owner stored about redelivered commands. Raises Temporary."""
        first = next(iter(waiting))
        if not first.redelivered or first.queued.ref.sequence in previous.known:
            return  # those behind it are looked up together when their turn comes
        refs = [read.queued.ref for read in waiting if read.redelivered]
        refs = [ref for ref in refs if ref.sequence not in previous.known]
        records = await self._store.load_sandbox(sandbox)
        heads = {user: record.head.commands for user, (record, _) in records.items() if record.head}
        refs_by_sequence = {ref.sequence: ref for ref in (*refs, *(ref for head in heads.values() for ref in head))}
        receipts = await self._receipts.find(sandbox, refs_by_sequence.values())
        for user, head in heads.items():
            if user not in previous.records:
                actor = await self._conversations.open(sandbox, user, known=records[user])
                for ref in head:
                    if (stored := receipts.get(ref.sequence)) and is_final(stored.receipt):
                        actor.put(rules.Ended(ref.sequence, result_of(stored.receipt)))
        previous.receipts.update(receipts)
        previous.records.update(records)
        previous.known.update(ref.sequence for ref in refs)

    async def _place(self, read: ReadCommand, previous: _PreviousOwner) -> None:
        """Places one command. Raises Temporary."""
        command, queued, sequence = read.command, read.queued, read.queued.ref.sequence
        sent_to = previous.user_of_head(sequence) if read.redelivered else None
        parked_for = ""
        if stored := previous.receipts.get(sequence):
            if is_final(stored.receipt):
                await self._ledger.acknowledge(queued)
                return
            self._ledger.adopt_receipt(queued, stored.sequence)
            parked_for = stored.receipt.user
            queued = msgspec.structs.replace(queued, parked=True)
        if sent_to is not None:  # even if another bot is bound now
            actor = await self._conversations.open(command.sandbox, sent_to, known=previous.records.get(sent_to))
        else:
            try:
                if parked_for and not (command.user or command.bot):
                    if not self._bindings.serving_user(command.sandbox, parked_for):
                        raise Refused("not_bound", "The person for whom it was parked is no longer bound.")
                    command = msgspec.structs.replace(command, user=parked_for)
                binding = await self._find_recipient(command)
            except Refused as exc:
                result = CommandResult("refused", exc.reason, exc.detail)
                await self._endings.end(queued, result, Address(command.sandbox, command.bot, command.user))
                return
            user = command.user or binding.user
            if (held := self._held.get((command.sandbox, user))) is not None:
                held.append(queued)
                return
            try:
                actor = await self._conversations.open(
                    command.sandbox, user, binding.bot, known=previous.records.get(user)
                )
            except RecordTooNew:
                self._held[command.sandbox, user] = deque([queued])
                self._tasks.spawn(self._place_held(command.sandbox, user, binding.bot))
                return
        actor.put(rules.Stored((queued,)))

    async def _place_held(self, sandbox: str, user: str, bot: str) -> None:
        """Passes the commands of one user to their conversation once its record can be read. Nobody else waits.
        Raises Draining."""
        while True:
            await self._endings.pause(HELD_LOOK_S)
            try:
                actor = await self._conversations.open(sandbox, user, bot)
            except Temporary:
                continue
            for queued in self._held.pop((sandbox, user)):
                actor.put(rules.Stored((queued,)))
            return

    async def _find_recipient(self, command: Command) -> Binding:
        """The binding that a command is meant for. Raises Temporary, and Refused even if another person is bound now,
        who must not see it."""
        binding = _find_binding(command, self._bindings)
        if _is_older(command, binding):
            raise Refused("not_bound", "Another person was bound when the command was stored: name the `user`.")
        user = command.user or binding.user
        if not _is_answer_to(command, binding) and user not in await self._find_authors(command):
            raise Refused("other_user", "The command answers no message of this person: name the `user` of it.")
        return binding

    async def _find_authors(self, command: Command) -> set[str]:
        """The users of the sandbox who may have written the message that a command answers: those whose messages its
        bot has brought there, now or formerly. Nothing is told of other sandboxes. Raises Temporary."""
        bot, sandbox = bot_of(command.reply_to), command.sandbox
        stored = await self._store.load_sandbox(sandbox)
        records = [(user, record) for user, (record, _) in stored.items()]
        records += [(actor.state.user, actor.state.record) for actor in self._conversations.of_sandbox(sandbox)]
        return {user for user, record in records if bot == record.bot or bot in record.bots} - {""}


def _find_binding(command: Command, bindings: Bindings) -> Binding:
    """The binding that a command is meant for. Raises Refused("not_bound"), Refused("ambiguous_bot")."""
    bound = bindings.serving_sandbox(command.sandbox)
    if command.bot:
        bound = [binding for binding in bound if binding.bot == command.bot]
    elif command.user and len(bound) > 1:
        bound = bindings.serving_user(command.sandbox, command.user)
    if not bound:
        raise Refused("not_bound", "No bot is bound to this sandbox (or not the one named): bind it first.")
    if len(bound) == 1:
        return bound[0]
    alive = [binding for binding in bound if binding.state == "active"]
    if len(alive) == 1 and {binding.user for binding in bound} == {alive[0].user or None}:
        return alive[0]  # the others wait for a login, which their user has made with this bot
    raise Refused("ambiguous_bot", "The sandbox has several bots: name `bot` or `user`.")


def _is_surely_for(command: Command, binding: Binding) -> bool:
    """Whether a command is surely meant for the person of this binding, without looking up earlier ones."""
    return _is_answer_to(command, binding) and not _is_older(command, binding)


def _is_older(command: Command, binding: Binding) -> bool:
    """Whether a command without bot and user was stored when another person was bound."""
    return not (command.user or command.bot) and command.sequence <= binding.out_after


def _is_answer_to(command: Command, binding: Binding) -> bool:
    """Whether a command answers no message, or one of this binding's person to its bot."""
    bot = bot_of(command.reply_to)
    return not bot or (bot == binding.bot and command.user in ("", binding.user))
