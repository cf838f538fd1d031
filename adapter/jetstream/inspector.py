"""Checks while the service runs whether streams were deleted, changed or emptied."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import structlog

from adapter.contract.names import Names
from adapter.errors import BusRefused, Temporary
from adapter.jetstream.api_replies import NO_STREAM
from adapter.jetstream.copies import Copies, Lacking, sentences
from adapter.jetstream.managed_connection import ManagedConnection
from adapter.jetstream.topology import LAYOUT, Difference, differences, layout_advice, read_layout, wanted_streams
from adapter.settings import Settings

log = structlog.get_logger()


class Inspector:
    """The state of the streams at the last check."""

    def __init__(self, names: Names, settings: Settings, *, at_least: Mapping[str, Callable[[], int]]) -> None:
        """`at_least`: by bucket, the number of keys that were surely written and not deleted."""
        self._names = names
        self._layout_stream = f"KV_{names.claims}"
        self._wanted = wanted_streams(names, settings)
        self._minimum_keys = {f"KV_{bucket}": count for bucket, count in at_least.items()}
        self.altered: dict[str, list[Difference]] = {}
        """By stream: differences that break a guarantee, at the last check."""
        self.incomplete: list[str] = []
        """Streams of buckets that lacked keys at the last check. Delete markers count as keys."""
        self.lacking: list[Lacking] = []
        """Copies of streams that were lost or behind at the last two checks. The streams work without them."""
        self._copies = Copies()
        self._message_counts: dict[str, int] = {}

    def message_count(self, stream: str) -> int:
        """Messages of a stream at the last check."""
        return self._message_counts.get(stream, 0)

    async def inspect_streams(self, connection: ManagedConnection) -> list[str]:
        """Checks all streams. Returns the missing ones. Raises Temporary."""
        missing, incomplete = [], []
        broken: dict[str, list[Difference]] = {}
        infos: dict[str, dict[str, Any]] = {}
        for wanted in self._wanted:
            name = wanted.name
            at_least = self._minimum_keys.get(name, int)()  # before the request, after which there may be more
            try:
                info = await connection.api_request(f"STREAM.INFO.{name}")
            except BusRefused as exc:
                if exc.code != NO_STREAM:
                    raise Temporary("bus_refused", exc.detail) from exc
                detail = "Restore the stream from the backup; `wechat-nats doctor --fix` creates an empty one."
                log.error("stream.missing", stream=name, detail=detail)
                missing.append(name)
                continue
            infos[name] = info
            broken[name] = [d for d in differences(wanted, info["config"]) if d.critical or d.lacks_copies]
            self._message_counts[name] = int(info["state"]["messages"])
            if self._message_counts[name] < at_least:
                log.error("bucket.incomplete", stream=name, keys=self._message_counts[name], at_least=at_least)
                incomplete.append(name)
        self.incomplete = incomplete
        self._note_copies(infos)
        layout = await read_layout(connection, self._names) if self._layout_stream not in missing else None
        if layout is not None and layout.version != LAYOUT:  # the streams are what another version wants
            if "layout" not in self.altered:
                log.warning("layout.differs", detail=layout_advice(layout))
            self.altered = {"layout": [Difference("layout", "version", LAYOUT, layout.version, critical=True)]}
            return missing
        if self.altered.pop("layout", None):
            log.info("layout.restored")
        for name, found in broken.items():
            self._note(name, found)
        return missing

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
        self.lacking = self._copies.compare(infos)
        if {each.server for each in self.lacking} == before:
            return
        if self.lacking:
            log.warning("copies.degraded", detail=" ".join(sentences(self.lacking, len(infos))))
        else:
            log.info("copies.restored")
