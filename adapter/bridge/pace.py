"""When a person's next request to iLink may be made: after a gap or a pause; and one that had no answer again, once
iLink answers somebody."""

from __future__ import annotations

import math
from collections.abc import Hashable

import structlog

from adapter.bridge import sending
from adapter.bridge.record import SendProgress
from adapter.errors import AdapterError
from adapter.ports import Account, Chat
from adapter.tools.tasks import TaskSet
from adapter.tools.timing import ChangeSignal, Clock, backoff

log = structlog.get_logger()

ASK_EVERY_S = 10.0
"""Time without a send of others after which iLink is asked whether it answers, and between two such questions."""


class Successes:
    """When requests began that iLink answered with success, by base URL. Nothing else is shared between tenants: a
    send without an answer is repeated once iLink has answered somebody's request to the same place.

    Where nobody else sends, a `notifystart` now and then stands for the request of somebody.
    """

    def __init__(self, clock: Clock) -> None:
        self.changed = ChangeSignal()
        self._clock = clock
        self._sent: dict[str, float] = {}
        """When the last send began that was accepted, by base URL."""
        self._answered: dict[str, float] = {}
        """As `_sent`, of any request."""
        self._posts: dict[str, tuple[Hashable, float, float]] = {}
        """Who made the last send, when, and when somebody else made one."""
        self._asked: dict[str, float] = {}
        """When iLink was asked last."""
        self._tasks = TaskSet("notify")

    def note(self, base_url: str, is_send: bool, took_s: float) -> None:
        """iLink has answered a request with success that began `took_s` seconds ago."""
        began = self._clock.monotonic() - took_s
        self._answered[base_url] = max(began, self._answered.get(base_url, began))
        if is_send:
            self._sent[base_url] = max(began, self._sent.get(base_url, began))
        self.changed.notify_all()

    def note_post(self, base_url: str, who: Hashable) -> None:
        """Somebody makes a send."""
        last, at, others = self._posts.get(base_url, (who, -math.inf, -math.inf))
        self._posts[base_url] = who, self._clock.monotonic(), others if last == who else at

    def since(self, base_url: str, monotonic: float, *, of_any: bool) -> bool:
        """Whether a send that began at that time or later was accepted there; `of_any`: or another request answered
        with success."""
        return (self._answered if of_any else self._sent).get(base_url, -math.inf) >= monotonic

    def ask(self, chat: Chat, account: Account, who: Hashable) -> float:
        """Asks iLink, unless others send there or it was asked lately. Returns the seconds until it may be asked."""
        now, base_url = self._clock.monotonic(), account.base_url
        last, at, others = self._posts.get(base_url, (who, -math.inf, -math.inf))
        wait_s = max(others if last == who else at, self._asked.get(base_url, -math.inf)) + ASK_EVERY_S - now
        if wait_s > 0:
            return wait_s
        self._asked[base_url] = now
        self._tasks.spawn(self._notify(chat, account, now))
        return ASK_EVERY_S

    def close(self) -> None:
        self._tasks.cancel_all()

    async def _notify(self, chat: Chat, account: Account, began: float) -> None:
        try:
            await chat.notify(account, start=True)
        except AdapterError as exc:
            log.info("notify.failed", bot=account.bot, host=chat.host_of(account.base_url), reason=exc.reason)
            return
        self.note(account.base_url, True, self._clock.monotonic() - began)


class Pace:
    """That of one person. Times are monotonic."""

    def __init__(self, clock: Clock, successes: Successes) -> None:
        self._clock = clock
        self._successes = successes
        self._not_before = -math.inf
        """The gap, or the pause after a failure."""
        self._posted_at = self._unanswered_at = clock.monotonic()
        """When the request under way was made first, and was over without an answer; or when the record was read that
        says so."""
        self._uncertain = 0
        """Commands in a row that ended `uncertain`."""

    def due_s(self, base_url: str, progress: SendProgress | None) -> float:
        """Seconds until the next request may be made."""
        now = self._clock.monotonic()
        due_s = self._not_before - now
        if progress is not None and progress.unanswered_attempts:
            is_answering = self.is_answering(base_url, progress)
            over_s, posted_s = now - self._unanswered_at, now - self._posted_at
            due_s = max(due_s, sending.repeat_due_s(over_s, posted_s, is_answering=is_answering))
        return due_s

    def is_answering(self, base_url: str, progress: SendProgress) -> bool:
        """Whether iLink has answered a request of anybody that began since it left one of this person without an
        answer: after a lost connection any request, else a send."""
        return self._successes.since(base_url, self._unanswered_at, of_any=progress.was_reset)

    def ask_s(self, chat: Chat, account: Account, who: Hashable) -> float:
        """Asks iLink whether it answers, where that is due. Returns the seconds until it may be asked."""
        wait_s = sending.REPEAT_AFTER_S + self._unanswered_at - self._clock.monotonic()
        return wait_s if wait_s > 0 else self._successes.ask(chat, account, who)

    def on_post(self, gap_s: float, *, is_repeat: bool) -> None:
        """A request is being made."""
        now = self._clock.monotonic()
        if not is_repeat:
            self._posted_at = now
        self._not_before = now + gap_s

    def on_taken_back(self) -> None:
        """The request was not made after all."""
        self._not_before = -math.inf

    def on_answered(self) -> None:
        """iLink has answered, so no row of uncertain commands goes on."""
        self._uncertain = 0

    def on_silence(self) -> None:
        """The request is over without an answer."""
        self._unanswered_at = self._clock.monotonic()

    def on_uncertain(self) -> None:
        """A command has ended `uncertain`: the next one waits, longer each time."""
        self._uncertain += 1
        first_s, longest_s = sending.AFTER_UNCERTAIN_S
        pause_s = backoff(self._uncertain, first_s=first_s, longest_s=longest_s)
        self._not_before = self._clock.monotonic() + pause_s

    def pause(self, seconds: float) -> None:
        """Nothing is made for so long, at least."""
        self._not_before = max(self._not_before, self._clock.monotonic() + seconds)
