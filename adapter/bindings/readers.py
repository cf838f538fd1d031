"""How far each sandbox has handled its inbox, and who reads it: the bucket `readers`."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import structlog
from msgspec import structs

from adapter.contract.records import ReaderRecord
from adapter.errors import UNDECODABLE, Conflict
from adapter.kit.timing import Clock
from adapter.observability.records import RecordDecoder
from adapter.ports import LeaderBucket

log = structlog.get_logger()


class Readers:
    """The records of the bucket, whose `reader` is filled in: 0 only where there is no record. All methods raise
    Temporary."""

    def __init__(self, bucket: LeaderBucket, clock: Clock) -> None:
        self._bucket = bucket
        self._clock = clock
        self._decoder = RecordDecoder(ReaderRecord)

    async def load(self, sandbox: str) -> ReaderRecord:
        return (await self._load(sandbox))[0]

    async def change(
        self, sandbox: str, change: Callable[[ReaderRecord], ReaderRecord | None]
    ) -> tuple[ReaderRecord, ReaderRecord]:
        """The record before and after `change`, which is called again after a write of somebody else. None: it is not
        written."""
        while True:
            before, revision = await self._load(sandbox)
            if (changed := change(before)) is None:
                return before, before
            after = structs.replace(changed, written_ms=self._clock.now_ms())
            try:
                written = await self._bucket.write(sandbox, msgspec.json.encode(after), revision)
            except Conflict:
                continue
            return before, _numbered(after, written)

    async def skip(self, sandbox: str, sequence: int) -> None:
        """Moves the position to `sequence` at least, even if nobody has read yet: nothing up to it is handed out any
        more."""
        await self.change(
            sandbox, lambda now: structs.replace(now, handled=sequence) if now.handled < sequence else None
        )

    async def _load(self, sandbox: str) -> tuple[ReaderRecord, int]:
        entry = await self._bucket.get(sandbox)
        if entry is None or entry.value is None:
            return ReaderRecord(), entry.revision if entry else 0
        try:
            record = self._decoder.decode(entry.value, sandbox=sandbox)
        except UNDECODABLE as exc:  # not written by the adapter: it is overwritten
            log.error("reader.unreadable", sandbox=sandbox, detail=type(exc).__name__)
            record = ReaderRecord()
        return _numbered(record, entry.revision), entry.revision


def _numbered(record: ReaderRecord, revision: int) -> ReaderRecord:
    return record if record.reader else structs.replace(record, reader=revision)
