"""Reads and writes conversation records."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import msgspec
import structlog

from adapter.contract.names import conversation_key, digest, user_of_key
from adapter.conversation.record import ConversationRecord
from adapter.errors import UNDECODABLE, RecordTooNew
from adapter.observability.records import RecordDecoder
from adapter.ports import Bucket, Entry

log = structlog.get_logger()

OTHER_USER_S = 30 * 24 * 3600
"""Time to live of the record of a bot's other user after its last write."""


class ConversationStore:
    """The bucket `wechat_conversations`."""

    def __init__(
        self, bucket: Bucket, *, unserved_s: int = 0, decoder: RecordDecoder[ConversationRecord] | None = None
    ) -> None:
        """`unserved_s`: time to live of a record whose user no bot serves; 0: no limit. `decoder`: that of another
        store of this replica, so that both log a record once."""
        self._bucket = bucket
        self._unserved_s = unserved_s
        self.decoder = decoder or RecordDecoder(ConversationRecord)

    async def load(self, sandbox: str, user: str) -> tuple[ConversationRecord, int]:
        """The record and its revision; an empty record and 0 if there is none. Raises RecordTooNew, Temporary."""
        entry = await self._bucket.get(conversation_key(sandbox, user))
        return self._record_in(entry), entry.revision if entry else 0

    async def load_all(self, users: Sequence[tuple[str, str]]) -> dict[tuple[str, str], ConversationRecord | None]:
        """The records that there are of users, by sandbox and user; None: only a newer version can read it. Raises
        Temporary."""
        names = {conversation_key(*each): each for each in users}
        found: dict[tuple[str, str], ConversationRecord | None] = {}
        for entry in await self._bucket.get_all([*names]):
            try:
                found[names[entry.key]] = self._record_in(entry)
            except RecordTooNew:
                found[names[entry.key]] = None
        return found

    async def load_sandbox(self, sandbox: str) -> dict[str, tuple[ConversationRecord, int]]:
        """The records of a sandbox with their revisions, by user, without those of a newer version. Raises
        Temporary."""
        found = {}
        for entry in await self._bucket.list_prefix(sandbox):
            with contextlib.suppress(RecordTooNew):
                found[user_of_key(entry.key)] = self._record_in(entry), entry.revision
        return found

    async def save(self, sandbox: str, user: str, record: ConversationRecord, revision: int) -> int:
        """Writes the record if its revision is `revision`. Returns the new one. Raises Conflict, Temporary."""
        key, ttl_s = conversation_key(sandbox, user), OTHER_USER_S if record.other else 0
        if record.unserved:
            ttl_s = self._unserved_s
        return await self._bucket.update(key, msgspec.json.encode(record), revision, ttl_s=ttl_s)

    def _record_in(self, entry: Entry | None) -> ConversationRecord:
        """Raises RecordTooNew."""
        if entry is None or entry.value is None:
            return ConversationRecord()
        sandbox, _, user = entry.key.partition(".")
        try:
            return self.decoder.decode(entry.value, sandbox=sandbox, conversation=digest(user.encode()))
        except UNDECODABLE as exc:  # not written by the adapter: it is overwritten
            log.error("conversation.unreadable", key=sandbox, detail=type(exc).__name__)
            return ConversationRecord()
