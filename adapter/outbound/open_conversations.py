"""The conversations of one shard that are in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from adapter.conversation.actor import ConversationActor
from adapter.conversation.record import ConversationRecord
from adapter.conversation.rules import Conversation
from adapter.conversation.shard import ConversationDeps, Folds, ShardPort

_UNKNOWN = "\0"


def unknown_user(bot: str) -> str:
    """Key of the conversation of a bot whose user is not known."""
    return _UNKNOWN + bot


class OpenConversations:
    """Loads conversations from the bucket when they are needed, and keeps them while they have work."""

    def __init__(self, shard: ShardPort, folds: Folds, deps: ConversationDeps, draining: asyncio.Event) -> None:
        self._shard = shard
        self._folds = folds
        self._deps = deps
        self._draining = draining
        self._actors: dict[str, dict[str, ConversationActor]] = {}
        """By sandbox and user. `unknown_user` of the bot stands for a user that is not known."""
        self._loading: dict[tuple[str, str], asyncio.Future[None]] = {}

    def __iter__(self) -> Iterator[ConversationActor]:
        return iter([actor for actors in self._actors.values() for actor in actors.values()])

    def get(self, sandbox: str, user: str) -> ConversationActor | None:
        """None: it is not loaded."""
        return self._actors.get(sandbox, {}).get(user)

    def of_sandbox(self, sandbox: str) -> list[ConversationActor]:
        return list(self._actors.get(sandbox, {}).values())

    async def open(
        self, sandbox: str, user: str, bot: str = "", *, known: tuple[ConversationRecord, int] | None = None
    ) -> ConversationActor:
        """The conversation, loaded if it is not in memory. `known`: its record and revision, if they were just read.
        Raises Temporary."""
        key = user or unknown_user(bot)
        while (actor := self.get(sandbox, key)) is None:
            if (loading := self._loading.get((sandbox, key))) is not None:
                await asyncio.wait([loading])
                continue
            loading = self._loading[sandbox, key] = asyncio.get_running_loop().create_future()
            try:
                record, revision, newest = ConversationRecord(), 0, None
                if user:
                    record, revision = known or await self._deps.store.load(sandbox, user)
                    newest = await self._folds.newest_of(sandbox, user, record.inbox_seq)
                record = record if record.bot else ConversationRecord(bot=bot)
                state = Conversation(
                    sandbox=sandbox, user=user, record=record, bot=self._shard.bot_of(sandbox, user, record.bot)
                )
                actor = ConversationActor(state, revision, self._shard, self._deps)
                self._actors.setdefault(sandbox, {})[key] = actor
                if newest is not None:  # a former owner published it
                    actor.on_inbound(newest)
                if self._draining.is_set():  # no conversation starts any more
                    actor.stop()
            finally:
                del self._loading[sandbox, key]
                loading.set_result(None)
        return actor

    def take_unknown(self, sandbox: str, bot: str) -> ConversationActor | None:
        """Removes and returns the conversation that a bot had before its user was known."""
        return self._actors.get(sandbox, {}).pop(unknown_user(bot), None)

    def forget_unserved(self, sandbox: str) -> None:
        """Removes idle conversations of users without a bot. Their records may have been erased, so they are read
        again for the next bot."""
        actors = self._actors.get(sandbox, {})
        for key in [key for key, actor in actors.items() if actor.state.record.unserved and actor.try_stop()]:
            del actors[key]

    def evict_idle(self) -> None:
        """Drops conversations without work; they are loaded again when needed."""
        for sandbox, actors in list(self._actors.items()):
            for key in [key for key, actor in actors.items() if actor.try_stop()]:
                del actors[key]
            if not actors:
                del self._actors[sandbox]

    def stop(self) -> None:
        for actor in self:
            actor.stop()
        self._actors.clear()  # breaks reference cycles
