"""The NATS micro service `wechat-nats`, registered anew with each connection."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Container, Coroutine, Mapping
from functools import partial
from typing import Any

import structlog
from nats import micro
from nats.errors import ConnectionClosedError
from nats.micro.request import Request
from nats.micro.service import EndpointConfig, Service

from adapter.contract import SCHEMA_VERSION
from adapter.errors import AdapterError, Refused, Temporary
from adapter.jetstream.client import BusClient
from adapter.jetstream.managed_connection import Link
from adapter.jetstream.shares import Refusals, Shares
from adapter.metrics import Metrics
from adapter.names import H_ERROR, H_ERROR_CODE, H_SCHEMA, Names, is_inbox
from adapter.permissions import inbox
from adapter.ports import SandboxRequest, SandboxResponse
from adapter.slots import FairSlots

log = structlog.get_logger()

SERVICE = "wechat-nats"
Handler = Callable[[bytes], Awaitable[bytes]]
SandboxHandler = Callable[[SandboxRequest], Awaitable[SandboxResponse]]
Handle = Callable[[Request], Awaitable[None]]
Answering = Callable[[Request], Awaitable[SandboxResponse]]
IMPORTED_REPLY = "_R_."
"""What the server makes of the inbox of a request that comes from another account."""
FOR_ANY = ("_INBOX.", f"{inbox('operator')}.", f"{inbox('service')}.")
"""Inboxes of clients that know no roles, and of those who may ask on the subject of any sandbox."""
AT_ONCE = 256
"""Requests that are being answered; more wait."""
PLATFORM = ""
"""Whom requests on subjects of no sandbox count for."""
OF_ONE = 32
"""Requests on the subjects of one sandbox in hand; more are refused."""
REPLAYS = 4
"""Replays that are read at once, each of another sandbox. More wait, and take none of the places of AT_ONCE."""
COSTS = {"replay": 32, "media.get": 2, "media.put": 8}
"""What a request takes of a sandbox's share in a second, as so many of the others: their time, roughly."""
UPLOADS, UPLOADS_OF_ONE = f"{SERVICE}-uploads", 8
"""The service whose requests have half a megabyte, and how many of one sandbox are in hand."""
BUSY = "{count} requests of this sandbox, or too many bytes of all, are in hand: ask again after their answers."


