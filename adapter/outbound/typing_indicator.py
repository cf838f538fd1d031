"""The typing indicator: shows users that the bot types, and hides it (sendtyping, 11.2).

Each bot and user has a task while the indicator is shown or has to be hidden. Sends never wait for it. Its state is
only in memory: after a takeover it is hidden once more with the first answer (`hide_if_visible`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import structlog

from adapter.bindings.registry import Bindings
from adapter.contract.records import Binding
from adapter.errors import AdapterError, Crashed, LeaseLost, Refused, SessionExpired, Temporary
from adapter.kit.crashes import ATTEMPTS, PAUSE_S
from adapter.kit.timing import Clock, backoff, wait_event
from adapter.outbound.typing_tickets import REST_S, Tickets
from adapter.ports import Account, Chat

log = structlog.get_logger()

RENEW_S = 5.0
"""The pace of the official client."""
DOUBT_S = 45.0
"""Delay before hiding it again after -14, unless the bot's next poll gets -14, too."""
HIDES = 5
"""Attempts to hide it before that is left to the next owner."""


class TypingDeps(NamedTuple):
    """Dependencies of the indicators."""

    chat: Chat
    bindings: Bindings
    clock: Clock
    account: Callable[[Binding], Account]
    """Raises Refused("token_key")."""
    stale: Callable[[str], bool]
    """Whether a refused token of the bot is being retried; no call may be made with it."""
    check: Callable[[int], None]
    """Raises LeaseLost unless this replica owns the shard."""
    longest_s: float


class HideRetry:
    """Failed attempts to hide it."""

    def __init__(self) -> None:
        self.failures = 0
        self.not_before = 0.0
        """Monotonic time of the next attempt, even if something wakes the task earlier."""


class Indicator:
    """The typing indicator for one user of a bot: what is shown and what should be shown."""

    def __init__(self, bot: str, user: str) -> None:
        self.bot = bot
        self.user = user
        self.binding: Binding | None = None
        """The binding of the last call, with which it is hidden after the bot was unbound."""
        self.wanted = False
        self.until = 0.0
        """Monotonic time at which it has to be hidden."""
        self.context_token = ""
        self.maybe_visible = False
        """A status 1 may have taken effect, and no status 2 since."""
        self.shown_at: float | None = None
        """When iLink last took a status 1; None: unknown."""
        self.hide_retry = HideRetry()
        self.shows: list[asyncio.Future[None]] = []
        """Commands that wait until it is shown or hidden."""
        self.hides: list[asyncio.Future[None]] = []
        self.wake = asyncio.Event()

    def is_open(self) -> bool:
        """Whether anything is left to do."""
        return bool(self.wanted or self.maybe_visible or self.shows or self.hides)


