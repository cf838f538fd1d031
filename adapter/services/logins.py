"""`wechat.svc.login.*`: starts QR logins, reports their state, takes digits, cancels.

Any replica answers. The one that starts a login runs it; what others are asked for goes into the login's record.
"""

from __future__ import annotations

import secrets

import msgspec
from msgspec import structs

from adapter.contract.messages import LoginQuery, LoginStart, LoginVerify
from adapter.contract.names import check_sandbox
from adapter.contract.records import LoginRecord
from adapter.errors import Refused, Temporary
from adapter.logins.flow import LoginDeps, fetch_code
from adapter.logins.runner import LoginRunner
from adapter.logins.steps import next_step, to_login
from adapter.security.seal import login_context
from adapter.services.requests import read_request, wait_loaded

LOGIN_S = 480.0
"""Longest duration of a login, as in the official client."""
OPEN_PER_SANDBOX = 20
"""Most open logins of a sandbox. Each costs long polls; more than this is a loop in the platform."""


class LoginService:
    """The handlers. Each raises Refused (400, 404) or Temporary (503) with a sentence."""

    def __init__(
        self,
        deps: LoginDeps,
        runner: LoginRunner,
    ) -> None:
        self._deps = deps
        self._runner = runner

    async def start(self, data: bytes) -> bytes:
        """Fetches the first code, stores the login, and runs it here."""
        deps = self._deps
        request = read_request(data, LoginStart, deps.metrics)
        check_sandbox(request.sandbox)
        await wait_loaded(deps.bindings)
        if deps.leases.draining:
            raise Temporary("draining", "This replica stops; ask again.")
        are_open = [each for _, each in deps.registry if each.sandbox == request.sandbox and not each.is_over]
        if len(are_open) >= OPEN_PER_SANDBOX:
            detail = f"{OPEN_PER_SANDBOX} logins of this sandbox are open; cancel some by login.cancel."
            raise Refused("invalid", detail)
        code = await fetch_code(deps.logins, deps.bindings.of_sandbox(request.sandbox), deps.sealer)
        login = secrets.token_urlsafe(18)
        record = LoginRecord(
            owner=deps.leases.incarnation,
            sandbox=request.sandbox,
            url=deps.sealer.seal(login_context(login, "url"), code.url),
            until_ms=deps.clock.now_ms() + int(LOGIN_S * 1000),
        )
        record = await self._runner.start(login, record, code, request.options)
        return self._encode_answer(login, record, with_png=request.png)

    async def status(self, data: bytes) -> bytes:
        """The state of a login, up to a day after its end."""
        request = read_request(data, LoginQuery, self._deps.metrics)
        record, _ = await self._deps.registry.read(request.login)
        return self._encode_answer(request.login, record, with_png=request.png)

    async def verify(self, data: bytes) -> bytes:
        """Stores the digits that the phone shows for the login's flow, if they are needed."""
        request = read_request(data, LoginVerify, self._deps.metrics)
        digits = self._deps.sealer.seal(login_context(request.login, "digits"), request.code)

        def with_digits(record: LoginRecord) -> LoginRecord:
            if record.is_over:
                raise Refused("invalid", f"This login is over: {record.status}.")
            if record.status != "need_verify_code":
                raise Refused("invalid", "No digits are asked for: wait until the status is need_verify_code.")
            return structs.replace(record, digits=digits)

        return self._encode_answer(request.login, (await self._deps.registry.update(request.login, with_digits))[0])

    async def cancel(self, data: bytes) -> bytes:
        """Ends a login; its flow follows. A finished one stays as it is."""
        request = read_request(data, LoginQuery, self._deps.metrics)

        def as_cancelled(record: LoginRecord) -> LoginRecord | None:
            if record.is_over:
                return None
            if record.bot:
                raise Refused("invalid", "The user has confirmed already and the bot is being bound; unbind it.")
            return next_step(record, status="cancelled")

        return self._encode_answer(request.login, (await self._deps.registry.update(request.login, as_cancelled))[0])

    def _encode_answer(self, login: str, record: LoginRecord, *, with_png: bool = False) -> bytes:
        return msgspec.json.encode(to_login(self._deps.sealer, login, record, with_png=with_png))
