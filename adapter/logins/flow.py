"""One QR login from its first code to its bot: asks iLink about the codes and carries the answers into the record.

All state is in the record, so another owner goes on from there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import msgspec
import structlog
from msgspec import structs

from adapter import contract
from adapter.bindings.registry import Bindings
from adapter.contract import Bind, BindingEvent
from adapter.errors import BusRefused, Refused, Temporary
from adapter.events import Events, read_last_of_person, told_of_bindings
from adapter.logins.registry import ADVICE, TELL_MS, LoginRegistry, code_of, event_of, fetch_code, tokens_of
from adapter.metrics import Metrics
from adapter.names import H_MSG_ID, H_SCHEMA, Names, shard_of
from adapter.ports import Bus, History, Logins, Message, QrCode, Scan
from adapter.records import Binding, LoginCode, LoginRecord
from adapter.replicas.leases import Leases
from adapter.seal import Sealer, bind_context
from adapter.timing import Clock, backoff, finish

log = structlog.get_logger()

REFRESH_S = 50.0
"""After so long a code that nobody scanned is replaced: iLink's live for one to two minutes."""
PAUSE_S = 1.0
"""Between two requests about one code (docs/reference/ilink-protocol.md, "Login")."""
BOUND_S = 30.0
"""How long a login waits for its bind command to be carried out."""
GRACE_S = 5.0
"""For storing an answer when the task must end."""
LONGEST_ID, LONGEST_TOKEN = 128, 1024


class LoginNeeds(NamedTuple):
    """What the loop needs."""

    logins: Logins
    registry: LoginRegistry
    bindings: Bindings
    leases: Leases
    bus: Bus
    history: History
    events: Events
    sealer: Sealer
    clock: Clock
    metrics: Metrics
    names: Names
    refresh_s: float
    """A code that nobody scanned is replaced after so long."""


class _Asked(NamedTuple):
    """A request about a code that is out. `digits`: as sealed in the record."""

    code: LoginCode
    base_url: str
    digits: str
    task: asyncio.Task[Scan | None]


