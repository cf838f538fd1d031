"""Reads and writes conversation records, which are sealed."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import msgspec

from adapter.contract.names import conversation_key, digest, user_of_key
from adapter.errors import UNDECODABLE, RecordTooNew, Refused
from adapter.observability.decoding import decode_record, log_once
from adapter.outbound.record import ConversationRecord, SealedConversation
from adapter.ports import Bucket, Entry
from adapter.security.seal import Sealer, conversation_context

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(ConversationRecord).decode
_encode_sealed = msgspec.json.Encoder().encode
_decode_sealed = msgspec.json.Decoder(SealedConversation).decode


def seal_record(key: str, record: ConversationRecord, sealer: Sealer) -> bytes:
    """The value that is stored under `key`."""
    sealed = sealer.seal_bytes(conversation_context(key), _encode(record))
    return _encode_sealed(SealedConversation(bots=record.bots, sealed=sealed))


def open_record(key: str, value: bytes, sealer: Sealer) -> ConversationRecord:
    """The record in the value of `key`. Raises Refused (no key opens it), UNDECODABLE (also of a newer version)."""
    return _open(key, _decode_sealed(value), sealer)


def _open(key: str, stored: SealedConversation, sealer: Sealer) -> ConversationRecord:
    """Raises Refused, UNDECODABLE."""
    return _decode(sealer.open_bytes(conversation_context(key), stored.sealed))


class ConversationStore:
    """The bucket `wechat_conversations`."""

    def __init__(
        self,
        bucket: Bucket,
        sealer: Sealer,
        *,
        unserved_s: int = 0,
    ) -> None:
        """`unserved_s`: time to live of a record whose user no bot serves; 0: no limit."""
        self._bucket = bucket
        self._sealer = sealer
        self._unserved_s = unserved_s

    async def load(self, sandbox: str, user: str) -> tuple[ConversationRecord, int]:
        """The record and its revision; an empty record and 0 if there is none. Raises RecordTooNew, Temporary."""
        entry = await self._bucket.get(conversation_key(sandbox, user))
        return self._record_in(entry), entry.revision if entry else 0

    async def load_all(
        self, users: Sequence[tuple[str, str]]
    ) -> dict[tuple[str, str], tuple[ConversationRecord, int] | None]:
        """The records that there are of users with their revisions, by sandbox and user; None: only a newer version
        can read it. Raises Temporary."""
        names = {conversation_key(*each): each for each in users}
        found: dict[tuple[str, str], tuple[ConversationRecord, int] | None] = {}
        for entry in await self._bucket.get_all([*names]):
            try:
                found[names[entry.key]] = self._record_in(entry), entry.revision
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
        key, ttl_s = conversation_key(sandbox, user), self._unserved_s if record.unserved else 0
        return await self._bucket.update(key, seal_record(key, record, self._sealer), revision, ttl_s=ttl_s)

    def _record_in(self, entry: Entry | None) -> ConversationRecord:
        """Of one that cannot be read or opened, an empty record, which overwrites it. Raises RecordTooNew."""
        if entry is None or entry.value is None:
            return ConversationRecord()
        sandbox, _, user = entry.key.partition(".")
        names = {"sandbox": sandbox, "conversation": digest(user.encode())}
        try:
            return _open(entry.key, decode_record(entry.value, SealedConversation, **names), self._sealer)
        except Refused as exc:  # its key is gone: the inbox tells the window, and the user the next one
            log_once("conversation.unopenable", **names, detail=exc.detail)
        except UNDECODABLE as exc:  # not written by the adapter
            log_once("conversation.unreadable", **names, detail=type(exc).__name__)
        return ConversationRecord()
