"""Reads and writes conversation records."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import structlog

from adapter.contract.names import conversation_key, user_of_key
from adapter.conversation.record import VERSION, ConversationRecord
from adapter.errors import UNDECODABLE, Temporary
from adapter.ports import Bucket, Entry

log = structlog.get_logger()


class ConversationStore:
    """The bucket `wechat_conversations`."""

    def __init__(self, bucket: Bucket, *, unserved_s: int = 0) -> None:
        """`unserved_s`: time to live of a record whose user no bot serves; 0: no limit."""
        self._bucket = bucket
        self._unserved_s = unserved_s

    async def load(self, sandbox: str, user: str) -> tuple[ConversationRecord, int]:
        """The record and its revision; an empty record and 0 if there is none. Raises Temporary."""
        entry = await self._bucket.get(conversation_key(sandbox, user))
        return _record_in(entry), entry.revision if entry else 0

    async def load_all(self, users: Sequence[tuple[str, str]]) -> dict[tuple[str, str], ConversationRecord | None]:
        """The records that there are of users, by sandbox and user; None: only a newer version can read it. Raises
        Temporary."""
        names = {conversation_key(*each): each for each in users}
        found: dict[tuple[str, str], ConversationRecord | None] = {}
        for entry in await self._bucket.get_all([*names]):
            try:
                found[names[entry.key]] = _record_in(entry)
            except Temporary:
                found[names[entry.key]] = None
        return found

    async def load_sandbox(self, sandbox: str) -> dict[str, tuple[ConversationRecord, int]]:
        """The records of a sandbox with their revisions, by user. Raises Temporary."""
        entries = await self._bucket.list_prefix(sandbox)
        return {user_of_key(entry.key): (_record_in(entry), entry.revision) for entry in entries}

    async def save(self, sandbox: str, user: str, record: ConversationRecord, revision: int) -> int:
        """Writes the record if its revision is `revision`. Returns the new one. Raises Conflict, Temporary."""
        key, ttl_s = conversation_key(sandbox, user), self._unserved_s if record.unserved else 0
        return await self._bucket.update(key, msgspec.json.encode(record), revision, ttl_s=ttl_s)


class _Versioned(msgspec.Struct):
    """The field that every version of a record has."""

    v: int = VERSION


def _record_in(entry: Entry | None) -> ConversationRecord:
    """Raises Temporary for a record of a later version."""
    if entry is None or entry.value is None:
        return ConversationRecord()
    try:
        version = msgspec.json.decode(entry.value, type=_Versioned).v  # first, since other fields may have changed
        if version > VERSION:
            raise Temporary("record_too_new", f"A record has version {version}, this replica knows {VERSION}.")
        return msgspec.json.decode(entry.value, type=ConversationRecord)
    except UNDECODABLE as exc:  # not written by the adapter: it is overwritten
        log.error("conversation.unreadable", key=entry.key.partition(".")[0], detail=type(exc).__name__)
        return ConversationRecord()
