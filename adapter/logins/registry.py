"""The bucket of QR logins in memory.

Every change is a compare-and-set on the login's record, so any replica may answer requests. Only the owner of the
sandbox's shard asks iLink and publishes the steps (`flow`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import msgspec
import structlog
from msgspec import structs

from adapter.contract.records import LoginRecord
from adapter.errors import UNDECODABLE, Conflict, Refused
from adapter.kit.timing import ChangeSignal, Clock
from adapter.observability.metrics import Metrics
from adapter.ports import Bucket, Entry

log = structlog.get_logger()

KEEP_ENDED_MS = 240_000
"""Time for which a new owner publishes the end of a login again; the stream drops the duplicate for as long."""
PATIENCE_S = 0.05
LAG_S = 0.3
"""Time for which a new login may be missing in some copies of the bucket."""
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


class LoginRegistry:
    """Every open login, and those that ended recently. Each replica holds all of them."""

    def __init__(self, bucket: Bucket, clock: Clock, metrics: Metrics) -> None:
        self.changed = ChangeSignal()
        self.version = 0
        """Rises with every change that `changed` announces."""
        self._bucket = bucket
        self._clock = clock
        self._metrics = metrics
        self._records: dict[str, tuple[LoginRecord, int]] = {}

    async def run(self) -> None:
        """Follows the bucket until cancelled."""
        await self._bucket.watch(self._apply_entry, on_loaded=self._notify)

    def get(self, login: str) -> LoginRecord | None:
        found = self._records.get(login)
        return found[0] if found else None

    def __iter__(self) -> Iterator[tuple[str, LoginRecord]]:
        return iter([(login, record) for login, (record, _) in self._records.items()])

    def forget_ended(self) -> None:
        """Drops logins that ended long enough ago."""
        horizon_ms = self._clock.now_ms() - KEEP_ENDED_MS
        for login, record in self:
            if record.is_over and record.changed_ms < horizon_ms:
                del self._records[login]

    async def read(self, login: str) -> LoginRecord:
        """The newest record. Raises Refused("not_found"), Temporary."""
        return (await self._read(login))[0]

    async def create(self, login: str, record: LoginRecord) -> LoginRecord:
        """Starts a login. Raises BusRefused."""
        record = structs.replace(record, changed_ms=self._clock.now_ms())
        value = msgspec.json.encode(record)
        self._apply_entry(Entry(login, value, await self._bucket.update(login, value, 0)))
        log.info("login.started", login=login[:6], sandbox=record.sandbox)
        return record

    async def update(self, login: str, make: Callable[[LoginRecord], LoginRecord | None]) -> LoginRecord:
        """Changes a login. `make` gets the newest record, and returns None to leave it. Returns the valid record.

        The last step removes the secrets. Raises Refused("not_found"), what `make` raises, Temporary.
        """
        while True:
            before, revision = await self._read(login)
            after = make(before)
            if after is None:
                return before
            if after.step != before.step:
                after = structs.replace(after, changed_ms=self._clock.now_ms())
            if after.is_over:
                after = structs.replace(after, codes=[], digits="", token="")
            value = msgspec.json.encode(after)
            try:
                written = await self._bucket.update(login, value, revision)
            except Conflict:  # written meanwhile: read again
                if await self._bucket.get(login) is None:  # the bucket was recreated
                    self._records.pop(login, None)
                await self._clock.sleep(PATIENCE_S)
                continue
            self._apply_entry(Entry(login, value, written))
            if after.is_over:
                self._metrics.logins.labels(outcome=after.status).inc()
            if after.step != before.step:
                log.info("login.changed", login=login[:6], sandbox=after.sandbox, status=after.status,
                         reason=after.reason, code=after.number)  # fmt: skip
            return after

    async def _read(self, login: str) -> tuple[LoginRecord, int]:
        """The newer of the record in memory and that of the bucket, whose answering copy may lag."""
        for pause_s in (LAG_S, 0.0) if _ID.fullmatch(login) else ():
            if entry := await self._bucket.get(login):
                self._apply_entry(entry)
                if entry.value is None:
                    break
            known = self._records.get(login)
            if known is not None and (entry is None or known[1] >= entry.revision):
                return known
            if entry is not None and entry.value is not None:  # ended long ago: not in memory
                return msgspec.json.decode(entry.value, type=LoginRecord), entry.revision
            await self._clock.sleep(pause_s)
        raise Refused("not_found", "There is no such login, or it ended more than a day ago.")

    def _apply_entry(self, entry: Entry) -> None:
        known = self._records.get(entry.key)
        if known is not None and entry.revision <= known[1]:
            return
        if entry.value is None:
            self._records.pop(entry.key, None)
            self._notify()
            return
        try:
            record = msgspec.json.decode(entry.value, type=LoginRecord)
        except UNDECODABLE:
            log.error("login.unreadable", login=entry.key[:6])
            return
        if known is None and record.is_over and self._clock.now_ms() - record.changed_ms > KEEP_ENDED_MS:
            return
        self._records[entry.key] = (record, entry.revision)
        self._notify()

    def _notify(self) -> None:
        self.version += 1
        self.changed.notify_all()
