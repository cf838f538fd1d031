"""Entries in WECHAT_IN on a real server, as the bridge stores them."""

from __future__ import annotations

from typing import Any

import msgspec

from adapter.bridge.entries import Entry, Secrets, encode_end, encode_entry
from adapter.contract.names import H_EXPECTED, person_token
from adapter.ports import BusMessage
from adapter.tools.seal import Sealer
from tests.bus.rig import NAMES, Rig

SEALER = Sealer((bytes(32),))


class Inbox:
    """Stores entries under the fence of their subjects."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.last: dict[str, int] = {}
        """By subject: sequence of its newest entry."""
        self.since: dict[str, int] = {}

    def subject(self, user: str, sandbox: str = "s1") -> str:
        return NAMES.inbox(sandbox, person_token(sandbox, user))

    async def say(self, *texts: str, user: str = "u1", sandbox: str = "s1") -> int:
        """One entry with these messages; its sequence."""
        return await self.store([{"text": text} for text in texts], user=user, sandbox=sandbox)

    async def store(
        self, messages: list[Any], *, user: str = "u1", sandbox: str = "s1", secrets: Secrets | None = None
    ) -> int:
        subject = self.subject(user, sandbox)
        raw = [msgspec.Raw(msgspec.json.encode(message)) for message in messages]
        entry = Entry(since=self.since.setdefault(subject, 1), user=user, bot="b1", messages=raw)
        return await self._publish(subject, encode_entry(entry, secrets or Secrets(), subject, SEALER))

    async def end(self, *, user: str = "u1", sandbox: str = "s1", purge: bool = True) -> int:
        """Ends the person's time, as an unbind; the next entry begins another."""
        subject = self.subject(user, sandbox)
        since = self.since.setdefault(subject, 1)
        sequence = await self._publish(subject, encode_end(since))
        self.since[subject] = since + 1
        if purge:
            await self.rig.history.purge(NAMES.stream_in, subject, up_to=sequence - 1)
        return sequence

    async def _publish(self, subject: str, payload: bytes) -> int:
        headers = {H_EXPECTED: str(self.last.get(subject, 0))}
        ack = await self.rig.publisher.store(BusMessage("in", subject, payload, headers))
        self.last[subject] = ack.seq
        return ack.seq
