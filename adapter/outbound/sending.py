"""Sends one command to one user: its parts in order, each request counted before it leaves.

A request is written into the user's context record before it leaves, with the command and part in hand; so after a
crash the next owner knows what may have been sent, and sends it again under the same client_id. Media are on the CDN
before that; an upload is no request to sendmessage, and may be repeated.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from operator import attrgetter
from typing import NamedTuple

import msgspec
import structlog

from adapter import window
from adapter.contexts import Contexts, Peer
from adapter.contract import Outcome
from adapter.errors import LeaseLost, Refused, SessionExpired, Temporary, Throttled, Uncertain
from adapter.metrics import Metrics
from adapter.outbound.commands import Command, MediaPart, client_id
from adapter.outbound.endings import Apart, Ending, Repeat, Wait, all_taken, in_doubt
from adapter.outbound.split import MAX_BYTES
from adapter.outbound.uploads import StoreAway
from adapter.ports import Accepted, Account, Chat, Content, Uploaded
from adapter.quotes import summary
from adapter.records import Context, Hand, Merged
from adapter.timing import Clock, backoff

log = structlog.get_logger()

_EXPIRES = attrgetter("expires_ms")
MAX_RESENDS = 1
"""A request without an answer is repeated so often, with the same client_id (ilink-protocol 14, Q6)."""


class Sending(NamedTuple):
    """What every send needs."""

    chat: Chat
    contexts: Contexts
    clock: Clock
    metrics: Metrics
    rules: window.Rules
    slots: asyncio.Semaphore
    """Bounds the requests that are out, over all users."""
    attempts: int
    """How often one request is made while iLink's answers say that nothing was taken."""
    empty_is_success: bool
    """An answer without a message id is `accepted`."""
    answer_s: float
    """A request has its answer within this time, or none."""
    continue_text: str
    """Appended to the text that takes the last send of a window; "" is nothing."""
    text_chars: int
    """Longest text, in characters."""
    look: Callable[[Peer], None]
    """Called once it is known whether a request counts; see WindowEvents.look."""
    note: Callable[[str, str, str, str, str, str], None]
    """Called with sandbox, bot, user, message id, kind and text of what iLink accepted; see Recall.note."""


