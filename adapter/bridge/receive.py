"""Stores the messages of an answer of iLink: as one entry of the person's subject, or as dead letters.

There is one path: translate, drop repeats, store under the fence, ring. iLink forgets an answer with the next poll,
so `receive` returns only when all of it is stored, and waits as long as JetStream accepts no writes. An answer in
hand is stored under the same fence whether this replica still owns the person or not, since it may exist nowhere
else.

A refused write has one cause of four, and what lies behind the expectation tells which (`_resolve`):

    own nonce among it               stored, only the ack was lost
    entries of the same time         another owner's: repeats are dropped, the rest is stored behind them
    `ended`, or another time         the person is gone: dead letters
    nothing, or a lower sequence     aged, evicted, deleted or restored: stored behind what is there
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TypeVar

import msgspec
import structlog

from adapter.bridge import window
from adapter.bridge.entries import Entry, OpenedWindow, Secrets, encode_entry, in_chunks, new_nonce
from adapter.bridge.media import name_media
from adapter.bridge.parts import Parts
from adapter.bridge.person import OVER, AnswerState, Person, Status
from adapter.bridge.record import PersonState, SendWindow
from adapter.bridge.window import InboundReceived
from adapter.content.dedup import DedupWindow
from adapter.content.quotes import resolve_quote
from adapter.contract import messages as contract
from adapter.contract import names
from adapter.contract.messages import Inbound, InboundItem
from adapter.contract.records import Binding
from adapter.errors import BusRefused, Conflict, Crashed, LeaseLost, PersonGone, Temporary, Unreadable
from adapter.kit.persist import persist
from adapter.ports import BusMessage, InboundMessage, MediaRef, Polled
from adapter.security.seal import dead_context

log = structlog.get_logger()

T = TypeVar("T")

SLICE = 50
"""Most messages plus KiB of them that are translated in one turn of the event loop."""
OTHER_BYTES = 128 * 1024
"""Bytes of an entry beside its messages: fingerprints, and what is sealed; at most a quarter of an entry."""
ENDED = ("repeat", "stored", "dropped")
"""Outcomes that leave no dead letter."""


GONE = "The person was unbound before the message was stored."


class _Anybody:
    """Implements kit.persist.Owner: an answer in hand is stored, whoever owns the person now."""

    def check(self) -> None: ...

    async def valid(self) -> None: ...


ANYBODY = _Anybody()


class Received(msgspec.Struct):
    """One message of an answer."""

    raw: bytes
    message: InboundMessage | None = None
    """None: it cannot be read."""
    outcome: str = "new"
    """new, or one of ENDED; or a dead letter's reason: unreadable, crashed, group, not_bound, stranger, too_large."""
    detail: str = ""
    """Why it is a dead letter."""
    id: str = ""
    """Id on the bus."""
    line: bytes = b""
    """Its fingerprint."""
    items: Sequence[InboundItem] = ()
    fetches: tuple[MediaRef, ...] = ()
    payload: bytes = b""
    """What agents read."""


class _Answer(msgspec.Struct):
    """An answer that is being stored."""

    read: list[Received]
    polled: Polled
    binding: Binding
    received_ms: int
    started: int
    """The person's position when the poll began."""
    nonce: str
    """Of the next entry, also where its write is tried again."""
    is_alone: bool = False
    """Each message gets an entry of its own, since one of them is at fault."""

    def those(self, outcome: str) -> list[Received]:
        return [one for one in self.read if one.outcome == outcome]