class LoginFlow:
    """Drives one login from where its record stands to its end."""

    def __init__(self, login: str, needs: LoginNeeds, told: dict[str, int]) -> None:
        self._login = login
        self._needs = needs
        self._told = told
        self._out: dict[int, _Asked] = {}
        """By the number of the code."""
        self._sent: dict[int, str] = {}
        """The digits that went with the last request about each code: asking the same again waits a second."""
        self._fetch: asyncio.Task[QrCode] | None = None
        self._failures = 0
        self._fetch_at = 0.0
        """Monotonic; no code is fetched before."""

    async def run(self) -> None:
        """Raises LeaseLost."""
        registry, clock = self._needs.registry, self._needs.clock
        try:
            while (record := registry.get(self._login)) is not None:
                await self._tell(record)
                if record.over:
                    return
                if record.token:
                    await self._end_requests(set())
                    await self._bind(record)
                elif clock.now_ms() >= record.until_ms:
                    await self._change(self._outlived)
                else:
                    await self._ask(record)
                    await self._wait(record)
                    await finish(self._take(), GRACE_S)
        finally:
            await self._end_requests(set())
            if self._fetch is not None:
                await end_all([self._fetch])

    async def _tell(self, record: LoginRecord) -> None:
        """Publishes the step, once per owner; the stream drops what the owner before has told."""
        if self._told.get(self._login) == record.step:
            return
        old = self._needs.clock.now_ms() - record.changed_ms > TELL_MS
        if self._login in self._told or not old:
            await self._needs.events.login(event_of(self._login, record), step=record.step)
        self._told[self._login] = record.step

    async def _change(self, make: Callable[[LoginRecord], LoginRecord | None]) -> None:
        while True:
            try:
                await self._needs.registry.change(self._login, make)
                return
            except Temporary as exc:
                log.warning("login.waits", login=self._login[:6], reason=exc.reason)
                await self._needs.clock.sleep(0.5)

    async def _fail(self, reason: str, detail: str) -> None:
        def failed(record: LoginRecord) -> LoginRecord | None:
            step = self._needs.registry.step
            return None if record.over else step(record, status="failed", reason=reason, detail=detail)

        await self._change(failed)

    def _outlived(self, record: LoginRecord) -> LoginRecord | None:
        if record.over or record.token:
            return None
        return self._needs.registry.step(record, status="expired", reason="time")

    # requests ---------------------------------------------------------------------------------------

    async def _ask(self, record: LoginRecord) -> None:
        """Lets exactly those requests be out that the record asks for.

        While digits are awaited nothing is asked, as the official client does: what a request without them would
        count for is not known.
        """
        silent = record.status == "need_verify_code" and not record.digits
        wanted = {} if silent else {code.number: code for code in record.codes}
        if silent:
            self._sent.clear()  # the digits that come are sent at once, also the same again
        await self._end_requests(
            {
                number
                for number, asked in self._out.items()
                if asked.task.done()  # its answer is taken first
                or (number in wanted and (asked.base_url, asked.digits) == (record.base_url, record.digits))
            }
        )
        for number, code in wanted.items():
            if number not in self._out:
                again = self._sent.get(number) == record.digits
                self._sent[number] = record.digits
                work = self._read(code, record, PAUSE_S if again else 0.0)
                task = asyncio.get_running_loop().create_task(work)
                self._out[number] = _Asked(code, record.base_url, record.digits, task)
        if self._fetch is None and self._fetch_due_s(record) == 0.0:
            self._fetch = asyncio.get_running_loop().create_task(self._fetched(record.sandbox))

    async def _end_requests(self, kept: set[int]) -> None:
        gone = [self._out.pop(number) for number in list(self._out) if number not in kept]
        await end_all([asked.task for asked in gone])

    async def _read(self, code: LoginCode, record: LoginRecord, pause_s: float) -> Scan | None:
        needs = self._needs
        await needs.clock.sleep(pause_s)
        needs.leases.check(shard_of(record.sandbox))
        handle, digits = needs.registry.handle(self._login, code), needs.registry.digits(self._login, record)
        return await needs.logins.read_code(handle, record.base_url, digits)

    async def _fetched(self, sandbox: str) -> QrCode:
        needs = self._needs
        needs.leases.check(shard_of(sandbox))
        return await fetch_code(needs.logins, tokens_of(needs.bindings.of_sandbox(sandbox), needs.sealer))

    def _fetch_due_s(self, record: LoginRecord) -> float | None:
        """Seconds until a new code is to be fetched; None: not before something else happens."""
        if record.status != "wait":
            return None
        clock, newest = self._needs.clock, code_of(record, record.number)
        due_s = 0.0
        if newest is not None:
            due_s = (newest.made_ms - clock.now_ms()) / 1000 + self._needs.refresh_s
        return max(0.0, due_s, self._fetch_at - clock.monotonic())

    async def _wait(self, record: LoginRecord) -> None:
        """Until an answer is there, the record has changed, or it is time for something."""
        registry, clock = self._needs.registry, self._needs.clock
        due_s = self._fetch_due_s(record) if self._fetch is None else None
        left_s = max(0.0, (record.until_ms - clock.now_ms()) / 1000)
        changed = asyncio.ensure_future(registry.changed.until(lambda: registry.get(self._login) != record))
        tasks: set[asyncio.Future[Any]] = {changed, *(asked.task for asked in self._out.values())}
        if self._fetch is not None:
            tasks.add(self._fetch)
        try:
            await asyncio.wait(
                tasks, timeout=left_s if due_s is None else min(left_s, due_s), return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            changed.cancel()

    # answers ----------------------------------------------------------------------------------------

    async def _take(self) -> None:
        """Carries the answers that are there into the record. Raises LeaseLost."""
        for number, asked in list(self._out.items()):
            if asked.task.done():
                del self._out[number]
                try:
                    scan = asked.task.result()
                except Refused as exc:
                    await self._fail(exc.reason, exc.detail)
                else:
                    await self._answered(asked, scan or Scan("wait"))
        if self._fetch is not None and self._fetch.done():
            fetch, self._fetch = self._fetch, None
            await self._take_code(fetch)

    async def _take_code(self, fetch: asyncio.Task[QrCode]) -> None:
        registry, clock = self._needs.registry, self._needs.clock
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

        def replace(record: LoginRecord) -> LoginRecord | None:
            nonlocal replaced
            replaced = record.status == "wait" and not record.token  # nobody scanned meanwhile
            return registry.with_code(self._login, record, code) if replaced else None

        await self._change(replace)
        if replaced:
            self._needs.metrics.qr_refreshes.inc()

    async def _answered(self, asked: _Asked, scan: Scan) -> None:
        registry, number = self._needs.registry, asked.code.number
        match scan.status:
            case "wait":
                pass
            case "confirmed":
                await self._confirmed(number, scan)
            case "scaned_but_redirect":
                await self._redirected(asked, scan.redirect_host)
            case "binded_redirect":
                await self._change(lambda record: self._already_bound(record, number))
            case _:
                await self._change(lambda record: registry.after(record, number, asked.digits, scan))

    async def _redirected(self, asked: _Asked, host: str) -> None:
        """The same code goes on at another host; without one, where it is."""
        base_url = asked.base_url
        if host:
            try:
                base_url = self._needs.logins.redirected(host, asked.base_url)
            except Refused as exc:
                await self._fail("url", exc.detail)
                return

        def move(record: LoginRecord) -> LoginRecord | None:
            code = code_of(record, asked.code.number)
            if code is None or record.token:
                return None
            if record.status == "wait":
                return self._needs.registry.step(record, status="scanned", codes=[code], base_url=base_url)
            return structs.replace(record, base_url=base_url) if record.base_url != base_url else None

        await self._change(move)

    def _already_bound(self, record: LoginRecord, number: int) -> LoginRecord | None:
        """iLink does not say which bot; where there is one, it is that."""
        if code_of(record, number) is None or record.token:
            return None
        bound = [b for b in self._needs.bindings.of_sandbox(record.sandbox) if b.state == "active"]
        bot, user = (bound[0].bot, bound[0].user) if len(bound) == 1 else ("", "")
        return self._needs.registry.step(record, status="already_bound", bot=bot, user=user)

    async def _confirmed(self, number: int, scan: Scan) -> None:
        """The credentials are stored first: iLink may not give them a second time."""
        needs = self._needs
        try:
            _check(scan)
            base_url = needs.logins.check_base_url(scan.base_url) if scan.base_url else ""
        except Refused as exc:
            await self._fail(exc.reason, exc.detail)
            return

        def take(record: LoginRecord) -> LoginRecord | None:
            if code_of(record, number) is None or record.token:
                return None
            token = needs.sealer.seal(bind_context(record.sandbox, scan.bot), scan.token)
            return structs.replace(record, token=token, bot=scan.bot, user=scan.user, bot_base_url=base_url)

        await self._change(take)

    # the end ----------------------------------------------------------------------------------------

    async def _bind(self, record: LoginRecord) -> None:
        """Hands the bot to the control commands, which alone write bindings, and waits for the outcome."""
        needs, request = self._needs, f"login:{self._login}"
        if self._bound(record, request) is None:
            await self._note_former_user(record)
            bind = Bind(
                sandbox=record.sandbox,
                bot=record.bot,
                bot_token=record.token,
                id=request,
                base_url=record.bot_base_url or None,
                user=record.user or None,
                options=record.options,
            )
            headers = {H_MSG_ID: request, H_SCHEMA: contract.SCHEMA_VERSION}
            try:
                await needs.bus.publish(Message("ctl", needs.names.bind, msgspec.json.encode(bind), headers))
            except BusRefused as exc:
                log.error("login.unbound", login=self._login[:6], sandbox=record.sandbox, detail=exc.detail)
                await self._fail("bus", "The bus did not take the bind command; start another login.")
                return
        deadline = needs.clock.monotonic() + BOUND_S
        while needs.clock.monotonic() < deadline:
            if await needs.bindings.changed.until(lambda: self._bound(record, request) is not None, 2.0):
                break
            if refused := await self._refusal(record, request):
                await self._fail(refused.reason, refused.detail)
                return
        binding = self._bound(record, request)
        bound = {"bot": binding.bot, "user": binding.user} if binding else _PENDING

        def confirmed(now: LoginRecord) -> LoginRecord | None:
            if now.over:
                return None
            warning = {"detail": _WARNING.format(now.former_user)} if now.former_user else {}
            return needs.registry.step(now, status="confirmed", **{**warning, **bound})

        await self._change(confirmed)

    async def _note_former_user(self, record: LoginRecord) -> None:
        """Stores who is bound to the sandbox, or was last, if that is another person: once the bind is carried out
        nobody can tell."""
        needs, user = self._needs, record.user
        users = {binding.user for binding in needs.bindings.of_sandbox(record.sandbox)}
        while not users:
            try:
                last = await read_last_of_person(needs.history, needs.names, record.sandbox)
                users = {last.user if last is not None else ""}
            except Temporary as exc:
                log.warning("login.waits", login=self._login[:6], reason=exc.reason)
                await needs.clock.sleep(0.5)
        if user and user not in users and (others := users - {""}):
            await self._change(lambda now: structs.replace(now, former_user=min(others)))

    def _bound(self, record: LoginRecord, request: str) -> Binding | None:
        """What the bind command has made, also where it said nothing new."""
        for binding in self._needs.bindings.of_sandbox(record.sandbox):
            if binding.request == request or (binding.bot == record.bot and self._same_token(binding, record)):
                return binding
        return None

    def _same_token(self, binding: Binding, record: LoginRecord) -> bool:
        open_, context = self._needs.sealer.open, bind_context(record.sandbox, record.bot)
        try:
            return open_(binding.bot, binding.token) == open_(context, record.token)
        except Refused:
            return False

    async def _refusal(self, record: LoginRecord, request: str) -> BindingEvent | None:
        """The event that says that the bind command was refused."""
        needs, since_ms = self._needs, record.changed_ms - 60_000
        try:
            async for _, event in told_of_bindings(needs.history, needs.names, record.sandbox, since_ms=since_ms):
                if event.request == request and event.change == "refused":
                    return event
        except Temporary as exc:
            log.info("login.unread", login=self._login[:6], reason=exc.reason)
        return None


_PENDING = {
    "reason": "bind_pending",
    "detail": "The bind command is stored and takes effect once the adapter gets to it; a binding event tells.",
}
_WARNING = f"{ADVICE['confirmed']} Another person than before has scanned the code: {{}} was bound to this sandbox."


def _check(scan: Scan) -> None:
    """Raises Refused for credentials that nobody could be bound with."""
    if not scan.bot:
        raise Refused("no_bot_id", "iLink confirmed the login without naming the bot; start another one.")
    if not scan.token:
        raise Refused("no_token", "iLink confirmed the login without a token; start another one.")
    printable = all("!" <= char <= "~" for char in scan.bot + scan.user + scan.token)
    if not printable or max(len(scan.bot), len(scan.user)) > LONGEST_ID or len(scan.token) > LONGEST_TOKEN:
        raise Refused("credentials", "iLink confirmed the login with credentials that cannot be read.")


async def end_all(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancels tasks and waits for their end; what they had to say is not wanted any more."""
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()
