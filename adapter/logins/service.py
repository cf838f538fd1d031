"""`wechat.svc.login.*`: starts QR logins, reports their state, takes digits, cancels.

Any replica answers. The one that starts a login runs it in its memory; what others are asked for goes into the
login's record. After a crash of that replica the codes are in nobody's memory: any other one that finds it gone
stores the status `lost`, and a new code has to be asked for.
"""

from __future__ import annotations

import secrets

import msgspec
import structlog
from msgspec import structs

from adapter.bridge.bindings import Bindings
from adapter.bridge.leases import Leases
from adapter.bridge.presence import Presence
from adapter.bridge.receipts import Receipts
from adapter.contract.messages import LoginQuery, LoginStart, LoginVerify
from adapter.contract.names import Names, check_sandbox
from adapter.contract.records import LoginRecord
from adapter.errors import Refused, Temporary
from adapter.logins.flow import REFRESH_S, LoginFlow, fetch_code
from adapter.logins.records import LoginRecords, next_step, to_login
from adapter.ports import Bus, Logins, QrCode
from adapter.tools.decoding import read_request
from adapter.tools.metrics import Metrics
from adapter.tools.seal import Sealer, login_context
from adapter.tools.tasks import TaskSet
from adapter.tools.timing import Clock

log = structlog.get_logger()

LOGIN_S = 480.0
"""Longest duration of a login, as in the official client."""
OPEN_PER_SANDBOX = 20
"""Most open logins of a sandbox. Each costs long polls; more than this is a loop in the platform."""
LOOK_S = 1.0
LOST_S = 8.0
"""Silence of a replica after which the logins in its memory are lost."""


class LoginService:
    """The handlers, each of which raises Refused (400, 404) or Temporary (503) with a sentence; and the open logins
    of this replica, each in a task."""

    def __init__(
        self,
        records: LoginRecords,
        ilink: Logins,
        bindings: Bindings,
        leases: Leases,
        presence: Presence,
        bus: Bus,
        receipts: Receipts,
        names: Names,
        sealer: Sealer,
        clock: Clock,
        metrics: Metrics,
        *,
        refresh_s: float = REFRESH_S,
    ) -> None:
        """`refresh_s`: age at which an unscanned code is replaced."""
        self._records = records
        self._ilink = ilink
        self._bindings = bindings
        self._leases = leases
        self._presence = presence
        self._bus = bus
        self._receipts = receipts
        self._names = names
        self._sealer = sealer
        self._clock = clock
        self._metrics = metrics
        self._refresh_s = refresh_s
        self._tasks = TaskSet("login")

    # requests ---------------------------------------------------------------------------------------

    async def start(self, data: bytes) -> bytes:
        """Fetches the first code, stores the login, and runs it here."""
        request = read_request(data, LoginStart, self._metrics)
        sandbox = check_sandbox(request.sandbox)
        await self._bindings.wait_loaded()
        if self._leases.draining:
            raise Temporary("draining", "This replica stops; ask again.")
        are_open = [each for _, each in self._records if each.sandbox == sandbox and not each.is_over]
        if len(are_open) >= OPEN_PER_SANDBOX:
            detail = f"{OPEN_PER_SANDBOX} logins of this sandbox are open; cancel some by login.cancel."
            raise Refused("invalid", detail)
        code = await fetch_code(self._ilink, self._bindings.of_sandbox(sandbox), self._sealer)
        login = secrets.token_urlsafe(18)
        record = LoginRecord(
            owner=self._presence.replica,
            sandbox=sandbox,
            url=self._sealer.seal(login_context(login, "url"), code.url),
            until_ms=self._clock.now_ms() + int(LOGIN_S * 1000),
        )
        stored = await self._records.create(login, record)
        flow = LoginFlow(
            login,
            stored,
            request.options,
            self._records,
            self._ilink,
            self._bindings,
            self._bus,
            self._receipts,
            self._names,
            self._sealer,
            self._clock,
            self._metrics,
            refresh_s=self._refresh_s,
        )
        self._tasks.spawn(_run_flow(login, flow, code))
        return self._encode_answer(login, stored[0], with_png=request.png)

    async def status(self, data: bytes) -> bytes:
        """The state of a login, up to a day after its end."""
        request = read_request(data, LoginQuery, self._metrics)
        record, _ = await self._records.read(request.login)
        return self._encode_answer(request.login, record, with_png=request.png)

    async def verify(self, data: bytes) -> bytes:
        """Stores the digits that the phone shows for the login's flow, if they are needed."""
        request = read_request(data, LoginVerify, self._metrics)
        digits = self._sealer.seal(login_context(request.login, "digits"), request.code)

        def with_digits(record: LoginRecord) -> LoginRecord:
            if record.is_over:
                raise Refused("invalid", f"This login is over: {record.status}.")
            if record.status != "need_verify_code":
                raise Refused("invalid", "No digits are asked for: wait until the status is need_verify_code.")
            return structs.replace(record, digits=digits)

        return self._encode_answer(request.login, (await self._records.update(request.login, with_digits))[0])

    async def cancel(self, data: bytes) -> bytes:
        """Ends a login; its flow follows. A finished one stays as it is."""
        request = read_request(data, LoginQuery, self._metrics)

        def as_cancelled(record: LoginRecord) -> LoginRecord | None:
            if record.is_over:
                return None
            if record.bot:
                raise Refused("invalid", "The user has confirmed already and the bot is being bound; unbind it.")
            return next_step(record, status="cancelled")

        return self._encode_answer(request.login, (await self._records.update(request.login, as_cancelled))[0])

    def _encode_answer(self, login: str, record: LoginRecord, *, with_png: bool = False) -> bytes:
        return msgspec.json.encode(to_login(self._sealer, login, record, with_png=with_png))

    # the logins of this replica, and of those that are gone -----------------------------------------

    async def run(self) -> None:
        """Runs until cancelled; then answers that have arrived are applied."""
        records, began = self._records, self._clock.monotonic()
        try:
            while True:
                records.forget_ended()
                for login, record in records:
                    if not record.is_over:
                        await self._end_if_lost(login, record.owner, began)
                await self._clock.sleep(LOOK_S)
        finally:
            self._tasks.cancel_all()
            await self._tasks.wait_ended()

    async def _end_if_lost(self, login: str, owner: str, since: float) -> None:
        def lost(now: LoginRecord) -> LoginRecord | None:
            # with the finder's name: two who write the same at once would both take the write for their own
            return None if now.is_over else next_step(now, status="lost", owner=self._presence.replica)

        try:
            if owner != self._presence.replica and self._presence.silent_s(owner, since) > LOST_S:
                await self._records.update(login, lost)
        except (Temporary, Refused) as exc:  # Refused: the record was deleted
            log.info("login.unread", reason=exc.reason)


async def _run_flow(login: str, flow: LoginFlow, code: QrCode) -> None:
    try:
        await flow.run(code)
    except* Refused as exc:  # the record was deleted
        log.info("login.abandoned", login=login[:6], reason=exc.exceptions[0].args[0])
    except* Exception:  # a bug ends this login, and the others continue
        log.exception("login.crashed", login=login[:6])
        await flow.fail("crashed", "The adapter failed, see its log; start another login.")
