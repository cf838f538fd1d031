"""A client's connection to NATS, of an agent or of a command, and its requests to the adapter."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections import deque
from collections.abc import Coroutine
from typing import Any, Self, TypeVar

import msgspec
from nats.errors import ConnectionClosedError, ConnectionReconnectingError, NoRespondersError
from nats.errors import Error as NatsError

from adapter.agent.reader import BUSY, retry
from adapter.contract.names import H_ERROR, H_ERROR_CODE, Names
from adapter.errors import Refused, Temporary
from adapter.jetstream.api_replies import decode_ack
from adapter.jetstream.client import BusClient, permission_violation
from adapter.jetstream.managed_connection import BAD_CREDENTIALS, connect_options
from adapter.ports import PubAck
from adapter.settings import Settings
from adapter.tools.permissions import inbox as inbox_prefix

ANSWER_S = 5.0
CONNECT_S = 6.0
RECONNECT_S = 0.5
REFUSAL_S = 0.1
"""Seconds between two looks for the server's complaints while an answer is awaited."""
COMPLAINTS_KEPT = 1000
"""Complaints that are kept: a connection may last for weeks."""
MEDIA_WAIT_S = 10.0
"""Longest wait of one request for media that are being fetched."""
MEDIA_S = 60.0
"""Time after which a request for media, or with media, is not repeated any more."""
ANY_PREFIX = "_INBOX"
"""Default inbox prefix of the settings. A sandbox with permissions may not use it."""
T = TypeVar("T")