class IndicatorRunner:
    """Makes what a user sees match what is wanted."""

    def __init__(self, shard: int, deps: TypingDeps, tickets: Tickets) -> None:
        self.draining = False
        self._deps = deps
        self._tickets = tickets
        self._check = partial(deps.check, shard)

    async def run(self, indicator: Indicator) -> None:
        """Runs until nothing is left to do. Raises a bug that raises in every attempt."""
        crashes = 0
        while indicator.is_open():
            indicator.wake.clear()
            try:
                wait_s = await self._turn(indicator)
                crashes = 0
            except Exception:
                crashes += 1
                if crashes == ATTEMPTS:
                    raise  # hiding it is left to the next owner
                log.exception("typing.crashed", bot=indicator.bot)
                wait_s = PAUSE_S
            if wait_s > 0:
                await wait_event(indicator.wake, wait_s)

    async def _turn(self, indicator: Indicator) -> float:
        """Takes one step. Returns the seconds until the next one."""
        if indicator.wanted and self._deps.clock.monotonic() >= indicator.until:
            indicator.wanted = False
        if indicator.wanted:
            _fail(indicator.hides, Refused("typing", "The indicator was shown again before iLink hid it."))
        else:
            _fail(indicator.shows, Refused("typing", "The indicator was hidden again before iLink showed it."))
        try:
            account = self._account(indicator)
            if account is None:
                return RENEW_S
            return await (self._show(indicator, account) if indicator.wanted else self._hide(indicator, account))
        except LeaseLost:
            return REST_S  # the lease is paused, or it is lost and the shard stops
        except SessionExpired as exc:
            if not indicator.maybe_visible or self.draining or self._deps.bindings.get(indicator.bot) is None:
                return await self._abandon(indicator, exc)
            indicator.wanted = False
            _fail(indicator.shows, exc)
            _fail(indicator.hides, exc)
            return await self._failed(indicator, exc, least_s=DOUBT_S)
        except Refused as exc:
            if exc.reason != "typing":
                return await self._abandon(indicator, exc)
            return await self._failed(indicator, exc)
        except Temporary as exc:
            return await self._failed(indicator, Refused("typing", f"iLink could not be asked: {exc.reason}"))

    def _account(self, indicator: Indicator) -> Account | None:
        """The bot's iLink account; None: no call is possible now. Raises Refused (never possible again),
        LeaseLost."""
        found = self._deps.bindings.get(indicator.bot)
        if found is not None and (indicator.binding is None or found.sandbox == indicator.binding.sandbox):
            indicator.binding = found
        else:
            indicator.wanted = False
        if indicator.binding is None:
            raise Refused("not_bound", "The bot is not bound any more.")
        if indicator.binding.state == "needs_login" or self._deps.stale(indicator.bot):
            stale = SessionExpired("needs_login", "The bot's token is stale.")
            if indicator.maybe_visible and found is not None and not self.draining:
                _fail(indicator.hides, stale)
                return None  # hidden once the token works again
            raise stale
        self._check()
        return self._deps.account(indicator.binding)

    async def _show(self, indicator: Indicator, account: Account) -> float:
        now = self._deps.clock.monotonic()
        if indicator.shown_at is not None and now < indicator.shown_at + RENEW_S:
            _done(indicator.shows)
            return min(indicator.shown_at + RENEW_S, indicator.until) - now
        ticket = self._tickets.of(indicator.bot, indicator.user)
        rest_s = ticket.used_at + REST_S - now
        if not indicator.maybe_visible and rest_s > 0:
            return rest_s
        value = await self._tickets.get(account, indicator.user, indicator.context_token)
        if not indicator.wanted or self._deps.clock.monotonic() >= indicator.until:
            return 0.0  # no longer wanted
        was_visible, indicator.maybe_visible = indicator.maybe_visible, True  # may take effect without an answer
        try:
            await self._tickets.use(
                account, indicator.user, value, indicator.context_token, on=True, check=self._check
            )
        except Refused as exc:
            if exc.reason == "typing":
                indicator.maybe_visible = was_visible
            raise
        indicator.shown_at = ticket.used_at
        return 0.0

    async def _hide(self, indicator: Indicator, account: Account) -> float:
        ticket, now = self._tickets.of(indicator.bot, indicator.user), self._deps.clock.monotonic()
        if indicator.maybe_visible and now < indicator.hide_retry.not_before and not self.draining:
            return indicator.hide_retry.not_before - now
        if indicator.maybe_visible or (indicator.hides and not (ticket.hidden and now < ticket.used_at + REST_S)):
            value = await self._tickets.get(account, indicator.user, indicator.context_token)
            await self._tickets.use(
                account, indicator.user, value, indicator.context_token, on=False, check=self._check
            )
            indicator.maybe_visible, indicator.shown_at, indicator.hide_retry = False, None, HideRetry()
        _done(indicator.hides)
        return 0.0

    # failures ------------ --------------------------------------------------------------------------

    async def _failed(self, indicator: Indicator, exc: Refused, *, least_s: float = 0.0) -> float:
        """Handles a refusal. Showing is given up; hiding is tried again after at least `least_s` seconds."""
        log.info(
            "typing.failed",
            bot=indicator.bot,
            on=indicator.wanted,
            maybe_visible=indicator.maybe_visible,
            detail=exc.detail,
        )
        if indicator.wanted:
            _fail(indicator.shows, exc)
            indicator.wanted = indicator.shown_at is not None
            return RENEW_S if indicator.wanted else 0.0
        if not indicator.maybe_visible:
            _fail(indicator.hides, exc)
            return 0.0
        retry = indicator.hide_retry
        retry.failures += 1
        if retry.failures < HIDES:
            pause_s = max(least_s, backoff(retry.failures, first_s=2.0))
            retry.not_before = self._deps.clock.monotonic() + pause_s
            return pause_s
        log.warning("typing.stuck", bot=indicator.bot, attempts=retry.failures)
        _fail(indicator.hides, exc)
        indicator.maybe_visible = False
        return 0.0

    async def _abandon(self, indicator: Indicator, exc: AdapterError) -> float:
        """Gives up, since the bot cannot be called any more. The next owner hides what is shown."""
        log.info("typing.abandoned", bot=indicator.bot, reason=exc.reason, maybe_visible=indicator.maybe_visible)
        _fail(indicator.shows, exc)
        _fail(indicator.hides, exc)
        indicator.wanted = indicator.maybe_visible = False
        return 0.0


