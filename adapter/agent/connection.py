"""An agent's connection to NATS, and its requests to the adapter."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections import deque
from collections.abc import Callable
from typing import Any, Self

import msgspec
from nats.errors import ConnectionClosedError, ConnectionReconnectingError, NoRespondersError
from nats.errors import Error as NatsError

from adapter.agent.reader import BUSY, retry
from adapter.contract.names import H_ERROR, H_ERROR_CODE, Names
from adapter.errors import Refused, Temporary
from adapter.jetstream.api_replies import decode_reply
from adapter.jetstream.client import BusClient, permission_violation
from adapter.jetstream.managed_connection import connect_options
from adapter.jetstream.publisher import PublishReply
from adapter.security.permissions import inbox as inbox_prefix
from adapter.settings import Settings

ANSWER_S = 5.0
CONNECT_S = 6.0
RECONNECT_S = 0.5
MEDIA_WAIT_S = 10.0
"""Longest wait of one request for media that are being fetched."""
MEDIA_S = 60.0
"""Time after which a request for media, or with media, is not repeated any more."""
ANY_PREFIX = "_INBOX"
"""Default inbox prefix of the settings. A sandbox with permissions may not use it."""


class Connection:
    """A connection of one sandbox, or of the role `agents` for all. `async with` opens and closes it. The client
    reconnects after each break."""

    def __init__(self, settings: Settings, sandbox: str = "") -> None:
        if settings.nats_inbox_prefix == ANY_PREFIX:
            prefix = inbox_prefix("sandbox" if sandbox else "agents", sandbox)
            settings = msgspec.structs.replace(settings, nats_inbox_prefix=prefix)
        self.settings = settings
        self.names = Names(settings.prefix)
        self.nc = BusClient()
        self._role = f"sandbox {sandbox}" if sandbox else "the role agents"
        self._errors: deque[Exception] = deque(maxlen=100)
        self._untrusted: set[str] = set()
        """Subjects of commands to which this user may not publish: the adapter stores them."""
        self._has_error = asyncio.Event()
        self._forbidden = ""

    async def __aenter__(self) -> Self:
        """Raises Temporary("bus_down")."""
        await connect(self.nc, self.settings, self._role, self._errors, self._has_error.set)
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
                msg = await self.nc.request(self.names.svc(verb), payload, timeout=timeout_s, headers=headers)
            except (TimeoutError, NatsError) as exc:
                self.raise_if_forbidden()
                raise Temporary("no_answer", f"No adapter answers {verb}.") from exc
            answered = msg.headers or {}
            if H_ERROR not in answered:
                return msg.data, answered
            kind = Temporary if answered.get(H_ERROR_CODE) in BUSY else Refused
            raise kind("refused", answered[H_ERROR])

        return await retry(ask, first_s=1.0, give_up_s=MEDIA_S)

    async def publish_command(self, sandbox: str, payload: bytes, headers: dict[str, str]) -> PublishReply | None:
        """One attempt to store a command: JetStream's answer; None: the adapter has stored it, since this user may
        not publish to the stream. Raises Refused, Temporary, NatsError."""
        if self.may_publish_commands(sandbox):
            subject = self.names.out(sandbox)
            asking = asyncio.ensure_future(self.nc.request(subject, payload, timeout=ANSWER_S, headers=headers))
            try:
                while not asking.done() and self.may_publish_commands(sandbox):
                    failing = asyncio.ensure_future(self._has_error.wait())
                    await asyncio.wait({asking, failing}, return_when=asyncio.FIRST_COMPLETED)
                    failing.cancel()
                    if self._has_error.is_set():
                        self.raise_if_forbidden()
                if asking.done():
                    return decode_reply((await asking).data, PublishReply, "a publish")
            except (TimeoutError, ConnectionReconnectingError, NoRespondersError) as exc:
                raise Temporary("no_answer", "The bus did not confirm a command.") from exc
            finally:
                asking.cancel()
        await self.request(f"send.{sandbox}", payload, headers)
        return None

    def may_publish_commands(self, sandbox: str) -> bool:
        """Whether this user may publish to the stream, as far as is known."""
        return self.names.out(sandbox).lower() not in self._untrusted

    async def ready(self) -> None:
        """Waits for the connection, since nats-py would keep what is sent meanwhile. Raises Refused("forbidden"),
        NatsError once the connection is closed for good."""
        self.raise_if_forbidden()
        while not self.nc.is_connected:
            if self.nc.is_closed:
                raise ConnectionClosedError
            await asyncio.sleep(RECONNECT_S)

    def raise_if_forbidden(self) -> None:
        """Raises Refused("forbidden")."""
        self._has_error.clear()
        while self._errors and not self._forbidden:
            if violation := permission_violation(self._errors.popleft()):
                if violation[0] == "publish" and violation[1].startswith(f"{self.names.out_plain}.".lower()):
                    self._untrusted.add(violation[1])
                    continue
                verb = "publish to" if violation[0] == "publish" else "hear"
                self._forbidden = (
                    f"This NATS user may not {verb} {violation[1]}: use the credentials of {self._role}."
                )
        if self._forbidden:
            raise Refused("forbidden", self._forbidden)


async def connect(
    nc: BusClient,
    settings: Settings,
    name: str,
    errors: deque[Exception],
    on_new_error: Callable[[], None] = lambda: None,
) -> None:
    """Connects, and reconnects after each break. Errors that the server reports are added to `errors`.

    Raises Temporary("bus_down").
    """

    async def on_error(exc: Exception) -> None:
        errors.append(exc)
        on_new_error()

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
        return "NATS refused the credentials: check NATS_CREDS, NATS_NKEY, NATS_USER, NATS_PASSWORD or NATS_TOKEN."
    if isinstance(why, ssl.SSLError) or "certificate" in text or "tls" in text:
        return "The TLS handshake with NATS failed: check NATS_CA, NATS_CERT and NATS_KEY."
    servers = ", ".join(url.rpartition("@")[2].removeprefix("nats://") for url in settings.nats_url)
    return f"NATS is not reachable at {servers}: start it, or set NATS_URL."
