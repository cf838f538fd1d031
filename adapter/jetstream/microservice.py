"""The NATS micro service `wechat-nats`, which is registered with each connection.

The server delivers whatever a sandbox publishes, at any rate. So a request is checked by its subject before it is
processed. A sandbox has a number of requests in flight, and starts a number in a second, so that one that floods the
services takes neither slots nor time from others. Requests beyond that are refused, and dropped where refusals would
cost too much.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from functools import partial
from typing import Any

import structlog
from nats import micro
from nats.errors import ConnectionClosedError
from nats.errors import Error as NatsError
from nats.micro.request import Request
from nats.micro.service import EndpointConfig

from adapter.contract.messages import SCHEMA_VERSION
from adapter.contract.names import H_ERROR, H_ERROR_CODE, H_SCHEMA, Names, is_inbox
from adapter.errors import AdapterError, Refused, Temporary
from adapter.jetstream.client import BusClient
from adapter.jetstream.managed_connection import ManagedConnection
from adapter.ports import SandboxRequest, SandboxResponse
from adapter.tools.concurrency import FairSlots
from adapter.tools.metrics import Metrics
from adapter.tools.permissions import inbox
from adapter.tools.tasks import TaskSet

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
COSTS = {"replay": 32, "send": 2, "media.get": 2, "media.put": 8, "next": 4}
"""Cost of a request in the sandbox's share of a second, relative to others; roughly its time."""
UPLOADS, MAX_UPLOADS_PER_SANDBOX = f"{SERVICE}-uploads", 8
"""The service whose requests have up to half a megabyte, and the most of one sandbox that are processed at once."""
PER_S = 256
"""Requests of one sandbox that start in a second; fewer if they cost more. Others wait for the next second."""
REFUSALS_PER_S = 64
"""Requests of one sandbox that are answered with 429 in a second; others get no answer."""
MAX_REQUESTS = 16_384
"""Most requests of all sandboxes in flight."""
MAX_IN_FLIGHT_BYTES = 64 * 1024 * 1024
"""Bytes of all requests in flight."""
CODES = {"not_bound": "404", "not_found": "404", "replaced": "409"}
"""Of an error, by the reason of Refused."""
BUSY = "{count} requests of this sandbox, or too many bytes of all, are in hand: ask again after their answers."


