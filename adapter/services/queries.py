"""Read-only requests of `wechat.svc.*`: bindings, windows, receipts, replay. Answers never contain a token.

A sandbox asks on a subject of its own, so that the server checks its permission. The platform names one in the body.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from adapter.bindings.registry import Bindings
from adapter.contract.messages import (
    BindingsPage,
    BindingsQuery,
    ReceiptQuery,
    Replayed,
    ReplayPage,
    ReplayQuery,
    WindowQuery,
)
from adapter.contract.names import MAX_SEQ, Names, check_sandbox
from adapter.contract.records import Binding
from adapter.errors import Refused
from adapter.observability.metrics import Metrics
from adapter.observability.records import read_request
from adapter.outbound.receipts import Receipts
from adapter.ports import History, SandboxRequest, SandboxResponse
from adapter.services.health import BotHealth

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

    async def query_window(self, data: bytes) -> bytes:
        """window: what may be sent to a user now. Raises Refused, Temporary."""
        return await self._answer_window(_require_sandbox(read_request(data, WindowQuery, self._metrics)))

    async def query_window_of_sandbox(self, request: SandboxRequest) -> SandboxResponse:
        """window.<sandbox>: the same for a user of this sandbox. Raises Refused, Temporary."""
        return SandboxResponse(await self._answer_window(self._read_sandbox_query(request, WindowQuery)), {})

    async def query_receipt(self, data: bytes) -> bytes:
        """receipt: the last receipt of a command. Raises Refused, Temporary."""
        return await self._answer_receipt(_require_sandbox(read_request(data, ReceiptQuery, self._metrics)))

    async def query_receipt_of_sandbox(self, request: SandboxRequest) -> SandboxResponse:
        """receipt.<sandbox>: the same for a command of this sandbox. Raises Refused, Temporary."""
        return SandboxResponse(await self._answer_receipt(self._read_sandbox_query(request, ReceiptQuery)), {})

    async def query_replay(self, data: bytes) -> bytes:
        """replay: a sandbox's inbound messages again, from a sequence or a time. Raises Refused, Temporary."""
        return await self._answer_replay(_require_sandbox(read_request(data, ReplayQuery, self._metrics)))

    async def query_replay_of_sandbox(self, request: SandboxRequest) -> SandboxResponse:
        """replay.<sandbox>: the same for this sandbox. Raises Refused, Temporary."""
        return SandboxResponse(await self._answer_replay(self._read_sandbox_query(request, ReplayQuery)), {})

    async def _answer_window(self, query: WindowQuery) -> bytes:
        found = [
            b for b in self._find_bindings(query.sandbox, query.bot) if query.user in (None, b.user) or query.bot
        ]
        if not found:
            raise _not_bound()
        if len(found) > 1:
            raise Refused("invalid", "Name the `bot` or `user`: the sandbox has several.")
        user = query.user or found[0].user
        return msgspec.json.encode(await self._health.window(found[0].sandbox, user))

    async def _answer_receipt(self, query: ReceiptQuery) -> bytes:
        receipt = await self._receipts.last(query.sandbox or "", query.command, query.sequence)
        if receipt is None:
            raise Refused("not_found", "No receipt of this command is kept: it has none yet, or it is too old.")
        return msgspec.json.encode(receipt)

    async def _answer_replay(self, query: ReplayQuery) -> bytes:
        if query.after > MAX_SEQ or (query.since_ms or 0) > MAX_TIME_MS:
            raise Refused("invalid", "`after` is a sequence of the stream, `since_ms` a time in milliseconds.")
        messages: list[Replayed] = []
        size, more = 0, False
        sandbox = query.sandbox or ""
        since_ms = None if query.after else query.since_ms
        async for stored in self._history.read(
            self._names.stream_in, self._names.inbox(sandbox), after=query.after, since_ms=since_ms
        ):
            size += len(stored.data)
            if len(messages) == query.limit or (messages and size > REPLAY_BYTES):
                more = True
                break
            messages.append(Replayed(seq=stored.seq, message=msgspec.Raw(stored.data)))
        return msgspec.json.encode(ReplayPage(messages=messages, next=messages[-1].seq if more else 0))

    def _find_bindings(self, sandbox: str | None, bot: str | None) -> list[Binding]:
        """The bindings that match all given names. Raises Refused("not_bound")."""
        binding = self._bindings.get(bot) if bot is not None else None
        found = self._bindings.of_sandbox(sandbox or "") if bot is None else [binding] if binding else []
        found = [binding for binding in found if sandbox in (None, binding.sandbox)]
        if not found:
            raise _not_bound()
        return found

    def _read_sandbox_query(self, request: SandboxRequest, kind: type[S]) -> S:
        """The request, for the sandbox in its subject. Raises Refused("invalid")."""
        sandbox = check_sandbox(request.sandbox)
        query = read_request(request.data, kind, self._metrics)
        if query.sandbox not in (None, sandbox):
            raise Refused("invalid", "The body names another sandbox than the subject.")
        return msgspec.structs.replace(query, sandbox=sandbox)


def _not_bound() -> Refused:
    return Refused("not_bound", "Nothing is bound under that name.")


def _require_sandbox(query: S) -> S:
    """Raises Refused("invalid")."""
    if query.sandbox is None:
        raise Refused("invalid", "Name a `sandbox`, or ask on a subject that ends with it.")
    check_sandbox(query.sandbox)
    return query
