"""Counts how tokens of bindings are sealed, and seals those anew that an old key sealed."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator

import msgspec

from adapter.contract.names import Names
from adapter.contract.records import Binding
from adapter.errors import UNDECODABLE, Conflict
from adapter.ports import History, LeaderBucket, StoredMessage
from adapter.security.seal import Sealer, Sealing, cursor_context


async def count_stored_tokens(history: History, names: Names, sealer: Sealer) -> Counter[Sealing]:
    """Number of tokens by their sealing. Raises Temporary."""
    return Counter(
        [
            sealer.sealing_of(text)
            async for _, binding in _stored_bindings(history, names)
            for text in _sealed_fields(binding)
        ]
    )


async def reseal_tokens(history: History, bucket: LeaderBucket, names: Names, sealer: Sealer) -> int:
    """Seals what another known key sealed with the first. Returns the number of changes. Concurrent writes have
    priority. Raises Temporary, Refused (a token cannot be opened)."""
    sealed = 0
    async for stored, binding in _stored_bindings(history, names):
        if all(sealer.sealing_of(text) != "older" for text in _sealed_fields(binding)):
            continue
        token = sealer.seal(binding.bot, sealer.open(binding.bot, binding.token))
        start, context = binding.start_cursor, cursor_context(binding.bot)
        if start and sealer.sealing_of(start) == "older":
            start = sealer.seal(context, sealer.open(context, start))
        value = msgspec.json.encode(msgspec.structs.replace(binding, token=token, start_cursor=start))
        try:
            await bucket.write(stored.subject.removeprefix(f"$KV.{names.bindings}."), value, stored.seq)
        except Conflict:
            continue
        sealed += 1
    return sealed


async def _stored_bindings(history: History, names: Names) -> AsyncIterator[tuple[StoredMessage, Binding]]:
    async for stored in history.read(f"KV_{names.bindings}", f"$KV.{names.bindings}.>"):
        if not stored.data:
            continue  # it was deleted
        try:
            binding = msgspec.json.decode(stored.data, type=Binding)
        except UNDECODABLE:
            continue  # unreadable, or of a newer version: the registry logs and ignores it
        yield stored, binding


def _sealed_fields(binding: Binding) -> list[str]:
    """The fields with the bot's token: the token, and the start cursor, which contains it."""
    return [binding.token, *([binding.start_cursor] if binding.start_cursor else [])]