class Connection:
    """A connection of one sandbox, or of the role `agents` for all. `async with` opens and closes it. The client
    reconnects after each break."""

    def __init__(self, settings: Settings, sandbox: str = "") -> None:
        role = f"sandbox {sandbox}" if sandbox else "the role agents"
        if settings.nats_inbox_prefix == ANY_PREFIX:
            prefix = inbox_prefix("sandbox" if sandbox else "agents", sandbox)
            settings = msgspec.structs.replace(settings, nats_inbox_prefix=prefix)
        self._set_up(settings, BusClient(), role, f"the credentials of {role}")

    def _set_up(self, settings: Settings, nc: BusClient, name: str, advice: str) -> None:
        """`name`: what the server calls this client. `advice`: what may do that which the server has forbidden."""
        self.settings = settings
        self.names = Names(settings.prefix)
        self.nc = nc
        self._name = name
        self._advice = advice
        self.complaints: deque[Exception] = deque(maxlen=COMPLAINTS_KEPT)
        """Errors that the server reported outside of answers."""

    async def __aenter__(self) -> Self:
        """Raises Temporary("bus_down")."""
        await connect(self.nc, self.settings, self._name, self.complaints)
        return self

    async def __aexit__(self, *_: object) -> None:
        with contextlib.suppress(NatsError, OSError, TimeoutError):
            await self.nc.close()

    async def request(
        self, verb: str, payload: bytes, headers: dict[str, str], timeout_s: float = MEDIA_WAIT_S + ANSWER_S
    ) -> tuple[bytes, dict[str, Any]]:
        """A request to the adapter, which waits for the bus, and is repeated for a while if there is no answer, or
        none yet. Raises Refused, Temporary."""

        async def ask() -> tuple[bytes, dict[str, Any]]:
            try:
                await self.ready()
            except NatsError as exc:
                raise Temporary("no_answer", "The connection is closed.") from exc
            return await self.ask(verb, payload, headers, timeout_s)

        return await retry(ask, first_s=1.0, give_up_s=MEDIA_S)

    async def store(self, subject: str, payload: bytes, headers: dict[str, str]) -> PubAck:
        """One attempt to store a message. Raises Refused("forbidden"), BusRefused, Temporary("no_stream"),
        ("no_answer", …): it may be stored."""
        try:
            asking = self.nc.request(subject, payload, timeout=ANSWER_S, headers=headers)
            reply = await self.unless_forbidden(subject, asking)
        except NoRespondersError as exc:
            raise Temporary("no_stream", f"No stream takes {subject}.") from exc
        except (TimeoutError, ConnectionReconnectingError) as exc:
            raise Temporary("no_answer", f"The bus did not confirm {subject}.") from exc
        return decode_ack(reply.data)

    async def store_command(self, sandbox: str, payload: bytes, headers: dict[str, str]) -> None:
        """One attempt to store a command. The adapter does it where this user may not publish to the stream. Raises
        Refused, BusRefused, Temporary."""
        subject = self.names.out(sandbox)
        if self.may_publish(subject):
            with contextlib.suppress(Refused):  # the server has forbidden it
                await self.store(subject, payload, headers)
                return
        await self.request(f"send.{sandbox}", payload, headers)

    def may_publish(self, subject: str) -> bool:
        """Whether this user may publish there, as far as the server has complained."""
        return ("publish", subject.lower()) not in self.forbidden

    async def ask(
        self, verb: str, payload: bytes, headers: dict[str, str] | None = None, timeout_s: float = ANSWER_S
    ) -> tuple[bytes, dict[str, Any]]:
        """One request to the adapter: payload and headers of its answer. Raises Refused; Temporary if there is no
        answer, or none yet."""
        subject = self.names.svc(verb)
        try:
            asking = self.nc.request(subject, payload, timeout=timeout_s, headers=headers)
            msg = await self.unless_forbidden(subject, asking)
        except NoRespondersError:
            said = "No adapter runs on this bus: start one with `wechat-nats run`."
            raise Temporary("no_answer", said) from None
        except (NatsError, TimeoutError):
            self.raise_if_forbidden(subject)
            said = f"No answer on {subject} within {timeout_s:g} s: run `wechat-nats doctor`."
            raise Temporary("no_answer", said) from None
        answered = msg.headers or {}
        if code := answered.get(H_ERROR_CODE):
            kind = Temporary if code in BUSY else Refused
            raise kind(
                "not_found" if code == "404" else "refused",
                answered.get(H_ERROR) or f"The adapter refused (code {code}).",
            )
        return msg.data, answered

    async def unless_forbidden(self, subject: str, asking: Coroutine[Any, Any, T]) -> T:
        """Awaits `asking`, but not after the server has forbidden `subject`: a forbidden request gets no answer.

        Raises Refused("forbidden"), and what `asking` raises.
        """
        task = asyncio.ensure_future(asking)
        try:
            while not (await asyncio.wait({task}, timeout=REFUSAL_S))[0]:
                self.raise_if_forbidden(subject)
            return await task
        finally:
            task.cancel()

    async def ready(self) -> None:
        """Waits for the connection, since nats-py would keep what is sent meanwhile. Raises Refused("forbidden"),
        NatsError once the connection is closed for good."""
        self.raise_if_forbidden()
        while not self.nc.is_connected:
            if self.nc.is_closed:
                raise ConnectionClosedError
            await asyncio.sleep(RECONNECT_S)

    @property
    def forbidden(self) -> list[tuple[str, str]]:
        """What the server has forbidden, as `permission_violation` says it."""
        return [found for exc in self.complaints if (found := permission_violation(exc))]

    def raise_if_forbidden(self, *subjects: str) -> None:
        """Raises Refused("forbidden") if the server has forbidden this user one of `subjects`, or a subject below
        one; without `subjects`, anything but publishing commands, which the adapter stores then."""
        for does, subject in self.forbidden:
            if not subjects and does == "publish" and subject.startswith(f"{self.names.out_plain}.".lower()):
                continue
            for wanted in subjects or (subject,):
                if f"{subject}.".startswith(f"{wanted.lower()}."):
                    verb = "publish to" if does == "publish" else "hear"
                    raise Refused("forbidden", f"This user may not {verb} {wanted}: use {self._advice}.")


async def connect(nc: BusClient, settings: Settings, name: str, errors: deque[Exception]) -> None:
    """Connects, and reconnects after each break. Errors that the server reports are added to `errors`.

    Raises Temporary("bus_down").
    """

    async def on_error(exc: Exception) -> None:
        errors.append(exc)

    options = connect_options(settings, name, list(settings.nats_url))
    try:
        async with asyncio.timeout(CONNECT_S):
            await nc.connect(**options | {"max_reconnect_attempts": 1, "error_cb": on_error})
    except (NatsError, OSError, TimeoutError) as exc:
        raise Temporary("bus_down", _why_unreachable(settings, errors[-1] if errors else exc)) from exc
    # set after the first connect, which would never end with a wrong password
    nc.options |= {"allow_reconnect": True, "max_reconnect_attempts": -1, "reconnect_time_wait": RECONNECT_S}


def _why_unreachable(settings: Settings, why: BaseException) -> str:
    text = str(why).lower()
    if "authorization" in text or "authentication" in text:
        return f"NATS {BAD_CREDENTIALS}."
    if isinstance(why, ssl.SSLError) or "certificate" in text or "tls" in text:
        return "The TLS handshake with NATS failed: check NATS_CA, NATS_CERT and NATS_KEY."
    servers = ", ".join(url.rpartition("@")[2].removeprefix("nats://") for url in settings.nats_url)
    return f"NATS is not reachable at {servers}: start it, or set NATS_URL."
