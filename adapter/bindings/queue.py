"""The control commands that wait, and which of them may be processed at the same time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Collection, Mapping
from typing import TypeAlias

import msgspec
from msgspec import structs

from adapter.contract.messages import Bind, Erase, Unbind
from adapter.contract.names import H_MSG_ID
from adapter.errors import UNDECODABLE, Unreadable
from adapter.ports import Delivery

MAX_BYTES = 262_144
"""Largest command; a larger one becomes a dead letter. A bind may have the longest cursor that a poll returns."""
SETTLED_KEPT = 1000
"""Sequences of completed commands that are remembered in case of a redelivery."""
ControlCommand: TypeAlias = Bind | Unbind | Erase
_KINDS: dict[str, type[ControlCommand]] = {"bind": Bind, "unbind": Unbind, "erase": Erase}


class CommandQueue:
    """The queued commands by the sequence of their stream."""

    def __init__(self) -> None:
        self.waiting: list[int] = []
        """Commands that wait, in the order in which they were stored."""
        self.changed = asyncio.Event()
        """Set when a command or iLink's answer about a token arrives."""
        self._deliveries: dict[int, Delivery] = {}
        """The newest delivery of each queued command, whose acknowledgement counts."""
        self._settled: deque[int] = deque(maxlen=SETTLED_KEPT)

    def add(self, delivery: Delivery) -> None:
        """Queues a command once. It is redelivered after each connect until its acknowledgement arrives."""
        if delivery.seq not in self._deliveries:
            self.waiting.append(delivery.seq)
            self.changed.set()
        self._deliveries[delivery.seq] = delivery

    def delivery(self, number: int) -> Delivery:
        return self._deliveries[number]

    def command(self, number: int) -> ControlCommand | None:
        """A queued command, or None if it is unreadable."""
        try:
            return decode(self._deliveries[number])
        except Unreadable:
            return None

    def take(self, numbers: Collection[int]) -> None:
        """These commands wait no more."""
        self.waiting = [number for number in self.waiting if number not in numbers]

    def is_settled(self, number: int) -> bool:
        """Whether the command was processed before."""
        return number in self._settled

    async def settle(self, number: int) -> None:
        """Acknowledges a command and removes it."""
        self._settled.append(number)
        await self._deliveries.pop(number).ack()

    def clear(self) -> None:
        self.waiting.clear()
        self._deliveries.clear()


def decode(delivery: Delivery) -> ControlCommand:
    """Raises Unreadable."""
    if len(delivery.data) > MAX_BYTES:
        raise Unreadable("too_large", f"At most {MAX_BYTES} bytes are read.")
    try:
        command = msgspec.json.decode(delivery.data, type=_KINDS[delivery.subject.rpartition(".")[2]])
    except UNDECODABLE as exc:
        raise Unreadable("unreadable", str(exc)[:200]) from exc
    return structs.replace(command, id=command.id or delivery.headers.get(H_MSG_ID, "")[:128] or None)


def independent(keys: Mapping[int, Collection[str]]) -> list[list[int]]:
    """Groups of numbers in the order of `keys`. Two groups share no key. Each number has at least one key."""
    above: dict[str, str] = {}

    def group_of(key: str) -> str:
        while (higher := above.setdefault(key, key)) != key:
            key = higher
        return key

    for touched in keys.values():
        first, *others = touched
        for other in others:
            above[group_of(other)] = group_of(first)
    groups: dict[str, list[int]] = {}
    for number, touched in keys.items():
        groups.setdefault(group_of(next(iter(touched))), []).append(number)
    return [*groups.values()]
