"""Finds the text of a quote that has only an id: a user's message in the inbox, a bot's in the conversation
record."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

import msgspec
import structlog

from adapter.content.dedup import MessageKeys
from adapter.content.quotes import QuotedText, quoted_text_of, resolve_quote
from adapter.contract.messages import Inbound
from adapter.contract.names import H_IDS, H_MSG_ID, Names, escape_token
from adapter.conversation.conversations import Conversations
from adapter.errors import UNDECODABLE
from adapter.kit.timing import Clock
from adapter.observability.metrics import Metrics
from adapter.ports import History, InboundMessage, Stored

log = structlog.get_logger()

CONCURRENT_SEARCHES = 2
"""Inboxes searched at the same time. 10,000 messages take a third of a second."""
SPANS_MS = tuple(minutes * 60_000 for minutes in (5, 60, 6 * 60, 36 * 60, 365 * 24 * 60))
"""Spans that are searched one after the other; most quoted messages are minutes old."""
MAX_SEARCHED = 2000
"""Messages of an inbox that are searched at most."""
MAX_IDS = 32
"""Items of one message whose ids are kept in the header."""


class QuoteResolver:
    """Finds quoted messages."""

    def __init__(
        self, conversations: Conversations, history: History, names: Names, clock: Clock, metrics: Metrics
    ) -> None:
        self._conversations = conversations
        self._history = history
        self._names = names
        self._clock = clock
        self._metrics = metrics
        self._searches = asyncio.Semaphore(CONCURRENT_SEARCHES)

    async def resolve(
        self, sandbox: str, bot: str, inbound: InboundMessage, before: Sequence[InboundMessage] = ()
    ) -> InboundMessage:
        """`inbound` with the text that it quotes, if that can be found. Raises Temporary.

        Only messages of the same user in the same sandbox are found. `before`: messages of the user that may not be
        in the inbox yet.
        """
        reference = inbound.reference
        if inbound.quote is None or reference is None:
            return inbound
        words = None
        if reference.ids:
            words = (
                _find_in_batch(reference.ids, inbound.user, before)
                or await self._find_sent(reference.ids, sandbox, inbound.user)
                or await self._find_in_inbox(reference.ids, sandbox, inbound.user)
            )
        return self._with_words(inbound, words)

    def without_search(self, inbound: InboundMessage) -> InboundMessage:
        """`inbound` with what iLink itself says of the quoted message."""
        return self._with_words(inbound, None)

    def _with_words(self, inbound: InboundMessage, words: QuotedText | None) -> InboundMessage:
        assert inbound.quote is not None
        assert inbound.reference is not None
        self._metrics.quotes.labels(outcome=words.said_by if words else "unknown").inc()
        return msgspec.structs.replace(
            inbound, quote=resolve_quote(inbound.quote, inbound.reference, words), reference=None
        )

    async def _find_sent(self, ids: Sequence[str], sandbox: str, user: str) -> QuotedText | None:
        sent = await self._conversations.find_sent(sandbox, user, ids)
        return QuotedText(sent.text, sent.kind, "bot") if sent else None

    async def _find_in_inbox(self, ids: Sequence[str], sandbox: str, user: str) -> QuotedText | None:
        """The newest message in the inbox that has, or has an item with, one of the ids."""
        remaining, read_from, endings = MAX_SEARCHED, sys.maxsize, tuple(map(_ending, ids))
        async with self._searches:
            for span_ms in SPANS_MS:
                found, first = None, read_from
                since_ms = self._clock.now_ms() - span_ms
                inbox = self._names.inbox(sandbox)
                async for stored in self._history.read(
                    self._names.stream_in, inbox, since_ms=since_ms, limit=remaining
                ):
                    if stored.seq >= read_from:
                        break
                    first, remaining = min(first, stored.seq), remaining - 1
                    item = _item_named(ids, stored)
                    if item is not None or stored.headers.get(H_MSG_ID, "").endswith(endings):
                        found = _text_of(stored, item, sandbox, user) or found
                if found is not None or not remaining:
                    return found
                read_from = first
        return None


def _text_of(stored: Stored, item: int | None, sandbox: str, user: str) -> QuotedText | None:
    """The text of a stored message, or of one of its items, if the message is the user's."""
    try:
        inbound = msgspec.json.decode(stored.data, type=Inbound)
    except UNDECODABLE as exc:
        log.error("quote.unreadable", sequence=stored.seq, detail=str(exc))
        return None
    if inbound.user != user or inbound.sandbox != sandbox:
        return None
    return quoted_text_of(inbound.text, inbound.items, item)


def ids_header(inbound: InboundMessage) -> dict[str, str]:
    """The header by which items are found by their ids; none if no item has an id of its own."""
    if not any(inbound.item_ids):
        return {}
    named = [
        f"{n}:{escape_token(ident)}" for n, ident in enumerate(inbound.item_ids[:MAX_IDS]) if 0 < len(ident) <= 64
    ]
    return {H_IDS: " ".join(named)} if named else {}


def _ending(ident: str) -> str:
    """The end of the bus id of a message with this iLink id, which is the same for all bots."""
    return MessageKeys(ident, "", "", "", 0, "").id_for("")[len("in:") :]


def _item_named(ids: Sequence[str], stored: Stored) -> int | None:
    for named in stored.headers.get(H_IDS, "").split():
        number, _, ident = named.partition(":")
        if ident in {escape_token(quoted) for quoted in ids} and number.isdecimal():
            return int(number)
    return None


def _find_in_batch(ids: Sequence[str], user: str, before: Sequence[InboundMessage]) -> QuotedText | None:
    for inbound in reversed(before):
        if inbound.user != user:
            continue
        for number, ident in enumerate(inbound.item_ids):
            if ident and ident in ids:
                return quoted_text_of(inbound.text, inbound.items, number)
        if inbound.keys.message in ids and inbound.keys.message:
            return quoted_text_of(inbound.text, inbound.items)
    return None
