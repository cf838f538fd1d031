"""The present health of bots: the state that the polling replica reports, and the window of the user.

One request asks all replicas.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import structs

from adapter.bridge import window
from adapter.bridge.persons import Persons, StoredPerson
from adapter.bridge.presence import PollerStatus, Replicas
from adapter.bridge.record import PersonState
from adapter.contract.messages import BOT_STATUSES, BindingHealth, BindingInfo, BotStatus, Window
from adapter.contract.records import Binding
from adapter.errors import AdapterError
from adapter.tools.timing import Clock

BOTS_PER_REQUEST = 1000
"""Keeps request and answers well below the 1 MiB of a message."""
FAILING_MS = 60_000
"""A bot counts as failing after this time without an answer. An idle poll takes half of it."""


class BotHealth:
    """How bots fare."""

    def __init__(
        self,
        replicas: Replicas,
        persons: Persons,
        policy: window.WindowPolicy,
        clock: Clock,
    ) -> None:
        self._replicas = replicas
        self._persons = persons
        self._policy = policy
        self._clock = clock

    async def statuses(self, bindings: Sequence[Binding]) -> dict[str, BindingHealth]:
        """Health by bot, without the data of users. Raises Temporary."""
        found: dict[str, BindingHealth] = {}
        for start in range(0, len(bindings), BOTS_PER_REQUEST):
            page = bindings[start : start + BOTS_PER_REQUEST]
            replicas, living = await self._replicas.query([binding.bot for binding in page])
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

    async def window(self, binding: Binding) -> Window:
        """What may be sent to the person of a binding. Raises Temporary, Refused("token_key")."""
        now_ms = self._clock.now_ms()
        state = _state_of(await self._persons.load(binding.key), binding, now_ms)
        return window.visible_window(state, now_ms, self._policy)

    async def describe(self, bindings: Sequence[Binding]) -> list[BindingInfo]:
        """Bindings with their health, in the given order. Raises Temporary."""
        found = await self.statuses(bindings)
        stored = await self._persons.load_all([binding.key for binding in bindings])
        now_ms = self._clock.now_ms()
        infos = []
        for binding in bindings:
            person, health = stored[binding.key], found[binding.bot]
            if isinstance(person, AdapterError):
                health = structs.replace(health, is_unread=True)
            elif (state := _state_of(person, binding, now_ms)).window.opened_ms:
                health = structs.replace(
                    health,
                    inbound_ms=state.window.opened_ms,
                    sent_ms=state.window.sent_at_ms[-1] if state.window.sent_at_ms else 0,
                    window=window.visible_window(state, now_ms, self._policy),
                )
            infos.append(structs.replace(binding.info(), health=health))
        return infos


def _state_of(stored: StoredPerson, binding: Binding, now_ms: int) -> PersonState:
    """The record with the window of the entry if that is newer; that of another bot than the binding's has no
    token."""
    state, entry = stored.state or PersonState(), stored.entry
    if state.bot not in ("", binding.bot):
        state = structs.replace(state, token="")
    if entry is None or entry.entry.since != binding.since or (opened := entry.opened()) is None:
        return state
    if entry.entry.bot != binding.bot:
        state, opened = structs.replace(state, token=""), structs.replace(opened, token="")
    return window.newer_window(state, opened, now_ms, 0)


def _status(binding: Binding, poller: PollerStatus | None, absence: tuple[BotStatus, str]) -> tuple[BotStatus, str]:
    """Status and detail of a bot. `absence` is the result for a bot that no replica polls."""
    if binding.state == "needs_login":
        return "needs_login", binding.reason
    if poller is None and binding.state == "too_new":
        return "too_new", "a newer version wrote its binding: finish the roll-out"
    if poller is None:
        return absence
    if poller.why.startswith("record_too_new"):
        return "too_new", "a newer version wrote its person's record: finish the roll-out"
    if poller.state == "retrying" and (poller.ago_ms is None or poller.ago_ms >= FAILING_MS):
        return "failing", f"{poller.why or 'iLink answers no poll'} (poll.failed, poller.crashed in the log)"
    if poller.state == "storing" and poller.since_ms >= FAILING_MS:
        return "failing", "iLink's answer cannot be stored (work.retrying, inbound.full in the log)"
    return next((state for state in BOT_STATUSES if state == poller.state), "unknown"), poller.why
