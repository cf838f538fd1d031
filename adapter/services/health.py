"""The present health of bots: the state that the polling replica reports, and the window of the user.

One request asks all replicas.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import structs

from adapter.contract.messages import BOT_STATUSES, BindingHealth, BindingInfo, BotStatus, Window
from adapter.contract.records import Binding
from adapter.kit.timing import Clock
from adapter.outbound import window
from adapter.outbound.record import ConversationRecord
from adapter.outbound.store import ConversationStore
from adapter.ownership.replica_status import OtherReplicas, PollerStatus

BOTS_PER_REQUEST = 1000
"""Keeps request and answers well below the 1 MiB of a message."""
FAILING_MS = 60_000
"""A bot counts as failing after this time without an answer. An idle poll takes half of it."""


class BotHealth:
    """How bots fare."""

    def __init__(
        self, others: OtherReplicas, conversations: ConversationStore, policy: window.WindowPolicy, clock: Clock
    ) -> None:
        self._others = others
        self._conversations = conversations
        self._policy = policy
        self._clock = clock

    async def statuses(self, bindings: Sequence[Binding]) -> dict[str, BindingHealth]:
        """Health by bot, without the data of users. Raises Temporary."""
        found: dict[str, BindingHealth] = {}
        for start in range(0, len(bindings), BOTS_PER_REQUEST):
            page = bindings[start : start + BOTS_PER_REQUEST]
            replicas, living = await self._others.query([binding.bot for binding in page])
            polls = {bot: (each.instance, poller) for each in replicas for bot, poller in each.polls.items()}
            absence: tuple[BotStatus, str] = "not_polled", "no replica polls it"
            if len(replicas) < living:
                absence = "unknown", f"{living - len(replicas)} of {living} replicas gave no answer"
            elif any(each.capacity and each.bots >= each.capacity for each in replicas):
                absence = "not_polled", "no capacity: add replicas, or raise WECHAT_NATS_CAPACITY"
            now_ms = self._clock.now_ms()
            for binding in page:
                instance, poller = polls.get(binding.bot, ("", None))
                status, detail = _status(binding, poller, absence)
                since_ms = now_ms - poller.since_ms if poller is not None else 0
                answered_ms = now_ms - poller.ago_ms if poller is not None and poller.ago_ms is not None else 0
                health = BindingHealth(
                    status=status,
                    detail=detail,
                    since_ms=binding.since_ms if status == "needs_login" else since_ms,
                    replica=instance,
                    answered_ms=answered_ms,
                )
                found[binding.bot] = health
        return found

    async def window(self, sandbox: str, user: str) -> Window:
        """What may be sent to a user. Raises Temporary."""
        record, _ = await self._conversations.load(sandbox, user)
        return window.visible_window(record, self._clock.now_ms(), self._policy)

    async def describe(self, bindings: Sequence[Binding]) -> list[BindingInfo]:
        """Bindings with their health, in the given order. Raises Temporary."""
        found = await self.statuses(bindings)
        records = await self._conversations.load_all([(each.sandbox, each.user) for each in bindings if each.user])
        now_ms = self._clock.now_ms()
        infos = []
        for binding in bindings:
            stored = records.get((binding.sandbox, binding.user), (ConversationRecord(), 0))
            health = found[binding.bot]
            if stored is None:
                health = structs.replace(health, is_unread=True)
            elif (record := stored[0]).window.opened_ms:
                health = structs.replace(
                    health,
                    inbound_ms=record.window.opened_ms,
                    sent_ms=record.window.sent_at_ms[-1] if record.window.sent_at_ms else 0,
                    window=window.visible_window(record, now_ms, self._policy),
                )
            infos.append(structs.replace(binding.info(), health=health))
        return infos


def _status(binding: Binding, poller: PollerStatus | None, absence: tuple[BotStatus, str]) -> tuple[BotStatus, str]:
    """Status and detail of a bot. `absence` is the result for a bot that no replica polls."""
    if binding.state == "needs_login":
        return "needs_login", binding.reason
    if poller is None and binding.state == "too_new":
        return "too_new", "a newer version wrote its binding: finish the roll-out"
    if poller is None:
        return absence
    if poller.why.startswith("record_too_new"):
        return "too_new", "a newer version wrote its checkpoint: finish the roll-out"
    if poller.state == "retrying" and (poller.ago_ms is None or poller.ago_ms >= FAILING_MS):
        return "failing", f"{poller.why or 'iLink answers no poll'} (poll.failed, poller.crashed in the log)"
    if poller.state == "storing" and poller.since_ms >= FAILING_MS:
        return "failing", "iLink's answer cannot be stored (work.retrying, inbound.full in the log)"
    return next((state for state in BOT_STATUSES if state == poller.state), "unknown"), poller.why
