"""One QR login from its first code to its bot.

`LoginRunner` runs a `LoginFlow` for each open login of an owned shard. The flow repeats these steps until the record
is final:

1. Publish the record's step as an event, if it is not published.
2. Keep one request to iLink for each code that may be scanned (`_sync_requests`), and fetch a new code when the
   newest one is old.
3. Apply the answers to the record by compare-and-set: scanned, digits needed, redirected, expired, confirmed.
4. After a confirmation, store the credentials first, since iLink may not give them again. Then publish a bind command
   and wait until it is applied or refused (`_bind`).

All state is in the record, so another owner continues from there. The flow never writes a binding itself, and never
logs a code, digits or a token.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import msgspec
import structlog
from msgspec import structs

from adapter.bindings.registry import Bindings
from adapter.contract import messages as contract
from adapter.contract.messages import Bind, BindingEvent
from adapter.contract.names import H_MSG_ID, H_SCHEMA, shard_of
from adapter.contract.records import Binding, LoginCode, LoginRecord
from adapter.errors import BusRefused, Refused, Temporary
from adapter.kit.timing import Clock, backoff, shield_with_grace
from adapter.logins.registry import ADVICE, KEEP_ENDED_MS, LoginRegistry, code_of, event_of, fetch_code, tokens_of
from adapter.observability.events import BusAccess, read_binding_events, read_last_person_change
from adapter.observability.metrics import Metrics
from adapter.ownership.leases import Leases
from adapter.ports import Logins, Message, QrCode, Scan
from adapter.security.seal import Sealer, bind_context

log = structlog.get_logger()

REFRESH_S = 50.0
"""Age at which an unscanned code is replaced; iLink's codes live for one to two minutes."""
PAUSE_S = 1.0
"""Pause between two requests about one code (docs/reference/ilink-protocol.md, "Login")."""
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


class _ScanRequest(NamedTuple):
    """A request about a code. `digits`: as sealed in the record."""

    code: LoginCode
    base_url: str
    digits: str
    task: asyncio.Task[Scan | None]


