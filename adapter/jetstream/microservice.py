"""The NATS micro service `wechat-nats`, which is registered with each connection."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Container, Mapping
from functools import partial

import structlog
from nats import micro
from nats.errors import ConnectionClosedError
from nats.micro.request import Request
from nats.micro.service import EndpointConfig, Service

from adapter.contract.messages import SCHEMA_VERSION
from adapter.contract.names import H_ERROR, H_ERROR_CODE, H_SCHEMA, Names, is_inbox
from adapter.errors import AdapterError, Refused, Temporary
from adapter.jetstream.client import BusClient
from adapter.jetstream.managed_connection import ManagedConnection
from adapter.jetstream.shares import RefusalLog, RequestQuota
from adapter.kit.slots import FairSlots
from adapter.kit.tasks import TaskSet
from adapter.observability.metrics import Metrics
from adapter.ports import SandboxRequest, SandboxResponse
from adapter.security.permissions import inbox

log = structlog.get_logger()

SERVICE = "wechat-nats"
Handler = Callable[[bytes], Awaitable[bytes]]
SandboxHandler = Callable[[SandboxRequest], Awaitable[SandboxResponse]]
IMPORTED_REPLY = "_R_."
"""Prefix that the server gives to the inbox of a request from another account."""
SHARED_INBOXES = ("_INBOX.", *(f"{inbox(role)}." for role in ("operator", "service", "agents")))
"""Inboxes of clients without a role, and of roles that may ask for any sandbox."""
MAX_IN_FLIGHT = 256
"""Most platform requests that are processed at the same time; others wait."""
PLATFORM = ""
"""Key for requests on subjects without a sandbox."""
MAX_IN_FLIGHT_PER_SANDBOX = 32
"""Most requests of one sandbox that are processed at the same time; others are refused."""
MAX_REPLAYS = 4
"""Most replays that are read at the same time, each for another sandbox. Others wait, outside of MAX_IN_FLIGHT."""
COSTS = {"replay": 32, "media.get": 2, "media.put": 8, "next": 4}
"""Cost of a request in the sandbox's share of a second, relative to others; roughly its time."""
UPLOADS, MAX_UPLOADS_PER_SANDBOX = f"{SERVICE}-uploads", 8
"""The service whose requests have up to half a megabyte, and the most of one sandbox that are processed at once."""
CODES = {"not_bound": "404", "not_found": "404", "replaced": "409"}
"""Of an error, by the reason of Refused."""
BUSY = "{count} requests of this sandbox, or too many bytes of all, are in hand: ask again after their answers."


