"""Stores the messages of an answer of iLink: as one entry of the person's subject, or as dead letters.

There is one path: translate, drop repeats, store under the fence, ring. iLink forgets an answer with the next poll,
so `receive` returns only when all of it is stored, and waits as long as JetStream accepts no writes. A dead letter
that the stream refuses is logged, and nothing waits for it. An answer in hand is stored under the same fence whether
this replica still owns the person or not, since it may exist nowhere else.

A refused write has one cause of four, and what lies behind the expectation tells which (`_resolve`):

    own nonce among it               stored, only the ack was lost
    entries of the same time         another owner's: repeats are dropped, the rest is stored behind them
    `ended`, or another time         the person is gone: dead letters
    nothing, or a lower sequence     aged, evicted, deleted or restored: stored behind what is there
                                     (and 10164 of a cluster that refuses for another write in flight)
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TypeVar

import msgspec
import structlog

from adapter.bridge import window
from adapter.bridge.entries import Entry, OpenedWindow, Secrets, clear_of, encode_entry, fitting, new_nonce
from adapter.bridge.handover import say_polled
from adapter.bridge.media import name_media
from adapter.bridge.parts import Parts
from adapter.bridge.person import AnswerState, Person
from adapter.bridge.persons import binding_of
from adapter.bridge.window import InboundReceived
from adapter.contract import messages as contract
from adapter.contract import names
from adapter.contract.messages import Inbound, InboundItem
from adapter.contract.quotes import resolve_quote
from adapter.contract.records import Binding
from adapter.contract.repeats import DedupWindow
from adapter.errors import (
    BusRefused,
    Conflict,
    Crashed,
    LeaseLost,
    PersonGone,
    RecordTooNew,
    Refused,
    Temporary,
    Unreadable,
)
from adapter.ports import BusMessage, InboundMessage, MediaRef, Polled
from adapter.tools.seal import dead_context
from adapter.tools.tasks import persist

log = structlog.get_logger()

T = TypeVar("T")

SLICE = 50
"""Most messages plus KiB of them that are translated in one turn of the event loop."""
ENDED = ("repeat", "stored", "dropped")
"""Outcomes that leave no dead letter."""
UNBOUND = "The person was unbound before the message was stored."


class _Anybody:
    """Implements tools.tasks.Owner: an answer in hand is stored, whoever owns the person now."""

    def check(self) -> None: ...

    async def valid(self) -> None: ...


ANYBODY = _Anybody()


class Received(msgspec.Struct):
    """One message of an answer."""

    raw: bytes
    message: InboundMessage | None = None
    """None: it cannot be read."""
    outcome: str = "new"
    """new, echo, or one of ENDED; or a dead letter's reason: unreadable, crashed, group, not_bound, stranger,
    too_large."""
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


class Receiver:
    """Stores one answer of iLink. Only a bot's poller makes one."""

    def __init__(
        self, bot: str, person: Person, parts: Parts, polled: Polled, binding: Binding, started: int
    ) -> None:
        """`binding`: with which it was polled; `started`: the person's position when the poll began."""
        self._bot = bot
        self._person = person
        self._parts = parts
        self._polled = polled
        self._binding = binding
        self._started = started
        self._subject = parts.persons.subject(person.key)
        self._received_ms = parts.clock.now_ms()
        self._read: list[Received] = []
        self._nonce = ""
        """Of the next entry, also where its write is tried again; "": it was not tried."""
        self._expected: int | None = None
        """The expectation of that entry's first write; None: it was not tried."""
        self._is_alone = False
        """Each message gets an entry of its own, since one of them is at fault."""

    async def receive(self) -> bool:
        """Returns when all messages are stored. False: iLink has only repeated what is known, and has given no new
        cursor."""
        parts, person, cursor = self._parts, self._person, self._polled.cursor
        is_cursor_new = cursor not in (None, person.state.cursor)
        await self._translate()
        try:
            if not self._is_owner():
                await self._persist(self._ensure_bound)
            self._address()
            await self._end_others()
            for one in self._read:
                if one.outcome == "new" and one.message is not None and one.message.broken:
                    await self._dead_letter(one, "unreadable", one.message.broken)
            await self._store_all(is_cursor_new)
        except PersonGone as gone:
            await self._on_gone(gone)
        stored = self._with_outcome("stored")
        if cursor is not None and not stored and person.position <= self._started:
            person.on_cursor(self._bot, cursor)
        if stored:
            took_s = max(0, parts.clock.now_ms() - self._received_ms) / 1000
            parts.metrics.inbound_publish_duration.observe(took_s)
            if not self._is_owner():
                await say_polled(parts, person.tenure.number, bot=self._bot)
        return bool(stored) or is_cursor_new or not self._with_outcome("repeat")

    def _with_outcome(self, outcome: str) -> list[Received]:
        return [one for one in self._read if one.outcome == outcome]

    # reading ----------------------------------------------------------------------------------------

    async def _translate(self) -> None:
        """Reads the messages in the terms of the bus. What cannot be read is marked."""
        size = 0
        for number, raw in enumerate(self._polled.messages):
            size += 1 + len(raw) // 1024
            if size > SLICE:
                await self._parts.ticks.wait_tick()
                size = 0
            self._read.append(self._translated(raw, number))

    def _translated(self, raw: bytes, number: int) -> Received:
        try:
            message = self._parts.read_message(raw)
            if not message.keys.message and (cursor := self._polled.cursor):
                message = msgspec.structs.replace(message, keys=message.keys.with_position(cursor, number))
            one = Received(raw, message, id=message.keys.id_for(self._bot))
            if message.echo or message.user == self._bot:  # some echoes have no type
                one.outcome = "echo"
            elif message.group:
                # an answer might go to the group, or to a member who is not the bot's user
                one.outcome, one.detail = "group", "The message is from a group."
            else:
                one.line = message.keys.fingerprint(self._received_ms)
            return one
        except Unreadable as exc:
            return Received(raw, outcome="unreadable", detail=exc.detail)
        except Exception:
            log.exception("inbound.crashed", bot=self._bot, work="read")
            return Received(raw, outcome="crashed", detail=Crashed().detail)

    def _address(self) -> None:
        """Marks what somebody wrote whom the bot does not serve. A bot without a known user serves who writes
        first."""
        user = self._person.user or self._binding.user
        for one in self._with_outcome("new"):
            assert one.message is not None
            user = user or one.message.user
            if one.message.user != user:
                one.outcome, one.detail = "stranger", "The bot serves another person."

    def _fresh(self) -> list[Received]:
        """The new messages. Those that are known, or come twice in the answer, are marked as repeats."""
        fresh, seen, among = list[Received](), self._person.seen, DedupWindow()
        for one in self._read:
            if one.outcome != "new" or one.message is None:
                continue
            keys = one.message.keys
            if seen.is_repeat(keys) or (fresh and among.is_repeat(keys)):
                one.outcome = "repeat"
                self._count(one, "duplicate")
                log.info("inbound.duplicate", sandbox=self._person.key.sandbox, message=one.id)
                continue
            fresh.append(one)
            if len(self._read) > 1:
                among.add([one.line], len(self._read))
        return fresh

    # storing ----------------------------------------------------------------------------------------

    async def _store_all(self, is_cursor_new: bool) -> None:
        """Stores entry after entry. A bug of the code that stores costs the message at which it raises. Raises
        PersonGone."""
        while fresh := self._fresh():
            try:
                await self._persist(partial(self._store_next, fresh))
            except Crashed as exc:
                if len(fresh) > 1 and not self._is_alone:
                    self._is_alone = True
                else:
                    fresh[0].outcome, fresh[0].detail = "crashed", exc.detail
                    await self._end_others()
        # behind another owner's entry neither cursor nor token of repeats count
        is_last = self._person.position <= self._started and not self._with_outcome("stored")
        if is_cursor_new and is_last and self._with_outcome("repeat"):
            with contextlib.suppress(Crashed):
                await self._persist(partial(self._store_next, ()))

    async def _store_next(self, fresh: Sequence[Received]) -> None:
        """Stores the next entry of the answer, or finds out why it was refused. Raises PersonGone, Temporary."""
        parts, person = self._parts, self._person
        for one in fresh:
            if not one.payload:
                self._build(one)
        if any(one.outcome != "new" for one in fresh):
            await self._end_others()
            return
        most_bytes = 0 if self._is_alone else parts.max_payload() // 2
        taken = fresh[: fitting([len(one.payload) for one in fresh], most_bytes)]
        await self._ensure_bound()
        self._nonce = self._nonce or new_nonce()
        entry, secrets, after = self._entry(taken, is_last=len(taken) == len(fresh))
        payload = encode_entry(entry, secrets, self._subject, parts.sealer)
        # a repeat expects what the first write did: the sender may have read and taken what that has stored
        expected = self._expected = person.position if self._expected is None else self._expected
        headers = {names.H_SCHEMA: contract.SCHEMA_VERSION, names.H_EXPECTED: str(expected)}
        try:
            sequence = (await parts.bus.store(BusMessage("in", self._subject, payload, headers))).seq
        except Conflict:
            found = await self._resolve(expected)
            self._expected = None
            if found is None:
                return
            sequence = found
        except BusRefused as exc:
            await self._on_refused(taken, exc)
            return
        await self._on_stored(taken, sequence, after)

    def _is_owner(self) -> bool:
        try:
            self._person.tenure.check()
        except LeaseLost:
            return False
        return True

    async def _ensure_bound(self) -> None:
        """Raises PersonGone if the person's time is over, as far as is known here; who does not own the person asks
        the bucket."""
        bindings, binding = self._parts.bindings, self._binding
        person, key = self._person, self._person.key
        if person.gone:
            raise PersonGone(person.gone, UNBOUND)
        now = bindings.get(binding.bot)
        if not (is_owner := self._is_owner()):
            log.warning("inbound.fenced", bot=self._bot, sandbox=key.sandbox)
        if now is None or not is_owner:  # the bus may have one that is not known here yet
            await bindings.refresh(binding.bot)
            now = bindings.get(binding.bot)
        if is_owner and binding_of(bindings, key) is not None:
            return  # perhaps by another bot of theirs, which has taken the place of this one
        if now is None or (now.sandbox, now.since) != (key.sandbox, key.since):
            with contextlib.suppress(RecordTooNew, Refused):  # it cannot be read here, and says nothing
                await self._person.read_newest()
            if self._person.gone == "erased":
                raise PersonGone("erased", UNBOUND)
            raise PersonGone("not_bound", f"The bot {binding.bot} was not bound when the message arrived.")

    def _entry(self, taken: Sequence[Received], *, is_last: bool) -> tuple[Entry, Secrets, AnswerState]:
        """An entry with these messages, and the state after it: behind another's entry the cursor stays, and of token
        and window the newer ones count."""
        person, state = self._person, self._person.state
        stored = len(self._with_outcome("stored"))
        size, lines = stored + len(taken), [one.line for one in taken]
        is_others = state.bot != self._bot or (person.position > self._started and not stored)
        opened, token = self._opened_by(taken, is_others=is_others)
        cursor = self._polled.cursor
        if is_others or not is_last or cursor is None:
            cursor = state.cursor
        user = person.user or next((one.message.user for one in taken if one.message is not None), "")
        shown = OpenedWindow(state.window.id, state.window.written_ms, state.window.opened_ms)
        if opened is not None:
            shown = OpenedWindow(opened.message, opened.written_ms, self._received_ms)
        entry = Entry(
            since=person.key.since,
            nonce=self._nonce,
            user=user,
            bot=state.bot,
            seen=person.prints_with(lines, size),
            window=shown,
            messages=[msgspec.Raw(one.payload) for one in taken],
        )
        media = tuple((number, one.fetches) for number, one in enumerate(taken) if one.fetches)
        secrets = Secrets(token=token or state.token, cursor=cursor or "", bots=state.bots, media=media)
        return entry, secrets, AnswerState(state.bot, lines, size, cursor, token, opened)

    def _opened_by(self, taken: Sequence[Received], *, is_others: bool) -> tuple[InboundReceived | None, str]:
        """What the last message opens, and the newest token. Behind another owner's entry the message counts that
        iLink says is newer; a token of another bot than the state's is not taken."""
        state = self._person.state
        if not taken:
            # a repeat may have a newer token
            known = [one.message for one in self._with_outcome("repeat") if one.id == state.window.id]
            tokens = [message.context_token for message in known if message is not None]
            return None, "" if is_others else next(filter(None, tokens), "")
        last = taken[-1].message
        assert last is not None
        if is_others and (state.bot != self._bot or 0 < last.sent_at_ms < state.window.written_ms):
            return None, ""
        of_taken = (one.message.context_token for one in reversed(taken) if one.message is not None)
        token = next(filter(None, of_taken), "")
        return InboundReceived(taken[-1].id, token, last.sent_at_ms, self._received_ms), token

    async def _resolve(self, expected: int) -> int | None:
        """What a write means that was refused at this expectation. Returns the entry's sequence if it is stored;
        None: it has to be made anew. Raises PersonGone, Temporary."""
        persons, person = self._parts.persons, self._person
        behind = await persons.behind(person.key, expected)
        if not behind:
            _, last = await persons.newest(person.key)
            if last < person.position:  # else somebody has stored an entry meanwhile: it refuses the next write, too
                person.position = last
                log.info("inbound.set_back", sandbox=person.key.sandbox, position=last)
        for stored in behind:
            try:
                found = persons.read(stored)
            except (Unreadable, RecordTooNew) as exc:
                log.error("entry.unreadable", sandbox=person.key.sandbox, sequence=stored.seq, detail=exc.detail)
                person.position = stored.seq
                about = clear_of(stored.data)
                if about.ended or about.since > person.key.since:
                    raise PersonGone("erased" if about.erased else "not_bound", UNBOUND) from exc
                continue
            entry = found.entry
            if entry.nonce == self._nonce:
                return stored.seq  # what others have stored behind it refuses the next write
            person.take_entry(found)
            if person.gone or entry.since != person.key.since:
                raise PersonGone("erased" if entry.erased else "not_bound", UNBOUND)
        return None

    async def _on_stored(self, taken: Sequence[Received], sequence: int, after: AnswerState) -> None:
        parts, person = self._parts, self._person
        now_ms, ages = parts.clock.now_ms(), parts.metrics.inbound_age
        self._nonce, self._expected = "", None
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
            if self._binding.options.auto_typing and taken:
                person.show_typing()
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

    async def _on_refused(self, taken: Sequence[Received], refusal: BusRefused) -> None:
        """The stream refuses an entry: a message alone leaves a stub in its place, and itself as a dead letter.
        Raises Temporary if the stream is full."""
        if refusal.is_full:
            log.error("inbound.full", bot=self._bot)  # its discard policy was changed
            raise Temporary("inbox_full", refusal.detail)
        log.error("inbound.refused", bot=self._bot, messages=[one.id for one in taken], code=refusal.code)
        if len(taken) != 1:
            self._is_alone = True
            if not taken:
                raise Temporary("entry_refused", refusal.detail)
            return
        one = taken[0]
        if one.detail:  # the stub is refused, too
            one.outcome = "too_large"
            await self._dead_letter(one, "too_large", one.detail)
        else:
            self._count(one, "publish_failed")
            await self._dead_letter(one, "too_large", "The bus refuses the message.")
            stub = [contract.UnsupportedItem(type=0, reason="too_large")]
            inbound = msgspec.json.decode(one.payload, type=Inbound)
            one.payload = msgspec.json.encode(msgspec.structs.replace(inbound, text="", quote=None, items=stub))
            one.detail, one.fetches = "The bus refuses the message.", ()

    # what agents read -------------------------------------------------------------------------------

    def _build(self, one: Received) -> None:
        """Makes what agents read of a message. One at which the code raises becomes a dead letter."""
        assert one.message is not None
        try:
            one.payload = msgspec.json.encode(self._inbound_of(one, one.message))
        except Exception:
            log.exception("inbound.crashed", bot=self._bot, work="build")
            one.outcome, one.detail = "crashed", Crashed().detail

    def _inbound_of(self, one: Received, message: InboundMessage) -> Inbound:
        sandbox, state, quote = self._person.key.sandbox, self._person.state, message.quote
        one.items, one.fetches = message.items, tuple(message.fetches)
        if message.fetches:
            if self._binding.options.media:
                one.items = name_media(sandbox, message.user, one.id, one.items, one.fetches)
            else:
                one.items, one.fetches = _without_media(one.items, one.fetches), ()
        if quote is not None and message.reference is not None:
            sent = next((sent for sent in state.sent if sent.id in message.reference.ids), None)
            if sent is not None:
                quote = resolve_quote(quote, message.reference, sent=sent.text, kind=sent.kind)
        opened = InboundReceived(one.id, message.context_token, message.sent_at_ms, self._received_ms)
        after = self._person.state_after(opened)
        return Inbound(
            id=one.id,
            sandbox=sandbox,
            bot=self._bot,
            user=message.user,
            sent_at_ms=message.sent_at_ms,
            received_at_ms=self._received_ms,
            text=message.text,
            items=one.items,
            quote=quote,
            window=window.visible_window(after, self._received_ms, self._parts.policy.window),
        )

    # dead letters -----------------------------------------------------------------------------------

    async def _on_gone(self, gone: PersonGone) -> None:
        """What is left belongs to nobody. Of who was erased nothing is kept."""
        if gone.reason == "erased":
            left = [one for one in self._read if one.outcome not in ENDED]
            for one in left:
                one.outcome = "dropped"
            log.warning("inbound.dropped", bot=self._bot, messages=len(left), detail="Its person was erased.")
        for one in self._with_outcome("new"):
            one.outcome, one.detail = "not_bound", gone.detail
        await self._end_others()

    async def _end_others(self) -> None:
        """Counts what is for no inbox, and stores dead letters."""
        for one in self._read:
            if one.outcome == "echo":
                self._count(one, "rejected")
                one.outcome = "dropped"
            elif one.outcome not in ("new", *ENDED):
                self._count(one, "unbound" if one.outcome == "not_bound" else "dead_lettered")
                await self._dead_letter(one, one.outcome, one.detail)
                one.outcome = "dropped"  # once

    async def _dead_letter(self, one: Received, reason: str, detail: str) -> None:
        parts = self._parts
        msg_id = f"dead:{self._bot}:{names.digest(one.raw)}"
        # an erasure cannot look into what is sealed; the bot of what cannot be read serves one person
        user = one.message.user if one.message is not None else self._binding.user
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
                sandbox=self._binding.sandbox,
                user=user if user.isascii() and user.isprintable() else "",  # else no header can name it
                seal=partial(parts.sealer.seal_bytes, dead_context(msg_id)),
            )
        )

    def _persist(self, work: Callable[[], Awaitable[T]]) -> Awaitable[T]:
        """Retries also what the bus refuses: iLink may not deliver the messages again, and an operator can lift a
        limit. Raises Crashed, PersonGone."""
        return persist(work, ANYBODY, self._parts.clock, "receive", bot=self._bot)

    def _count(self, one: Received, outcome: str) -> None:
        kind = one.message.kind if one.message else "unsupported"
        self._parts.metrics.inbound_messages.labels(kind, outcome).inc()


def _without_media(items: Sequence[InboundItem], fetches: Sequence[MediaRef]) -> list[InboundItem]:
    """The items without media, since the binding wants none."""
    kept = list(items)
    for fetch in fetches:
        kept[fetch.item] = msgspec.structs.replace(kept[fetch.item], reason="off")
    return kept
