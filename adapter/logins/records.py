"""The bucket of QR logins: their state for readers, and the wishes of readers.

Every change is a compare-and-set on the login's record, and who makes a step publishes its event. Any replica
answers requests; the flow of a login, in the memory of its owner, follows the record (`flow`). Only the watch writes
what is in memory, so that no late write brings a deleted login back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import structlog
from msgspec import structs

from adapter.contract.messages import CHECKING, Login, LoginEvent
from adapter.contract.records import LoginRecord
from adapter.errors import UNDECODABLE, Conflict, RecordTooNew, Refused
from adapter.logins.qr import png_base64, terminal_text
from adapter.ports import Bucket, BucketEntry
from adapter.tools.decoding import decode_record
from adapter.tools.events import Events
from adapter.tools.metrics import Metrics
from adapter.tools.seal import Sealer, login_context
from adapter.tools.timing import ChangeSignal, Clock

log = structlog.get_logger()

KEEP_ENDED_MS = 240_000
"""Time for which an ended login stays in memory, where the console finds it."""
PATIENCE_S = 0.05
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
ADVICE = {
    "wait": "Scan the code with WeChat.",
    "scanned": "Confirm on the phone.",
    "need_verify_code": "Send the digits shown on the phone by login.verify.",
    "confirmed": "The bot is bound. The user must write a first message before anything can be sent to them.",
    "already_bound": "A bot of this sandbox serves this user already, and goes on with it.",
    "expired": "No code was scanned and confirmed in time; start another login.",
    "failed": "The login failed; start another one.",
    "cancelled": "The login was cancelled.",
    "lost": "The replica that ran the login is gone; start another one.",
}
UPGRADE = (
    "If the phone asks to upgrade OpenClaw (请在OpenClaw中升级微信接口版本), WeChat refuses the version that the"
    " adapter declares: its operator has to raise WECHAT_NATS_ILINK_VERSION."
)
"""What an unscanned code may mean: iLink tells nothing of such a scan, and the code stays in `wait`."""


class LoginRecords:
    """Every open login, and those that ended recently. Each replica holds all of them."""

    def __init__(self, bucket: Bucket, events: Events, clock: Clock, metrics: Metrics) -> None:
        self.changed = ChangeSignal()
        self.bucket = bucket
        self._events = events
        self._clock = clock
        self._metrics = metrics
        self._records: dict[str, tuple[LoginRecord, int]] = {}

    async def run(self) -> None:
        """Follows the bucket until cancelled."""
        await self.bucket.watch(self._apply_entry, on_loaded=self.changed.notify_all)

    def get(self, login: str) -> tuple[LoginRecord | None, int]:
        """The record in memory and its revision."""
        return self._records.get(login, (None, 0))

    def __iter__(self) -> Iterator[tuple[str, LoginRecord]]:
        return iter([(login, record) for login, (record, _) in self._records.items()])

    def forget_ended(self) -> None:
        """Drops logins that ended long enough ago."""
        for login, record in self:
            if record.is_over and record.changed_ms < self._clock.now_ms() - KEEP_ENDED_MS:
                del self._records[login]

    async def read(self, login: str) -> tuple[LoginRecord, int]:
        """The newest record and its revision. Raises Refused("not_found"), Temporary."""
        entry = await self.bucket.get(login) if _ID.fullmatch(login) else None
        if entry is None or entry.value is None:
            raise Refused("not_found", "There is no such login, or it ended more than a day ago.")
        return decode_record(entry.value, LoginRecord, login=login[:6]), entry.revision

    async def create(self, login: str, record: LoginRecord) -> tuple[LoginRecord, int]:
        """Stores a new login. Raises BusRefused, Temporary."""
        record = structs.replace(record, changed_ms=self._clock.now_ms())
        revision = await self.bucket.update(login, msgspec.json.encode(record), 0)
        log.info("login.started", login=login[:6], sandbox=record.sandbox)
        await self._events.publish_login_event(_event_of(login, record), step=record.step)
        return record, revision

    async def update(self, login: str, make: Callable[[LoginRecord], LoginRecord | None]) -> tuple[LoginRecord, int]:
        """Changes a login. `make` gets the newest record, and returns None to leave it. Returns the valid record and
        its revision.

        The last step removes the secrets. Raises Refused("not_found"), what `make` raises, Temporary.
        """
        while True:
            before, revision = await self.read(login)
            after = make(before)
            if after is None:
                return before, revision
            is_step = after.step != before.step
            if is_step:
                after = structs.replace(after, changed_ms=self._clock.now_ms())
            if after.is_over:
                after = structs.replace(after, url="", digits="")
            try:
                revision = await self.bucket.update(login, msgspec.json.encode(after), revision)
            except Conflict:  # written meanwhile: read again
                await self._clock.sleep(PATIENCE_S)
                continue
            if is_step:
                log.info("login.changed", login=login[:6], sandbox=after.sandbox, status=after.status,
                         reason=after.reason, code=after.number)  # fmt: skip
                await self._events.publish_login_event(_event_of(login, after), step=after.step)
            if after.is_over:
                self._metrics.logins.labels(outcome=after.status).inc()
            return after, revision

    def _apply_entry(self, entry: BucketEntry) -> None:
        """In the order of the revisions of a key."""
        self._records.pop(entry.key, None)
        try:
            record = None if entry.value is None else decode_record(entry.value, LoginRecord, login=entry.key[:6])
        except RecordTooNew:
            record = None
        except UNDECODABLE:
            log.error("login.unreadable", login=entry.key[:6])
            record = None
        if record is not None and not (record.is_over and self._clock.now_ms() - record.changed_ms > KEEP_ENDED_MS):
            self._records[entry.key] = record, entry.revision
        self.changed.notify_all()


def next_step(record: LoginRecord, **changes: object) -> LoginRecord:
    """The record after a step that has an event."""
    return structs.replace(record, **{"reason": "", "detail": "", **changes, "step": record.step + 1})


def to_login(sealer: Sealer, login: str, record: LoginRecord, *, with_png: bool) -> Login:
    """The answer to a request, with the newest code. Raises Refused("token_key")."""
    url = sealer.open(login_context(login, "url"), record.url) if record.url else ""
    shown = _shown(login, record)
    if record.digits:
        shown |= {"reason": CHECKING, "detail": "The digits are being checked."}
    return Login(
        **shown,
        qrcode_url=url,
        qrcode_text=terminal_text(url) if url else "",
        qrcode_png=png_base64(url) if url and with_png else "",
        expires_at_ms=record.until_ms,
    )


def _event_of(login: str, record: LoginRecord) -> LoginEvent:
    """The event of a step, without secrets."""
    return LoginEvent(**_shown(login, record), at_ms=record.changed_ms)


def _shown(login: str, record: LoginRecord) -> dict[str, Any]:
    """What answers and events have in common."""
    return {
        "login": login,
        "sandbox": record.sandbox,
        "status": record.status,
        "code": record.number,
        "bot": record.bot if record.is_over else "",
        "user": record.user if record.is_over else "",
        "former_user": record.former_user if record.status == "confirmed" else "",
        "reason": record.reason,
        "detail": record.detail or ADVICE[record.status],
    }
