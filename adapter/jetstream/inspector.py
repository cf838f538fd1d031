"""Checks the streams while the service runs: deleted, changed, or emptied?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import structlog

from adapter.contract.names import Names
from adapter.errors import BusRefused, Temporary
from adapter.jetstream.api_replies import NO_STREAM
from adapter.jetstream.managed_connection import ManagedConnection
from adapter.jetstream.topology import Difference, Wanted, differences, wanted_streams
from adapter.settings import Settings

log = structlog.get_logger()


class Inspector:
    """The state of the streams when they were last checked."""

    def __init__(self, names: Names, settings: Settings, *, at_least: Mapping[str, Callable[[], int]]) -> None:
        """`at_least` says by bucket how many keys were surely written, and not deleted."""
        self._wanted = wanted_streams(names, settings)
        self._minimum_keys = {f"KV_{bucket}": count for bucket, count in at_least.items()}
        self.altered: dict[str, list[Difference]] = {}
        """What somebody changed, by stream, of what breaks a guarantee, when it was last seen."""
        self.incomplete: list[str] = []
        """Buckets, by their streams, that lacked keys when they were last seen. Marks of deletions count as keys."""
        self._message_counts: dict[str, int] = {}

    def message_count(self, stream: str) -> int:
        """Those of a stream when it was last seen."""
        return self._message_counts.get(stream, 0)

    async def inspect_streams(self, connection: ManagedConnection) -> list[str]:
        """The names of the streams that are missing. Raises Temporary."""
        missing, incomplete = [], []
        for wanted in self._wanted:
            name = wanted.name
            at_least = self._minimum_keys.get(name, int)()  # before asking: there may be more then
            try:
                info = await connection.api_request(f"STREAM.INFO.{name}")
            except BusRefused as exc:
                if exc.code != NO_STREAM:
                    raise Temporary("bus_refused", exc.detail) from exc
                said = "Restore it from the backup; `wechat-nats doctor --fix` creates it, empty."
                log.error("stream.missing", stream=name, detail=said)
                missing.append(name)
                continue
            self._compare_config(wanted, info["config"])
            self._message_counts[name] = int(info["state"]["messages"])
            if self._message_counts[name] < at_least:
                log.error("bucket.incomplete", stream=name, keys=self._message_counts[name], at_least=at_least)
                incomplete.append(name)
        self.incomplete = incomplete
        return missing

    def _compare_config(self, wanted: Wanted, config: dict[str, Any]) -> None:
        """What stops a start is told here, once: a service that runs goes on as well as it can."""
        broken = [difference for difference in differences(wanted, config) if difference.critical]
        if broken == self.altered.get(wanted.name, []):
            return
        for d in broken:
            said = f"{d.field} is {d.found!r}, must be {d.wanted!r}. `wechat-nats doctor --fix` changes it."
            log.error("stream.altered", stream=wanted.name, field=d.field, detail=said)
        if broken:
            self.altered[wanted.name] = broken
        else:
            del self.altered[wanted.name]
            log.info("stream.restored", stream=wanted.name)
