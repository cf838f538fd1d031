"""One QR login from its first code to its bot, in the memory of the replica that started it.

One task asks iLink about each code that may be scanned, and one fetches new codes. Their answers are applied one
after the other, and what readers may know is stored by compare-and-set. Others write into the record, too: digits
(`login.verify`), and its end (`login.cancel`). After a confirmation the flow publishes a bind like anybody, and waits
for its receipt.

Handles of codes, redirects and credentials are in memory alone; the token leaves it sealed in the bind. The flow
never writes a binding itself, and never logs a code, digits or a token.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import NamedTuple

import msgspec
import structlog
from msgspec import structs

from adapter.bridge.bindings import Bindings
from adapter.bridge.receipts import Receipts, is_final
from adapter.contract import messages as contract
from adapter.contract.messages import Bind, Options, Receipt
from adapter.contract.names import H_MSG_ID, H_SCHEMA, Names, digest
from adapter.contract.records import Binding, LoginRecord
from adapter.errors import BusRefused, Refused, SessionExpired, Temporary, Uncertain
from adapter.logins.records import ADVICE, UPGRADE, LoginRecords, next_step
from adapter.ports import Account, Bus, BusMessage, Chat, Logins, QrCode, Scan
from adapter.tools.metrics import Metrics
from adapter.tools.seal import Sealer, bind_context, login_context
from adapter.tools.timing import Clock, backoff, shield_with_grace, wait_event

log = structlog.get_logger()

REFRESH_S = 50.0
"""Age at which an unscanned code is replaced; iLink's codes live for one to two minutes."""
PAUSE_S = 1.0
"""Pause after an answer that says nothing new (docs/reference/ilink-protocol.md, "Login")."""
RETRY_S = 0.5
BOUND_S = 30.0
"""Longest wait for the receipt of the bind."""
KEY_MS = 24 * 3600 * 1000
"""How long the key of a login lives."""
GRACE_S = 5.0
"""Time to apply an answer when the task has to end."""
CODES = 2
"""Codes of a login about which iLink is asked: the newest, and the one before it, which someone may be scanning."""
DEAD_CODES = 3
"""Expired or blocked codes after which a login ends, as in the official client."""
LONGEST_ID, LONGEST_TOKEN = 128, 1024
CHECK_S = 3.0
"""Time limit of a token's check."""


class _Code(NamedTuple):
    """A code that may be scanned."""

    number: int
    code: QrCode


