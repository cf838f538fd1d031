"""What the console reads and does, in the event loop: the bus by its ports, logins by their service."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple, TypeVar

import msgspec
import structlog

from adapter.bindings.registry import Bindings
from adapter.console.auth import ConsoleAuth
from adapter.console.view import (
    PAGE,
    BindingFilter,
    BindingsPage,
    DeadPage,
    OpenLogin,
    Platform,
    Row,
    ShownLogin,
)
from adapter.contract.messages import Login, LoginQuery, LoginStart, LoginVerify, Options
from adapter.contract.records import Binding
from adapter.conversation import window
from adapter.conversation.record import ConversationRecord
from adapter.conversation.store import ConversationStore
from adapter.errors import Refused, Temporary
from adapter.kit.timing import Clock
from adapter.logins.qr import html_element
from adapter.logins.registry import LoginRegistry
from adapter.observability.events import BusAccess
from adapter.ownership import replica_status
from adapter.ports import AllReplicas, Stored
from adapter.services.dead_letters import dead_letter_of, is_command, original_subject, retry_message

log = structlog.get_logger()

S = TypeVar("S", bound=msgspec.Struct)
MAX_IN_FLIGHT = 16
"""Records that are read at the same time."""
STORE_S = 10.0
"""A dead command that is not stored again within this long is left as it is."""


class ConsoleDeps(NamedTuple):
    """What the console is given."""

    bindings: Bindings
    conversations: ConversationStore
    access: BusAccess
    replicas: AllReplicas
    registry: LoginRegistry
    services: Mapping[str, Callable[[bytes], Awaitable[bytes]]]
    """The handlers of `wechat.svc.*`, by verb: a login is asked for as anybody asks."""
    policy: window.WindowPolicy
    clock: Clock
    living_count: Callable[[], int]
    """How many replicas live."""


class ConsoleService:
    """Every method may raise Refused, or Temporary while the bus is away."""

    def __init__(self, deps: ConsoleDeps, auth: ConsoleAuth) -> None:
        self._deps = deps
        self._auth = auth
        self._slots = asyncio.Semaphore(MAX_IN_FLIGHT)

    async def platform_status(self) -> Platform:
        deps = self._deps
        expected = deps.living_count()
        subject = deps.access.names.replica_status()
        replicas = await replica_status.query_replicas(deps.replicas, subject, [], expected)
        return Platform(
            replicas, expected, await self._dead_count(), sum(1 for _, record in deps.registry if not record.is_over)
        )

    async def find_bindings(self, wanted: BindingFilter) -> BindingsPage:
        """Those that need a login first, then by sandbox."""
        every = list(self._deps.bindings)
        matching = await asyncio.to_thread(_filter_bindings, every, wanted)  # thousands would hold up the loop
        pages = max(1, -(-len(matching) // PAGE))
        first = (min(max(1, wanted.page), pages) - 1) * PAGE
        rows = await self._rows(matching[first : first + PAGE])
        lost = sum(1 for binding in every if binding.state == "needs_login")
        return BindingsPage(rows, len(matching), pages, len(every), lost)

    async def dead_letters(self, before: int | None) -> DeadPage:
        """Dead letters, newest first; `before`: older than this one."""
        history, names = self._deps.access.history, self._deps.access.names
        stored = await history.read_newest(names.stream_dead, names.dead_letters("*"), count=PAGE + 1, before=before)
        shown, more = stored[:PAGE], stored[PAGE:]
        letters = [dead_letter_of(one.seq, one.subject, one.headers, size=len(one.data)) for one in shown]
        return DeadPage(
            [(letter, is_command(names, original_subject(names, letter.subject))) for letter in letters],
            await self._dead_count(),
            shown[-1].seq if more else None,
        )

    async def retry_dead_letter(self, seq: int) -> str:
        """Stores a dead command again, then deletes the letter; where it went."""
        deps = self._deps
        letter = await self._read_dead_letter(seq)
        message = retry_message(deps.access.names, seq, letter.headers, letter.data)
        if message is None:
            raise Refused("invalid", "It is no command: what a user wrote cannot be tried again, they have to write.")
        async with asyncio.timeout(STORE_S):
            await deps.access.bus.publish(message)
        await deps.access.history.delete(deps.access.names.stream_dead, seq)
        return message.subject

    async def drop_dead_letter(self, seq: int) -> None:
        """Deletes a dead letter for good."""
        await self._read_dead_letter(seq)
        await self._deps.access.history.delete(self._deps.access.names.stream_dead, seq)

    async def open_logins(self) -> list[OpenLogin]:
        """Those that are not over, the newest first."""
        found = [
            OpenLogin(
                self._auth.login_handle(login), record.sandbox, record.status, record.changed_ms, record.until_ms
            )
            for login, record in self._deps.registry
            if not record.is_over
        ]
        return sorted(found, key=lambda one: -one.until_ms)

    async def start_login(self, sandbox: str, options: Options) -> str:
        """Begins a login; its handle."""
        login = await self._bounded("login.start", LoginStart(sandbox=sandbox, options=options))
        return self._auth.login_handle(login.login)

    async def shown_login(self, handle: str) -> ShownLogin:
        return self._to_shown_login(await self._bounded("login.status", LoginQuery(login=self._login_id(handle))))

    async def verify_login(self, handle: str, digits: str) -> None:
        """Hands on what the phone shows."""
        await self._bounded("login.verify", LoginVerify(login=self._login_id(handle), code="".join(digits.split())))

    async def cancel_login(self, handle: str) -> None:
        await self._bounded("login.cancel", LoginQuery(login=self._login_id(handle)))

    # ------------------------------------------------------------------------------------------------

    async def _rows(self, bindings: list[Binding]) -> list[Row]:
        deps = self._deps
        bots = [binding.bot for binding in bindings]
        records = await asyncio.gather(*(self._record(binding) for binding in bindings))
        replicas = await replica_status.query_replicas(
            deps.replicas, deps.access.names.replica_status(), bots, deps.living_count()
        )
        polls = {bot: polling for present in replicas for bot, polling in present.polls.items()}
        now_ms = deps.clock.now_ms()
        rows = []
        for binding, found in zip(bindings, records, strict=True):
            record = found or ConversationRecord()
            polling = polls.get(binding.bot)
            ago_ms = polling.ago_ms if polling else None
            rows.append(
                Row(
                    binding=binding.info(),
                    is_readable=found is not None,
                    window=window.visible_window(record, now_ms, deps.policy) if record.window.opened_ms else None,
                    inbound_ms=record.window.opened_ms,
                    sent_ms=record.window.sent_at_ms[-1] if record.window.sent_at_ms else 0,
                    polling=polling.state if polling else "",
                    polled_ms=now_ms - ago_ms if ago_ms is not None else None,
                )
            )
        return rows

    async def _record(self, binding: Binding) -> ConversationRecord | None:
        """None: only a newer version can read it. Raises Temporary."""
        if not binding.user:
            return ConversationRecord()
        async with self._slots:
            try:
                return (await self._deps.conversations.load(binding.sandbox, binding.user))[0]
            except Temporary as exc:
                if exc.reason != "record_too_new":
                    raise
                log.info("console.unread", sandbox=binding.sandbox, reason=exc.reason)
                return None

    async def _dead_count(self) -> int:
        history, names = self._deps.access.history, self._deps.access.names
        return sum((await history.count_by_subject(names.stream_dead, names.dead_letters("*"))).values())

    async def _read_dead_letter(self, seq: int) -> Stored:
        stored = await self._deps.access.history.get(self._deps.access.names.stream_dead, seq)
        if stored is None:
            raise Refused("not_found", f"There is no dead letter {seq} (any more).")
        return stored

    def _login_id(self, handle: str) -> str:
        """The id of a login. Raises Refused("not_found")."""
        for login, _ in self._deps.registry:
            if self._auth.login_handle(login) == handle:
                return login
        raise Refused("not_found", "There is no such login, or it has been over for a while.")

    async def _bounded(self, verb: str, request: msgspec.Struct) -> Login:
        return msgspec.json.decode(await self._deps.services[verb](msgspec.json.encode(request)), type=Login)

    def _to_shown_login(self, login: Login) -> ShownLogin:
        picture = html_element(login.qrcode_url) if login.qrcode_url and login.status == "wait" else ""
        return ShownLogin(self._auth.login_handle(login.login), login, picture)


def _filter_bindings(every: list[Binding], wanted: BindingFilter) -> list[Binding]:
    words = wanted.words.strip().lower()
    found = [
        binding
        for binding in every
        if wanted.state in ("", binding.state)
        and any(words in text.lower() for text in (binding.sandbox, binding.bot, binding.user))
    ]
    return sorted(found, key=lambda binding: (binding.state == "active", binding.sandbox, binding.bot))
