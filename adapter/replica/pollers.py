"""The pollers of a replica: runs them, follows the lease with them, and knows what others ask about them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial

import structlog

from adapter.inbound.poller import BotPoller
from adapter.ownership.leases import Leases
from adapter.ownership.replica_status import PollerStatus

log = structlog.get_logger()

RESTART_S = 0.2


class BotPollers(dict[str, BotPoller]):
    """The running pollers by bot, at most `capacity`. Implements sessions.Pollers.

    `is_wanted`: whether this replica should poll a bot. `retry` is called for bots that may be started again.
    """

    def __init__(
        self,
        leases: Leases,
        new_poller: Callable[[str], BotPoller],
        is_wanted: Callable[[str], bool],
        retry: Callable[[str], None],
        capacity: int,
    ) -> None:
        super().__init__()
        self._tasks: dict[asyncio.Task[None], BotPoller] = {}
        self._leases = leases
        self._new_poller = new_poller
        self._is_wanted = is_wanted
        self._retry = retry
        self._capacity = capacity
        self._crowded: set[str] = set()
        """Bots without room here, which are tried again when a poller ends."""
        self._departures = 0
        self._valid_as = ""
        """The incarnation whose lease was valid at the last check; "": none."""
        self._paused_as = ""
        """The incarnation that last lost its lease."""

    def start(self, bot: str) -> None:
        """Starts a poller. If there is no room, a bot that still wants it gets the room of the next that ends."""
        if len(self) >= self._capacity:
            self._crowded.add(bot)
            return
        poller = self[bot] = self._new_poller(bot)
        task = asyncio.get_running_loop().create_task(poller.run(), name=f"poller.{bot}")
        self._tasks[task] = poller
        task.add_done_callback(partial(self._on_ended, poller))

    def _on_ended(self, poller: BotPoller, task: asyncio.Task[None]) -> None:
        bot = poller.bot
        del self._tasks[task]
        if not task.cancelled() and (exc := task.exception()):
            log.error("poller.crashed", bot=bot, exc_info=exc)
        if self.get(bot) is poller:
            del self[bot]
        if self._is_wanted(bot):
            asyncio.get_running_loop().call_later(RESTART_S, self._retry, bot)
        while self._crowded:
            if self._is_wanted(waits := self._crowded.pop()):
                self._retry(waits)
                break

    @property
    def tasks(self) -> int:
        """Number of tasks."""
        return len(self._tasks)

    async def wait_ended(self, within_s: float) -> None:
        """Returns when all pollers have ended, or after so many seconds."""
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=within_s)

    def cancel(self, is_chosen: Callable[[BotPoller], bool]) -> None:
        for task, poller in self._tasks.items():
            if is_chosen(poller):
                task.cancel()

    # the lease --------------------------------------------------------------------------------------

    def is_lease_changed(self) -> bool:
        """Whether `follow_lease` has something to do."""
        return self._leases.is_valid != bool(self._valid_as) or self._leases.membership_epoch != self._departures

    def follow_lease(self) -> None:
        """Cancels polls when the lease pauses, and withdraws that when it is valid again as the same incarnation."""
        now_as = self._leases.incarnation if self._leases.is_valid else ""
        if self._valid_as not in ("", now_as):
            self._paused_as = self._valid_as
            for poller in self.values():
                poller.cancel_poll(for_lease=True)  # stop before another replica may start
        elif now_as not in ("", self._valid_as) and now_as == self._paused_as:
            for poller in self.values():
                poller.withdraw_cancel()  # no shard was taken: that would revoke the incarnation first
        self._valid_as = now_as
        if self._departures != self._leases.membership_epoch:
            self._departures = self._leases.membership_epoch
            for poller in self.values():
                if poller.checkpoint is None:
                    poller.on_released()

    # for others -------------------------------------------------------------------------------------

    def on_released(self, bot: str) -> None:
        """Another replica has released a bot, or has stored a late message of it."""
        if poller := self.get(bot):
            poller.on_released()

    def is_stale(self, bot: str) -> bool:
        poller = self.get(bot)
        return poller is not None and poller.is_stale

    def is_taken(self, bot: str) -> bool:
        poller = self.get(bot)
        return poller is not None and poller.is_taken

    def poll_now(self, bot: str) -> None:
        if poller := self.get(bot):
            poller.cancel_poll()

    def has_polled_since(self, bot: str, since: float) -> bool:
        poller = self.get(bot)
        return poller is not None and not poller.is_stale and poller.polled_at > since

    def states(self, bots: Sequence[str], now: float) -> dict[str, PollerStatus]:
        """State of those of `bots` that are polled here."""
        found = [poller for bot in bots if (poller := self.get(bot)) is not None]
        return {
            poller.bot: PollerStatus(
                state=poller.state.value,
                since_ms=int((now - poller.since) * 1000),
                why=poller.why,
                ago_ms=int((now - poller.unanswered_since) * 1000) if poller.unanswered_since else None,
            )
            for poller in found
        }
