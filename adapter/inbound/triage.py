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


class Sorted(NamedTuple):
    """The decision about one message of a record."""

    number: int
    """Index in the record."""
    raw: bytes
    said: InboundMessage | None
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

    async def sort(
        self, bot: str, messages: list[bytes], place: str, first: int, seen: DedupWindow, seen_at_ms: int
    ) -> list[Sorted]:
        """Decides about each message, given those before it, and adds new ones to `seen`.

        `place`, `first`: position of the answer, see JournalRecord. `seen_at_ms`: time of arrival.
        """
        found: list[Sorted] = []
        batch = BatchDedup()
        work = 0
        for index, raw in enumerate(messages):
            work += 1 + len(raw) // 1024
            while work > TURN:
                work -= TURN
                await self.turn()
            judge = partial(self._judge, bot, index, raw, place, first + index, seen, batch)
            try:
                found.append(retry_on_bug_now(judge, "inbound.crashed", bot=bot))
            except Crashed as exc:
                found.append(Sorted(index, raw, None, "crashed", exc.detail))
        fresh = [one.said.keys for one in found if one.said is not None and one.outcome in ("new", "group")]
        if fresh:
            seen.add_all(fresh, seen_at_ms)
        return found

    def _judge(
        self, bot: str, index: int, raw: bytes, place: str, number: int, seen: DedupWindow, batch: BatchDedup
    ) -> Sorted:
        try:
            said = self.read_message(raw)
        except Unreadable as exc:
            return Sorted(index, raw, None, "unreadable", exc.detail)
        if not said.keys.message and place:
            said = msgspec.structs.replace(said, keys=said.keys.with_position(place, number))
        if said.echo or said.user == bot:  # some echoes have no type
            return Sorted(index, raw, said, "echo")
        if seen.is_repeat(said.keys) or batch.is_repeat(said.keys):
            return Sorted(index, raw, said, "duplicate")
        batch.add(said.keys)
        if said.group:
            # an answer might go to the group, or to a member who is not the bot's user
            return Sorted(index, raw, said, "group", "The message is from a group.")
        return Sorted(index, raw, said, "new")
