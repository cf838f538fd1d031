"""A token that iLink refuses (-14) to polls: it is tried again a few times, then its bot needs a login. A poll that
succeeds undoes that. docs/reference/ilink-protocol.md, "Stale token", has what is known of -14."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import structlog

from adapter.bridge.bindings import mark_login
from adapter.bridge.leases import Tenure
from adapter.bridge.parts import Parts
from adapter.bridge.sessions import BotSession
from adapter.contract.records import Binding
from adapter.errors import SessionExpired

log = structlog.get_logger()

STALE_RETRY_S = (5.0, 30.0)
"""Pauses between retries of a token that iLink has refused. They are few, since users wait for the word that a login
is needed, and most such tokens stay dead."""
LOGIN_POLLS_S = (300.0, 3600.0, 86_400.0)
"""A binding that needs a login is polled so long after the verdict, then at this interval, and after
LOGIN_POLLED_OFTEN_S at that one. A verdict may be wrong: iLink answers -14 for causes that pass."""
LOGIN_POLLED_OFTEN_S = 3 * 86_400.0


class RefusedToken:
    """What the poller of one bot knows of a refusal."""

    def __init__(
        self, bot: str, parts: Parts, session: BotSession, on_session_changed: Callable[[Binding], None]
    ) -> None:
        """`on_session_changed`: called when the bot may not send any more, or may again."""
        self.words = ""
        """iLink's."""
        self._bot = bot
        self._parts = parts
        self._session = session
        self._on_session_changed = on_session_changed
        self._binding: Binding | None = None
        """With the token that was refused; None: none is."""
        self._times = 0
        """Times that it was refused again."""

    def __bool__(self) -> bool:
        return self._binding is not None

    @property
    def is_verdict_due(self) -> bool:
        """It was refused so often that the bot needs a login."""
        return self._binding is not None and self._times >= len(self._parts.stale_retry_s)

    def pause_s(self, binding: Binding) -> float:
        """Seconds until the token is tried again."""
        parts = self._parts
        if self:
            return parts.stale_retry_s[self._times]
        passed_s = max(0, parts.clock.now_ms() - binding.since_ms) / 1000
        return login_poll_in_s(passed_s, parts.login_polls_s)

    def check_binding(self, binding: Binding) -> None:
        """A refusal of another token is over."""
        if self and self._binding != binding:
            self.end()

    async def refused(self, exc: SessionExpired) -> None:
        """A poll was refused: the bot neither polls nor sends but for the tries. Raises Temporary."""
        parts, binding = self._parts, self._parts.bindings.get(self._bot)
        if binding is None or binding.state == "needs_login":
            return
        if self._binding == binding:
            self._times += 1
            return
        log.warning("session.stale", bot=self._bot, sandbox=binding.sandbox, detail=exc.detail)
        self._binding, self.words, self._times = binding, exc.detail, 0
        self._session.is_stale = True
        parts.sessions.changed.notify_all()
        self._on_session_changed(binding)
        advice = "iLink refuses the bot's token; it is tried again shortly, then a login is needed."
        try:
            await parts.events.publish_binding_event(binding.event("stale", reason=exc.detail, detail=advice))
        except BaseException:  # the next refusal is told again
            self.end()
            raise

    async def accepted(self, binding: Binding, tenure: Tenure) -> None:
        """A poll succeeded: the verdict was wrong, or is not true any more. Raises LeaseLost."""
        parts = self._parts
        if binding.state == "needs_login":
            tell: Callable[[], Awaitable[object]] = partial(
                mark_login, parts.bindings, parts.clock, binding, "active"
            )
        elif self:
            self.end()
            tell = partial(parts.events.publish_binding_event, binding.event("recovered"))
        else:
            return
        await tenure.persist(tell, "binding", bot=self._bot)
        log.info("session.recovered", bot=self._bot)

    def end(self) -> None:
        """The token is not refused any more, or nobody polls here."""
        if self:
            self._binding, self.words, self._session.is_stale = None, "", False
            if now := self._parts.bindings.get(self._bot):
                self._on_session_changed(now)


def login_poll_in_s(passed_s: float, polls_s: Sequence[float]) -> float:
    """Seconds until the next poll of a binding that has needed a login for `passed_s` seconds. Its time depends on
    nothing else, so that no takeover makes it earlier or later."""
    first_s, often_s, rarely_s = polls_s
    if passed_s < first_s:
        return first_s - passed_s
    every_s = often_s if passed_s < LOGIN_POLLED_OFTEN_S else rarely_s
    return every_s - passed_s % every_s
