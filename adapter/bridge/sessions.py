"""Whether a bot's session with iLink is alive, by its poller or by `notifystart`."""

from __future__ import annotations

import math
from collections.abc import Callable

import structlog

from adapter.bridge.bindings import Bindings, account_of
from adapter.bridge.record import Gone
from adapter.bridge.sending import ServingBot
from adapter.contract.records import Binding
from adapter.errors import AdapterError, Refused, SessionExpired, Temporary, Uncertain
from adapter.ports import Account, Chat
from adapter.tools.seal import Sealer
from adapter.tools.tasks import TaskSet
from adapter.tools.timing import ChangeSignal, Clock

log = structlog.get_logger()

RESTART_EVERY_S = 60.0
"""Shortest time between two restarts of a bot's session."""
POLLED_WITHIN_S = 90.0
"""A bot that is not polled for so long, for instance while a stream is full, counts as not alive for now."""


class BotSession:
    """What the poller of a bot on this replica tells the persons whom the bot serves."""

    __slots__ = ("is_polling", "is_stale", "is_taken", "leave", "poll_now", "polled_at", "restarted_at")

    def __init__(self) -> None:
        self.poll_now: Callable[[], None] | None = None
        """Ends the bot's long poll, so that the next one tests the token; None: the poller does not run."""
        self.leave: Callable[[Gone], None] | None = None
        """Ends the time of the person as the poller knows them: a poll that was kept over two moves has an object of
        its own."""
        self.is_polling = False
        """A poll is out, or what it has brought is being stored and published."""
        self.is_taken = False
        """This replica has taken the bot, and read what its former owners published."""
        self.is_stale = False
        """iLink has refused the bot's token, which is tried again; nothing may be sent."""
        self.polled_at = -math.inf
        """Monotonic time of iLink's last answer to a poll."""
        self.restarted_at = -math.inf
        """Monotonic time of the last restart."""


class BotSessions:
    """Whether sends may go through a bot."""

    def __init__(
        self, bindings: Bindings, chat: Chat, sealer: Sealer, clock: Clock, *, default_base_url: str
    ) -> None:
        self.polled: dict[str, BotSession] = {}
        """By bot; pollers enter themselves."""
        self.changed = ChangeSignal()
        """A poll was answered, or a token refused."""
        self._accounts: dict[str, tuple[Binding, Account]] = {}
        self._bindings = bindings
        self._chat = chat
        self._sealer = sealer
        self._clock = clock
        self._default_base_url = default_base_url
        self._tasks = TaskSet("session")

    def account(self, binding: Binding) -> Account:
        """The bot's account. The token is opened once: at each poll that would be 4 % of an inbound message. Raises
        Refused("token_key")."""
        known = self._accounts.get(binding.bot)
        if known is None or known[0] is not binding:
            account = account_of(binding, self._sealer)._replace(base_url=self.base_url(binding))
            known = self._accounts[binding.bot] = binding, account
        return known[1]

    def base_url(self, binding: Binding) -> str:
        """Where the bot's requests go: a binding without one and another that names the default share a host."""
        return binding.base_url or self._default_base_url

    def serving(self, binding: Binding) -> ServingBot:
        """The bot of a binding, and whether it may send."""
        account = Account(binding.bot, "", self.base_url(binding))
        try:
            account = self.account(binding)
        except Refused:  # its token cannot be opened
            pass
        except Exception:  # a bug that no command caused: commands wait, and a timer checks again
            log.exception("account.crashed", bot=binding.bot)
        is_active = binding.state == "active" and not self.is_recovering(binding.bot)
        return ServingBot(binding.bot, is_active and bool(account.token), account)

    def forget(self, bot: str, session: BotSession) -> None:
        """The poller has ended."""
        if self.polled.get(bot) is session:
            del self.polled[bot]
        self._accounts.pop(bot, None)

    def is_recovering(self, bot: str) -> bool:
        session = self.polled.get(bot)
        return session is not None and session.is_stale

    def is_polled_here(self, bot: str) -> bool:
        session = self.polled.get(bot)
        return session is not None and session.is_taken

    async def end_poll(self, bot: str, gone: Gone) -> None:
        """Cuts the bot's poll, and returns when what it has brought is stored, or a dead letter."""
        session = self.polled.get(bot)
        if session is not None and session.leave is not None:
            session.leave(gone)
        self.changed.notify_all()  # nobody polls who could tell of the token
        if session is not None and session.is_polling and session.poll_now is not None:
            session.poll_now()
            await self.changed.wait_until(lambda: not session.is_polling)

    async def is_alive(self, bot: str, is_over: Callable[[], bool]) -> bool:
        """Tests the token after -14 to a send, which is no proof: iLink answers a malformed body with -14, too
        (docs/reference/ilink-protocol.md, "Stale token"). If `notifystart` fails, a new poll decides, and its poller
        starts the recovery if it is refused. An earlier poll is no proof. `is_over`: the answer does not
        matter any more."""
        binding = self._bindings.get(bot)
        if binding is None or self._is_dead(bot):
            return False
        try:
            await self._chat.notify(self.account(binding), start=True)
            return True
        except (SessionExpired, Temporary, Uncertain):
            pass
        except Refused:
            return True  # any answer but -14
        since = self._clock.monotonic()

        def is_polled() -> bool:
            session = self.polled.get(bot)
            return session is not None and session.polled_at > since

        if (session := self.polled.get(bot)) is not None and session.poll_now is not None:
            session.poll_now()
        await self.changed.wait_until(
            lambda: is_polled() or is_over() or self._is_dead(bot), POLLED_WITHIN_S, also=self._bindings.changed
        )
        return is_polled() and not self._is_dead(bot)

    def _is_dead(self, bot: str) -> bool:
        binding = self._bindings.get(bot)
        return binding is None or binding.state == "needs_login" or self.is_recovering(bot)

    def restart_soon(self, bot: str) -> None:
        """As `restart`, beside what calls it."""
        self._tasks.spawn(self.restart(bot))

    async def restart(self, bot: str) -> None:
        """Announces the bot by `notifystart`, at most once a minute: iLink may refuse the sends of a degraded session
        until then (docs/reference/ilink-protocol.md, "Refused sends"). Best effort."""
        session, binding, now = self.polled.get(bot), self._bindings.get(bot), self._clock.monotonic()
        if session is None or binding is None or now - session.restarted_at < RESTART_EVERY_S:
            return
        session.restarted_at = now
        try:
            await self._chat.notify(self.account(binding), start=True)
        except AdapterError as exc:
            log.debug("restart.failed", bot=bot, reason=exc.reason)
