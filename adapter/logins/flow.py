"""One QR login from its first code to its bot.

`LoginRunner` runs a `LoginFlow` for each open login of an owned shard. The flow repeats these steps until the record
is final:

1. Publish the record's step as an event, if it is not published.
2. Keep exactly those requests to iLink in flight that the record needs (`_needed_requests`): one for each code that
   may be scanned, and one for a new code.
3. Apply the answers to the record by compare-and-set: scanned, digits needed, redirected, expired, confirmed.
4. After a confirmation, store the credentials first, since iLink may not give them again. Then publish a bind command
   and wait until it is applied or refused (`_bind`).

All state is in the record, so another owner continues from there. The flow never writes a binding itself, and never
logs a code, digits or a token.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import msgspec
import structlog
from msgspec import structs

from adapter.bindings.registry import Bindings
from adapter.contract import messages as contract
from adapter.contract.messages import Bind, BindingEvent
from adapter.contract.names import H_MSG_ID, H_SCHEMA, shard_of
from adapter.contract.records import Binding, LoginRecord
from adapter.errors import BusRefused, Refused, Temporary
from adapter.kit.timing import Clock, backoff, shield_with_grace
from adapter.logins.qr import check_content
from adapter.logins.registry import KEEP_ENDED_MS, LoginRegistry
from adapter.logins.steps import ADVICE, apply_scan, code_of, event_of, next_step, seal_code, with_code
from adapter.observability.events import BusAccess, read_binding_events, read_last_person_change
from adapter.observability.metrics import Metrics
from adapter.ownership.leases import Leases
from adapter.ports import Logins, Message, QrCode, Scan
from adapter.security.seal import Sealer, bind_context, login_context

log = structlog.get_logger()

REFRESH_S = 50.0
"""Age at which an unscanned code is replaced; iLink's codes live for one to two minutes."""
PAUSE_S = 1.0
"""Pause after an answer that says nothing new (docs/reference/ilink-protocol.md, "Login")."""
RETRY_S = 0.5
BOUND_S = 30.0
"""Longest wait for the bind command to take effect."""
GRACE_S = 5.0
"""Time to store an answer when the task has to end."""
LONGEST_ID, LONGEST_TOKEN = 128, 1024


class LoginDeps(NamedTuple):
    """Dependencies of the loop."""

    logins: Logins
    registry: LoginRegistry
    bindings: Bindings
    leases: Leases
    access: BusAccess
    sealer: Sealer
    clock: Clock
    metrics: Metrics
    refresh_s: float
    """Age at which an unscanned code is replaced."""


class _Request(NamedTuple):
    """A request to iLink: about the code `number`; or for another one, once this (0: none) is old."""

    number: int
    is_scan: bool = False
    base_url: str = ""
    digits: str = ""
    """As sealed in the record."""