class RequestQuota:
    """The requests of one connection. All times are those of the running loop. The log names one sandbox a second."""

    def __init__(self, of_one: int) -> None:
        self._slots = FairSlots(MAX_REQUESTS, share=of_one)
        self._held_bytes = 0
        self._second_ends_at = 0.0
        """When the counts below are reset."""
        self._started_count: Counter[str] = Counter()
        self._refused_count: Counter[str] = Counter()
        self._has_named_one = False
        """Whether the log has named a sandbox without an inbox."""

    def try_admit(self, sandbox: str, size: int) -> str | None:
        """Admits a request of `size` bytes, which has to be released, or returns why not: busy (the sandbox has its
        share) or full."""
        if self._held_bytes + size > MAX_IN_FLIGHT_BYTES:
            return "full"
        if not self._slots.try_acquire(sandbox):
            return "busy"
        self._held_bytes += size
        return None

    def release(self, sandbox: str, size: int) -> None:
        """Releases an answered request."""
        self._held_bytes -= size
        self._slots.release(sandbox)

    def count_refusal(self, sandbox: str) -> bool:
        """Counts a refusal. Returns whether it is still answered."""
        self._begin_second()
        self._refused_count[sandbox] += 1
        return self._refused_count[sandbox] <= REFUSALS_PER_S

    def log_without_inbox(self, sandbox: str) -> None:
        """Logs a request that may not be answered where it says. `sandbox`: "" for requests without one."""
        self._begin_second()
        if not self._has_named_one:
            self._has_named_one = True
            log.warning("service.reply_refused", sandbox=sandbox)

    async def wait_turn(self, sandbox: str, cost: int = 1) -> None:
        """Returns when the sandbox's next request may start."""
        while True:
            self._begin_second()
            if self._started_count[sandbox] < PER_S:
                self._started_count[sandbox] += cost
                return
            await asyncio.sleep(self._second_ends_at - asyncio.get_running_loop().time())

    def _begin_second(self) -> None:
        now = asyncio.get_running_loop().time()
        if now >= self._second_ends_at:
            for sandbox, count in self._refused_count.most_common(1):
                if count > REFUSALS_PER_S:
                    log.warning("service.flooded", sandbox=sandbox, refused=count)
            self._second_ends_at = now + 1
            self._started_count.clear()
            self._refused_count.clear()
            self._has_named_one = False


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
        metadata: Mapping[str, str] | None = None,
        of_sandbox: Mapping[str, SandboxHandler] | None = None,
        service: str = SERVICE,
        of_one: int = MAX_IN_FLIGHT_PER_SANDBOX,
    ) -> None:
        self._handlers = {names.svc(verb): (verb, handler) for verb, handler in handlers.items()}
        self._sandbox_handlers = {names.svc(verb): (verb, handler) for verb, handler in (of_sandbox or {}).items()}
        """Verb and handler, by subject, for sandboxes without the last token."""
        self._metrics = metrics
        self._version = version
        self._service = service
        self._metadata = {"instance": instance, "prefix": names.prefix, **(metadata or {})}
        self._max_per_sandbox = of_one
        self._slots = FairSlots(MAX_IN_FLIGHT, share=MAX_IN_FLIGHT)
        self._slots_by_verb = {"replay": FairSlots(MAX_REPLAYS, share=1), "media.get": None}
        """Slots of verbs that have their own. None: the handler takes them."""
        self._answers = TaskSet("service")
        connection.on_connect(self._register)

    async def _register(self, nc: BusClient) -> None:
        quota = RequestQuota(self._max_per_sandbox)
        nc.set_admission(partial(self._admit, nc, quota))
        service = await micro.add_service(
            nc,
            name=self._service,
            version=self._version,
            description="The bridge between WeChat and NATS",
            metadata=self._metadata,
        )

        async def add(name: str, subject: str, answer: Callable[[Request], Coroutine[Any, Any, None]]) -> None:
            async def begin(request: Request) -> None:  # in a task: a slow request does not delay the next one
                self._answers.spawn(answer(request))

            await service.add_endpoint(EndpointConfig(name=_name(name), subject=subject, handler=begin))

        for subject, (verb, handler) in self._handlers.items():
            await add(verb, subject, partial(self._answer_platform, verb, handler))
        for subject, (verb, of_sandbox) in self._sandbox_handlers.items():
            name = f"{verb}.own" if subject in self._handlers else verb
            await add(name, f"{subject}.*", partial(self._answer_sandbox, quota, verb, of_sandbox))

    def _admit(self, nc: BusClient, quota: RequestQuota, subject: str, reply: str, size: int) -> bool:
        """Decides about a message before it is read. Sandboxes have shares (RequestQuota)."""
        verb, _, sandbox = subject.rpartition(".")
        if verb not in self._sandbox_handlers:
            if subject not in self._handlers:
                return True
            sandbox = PLATFORM
        if not _is_reply_allowed(reply, sandbox):
            self._metrics.service_refusals.labels(reason="reply").inc()
            quota.log_without_inbox(sandbox)
            return False
        if sandbox == PLATFORM:
            return True
        if (reason := quota.try_admit(sandbox, size)) is None:
            return True
        self._metrics.service_refusals.labels(reason=reason).inc()
        if quota.count_refusal(sandbox):
            headers = {H_ERROR: BUSY.format(count=self._max_per_sandbox), H_ERROR_CODE: "429"}
            nc.try_publish(reply, b"", "", headers)
        return False

    async def _answer_platform(self, verb: str, handler: Handler, request: Request) -> None:
        with self._timed(verb):
            async with self._slots.slot(PLATFORM):
                await self._respond(verb, request, handler(request.data))

    async def _answer_sandbox(
        self, quota: RequestQuota, verb: str, handler: SandboxHandler, request: Request
    ) -> None:
        """Answers an admitted request."""
        sandbox = request.subject.rpartition(".")[2]
        try:
            with self._timed(verb):
                await quota.wait_turn(sandbox, COSTS.get(verb, 1))
                slots = self._slots_by_verb.get(verb, self._slots)
                async with slots.slot(sandbox) if slots else contextlib.nullcontext():
                    asked = SandboxRequest(sandbox, request.headers or {}, request.data)
                    await self._respond(verb, request, handler(asked))
        finally:
            quota.release(sandbox, len(request.data))

    def _timed(self, verb: str) -> contextlib.AbstractContextManager[object]:
        return self._metrics.service_duration.labels(verb=_name(verb)).time()

    async def _respond(self, verb: str, request: Request, answering: Awaitable[SandboxResponse | bytes]) -> None:
        try:
            outcome = await _answer(request, answering)
        except NatsError as exc:  # the connection broke before the answer
            outcome = "unanswered"
            log.info("service.unanswered", reason=type(exc).__name__)
        self._metrics.service_requests.labels(verb=_name(verb), outcome=outcome).inc()


def _name(verb: str) -> str:
    """Of an endpoint, and in the metrics."""
    return verb.replace(".", "-")


async def _answer(request: Request, answering: Awaitable[SandboxResponse | bytes]) -> str:
    """The outcome, as the metric has it. Raises NatsError."""
    try:
        answer = await answering
        data, headers = (answer, {}) if isinstance(answer, bytes) else answer
        await request.respond(data, headers={H_SCHEMA: SCHEMA_VERSION, **headers})
    except Temporary as exc:
        await request.respond_error("503", _header_text(exc.detail or exc.reason))
        return "unavailable"
    except Refused as exc:
        await request.respond_error(CODES.get(exc.reason, "400"), _header_text(exc.detail))
        return "refused"
    except AdapterError as exc:
        await request.respond_error("500", _header_text(exc.detail or exc.reason))
    except ConnectionClosedError:
        raise
    except Exception:  # nats-py would send the exception's repr to the caller
        log.exception("service.crashed")
        await request.respond_error("500", "The adapter failed; its log says why.")
    else:
        return "ok"
    return "failed"


def _is_reply_allowed(reply: str, sandbox: str) -> bool:
    """Whether an answer may go to `reply`: for a sandbox, its own inboxes and those of roles that may ask for any."""
    if reply.startswith(IMPORTED_REPLY):
        return True
    return is_inbox(reply) and (not sandbox or reply.startswith((*SHARED_INBOXES, f"{inbox('sandbox', sandbox)}.")))


def _header_text(text: str) -> str:
    return text.encode("ascii", "replace").decode().replace("\n", " ")[:500]
