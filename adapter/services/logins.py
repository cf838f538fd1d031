"""`wechat.svc.login.*`: starts QR logins, reports their state, takes digits, cancels. Any replica answers."""

from __future__ import annotations

import secrets

import msgspec
from msgspec import structs

from adapter.bindings.registry import Bindings
from adapter.contract.messages import LoginQuery, LoginStart, LoginVerify
from adapter.contract.names import check_sandbox
from adapter.contract.records import LoginRecord
from adapter.errors import Refused
from adapter.kit.timing import Clock
from adapter.logins.flow import fetch_code
from adapter.logins.registry import LoginRegistry
from adapter.logins.steps import next_step, seal_code, to_login
from adapter.observability.metrics import Metrics
from adapter.ports import Logins
from adapter.security.seal import Sealer, login_context
from adapter.services.requests import read_request, wait_loaded

LOGIN_S = 480.0
"""Longest duration of a login, as in the official client."""
OPEN_PER_SANDBOX = 20
"""Most open logins of a sandbox. Each costs long polls; more than this is a loop in the platform."""


class LoginService:
    """The handlers. Each raises Refused (400, 404) or Temporary (503) with a sentence."""

    def __init__(
        self,
        logins: Logins,
        registry: LoginRegistry,
        bindings: Bindings,
        sealer: Sealer,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self._logins = logins
        self._registry = registry
        self._bindings = bindings
        self._sealer = sealer
        self._clock = clock
        self._metrics = metrics

    async def start(self, data: bytes) -> bytes:
        """Fetches the first code and stores the login. The shard's owner continues it."""
        request = read_request(data, LoginStart, self._metrics)
        check_sandbox(request.sandbox)
        await wait_loaded(self._bindings)
        are_open = [each for _, each in self._registry if each.sandbox == request.sandbox and not each.is_over]
        if len(are_open) >= OPEN_PER_SANDBOX:
            detail = f"{OPEN_PER_SANDBOX} logins of this sandbox are open; cancel some by login.cancel."
            raise Refused("invalid", detail)
        code = await fetch_code(self._logins, self._bindings.of_sandbox(request.sandbox), self._sealer)
        login, now_ms = secrets.token_urlsafe(18), self._clock.now_ms()
        record = LoginRecord(
            sandbox=request.sandbox,
            options=request.options,
            number=1,
            codes=[seal_code(self._sealer, login, 1, code, now_ms)],
            until_ms=now_ms + int(LOGIN_S * 1000),
        )
        return self._encode_answer(login, await self._registry.create(login, record), with_png=request.png)

    async def status(self, data: bytes) -> bytes:
        """The state of a login, up to a day after its end."""
        request = read_request(data, LoginQuery, self._metrics)
        return self._encode_answer(request.login, await self._registry.read(request.login), with_png=request.png)

    async def verify(self, data: bytes) -> bytes:
        """Takes the digits that the phone shows, if they are needed."""
        request = read_request(data, LoginVerify, self._metrics)
        digits = self._sealer.seal(login_context(request.login, "digits"), request.code)

        def with_digits(record: LoginRecord) -> LoginRecord:
            if record.is_over:
                raise Refused("invalid", f"This login is over: {record.status}.")
            if record.status != "need_verify_code":
                raise Refused("invalid", "No digits are asked for: wait until the status is need_verify_code.")
            return structs.replace(record, digits=digits)

        return self._encode_answer(request.login, await self._registry.update(request.login, with_digits))

    async def cancel(self, data: bytes) -> bytes:
        """Ends a login. A finished one stays as it is."""
        request = read_request(data, LoginQuery, self._metrics)

        def as_cancelled(record: LoginRecord) -> LoginRecord | None:
            if record.is_over:
                return None
            if record.token:
                raise Refused("invalid", "The user has confirmed already and the bot is being bound; unbind it.")
            return next_step(record, status="cancelled")

        return self._encode_answer(request.login, await self._registry.update(request.login, as_cancelled))

    def _encode_answer(self, login: str, record: LoginRecord, *, with_png: bool = False) -> bytes:
        return msgspec.json.encode(to_login(self._sealer, login, record, with_png=with_png))