class Services:
    """Answers `wechat.svc.<verb>` as a member of a queue group, and `wechat.svc.<verb>.<sandbox>` for `of_sandbox`.

    Handlers raise Refused (CODES, or 400) or Temporary (503); 429: too many requests. Answers go only to inboxes: the
    server does not check a publisher's reply subject, which could make the adapter write where the publisher may not.
    """

    def __init__(
        self,
        connection: ManagedConnection,
        names: Names,
        handlers: Mapping[str, Handler],
        metrics: Metrics,
        *,
        version: str,
        instance: str,
        of_sandbox: Mapping[str, SandboxHandler] | None = None,
        service: str = SERVICE,
        metadata: Mapping[str, str] | None = None,
        of_one: int = MAX_IN_FLIGHT_PER_SANDBOX,
    ) -> None:
        self._names = names
        self._handlers = handlers
        self._sandbox_handlers = of_sandbox or {}
        self._metrics = metrics
        self._version = version
        self._service = service
        self._metadata = {"instance": instance, "prefix": names.prefix, **(metadata or {})}
        self._max_per_sandbox = of_one
        self._slots = FairSlots(MAX_IN_FLIGHT, share=MAX_IN_FLIGHT)
        self._slots_by_verb = {"replay": FairSlots(MAX_REPLAYS, share=1), "media.get": None}
        """Slots of verbs that have their own. None: the handler takes them."""
        self._answers = TaskSet(_log_unanswered)
        self._refusals = RefusalLog()
        connection.on_connect(self._register)

    async def _register(self, nc: BusClient) -> None:
        shares = RequestQuota(self._max_per_sandbox)
        plain, shared = (
            {self._names.svc(verb) for verb in verbs} for verbs in (self._handlers, self._sandbox_handlers)
        )
        nc.set_admission(partial(self._admit, nc, shares, plain, shared))
        service = await micro.add_service(
            nc,
            name=self._service,
            version=self._version,
            description="The bridge between WeChat and NATS",
            metadata=self._metadata,
        )
        for verb, handler in self._handlers.items():
            await _add_endpoint(service, verb, self._names.svc(verb), partial(self._answer_platform, handler))
        for verb, of_sandbox in self._sandbox_handlers.items():
            name = f"{verb}.own" if verb in self._handlers else verb
            handle = partial(self._answer_sandbox, shares, verb, of_sandbox)
            await _add_endpoint(service, name, f"{self._names.svc(verb)}.*", handle)

    def _admit(
        self,
        nc: BusClient,
        shares: RequestQuota,
        plain: Container[str],
        shared: Container[str],
        subject: str,
        reply: str,
        size: int,
    ) -> bool:
        """Decides about a message before it is read. Sandboxes have shares (RequestQuota)."""
        verb, _, sandbox = subject.rpartition(".")
        if verb not in shared:
            if subject not in plain:
                return True
            sandbox = PLATFORM
        if not _is_reply_allowed(reply, sandbox):
            self._metrics.service_refusals.labels(reason="reply").inc()
            self._refusals.log_refusal(sandbox)
            return False
        if sandbox == PLATFORM:
            return True
        admission = shares.try_admit(sandbox, size)
        if admission == "taken":
            return True
        self._metrics.service_refusals.labels(reason=admission).inc()
        if shares.count_refusal(sandbox):
            headers = {H_ERROR: BUSY.format(count=self._max_per_sandbox), H_ERROR_CODE: "429"}
            nc.try_publish(reply, b"", "", headers)
        return False

    async def _answer_platform(self, handler: Handler, request: Request) -> None:
        """Answers in a task of its own, so that a slow request does not delay the next one."""
        await self._slots.acquire(PLATFORM)

        async def answer() -> None:
            try:
                await _respond(request, handler(request.data))
            finally:
                self._slots.release(PLATFORM)

        self._answers.spawn(answer())

    async def _answer_sandbox(
        self, shares: RequestQuota, verb: str, handler: SandboxHandler, request: Request
    ) -> None:
        """As `_answer_platform`, for an admitted request. Nothing is awaited here, so that no queue builds up."""
        sandbox = request.subject.rpartition(".")[2]

        async def answer() -> None:
            try:
                await shares.wait_turn(sandbox, COSTS.get(verb, 1))
                slots = self._slots_by_verb.get(verb, self._slots)
                async with slots.slot(sandbox) if slots else contextlib.nullcontext():
                    await _respond(request, handler(SandboxRequest(sandbox, request.headers or {}, request.data)))
            finally:
                shares.release(sandbox, len(request.data))

        self._answers.spawn(answer())


def _log_unanswered(exc: BaseException) -> None:
    """The connection broke before the answer."""
    log.info("service.unanswered", reason=type(exc).__name__)


async def _add_endpoint(
    service: Service, name: str, subject: str, handle: Callable[[Request], Awaitable[None]]
) -> None:
    await service.add_endpoint(EndpointConfig(name=name.replace(".", "-"), subject=subject, handler=handle))


async def _respond(request: Request, answering: Awaitable[SandboxResponse | bytes]) -> None:
    try:
        answer = await answering
        data, headers = (answer, {}) if isinstance(answer, bytes) else answer
        await request.respond(data, headers={H_SCHEMA: SCHEMA_VERSION, **headers})
    except Temporary as exc:
        await request.respond_error("503", _header_text(exc.detail or exc.reason))
    except Refused as exc:
        await request.respond_error(CODES.get(exc.reason, "400"), _header_text(exc.detail))
    except AdapterError as exc:
        await request.respond_error("500", _header_text(exc.detail or exc.reason))
    except ConnectionClosedError:  # the caller is gone, see `_log_unanswered`
        raise
    except Exception:  # nats-py would send the exception's repr to the caller
        log.exception("service.crashed")
        await request.respond_error("500", "The adapter failed; its log says why.")


def _is_reply_allowed(reply: str, sandbox: str) -> bool:
    """Whether an answer may go to `reply`: for a sandbox, its own inboxes and those of roles that may ask for any."""
    if reply.startswith(IMPORTED_REPLY):
        return True
    return is_inbox(reply) and (not sandbox or reply.startswith((*SHARED_INBOXES, f"{inbox('sandbox', sandbox)}.")))


def _header_text(text: str) -> str:
    return text.encode("ascii", "replace").decode().replace("\n", " ")[:500]