class TypingIndicators:
    """The typing indicators of one shard while this replica owns it."""

    def __init__(self, shard: int, deps: TypingDeps) -> None:
        self._deps = deps
        self._indicators: dict[tuple[str, str], Indicator] = {}
        self._tasks: dict[Indicator, asyncio.Task[None]] = {}
        self._known: set[tuple[str, str]] = set()
        """Bots and users with a call by this owner, so that nothing of a previous owner is left on their phones."""
        self._tickets = Tickets(deps.chat, deps.clock)
        self._runner = IndicatorRunner(shard, deps, self._tickets)

    # for conversations -----------------------------------------------------------------------------

    def show(self, binding: Binding, user: str, context_token: str) -> asyncio.Future[None]:
        """Shows it for the time of the setting. The future is done once iLink took it.

        It fails with Refused or Crashed, and is cancelled when the service stops.
        """
        taken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._runner.draining:
            taken.cancel()
            return taken
        self.begin(binding, user, context_token)
        self._indicators[binding.bot, user].shows.append(taken)
        return taken

    def begin(self, binding: Binding, user: str, context_token: str) -> None:
        """As `show`, for callers that do not need the outcome."""
        if self._runner.draining:
            return
        indicator = self._indicator(binding, user, context_token)
        indicator.wanted = True
        indicator.until = self._deps.clock.monotonic() + self._deps.longest_s
        self._wake_or_start(indicator)

    def hide(self, binding: Binding, user: str, context_token: str) -> asyncio.Future[None]:
        """Hides it, even if it is not known to be shown. The future is as in `show`."""
        taken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        indicator = self._indicator(binding, user, context_token)
        indicator.wanted = False
        indicator.hides.append(taken)
        self._wake_or_start(indicator)
        return taken

    def hide_if_visible(self, binding: Binding, user: str, context_token: str, *, shown_before: bool) -> None:
        """Hides it after an answer if it is shown. `shown_before`: a previous owner may have left it shown."""
        indicator = self._indicators.get((binding.bot, user))
        if indicator is not None and indicator.wanted:
            indicator.wanted = False
            self._wake_or_start(indicator)
        elif shown_before and (binding.bot, user) not in self._known and not self._runner.draining:
            indicator = self._indicator(binding, user, context_token)
            indicator.maybe_visible = True
            self._wake_or_start(indicator)

    def retry_ticket(self, bot: str, user: str) -> None:
        """The user wrote, so iLink may have a ticket for them now."""
        self._tickets.retry(bot, user)

    def rebound(self, sandbox: str) -> None:
        """Checks the indicators of a sandbox after a binding changed."""
        for indicator in list(self._indicators.values()):
            if indicator.binding is None or indicator.binding.sandbox == sandbox:
                self._wake_or_start(indicator)

    def evict_idle(self) -> None:
        """Drops state that is not needed any more."""
        self._known = {key for key in self._known if self._deps.bindings.get(key[0]) is not None}
        self._tickets.evict(self._indicators.keys(), self._deps.bindings.get)

    async def drain(self, seconds: float) -> None:
        """Hides all indicators within `seconds`; the next owner hides the rest."""
        self._runner.draining = True
        for indicator in list(self._indicators.values()):
            indicator.wanted = False
            self._wake_or_start(indicator)
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()), timeout=seconds)
        self.stop()

    def stop(self) -> None:
        """Stops at once; the next owner hides what is shown."""
        self._runner.draining = True
        for task in self._tasks.values():
            task.cancel()

    # one indicator --------------------------------------------------------------------------------------

    def _indicator(self, binding: Binding, user: str, context_token: str) -> Indicator:
        key = binding.bot, user
        self._known.add(key)
        indicator = self._indicators.setdefault(key, Indicator(*key))
        indicator.binding, indicator.context_token = binding, context_token
        return indicator

    def _wake_or_start(self, indicator: Indicator) -> None:
        indicator.wake.set()
        if indicator not in self._tasks:
            task = self._tasks[indicator] = asyncio.get_running_loop().create_task(self._run(indicator))
            task.add_done_callback(lambda ended: self._ended(indicator, ended))

    def _ended(self, indicator: Indicator, task: asyncio.Task[None]) -> None:
        del self._tasks[indicator]
        if self._indicators.get((indicator.bot, indicator.user)) is indicator:
            del self._indicators[indicator.bot, indicator.user]
        if task.cancelled():
            for taken in (*indicator.shows, *indicator.hides):
                taken.cancel()
        elif exc := task.exception():
            log.error("typing.crashed", bot=indicator.bot, exc_info=exc)
            _fail([*indicator.shows, *indicator.hides], Crashed())

    async def _run(self, indicator: Indicator) -> None:
        await self._runner.run(indicator)
        del self._indicators[indicator.bot, indicator.user]  # at once, so that the next call starts a new one


def _done(waiting: list[asyncio.Future[None]]) -> None:
    for taken in waiting:
        if not taken.done():
            taken.set_result(None)
    waiting.clear()


def _fail(waiting: list[asyncio.Future[None]], exc: AdapterError) -> None:
    for taken in waiting:
        if not taken.done():
            taken.set_exception(exc)
    waiting.clear()
