"""What the stream of events tells of the sandboxes of control commands."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from adapter.bindings.registry import Bindings
from adapter.contract.messages import Bind, BindingEvent, Unbind
from adapter.contract.names import is_sandbox
from adapter.observability.events import PERSON_CHANGES, BusAccess, last_person_change, read_binding_events

READ_KEPT = 1000
"""Sandboxes whose bots are known to be complete. The bots of other sandboxes are read again."""


class ReadSandboxes:
    """The sandboxes that this replica has read as owner, since the former owner may have bound bots there that this
    replica does not know yet."""

    def __init__(self, access: BusAccess, bindings: Bindings) -> None:
        self._history = access.history
        self._names = access.names
        self._bindings = bindings
        self._last_changes: dict[str, BindingEvent | None] = {}
        """By sandbox: the last event that bound or unbound a person."""

    def clear(self) -> None:
        self._last_changes.clear()

    def forget(self, sandbox: str) -> None:
        self._last_changes.pop(sandbox, None)

    def on_published(self, event: BindingEvent) -> None:
        if event.change in PERSON_CHANGES and event.sandbox in self._last_changes:
            self._last_changes[event.sandbox] = event

    async def refresh(self, commands: Iterable[Bind | Unbind]) -> None:
        """Reads the bots of commands, and each of their sandboxes once. Raises Temporary."""
        commands = list(commands)
        bots = {command.bot for command in commands if command.bot}
        await self._bindings.refresh(*bots)
        before = {binding.sandbox for bot in bots if (binding := self._bindings.get(bot)) is not None}
        await self._read({*before, *(command.sandbox for command in commands)})

    async def last_person_change(self, sandbox: str) -> BindingEvent | None:
        """The last event that bound or unbound a person. Raises Temporary."""
        await self._read({sandbox})
        return self._last_changes[sandbox]

    async def _read(self, sandboxes: Collection[str]) -> None:
        unread = [name for name in sandboxes if name not in self._last_changes and is_sandbox(name)]
        subjects = {self._names.event(sandbox, "binding"): sandbox for sandbox in unread}
        found = {
            last.subject for last in await self._history.read_last_of_each(self._names.stream_event, [*subjects])
        }
        if len(self._last_changes) >= READ_KEPT:
            self.clear()
        for subject, sandbox in subjects.items():
            # no event: the usual case when many are bound
            self._last_changes[sandbox] = await self._read_one(sandbox) if subject in found else None

    async def _read_one(self, sandbox: str) -> BindingEvent | None:
        events = [event async for _, event in read_binding_events(self._history, self._names, sandbox)]
        known = {binding.bot for binding in self._bindings.of_sandbox(sandbox)}
        await self._bindings.refresh(*{event.bot for event in events if event.change == "bound"} - known)
        return last_person_change(events)
