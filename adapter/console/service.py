"""What the console reads and does, in the event loop: the bus by its ports, logins by their service.

What its pages show comes as the values of their templates, without secrets but the QR code of a login that is shown.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from adapter.bridge.bindings import Bindings
from adapter.bridge.presence import Replicas
from adapter.console.auth import ConsoleAuth
from adapter.contract.messages import BOT_STATUSES, BotStatus, Login, LoginQuery, LoginStart, LoginVerify, Options
from adapter.contract.names import Names
from adapter.contract.records import Binding
from adapter.errors import Refused
from adapter.logins.qr import html_element
from adapter.logins.records import LoginRecords
from adapter.ports import Bus, History, StoredMessage
from adapter.services.dead_letters import dead_letter_of, is_command, retry_message
from adapter.services.health import BotHealth

PAGE = 50
"""Bindings, or dead letters, on a page."""
STORE_S = 10.0
"""A dead command that is not stored again within this long is left as it is."""


class ConsoleService:
    """Every method may raise Refused, or Temporary while the bus is away."""

    def __init__(
        self,
        auth: ConsoleAuth,
        bindings: Bindings,
        replicas: Replicas,
        health: BotHealth,
        bus: Bus,
        history: History,
        names: Names,
        logins: LoginRecords,
        handlers: Mapping[str, Callable[[bytes], Awaitable[bytes]]],
    ) -> None:
        """`handlers`: those of `wechat.svc.*`, by verb. A login is asked for as anybody asks."""
        self._auth = auth
        self._bindings = bindings
        self._replicas = replicas
        self._health = health
        self._bus = bus
        self._history = history
        self._names = names
        self._logins = logins
        self._handlers = handlers

    async def platform(self) -> dict[str, Any]:
        """Everything in numbers, for the head of each page. `expected`: replicas that live, as far as is known."""
        replicas, living = await self._replicas.query([])
        is_open = [not record.is_over for _, record in self._logins]
        dead = await self._history.count(self._names.stream_dead)
        return {"replicas": replicas, "expected": living, "dead": dead, "logins": sum(is_open)}

    async def find_bindings(self, words: str, state: str, page: int) -> dict[str, Any]:
        """A page of the bindings whose sandbox, bot or user contains the words, and whose bot is in the state, if one
        is given: those in the worst way first, then by sandbox. Also all in numbers."""
        every = list(self._bindings)
        found = await self._health.statuses(every)
        status_of = {bot: health.status for bot, health in found.items()}
        # thousands would hold up the loop
        matching = await asyncio.to_thread(_filter_bindings, every, words, state, status_of)
        pages = max(1, -(-len(matching) // PAGE))
        page = min(max(1, page), pages)
        return {
            "rows": await self._health.describe(matching[(page - 1) * PAGE : page * PAGE]),
            "matching": len(matching),
            "bindings": len(every),
            "states": Counter(status_of.values()),
            "words": words,
            "state": state,
            "page": page,
            "pages": pages,
        }

    async def dead_letters(self, before: int | None) -> dict[str, Any]:
        """Dead letters, newest first, each with whether it can be retried; `before`: older than this one."""
        names, stream = self._names, self._names.stream_dead
        stored = await self._history.read_newest(stream, names.dead_letters("*"), count=PAGE + 1, before=before)
        letters = [dead_letter_of(one.seq, one.subject, one.headers, size=len(one.data)) for one in stored[:PAGE]]
        return {
            "letters": [(one, is_command(names, one.subject)) for one in letters],
            "older": letters[-1].seq if len(stored) > PAGE else None,
        }

    async def retry_dead_letter(self, seq: int) -> str:
        """Stores a dead command again, then deletes the letter; where it went."""
        letter = await self._read_dead_letter(seq)
        message = retry_message(self._names, seq, letter.headers, letter.data)
        async with asyncio.timeout(STORE_S):
            await self._bus.store(message)
        await self._history.delete(self._names.stream_dead, seq)
        return message.subject

    async def drop_dead_letter(self, seq: int) -> None:
        """Deletes a dead letter for good."""
        await self._read_dead_letter(seq)
        await self._history.delete(self._names.stream_dead, seq)

    async def open_logins(self) -> list[dict[str, Any]]:
        """Those that are not over, the newest first."""
        found = sorted(self._logins, key=lambda each: -each[1].until_ms)
        return [
            {"handle": self._auth.login_handle(login), **msgspec.structs.asdict(record)}
            for login, record in found
            if not record.is_over
        ]

    async def start_login(self, sandbox: str, options: Options) -> str:
        """Begins a login; its handle."""
        login = await self._ask("login.start", LoginStart(sandbox=sandbox, options=options))
        return self._auth.login_handle(login.login)

    async def shown_login(self, handle: str) -> dict[str, Any]:
        """A login with its code, as an operator shows it to a person."""
        login = await self._ask("login.status", LoginQuery(login=self._login_id(handle)))
        is_shown = login.qrcode_url and login.status == "wait"
        return {"handle": handle, "login": login, "picture": html_element(login.qrcode_url) if is_shown else ""}

    async def verify_login(self, handle: str, digits: str) -> None:
        """Hands on what the phone shows."""
        await self._ask("login.verify", LoginVerify(login=self._login_id(handle), code="".join(digits.split())))

    async def cancel_login(self, handle: str) -> None:
        await self._ask("login.cancel", LoginQuery(login=self._login_id(handle)))

    async def _read_dead_letter(self, seq: int) -> StoredMessage:
        stored = await self._history.get(self._names.stream_dead, seq)
        if stored is None:
            raise Refused("not_found", f"There is no dead letter {seq} (any more).")
        return stored

    def _login_id(self, handle: str) -> str:
        """The id of a login. Raises Refused("not_found")."""
        for login, _ in self._logins:
            if self._auth.login_handle(login) == handle:
                return login
        raise Refused("not_found", "There is no such login, or it has been over for a while.")

    async def _ask(self, verb: str, request: msgspec.Struct) -> Login:
        return msgspec.json.decode(await self._handlers[verb](msgspec.json.encode(request)), type=Login)


def _filter_bindings(
    every: list[Binding], words: str, state: str, status_of: Mapping[str, BotStatus]
) -> list[Binding]:
    words = words.strip().lower()
    found = [
        binding
        for binding in every
        if state in ("", status_of[binding.bot])
        and any(words in text.lower() for text in (binding.sandbox, binding.bot, binding.user))
    ]
    return sorted(found, key=lambda each: (BOT_STATUSES.index(status_of[each.bot]), each.sandbox, each.bot))
