"""The NATS micro service `wechat-nats`, registered anew with each connection."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from functools import partial

import structlog
from nats import micro
from nats.aio.client import Client
from nats.errors import ConnectionClosedError
from nats.errors import Error as NatsError
from nats.micro.request import Request
from nats.micro.service import EndpointConfig, Service

from adapter.contract import SCHEMA_VERSION
from adapter.errors import AdapterError, Refused, Temporary
from adapter.jetstream.link import Link
from adapter.names import H_SCHEMA, Names, is_inbox
from adapter.ports import Answered, Asked

log = structlog.get_logger()

SERVICE = "wechat-nats"
Handler = Callable[[bytes], Awaitable[bytes]]
SandboxHandler = Callable[[Asked], Awaitable[Answered]]
Handle = Callable[[Request], Awaitable[None]]
Answering = Callable[[Request], Awaitable[Answered]]
IMPORTED_REPLY = "_R_."
"""What the server makes of the inbox of a request that comes from another account."""
AT_ONCE = 256
"""Requests that are being answered; more wait."""
OF_ONE = 32
"""Of these, on the subjects of one sandbox; more are refused, so that it does not take the room of all others."""


class Services:
    """Answers `wechat.svc.<verb>` as one of a queue group, and `wechat.svc.<verb>.<sandbox>` for `of_sandbox`.

    Handlers raise Refused (400, 404) or Temporary (503); 429: too many at once. Answers go to inboxes only.
    """

    def __init__(
        self,
        link: Link,
        names: Names,
        handlers: Mapping[str, Handler],
        *,
        version: str,
        instance: str,
        of_sandbox: Mapping[str, SandboxHandler] | None = None,
    ) -> None:
        self._names = names
        self._handlers = handlers
        self._of_sandbox = of_sandbox or {}
        self._version = version
        self._instance = instance
        self._room = asyncio.Semaphore(AT_ONCE)
        self._answers: set[asyncio.Task[None]] = set()
        self._of_one: Counter[str] = Counter()
        """Requests of each sandbox that are being answered."""
        link.on_up(self._start)

    async def _start(self, nc: Client) -> None:
        service = await micro.add_service(
            nc,
            name=SERVICE,
            version=self._version,
            description="The bridge between WeChat and NATS",
            metadata={"instance": self._instance, "prefix": self._names.prefix},
        )
        for verb, handler in self._handlers.items():
            await _add(service, verb, self._names.svc(verb), partial(self._take, _plainly(handler)))
        for verb, of_sandbox in self._of_sandbox.items():
            name = f"{verb}.own" if verb in self._handlers else verb
            handle = partial(self._take_fairly, _by_sandbox(of_sandbox))
            await _add(service, name, f"{self._names.svc(verb)}.*", handle)

    async def _take_fairly(self, handler: Answering, request: Request) -> None:
        """As `_take`; refuses (429) what a sandbox asks beyond its share."""
        if self._of_one[_sandbox_of(request)] < OF_ONE:
            await self._take(handler, request)
        elif _may_reply(request):
            said = f"This sandbox has {OF_ONE} requests out: wait for their answers."
            with contextlib.suppress(NatsError):  # the connection broke: nobody waits for it any more
                await request.respond_error("429", said)

    async def _take(self, handler: Answering, request: Request) -> None:
        """Answers beside the others of its verb: one that waits for iLink must not hold up the next.

        Only to an inbox: the server does not check the reply subject of a publisher, who could make the adapter write
        where they themselves may not.
        """
        if not _may_reply(request):
            log.info("service.reply_refused")
            return
        sandbox = _sandbox_of(request)
        self._of_one[sandbox] += 1
        await self._room.acquire()
        task = asyncio.get_running_loop().create_task(_answer(handler, request))
        self._answers.add(task)
        task.add_done_callback(partial(self._ended, sandbox))

    def _ended(self, sandbox: str, task: asyncio.Task[None]) -> None:
        self._answers.discard(task)
        self._room.release()
        self._of_one[sandbox] -= 1
        if not self._of_one[sandbox]:
            del self._of_one[sandbox]
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


def _may_reply(request: Request) -> bool:
    reply = request._msg.reply  # not offered otherwise
    return is_inbox(reply) or reply.startswith(IMPORTED_REPLY)


def _plainly(handler: Handler) -> Answering:
    async def answer(request: Request) -> Answered:
        return Answered(await handler(request.data), {})

    return answer


def _by_sandbox(handler: SandboxHandler) -> Answering:
    async def answer(request: Request) -> Answered:
        return await handler(Asked(_sandbox_of(request), request.headers or {}, request.data))

    return answer


def _plain(text: str) -> str:
    return text.encode("ascii", "replace").decode().replace("\n", " ")[:500]
