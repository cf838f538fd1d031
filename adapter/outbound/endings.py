"""Ends commands of a shard outside of conversations, and retries work for them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog

from adapter.contract import messages as contract
from adapter.conversation.rules import CommandResult, QueuedCommand
from adapter.errors import AdapterError, Crashed
from adapter.kit.crashes import ATTEMPTS
from adapter.kit.tasks import TaskSet
from adapter.kit.timing import backoff, wait_event
from adapter.outbound.ledger import CommandLedger
from adapter.outbound.receipts import Address

log = structlog.get_logger()

T = TypeVar("T")


class Draining(Exception):
    """The replica stops. Commands in flight stay unacknowledged and are redelivered to the next owner."""


class CommandEndings:
    """Ends commands that are in no conversation."""

    def __init__(
        self, ledger: CommandLedger, ensure_owner: Callable[[], None], draining: asyncio.Event, tasks: TaskSet
    ) -> None:
        """`ensure_owner` raises LeaseLost unless this replica owns the shard."""
        self._ledger = ledger
        self._ensure_owner = ensure_owner
        self._draining = draining
        self._tasks = tasks

    def end_soon(self, command: QueuedCommand, result: CommandResult, address: Address) -> None:
        self._tasks.spawn(self.end(command, result, address))

    async def end(
        self,
        command: QueuedCommand,
        result: CommandResult,
        address: Address,
        shown: contract.Window = contract.Window(),  # noqa: B008 - frozen
    ) -> None:
        """Publishes the final receipt, then acknowledges the command. Raises Draining, Crashed."""

        async def publish() -> None:
            self._ensure_owner()
            await self._ledger.publish_receipt(command, result, address, shown)

        await self.retry(address.sandbox, publish)
        await self._ledger.acknowledge(command)

    async def retry(self, sandbox: str, work: Callable[[], Awaitable[T]]) -> T:
        """Retries until the work succeeds. Raises Draining; Crashed for a bug that raises in every attempt."""
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
                if crashes == ATTEMPTS:
                    raise Crashed from exc
            await self.pause(backoff(failures, first_s=0.2, longest_s=5.0))

    async def pause(self, seconds: float) -> None:
        """Raises Draining as soon as the replica stops."""
        if await wait_event(self._draining, seconds):
            raise Draining