class LoginFlow:
    """Continues one login from its record to its end."""

    def __init__(self, login: str, deps: LoginDeps, published_steps: dict[str, int]) -> None:
        self._login = login
        self._deps = deps
        self._published_steps = published_steps
        self._requests: dict[int, _ScanRequest] = {}
        """By number of the code."""
        self._sent_digits: dict[int, str] = {}
        """Digits of the last request about each code. A repeat with the same ones waits a second."""
        self._fetch: asyncio.Task[QrCode] | None = None
        self._failures = 0
        self._fetch_at = 0.0
        """Monotonic time before which no code is fetched."""

    async def run(self) -> None:
        """Raises LeaseLost."""
        registry, clock = self._deps.registry, self._deps.clock
        try:
            while (record := registry.get(self._login)) is not None:
                await self._publish_step(record)
                if record.is_over:
                    return
                if record.token:
                    await self._cancel_requests(set())
                    await self._bind(record)
                elif clock.now_ms() >= record.until_ms:
                    await self._update_record(self._expire_if_due)
                else:
                    await self._sync_requests(record)
                    await self._wait_for_event(record)
                    await shield_with_grace(self._process_answers(), GRACE_S)
        finally:
            await self._cancel_requests(set())
            if self._fetch is not None:
                await end_all([self._fetch])

    async def _publish_step(self, record: LoginRecord) -> None:
        """Publishes the step, once per owner. The stream drops it if the previous owner has published it."""
        if self._published_steps.get(self._login) == record.step:
            return
        old = self._deps.clock.now_ms() - record.changed_ms > KEEP_ENDED_MS
        if self._login in self._published_steps or not old:
            await self._deps.access.events.publish_login_event(event_of(self._login, record), step=record.step)
        self._published_steps[self._login] = record.step

    async def _update_record(self, make: Callable[[LoginRecord], LoginRecord | None]) -> None:
        while True:
            try:
                await self._deps.registry.update(self._login, make)
                return
            except Temporary as exc:
                log.warning("login.retrying", login=self._login[:6], reason=exc.reason)
                await self._deps.clock.sleep(0.5)

    async def _fail_login(self, reason: str, detail: str) -> None:
        def with_failure(record: LoginRecord) -> LoginRecord | None:
            step = self._deps.registry.next_step
            return None if record.is_over else step(record, status="failed", reason=reason, detail=detail)

        await self._update_record(with_failure)

    def _expire_if_due(self, record: LoginRecord) -> LoginRecord | None:
        if record.is_over or record.token:
            return None
        return self._deps.registry.next_step(record, status="expired", reason="time")

    # requests ---------------------------------------------------------------------------------------

    async def _sync_requests(self, record: LoginRecord) -> None:
        """Keeps exactly those requests in flight that the record needs.

        While digits are awaited no request is made, as in the official client: how iLink treats a request without
        them is unknown.
        """
        silent = record.status == "need_verify_code" and not record.digits
        wanted = {} if silent else {code.number: code for code in record.codes}
        if silent:
            self._sent_digits.clear()  # the next digits are sent at once, even if they are the same
        await self._cancel_requests(
            {
                number
                for number, request in self._requests.items()
                if request.task.done()  # its answer is processed first
                or (number in wanted and (request.base_url, request.digits) == (record.base_url, record.digits))
            }
        )
        for number, code in wanted.items():
            if number not in self._requests:
                again = self._sent_digits.get(number) == record.digits
                self._sent_digits[number] = record.digits
                work = self._read_scan(code, record, PAUSE_S if again else 0.0)
                task = asyncio.get_running_loop().create_task(work)
                self._requests[number] = _ScanRequest(code, record.base_url, record.digits, task)
        if self._fetch is None and self._fetch_due_s(record) == 0.0:
            self._fetch = asyncio.get_running_loop().create_task(self._fetch_code(record.sandbox))

    async def _cancel_requests(self, kept: set[int]) -> None:
        obsolete_requests = [self._requests.pop(number) for number in list(self._requests) if number not in kept]
        await end_all([request.task for request in obsolete_requests])

    async def _read_scan(self, code: LoginCode, record: LoginRecord, pause_s: float) -> Scan | None:
        deps = self._deps
        await deps.clock.sleep(pause_s)
        deps.leases.ensure_owned(shard_of(record.sandbox))
        handle, digits = deps.registry.open_handle(self._login, code), deps.registry.open_digits(self._login, record)
        return await deps.logins.read_code(handle, record.base_url, digits)

    async def _fetch_code(self, sandbox: str) -> QrCode:
        deps = self._deps
        deps.leases.ensure_owned(shard_of(sandbox))
        return await fetch_code(deps.logins, tokens_of(deps.bindings.of_sandbox(sandbox), deps.sealer))

    def _fetch_due_s(self, record: LoginRecord) -> float | None:
        """Seconds until a new code is fetched; None: something else has to happen first."""
        if record.status != "wait":
            return None
        clock, newest = self._deps.clock, code_of(record, record.number)
        due_s = 0.0
        if newest is not None:
            due_s = (newest.made_ms - clock.now_ms()) / 1000 + self._deps.refresh_s
        return max(0.0, due_s, self._fetch_at - clock.monotonic())

    async def _wait_for_event(self, record: LoginRecord) -> None:
        """Waits for an answer, a changed record, or the next deadline."""
        registry, clock = self._deps.registry, self._deps.clock
        due_s = self._fetch_due_s(record) if self._fetch is None else None
        left_s = max(0.0, (record.until_ms - clock.now_ms()) / 1000)
        changed = asyncio.ensure_future(registry.changed.wait_until(lambda: registry.get(self._login) != record))
        tasks: set[asyncio.Future[Any]] = {changed, *(request.task for request in self._requests.values())}
        if self._fetch is not None:
            tasks.add(self._fetch)
        try:
            await asyncio.wait(
                tasks, timeout=left_s if due_s is None else min(left_s, due_s), return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            changed.cancel()

    # answers ----------------------------------------------------------------------------------------

    async def _process_answers(self) -> None:
        """Applies the answers that have arrived. Raises LeaseLost."""
        for number, request in list(self._requests.items()):
            if request.task.done():
                del self._requests[number]
                try:
                    scan = request.task.result()
                except Refused as exc:
                    await self._fail_login(exc.reason, exc.detail)
                else:
                    await self._on_scan(request, scan or Scan("wait"))
        if self._fetch is not None and self._fetch.done():
            fetch, self._fetch = self._fetch, None
            await self._store_code(fetch)

    async def _store_code(self, fetch: asyncio.Task[QrCode]) -> None:
        registry, clock = self._deps.registry, self._deps.clock
        try:
            code = fetch.result()
        except Temporary as exc:
            self._failures += 1
            wait_s = exc.retry_after_s or backoff(self._failures, longest_s=10.0)
            self._fetch_at = clock.monotonic() + wait_s
            log.warning("login.no_code", login=self._login[:6], reason=exc.reason, wait_s=wait_s)
            return
        self._failures = 0
        replaced = False

        def with_new_code(record: LoginRecord) -> LoginRecord | None:
            nonlocal replaced
            replaced = record.status == "wait" and not record.token  # not scanned meanwhile
            return registry.with_code(self._login, record, code) if replaced else None

        await self._update_record(with_new_code)
        if replaced:
            self._deps.metrics.qr_refreshes.inc()

    async def _on_scan(self, request: _ScanRequest, scan: Scan) -> None:
        registry, number = self._deps.registry, request.code.number
        match scan.status:
            case "wait":
                pass
            case "confirmed":
                await self._on_confirmed(number, scan)
            case "scaned_but_redirect":
                await self._on_redirected(request, scan.redirect_host)
            case "binded_redirect":
                await self._update_record(lambda record: self._already_bound(record, number))
            case _:
                await self._update_record(lambda record: registry.apply_scan(record, number, request.digits, scan))

    async def _on_redirected(self, request: _ScanRequest, host: str) -> None:
        """Continues the same code at another host, or at the current one if none is given."""
        base_url = request.base_url
        if host:
            try:
                base_url = self._deps.logins.redirect_base_url(host, request.base_url)
            except Refused as exc:
                await self._fail_login("url", exc.detail)
                return

        def with_base_url(record: LoginRecord) -> LoginRecord | None:
            code = code_of(record, request.code.number)
            if code is None or record.token:
                return None
            if record.status == "wait":
                return self._deps.registry.next_step(record, status="scanned", codes=[code], base_url=base_url)
            return structs.replace(record, base_url=base_url) if record.base_url != base_url else None

        await self._update_record(with_base_url)

    def _already_bound(self, record: LoginRecord, number: int) -> LoginRecord | None:
        """iLink does not say which bot it means; if the sandbox has one, it is that."""
        if code_of(record, number) is None or record.token:
            return None
        bound = [b for b in self._deps.bindings.of_sandbox(record.sandbox) if b.state == "active"]
        bot, user = (bound[0].bot, bound[0].user) if len(bound) == 1 else ("", "")
        return self._deps.registry.next_step(record, status="already_bound", bot=bot, user=user)

    async def _on_confirmed(self, number: int, scan: Scan) -> None:
        """Stores the credentials first, since iLink may not give them again."""
        deps = self._deps
        try:
            _check_credentials(scan)
            base_url = deps.logins.check_base_url(scan.base_url) if scan.base_url else ""
        except Refused as exc:
            await self._fail_login(exc.reason, exc.detail)
            return

        def with_credentials(record: LoginRecord) -> LoginRecord | None:
            if code_of(record, number) is None or record.token:
                return None
            token = deps.sealer.seal(bind_context(record.sandbox, scan.bot), scan.token)
            return structs.replace(record, token=token, bot=scan.bot, user=scan.user, bot_base_url=base_url)

        await self._update_record(with_credentials)

    # binding ----------------------------------------------------------------------------------------

    async def _bind(self, record: LoginRecord) -> None:
        """Publishes the bind command, since only control commands write bindings, and waits for the outcome."""
        deps, request = self._deps, f"login:{self._login}"
        if self._find_bound(record, request) is None:
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
            if await deps.bindings.changed.wait_until(lambda: self._find_bound(record, request) is not None, 2.0):
                break
            if refused := await self._find_refusal(record, request):
                await self._fail_login(refused.reason, refused.detail)
                return
        binding = self._find_bound(record, request)
        bound = {"bot": binding.bot, "user": binding.user} if binding else _PENDING

        def with_confirmation(now: LoginRecord) -> LoginRecord | None:
            if now.is_over:
                return None
            warning = {"detail": _WARNING.format(now.former_user)} if now.former_user else {}
            return deps.registry.next_step(now, status="confirmed", **{**warning, **bound})

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
                await deps.clock.sleep(0.5)
        if user and user not in users and (others := users - {""}):
            await self._update_record(lambda now: structs.replace(now, former_user=min(others)))

    def _find_bound(self, record: LoginRecord, request: str) -> Binding | None:
        """The binding that the bind command made, even if it changed nothing."""
        for binding in self._deps.bindings.of_sandbox(record.sandbox):
            if binding.request == request or (binding.bot == record.bot and self._same_token(binding, record)):
                return binding
        return None

    def _same_token(self, binding: Binding, record: LoginRecord) -> bool:
        open_, context = self._deps.sealer.open, bind_context(record.sandbox, record.bot)
        try:
            return open_(binding.bot, binding.token) == open_(context, record.token)
        except Refused:
            return False

    async def _find_refusal(self, record: LoginRecord, request: str) -> BindingEvent | None:
        """The event with which the bind command was refused."""
        access, since_ms = self._deps.access, record.changed_ms - 60_000
        try:
            async for _, event in read_binding_events(
                access.history, access.names, record.sandbox, since_ms=since_ms
            ):
                if event.request == request and event.change == "refused":
                    return event
        except Temporary as exc:
            log.info("login.unread", login=self._login[:6], reason=exc.reason)
        return None


_PENDING = {
    "reason": "bind_pending",
    "detail": "The bind command is stored and will take effect; a binding event reports the outcome.",
}
_WARNING = f"{ADVICE['confirmed']} Another person than before has scanned the code: {{}} was bound to this sandbox."


def _check_credentials(scan: Scan) -> None:
    """Raises Refused for credentials that no bind could use."""
    if not scan.bot:
        raise Refused("no_bot_id", "iLink confirmed the login without naming the bot; start another one.")
    if not scan.token:
        raise Refused("no_token", "iLink confirmed the login without a token; start another one.")
    printable = all("!" <= char <= "~" for char in scan.bot + scan.user + scan.token)
    if not printable or max(len(scan.bot), len(scan.user)) > LONGEST_ID or len(scan.token) > LONGEST_TOKEN:
        raise Refused("credentials", "iLink confirmed the login with credentials that cannot be read.")


async def end_all(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancels tasks and waits for their end. Their results are dropped."""
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()
