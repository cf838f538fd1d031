"""Confirms that a closing binding's bot serves nobody any more: the owner's part of an unbind."""

from __future__ import annotations

import itertools
from functools import partial

import structlog
from msgspec import structs

from adapter.bridge.partition import Partition
from adapter.bridge.partitions import Partitions
from adapter.bridge.parts import Parts
from adapter.contract.records import Binding
from adapter.errors import Crashed, LeaseLost, RecordTooNew, Temporary
from adapter.kit.persist import persist
from adapter.kit.tasks import TaskSet
from adapter.kit.timing import backoff

log = structlog.get_logger()

CLOSE_AGAIN_S = 30.0
"""Pause before a binding is closed again whose end has crashed, or needs a newer version."""


class Closing:
    """The bindings that are being closed here."""

    def __init__(self, parts: Parts, partitions: Partitions) -> None:
        self._parts = parts
        self._bindings = parts.bindings
        self._partitions = partitions
        self._bots: set[str] = set()
        self._tasks = TaskSet("closing")
        parts.bindings.add_listener(lambda bot, before, after: self.close(bot))

    def begin(self, partition: Partition) -> None:
        """Closes what has to be closed in a partition that has just begun."""
        for binding in self._bindings.of_partition(partition.number):
            self.close(binding.bot)

    def close(self, bot: str) -> None:
        """Starts to close a bot's binding if it has to be closed, and is this replica's."""
        if self._to_close(bot) is not None and bot not in self._bots:
            self._bots.add(bot)
            self._tasks.spawn(self._close(bot))

    def _to_close(self, bot: str) -> Binding | None:
        binding = self._bindings.get(bot)
        return binding if binding is not None and binding.closing != binding.closed else None

    async def _close(self, bot: str) -> None:
        try:
            while (binding := self._to_close(bot)) and (
                partition := self._partitions.working.get(self._parts.names.partition_of(binding.sandbox))
            ):
                try:
                    work = partial(self._confirm_close, binding, partition)
                    await persist(work, partition.tenure, self._parts.clock, "binding.close", bot=bot)
                except LeaseLost:  # the next owner confirms, who may be this replica again
                    if self._partitions.working.get(partition.number) is partition:
                        return
                except (Crashed, RecordTooNew) as exc:  # nobody else tries again while this replica owns it
                    log.warning("binding.unclosed", bot=bot, sandbox=binding.sandbox, reason=exc.reason)
                    await self._parts.clock.sleep(CLOSE_AGAIN_S)
        finally:
            self._bots.discard(bot)

    async def _confirm_close(self, binding: Binding, partition: Partition) -> None:
        """Writes the binding as closed, once its bot is not polled any more, the commands of its user have ended, and
        no request is in flight. Raises Temporary, LeaseLost."""

        def confirmed(now: Binding) -> Binding | None:
            partition.tenure.check()
            if now.closing != binding.closing:
                return None
            return structs.replace(now, closed=now.closing, closed_by=self._parts.presence.replica)

        await partition.end_service(binding)
        for looks in itertools.count(1):
            if self._to_close(binding.bot) != binding:
                return  # it was opened again, or is closed anew
            is_polled = binding.bot in self._partitions.pollers or not partition.handover.may_poll(binding.bot)
            if partition.is_service_ended(binding) and not is_polled:
                break
            await self._parts.clock.sleep(backoff(looks, first_s=0.05, longest_s=1.0))
            partition.tenure.check()
        await partition.end_person(binding)
        if await self._bindings.update(binding.bot, confirmed) is None and self._to_close(binding.bot) == binding:
            raise Temporary("binding_gone")  # or nobody can read it
