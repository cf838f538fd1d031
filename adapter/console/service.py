"""What the console reads and does, in the event loop: the bus by its ports, logins by their service."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple, TypeVar

import msgspec
import structlog

from adapter.bindings.registry import Bindings
from adapter.console.auth import Guard
from adapter.console.view import (
    PAGE,
    DeadPage,
    Found,
    OpenLogin,
    Platform,
    Row,
    ShownLogin,
    Wanted,
)
from adapter.contract import Login, LoginQuery, LoginStart, LoginVerify, Options
from adapter.conversation import window
from adapter.conversation.record import ConversationRecord
from adapter.conversation.store import ConversationStore
from adapter.dead_letters import dead_letter_of, is_command, original_subject, retry_message
from adapter.errors import Refused, Temporary
from adapter.logins.qr import element
from adapter.logins.registry import LoginRegistry
from adapter.names import Names
from adapter.ports import AllReplicas, Archive, Bus, Stored
from adapter.records import Binding
from adapter.replicas import replica_status
from adapter.timing import Clock

log = structlog.get_logger()

S = TypeVar("S", bound=msgspec.Struct)
AT_ONCE = 16
"""Records that are read at the same time."""
STORE_S = 10.0
"""A dead command that is not stored again within this long is left as it is."""


class Needs(NamedTuple):
    """What the console is given."""

    bindings: Bindings
    conversations: ConversationStore
    history: Archive
    bus: Bus
    replicas: AllReplicas
    registry: LoginRegistry
    services: Mapping[str, Callable[[bytes], Awaitable[bytes]]]
    """The handlers of `wechat.svc.*`, by verb: a login is asked for as anybody asks."""
    names: Names
    policy: window.WindowPolicy
    clock: Clock
    living: Callable[[], int]
    """How many replicas live."""


class Desk:
    """Every method may raise Refused, or Temporary while the bus is away."""

    def __init__(self, needs: Needs, guard: Guard) -> None:
        self._needs = needs
        self._guard = guard
        self._room = asyncio.Semaphore(AT_ONCE)

    async def platform(self) -> Platform:
        needs = self._needs
        expected = needs.living()
        replicas = await replica_status.roll(needs.replicas, needs.names.roll(), [], expected)
        return Platform(
            replicas, expected, await self._dead(), sum(1 for _, record in needs.registry if not record.is_over)
        )

    async def bindings(self, wanted: Wanted) -> Found:
        """Those that need a login first, then by sandbox."""
        every = list(self._needs.bindings)
        matching = await asyncio.to_thread(_matching, every, wanted)  # thousands would hold up the loop
        pages = max(1, -(-len(matching) // PAGE))
        first = (min(max(1, wanted.page), pages) - 1) * PAGE
        rows = await self._rows(matching[first : first + PAGE])
        lost = sum(1 for binding in every if binding.state == "needs_login")
        return Found(rows, len(matching), pages, len(every), lost)

    async def letters(self, before: int | None) -> DeadPage:
        """Dead letters, newest first; `before`: older than this one."""
        needs = self._needs
        stored = await needs.history.read_newest(
            needs.names.stream_dead, needs.names.dead("*"), count=PAGE + 1, before=before
        )
        shown, more = stored[:PAGE], stored[PAGE:]
        letters = [dead_letter_of(one.seq, one.subject, one.headers, size=len(one.data)) for one in shown]
        return DeadPage(
            [(letter, is_command(needs.names, original_subject(needs.names, letter.subject))) for letter in letters],
            await self._dead(),
            shown[-1].seq if more else None,
        )

    async def retry(self, seq: int) -> str:
        """Stores a dead command again, then deletes the letter; where it went."""
        needs = self._needs
        letter = await self._letter(seq)
        message = retry_message(needs.names, seq, letter.headers, letter.data)
        if message is None:
            raise Refused("invalid", "It is no command: what a user wrote cannot be tried again, they have to write.")
        async with asyncio.timeout(STORE_S):
            await needs.bus.publish(message)
        await needs.history.delete(needs.names.stream_dead, seq)
        return message.subject

    async def drop(self, seq: int) -> None:
        """Deletes a dead letter for good."""
        await self._letter(seq)
        await self._needs.history.delete(self._needs.names.stream_dead, seq)

    async def logins(self) -> list[OpenLogin]:
        """Those that are not over, the newest first."""
        found = [
            OpenLogin(self._guard.handle(login), record.sandbox, record.status, record.changed_ms, record.until_ms)
            for login, record in self._needs.registry
            if not record.is_over
        ]
        return sorted(found, key=lambda one: -one.until_ms)

    async def start(self, sandbox: str, options: Options) -> str:
        """Begins a login; its handle."""
        login = await self._ask("login.start", LoginStart(sandbox=sandbox, options=options))
        return self._guard.handle(login.login)

    async def login(self, handle: str) -> ShownLogin:
        return self._shown(await self._ask("login.status", LoginQuery(login=self._login(handle))))

    async def verify(self, handle: str, digits: str) -> None:
        """Hands on what the phone shows."""
        await self._ask("login.verify", LoginVerify(login=self._login(handle), code="".join(digits.split())))

    async def cancel(self, handle: str) -> None:
        await self._ask("login.cancel", LoginQuery(login=self._login(handle)))

    # ------------------------------------------------------------------------------------------------

    async def _rows(self, bindings: list[Binding]) -> list[Row]:
        needs = self._needs
        bots = [binding.bot for binding in bindings]
        records = await asyncio.gather(*(self._record(binding) for binding in bindings))
        replicas = await replica_status.roll(needs.replicas, needs.names.roll(), bots, needs.living())
        polls = {bot: polling for present in replicas for bot, polling in present.polls.items()}
        now_ms = needs.clock.now_ms()
        rows = []
        for binding, found in zip(bindings, records, strict=True):
            record = found or ConversationRecord()
            polling = polls.get(binding.bot)
            ago_ms = polling.ago_ms if polling else None
            rows.append(
                Row(
                    binding=binding.info(),
                    is_readable=found is not None,
                    window=window.shown(record, now_ms, needs.policy) if record.window.opened_ms else None,
                    heard_ms=record.window.opened_ms,
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
        async with self._room:
            try:
                return (await self._needs.conversations.load(binding.sandbox, binding.user))[0]
            except Temporary as exc:
                if exc.reason != "record_too_new":
                    raise
                log.info("console.unread", sandbox=binding.sandbox, reason=exc.reason)
                return None

    async def _dead(self) -> int:
        names = self._needs.names
        return sum((await self._needs.history.count_by_subject(names.stream_dead, names.dead("*"))).values())

    async def _letter(self, seq: int) -> Stored:
        stored = await self._needs.history.get(self._needs.names.stream_dead, seq)
        if stored is None:
            raise Refused("not_found", f"There is no dead letter {seq} (any more).")
        return stored

    def _login(self, handle: str) -> str:
        """The id of a login. Raises Refused("not_found")."""
        for login, _ in self._needs.registry:
            if self._guard.handle(login) == handle:
                return login
        raise Refused("not_found", "There is no such login, or it has been over for a while.")

    async def _ask(self, verb: str, request: msgspec.Struct) -> Login:
        return msgspec.json.decode(await self._needs.services[verb](msgspec.json.encode(request)), type=Login)

    def _shown(self, login: Login) -> ShownLogin:
        picture = element(login.qrcode_url) if login.qrcode_url and login.status == "wait" else ""
        return ShownLogin(self._guard.handle(login.login), login, picture)


def _matching(every: list[Binding], wanted: Wanted) -> list[Binding]:
    words = wanted.words.strip().lower()
    found = [
        binding
        for binding in every
        if wanted.state in ("", binding.state)
        and any(words in text.lower() for text in (binding.sandbox, binding.bot, binding.user))
    ]
    return sorted(found, key=lambda binding: (binding.state == "active", binding.sandbox, binding.bot))
