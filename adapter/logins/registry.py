"""QR logins: the bucket in memory, the allowed changes of a login, and its answers and events.

Every change is a compare-and-set on the login's record, so any replica may answer requests. Only the owner of the
sandbox's shard asks iLink and publishes the steps (`flow`).
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence

import msgspec
import structlog
from msgspec import structs

from adapter.contract.messages import CHECKING, Login, LoginEvent, LoginStart
from adapter.contract.records import Binding, LoginCode, LoginRecord
from adapter.errors import UNDECODABLE, Conflict, Refused
from adapter.kit.timing import ChangeSignal, Clock
from adapter.logins.qr import check_content, png_base64, terminal_text
from adapter.observability.metrics import Metrics
from adapter.ports import Bucket, Entry, Logins, QrCode, Scan
from adapter.security.seal import Sealer, login_context

log = structlog.get_logger()

KEEP_ENDED_MS = 240_000
"""Time for which a new owner publishes the end of a login again; the stream drops the duplicate for as long."""
CODES = 2
"""Codes of a login about which iLink is asked: the newest, and the one before it, which someone may be scanning."""
DEAD_CODES = 3
"""Expired or blocked codes after which a login ends, as in the official client."""
PATIENCE_S = 0.05
LAG_S = 0.3
"""Time for which a new login may be missing in some copies of the bucket."""
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")

ADVICE = {
    "wait": "Scan the code with WeChat.",
    "scanned": "Confirm on the phone.",
    "need_verify_code": "Send the digits shown on the phone by login.verify.",
    "confirmed": "The bot is bound. The user must write a first message before anything can be sent to them.",
    "already_bound": "A bot of this sandbox serves this user already; nothing has changed.",
    "expired": "No code was scanned and confirmed in time; start another login.",
    "failed": "The login failed; start another one.",
    "cancelled": "The login was cancelled.",
}


class LoginRegistry:
    """Every open login, and those that ended recently. Each replica holds all of them."""

    def __init__(self, bucket: Bucket, sealer: Sealer, clock: Clock, metrics: Metrics) -> None:
        self.changed = ChangeSignal()
        self.version = 0
        """Rises with every change that `changed` announces."""
        self._bucket = bucket
        self._sealer = sealer
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

    def count_open(self, sandbox: str) -> int:
        """Number of open logins of a sandbox."""
        return sum(1 for _, record in self if record.sandbox == sandbox and not record.is_over)

    def forget_ended(self) -> None:
        """Drops logins that ended long enough ago."""
        horizon_ms = self._clock.now_ms() - KEEP_ENDED_MS
        old_logins = [login for login, record in self if record.is_over and record.changed_ms < horizon_ms]
        for login in old_logins:
            del self._records[login]

    async def read(self, login: str) -> LoginRecord:
        """The newest record. Raises Refused("not_found"), Temporary."""
        return (await self._read(login))[0]

    async def create(self, start: LoginStart, code: QrCode, *, login_s: float) -> tuple[str, LoginRecord]:
        """Starts a login. Returns its id and record. Raises BusRefused."""
        login, now_ms = secrets.token_urlsafe(18), self._clock.now_ms()
        record = LoginRecord(
            sandbox=start.sandbox,
            options=start.options,
            number=1,
            codes=[self._seal_code(login, 1, code)],
            until_ms=now_ms + int(login_s * 1000),
            changed_ms=now_ms,
        )
        value = msgspec.json.encode(record)
        revision = await self._bucket.update(login, value, 0)
        self._apply_entry(Entry(login, value, revision))
        log.info("login.started", login=login[:6], sandbox=record.sandbox)
        return login, record

    async def update(self, login: str, make: Callable[[LoginRecord], LoginRecord | None]) -> LoginRecord:
        """Changes a login. `make` gets the newest record, and returns None to leave it. Returns the valid record.

        Raises Refused("not_found"), what `make` raises, Temporary.
        """
        while True:
            before, revision = await self._read(login)
            after = make(before)
            if after is None:
                return before
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
        if not _ID.fullmatch(login):
            raise _not_found()
        for pause_s in (LAG_S, 0.0):
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
        raise _not_found()

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

    # secrets ----------------------------------------------------------------------------------------

    def _seal_code(self, login: str, number: int, code: QrCode) -> LoginCode:
        return LoginCode(
            number=number,
            handle=self._sealer.seal(login_context(login, "handle"), code.handle),
            url=self._sealer.seal(login_context(login, "url"), code.url),
            made_ms=self._clock.now_ms(),
        )

    def open_handle(self, login: str, code: LoginCode) -> str:
        """Raises Refused("token_key")."""
        return self._sealer.open(login_context(login, "handle"), code.handle)

    def seal_digits(self, login: str, digits: str) -> str:
        return self._sealer.seal(login_context(login, "digits"), digits)

    def open_digits(self, login: str, record: LoginRecord) -> str:
        """Raises Refused("token_key")."""
        return self._sealer.open(login_context(login, "digits"), record.digits) if record.digits else ""

    # steps ------------------------------------------------------------------------------------------

    def next_step(self, record: LoginRecord, **changes: object) -> LoginRecord:
        """The record after a step that has an event. The last step removes the secrets."""
        fields = {"reason": "", "detail": "", **changes, "step": record.step + 1, "changed_ms": self._clock.now_ms()}
        after = structs.replace(record, **fields)
        return structs.replace(after, codes=[], digits="", token="") if after.is_over else after

    def with_code(self, login: str, record: LoginRecord, code: QrCode) -> LoginRecord:
        """The record with a new code. This code and the one before it may be scanned."""
        number = record.number + 1
        codes = [*record.codes, self._seal_code(login, number, code)][-CODES:]
        return self.next_step(record, status="wait", number=number, codes=codes, digits="")

    def apply_scan(self, record: LoginRecord, number: int, sent: str, scan: Scan) -> LoginRecord | None:
        """Applies an answer about code `number`; None: nothing changes. `sent`: the digits that were sent, as sealed.

        A confirmation and a redirect are handled elsewhere.
        """
        code = code_of(record, number)
        if code is None:
            return None
        match scan.status:
            case "scaned" if record.status != "scanned" and record.digits == sent:
                return self.next_step(record, status="scanned", codes=[code], digits="")
            case "need_verifycode" if sent:
                if record.digits != sent:
                    return None  # other digits were sent meanwhile
                return self.next_step(record, status="need_verify_code", codes=[code], digits="", reason="wrong_code",
                                 detail="The digits are not those shown on the phone; send them again.")  # fmt: skip
            case "need_verifycode" if record.status != "need_verify_code":
                return self.next_step(record, status="need_verify_code", codes=[code])
            case "expired" | "verify_code_blocked":
                return self._without_code(record, code, blocked=scan.status == "verify_code_blocked")
            case _:
                return None

    def _without_code(self, record: LoginRecord, code: LoginCode, *, blocked: bool) -> LoginRecord:
        """Removes a dead code. Only the end of the newest one counts, since the other was already replaced."""
        codes = [other for other in record.codes if other.number != code.number]
        if codes and code.number != record.number:
            return structs.replace(record, codes=codes)
        ended = record.ended + 1
        if ended < DEAD_CODES:
            return structs.replace(record, status="wait", codes=codes, ended=ended, digits="", reason="", detail="")
        if blocked:
            return self.next_step(record, status="failed", ended=ended, reason="blocked",
                             detail="Too many wrong digits; start another login.")  # fmt: skip
        return self.next_step(record, status="expired", ended=ended, reason="codes",
                         detail=f"{ended} codes expired without being confirmed; start another login.")  # fmt: skip

    # answers and events -----------------------------------------------------------------------------

    def to_login(self, login: str, record: LoginRecord, *, with_png: bool) -> Login:
        """Raises Refused("token_key")."""
        newest = record.codes[-1] if record.codes and not record.token else None
        url = self._sealer.open(login_context(login, "url"), newest.url) if newest else ""
        return Login(
            login=login,
            sandbox=record.sandbox,
            status=record.status,
            code=max(1, record.number),
            qrcode_url=url,
            qrcode_text=terminal_text(url) if url else "",
            qrcode_png=png_base64(url) if url and with_png else "",
            expires_at_ms=record.until_ms,
            bot=record.bot if record.is_over else "",
            user=record.user if record.is_over else "",
            former_user=record.former_user if record.status == "confirmed" else "",
            reason=CHECKING if record.digits else record.reason,
            detail="The digits are being checked." if record.digits else record.detail or ADVICE[record.status],
        )


async def fetch_code(logins: Logins, tokens: Sequence[str]) -> QrCode:
    """A code that can be shown. Raises Temporary."""
    code = await logins.fetch_code(tokens)
    check_content(code.url)
    return code


def _not_found() -> Refused:
    return Refused("not_found", "There is no such login, or it ended more than a day ago.")


def code_of(record: LoginRecord, number: int) -> LoginCode | None:
    """The code `number`, if it is still valid."""
    return next((code for code in record.codes if code.number == number), None)


def event_of(login: str, record: LoginRecord) -> LoginEvent:
    """The event of a step, without secrets."""
    return LoginEvent(
        login=login,
        sandbox=record.sandbox,
        status=record.status,
        code=max(1, record.number),
        bot=record.bot if record.is_over else "",
        user=record.user if record.is_over else "",
        former_user=record.former_user if record.status == "confirmed" else "",
        reason=record.reason,
        detail=record.detail or ADVICE[record.status],
        at_ms=record.changed_ms,
    )


def tokens_of(bound: Iterable[Binding], sealer: Sealer) -> list[str]:
    """Tokens of the bots that a scanning user should keep, newest first: iLink's `local_token_list`.

    Dead ones are left out, since their user needs a new bot instead of `already_bound`.
    """
    tokens = []
    for binding in sorted(bound, key=lambda binding: binding.since_ms, reverse=True):
        if binding.state == "active":
            try:
                tokens.append(sealer.open(binding.bot, binding.token))
            except Refused as exc:
                log.warning("login.token_unread", bot=binding.bot, reason=exc.reason)
    return tokens
