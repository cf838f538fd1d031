"""Ends messages that reach no inbox: each is counted, and some become dead letters."""

from __future__ import annotations

import structlog

from adapter.contract.records import Binding
from adapter.errors import Crashed
from adapter.inbound import inbox
from adapter.inbound.inbox import PublishDeps
from adapter.inbound.triage import TriagedMessage
from adapter.ports import InboundMessage

log = structlog.get_logger()


class Rejects:
    """Ends messages of one bot."""

    def __init__(self, bot: str, publishing: PublishDeps) -> None:
        self._bot = bot
        self._publishing = publishing

    async def end_unpublished(self, message: TriagedMessage, binding: Binding | None) -> None:
        """Counts a message for no inbox, or makes it a dead letter."""
        kind = message.inbound.kind if message.inbound else "unsupported"
        match message.outcome:
            case "echo":
                self.count(kind, "rejected")
            case "duplicate":
                self.count(kind, "duplicate")
                log.info("inbound.duplicate", sandbox=_sandbox_of(binding), message=self._id_of(message.inbound))
            case "new":
                self.count(kind, "unbound")
                await self.dead_letter(
                    None, message.raw, message.inbound, f"The bot {self._bot} was not bound when the message arrived."
                )
            case "crashed" | "group":
                self.count(kind, "dead_lettered")
                await self.dead_letter(binding, message.raw, message.inbound, message.detail, reason=message.outcome)
            case _:
                self.count(kind, "dead_lettered")
                await self.dead_letter(binding, message.raw, message.inbound, message.detail)

    def count(self, kind: str, outcome: str) -> None:
        inbox.count(self._publishing, kind, outcome)

    async def dead_letter(
        self,
        binding: Binding | None,
        raw: bytes,
        inbound: InboundMessage | None,
        why: str,
        *,
        reason: str = "unreadable",
    ) -> None:
        sandbox, message = _sandbox_of(binding), self._id_of(inbound)
        await inbox.dead_letter(self._bot, sandbox, raw, why, self._publishing, reason=reason, message=message)

    async def end_crashed(self, raw: bytes, sandbox: str, inbound: InboundMessage | None) -> None:
        """Ends a message on which the code raises in every attempt."""
        if self._publishing.ensure_owner is not None:
            self._publishing.ensure_owner()
        crashed = Crashed()
        self.count(inbound.kind if inbound else "unsupported", "dead_lettered")
        message = self._id_of(inbound)
        why, reason = crashed.detail, crashed.reason
        await inbox.dead_letter(self._bot, sandbox, raw, why, self._publishing, reason=reason, message=message)

    def _id_of(self, inbound: InboundMessage | None) -> str:
        """The message's id on the bus; "" of one that cannot be read."""
        return inbound.keys.id_for(self._bot) if inbound else ""


def _sandbox_of(binding: Binding | None) -> str:
    return binding.sandbox if binding else ""
