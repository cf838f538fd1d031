"""Stores the messages of an answer of iLink: each in the inbox of its sandbox, or as a dead letter, in order.

There is one path: translate, drop repeats, publish in order, wait for all acks; then the conversations take the
messages. iLink forgets an answer with the next poll, so `receive` returns only when all of it is stored. It waits as
long as JetStream accepts no writes. If the bot is lost meanwhile, the answer may exist nowhere else: it is stored all
the same, for whoever the binding names then (`_store_after_loss`).
"""

from __future__ import annotations

import asyncio
import binascii
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TypeVar

import msgspec
import structlog

from adapter.bindings.registry import Bindings
from adapter.content.dedup import DedupWindow
from adapter.content.quotes import resolve_quote
from adapter.contract import messages as contract
from adapter.contract.messages import Inbound, InboundItem
from adapter.contract.names import (
    H_BOT,
    H_MSG_ID,
    H_SCHEMA,
    H_SEALED,
    H_SEEN,
    H_TRACEPARENT,
    MAX_SEQ,
    Names,
    derive_traceparent,
    digest,
)
from adapter.contract.records import Binding
from adapter.errors import BusRefused, Crashed, LeaseLost, RecordTooNew, Unreadable
from adapter.inbound.checkpoint import Checkpoint, Checkpoints
from adapter.inbound.media import MediaFetcher, name_media
from adapter.kit.persist import Owner, persist
from adapter.kit.timing import Clock, PerTickLimiter, RateLimiter, WakeupBatcher
from adapter.observability.events import Events
from adapter.observability.metrics import Metrics
from adapter.outbound import window
from adapter.outbound.conversation import Conversation
from adapter.outbound.inbox import InboxReader, Sealed, seal
from adapter.outbound.record import ConversationRecord, SendWindow
from adapter.outbound.sessions import BotSessions
from adapter.outbound.shard import Shard
from adapter.outbound.window import InboundReceived
from adapter.ownership.leases import Leases
from adapter.ownership.replica_status import OtherReplicas
from adapter.ports import Bus, BusMessage, Chat, History, InboundMessage, MediaRef, Polled, PubAck
from adapter.security.seal import Sealer, dead_context

log = structlog.get_logger()

T = TypeVar("T")

SLICE = 50
"""Most messages plus KiB of them that are translated and published together. It bounds the memory that a huge answer
takes, its share of a turn of the event loop, and the ids in a line of the log, which keeps no more of a list."""
IDS_KNOWN_S = 30.0
"""Time for which the stream surely knows the id of what it has stored, even if it loses the acknowledgement."""
OTHER_HEADERS = 1024
"""Bytes for the headers of a message beside the sealed one."""
STRANGER = "The bot serves another person."
TAKEN = "Another bot of the sandbox serves this person already, and nobody is taken over: unbind one of the two bots."


_NOBODY = ConversationRecord()


class InboundDeps(msgspec.Struct, frozen=True):
    """What the pollers of a replica need."""

    chat: Chat
    read_message: Callable[[bytes], InboundMessage]
    bus: Bus
    history: History
    inboxes: InboxReader
    events: Events
    names: Names
    sealer: Sealer
    bindings: Bindings
    checkpoints: Checkpoints
    sessions: BotSessions
    on_session_changed: Callable[[Binding], None]
    """Called when a bot may or may no longer send, as its token is refused or taken again."""
    open_shard: Callable[[str], Awaitable[Shard | None]]
    """The shard of a sandbox once it works; None: another replica owns it."""
    policy: window.WindowPolicy
    media: MediaFetcher
    leases: Leases
    others: OtherReplicas
    max_payload: Callable[[], int]
    is_writable: Callable[[], bool]
    """Whether `wait_writable` would return at once."""
    wait_writable: Callable[[], Awaitable[None]]
    """Returns when the bus accepts what a poll may bring; no poll starts before."""
    stale_retry_s: Sequence[float]
    """Pauses between retries of a token that iLink has refused (-14)."""
    login_polls_s: Sequence[float]
    """When a binding that needs a login is polled all the same (poller.LOGIN_POLLS_S)."""
    keep_s: int
    """Seconds for which the checkpoint of an unbound bot is kept."""
    # what spreads the work of thousands of bots, which would otherwise delay the event loop and the lease
    takeovers: asyncio.Semaphore
    """Bounds how many bots are taken at once."""
    starts: RateLimiter
    """Spreads the first polls, and those after an outage. Polls that begin together end together, and would begin
    together for ever."""
    wakeups: WakeupBatcher
    """Groups the next polls of bots that got no message."""
    ticks: PerTickLimiter
    clock: Clock
    metrics: Metrics