class Receiver:
    """Receives for one bot. Only its poller calls it."""

    def __init__(self, bot: str, person: Person, parts: Parts) -> None:
        self._bot = bot
        self._person = person
        self._parts = parts
        self._subject = parts.persons.subject(person.key)

    async def receive(self, polled: Polled, binding: Binding, started: int) -> bool:
        """Returns when all messages are stored. `started`: the person's position when the poll began. False: iLink
        has only repeated what is known, and has given no new cursor."""
        person, received_ms = self._person, self._parts.clock.now_ms()
        answer = _Answer(
            await self._translate(polled, received_ms), polled, binding, received_ms, started, new_nonce()
        )
        self._address(answer)
        await self._end_others(answer)
        for one in answer.those("new"):
            if one.message is not None and one.message.broken:
                await self._dead_letter(one, "unreadable", one.message.broken, binding)
        is_cursor_new, is_gone = polled.cursor not in (None, person.state.cursor), False
        while True:
            self._drop_repeats(answer)
            fresh, repeats = answer.those("new"), answer.those("repeat")
            if not fresh and not (repeats and is_cursor_new and not answer.those("stored")):
                break
            try:
                await self._persist(partial(self._store_next, answer, fresh))
            except PersonGone as exc:
                self._end_new(fresh, exc)
                await self._end_others(answer)
                is_gone = True
                break
            except Crashed as exc:  # a bug of the code that stores
                if len(fresh) > 1 and not answer.is_alone:
                    answer.is_alone = True
                elif fresh:
                    fresh[0].outcome, fresh[0].detail = "crashed", exc.detail
                    await self._end_others(answer)
                else:
                    break
                continue
            if not fresh:
                break
        stored = answer.those("stored")
        if polled.cursor is not None and not stored and (is_gone or person.position <= started):
            person.on_cursor(polled.cursor)
        if stored:
            took_s = max(0, self._parts.clock.now_ms() - received_ms) / 1000
            self._parts.metrics.inbound_publish_duration.observe(took_s)
            if not self._is_owner():
                await self._parts.others.publish_polled(self._bot)
        return bool(stored) or is_cursor_new or not answer.those("repeat")

    # reading ----------------------------------------------------------------------------------------

    async def _translate(self, polled: Polled, received_ms: int) -> list[Received]:
        """The messages in the terms of the bus. What cannot be read is marked."""
        found: list[Received] = []
        size = 0
        for number, raw in enumerate(polled.messages):
            size += 1 + len(raw) // 1024
            if size > SLICE:
                await self._parts.ticks.wait_tick()
                size = 0
            found.append(self._read(raw, number, polled.cursor or "", received_ms))
        return found

    def _read(self, raw: bytes, number: int, cursor: str, received_ms: int) -> Received:
        try:
            message = self._parts.read_message(raw)
            if not message.keys.message and cursor:
                message = msgspec.structs.replace(message, keys=message.keys.with_position(cursor, number))
            one = Received(raw, message, id=message.keys.id_for(self._bot))
            if message.echo or message.user == self._bot:  # some echoes have no type
                one.outcome = "echo"
            elif message.group:
                # an answer might go to the group, or to a member who is not the bot's user
                one.outcome, one.detail = "group", "The message is from a group."
            else:
                one.line = message.keys.fingerprint(received_ms)
            return one
        except Unreadable as exc:
            return Received(raw, outcome="unreadable", detail=exc.detail)
        except Exception:
            log.exception("inbound.crashed", bot=self._bot, work="read")
            return Received(raw, outcome="crashed", detail=Crashed().detail)

    def _address(self, answer: _Answer) -> None:
        """Marks what somebody wrote whom the bot does not serve. A bot without a known user serves who writes
        first."""
        user = self._person.user or answer.binding.user
        for one in answer.those("new"):
            assert one.message is not None
            user = user or one.message.user
            if one.message.user != user:
                one.outcome, one.detail = "stranger", "The bot serves another person."

    def _drop_repeats(self, answer: _Answer) -> None:
        """Marks new messages that are repeats."""
        seen, among = self._person.seen, DedupWindow()
        for one in answer.those("new"):
            assert one.message is not None
            keys = one.message.keys
            if seen.is_repeat(keys) or (len(among) and among.is_repeat(keys)):
                one.outcome = "repeat"
                self._count(one, "duplicate")
                log.info("inbound.duplicate", sandbox=self._person.key.sandbox, message=one.id)
            elif len(answer.read) > 1:
                among.add([one.line], len(answer.read))

    # storing ----------------------------------------------------------------------------------------

    async def _store_next(self, answer: _Answer, fresh: Sequence[Received]) -> None:
        """Stores the next entry of an answer, or finds out why it was refused. Raises PersonGone, Temporary."""
        parts, person, limit = self._parts, self._person, self._parts.max_payload()
        largest = limit - min(limit // 4, OTHER_BYTES)
        for one in fresh:
            if not one.payload:
                self._build(one, answer)
            if len(one.payload) > largest and not one.detail:
                await self._make_stub(one, "The bus refuses a message of this size.", answer.binding)
        if any(one.outcome != "new" for one in fresh):
            await self._end_others(answer)
            return
        _, end = next(in_chunks([len(one.payload) for one in fresh], 0 if answer.is_alone else limit // 2))
        taken = fresh[:end]
        await self._ensure_bound(answer.binding)
        entry, secrets, after = self._entry(answer, taken, is_last=end == len(fresh))
        payload = encode_entry(entry, secrets, self._subject, parts.sealer)
        headers = {names.H_SCHEMA: contract.SCHEMA_VERSION, names.H_EXPECTED: str(person.position)}
        try:
            sequence = (await parts.bus.publish(BusMessage("in", self._subject, payload, headers))).seq
        except Conflict:
            if (found := await self._resolve(answer.nonce)) is None:
                return
            sequence = found
        except BusRefused as exc:
            await self._on_refused(answer, taken, exc)
            return
        await self._on_stored(answer, taken, sequence, after)

    def _is_owner(self) -> bool:
        try:
            self._person.tenure.check()
        except LeaseLost:
            return False
        return True

    async def _ensure_bound(self, binding: Binding) -> None:
        """Raises PersonGone if the person's time is over, as far as is known here; who does not own the person asks
        the bucket."""
        bindings, key, status = self._parts.bindings, self._person.key, self._person.status
        if status in OVER:
            raise PersonGone("erased" if status is Status.ERASED else "not_bound", GONE)
        now = bindings.serving(binding.bot)
        if not (is_owner := self._is_owner()):
            log.warning("inbound.fenced", bot=self._bot, sandbox=key.sandbox)
        if now is None or not is_owner:  # the bus may have one that is not known here yet
            await bindings.refresh(binding.bot)
            now = bindings.serving(binding.bot)
        if now is None or (now.sandbox, now.since) != (key.sandbox, key.since):
            raise PersonGone("not_bound", f"The bot {binding.bot} was not bound when the message arrived.")

    def _entry(
        self, answer: _Answer, taken: Sequence[Received], *, is_last: bool
    ) -> tuple[Entry, Secrets, AnswerState]:
        """An entry with these messages, and the state after it: behind another's entry the cursor stays, and of token
        and window the newer ones count."""
        person, state = self._person, self._person.state
        stored = len(answer.those("stored"))
        size, lines = stored + len(taken), [one.line for one in taken]
        is_others = state.bot != self._bot or (person.position > answer.started and not stored)
        opened, token = self._opened_by(answer, taken, is_others=is_others)
        new_cursor = answer.polled.cursor
        cursor = state.cursor if is_others or not is_last or new_cursor is None else new_cursor
        user = person.user or next((one.message.user for one in taken if one.message is not None), "")
        shown = OpenedWindow(state.window.id, state.window.written_ms, state.window.opened_ms)
        if opened is not None:
            shown = OpenedWindow(opened.message, opened.written_ms, answer.received_ms)
        entry = Entry(
            since=person.key.since,
            nonce=answer.nonce,
            user=user,
            bot=state.bot,
            seen=person.prints_with(lines, size),
            window=shown,
            messages=[msgspec.Raw(one.payload) for one in taken],
        )
        media = tuple((number, one.fetches) for number, one in enumerate(taken) if one.fetches)
        secrets = Secrets(token=token or state.token, cursor=cursor or "", bots=state.bots, media=media)
        return entry, secrets, AnswerState(lines, size, cursor, token, opened)

    def _opened_by(
        self, answer: _Answer, taken: Sequence[Received], *, is_others: bool
    ) -> tuple[InboundReceived | None, str]:
        """What the last message opens, and the newest token. Behind another owner's entry the message counts that
        iLink says is newer; a token of another bot than the state's is not taken."""
        state = self._person.state
        if not taken:
            # a repeat may have a newer token
            known = [one.message for one in answer.those("repeat") if one.id == state.window.id]
            tokens = [message.context_token for message in known if message is not None]
            return None, "" if is_others else next(filter(None, tokens), "")
        last = taken[-1].message
        assert last is not None
        if is_others and (state.bot != self._bot or 0 < last.sent_at_ms < state.window.written_ms):
            return None, ""
        of_taken = (one.message.context_token for one in reversed(taken) if one.message is not None)
        token = next(filter(None, of_taken), "")
        return InboundReceived(taken[-1].id, token, last.sent_at_ms, answer.received_ms), token

    async def _resolve(self, nonce: str) -> int | None:
        """What a refused write means. Returns the entry's sequence if it is stored; None: it has to be made anew.
        Raises PersonGone, Temporary."""
        persons, person = self._parts.persons, self._person
        behind = await persons.behind(person.key, person.position)
        if not behind:
            _, last = await persons.newest(person.key)
            if last < person.position:  # else somebody has stored an entry meanwhile: it refuses the next write, too
                person.position = last
                log.info("inbound.set_back", sandbox=person.key.sandbox, position=last)
        for stored in behind:
            try:
                found = persons.read(stored)
            except Unreadable as exc:
                log.error("entry.unreadable", sandbox=person.key.sandbox, sequence=stored.seq, detail=exc.detail)
                person.position = stored.seq
                continue
            entry = found.entry
            if entry.nonce == nonce:
                return stored.seq  # what others have stored behind it refuses the next write
            person.adopt(found)
            if person.status in OVER or entry.since != person.key.since:
                raise PersonGone("erased" if entry.erased else "not_bound", GONE)
        return None

    async def _on_stored(self, answer: _Answer, taken: Sequence[Received], sequence: int, after: AnswerState) -> None:
        parts, person = self._parts, self._person
        now_ms, ages = parts.clock.now_ms(), parts.metrics.inbound_age
        answer.nonce = new_nonce()
        await self._ring(taken, sequence)
        for one in taken:
            message = one.message
            assert message is not None
            one.outcome = "stored"
            person.learn(person.user or message.user)
            self._count(one, "published")
            if message.sent_at_ms:
                ages.observe(max(0, now_ms - message.sent_at_ms) / 1000)
            if one.fetches:
                parts.media.fetch_soon(person.key.sandbox, message.user, one.id, one.items, one.fetches)
        log.info("inbound.published", sandbox=person.key.sandbox, messages=[one.id for one in taken])
        try:
            person.on_stored(sequence, after)
            if answer.binding.options.auto_typing and taken:
                person.sender.show_typing()
        except Exception:  # it costs the window, not the message
            log.exception("inbound.crashed", bot=self._bot, work="on_stored")

    async def _ring(self, messages: Sequence[Received], sequence: int) -> None:
        """Publishes each message live, at most once. A ring that is lost costs an agent some seconds: it asks
        `next`."""
        parts, live = self._parts, self._parts.names.live(self._person.key.sandbox)
        for number, one in enumerate(messages):
            headers = {
                names.H_SCHEMA: contract.SCHEMA_VERSION,
                names.H_POSITION: names.position(sequence, number),
                names.H_TRACEPARENT: names.derive_traceparent(one.id),
            }
            try:
                await parts.core.publish(live, one.payload, headers)
            except Temporary as exc:
                log.info("ring.skipped", sandbox=self._person.key.sandbox, reason=exc.reason)

    async def _on_refused(self, answer: _Answer, taken: Sequence[Received], refusal: BusRefused) -> None:
        """The stream refuses an entry: a message alone leaves a stub in its place, and itself as a dead letter.
        Raises Temporary if the stream is full."""
        if refusal.is_full:
            log.error("inbound.full", bot=self._bot)  # its discard policy was changed
            raise Temporary("inbox_full", refusal.detail)
        log.error("inbound.refused", bot=self._bot, messages=[one.id for one in taken], code=refusal.code)
        if len(taken) != 1:
            answer.is_alone = True
            if not taken:
                raise Temporary("entry_refused", refusal.detail)
            return
        one = taken[0]
        self._count(one, "publish_failed")
        if one.detail:  # the stub is refused, too
            one.outcome = "too_large"
            await self._dead_letter(one, "too_large", one.detail, answer.binding)
        else:
            await self._make_stub(one, "The bus refuses the message.", answer.binding)

    # what agents read -------------------------------------------------------------------------------

    def _build(self, one: Received, answer: _Answer) -> None:
        """Makes what agents read of a message. One at which the code raises becomes a dead letter."""
        assert one.message is not None
        try:
            one.payload = msgspec.json.encode(self._inbound_of(one, one.message, answer))
        except Exception:
            log.exception("inbound.crashed", bot=self._bot, work="build")
            one.outcome, one.detail = "crashed", Crashed().detail

    def _inbound_of(self, one: Received, message: InboundMessage, answer: _Answer) -> Inbound:
        sandbox, state, quote = self._person.key.sandbox, self._person.state, message.quote
        one.items, one.fetches = message.items, tuple(message.fetches)
        if message.fetches:
            if answer.binding.options.media:
                one.items = name_media(sandbox, message.user, one.id, one.items, one.fetches)
            else:
                one.items, one.fetches = _without_media(one.items, one.fetches), ()
        if quote is not None and message.reference is not None:
            sent = next((sent for sent in state.sent if sent.id in message.reference.ids), None)
            if sent is not None:
                quote = resolve_quote(quote, message.reference, sent=sent.text, kind=sent.kind)
        token = message.context_token or state.token
        opened = PersonState(token=token, window=SendWindow(opened_ms=answer.received_ms))
        return Inbound(
            id=one.id,
            sandbox=sandbox,
            bot=self._bot,
            user=message.user,
            sent_at_ms=message.sent_at_ms,
            received_at_ms=answer.received_ms,
            text=message.text,
            items=one.items,
            quote=quote,
            window=window.visible_window(opened, answer.received_ms, self._parts.policy.window),
        )

    # dead letters -----------------------------------------------------------------------------------

    def _end_new(self, fresh: Sequence[Received], gone: PersonGone) -> None:
        for one in fresh:
            if one.outcome == "new":
                one.outcome, one.detail = ("dropped" if gone.reason == "erased" else "not_bound"), gone.detail
        if gone.reason == "erased":
            log.warning("inbound.dropped", bot=self._bot, messages=len(fresh), detail="Its person was erased.")

    async def _end_others(self, answer: _Answer) -> None:
        """Counts what is for no inbox, and stores dead letters."""
        for one in answer.read:
            if one.outcome == "echo":
                self._count(one, "rejected")
                one.outcome = "dropped"
            elif one.outcome not in ("new", *ENDED):
                self._count(one, "unbound" if one.outcome == "not_bound" else "dead_lettered")
                await self._dead_letter(one, one.outcome, one.detail, answer.binding)
                one.outcome = "dropped"  # once

    async def _make_stub(self, one: Received, detail: str, binding: Binding) -> None:
        """Leaves a stub in the place of a message that is too large; a dead letter keeps the bytes."""
        await self._dead_letter(one, "too_large", detail, binding)
        stub = [contract.UnsupportedItem(type=0, reason="too_large")]
        inbound = msgspec.json.decode(one.payload, type=Inbound)
        one.payload = msgspec.json.encode(msgspec.structs.replace(inbound, text="", quote=None, items=stub))
        one.detail, one.fetches = detail, ()

    async def _dead_letter(self, one: Received, reason: str, detail: str, binding: Binding) -> None:
        parts, sandbox = self._parts, binding.sandbox
        msg_id = f"dead:{self._bot}:{names.digest(one.raw)}"
        # an erasure cannot look into what is sealed; the bot of what cannot be read serves one person
        user = one.message.user if one.message is not None else binding.user
        headers = {names.H_TRACEPARENT: names.derive_traceparent(one.id), names.H_MSG_ID: one.id} if one.id else {}
        await self._persist(
            lambda: parts.events.publish_dead_letter(
                "IN",
                one.raw,
                subject=self._subject,
                headers=headers,
                reason=reason,
                detail=detail,
                msg_id=msg_id,
                sandbox=sandbox,
                user=user if user.isascii() and user.isprintable() else "",  # else no header can name it
                seal=partial(parts.sealer.seal_bytes, dead_context(msg_id)),
            )
        )

    def _persist(self, work: Callable[[], Awaitable[T]]) -> Awaitable[T]:
        """Retries also what the bus refuses: iLink may not deliver the messages again, and an operator can lift a
        limit. Raises Crashed, PersonGone, RecordTooNew."""
        return persist(work, ANYBODY, self._parts.clock, "receive", bot=self._bot)

    def _count(self, one: Received, outcome: str) -> None:
        kind = one.message.kind if one.message else "unsupported"
        self._parts.metrics.inbound_messages.child(kind, outcome).inc()


def _without_media(items: Sequence[InboundItem], fetches: Sequence[MediaRef]) -> list[InboundItem]:
    """The items without media, since the binding wants none."""
    kept = list(items)
    for fetch in fetches:
        kept[fetch.item] = msgspec.structs.replace(kept[fetch.item], reason="off")
    return kept
