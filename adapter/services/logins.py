"""`wechat.svc.login.*`: starts QR logins, reports their state, takes digits, cancels. Any replica answers."""

from __future__ import annotations

import msgspec
from msgspec import structs

from adapter.bindings.registry import Bindings
from adapter.contract.messages import LoginQuery, LoginStart, LoginVerify
from adapter.contract.names import check_sandbox
from adapter.contract.records import LoginRecord
from adapter.errors import Refused, Temporary
from adapter.logins.registry import LoginRegistry, fetch_code, tokens_of
from adapter.observability.metrics import Metrics
from adapter.ports import Logins
from adapter.security.seal import Sealer
from adapter.services.requests import START_S, read_request

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
        metrics: Metrics,
    ) -> None:
        self._logins = logins
        self._registry = registry
        self._bindings = bindings
        self._sealer = sealer
        self._metrics = metrics

    async def start(self, data: bytes) -> bytes:
        """Fetches the first code and stores the login. The shard's owner continues it."""
        request = read_request(data, LoginStart, self._metrics)
        check_sandbox(request.sandbox)
        if not await self._bindings.changed.wait_until(lambda: self._bindings.is_loaded, START_S):
            raise Temporary("starting", "The adapter is starting; ask again in a moment.")
        if self._registry.count_open(request.sandbox) >= OPEN_PER_SANDBOX:
            raise Refused(
                "invalid", f"{OPEN_PER_SANDBOX} logins of this sandbox are open; cancel some by login.cancel."
            )
        code = await fetch_code(self._logins, tokens_of(self._bindings.of_sandbox(request.sandbox), self._sealer))
        login, record = await self._registry.create(request, code, login_s=LOGIN_S)
        return self._encode_answer(login, record, with_png=request.png)

    async def status(self, data: bytes) -> bytes:
        """The state of a login, up to a day after its end."""
        request = read_request(data, LoginQuery, self._metrics)
        return self._encode_answer(request.login, await self._registry.read(request.login), with_png=request.png)

    async def verify(self, data: bytes) -> bytes:
        """Takes the digits that the phone shows, if they are needed."""
        request = read_request(data, LoginVerify, self._metrics)
        digits = self._registry.seal_digits(request.login, request.code)

        def with_digits(record: LoginRecord) -> LoginRecord:
            if record.is_over:
                raise Refused("invalid", f"This login is over: {record.status}.")
            if record.status != "need_verify_code":
                raise Refused("invalid", "No digits are asked for: wait until the status is need_verify_code.")
            return structs.replace(record, digits=digits)

        return self._encode_answer(
            request.login, await self._registry.update(request.login, with_digits), with_png=False
        )

    async def cancel(self, data: bytes) -> bytes:
        """Ends a login. A finished one stays as it is."""
        request = read_request(data, LoginQuery, self._metrics)

        def as_cancelled(record: LoginRecord) -> LoginRecord | None:
            if record.is_over:
                return None
            if record.token:
                raise Refused("invalid", "The user has confirmed already and the bot is being bound; unbind it.")
            return self._registry.next_step(record, status="cancelled")

        return self._encode_answer(
            request.login, await self._registry.update(request.login, as_cancelled), with_png=False
        )

    def _encode_answer(self, login: str, record: LoginRecord, *, with_png: bool) -> bytes:
        return msgspec.json.encode(self._registry.to_login(login, record, with_png=with_png))