class _Anybody:
    """Implements kit.persist.Owner. What a replica has in hand that lost the bot may exist nowhere else."""

    def check(self) -> None: ...

    async def valid(self) -> None: ...


class _Read(msgspec.Struct):
    """One message of an answer."""

    raw: bytes
    message: InboundMessage | None = None
    """None: it cannot be read."""
    outcome: str = "new"
    """new, repeat, echo; or a dead letter's reason: unreadable, crashed, group, not_bound, stranger, too_large."""
    detail: str = ""
    """Why it is a dead letter."""
    id: str = ""
    """Id on the bus."""
    items: Sequence[InboundItem] = ()
    fetches: Sequence[MediaRef] = ()
    fingerprint: bytes = b""
    """Empty for what was not read, repeats and echoes."""
    payload: bytes = b""
    """What is published; empty: nothing."""
    headers: dict[str, str] = {}
    sequence: int = 0
    """In the inbox."""


class Receiver:
    """Receives for one bot. Only its poller calls it."""

    def __init__(self, bot: str, deps: InboundDeps) -> None:
        self.bot = bot
        self._deps = deps
        self._is_taken_told = False
        """An event has said that another bot of the sandbox serves whom iLink names."""
        self._whole = 0, contract.Window()
        """A window of which nothing is used, and when it was opened."""

    async def receive(self, polled: Polled, checkpoint: Checkpoint) -> None:
        """Returns when all messages are stored. Raises LeaseLost if the bot is lost; all are stored then, too."""
        messages, cursor = polled.messages, polled.cursor or ""
        received_ms = self._deps.clock.now_ms()
        lost: LeaseLost | None = None
        start = 0
        while start < len(messages):
            if start:
                await self._deps.ticks.wait_tick()
            read = self._read(messages, start, received_ms, cursor, checkpoint.seen)
            start += len(read)
            try:
                if lost is None:
                    await self._store(read, received_ms, checkpoint)
                    continue
            except LeaseLost as exc:
                lost = exc
                log.warning("inbound.fenced", bot=self.bot, reason=exc.reason)
            await self._store_after_loss(read, received_ms, checkpoint)
            checkpoint.seen.add(one.fingerprint for one in read)
        if lost is not None:
            await self._deps.others.publish_released(self.bot)
            raise lost

    def _read(
        self, messages: Sequence[bytes], start: int, received_ms: int, cursor: str, seen: DedupWindow
    ) -> list[_Read]:
        """Translates the messages from `start` on that are published together, at least one, and finds repeats."""
        bot, read_message = self.bot, self._deps.read_message
        found: list[_Read] = []
        hashes: set[bytes] = set()  # of their ids and contents: a repeat has one of these
        size = 0
        for number in range(start, len(messages)):
            raw = messages[number]
            size += 1 + len(raw) // 1024
            if size > SLICE and found:
                break
            try:
                message = read_message(raw)
                if not message.keys.message and cursor:
                    message = msgspec.structs.replace(message, keys=message.keys.with_position(cursor, number))
                keys = message.keys
                known_by = keys.hashed[::3]
                one = _Read(raw, message, id=keys.id_for(bot))
                if message.echo or message.user == bot:  # some echoes have no type
                    one.outcome = "echo"
                elif seen.is_repeat(keys) or (
                    not hashes.isdisjoint(known_by)
                    and DedupWindow(b"".join([other.fingerprint for other in found])).is_repeat(keys)
                ):
                    one.outcome = "repeat"
                else:
                    hashes.update(known_by)
                    one.fingerprint = keys.fingerprint(received_ms)
                    if message.group:
                        # an answer might go to the group, or to a member who is not the bot's user
                        one.outcome, one.detail = "group", "The message is from a group."
            except Unreadable as exc:
                one = _Read(raw, outcome="unreadable", detail=exc.detail)
            except Exception:
                log.exception("inbound.crashed", bot=self.bot, work="_read")
                one = _Read(raw, outcome="crashed", detail=Crashed().detail)
            found.append(one)
        return found

    # storing ----------------------------------------------------------------------------------------

    async def _store(self, read: Sequence[_Read], received_ms: int, checkpoint: Checkpoint) -> None:
        """Stores messages and gives them to their conversations. Raises LeaseLost."""
        deps, bindings = self._deps, self._deps.bindings
        if (binding := bindings.get(self.bot)) is None:  # the bus may have one that is not known here yet
            await self._persist(lambda: bindings.refresh(self.bot), checkpoint)
            binding = bindings.get(self.bot)
        if binding is not None and binding.sandbox != checkpoint.sandbox:
            await self._persist(partial(checkpoint.move, binding.sandbox, deps.inboxes), checkpoint)
            await self._persist(checkpoint.save, checkpoint)
        shard, conversation = None, None
        if binding is None or bindings.serving(self.bot) is None:
            _end_new(read, "not_bound", f"The bot {self.bot} was not bound when the message arrived.")
        else:
            binding = await self._end_strangers(read, binding, checkpoint)
            if any(_is_theirs(one, binding.user) for one in read):
                shard, conversation = await self._open(binding, checkpoint)
        try:
            if binding is not None:
                self._build_all(read, binding, received_ms, conversation)
            await self._publish(read, checkpoint, checkpoint)
            await self._end_others(read, binding, checkpoint)
            if binding is not None:
                self._update_conversation(read, binding, shard, conversation, received_ms, checkpoint)
        finally:
            if conversation is not None:
                conversation.holds -= 1
        lines = [one.fingerprint for one in read if one.fingerprint]
        if lines:  # not before: a checkpoint must not know what the inbox lacks
            checkpoint.seen.add(lines)
            checkpoint.note(len(lines))
            took_s = max(0, deps.clock.now_ms() - received_ms) / 1000
            deps.metrics.inbound_publish_duration.observe(took_s)

    async def _end_strangers(self, read: Sequence[_Read], binding: Binding, checkpoint: Checkpoint) -> Binding:
        """Ends what is not of the bot's user, whom a binding without one learns from the first message. Returns the
        binding. Raises LeaseLost."""
        for one in read:
            if not binding.user and one.message is not None and one.outcome in ("new", "repeat"):
                binding = await self._persist(partial(self._learn_user, binding, one.message.user), checkpoint)
        _end_strangers(read, binding.user)
        if not (binding.user or self._is_taken_told) and any(one.outcome == "stranger" for one in read):
            log.warning("inbound.user_taken", bot=self.bot, sandbox=binding.sandbox, detail=TAKEN)
            event, cause = binding.event("refused", reason="stranger", detail=TAKEN), f"stranger:{binding.since_ms}"
            tell = partial(self._deps.events.publish_binding_event, event, cause=cause, ensure_owner=checkpoint.check)
            await self._persist(tell, checkpoint)
            self._is_taken_told = True
        return binding

    async def _learn_user(self, binding: Binding, user: str) -> Binding:
        """Adds the user to a binding without one, unless another bot of the sandbox has them: whoever answers as
        iLink for one bot names whom it likes. Raises Temporary."""
        bindings = self._deps.bindings

        def with_user(now: Binding) -> Binding | None:
            taken = any(other.user == user for other in bindings.of_sandbox(now.sandbox))
            return None if now.user or taken else msgspec.structs.replace(now, user=user)

        await bindings.update(self.bot, with_user)
        return bindings.get(self.bot) or binding

    async def _open(self, binding: Binding, checkpoint: Checkpoint) -> tuple[Shard | None, Conversation | None]:
        """Opens and holds the conversation of the bot's user. No shard: it is another replica's, whose conversation
        finds the messages in the inbox. Raises LeaseLost."""
        if (shard := await self._deps.open_shard(binding.sandbox)) is None:
            return None, None
        if (conversation := shard.loaded(binding.sandbox, binding.user)) is None:
            try:
                opens = partial(shard.conversation, binding.sandbox, binding.user)
                conversation = await self._persist(opens, checkpoint)
            except (Crashed, RecordTooNew):  # the messages go on without it
                return shard, None
        conversation.holds += 1
        return shard, conversation

    # what is published ------------------------------------------------------------------------------

    def _build_all(
        self, read: Sequence[_Read], binding: Binding, received_ms: int, conversation: Conversation | None
    ) -> None:
        limit = self._deps.max_payload()
        for one in read:
            if one.outcome == "new":
                try:
                    self._build(one, binding, received_ms, limit, conversation)
                except Exception:
                    log.exception("inbound.crashed", bot=self.bot, work="_build")
                    one.outcome, one.detail = "crashed", Crashed().detail

    def _build(
        self, one: _Read, binding: Binding, received_ms: int, limit: int, conversation: Conversation | None
    ) -> None:
        """Makes the message for the inbox."""
        message, sandbox = one.message, binding.sandbox
        assert message is not None
        one.items, one.fetches, quote = message.items, message.fetches, message.quote
        if message.fetches:
            if binding.options.media:
                one.items = name_media(sandbox, message.user, one.id, one.items, one.fetches)
            else:
                one.items, one.fetches = _without_media(one.items, one.fetches), ()
        if quote is not None and message.reference is not None and conversation is not None:
            sent = next((sent for sent in conversation.record.sent if sent.id in message.reference.ids), None)
            if sent is not None:
                quote = resolve_quote(quote, message.reference, sent=sent.text, kind=sent.kind)
        inbound = Inbound(
            id=one.id,
            sandbox=sandbox,
            bot=self.bot,
            user=message.user,
            sent_at_ms=message.sent_at_ms,
            received_at_ms=received_ms,
            text=message.text,
            items=one.items,
            quote=quote,
            window=self._opened_window(one, message, received_ms, conversation),
        )
        payload = msgspec.json.encode(inbound)
        ident = f"{sandbox}.{one.id}"
        sealed = seal(self._deps.sealer, ident, self.bot, sandbox, Sealed(message.context_token, one.fetches))
        one.headers = {
            H_MSG_ID: ident,
            H_SCHEMA: contract.SCHEMA_VERSION,
            H_BOT: self.bot,
            H_SEEN: binascii.b2a_base64(one.fingerprint, newline=False).decode(),
            H_SEALED: sealed,
            H_TRACEPARENT: derive_traceparent(one.id),
        }
        if len(payload) + len(sealed) + OTHER_HEADERS > limit:
            one.detail = "The bus refuses a message of this size."
            payload = _stub_of(inbound)
        one.payload = payload

    def _opened_window(
        self, one: _Read, message: InboundMessage, now_ms: int, conversation: Conversation | None
    ) -> contract.Window:
        """The window that the message opens; none that is known if the code raises."""
        policy = self._deps.policy
        record = conversation.record if conversation is not None else _NOBODY
        in_flight = 0 if conversation is None else int(conversation.is_sending)
        try:
            if not message.context_token or in_flight or record.window.sent_at_ms or record.window.throttled_at_ms:
                opened = window.open_window(record, _as_inbound(one, self.bot, MAX_SEQ, now_ms), now_ms, in_flight)
                return window.visible_window(opened, now_ms, policy)
            if self._whole[0] != now_ms:  # else as that of another message of this answer
                opened = ConversationRecord(token=message.context_token, window=SendWindow(opened_ms=now_ms))
                self._whole = now_ms, window.visible_window(opened, now_ms, policy)
            return self._whole[1]
        except Exception:
            log.exception("inbound.crashed", bot=self.bot, work="_opened_window")
            return contract.Window()

    async def _publish(
        self, read: Sequence[_Read], checkpoint: Checkpoint, owner: Owner, *, maybe_published: bool = False
    ) -> None:
        """Publishes messages in order until all are stored or refused for good. Raises LeaseLost.

        `maybe_published`: they may be stored without that the stream knows their ids, as whatever is tried again.
        Then the inbox is read first, and what is there is not published again.
        """
        deps, clock, subject = self._deps, self._deps.clock, self._deps.names.inbox(checkpoint.sandbox)
        until = 0.0

        def check() -> None:
            owner.check()
            if clock.monotonic() > until:
                raise LeaseLost("publish_delayed", self.bot)

        async def publish() -> None:
            nonlocal maybe_published, until
            while waiting := [one for one in read if one.payload and not one.sequence]:
                if maybe_published:
                    await self._find_stored(waiting, subject, checkpoint.inbox_seq)
                    maybe_published = False
                    continue
                until = clock.monotonic() + IDS_KNOWN_S
                maybe_published = True
                answers = await deps.bus.publish_all(
                    [BusMessage("in", subject, one.payload, one.headers, check) for one in waiting]
                )
                maybe_published = False
                if not (refusals := self._note_answers(waiting, answers, checkpoint.sandbox)):
                    return
                if full := next((refusal for refusal in refusals if refusal.is_full), None):
                    log.error("inbound.full", bot=self.bot)  # its discard policy was changed
                    raise full

        try:
            await self._persist(publish, owner)
        except Crashed as exc:
            if len(read) > 1:  # it may be of one message
                for one in read:
                    await self._publish([one], checkpoint, owner, maybe_published=True)
            else:
                read[0].payload, read[0].outcome, read[0].detail = b"", "crashed", exc.detail

    async def _find_stored(self, waiting: Sequence[_Read], subject: str, after: int) -> None:
        """Finds messages that are in the inbox. Raises Temporary."""
        by_id = {one.headers[H_MSG_ID]: one for one in waiting}
        # of the leader: what a lagging server has not may be stored
        async for stored in self._deps.history.read(self._deps.names.stream_in, subject, after=after):
            if one := by_id.get(stored.headers.get(H_MSG_ID, "")):
                log.info("inbound.recovered", bot=self.bot, message=one.id)
                one.sequence = stored.seq
                self._count(one, "duplicate")

    def _note_answers(
        self, published: Sequence[_Read], answers: Sequence[PubAck | BusRefused], sandbox: str
    ) -> list[BusRefused]:
        """Returns the refusals."""
        now_ms, ages, refusals = self._deps.clock.now_ms(), self._deps.metrics.inbound_age, []
        for one, answer in zip(published, answers, strict=True):
            if isinstance(answer, BusRefused):
                refusals.append(answer)
                if not answer.is_full:
                    self._note_refused(one, answer)
                continue
            one.sequence = answer.seq
            self._count(one, "duplicate" if answer.duplicate else "published")
            if one.message is not None and one.message.sent_at_ms:
                ages.observe(max(0, now_ms - one.message.sent_at_ms) / 1000)
        if stored := [one.id for one in published if one.sequence]:
            log.info("inbound.published", sandbox=sandbox, messages=stored)
        return refusals

    def _note_refused(self, one: _Read, refusal: BusRefused) -> None:
        """The first refusal leaves a stub in the message's place, and the message as a dead letter."""
        log.error("inbound.refused", bot=self.bot, message=one.id, code=refusal.code, detail=refusal.detail)
        self._count(one, "publish_failed")
        if one.detail:  # the bus refuses the stub, too
            one.payload, one.outcome = b"", "too_large"
            return
        one.detail = "The bus refuses the message."
        one.payload = _stub_of(msgspec.json.decode(one.payload, type=Inbound))

    async def _end_others(self, read: Sequence[_Read], binding: Binding | None, owner: Owner) -> None:
        """Counts what is for no inbox, and stores dead letters, also of what could not be read completely."""
        for one in read:
            if one.outcome == "echo":
                self._count(one, "rejected")
            elif one.outcome == "repeat":
                self._count(one, "duplicate")
                log.info("inbound.duplicate", sandbox=binding.sandbox if binding else "", message=one.id)
            elif one.outcome != "new":
                self._count(one, "unbound" if one.outcome == "not_bound" else "dead_lettered")
                await self._dead_letter(one, one.outcome, one.detail, binding, owner)
            elif one.detail:
                await self._dead_letter(one, "too_large", one.detail, binding, owner)
            elif one.message is not None and one.message.broken:
                await self._dead_letter(one, "unreadable", one.message.broken, binding, owner)

    async def _dead_letter(self, one: _Read, reason: str, detail: str, binding: Binding | None, owner: Owner) -> None:
        deps, sandbox = self._deps, binding.sandbox if binding is not None else ""
        msg_id = f"dead:{self.bot}:{digest(one.raw)}"
        # an erasure cannot look into what is sealed; the bot of what cannot be read serves one person
        user = one.message.user if one.message is not None else binding.user if binding is not None else ""
        await self._persist(
            lambda: deps.events.publish_dead_letter(
                "IN",
                one.raw,
                subject=deps.names.inbox(sandbox) if sandbox else "",
                headers={H_TRACEPARENT: derive_traceparent(one.id), H_MSG_ID: one.id} if one.id else {},
                reason=reason,
                detail=detail,
                msg_id=msg_id,
                sandbox=sandbox,
                user=user if user.isascii() and user.isprintable() else "",  # else no header can name it
                seal=partial(deps.sealer.seal_bytes, dead_context(msg_id)),
            ),
            owner,
        )

    # after the acks ---------------------------------------------------------------------------------

    def _update_conversation(
        self,
        read: Sequence[_Read],
        binding: Binding,
        shard: Shard | None,
        conversation: Conversation | None,
        received_ms: int,
        checkpoint: Checkpoint,
    ) -> None:
        """Gives stored messages to the conversation: the last one says all that those before say."""
        deps, newest, token = self._deps, None, ""
        for one in read:
            if one.sequence and one.message is not None:
                newest, token = one, one.message.context_token or token
                if one.fetches:
                    deps.media.fetch_soon(binding.sandbox, one.message.user, one.id, one.items, one.fetches)
        if newest is not None:
            deps.inboxes.reached = max(deps.inboxes.reached, newest.sequence)
            if shard is not None and conversation is not None and not conversation.is_stopped:
                try:
                    conversation.on_inbound(_as_inbound(newest, self.bot, newest.sequence, received_ms, token))
                except Exception:  # it costs the window, not the message
                    log.exception("inbound.crashed", bot=self.bot, work="on_inbound")
                if binding.options.auto_typing:
                    shard.show_typing(conversation)
                checkpoint.inbox_seq = max(checkpoint.inbox_seq, newest.sequence)  # else the next owner reads it
        for one in read:
            if one.outcome == "repeat" and conversation is not None and one.message is not None:
                conversation.on_repeat(one.id, self.bot, one.message.context_token)

    # a bot that is lost -----------------------------------------------------------------------------

    async def _store_after_loss(self, read: Sequence[_Read], received_ms: int, checkpoint: Checkpoint) -> None:
        """Stores messages of a bot that another replica may poll by now."""
        deps, anybody = self._deps, _Anybody()
        await self._persist(lambda: deps.bindings.refresh(self.bot), anybody)
        binding = deps.bindings.get(self.bot)
        if not await self._persist(lambda: deps.checkpoints.exists(self.bot), anybody):
            log.warning("inbound.dropped", bot=self.bot, messages=len(read), detail="Its person was erased.")
            return
        serving = deps.bindings.serving(self.bot)
        if binding is None or serving is None or serving.sandbox != checkpoint.sandbox:
            _end_new(read, "not_bound", "The bot serves another sandbox, or none, since the message arrived.")
        else:
            users = (one.message.user for one in read if one.message is not None and one.outcome == "new")
            # only the bot's owner learns a user: the binding may be that of a later person
            _end_strangers(read, serving.user or next(users, ""))
            self._build_all([one for one in read if not one.payload], serving, received_ms, None)
            await self._publish(read, checkpoint, anybody, maybe_published=True)
        await self._end_others(read, binding, anybody)

    def _persist(self, work: Callable[[], Awaitable[T]], owner: Owner) -> Awaitable[T]:
        """Retries also what the bus refuses: iLink may not deliver the messages again, and an operator can lift a
        limit. Raises LeaseLost, Crashed, RecordTooNew."""
        return persist(work, owner, self._deps.clock, "receive", bot=self.bot)

    def _count(self, one: _Read, outcome: str) -> None:
        self._deps.metrics.inbound_messages.child(one.message.kind if one.message else "unsupported", outcome).inc()


