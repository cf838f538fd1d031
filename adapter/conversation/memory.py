"""The state of one conversation in memory, and its stored record."""

from __future__ import annotations

import msgspec

from adapter.conversation import rules
from adapter.conversation.record import ConversationRecord
from adapter.conversation.rules import Conversation
from adapter.conversation.shard import ShardPort
from adapter.conversation.store import ConversationStore
from adapter.errors import Conflict


class ConversationMemory:
    """The only writer of the record, except for a last write of the previous owner that was on its way."""

    def __init__(self, state: Conversation, revision: int, shard: ShardPort, store: ConversationStore) -> None:
        self.state = state
        self._revision = revision
        self._stored = state.record
        self._shard = shard
        self._store = store

    @property
    def is_dirty(self) -> bool:
        """The record differs from the stored one."""
        return self.state.record != self._stored

    @property
    def is_inbound_stored(self) -> bool:
        """The stored record has everything that inbound messages changed."""
        now, stored = self.state.record, self._stored
        return (now.inbox_seq, now.token) == (stored.inbox_seq, stored.token)

    @property
    def has_record(self) -> bool:
        """The bucket has a record."""
        return bool(self._revision)

    @property
    def serving_bot(self) -> str:
        """The bot to send with; the last one if none serves the user."""
        return self.state.bot.id if self.state.bot else self.state.record.bot

    async def save(self) -> None:
        """Stores the record. Raises Temporary, LeaseLost."""
        store, state = self._store, self.state
        while True:
            self._shard.ensure_owner()
            record = self.state.record
            try:
                self._revision = await store.save(state.sandbox, state.user, record, self._revision)
            except Conflict:
                self._shard.ensure_owner()
                had_record = bool(self._revision)
                stored, self._revision = await store.load(state.sandbox, state.user)
                self._shard.ensure_owner()  # the read may be slow, and the record that of a new owner
                if had_record and self.state.bot is None and stored == ConversationRecord():
                    # the person was erased meanwhile: nothing comes back from memory
                    self._stored = ConversationRecord(unserved=True)
                    self.state = msgspec.structs.replace(self.state, record=self._stored)
                    return
                self.state = rules.adopt_inbound(self.state, stored)
            else:
                self._stored = record
                return