class Services:
    """Answers `wechat.svc.<verb>` as one of a queue group, and `wechat.svc.<verb>.<sandbox>` for `of_sandbox`.

    Handlers raise Refused (400, 404) or Temporary (503); 429: too many at once. Answers go to inboxes only: the
    server does not check the reply subject of a publisher, who could make the adapter write where they themselves
    may not.
    """

    def __init__(
        self,
        link: Link,
        names: Names,
        handlers: Mapping[str, Handler],
        metrics: Metrics,
        *,
        version: str,
        instance: str,
        of_sandbox: Mapping[str, SandboxHandler] | None = None,
        service: str = SERVICE,
        of_one: int = OF_ONE,
    ) -> None:
        self._names = names
        self._handlers = handlers
        self._of_sandbox = of_sandbox or {}
        self._metrics = metrics
        self._version = version
        self._instance = instance
        self._service = service
        self._of_one = of_one
        self._room = FairSlots(AT_ONCE, share=AT_ONCE)
        self._rooms = {"replay": FairSlots(REPLAYS, share=1)}
        """Of verbs on subjects of sandboxes that have places of their own."""
        self._answers: set[asyncio.Task[None]] = set()
        self._refusals = Refusals()
        link.on_up(self._start)

    async def _start(self, nc: BusClient) -> None:
        shares = Shares(self._of_one)
        plain, shared = ({self._names.svc(verb) for verb in verbs} for verbs in (self._handlers, self._of_sandbox))
        nc.guard(partial(self._admit, nc, shares, plain, shared))
        service = await micro.add_service(
            nc,
            name=self._service,
            version=self._version,
            description="The bridge between WeChat and NATS",
            metadata={"instance": self._instance, "prefix": self._names.prefix},
        )
        for verb, handler in self._handlers.items():
            await _add(service, verb, self._names.svc(verb), partial(self._take, _plainly(handler)))
        for verb, of_sandbox in self._of_sandbox.items():
            name = f"{verb}.own" if verb in self._handlers else verb
            handle = partial(self._take_fairly, shares, verb, _by_sandbox(of_sandbox))
            await _add(service, name, f"{self._names.svc(verb)}.*", handle)

    def _admit(
        self,
        nc: BusClient,
        shares: Shares,
        plain: Container[str],
        shared: Container[str],
        subject: str,
        reply: str,
        size: int,
    ) -> bool:
        """Judges a message before it is read. Those on subjects of sandboxes have their share; see Shares."""
        verb, _, sandbox = subject.rpartition(".")
        if verb not in shared:
            return subject not in plain or _is_reply(reply) or self._refuse_reply("")
        if not _is_reply(reply, sandbox):
            return self._refuse_reply(sandbox)
        verdict = shares.take(sandbox, size)
        if verdict == "taken":
            return True
        self._metrics.service_refusals.labels(reason=verdict).inc()
        if shares.may_refuse(sandbox):
            headers = {H_ERROR: BUSY.format(count=self._of_one), H_ERROR_CODE: "429"}
            if nc.post(reply, b"", "", headers):
                nc.write_soon()
        return False

    def _refuse_reply(self, sandbox: str) -> bool:
        self._metrics.service_refusals.labels(reason="reply").inc()
        self._refusals.add(sandbox)
        return False

    async def _take(self, handler: Answering, request: Request) -> None:
        """Answers beside the others of its verb: one that waits for iLink must not hold up the next."""
        await self._room.acquire(PLATFORM)
        self._spawn(self._answer_there(handler, request))

    async def _take_fairly(self, shares: Shares, verb: str, handler: Answering, request: Request) -> None:
        """As `_take`, of a request that was admitted; nothing waits here, so that nothing piles up before it."""

        async def answer() -> None:
            sandbox = _sandbox_of(request)
            try:
                await shares.turn(sandbox, COSTS.get(verb, 1))
                async with self._rooms.get(verb, self._room).slot(sandbox):
                    await _answer(handler, request)
            finally:
                shares.give_back(sandbox, len(request.data))

        self._spawn(answer())

    async def _answer_there(self, handler: Answering, request: Request) -> None:
        """Gives the room back."""
        try:
            await _answer(handler, request)
        finally:
            self._room.release(PLATFORM)

    def _spawn(self, answering: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(answering)
        self._answers.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._answers.discard(task)
        if not task.cancelled() and (exc := task.exception()):  # the connection broke before the answer
            log.info("service.unanswered", reason=type(exc).__name__)


async def _add(service: Service, name: str, subject: str, handle: Handle) -> None:
    await service.add_endpoint(EndpointConfig(name=name.replace(".", "-"), subject=subject, handler=handle))


async def _answer(handler: Answering, request: Request) -> None:
    try:
        answered = await handler(request)
        await request.respond(answered.data, headers={H_SCHEMA: SCHEMA_VERSION, **answered.headers})
    except Temporary as exc:
        await request.respond_error("503", _plain(exc.detail or exc.reason))
    except Refused as exc:
        await request.respond_error("404" if exc.reason in ("not_bound", "not_found") else "400", _plain(exc.detail))
    except AdapterError as exc:
        await request.respond_error("500", _plain(exc.detail or exc.reason))
    except ConnectionClosedError:  # nobody waits for it any more, see `_ended`
        raise
    except Exception:  # nats-py would send the exception's repr to the caller
        log.exception("service.crashed")
        await request.respond_error("500", "The adapter failed; its log says why.")


def _sandbox_of(request: Request) -> str:
    """The last token of the subject."""
    return request.subject.rpartition(".")[2]


def _is_reply(reply: str, sandbox: str = "") -> bool:
    """Whether an answer may go there; of a sandbox's request, its own inboxes, and those of who asks for any."""
    if reply.startswith(IMPORTED_REPLY):
        return True
    return is_inbox(reply) and (not sandbox or reply.startswith((*FOR_ANY, f"{inbox('sandbox', sandbox)}.")))


def _plainly(handler: Handler) -> Answering:
    async def answer(request: Request) -> SandboxResponse:
        return SandboxResponse(await handler(request.data), {})

    return answer


def _by_sandbox(handler: SandboxHandler) -> Answering:
    async def answer(request: Request) -> SandboxResponse:
        return await handler(SandboxRequest(_sandbox_of(request), request.headers or {}, request.data))

    return answer


def _plain(text: str) -> str:
    return text.encode("ascii", "replace").decode().replace("\n", " ")[:500]
