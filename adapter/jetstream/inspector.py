"""Checks the streams while the service runs: deleted, changed, purged or set back?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import structlog

from adapter.errors import BusRefused, Temporary
from adapter.jetstream.answers import NO_STREAM
from adapter.jetstream.link import Link
from adapter.jetstream.topology import Difference, Wanted, compare, streams
from adapter.metrics import Metrics
from adapter.names import Names
from adapter.settings import Settings

log = structlog.get_logger()


class Inspector:
    """The state of the streams when they were last checked."""

    def __init__(
        self, names: Names, settings: Settings, metrics: Metrics, *, at_least: Mapping[str, Callable[[], int]]
    ) -> None:
        """`at_least` says by bucket how many keys are surely there."""
        self._metrics = metrics
        self._wanted = streams(names, settings)
        self._at_least = {f"KV_{bucket}": count for bucket, count in at_least.items()}
        self.altered: dict[str, list[Difference]] = {}
        """What somebody changed, by stream, of what breaks a guarantee, when it was last seen."""
        self._messages: dict[str, int] = {}
        self._last_seq: dict[str, int] = {}
        self._purges: Counter[str] = Counter()
        self._fewer: set[str] = set()

    def messages(self, stream: str) -> int:
        """Those of a stream when it was last seen."""
        return self._messages.get(stream, 0)

    def lacks(self, bucket: str) -> bool:
        """Whether keys were missing when it was last seen."""
        return bucket in self._fewer

    def purges(self, bucket: str) -> int:
        """How often keys of a bucket were seen to have vanished, or the bucket to have been set back."""
        return self._purges[bucket]

    async def look(self, link: Link) -> list[str]:
        """The names of the streams that are missing. Raises Temporary."""
        missing = []
        for wanted in self._wanted:
            name = wanted.name
            at_least = self._at_least.get(name, int)()  # before asking: there may be more then
            try:
                info = await link.api(f"STREAM.INFO.{name}")
            except BusRefused as exc:
                if exc.code != NO_STREAM:
                    raise Temporary("bus_refused", exc.detail) from exc
                log.error("stream.missing", stream=name, detail="`wechat-nats doctor --fix` creates it, empty.")
                missing.append(name)
                continue
            self._compare_config(wanted, info["config"])
            self._messages[name] = int(info["state"]["messages"])
            self._compare(name.removeprefix("KV_"), self._messages[name], at_least)
            self._compare_age(name, int(info["state"]["last_seq"]))
        return missing

    def _compare_config(self, wanted: Wanted, config: dict[str, Any]) -> None:
        """What stops a start is told here, once: a service that runs goes on as well as it can."""
        broken = [difference for difference in compare(wanted, config) if difference.critical]
        if broken == self.altered.get(wanted.name, []):
            return
        for d in broken:
            said = f"{d.field} is {d.found!r}, must be {d.wanted!r}. `wechat-nats doctor --fix` changes it."
            log.error("stream.altered", stream=wanted.name, field=d.field, detail=said)
        if broken:
            self.altered[wanted.name] = broken
        else:
            del self.altered[wanted.name]
            log.info("stream.mended", stream=wanted.name)

    def _compare_age(self, stream: str, last_seq: int) -> None:
        """A bucket that was restored, or lost its last writes with a disk, has all its keys: old ones."""
        before, self._last_seq[stream] = self._last_seq.get(stream, 0), last_seq
        if last_seq < before and (bucket := stream.removeprefix("KV_")) != stream:
            log.error("bucket.set_back", bucket=bucket, last_seq=last_seq, before=before)
            self._count(bucket)

    def _compare(self, bucket: str, keys: int, at_least: int) -> None:
        if keys >= at_least:
            self._fewer.discard(bucket)
        elif bucket not in self._fewer:
            self._fewer.add(bucket)
            log.error("bucket.purged", bucket=bucket, keys=keys, at_least=at_least)
            self._count(bucket)

    def _count(self, bucket: str) -> None:
        self._purges[bucket] += 1
        self._metrics.nats_purges.inc()