class LoginFlow:
    """Continues one login from its record to its end."""

    def __init__(self, login: str, deps: LoginDeps, published_steps: dict[str, int]) -> None:
        self._login = login
        self._deps = deps
        self._published_steps = published_steps
        self._requests: dict[_Request, asyncio.Task[Scan | QrCode | None]] = {}

    async def run(self) -> None:
        """Raises LeaseLost."""
        registry, clock = self._deps.registry, self._deps.clock
        try:
            while (record := registry.get(self._login)) is not None:
                await self._publish_step(record)
                if record.is_over:
                    return
                await self._sync_requests(record)
                if record.token:
                    await self._bind(record)
                elif clock.now_ms() >= record.until_ms:
                    await self._fail_login("time", "", status="expired")
                else:
                    await self._wait_for_event(record)
                    await shield_with_grace(self._process_answers(), GRACE_S)
        finally:
            await end_all(list(self._requests.values()))

    async def _publish_step(self, record: LoginRecord) -> None:
        """Publishes the step, once per owner. The stream drops it if the previous owner has published it."""
        if self._published_steps.get(self._login) == record.step:
            return
        old = self._deps.clock.now_ms() - record.changed_ms > KEEP_ENDED_MS
        if self._login in self._published_steps or not old:
            await self._deps.access.events.publish_login_event(event_of(self._login, record), step=record.step)
        self._published_steps[self._login] = record.step

    async def _update_record(self, make: Callable[[LoginRecord], LoginRecord | None]) -> LoginRecord:
        while True:
            try:
                return await self._deps.registry.update(self._login, make)
            except Temporary as exc:
                log.warning("login.retrying", login=self._login[:6], reason=exc.reason)
                await self._deps.clock.sleep(RETRY_S)

    async def _fail_login(self, reason: str, detail: str, *, status: str = "failed") -> None:
        def failed(record: LoginRecord) -> LoginRecord | None:
            if record.is_over or (status == "expired" and record.token):
                return None
            return next_step(record, status=status, reason=reason, detail=detail)

        await self._update_record(failed)

    # requests ---------------------------------------------------------------------------------------

    def _needed_requests(self, record: LoginRecord) -> set[_Request]:
        """While digits are awaited no request is made, as in the official client: how iLink treats a request without
        them is unknown."""
        if record.token or (record.status == "need_verify_code" and not record.digits):
            return set()
        needed = {_Request(code.number, True, record.base_url, record.digits) for code in record.codes}
        if record.status == "wait":
            needed.add(_Request(record.number if code_of(record, record.number) else 0))
        return needed

    async def _sync_requests(self, record: LoginRecord) -> None:
        needed, requests = self._needed_requests(record), self._requests
        # the answer of one that is done is processed first
        obsolete = [request for request, task in requests.items() if request not in needed and not task.done()]
        await end_all([requests.pop(request) for request in obsolete])
        for request in needed - requests.keys():
            work = self._read_scan(record, request) if request.is_scan else self._fetch_code(record)
            requests[request] = asyncio.get_running_loop().create_task(work)

    async def _read_scan(self, record: LoginRecord, request: _Request) -> Scan | QrCode | None:
        deps, code = self._deps, code_of(record, request.number)
        assert code is not None
        deps.leases.ensure_owned(shard_of(record.sandbox))
        handle = deps.sealer.open(login_context(self._login, "handle"), code.handle)
        digits = deps.sealer.open(login_context(self._login, "digits"), request.digits) if request.digits else ""
        scan = await deps.logins.read_code(handle, request.base_url, digits)
        known = ("wait", "scaned", "scaned_but_redirect") if record.status == "scanned" else ("wait",)
        if scan is None or scan.status in known:
            await deps.clock.sleep(PAUSE_S)
        return scan

    async def _fetch_code(self, record: LoginRecord) -> Scan | QrCode | None:
        """Fetches a code once the newest one is old, or gone."""
        deps, failures = self._deps, 0
        if (newest := code_of(record, record.number)) is not None:
            await deps.clock.sleep(max(0.0, (newest.made_ms - deps.clock.now_ms()) / 1000 + deps.refresh_s))
        while True:
            deps.leases.ensure_owned(shard_of(record.sandbox))
            try:
                return await fetch_code(deps.logins, deps.bindings.of_sandbox(record.sandbox), deps.sealer)
            except Temporary as exc:
                failures += 1
                wait_s = exc.retry_after_s or backoff(failures, longest_s=10.0)
                log.warning("login.no_code", login=self._login[:6], reason=exc.reason, wait_s=wait_s)
                await deps.clock.sleep(wait_s)

    async def _wait_for_event(self, record: LoginRecord) -> None:
        """Waits for an answer, a changed record, or the end of the login's time."""
        registry, left_s = self._deps.registry, (record.until_ms - self._deps.clock.now_ms()) / 1000
        changed = asyncio.ensure_future(registry.changed.wait_until(lambda: registry.get(self._login) != record))
        try:
            waits: set[asyncio.Future[Any]] = {changed, *self._requests.values()}
            await asyncio.wait(waits, timeout=max(0.0, left_s), return_when=asyncio.FIRST_COMPLETED)
        finally:
            changed.cancel()

    # answers ----------------------------------------------------------------------------------------

    async def _process_answers(self) -> None:
        """Applies the answers that have arrived. Raises LeaseLost."""
        for request in [request for request, task in self._requests.items() if task.done()]:
            try:
                answer = self._requests.pop(request).result()
                if isinstance(answer, QrCode):
                    await self._store_code(answer)
                elif answer is not None:
                    await self._store_scan(request, answer)
            except Refused as exc:
                await self._fail_login(exc.reason, exc.detail)

    async def _store_code(self, code: QrCode) -> None:
        deps, replaced = self._deps, False

        def with_new_code(record: LoginRecord) -> LoginRecord | None:
            nonlocal replaced
            sealed = seal_code(deps.sealer, self._login, record.number + 1, code, deps.clock.now_ms())
            after = with_code(record, sealed)
            replaced = after is not None
            return after

        await self._update_record(with_new_code)
        if replaced:
            deps.metrics.qr_refreshes.inc()

    async def _store_scan(self, request: _Request, scan: Scan) -> None:
        """Raises Refused for an answer that no login could use."""
        deps = self._deps
        base_url = request.base_url
        if scan.status == "confirmed":
            _check_credentials(scan)
            base_url = deps.logins.check_base_url(scan.base_url) if scan.base_url else ""
        elif scan.status == "scaned_but_redirect" and scan.redirect_host:
            base_url = deps.logins.redirect_base_url(scan.redirect_host, request.base_url)

        def after_scan(record: LoginRecord) -> LoginRecord | None:
            code = code_of(record, request.number)
            if code is None or record.token:
                return None
            match scan.status:
                case "confirmed":
                    token = deps.sealer.seal(bind_context(record.sandbox, scan.bot), scan.token)
                    return structs.replace(record, token=token, bot=scan.bot, user=scan.user, bot_base_url=base_url)
                case "scaned_but_redirect":
                    if record.status == "wait":
                        return next_step(record, status="scanned", codes=[code], base_url=base_url)
                    return structs.replace(record, base_url=base_url) if record.base_url != base_url else None
                case "binded_redirect":  # iLink does not say which bot it means; if the sandbox has one, it is that
                    bound = [b for b in deps.bindings.of_sandbox(record.sandbox) if b.state == "active"]
                    bot, user = (bound[0].bot, bound[0].user) if len(bound) == 1 else ("", "")
                    return next_step(record, status="already_bound", bot=bot, user=user)
                case _:
                    return apply_scan(record, code, request.digits, scan)

        await self._update_record(after_scan)

    # binding ----------------------------------------------------------------------------------------

    async def _bind(self, record: LoginRecord) -> None:
        """Publishes the bind command, since only control commands write bindings, and waits for the outcome."""
        deps, request = self._deps, f"login:{self._login}"
        if _find_bound(deps, record, request) is None:
            await self._note_former_user(record)
            bind = Bind(
                sandbox=record.sandbox,
                bot=record.bot,
                bot_token=record.token,
                id=request,
                base_url=record.bot_base_url or None,
                user=record.user or None,
                options=record.options,
                check=False,  # iLink has just given it
            )
            headers = {H_MSG_ID: request, H_SCHEMA: contract.SCHEMA_VERSION}
            try:
                command = Message("ctl", deps.access.names.bind, msgspec.json.encode(bind), headers)
                await deps.access.bus.publish(command)
            except BusRefused as exc:
                log.error("login.unbound", login=self._login[:6], sandbox=record.sandbox, detail=exc.detail)
                await self._fail_login("bus", "The bus did not take the bind command; start another login.")
                return
        deadline = deps.clock.monotonic() + BOUND_S
        while deps.clock.monotonic() < deadline:
            if await deps.bindings.changed.wait_until(lambda: _find_bound(deps, record, request) is not None, 2.0):
                break
            if refused := await _find_refusal(deps, record, request):
                await self._fail_login(refused.reason, refused.detail)
                return
        binding = _find_bound(deps, record, request)
        bound = {"bot": binding.bot, "user": binding.user} if binding else _PENDING

        def with_confirmation(now: LoginRecord) -> LoginRecord | None:
            if now.is_over:
                return None
            warning = {"detail": _WARNING.format(now.former_user)} if now.former_user else {}
            return next_step(now, status="confirmed", **{**warning, **bound})

        await self._update_record(with_confirmation)

    async def _note_former_user(self, record: LoginRecord) -> None:
        """Stores the person who is or was last bound to the sandbox, if it is another one. After the bind that cannot
        be found out."""
        deps, user = self._deps, record.user
        users = {binding.user for binding in deps.bindings.of_sandbox(record.sandbox)}
        while not users:
            try:
                last = await read_last_person_change(deps.access.history, deps.access.names, record.sandbox)
                users = {last.user if last is not None else ""}
            except Temporary as exc:
                log.warning("login.retrying", login=self._login[:6], reason=exc.reason)
                await deps.clock.sleep(RETRY_S)
        if user and user not in users and (others := users - {""}):
            await self._update_record(lambda now: structs.replace(now, former_user=min(others)))


