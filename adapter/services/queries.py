"""Read-only requests of `wechat.svc.*`: bindings, windows, receipts, replay. Answers never contain a token.

A sandbox asks on a subject of its own, so that the server checks its permission. The platform names one in the body.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TypeVar, cast

import msgspec

from adapter.bridge.bindings import Bindings
from adapter.bridge.entries import messages_of
from adapter.bridge.receipts import Receipts
from adapter.contract.messages import (
    BindingsPage,
    BindingsQuery,
    ReceiptQuery,
    Replayed,
    ReplayPage,
    ReplayQuery,
    WindowQuery,
)
from adapter.contract.names import Names, check_sandbox, position, read_position
from adapter.contract.records import Binding
from adapter.errors import Refused
from adapter.ports import History, SandboxRequest, SandboxResponse, StoredMessage
from adapter.services.health import BotHealth
from adapter.tools.decoding import read_request
from adapter.tools.metrics import Metrics

S = TypeVar("S", WindowQuery, ReceiptQuery, ReplayQuery)
REPLAY_BYTES = 512 * 1024
"""Page size of a replay, well below a message's usual limit of 1 MiB."""
MAX_TIME_MS = 253_402_300_799_999
"""The last time with a date: 9999-12-31."""


class Queries:
    """The handlers of the service, by verb."""

    def __init__(
        self,
        bindings: Bindings,
        health: BotHealth,
        receipts: Receipts,
        history: History,
        names: Names,
        metrics: Metrics,
    ) -> None:
        self._bindings = bindings
        self._health = health
        self._receipts = receipts
        self._history = history
        self._names = names
        self._metrics = metrics

    async def list_bindings(self, data: bytes) -> bytes:
        """bindings.list. Raises Temporary."""
        query = read_request(data, BindingsQuery, self._metrics)
        await self._bindings.wait_loaded()
        found = sorted(
            (b for b in self._bindings if query.sandbox in (None, b.sandbox) and query.bot in (None, b.bot)),
            key=lambda binding: binding.bot,
        )
        page = [binding for binding in found if binding.bot > query.after][: query.limit]
        more = bool(page) and page[-1].bot != found[-1].bot
        infos = await self._health.describe(page) if query.health else [binding.info() for binding in page]
        return msgspec.json.encode(BindingsPage(bindings=infos, next=page[-1].bot if more else ""))

    async def get_bindings(self, data: bytes) -> bytes:
        """bindings.get: by bot, or all of a sandbox. Raises Refused("not_bound")."""
        query = read_request(data, BindingsQuery, self._metrics)
        if query.bot is None and query.sandbox is None:
            raise Refused("invalid", "Name a `bot` or a `sandbox`.")
        found = self._find_bindings(query.sandbox, query.bot)
        return msgspec.json.encode(BindingsPage(bindings=[binding.info() for binding in found]))

    async def window(self, data: bytes, sandbox: str | None = None) -> bytes:
        """window: what may be sent to a user now. Raises Refused, Temporary."""
        query = self._read(data, WindowQuery, sandbox)
        found = [b for b in self._find_bindings(query.sandbox, query.bot) if query.user in (None, b.user)]
        if not found:
            raise _not_bound()
        if len(found) > 1:
            raise Refused("invalid", "Name the `bot` or `user`: the sandbox has several.")
        return msgspec.json.encode(await self._health.window(found[0]))

    async def receipt(self, data: bytes, sandbox: str | None = None) -> bytes:
        """receipt: the last receipt of a command. Raises Refused, Temporary."""
        query = self._read(data, ReceiptQuery, sandbox)
        receipt = await self._receipts.last(query.sandbox or "", query.command, query.sequence)
        if receipt is None:
            raise Refused("not_found", "No receipt of this command is kept: it has none yet, or it is too old.")
        return msgspec.json.encode(receipt)

    async def replay(self, data: bytes, sandbox: str | None = None) -> bytes:
        """replay: a sandbox's inbound messages again, from a position or a time. Raises Refused, Temporary."""
        query = self._read(data, ReplayQuery, sandbox)
        if (query.since_ms or 0) > MAX_TIME_MS:
            raise Refused("invalid", "`since_ms` is a time in milliseconds.")
        after = read_position(query.after) if query.after else (0, 0)
        since_ms = None if query.after else query.since_ms
        messages: list[Replayed] = []
        size = 0
        async with contextlib.aclosing(self._stored(query.sandbox or "", after, since_ms)) as found:
            async for place, message in found:
                size += len(memoryview(message))
                if len(messages) == query.limit or (messages and size > REPLAY_BYTES):
                    return msgspec.json.encode(ReplayPage(messages=messages, next=messages[-1].position))
                messages.append(Replayed(position=place, message=message))
        return msgspec.json.encode(ReplayPage(messages=messages))

    async def _stored(
        self, sandbox: str, after: tuple[int, int], since_ms: int | None
    ) -> AsyncGenerator[tuple[str, msgspec.Raw], None]:
        """The messages of a sandbox's inbox behind a position or from a time on, with their positions. Raises
        Temporary."""
        inbox, start = self._names.inbox(sandbox), max(0, after[0] - 1)
        entries = self._history.read(self._names.stream_in, inbox, after=start, since_ms=since_ms)
        async with contextlib.aclosing(cast("AsyncGenerator[StoredMessage]", entries)) as reading:
            async for stored in reading:
                for number, message in enumerate(messages_of(stored.data)):
                    if (stored.seq, number) > after:
                        yield position(stored.seq, number), message

    def _find_bindings(self, sandbox: str | None, bot: str | None) -> list[Binding]:
        """The bindings that match all given names. Raises Refused("not_bound")."""
        binding = self._bindings.get(bot) if bot is not None else None
        found = self._bindings.of_sandbox(sandbox or "") if bot is None else [binding] if binding else []
        found = [binding for binding in found if sandbox in (None, binding.sandbox)]
        if not found:
            raise _not_bound()
        return found

    def _read(self, data: bytes, kind: type[S], sandbox: str | None) -> S:
        """A request with its sandbox. Raises Refused("invalid")."""
        query = read_request(data, kind, self._metrics)
        named = query.sandbox if sandbox is None else sandbox
        if named is None:
            raise Refused("invalid", "Name a `sandbox`, or ask on a subject that ends with it.")
        if query.sandbox not in (None, named):
            raise Refused("invalid", "The body names another sandbox than the subject.")
        return msgspec.structs.replace(query, sandbox=check_sandbox(named))


def of_sandbox(
    answer: Callable[[bytes, str], Awaitable[bytes]],
) -> Callable[[SandboxRequest], Awaitable[SandboxResponse]]:
    """The handler of the same question on a sandbox's own subject."""

    async def answer_sandbox(request: SandboxRequest) -> SandboxResponse:
        return SandboxResponse(await answer(request.data, request.sandbox), {})

    return answer_sandbox


def _not_bound() -> Refused:
    return Refused("not_bound", "Nothing is bound under that name.")