class Send(NamedTuple):
    """One command on its way to its user."""

    needs: Sending
    command: Command
    peer: Peer
    account: Account
    pause: Callable[[float], Awaitable[None]]
    """Waits; raises Draining when the service stops meanwhile."""
    pace: Callable[[], Awaitable[None]]
    """Waits until the user may be sent something again; raises Draining."""
    check: Callable[[], None]
    """Raises LeaseLost when this replica may not send any more; asked again when a request is about to leave."""
    upload: Callable[[str, MediaPart, Account, str], Awaitable[Uploaded]]
    """Uploads.bring; raises Draining, too."""

    async def run(self) -> Ending | Wait | Repeat | Apart:
        """Sends what is left of the command.

        Raises LeaseLost, Draining, Temporary (the bus is away, part of what is merged expired, or a request of the
        bot's sandbox before is out): the command stays in hand.
        """
        needs, command, peer = self.needs, self.command, self.peer
        if peer.context.hand and peer.context.hand.sandbox != command.sandbox:
            if self._is_other_out(peer.context):
                await needs.contexts.reread(peer)  # who has it out stores how it went
            self._one_at_a_time(peer.context)
        hand = self._taken_up()
        if hand is None:
            return Repeat()
        while hand.part < len(command.parts):
            if hand.tried > MAX_RESENDS:
                needs.look(peer)
                return _ending(
                    "uncertain",
                    hand,
                    "iLink gave no answer that can be read, and is not asked again: that might show it twice.",
                )
            if wait := self._closed(hand, peer.context):
                return wait
            part = command.parts[hand.part]
            content = part if isinstance(part, str) else await self._bring(part, hand)
            if not isinstance(content, str | Uploaded):
                needs.look(peer)
                return content
            if content is not part and (wait := self._closed(hand, peer.context)):
                return wait  # the upload took long
            step = await self._request(content, hand)
            if not isinstance(step, Hand) or not step.tried:
                needs.look(peer)
            if not isinstance(step, Hand):
                return step
            if hand.part < step.part < len(command.parts):
                await needs.contexts.save(peer, lambda context: context)  # the pause before the next is long
            hand = step
        return all_taken(hand)

    def _taken_up(self) -> Hand | None:
        """The command in hand, as far as it was sent; None: it was sent, by another message."""
        command, context = self.command, self.peer.context
        merged = [Merged(command=other.id, client=other.client) for other in command.merged]
        for hand in (context.hand, context.left):
            if hand and hand.client == command.client:
                # of those that it named some may have expired, as long as nothing was taken
                return hand if hand.is_begun else msgspec.structs.replace(hand, merged=merged)
        if window.is_repeat(context, command.sandbox, command.id, command.client):
            return None
        return Hand(command=command.id, client=command.client, sandbox=command.sandbox, merged=merged)

    def _is_other_out(self, context: Context) -> bool:
        """Whether a request of the bot's sandbox before may be out."""
        return window.is_out(context, self.command.sandbox, self.needs.clock.now_ms(), self.needs.answer_s)

    def _one_at_a_time(self, context: Context) -> None:
        """Raises Temporary while a request of the bot's sandbox before may be out."""
        if self._is_other_out(context):
            raise Temporary("bot_moved", "A request of the sandbox that the bot served before may be out.")

    def _closed(self, hand: Hand, context: Context) -> Wait | None:
        """Why the next request may not leave now. Before the first, all parts must fit; a repeat was counted
        already."""
        command = self.command
        first = hand.part == 0 and not hand.tried
        counted = hand.tried and hand.counted_in == context.inbound_id
        needed = 0 if counted else len(command.parts) if first else 1
        now_ms = self.needs.clock.now_ms()
        closed = window.verdict(context, now_ms, self.needs.rules, needed=needed, final=command.final)
        return Wait(closed, attempts=hand.attempts) if closed else None

    async def _bring(self, part: MediaPart, hand: Hand) -> Uploaded | Ending | Wait:
        """The part's media on the CDN. Nothing of it counts, or blocks another user, before it is named in a
        message."""
        command, peer = self.command, self.peer
        failures = 0
        while True:
            try:
                ready = await self.upload(client_id(command, hand.part), part, self.account, peer.user)
            except StoreAway:
                raise
            except SessionExpired as exc:
                return _wait("needs_login", hand, exc)
            except Refused as exc:
                log.info("upload.refused", bot=peer.bot, command=command.id, detail=exc.detail)
                _put(peer, hand)
                if hand.tried:
                    return _ending("uncertain", hand, "It may have been sent; the media could not be brought again.")
                return _ending("refused", hand, exc.detail, reason="media").with_answer(exc)
            except Temporary as exc:
                failures += 1
                if given_up := await self._again(hand, exc, failures):
                    _put(peer, hand)
                    return given_up
            else:
                if not (hand.part or hand.tried) and self.needs.clock.now_ms() >= command.expires_ms:
                    _put(peer, hand)
                    return _ending("refused", hand, "Its upload took too long.", reason="expired")
                return ready

    async def _request(self, content: Content, hand: Hand) -> Hand | Ending | Wait | Apart:
        """One request; where the command then stands."""
        needs, command, peer = self.needs, self.command, self.peer
        before, known = hand, peer.context
        expires_ms = min(map(_EXPIRES, (command, *command.merged)))
        hand = msgspec.structs.replace(hand, attempts=hand.attempts + 1, tried=hand.tried + 1)

        def leaving(context: Context) -> Context:
            # it may have been read anew in the meantime, since another replica had written
            if context.hand and context.hand.sandbox != command.sandbox:
                self._one_at_a_time(context)
            after = window.leaving(context, self._with_tail(hand, content, context), needs.clock.now_ms())
            if context is not known and after.used > context.used and self._closed(before, context):
                raise Temporary("window_changed", "Another replica has used up what was left of the window.")
            return after

        await self.pace()
        async with needs.slots:
            self.check()
            await needs.contexts.save(peer, leaving)
            hand = peer.context.hand or hand  # it now says in which window it counts, and what is appended
            if hand.part == 0 and hand.tried == 1 and needs.clock.now_ms() >= expires_ms:
                return self._expired(hand)
            peer.in_flight += 1
            has_left = False

            def check() -> None:
                nonlocal has_left
                self.check()
                has_left = True

            try:
                content = content + (hand.tail or "") if isinstance(content, str) else content
                accepted = await needs.chat.send(
                    self.account,
                    user=peer.user,
                    client_id=client_id(command, hand.part, len(hand.merged)),
                    context_token=peer.context.token,
                    content=content,
                    check=check,
                )
            except Uncertain as exc:
                needs.metrics.outbound_retries.labels(reason=exc.reason).inc()
                log.warning("send.unanswered", bot=peer.bot, command=command.id, reason=exc.reason, tried=hand.tried)
                peer.context = window.unanswered(peer.context, hand, needs.clock.now_ms())
                answer: Accepted | Temporary | Refused | None = None
            except (Temporary, Refused) as exc:
                answer = exc
            except LeaseLost:
                self._unsent(hand)
                raise
            except Exception:  # a bug
                if has_left:
                    peer.context = window.unanswered(peer.context, hand, needs.clock.now_ms())
                else:
                    self._unsent(hand)
                raise
            else:
                answer = accepted
            finally:
                peer.in_flight -= 1
        if isinstance(answer, Accepted):
            hand = self._accepted(hand, answer)  # first: it is not sent again, whatever fails from here on
            needs.note(command.sandbox, peer.bot, peer.user, answer.message_id, *_words(content))
            return hand
        if answer is None:
            await self.pause(1.0)
            return hand
        return await self._not_taken(hand, answer)

    def _unsent(self, hand: Hand) -> Hand:
        """A request that was counted and has not left does not count."""
        unsent = msgspec.structs.replace(hand, attempts=hand.attempts - 1, tried=hand.tried - 1)
        self.peer.context = window.returned(self.peer.context, unsent)
        return unsent

    def _expired(self, hand: Hand) -> Ending:
        """How a command ends that expired as its first request was counted: the bus may have been away for long.

        Raises Temporary where it may only be a part of what is merged.
        """
        unsent = self._unsent(hand)
        if hand.merged:
            raise Temporary("expired", "Some of the merged commands have waited too long.")
        return _ending("refused", unsent, "It was not sent in time.", reason="expired")

    async def _not_taken(self, hand: Hand, answer: Temporary | Refused) -> Hand | Ending | Wait | Apart:
        """Where the command stands after an answer that says that nothing of the request was taken."""
        peer = self.peer
        untouched = msgspec.structs.replace(hand, tried=hand.tried - 1)
        match answer:
            case Temporary():
                peer.context = window.returned(peer.context, untouched)
                return await self._again(untouched, answer, untouched.attempts) or untouched
            case Throttled():
                return await self._throttled(untouched, answer)
            case SessionExpired():
                # stored: until the user's next login hours may pass, and the next bot repeats nothing unanswered
                await self._store(lambda context: window.returned(context, untouched))
                return _wait("needs_login", hand, answer)
            case Refused():
                apart = bool(hand.merged) and not untouched.tried
                untouched = alone(untouched) if apart else untouched
                peer.context = window.returned(peer.context, untouched)
                if apart:
                    return Apart()
                ending = _ending("refused", hand, answer.detail, reason=answer.reason).with_answer(answer)
                return in_doubt(ending, untouched, self.command)

    async def _store(self, make: Callable[[Context], Context]) -> None:
        """Stores what an answer says; it is known here also where that fails. Raises Temporary, LeaseLost."""
        try:
            await self.needs.contexts.save(self.peer, make)
        except Exception:
            self.peer.context = make(self.peer.context)
            raise

    def _with_tail(self, hand: Hand, content: Content, context: Context) -> Hand:
        """Decides before a text's first request what is appended to it; a repeat says the same."""
        needs = self.needs
        if not isinstance(content, str) or not needs.continue_text or hand.tail is not None or hand.tried > 1:
            return hand
        whole = f"{content}\n\n{needs.continue_text}"
        fits = len(whole) <= needs.text_chars and len(whole.encode()) <= MAX_BYTES
        tail = whole[len(content) :] if fits and window.takes_last(context, needs.rules) else ""
        return msgspec.structs.replace(hand, tail=tail)

    def _accepted(self, hand: Hand, answer: Accepted) -> Hand:
        ids = [*hand.message_ids, answer.message_id] if answer.message_id else hand.message_ids
        confirmed = bool(answer.message_id) or self.needs.empty_is_success
        if not hand.unconfirmed:
            hand = msgspec.structs.replace(hand, ret=answer.ret, errcode=answer.errcode, errmsg=answer.errmsg)
        hand = msgspec.structs.replace(
            hand,
            part=hand.part + 1,
            tried=0,
            tail=None,
            message_ids=ids,
            unconfirmed=hand.unconfirmed or not confirmed,
        )
        self.peer.context = window.taken(self.peer.context, hand, self.needs.clock.now_ms())
        return hand

    async def _again(self, hand: Hand, problem: Temporary, failures: int) -> Ending | None:
        """iLink took nothing. What did not even leave waits as long as it takes; else a number of attempts.

        Returns None after a pause. Raises Temporary where only part of what is merged expired.
        """
        needs, command = self.needs, self.command
        needs.metrics.outbound_retries.labels(reason=problem.reason).inc()
        log.warning(
            "send.failed", bot=self.peer.bot, command=command.id, reason=problem.reason, attempts=hand.attempts
        )
        if problem.reason != "network" and failures >= needs.attempts * len(command.parts):
            return in_doubt(_ending("dead_lettered", hand, problem.detail, reason="unreachable"), hand, command)
        expires_ms = sorted(one.expires_ms for one in (command, *command.merged))
        if hand.tried:  # an earlier request may have been taken: nothing of it may be called unsent
            if needs.clock.now_ms() >= expires_ms[-1]:
                return _ending("uncertain", hand, "It may have been sent; iLink could not be asked again in time.")
        elif needs.clock.now_ms() >= expires_ms[0]:
            if hand.merged:
                raise Temporary("expired", "Some of the merged commands have waited too long.")
            return _ending("refused", hand, "iLink could not be reached in time.", reason="expired")
        wait_s = problem.retry_after_s or backoff(failures)
        await self.pause(wait_s + needs.clock.jitter(wait_s / 4))
        return None

    async def _throttled(self, hand: Hand, answer: Throttled) -> Wait | Ending:
        """-2: quiet until the user writes. Refused again in another window, the command itself is at fault.

        Of merged commands the first goes alone the next time, so that each fault is found.
        """
        this_window = hand.counted_in
        repeated = hand.throttled_in not in ("", this_window)
        hand = msgspec.structs.replace(hand, throttled_in=this_window)
        hand = alone(hand) if hand.merged and not hand.tried else hand
        now_ms = self.needs.clock.now_ms()
        await self._store(lambda context: window.throttled(context, hand, now_ms))
        log.info(
            "send.throttled",
            bot=self.peer.bot,
            command=hand.command,
            ret=answer.ret,
            errcode=answer.errcode,
            errmsg=answer.errmsg,
        )
        if repeated:
            ending = _ending("refused", hand, answer.detail, reason="throttled").with_answer(answer)
            return in_doubt(ending, hand, self.command)
        return _wait("throttled", hand, answer)


def _words(content: Content) -> tuple[str, str]:
    """Kind and text of what was sent, for later quotes of it."""
    if isinstance(content, str):
        return "text", content
    return content.kind, summary(content.kind, content.name if content.kind == "file" else "")


def alone(hand: Hand) -> Hand:
    """Merged commands of which nothing was taken: only the first stays in hand, as another message."""
    return msgspec.structs.replace(hand, merged=[], tail=None)


def _put(peer: Peer, hand: Hand) -> None:
    """Changes the record in memory; stored with the next request, since the bucket errs on the safe side."""
    peer.context = msgspec.structs.replace(peer.context, hand=hand)


def _ending(outcome: Outcome, hand: Hand, detail: str = "", *, reason: str = "") -> Ending:
    return Ending(outcome, reason, detail, tuple(hand.message_ids), hand.attempts)


def _wait(reason: str, hand: Hand, answer: Refused) -> Wait:
    return Wait(reason, answer.detail, hand.attempts, answer.ret, answer.errcode, answer.errmsg)
