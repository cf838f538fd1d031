"""The bus as commands see it: a connection with a deadline, requests with an answer, stored publishes.

Everything here ends in `Failed` with a sentence; nothing waits for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from nats.aio.msg import Msg
from nats.errors import ConnectionClosedError, NoRespondersError
from nats.errors import Error as NatsError
from nats.js import JetStreamContext, api
from nats.js.errors import APIError, NoStreamResponseError, NotFoundError, ServiceUnavailableError

from adapter.cli.contexts import with_context
from adapter.cli.exit_codes import NO, UNREACHABLE, Failed
from adapter.contract.names import H_ERROR, H_ERROR_CODE, Names
from adapter.environment import read_settings
from adapter.errors import STORE_FAILED, UNDECODABLE, BusRefused, Temporary
from adapter.jetstream.api_replies import NO_STREAM
from adapter.jetstream.client import BusClient, permission_violation
from adapter.jetstream.history import read_stream
from adapter.jetstream.managed_connection import ManagedConnection, connect_options
from adapter.ports import Stored
from adapter.security.permissions import Role, grants, overlaps
from adapter.settings import CREDENTIALS, Settings

CONNECT_S = 5.0
ANSWER_S = 5.0
PERMISSION_ERROR_S = 0.1
"""How often complaints of the server are looked for while an answer is awaited."""
SERVICE_TIMEOUT_S = 2.0
"""Patience with a question that only betters a sentence."""
BROKE = "The connection to NATS broke: try again."
NO_JETSTREAM = "JetStream is not available on this server or for this user."
JetStreamGone = (ServiceUnavailableError, NoStreamResponseError)
ERRORS_KEPT = 1000
"""Complaints that are kept: a connection may last for weeks."""

URL_FILE = "nats.url"
"""In the data folder of `run --embedded`: where its server listens, with the token that it asks for."""

S = TypeVar("S", bound=msgspec.Struct)
T = TypeVar("T")


class Bus:
    """A connection and the names on it."""

    def __init__(self, nc: BusClient, settings: Settings) -> None:
        self.nc = nc
        self.js: JetStreamContext = nc.jetstream(timeout=ANSWER_S)
        self.settings = settings
        self.names = Names(settings.prefix)
        self.async_errors: deque[Exception] = deque(maxlen=ERRORS_KEPT)
        """The server's complaints, such as what it forbids."""

    async def check_subscribed(self, *subjects: str) -> None:
        """Returns once what was subscribed is in force. Raises Failed where the server forbids one of `subjects`, or
        to hear answers, which whoever stores something needs."""
        try:
            answers = await self.nc.subscribe(self.nc.new_inbox())
            await self.nc.flush()
            await answers.unsubscribe()
        except (NatsError, TimeoutError):
            raise Failed(UNREACHABLE, BROKE) from None
        self.raise_if_forbidden(*subjects)

    def raise_if_forbidden(self, *subjects: str) -> None:
        """Raises Failed where the server has said that this user may not have one of `subjects`, one below it, or
        answers."""
        prefix = self.settings.nats_inbox_prefix
        for does, subject in permission_violations(self.async_errors):
            if does == "subscription" and subject.startswith(f"{prefix.lower()}."):
                raise Failed(
                    NO,
                    f"This user may not hear answers on {prefix}.>: set NATS_INBOX_PREFIX to what its role has"
                    " (_INBOX_adapter, _INBOX_operator, …).",
                )
            for wanted in subjects:
                if f"{subject}.".startswith(f"{wanted.lower()}."):
                    verb = "publish to" if does == "publish" else "hear"
                    who = self._whose_credentials(wanted) if does == "publish" else "an operator's"
                    raise Failed(NO, f"This user may not {verb} {wanted}: use {who} credentials.")

    def _whose_credentials(self, subject: str) -> str:
        roles: dict[Role, str] = {"operator": "an operator's", "adapter": "the adapter's"}
        for role, whose in roles.items():
            if any(overlaps(one, subject) for one in grants(self.names, role).publish):
                return whose
        return "an administrator's"

    async def unless_forbidden(self, subject: str, asking: Coroutine[Any, Any, T]) -> T:
        """What `asking` gives. What is forbidden gets no answer but a complaint on the side: then nobody waits.

        Raises Failed, and what `asking` raises.
        """
        task = asyncio.ensure_future(asking)
        try:
            while not (await asyncio.wait({task}, timeout=PERMISSION_ERROR_S))[0]:
                self.raise_if_forbidden(subject)
            return await task
        finally:
            task.cancel()

    async def store(self, subject: str, payload: bytes, headers: dict[str, str]) -> api.PubAck:
        """Publishes into a stream. Raises Failed where nothing stored it."""
        if len(payload) + sum(len(k) + len(v) + 4 for k, v in headers.items()) + 16 > self.nc.max_payload:
            raise Failed(
                NO, f"The message is larger than the {self.nc.max_payload} bytes that this NATS server takes."
            )
        try:
            publish = self.js.publish(subject, payload, headers=headers, timeout=ANSWER_S)
            return await self.unless_forbidden(subject, publish)
        except (NoStreamResponseError, NoRespondersError):
            await self._check_jetstream()
            raise Failed(
                UNREACHABLE, f"No stream takes {subject}: start an adapter once, or run `wechat-nats doctor --fix`."
            ) from None
        except APIError as exc:
            if exc.err_code == STORE_FAILED:
                raise Failed(NO, f"Not stored: too many messages wait on {subject}; try later.") from None
            raise Failed(NO, f"Not stored: {exc.description or exc} (error {exc.err_code}).") from None
        except (NatsError, TimeoutError):
            self.raise_if_forbidden(subject)
            raise Failed(
                UNREACHABLE,
                f"The bus did not confirm {subject}: unclear whether it is stored, repeat with the same id.",
            ) from None

    async def _check_jetstream(self) -> None:
        """Raises Failed where JetStream itself is not there; a user who may not ask gets the benefit of the doubt."""
        with contextlib.suppress(NatsError, TimeoutError, *UNDECODABLE):
            try:
                answer = await self.nc.request("$JS.API.INFO", b"", timeout=SERVICE_TIMEOUT_S)
            except NoRespondersError:
                raise Failed(UNREACHABLE, NO_JETSTREAM) from None
            if "error" in msgspec.json.decode(answer.data, type=dict[str, Any]):
                raise Failed(UNREACHABLE, NO_JETSTREAM)

    async def request_service(
        self, verb: str, request: msgspec.Struct, answer: type[S], timeout_s: float = ANSWER_S
    ) -> S:
        """A request to an adapter. Raises Failed."""
        reply = await self.service_reply(verb, msgspec.json.encode(request), timeout_s)
        try:
            return msgspec.json.decode(reply.data, type=answer)
        except UNDECODABLE:
            raise Failed(
                NO, f"The adapter's answer to {verb} cannot be read: are both of the same version?"
            ) from None

    async def service_reply(
        self, verb: str, payload: bytes, timeout_s: float, headers: dict[str, str] | None = None
    ) -> Msg:
        """An adapter's answer as it came, errors excepted. Raises Failed."""
        subject = self.names.svc(verb)
        reply = await self._reply(
            subject,
            payload,
            f"No adapter answered on {subject} within {timeout_s:g} s: run `wechat-nats doctor`.",
            nobody="No adapter runs on this bus: start one with `wechat-nats run`.",
            timeout_s=timeout_s,
            headers=headers,
        )
        found = reply.headers or {}
        if code := found.get(H_ERROR_CODE):
            raise Failed(NO, f"{found.get(H_ERROR) or 'The adapter refused'} (code {code}).")
        return reply

    async def request(self, subject: str, payload: bytes) -> Msg:
        """A request to the server itself. Raises Failed."""
        return await self._reply(subject, payload, f"The server did not answer {subject}: may this user ask?")

    async def read_stored(
        self,
        stream: str,
        subject: str,
        *,
        since_ms: int | None = None,
        keep: Callable[[Stored], bool] = lambda stored: True,
    ) -> list[Stored]:
        """What a stream holds under a subject, oldest first, as far as it is to be kept. Raises Failed."""
        connection = ManagedConnection(self.settings, "cli")
        await connection.adopt_client(self.nc)

        async def read() -> list[Stored]:
            found = read_stream(connection, stream, subject, since_ms=since_ms)
            return [stored async for stored in found if keep(stored)]

        try:
            info = connection.api_request(f"STREAM.INFO.{stream}")
            await self.unless_forbidden(f"$JS.API.STREAM.INFO.{stream}", info)
            return await self.unless_forbidden(f"$JS.API.DIRECT.GET.{stream}", read())
        except BusRefused as exc:
            why = missing_stream_failure(stream) if exc.code == NO_STREAM else exc.detail
            raise Failed(UNREACHABLE, why) from None
        except Temporary as exc:
            raise Failed(UNREACHABLE, f"Cannot read {stream}: {exc.detail or exc.reason}.") from None

    async def api_request(self, verb: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """JetStream's answer to `$JS.API.<verb>`, errors included as {"error": …}. Raises Failed."""
        payload = msgspec.json.encode(body) if body else b""
        silent = f"JetStream did not answer {verb}: is it enabled, no leaf node of it, may this user ask?"
        reply = await self._reply(f"$JS.API.{verb}", payload, silent)
        answer: dict[str, Any] = msgspec.json.decode(reply.data)
        return answer

    async def _reply(
        self,
        subject: str,
        payload: bytes,
        silent: str,
        *,
        nobody: str = "",
        timeout_s: float = ANSWER_S,
        headers: dict[str, str] | None = None,
    ) -> Msg:
        """`silent` is said where no answer comes, `nobody` where nobody listens. Raises Failed."""
        try:
            asking = self.nc.request(subject, payload, timeout=timeout_s, headers=headers)
            return await self.unless_forbidden(subject, asking)
        except (NatsError, TimeoutError) as exc:
            if nobody and isinstance(exc, NoRespondersError):
                raise Failed(UNREACHABLE, nobody) from None
            self.raise_if_forbidden(subject)
            raise Failed(UNREACHABLE, silent) from None


def settings_here() -> Settings:
    """The settings of this process, and of the context that NATS_CONTEXT names. Where they say nothing of a server:
    that of `run --embedded`, if its data folder is here. Raises SettingsError."""
    environ = with_context(os.environ)
    settings = read_settings(environ)
    if "NATS_URL" in environ or any(getattr(settings, field) for field in CREDENTIALS):
        return settings
    try:
        url = (Path(settings.data_dir) / URL_FILE).read_text(encoding="utf-8")
    except OSError:
        return settings
    return read_settings({**environ, "NATS_URL": url})


@contextlib.asynccontextmanager
async def connected_bus(settings: Settings | None = None, *, lasting: bool = False) -> AsyncIterator[Bus]:
    """A bus for the time of the block; a `lasting` one comes back after a break. Raises Failed, SettingsError."""
    settings = settings or settings_here()
    errors: deque[Exception] = deque(maxlen=ERRORS_KEPT)
    nc = await _connect(settings, lasting, errors)
    bus = Bus(nc, settings)
    bus.async_errors = errors
    try:
        yield bus
    except JetStreamGone as exc:
        raise Failed(UNREACHABLE, NO_JETSTREAM) from exc
    except ConnectionClosedError as exc:
        raise Failed(UNREACHABLE, BROKE) from exc
    finally:
        with contextlib.suppress(NatsError, OSError, TimeoutError):
            await nc.close()


async def _connect(settings: Settings, lasting: bool, errors: deque[Exception]) -> BusClient:
    """Asks each server once; what one complains of goes to `errors`.

    nats-py alone would go on for minutes, with a wrong password for ever.
    """
    try:
        options = connect_options(settings, "wechat-nats cli", list(settings.nats_url))
    except Temporary as exc:
        raise Failed(UNREACHABLE, f"{exc.detail}.") from None
    why: Exception | None = None
    for server in settings.nats_url:
        nc, why = await _connect_once(options | {"servers": [server]}, errors)
        if nc is None:
            continue
        if not lasting:
            return nc
        await nc.close()
        back = {"allow_reconnect": True, "max_reconnect_attempts": -1, "reconnect_time_wait": 0.2}
        nc = BusClient()
        await nc.connect(**options | back | {"error_cb": _error_collector(errors)})
        return nc
    raise Failed(UNREACHABLE, _unreachable_failure(settings, why))


async def _connect_once(
    options: dict[str, Any], errors: deque[Exception]
) -> tuple[BusClient | None, Exception | None]:
    """A client, or why there is none."""
    errors.clear()
    nc = BusClient()
    once = {"allow_reconnect": False, "max_reconnect_attempts": 1, "reconnect_time_wait": 0.01}
    try:
        async with asyncio.timeout(CONNECT_S):
            await nc.connect(**options | once | {"connect_timeout": 3, "error_cb": _error_collector(errors)})
    except (NatsError, OSError, TimeoutError) as exc:
        return None, errors[-1] if errors else exc
    return nc, None


def _unreachable_failure(settings: Settings, why: Exception | None) -> str:
    text = str(why or "").lower()
    if "authorization" in text or "authentication" in text:
        return "NATS refused the credentials: check NATS_CREDS, NATS_NKEY, NATS_USER, NATS_PASSWORD or NATS_TOKEN."
    if isinstance(why, ssl.SSLError) or "certificate" in text or "tls" in text:
        return "The TLS handshake with NATS failed: check NATS_CA, NATS_CERT and NATS_KEY."
    servers = ", ".join(url.rpartition("@")[2].removeprefix("nats://") for url in settings.nats_url)
    return f"NATS is not reachable at {servers}: start it, or set NATS_URL."


def _error_collector(errors: deque[Exception]) -> Callable[[Exception], Coroutine[Any, Any, None]]:
    """Keeps complaints, which nats-py would log with a traceback; what matters surfaces where it is awaited."""

    async def collect_error(exc: Exception) -> None:
        errors.append(exc)

    return collect_error


def permission_violations(errors: Iterable[Exception]) -> list[tuple[str, str]]:
    """What the server has forbidden, as `permission_violation` says it."""
    return [found for exc in errors if (found := permission_violation(exc))]


async def sequence_from(bus: Bus, stream: str, subject: str, *, headers_only: bool = False) -> AsyncIterator[Msg]:
    """The messages that `stream` holds under `subject` right now, oldest first. Raises Failed."""
    subscription = await replay(bus, stream, subject, headers_only=headers_only)
    try:
        if not await has_waiting(subscription):
            return
        while True:
            msg = await subscription.next_msg(timeout=ANSWER_S)
            yield msg
            if msg.metadata.num_pending == 0:
                return
    except TimeoutError:
        raise Failed(UNREACHABLE, f"Reading {stream} stopped half-way: try again.") from None
    finally:
        await subscription.unsubscribe()


async def has_waiting(subscription: JetStreamContext.PushSubscription) -> bool:
    """Whether the stream holds something for it."""
    info = await subscription.consumer_info()
    return bool(info.num_pending or (info.delivered and info.delivered.consumer_seq))


async def replay(
    bus: Bus, stream: str, subject: str, *, since_ms: int | None = None, headers_only: bool = False
) -> JetStreamContext.PushSubscription:
    """What `stream` holds and what comes, in order; all, or since a time. Raises Failed."""
    config = api.ConsumerConfig(inactive_threshold=30.0, headers_only=headers_only or None)
    if since_ms is not None:
        config.deliver_policy = api.DeliverPolicy.BY_START_TIME
        config.opt_start_time = datetime.fromtimestamp(since_ms / 1000, UTC)
    try:
        reading = bus.js.subscribe(subject, stream=stream, ordered_consumer=True, config=config)
        return await bus.unless_forbidden(f"$JS.API.CONSUMER.CREATE.{stream}", reading)
    except NotFoundError:
        raise Failed(UNREACHABLE, missing_stream_failure(stream)) from None
    except JetStreamGone:
        raise
    except APIError as exc:
        raise Failed(NO, f"Cannot read {stream}: {exc.description or exc}.") from None
    except (NatsError, TimeoutError):
        raise Failed(UNREACHABLE, f"Cannot read {stream}: is JetStream enabled?") from None


def missing_stream_failure(stream: str) -> str:
    return f"There is no stream {stream}: start an adapter once, or run `wechat-nats doctor --fix`."