_PENDING = {
    "reason": "bind_pending",
    "detail": "The bind command is stored and will take effect; a binding event reports the outcome.",
}
_WARNING = f"{ADVICE['confirmed']} Another person than before has scanned the code: {{}} was bound to this sandbox."


def _find_bound(deps: LoginDeps, record: LoginRecord, request: str) -> Binding | None:
    """The binding that the bind command made, even if it changed nothing."""
    for binding in deps.bindings.of_sandbox(record.sandbox):
        if binding.request == request:
            return binding
        if binding.bot == record.bot:
            with contextlib.suppress(Refused):
                token = deps.sealer.open(bind_context(record.sandbox, record.bot), record.token)
                if deps.sealer.open(binding.bot, binding.token) == token:
                    return binding
    return None


async def _find_refusal(deps: LoginDeps, record: LoginRecord, request: str) -> BindingEvent | None:
    """The event with which the bind command was refused."""
    access, since_ms = deps.access, record.changed_ms - 60_000
    try:
        async for _, event in read_binding_events(access.history, access.names, record.sandbox, since_ms=since_ms):
            if event.request == request and event.change == "refused":
                return event
    except Temporary as exc:
        log.info("login.unread", sandbox=record.sandbox, reason=exc.reason)
    return None


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
    """A code that can be shown. Raises Temporary.

    A scanning user should keep a bot of `bound`: its token goes with the request, newest first. Dead ones are left
    out, since their user needs a new bot instead of `already_bound`.
    """
    tokens = []
    for binding in sorted(bound, key=lambda binding: binding.since_ms, reverse=True):
        if binding.state == "active":
            try:
                tokens.append(sealer.open(binding.bot, binding.token))
            except Refused as exc:
                log.warning("login.token_unread", bot=binding.bot, reason=exc.reason)
    code = await logins.fetch_code(tokens)
    check_content(code.url)
    return code


async def end_all(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancels tasks and waits for their end. Their results are dropped."""
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()
