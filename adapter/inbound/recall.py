"""Finds the words of a quote that names only an id: inbound ones in the inbox, outbound ones in a bucket.

Nothing is written for inbound messages. What was sent is noted in the background: a note that cannot be stored costs
a quote its words, never a send its time.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

import msgspec
import structlog

from adapter.contract import Inbound
from adapter.dedup import Keys
from adapter.errors import UNDECODABLE, BusRefused, Conflict
from adapter.metrics import Metrics
from adapter.names import H_IDS, H_MSG_ID, Names, escaped, token_of
from adapter.ports import Bucket, History, Said, Stored
from adapter.quotes import Words, resolved, words_of
from adapter.records import Spoken
from adapter.timing import Clock

log = structlog.get_logger()

NOTE_BYTES = 4096
"""Bytes of a sent text that are kept."""
NOTES = 1000
"""Notes on their way to the bus; one more is dropped, so that a bus that is away does not fill the memory."""
READINGS = 2
"""Inboxes that are read back at once: 10,000 messages cost a third of a second of this machine's time."""
SPANS_MS = tuple(minutes * 60_000 for minutes in (5, 60, 6 * 60, 36 * 60, 365 * 24 * 60))
"""How far back a quoted message is looked for, one span after the other: most are of the last minutes."""
SEARCHED = 2000
"""Messages of an inbox among which it is looked for."""
MAX_IDS = 32
"""Items of one message whose ids are kept: a header has an end."""


class Recall:
    """Notes what is sent, and finds what is quoted."""

    def __init__(self, bucket: Bucket, history: History, names: Names, clock: Clock, metrics: Metrics) -> None:
        self._bucket = bucket
        self._history = history
        self._names = names
        self._clock = clock
        self._metrics = metrics
        self._stored = metrics.quote_notes.labels(outcome="stored")
        self._notes: set[asyncio.Task[None]] = set()
        self._readings = asyncio.Semaphore(READINGS)

    def note(self, sandbox: str, bot: str, user: str, message_id: str, kind: str, text: str) -> None:
        """Keeps what was sent under iLink's id, in the background. Without an id there is nothing to keep."""
        if not message_id:
            return
        if len(self._notes) >= NOTES:
            self._metrics.quote_notes.labels(outcome="dropped").inc()
            return
        spoken = Spoken(sandbox=sandbox, user=user, kind=kind, text=cut(text, NOTE_BYTES))
        task = asyncio.get_running_loop().create_task(self._store(quote_key(bot, message_id), spoken))
        self._notes.add(task)
        task.add_done_callback(self._notes.discard)

    async def _store(self, key: str, spoken: Spoken) -> None:
        try:
            await self._bucket.update(key, msgspec.json.encode(spoken), 0)
        except Conflict:
            pass  # noted before a crash, and sent again under the same client_id
        except BusRefused as exc:
            log.warning("quote.unnoted", sandbox=spoken.sandbox, detail=exc.detail)
            self._metrics.quote_notes.labels(outcome="failed").inc()
            return
        self._stored.inc()

    async def resolve(self, sandbox: str, bot: str, said: Said, before: Sequence[Said] = ()) -> Said:
        """`said` with the words that it quotes, as far as they can be found. Raises Temporary.

        Only words of the same user in the same sandbox are shown. `before`: the user's messages that may not be in
        the inbox yet.
        """
        reference = said.reference
        if said.quote is None or reference is None:
            return said
        words = None
        if reference.ids:
            words = (
                _find_said(reference.ids, said.user, before)
                or await self._find_sent(reference.ids, sandbox, bot, said.user)
                or await self._find_heard(reference.ids, sandbox, said.user)
            )
        return self._with_words(said, words)

    def leave(self, said: Said) -> Said:
        """`said` with what iLink tells of the words that it quotes."""
        return self._with_words(said, None)

    def _with_words(self, said: Said, words: Words | None) -> Said:
        assert said.quote is not None
        assert said.reference is not None
        self._metrics.quotes.labels(outcome=words.said_by if words else "unknown").inc()
        return msgspec.structs.replace(said, quote=resolved(said.quote, said.reference, words), reference=None)

    async def _find_sent(self, ids: Sequence[str], sandbox: str, bot: str, user: str) -> Words | None:
        for ident in ids:
            entry = await self._bucket.get(quote_key(bot, ident))
            if entry is None or entry.value is None:
                continue
            try:
                spoken = msgspec.json.decode(entry.value, type=Spoken)
            except UNDECODABLE as exc:
                log.error("quote.unreadable", bot=bot, detail=str(exc))
                continue
            if (spoken.sandbox, spoken.user) == (sandbox, user):
                return Words(spoken.text, spoken.kind, "bot")
        return None

    async def _find_heard(self, ids: Sequence[str], sandbox: str, user: str) -> Words | None:
        """The newest message in the sandbox's inbox that has one of the ids, or an item with it."""
        left, read_from, endings = SEARCHED, sys.maxsize, tuple(map(_ending, ids))
        async with self._readings:
            for span_ms in SPANS_MS:
                found, first = None, read_from
                since_ms = self._clock.now_ms() - span_ms
                inbox = self._names.inbox(sandbox)
                async for stored in self._history.read(self._names.stream_in, inbox, since_ms=since_ms, most=left):
                    if stored.seq >= read_from:
                        break
                    first, left = min(first, stored.seq), left - 1
                    item = _item_named(ids, stored)
                    if item is not None or stored.headers.get(H_MSG_ID, "").endswith(endings):
                        found = _words_in(stored, item, sandbox, user) or found
                if found is not None or not left:
                    return found
                read_from = first
        return None


def _words_in(stored: Stored, item: int | None, sandbox: str, user: str) -> Words | None:
    """What a stored message says, or one of its items, if it is the user's."""
    try:
        inbound = msgspec.json.decode(stored.data, type=Inbound)
    except UNDECODABLE as exc:
        log.error("quote.unreadable", sequence=stored.seq, detail=str(exc))
        return None
    if inbound.user != user or inbound.sandbox != sandbox:
        return None
    return words_of(inbound.text, inbound.items, item)


def quote_key(bot: str, message_id: str) -> str:
    """Key of a sent message in the bucket `quotes`."""
    return f"{token_of(bot)}/{escaped(message_id[:64])}"


def ids_header(said: Said) -> dict[str, str]:
    """The header that lets an item be found by its id; none where no item has one of its own."""
    if not any(said.item_ids):
        return {}
    named = [f"{n}:{escaped(ident)}" for n, ident in enumerate(said.item_ids[:MAX_IDS]) if 0 < len(ident) <= 64]
    return {H_IDS: " ".join(named)} if named else {}


def cut(text: str, size: int) -> str:
    """The beginning of a text, at most so many bytes of UTF-8."""
    return text.encode()[:size].decode(errors="ignore")


def _ending(ident: str) -> str:
    """How the bus names a message of iLink's id, whichever bot it was said to."""
    return Keys(ident, "", "", "", 0, "").id_for("")[len("in:") :]


def _item_named(ids: Sequence[str], stored: Stored) -> int | None:
    for named in stored.headers.get(H_IDS, "").split():
        number, _, ident = named.partition(":")
        if ident in {escaped(one) for one in ids} and number.isdecimal():
            return int(number)
    return None


def _find_said(ids: Sequence[str], user: str, before: Sequence[Said]) -> Words | None:
    for said in reversed(before):
        if said.user != user:
            continue
        for number, ident in enumerate(said.item_ids):
            if ident and ident in ids:
                return words_of(said.text, said.items, number)
        if said.keys.message in ids and said.keys.message:
            return words_of(said.text, said.items)
    return None