class LoginFlow:
    """Continues one login from its first code to its end."""

    def __init__(
        self,
        login: str,
        stored: tuple[LoginRecord, int],
        options: Options,
        records: LoginRecords,
        ilink: Logins,
        bindings: Bindings,
        bus: Bus,
        receipts: Receipts,
        names: Names,
        sealer: Sealer,
        clock: Clock,
        metrics: Metrics,
        *,
        refresh_s: float,
    ) -> None:
        """`stored`: the record with the first code, and its revision. `refresh_s`: age at which an unscanned code is
        replaced."""
        self._login = login
        self._record, self._revision = stored
        self._options = options
        self._records = records
        self._ilink = ilink
        self._bindings = bindings
        self._bus = bus
        self._receipts = receipts
        self._names = names
        self._sealer = sealer
        self._clock = clock
        self._metrics = metrics
        self._refresh_s = refresh_s
        self._codes: dict[_Code, asyncio.Task[None]] = {}
        """Oldest first, with who asks about it: the newest and the one before it, or only the scanned one. Empty: one
        has to be fetched."""
        self._needs_code = asyncio.Event()
        """The newest code is dead."""
        self._ended = 0
        """Codes that expired or were blocked; codes that were replaced before do not count."""
        self._is_scanned = False
        """Somebody has scanned one of the codes."""
        self._base_url = ""
        """Base URL of the requests about the codes; "": the service's default."""
        self._lock = asyncio.Lock()
        """Held while an answer is applied."""

    async def run(self, first: QrCode) -> None:
        """Raises a group: Refused("not_found") if the record was deleted, and bugs."""
        async with asyncio.TaskGroup() as self._group:
            renewing = self._group.create_task(self._renew_codes())
            self._add_code(_Code(1, first))
            await self._wait_until(lambda: self._now().is_over, (self._record.until_ms - self._now_ms()) / 1000)
            async with self._lock:  # a confirmed bot is being bound
                await self._step(status="expired", reason="time", detail=self._unscanned(ADVICE["expired"]))
            for task in (renewing, *self._codes.values()):
                task.cancel()

    async def fail(self, reason: str, detail: str = "") -> None:
        await self._step(status="failed", reason=reason, detail=detail)

    # the record -------------------------------------------------------------------------------------

    def _now(self) -> LoginRecord:
        """The newest record known here: others write digits and an end."""
        record, revision = self._records.get(self._login)
        if record is not None and revision > self._revision:
            self._record, self._revision = record, revision
        return self._record

    def _now_ms(self) -> int:
        return self._clock.now_ms()

    async def _wait_until(self, holds: Callable[[], bool], timeout_s: float | None = None) -> None:
        await self._records.changed.wait_until(holds, timeout_s)

    async def _step(self, **changes: object) -> None:
        """Stores a step, unless the login is over."""
        await self._update(lambda record: next_step(record, **changes))

    async def _update(self, make: Callable[[LoginRecord], LoginRecord | None]) -> None:
        """Changes the record, unless the login is over."""
        while True:
            try:
                self._record, self._revision = await self._records.update(
                    self._login, lambda record: None if record.is_over else make(record)
                )
                return
            except Temporary as exc:
                log.warning("login.retrying", login=self._login[:6], reason=exc.reason, detail=exc.detail)
                await self._clock.sleep(RETRY_S)

    def _seal_url(self, code: QrCode) -> str:
        return self._sealer.seal(login_context(self._login, "url"), code.url)

    # codes ------------------------------------------------------------------------------------------

    def _add_code(self, code: _Code) -> None:
        self._codes[code] = self._group.create_task(self._ask(code))

    def _keep_codes(self, *kept: _Code) -> None:
        for code in self._codes.keys() - {*kept}:
            task = self._codes.pop(code)
            if task is not asyncio.current_task():
                task.cancel()

    async def _renew_codes(self) -> None:
        """Fetches a code once the newest one is old or dead, and shows it unless somebody has scanned meanwhile."""
        failures = 0
        while True:
            if not failures:
                await wait_event(self._needs_code, self._refresh_s)
                await self._wait_until(lambda: self._now().status == "wait")
            try:
                code = await fetch_code(self._ilink, self._bindings.of_sandbox(self._record.sandbox), self._sealer)
            except Temporary as exc:
                failures += 1
                wait_s = exc.retry_after_s or backoff(failures, longest_s=10.0)
                log.warning(
                    "login.retrying",
                    login=self._login[:6],
                    host=self._ilink.host_of(""),
                    reason=exc.reason,
                    detail=exc.detail,
                    wait_s=wait_s,
                )
                await self._clock.sleep(wait_s)
                continue
            failures = 0
            self._needs_code.clear()
            await shield_with_grace(self._on_code(code), GRACE_S)

    async def _on_code(self, code: QrCode) -> None:
        async with self._lock:
            if self._now().status != "wait":
                return
            self._keep_codes(*[*self._codes][1 - CODES :])
            number, detail = self._record.number + 1, self._unscanned("Scan the new code with WeChat.")
            await self._step(number=number, url=self._seal_url(code), detail=detail)
            self._add_code(_Code(number, code))
            self._metrics.qr_refreshes.inc()

    async def _ask(self, code: _Code) -> None:
        """Asks about a code until it is dead, or another one was scanned.

        While digits are awaited no request is made, as in the official client: how iLink treats a request without
        them is unknown.
        """
        while code in self._codes:
            await self._wait_until(lambda: self._now().status != "need_verify_code" or bool(self._record.digits))
            sent, before = self._record.digits, self._record.status
            digits = self._sealer.open(login_context(self._login, "digits"), sent) if sent else ""
            try:
                scan = await self._ilink.read_code(code.code.handle, self._base_url, digits)
                if scan is not None:
                    await shield_with_grace(self._on_scan(code, sent, scan), GRACE_S)
            except Refused as exc:
                await self.fail(exc.reason, exc.detail)
            # a redirect during the scan is new
            if scan is None or scan.status == "wait" or before == "scanned":
                await self._clock.sleep(PAUSE_S)

    # answers ----------------------------------------------------------------------------------------

    async def _on_scan(self, code: _Code, sent: str, scan: Scan) -> None:
        """`sent`: the digits in the request, sealed. Raises Refused for an answer that no login could use."""
        async with self._lock:
            record = self._now()
            if code not in self._codes or record.is_over:
                return
            match scan.status:
                case "confirmed":
                    await self._confirm(scan)
                case "binded_redirect":
                    await self._on_already_bound(scan.bot)
                case "scaned_but_redirect":
                    if scan.redirect_host:
                        self._base_url = self._ilink.redirect_base_url(scan.redirect_host, self._base_url)
                    if record.status == "wait":
                        await self._on_scanned(code, "", status="scanned")
                case "scaned" if record.status != "scanned":
                    await self._on_scanned(code, sent, status="scanned")
                case "need_verifycode" if sent:
                    detail = "The digits are not those shown on the phone; send them again."
                    wrong = {"status": "need_verify_code", "reason": "wrong_code", "detail": detail}
                    await self._on_scanned(code, sent, **wrong)
                case "need_verifycode" if record.status != "need_verify_code":
                    await self._on_scanned(code, "", status="need_verify_code")
                case "expired" | "verify_code_blocked":
                    await self._on_dead(code, blocked=scan.status == "verify_code_blocked")
                case _:
                    pass

    async def _on_scanned(self, code: _Code, sent: str, **changes: object) -> None:
        """Somebody has scanned this code, so it is the only one that counts. If other digits than `sent` have come
        meanwhile, the verdict on them counts."""
        self._keep_codes(code)
        self._is_scanned = True
        changes |= {"url": self._seal_url(code.code), "digits": ""}
        await self._update(lambda record: next_step(record, **changes) if record.digits == sent else None)

    async def _on_dead(self, code: _Code, *, blocked: bool) -> None:
        """Removes a code. Only the end of the newest one counts, since the other was already replaced."""
        others = [other for other in self._codes if other != code]
        self._keep_codes(*others)
        if others and code.number != self._record.number:
            return
        self._ended += 1
        if self._ended < DEAD_CODES:  # the next code makes the step
            url = self._seal_url(others[-1].code) if others else ""
            changes = {"status": "wait", "url": url, "digits": "", "reason": "", "detail": ""}
            await self._update(lambda record: structs.replace(record, **changes))
            self._needs_code.set()
        elif blocked:
            await self.fail("blocked", "Too many wrong digits; start another login.")
        else:
            detail = f"{self._ended} codes expired without being confirmed; start another login."
            await self._step(status="expired", reason="codes", detail=self._unscanned(detail))

    def _unscanned(self, detail: str) -> str:
        return detail if self._is_scanned else f"{detail} {UPGRADE}"

    # binding ----------------------------------------------------------------------------------------

    async def _on_already_bound(self, bot: str) -> None:
        """`bot`: which one it is; "": iLink does not say it. If the sandbox has one, it is that, and gets the options
        given."""
        serving = self._bindings.of_sandbox(self._record.sandbox)
        bound = [binding for binding in serving if binding.state == "active" and (not bot or binding.bot == bot)]
        if len(bound) != 1:
            await self._step(status="already_bound")
            return
        (binding,) = bound
        if self._options not in (Options(), binding.options):
            token = self._sealer.open(binding.bot, binding.token)
            await self._store_bind(binding.bot, token, binding.user, binding.base_url or None)
        await self._step(status="already_bound", bot=binding.bot, user=binding.user)

    async def _store_bind(self, bot: str, token: str, user: str, base_url: str | None) -> int:
        """Publishes a bind, again and again while the sandbox's queue is full and the login's key lives. Returns its
        sequence. Raises BusRefused."""
        sandbox, failures = self._record.sandbox, 0
        bind = Bind(
            bot=bot,
            bot_token=self._sealer.seal(bind_context(sandbox, bot), token),
            id=self._request,
            base_url=base_url,
            user=user or None,
            options=self._options,
            check=False,  # iLink has named them
        )
        headers = {H_MSG_ID: self._request, H_SCHEMA: contract.SCHEMA_VERSION}
        message = BusMessage("out", self._names.said("bind", sandbox), msgspec.json.encode(bind), headers)
        while True:
            try:
                return (await self._bus.store(message)).seq
            except BusRefused as exc:
                if not exc.is_full or self._now_ms() > self._record.changed_ms + KEY_MS:
                    raise
                failures += 1
                log.warning("login.unbound", login=self._login[:6], sandbox=sandbox, detail=exc.detail)
                await self._clock.sleep(backoff(failures, longest_s=10.0))

    @property
    def _request(self) -> str:
        """The id of the bind, which nobody can guess, and which tells nobody the login's."""
        return f"login-{digest(self._login.encode())}"

    async def _confirm(self, scan: Scan) -> None:
        """Stores the bind, and waits for its receipt. From then on the login cannot be cancelled. Raises Refused for
        credentials that no bind could use."""
        sandbox = self._record.sandbox
        _check_credentials(scan)
        base_url = self._ilink.check_base_url(scan.base_url) if scan.base_url else None
        await check_token(self._ilink, Account(scan.bot, scan.token, base_url or ""))
        others = {binding.user for binding in self._bindings.of_sandbox(sandbox)} - {""}
        former_user = min(others, default="") if scan.user and scan.user not in others else ""
        binding_now = {"bot": scan.bot, "user": scan.user, "former_user": former_user, "url": "", "digits": ""}
        await self._update(lambda record: structs.replace(record, **binding_now))
        if self._record.is_over:
            return
        try:
            sequence = await self._store_bind(scan.bot, scan.token, scan.user, base_url)
        except BusRefused as exc:
            log.error("login.unbound", login=self._login[:6], sandbox=sandbox, detail=exc.detail)
            await self.fail("bus", "The bus did not take the bind; start another login.")
            return
        receipt = await self._receipt_of(sequence)
        if receipt is not None and receipt.outcome != "applied":
            await self.fail(receipt.reason, receipt.detail)
            return
        pending = {} if receipt is not None else _PENDING
        warning = {"detail": _WARNING.format(former_user)} if former_user else {}
        await self._step(status="confirmed", **{**warning, **pending})

    async def _receipt_of(self, sequence: int) -> Receipt | None:
        """The final receipt of the bind; None: there is none within BOUND_S."""
        deadline, sandbox = self._clock.monotonic() + BOUND_S, self._record.sandbox
        while self._clock.monotonic() < deadline:
            try:
                receipt = await self._receipts.last(sandbox, self._request, sequence, "bind")
                if receipt is not None and is_final(receipt):
                    return receipt
            except Temporary as exc:
                log.info("login.unread", sandbox=sandbox, reason=exc.reason)
            await self._clock.sleep(RETRY_S)
        return None


