"""What the console reads and does, in the event loop: the bus by its ports, logins by their service."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple, TypeVar

import msgspec

from adapter.bindings.registry import Bindings
from adapter.console.auth import ConsoleAuth
from adapter.console.view import PAGE, BindingFilter, BindingsOverview, DeadPage, OpenLogin, Platform, ShownLogin
from adapter.contract.messages import BOT_STATUSES, BotStatus, Login, LoginQuery, LoginStart, LoginVerify, Options
from adapter.contract.records import Binding
from adapter.errors import Refused
from adapter.kit.timing import Clock
from adapter.logins.qr import html_element
from adapter.logins.records import LoginRecords
from adapter.observability.events import BusAccess
from adapter.ownership.replica_status import OtherReplicas
from adapter.ports import StoredMessage
from adapter.services.dead_letters import dead_letter_of, is_command, original_subject, retry_message
from adapter.services.health import BotHealth

S = TypeVar("S", bound=msgspec.Struct)
STATUSES_S = 3.0
"""For so long it is not asked again how all bots fare."""
STORE_S = 10.0
"""A dead command that is not stored again within this long is left as it is."""


class ConsoleDeps(NamedTuple):
    """What the console is given."""

    bindings: Bindings
    others: OtherReplicas
    health: BotHealth
    access: BusAccess
    registry: LoginRecords
    services: Mapping[str, Callable[[bytes], Awaitable[bytes]]]
    """The handlers of `wechat.svc.*`, by verb: a login is asked for as anybody asks."""
    clock: Clock


class ConsoleService:
    """Every method may raise Refused, or Temporary while the bus is away."""

    def __init__(self, deps: ConsoleDeps, auth: ConsoleAuth) -> None:
        self._deps = deps
        self._auth = auth
        self._status_of: dict[str, BotStatus] = {}
        self._asked_at = -math.inf
        """Monotonic time when all replicas were asked for it."""

    async def platform_status(self) -> Platform:
        deps = self._deps
        replicas, living = await deps.others.query([])
        return Platform(
            replicas, living, await self._dead_count(), sum(1 for _, record in deps.registry if not record.is_over)
        )

    async def find_bindings(self, wanted: BindingFilter) -> BindingsOverview:
        """Those that are in the worst way first, then by sandbox."""
        every, now = list(self._deps.bindings), self._deps.clock.monotonic()
        if now - self._asked_at > STATUSES_S:
            found = await self._deps.health.statuses(every)
            self._status_of, self._asked_at = {bot: one.status for bot, one in found.items()}, now
        status_of: dict[str, BotStatus] = {
            binding.bot: self._status_of.get(binding.bot, "unknown") for binding in every
        }
        # thousands would hold up the loop
        matching = await asyncio.to_thread(_filter_bindings, every, wanted, status_of)
        pages = max(1, -(-len(matching) // PAGE))
        first = (min(max(1, wanted.page), pages) - 1) * PAGE
        rows = await self._deps.health.describe(matching[first : first + PAGE])
        return BindingsOverview(rows, len(matching), pages, len(every), Counter(status_of.values()))

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
        login = await self._bounded("login.status", LoginQuery(login=self._login_id(handle)))
        is_shown = login.qrcode_url and login.status == "wait"
        return ShownLogin(handle, login, html_element(login.qrcode_url) if is_shown else "")

    async def verify_login(self, handle: str, digits: str) -> None:
        """Hands on what the phone shows."""
        await self._bounded("login.verify", LoginVerify(login=self._login_id(handle), code="".join(digits.split())))

    async def cancel_login(self, handle: str) -> None:
        await self._bounded("login.cancel", LoginQuery(login=self._login_id(handle)))

    # ------------------------------------------------------------------------------------------------

    async def _dead_count(self) -> int:
        history, names = self._deps.access.history, self._deps.access.names
        return sum((await history.count_by_subject(names.stream_dead, names.dead_letters("*"))).values())

    async def _read_dead_letter(self, seq: int) -> StoredMessage:
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


def _filter_bindings(
    every: list[Binding], wanted: BindingFilter, status_of: Mapping[str, BotStatus]
) -> list[Binding]:
    words = wanted.words.strip().lower()
    found = [
        binding
        for binding in every
        if wanted.state in ("", status_of[binding.bot])
        and any(words in text.lower() for text in (binding.sandbox, binding.bot, binding.user))
    ]
    return sorted(found, key=lambda each: (BOT_STATUSES.index(status_of[each.bot]), each.sandbox, each.bot))
