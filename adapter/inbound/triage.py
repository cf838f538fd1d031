"""Decides which messages of a journal record are new and from the bot's user. Others are counted or dead letters."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import NamedTuple

import msgspec
import structlog

from adapter.content.dedup import BatchDedup, DedupWindow
from adapter.errors import Crashed, Unreadable
from adapter.kit.crashes import retry_on_bug_now
from adapter.ports import InboundMessage

log = structlog.get_logger()

TURN = 64
"""Messages, or KiB, read in one turn of the event loop."""


class TriagedMessage(msgspec.Struct, frozen=True):
    """The decision about one message of a record."""

    number: int
    """Index in the record."""
    raw: bytes
    inbound: InboundMessage | None
    """None: the message is unreadable."""
    outcome: str
    """new, duplicate, echo, group, unreadable or crashed."""
    detail: str = ""
    """Reason for the dead letter."""


class Triage(NamedTuple):
    """Translates messages and filters out duplicates, echoes and group messages."""

    read_message: Callable[[bytes], InboundMessage]
    turn: Callable[[], Awaitable[None]]
    """Waits for the next turn of the event loop."""

    async def classify(
        self, bot: str, messages: list[bytes], place: str, first: int, seen: DedupWindow, seen_at_ms: int
    ) -> list[TriagedMessage]:
        """Decides about each message, given those before it, and adds new ones to `seen`.

        `place`, `first`: position of the answer, see JournalRecord. `seen_at_ms`: time of arrival.
        """
        found: list[TriagedMessage] = []
        batch = BatchDedup()
        work = 0
        for index, raw in enumerate(messages):
            work += 1 + len(raw) // 1024
            while work > TURN:
                work -= TURN
                await self.turn()
            classify_one = partial(self._classify_one, bot, index, raw, place, first + index, seen, batch)
            try:
                found.append(retry_on_bug_now(classify_one, "inbound.crashed", bot=bot))
            except Crashed as exc:
                found.append(TriagedMessage(index, raw, None, "crashed", exc.detail))
        fresh = [
            message.inbound.keys
            for message in found
            if message.inbound is not None and message.outcome in ("new", "group")
        ]
        if fresh:
            seen.add_all(fresh, seen_at_ms)
        return found

    def _classify_one(
        self, bot: str, index: int, raw: bytes, place: str, number: int, seen: DedupWindow, batch: BatchDedup
    ) -> TriagedMessage:
        try:
            inbound = self.read_message(raw)
        except Unreadable as exc:
            return TriagedMessage(index, raw, None, "unreadable", exc.detail)
        if not inbound.keys.message and place:
            inbound = msgspec.structs.replace(inbound, keys=inbound.keys.with_position(place, number))
        if inbound.echo or inbound.user == bot:  # some echoes have no type
            return TriagedMessage(index, raw, inbound, "echo")
        if seen.is_repeat(inbound.keys) or batch.is_repeat(inbound.keys):
            return TriagedMessage(index, raw, inbound, "duplicate")
        batch.add(inbound.keys)
        if inbound.group:
            # an answer might go to the group, or to a member who is not the bot's user
            return TriagedMessage(index, raw, inbound, "group", "The message is from a group.")
        return TriagedMessage(index, raw, inbound, "new")