_PENDING = {
    "reason": "bind_pending",
    "detail": "The bind is stored and will take effect; its receipt reports the outcome.",
}
_WARNING = f"{ADVICE['confirmed']} Another person is bound to this sandbox, too: {{}}."


async def check_token(ilink: Chat | Logins, account: Account) -> bool:
    """Asks iLink whether it takes a token, by a `notifystart`, which consumes no messages, unlike a poll. False: it
    does not answer, or must not be asked from here. Raises Refused("stale_token")."""
    try:
        async with asyncio.timeout(CHECK_S):
            await ilink.notify(account, start=True)
    except SessionExpired as exc:
        detail = f"{ilink.host_of(account.base_url)} refuses the bot's token (-14): nothing was bound. Log in anew."
        raise Refused("stale_token", detail) from exc
    except Refused as exc:
        return exc.reason != "url"
    except Temporary as exc:
        return exc.reason == "ret_other"
    except (Uncertain, TimeoutError):
        return False
    return True


def _check_credentials(scan: Scan) -> None:
    """Raises Refused for credentials that no bind could use."""
    if not scan.bot:
        raise Refused("no_bot_id", "iLink confirmed the login without naming the bot; start another one.")
    if not scan.token:
        raise Refused("no_token", "iLink confirmed the login without a token; start another one.")
    printable = all("!" <= char <= "~" for char in scan.bot + scan.user + scan.token)
    if not printable or max(len(scan.bot), len(scan.user)) > LONGEST_ID or len(scan.token) > LONGEST_TOKEN:
        raise Refused("credentials", "iLink confirmed the login with credentials that cannot be read.")


async def fetch_code(logins: Logins, bound: Iterable[Binding], sealer: Sealer) -> QrCode:
    """A code. Raises Temporary.

    A scanning user should keep a bot of `bound`: its token goes with the request, newest first. Dead ones are left
    out, since their user needs a new bot instead of `already_bound`. iLink may refuse a request because of its tokens
    (docs/reference/ilink-protocol.md, "get_bot_qrcode"): then it is made once without.
    """
    tokens = []
    for binding in sorted(bound, key=lambda binding: binding.since_ms, reverse=True):
        if binding.state == "active":
            try:
                tokens.append(sealer.open(binding.bot, binding.token))
            except Refused as exc:
                log.warning("login.token_unread", bot=binding.bot, reason=exc.reason)
    try:
        return await logins.fetch_code(tokens)
    except Temporary as exc:
        if not tokens or exc.retry_after_s or exc.reason not in ("ret_other", "unreadable", "http_4xx"):
            raise
        log.info("login.without_tokens", reason=exc.reason)
        return await logins.fetch_code([])