def _is_theirs(one: _Read, user: str) -> bool:
    """Whether it is a user's message, new or repeated."""
    return one.message is not None and one.outcome in ("new", "repeat") and one.message.user == user


def _end_strangers(read: Sequence[_Read], user: str) -> None:
    """`user`: whom the bot serves; "": nobody, as another bot serves whom iLink names."""
    for one in read:
        if one.message is not None and one.message.user != user:
            _end_new([one], "stranger", STRANGER if user else TAKEN)


def _end_new(read: Sequence[_Read], reason: str, detail: str) -> None:
    for one in read:
        if one.outcome == "new" and not one.sequence:
            one.outcome, one.detail, one.payload = reason, detail, b""


def _as_inbound(one: _Read, bot: str, sequence: int, received_ms: int, token: str | None = None) -> InboundReceived:
    message = one.message
    assert message is not None
    return InboundReceived(
        message=one.id,
        token=message.context_token if token is None else token,
        bot=bot,
        written_ms=message.sent_at_ms,
        sequence=sequence,
        received_ms=received_ms,
    )


def _without_media(items: Sequence[InboundItem], fetches: Sequence[MediaRef]) -> list[InboundItem]:
    """The items without media, since the binding wants none."""
    kept = list(items)
    for fetch in fetches:
        kept[fetch.item] = msgspec.structs.replace(kept[fetch.item], reason="off")
    return kept


def _stub_of(inbound: Inbound) -> bytes:
    """What is left in the inbox of a message whose size the bus refuses; a dead letter keeps the bytes."""
    stub = [contract.UnsupportedItem(type=0, reason="too_large")]
    return msgspec.json.encode(msgspec.structs.replace(inbound, text="", quote=None, items=stub))
