"""Checks while the service runs whether streams were deleted, changed or emptied."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import structlog

from adapter.contract.names import Names
from adapter.errors import BusRefused, Temporary
from adapter.jetstream.copies import Lacking, lacking_copies, sentences
from adapter.jetstream.managed_connection import ManagedConnection
from adapter.jetstream.topology import LAYOUT, Difference, inspect_topology, layout_advice, read_layout
from adapter.settings import Settings

log = structlog.get_logger()


class Inspector:
    """The state of the streams at the last check."""

    def __init__(self, names: Names, settings: Settings, *, at_least: Mapping[str, Callable[[], int]]) -> None:
        """`at_least`: by bucket, the number of keys that were surely written and not deleted."""
        self._names = names
        self._layout_stream = f"KV_{names.bindings}"
        self._settings = settings
        self._minimum_keys = {f"KV_{bucket}": count for bucket, count in at_least.items()}
        self.altered: dict[str, list[Difference]] = {}
        """By stream: differences that break a guarantee, at the last check."""
        self.incomplete: list[str] = []
        """Streams of buckets that lacked keys at the last check. Delete markers count as keys."""
        self.lacking: list[Lacking] = []
        """Copies of streams that were lost or behind at the last check. The streams work without them."""
        self._message_counts: dict[str, int] = {}

    def message_count(self, stream: str) -> int:
        """Messages of a stream at the last check."""
        return self._message_counts.get(stream, 0)

    async def inspect_streams(self, connection: ManagedConnection) -> list[str]:
        """Checks all streams. Returns the missing ones. Raises Temporary."""
        minimum = {name: count() for name, count in self._minimum_keys.items()}  # after the request may be more
        try:
            missing, different, infos = await inspect_topology(connection, self._names, self._settings)
        except BusRefused as exc:
            raise Temporary("bus_refused", exc.detail) from exc
        for name in (gone := [wanted.name for wanted in missing]):
            detail = "Restore the stream from the backup; `wechat-nats doctor --fix` creates an empty one."
            log.error("stream.missing", stream=name, detail=detail)
        self._message_counts |= {name: int(info["state"]["messages"]) for name, info in infos.items()}
        incomplete = [name for name in infos if self._message_counts[name] < minimum.get(name, 0)]
        for name in incomplete:
            log.error("bucket.incomplete", stream=name, keys=self._message_counts[name], at_least=minimum[name])
        self.incomplete = incomplete
        self._note_copies(infos)
        layout = await read_layout(connection, self._names) if self._layout_stream not in gone else None
        if layout is not None and layout.version != LAYOUT:  # the streams are what another version wants
            if "layout" not in self.altered:
                log.warning("layout.differs", detail=layout_advice(layout))
            self.altered = {"layout": [Difference("layout", "version", LAYOUT, layout.version, critical=True)]}
            return gone
        if self.altered.pop("layout", None):
            log.info("layout.restored")
        for name in infos:
            self._note(name, [d for d in different if d.name == name and (d.critical or d.lacks_copies)])
        return gone

    def _note(self, name: str, broken: list[Difference]) -> None:
        """Logs new differences that would prevent a start, or lack copies. A running service continues as well as it
        can."""
        if broken == self.altered.get(name, []):
            return
        for d in broken:
            detail = f"{d.field} is {d.found!r}, must be {d.wanted!r}. `wechat-nats doctor --fix` changes it."
            log.error("stream.altered", stream=name, field=d.field, detail=detail)
        if broken:
            self.altered[name] = broken
        else:
            del self.altered[name]
            log.info("stream.restored", stream=name)

    def _note_copies(self, infos: dict[str, dict[str, Any]]) -> None:
        """Logs which servers lack copies when they become others."""
        before = {each.server for each in self.lacking}
        self.lacking = lacking_copies(infos)
        if {each.server for each in self.lacking} == before:
            return
        if self.lacking:
            log.warning("copies.degraded", detail=" ".join(sentences(self.lacking, len(infos))))
        else:
            log.info("copies.restored")
