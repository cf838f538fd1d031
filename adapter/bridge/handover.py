"""Gives a partition to another replica without a gap in polls, and without two polls at once.

The giver releases the key at once; its open polls, and the sends that are out, go on. The taker serves everybody at
once but those for whom a replica of the list in the key still polls or sends. It asks each of them, now and every
ASK_EVERY_S. Who is not named is polled at once, the others when `polled` names them or the next answer does not. A
replica leaves the list when it names nobody, when it is silent, or LONGEST_S after the taking.

`Handover` is the side of the taker; the giver answers by `answer`, and says `polled` (`partitions`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import msgspec
import structlog

from adapter.bridge.leases import Tenure
from adapter.bridge.parts import Parts
from adapter.bridge.presence import ReplicaStatus, StatusAsked
from adapter.errors import UNDECODABLE, Temporary
from adapter.tools.timing import ChangeSignal

log = structlog.get_logger()

ASK_EVERY_S = 5.0
ANSWER_S = 1.0
SILENT_S = 4.0
"""Silence of a replica after which it has cut its polls, since it has not heard itself either."""
CUT_DEAF_S = 3.2
"""Time without the own word after which a replica cuts the polls that it has left."""
LONGEST_S = 70.0
"""Longer than a poll and its answer may take."""


class Asked(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="ask", tag="open"):
    """Asks a replica whom it still polls, and for whom it still sends, in a partition that it has given away.
    Subject: `wechat.adapter.polls.<replica>`."""

    partition: int


class StillOpen(msgspec.Struct, kw_only=True):
    """The answer."""

    bots: set[str]
    """Those that it polls."""
    persons: set[str]
    """Those for whom it sends: sandbox and person."""


class PollEnded(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A poll or send in somebody else's partition has ended, perhaps with an entry. Subject:
    `wechat.adapter.polled`."""

    replica: str
    partition: int
    bot: str = ""
    person: str = ""
    """Sandbox and person."""


class Handover:
    """What a partition's former owners still do there, as far as the new one knows."""

    def __init__(self, tenure: Tenure, parts: Parts) -> None:
        self.changed = ChangeSignal()
        self._tenure = tenure
        self._parts = parts
        self._still_open: dict[str, StillOpen | None] = dict.fromkeys(tenure.former)
        """By replica of the list; None: it has not answered yet."""

    def may_poll(self, bot: str) -> bool:
        """Whether no former owner can have a poll of a bot."""
        return all(told is not None and bot not in told.bots for told in self._still_open.values())

    def may_send(self, person: str) -> bool:
        """Whether no former owner can have a request to a person. `person`: with the sandbox."""
        return all(told is not None and person not in told.persons for told in self._still_open.values())

    async def run(self) -> None:
        """Asks until the list is empty."""
        clock, presence = self._parts.clock, self._parts.presence
        began = asked_at = clock.monotonic()
        await self._ask_all()
        while self._still_open and not self._tenure.is_over:
            await self.changed.wait_until(lambda: not self._still_open, 0.5)
            now = clock.monotonic()
            for replica in list(self._still_open):
                if presence.silent_s(replica, began) > SILENT_S or now - began > LONGEST_S:
                    self._forget(replica)
            if now - asked_at >= ASK_EVERY_S:
                asked_at = now
                await self._ask_all()

    async def _ask_all(self) -> None:
        await asyncio.gather(*(self._ask(replica) for replica in list(self._still_open)))

    async def _ask(self, replica: str) -> None:
        payload = msgspec.json.encode(Asked(partition=self._tenure.number))
        try:
            subject = self._parts.names.polls_of(replica)
            answer = await self._parts.core.ask(subject, payload, within_s=ANSWER_S)
            told = msgspec.json.decode(answer, type=StillOpen) if answer else None
        except (Temporary, *UNDECODABLE):
            return  # it is asked again
        if told is None or replica not in self._still_open:
            return
        self._still_open[replica] = told
        self._look(replica, told)

    def on_polled(self, polled: PollEnded) -> None:
        """A poll or send of a replica on the list has ended."""
        if (told := self._still_open.get(polled.replica)) is not None:
            told.bots.discard(polled.bot)
            told.persons.discard(polled.person)
            self._look(polled.replica, told)

    def _look(self, replica: str, told: StillOpen) -> None:
        if not told.bots and not told.persons:
            self._forget(replica)
        self.changed.notify_all()

    def _forget(self, replica: str) -> None:
        self._still_open.pop(replica, None)
        self._tenure.former = tuple(name for name in self._tenure.former if name != replica)
        self.changed.notify_all()


def answer(
    data: bytes, still_open: Callable[[int], StillOpen], status: Callable[[Sequence[str]], ReplicaStatus]
) -> bytes | None:
    """A replica's answer on `wechat.adapter.polls.<replica>`; None: the request does not decode strictly."""
    try:
        asked = msgspec.json.decode(data, type=Asked | StatusAsked)
    except UNDECODABLE:
        return None
    told = still_open(asked.partition) if isinstance(asked, Asked) else status(asked.bots)
    return msgspec.json.encode(told)


def read_polled(data: bytes) -> PollEnded | None:
    """None: it does not decode strictly, and is ignored."""
    try:
        return msgspec.json.decode(data, type=PollEnded)
    except UNDECODABLE:
        return None


async def say_polled(parts: Parts, partition: int, *, bot: str = "", person: str = "") -> None:
    """Tells every replica, at most once, that a poll or send has ended here."""
    polled = PollEnded(replica=parts.presence.replica, partition=partition, bot=bot, person=person)
    try:
        await parts.core.publish(parts.names.polled(), msgspec.json.encode(polled), {})
    except Temporary as exc:
        log.info("polled.skipped", bot=bot, reason=exc.reason)
