"""The shard port of conversations: ownership, the bots that serve users, and the ends of commands."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Protocol

import structlog

from adapter.bindings.registry import Bindings
from adapter.contract import messages as contract
from adapter.contract.records import Binding
from adapter.conversation.rules import Body, Bot, CommandResult, Conversation, InboundReceived, QueuedCommand
from adapter.conversation.shard import Folds
from adapter.errors import LeaseLost, Refused
from adapter.kit.tasks import TaskSet
from adapter.kit.timing import wait_any
from adapter.outbound.endings import CommandEndings
from adapter.outbound.ledger import CommandLedger
from adapter.outbound.reading import BodyLoader
from adapter.outbound.receipts import Address
from adapter.outbound.typing_indicator import TypingIndicators
from adapter.ownership.leases import Leases
from adapter.ports import Account

log = structlog.get_logger()

PAUSED_S = 5.0
"""Longest wait for the lease before it is checked again."""


class Sessions(Protocol):
    """State of the bots' sessions with iLink."""

    def is_recovering(self, bot: str) -> bool:
        """Whether a refused token is being retried; nothing may be sent with it."""

    async def is_alive(self, bot: str) -> bool:
        """Whether iLink accepts the bot's token in another call. Raises Temporary."""

    def is_polled_here(self, bot: str) -> bool:
        """Whether this replica has taken the bot, so that no other one publishes its messages."""


class ShardLease:
    """This replica's ownership of one shard."""

    def __init__(self, shard: int, leases: Leases, draining: asyncio.Event) -> None:
        self._shard = shard
        self._leases = leases
        self._draining = draining
        self._lost = False

    def check(self) -> None:
        """Raises LeaseLost unless this replica owns the shard now."""
        if self._lost:
            raise LeaseLost("lease_lost", f"shard {self._shard}")
        self._leases.ensure_owned(self._shard)

    async def wait(self) -> None:
        """Returns when the replica may own the shard again, or after some seconds."""
        await wait_any(self._leases.wait_owned(self._shard), self._draining.wait(), timeout_s=PAUSED_S)

    def give_up(self) -> None:
        """Makes every later check fail."""
        self._lost = True


class ShardBots:
    """The bots that serve the users of a shard, and their iLink accounts."""

    def __init__(self, bindings: Bindings, sessions: Sessions, open_account: Callable[[Binding], Account]) -> None:
        """`open_account` raises Refused("token_key")."""
        self._bindings = bindings
        self._sessions = sessions
        self._open_account = open_account
        self._accounts: dict[str, tuple[Binding, Account]] = {}

    def serving(self, sandbox: str, user: str, bot: str) -> Bot | None:
        """The bot that serves the user now. `bot`: the last one."""
        found, is_other = self._bindings.serving_user(sandbox, user) if user else [], False
        if not found:
            binding = self._bindings.serving(bot)
            if binding is None or binding.sandbox != sandbox:
                return None
            found, is_other = [binding], bool(binding.user)
        best = next((binding for binding in found if self._is_usable(binding)), found[0])
        return Bot(best.bot, self._is_usable(best), is_other)

    def _is_usable(self, binding: Binding) -> bool:
        if binding.state != "active" or self._sessions.is_recovering(binding.bot):
            return False
        try:
            self.account(binding.sandbox, binding.bot)
        except Refused:  # its token cannot be opened
            return False
        except Exception:  # a bug that no command caused: commands wait, and a timer checks again
            log.exception("account.crashed", bot=binding.bot)
            return False
        return True

    def account(self, sandbox: str, bot: str) -> Account:
        """The iLink account of a bot of the sandbox. Raises Refused."""
        binding = self._bindings.serving(bot)
        if binding is None or binding.sandbox != sandbox:
            raise Refused("not_bound", "The bot no longer serves this sandbox.")
        known = self._accounts.get(bot)
        if known is None or known[0] is not binding:  # opens a token once instead of for each send
            known = self._accounts[bot] = binding, self._open_account(binding)
        return known[1]

    def forget_unbound(self) -> None:
        """Drops the accounts of unbound bots."""
        self._accounts = {bot: known for bot, known in self._accounts.items() if self._bindings.get(bot)}


class OwnedShard:
    """Implements conversation.shard.ShardPort."""

    def __init__(
        self,
        lease: ShardLease,
        bots: ShardBots,
        sessions: Sessions,
        folds: Folds,
        ledger: CommandLedger,
        bodies: BodyLoader,
        endings: CommandEndings,
        typing: TypingIndicators,
        shown: Callable[[Conversation], contract.Window],
        tasks: TaskSet,
    ) -> None:
        self._lease = lease
        self.bots = bots
        self._sessions = sessions
        self._folds = folds
        self._ledger = ledger
        self._bodies = bodies
        self._endings = endings
        self._typing = typing
        self._shown = shown
        self._tasks = tasks

    def ensure_owner(self) -> None:
        self._lease.check()

    async def wait_owned(self) -> None:
        await self._lease.wait()

    def bot_of(self, sandbox: str, user: str, bot: str) -> Bot | None:
        return self.bots.serving(sandbox, user, bot)

    def account_of(self, sandbox: str, bot: str) -> Account:
        return self.bots.account(sandbox, bot)

    async def is_session_alive(self, bot: str) -> bool:
        return await self._sessions.is_alive(bot)

    async def newest_inbound(self, conversation: Conversation) -> InboundReceived | None:
        sandbox, user, record = conversation.sandbox, conversation.user, conversation.record
        bot = conversation.bot
        if not user or bot is None or self._sessions.is_polled_here(bot.id):
            return None
        return await self._folds.newest_of(sandbox, user, record.inbox_seq, again=True)

    async def load_bodies(self, sandbox: str, sequences: Sequence[int]) -> dict[int, Body]:
        bodies = await self._bodies.load(sandbox, sequences)
        for sequence in bodies:
            self._ledger.end_parking(sequence)
        return bodies

    async def publish_receipt(self, command: QueuedCommand, result: CommandResult, state: Conversation) -> None:
        address = Address(state.sandbox, state.bot.id if state.bot else state.record.bot, state.user)
        await self._ledger.publish_receipt(command, result, address, self._shown(state))

    async def acknowledge(self, command: QueuedCommand, *, is_duplicate: bool = False) -> None:
        await self._ledger.acknowledge(command, is_duplicate=is_duplicate)

    def release_body(self, command: QueuedCommand) -> None:
        self._ledger.release_body(command)

    def show_typing(self, sandbox: str, bot: str, user: str, context_token: str) -> None:
        with contextlib.suppress(Refused):  # no bot serves the user, or its token cannot be opened
            self._typing.show(self.bots.account(sandbox, bot), sandbox, user, context_token)

    def hide_typing(self, sandbox: str, user: str) -> None:
        self._typing.hide(sandbox, user)
