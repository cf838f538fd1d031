"""Confirms that bindings are closed: the shard's owner writes its name once nothing more can come of them.

The applier of control commands marks a binding as closing (`bindings/binder.py`). The owner of its shard then
releases the bot, ends the commands of its user, and waits for requests in flight. If it dies, the next one confirms.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import structlog
from msgspec import structs

from adapter.bindings.registry import Bindings
from adapter.contract.records import Binding
from adapter.errors import AdapterError, Temporary
from adapter.kit.tasks import TaskSet
from adapter.kit.timing import Clock, backoff
from adapter.outbound.shard import Shard

log = structlog.get_logger()

ASK_EVERY = 8
"""Looks after which the replica is asked whose name the bot has: it may have none any more after a restore."""
RETRY_S = 0.5


class Closings:
    """The bindings of this replica's shards that are being closed."""

    def __init__(
        self,
        bindings: Bindings,
        open_shard: Callable[[str], Awaitable[Shard | None]],
        is_released: Callable[[str, bool], Awaitable[bool]],
        incarnation: Callable[[], str],
        clock: Clock,
    ) -> None:
        """`open_shard`: None if this replica does not own the sandbox's shard. `is_released(bot, ask)`: whether no
        living replica polls the bot; with `ask` also asks the one whose name the bot has. Raises Temporary."""
        self._bindings = bindings
        self._open_shard = open_shard
        self._is_released = is_released
        self._incarnation = incarnation
        self._clock = clock
        self._tasks = TaskSet(_report)
        self._running: set[str] = set()

    def follow(self, bot: str) -> None:
        """Starts to close a bot's binding if it has to be closed."""
        if self._closing(bot) is not None and bot not in self._running:
            self._running.add(bot)
            self._tasks.spawn(self._close(bot))

    def _closing(self, bot: str) -> Binding | None:
        binding = self._bindings.get(bot)
        return binding if binding is not None and binding.closing != binding.closed else None

    async def _close(self, bot: str) -> None:
        try:
            while (binding := self._closing(bot)) is not None:
                try:
                    shard = await self._open_shard(binding.sandbox)
                    if shard is None:
                        return
                    await shard.end_service(binding)
                    looks = 1
                    while not (
                        shard.is_service_ended(binding) and await self._is_released(bot, looks % ASK_EVERY == 0)
                    ):
                        await self._clock.sleep(backoff(looks, first_s=0.05, longest_s=1.0))
                        looks += 1
                        shard.ensure_owner()
                    await self._confirm(binding, shard)
                except AdapterError as exc:
                    log.info("binding.not_closed", bot=bot, sandbox=binding.sandbox, reason=exc.reason)
                    await self._clock.sleep(RETRY_S)
                except Exception:
                    log.exception("binding.close_crashed", bot=bot, sandbox=binding.sandbox)
                    await self._clock.sleep(RETRY_S)
        finally:
            self._running.discard(bot)

    async def _confirm(self, binding: Binding, shard: Shard) -> None:
        owner = self._incarnation()

        def confirmed(now: Binding) -> Binding | None:
            shard.ensure_owner()
            return (
                structs.replace(now, closed=now.closing, closed_by=owner) if now.closing == binding.closing else None
            )

        if await self._bindings.update(binding.bot, confirmed) is None:
            raise Temporary("binding_gone")  # or nobody can read it


def _report(exc: BaseException) -> None:
    log.error("task.crashed", task="closing", exc_info=exc)
