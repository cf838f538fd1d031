"""One NATS connection that is replaced after every break, and the requests over it.

nats-py's own reconnect is switched off on purpose. It replays what was written while the connection was gone, ahead
of what was lost just before, and so breaks the order of messages. Most errors (-ERR) close its client for good. Here
every break leads to a new client; the publisher then resends in order, and consumers are reset.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from adapter.contract.names import is_inbox
from adapter.errors import Temporary
from adapter.jetstream.api_replies import ApiReply, decode_reply, error_of, is_leaderless
from adapter.jetstream.client import BusClient, permission_violation
from adapter.jetstream.credentials import credential_options, tls_context
from adapter.jetstream.multiplexer import PendingRequest, Reply, RequestMultiplexer
from adapter.settings import Settings
from adapter.tools.timing import ChangeSignal, backoff, is_cancelled, wait_event

log = structlog.get_logger()

BAD_CREDENTIALS = "refused the credentials: check NATS_CREDS, NATS_NKEY, NATS_USER, NATS_PASSWORD or NATS_TOKEN"

CONNECT_S = 6.0
SUSPECT_AFTER_S = 4.0
"""Time without any answer after which another server is tried. A leader election may take as long; moving then
neither helps nor harms. A server that is cut off from the cluster never answers."""


def connect_options(settings: Settings, name: str, servers: list[str]) -> dict[str, Any]:
    """nats-py's options from the settings, which have the names that NATS users know. `servers` are tried in order.

    Raises Temporary if a file of credentials or certificates cannot be used.
    """
    options: dict[str, Any] = {
        "servers": servers,
        "dont_randomize": True,
        "name": name,
        "allow_reconnect": False,
        "connect_timeout": 2,
        "reconnect_time_wait": 0.1,  # also applies between the servers of the first connect
        "ping_interval": 2,  # only pings detect a network partition
        "max_outstanding_pings": 2,
        "pending_size": 16 * 1024 * 1024,
        "inbox_prefix": settings.nats_inbox_prefix.encode(),
    }
    options |= credential_options(settings)
    encrypted = settings.nats_ca or settings.nats_cert or settings.nats_tls_first
    if encrypted or any(url.startswith("tls:") for url in settings.nats_url):
        options |= {"tls": tls_context(settings), "tls_handshake_first": settings.nats_tls_first}
    return options


class ManagedConnection:
    """A named connection. `run` maintains it; `nc` is None while it is down; `epoch` counts its clients."""

    def __init__(self, settings: Settings, name: str) -> None:
        self.name = name
        self.epoch = 0
        self.nc: BusClient | None = None
        self.down_reason = "not connected yet"
        self.max_payload = 1024 * 1024
        """The server's limit at the last connect; it announces a raised one to new clients only."""
        self.changed = ChangeSignal()
        self._settings = settings
        self._servers = random.sample(settings.nats_url, len(settings.nats_url))
        self._answered_at = 0.0
        self._patience = 1
        self._unanswered = 0
        """Consecutive requests without an answer."""
        self._multiplexer = RequestMultiplexer()
        self._on_connect: list[Callable[[BusClient], Awaitable[None]]] = [self._multiplexer.subscribe]
        self._lost: asyncio.Event = asyncio.Event()

    def on_connect(self, action: Callable[[BusClient], Awaitable[None]]) -> None:
        """Registers setup, such as subscriptions, that runs for each new client before its use."""
        self._on_connect.append(action)

    @property
    def is_connected(self) -> bool:
        return self.nc is not None and not self.nc.is_closed

    async def wait_connected(self, timeout_s: float | None = None) -> BusClient:
        """The client, as soon as there is one. Raises Temporary("bus_down") after `timeout_s` seconds."""
        await self.changed.wait_until(lambda: self.is_connected, timeout_s)
        return self.client()

    def client(self) -> BusClient:
        """The client. Raises Temporary("bus_down")."""
        if self.nc is not None and not self.nc.is_closed:
            return self.nc
        if self.nc is not None:
            self._lost.set()  # without a client the next one is being made, and must not be given up
        raise Temporary("bus_down", self.down_reason)

    def record_answered(self, answered: bool) -> None:
        """Records whether a server with a known leader answered a request. A server through which none is answered is
        left for another, since it may be cut off from the cluster. If no server answers, moving does not help and
        happens ever more rarely.
        """
        now = asyncio.get_running_loop().time()
        if answered:
            self._answered_at, self._unanswered, self._patience = now, 0, 1
            return
        self._unanswered += 1
        if self._unanswered > 2 and now - self._answered_at > SUSPECT_AFTER_S * self._patience and self.is_connected:
            self.down_reason = "JetStream does not answer through this server"
            self._patience = min(8, self._patience * 2)
            self._lost.set()

    async def adopt_client(self, nc: BusClient) -> None:
        """Uses a client that the caller maintains and closes, instead of `run`."""
        for action in self._on_connect:
            await action(nc)
        self.nc = nc

    async def run(self) -> None:
        """Connects again and again until cancelled, then closes the client."""
        failures = 0
        while not is_cancelled():
            try:
                nc = await self._connect()
            except (Temporary, NatsError, OSError, TimeoutError) as exc:
                failures += 1
                reason = exc.detail if isinstance(exc, Temporary) else str(exc) or type(exc).__name__
                self.down_reason = BAD_CREDENTIALS if "authorization" in reason.lower() else reason[:200]
                wait_s = backoff(failures, first_s=0.05, longest_s=1.0)
                log.warning(
                    "bus.unreachable",
                    connection=self.name,
                    host=", ".join(sorted(map(_host_of, self._servers))),
                    reason=self.down_reason,
                    wait_s=wait_s,
                )
                await asyncio.sleep(wait_s)
                continue
            failures = 0
            try:
                self.nc, self.epoch = nc, self.epoch + 1
                self.max_payload = nc.max_payload
                self._answered_at, self._unanswered = asyncio.get_running_loop().time(), 0
                self._servers = _servers_for_reconnect(self._servers, nc)
                log.info("bus.connected", connection=self.name, epoch=self.epoch)
                self.changed.notify_all()
                # nats-py does not always call closed_cb: if its closing fails, the client only stays closed
                while not (nc.is_closed or is_cancelled() or await wait_event(self._lost, 0.2)):
                    pass
            finally:
                self.nc = None
                self._multiplexer.fail_all()
                self.changed.notify_all()
                with contextlib.suppress(NatsError, OSError, TimeoutError):
                    async with asyncio.timeout(2):
                        await nc.close()
            log.warning("bus.lost", connection=self.name, reason=self.down_reason)

    async def _connect(self) -> BusClient:
        self._lost = lost = asyncio.Event()
        refused: list[tuple[str, str]] = []
        last_error = ""

        async def on_closed() -> None:
            lost.set()

        async def on_lame_duck() -> None:
            lost.set()  # the server asks clients to move; nats-py would stay until the end

        async def on_error(exc: Exception) -> None:
            # runs inside the read loop, so it must not raise or wait
            nonlocal last_error
            last_error = self.down_reason = str(exc)[:200] or type(exc).__name__
            if does := permission_violation(exc):
                refused.append(does)
            # while the server is down, every attempt fails; that is logged elsewhere, as is a forbidden first
            # connection
            log_error = log.warning if does and self.epoch else log.info if self.is_connected else log.debug
            log_error("bus.error", connection=self.name, reason=type(exc).__name__, detail=self.down_reason)

        nc = BusClient()
        try:
            async with asyncio.timeout(CONNECT_S):  # connect() tries for ever if no server listens
                await nc.connect(
                    **connect_options(self._settings, self.name, self._servers),
                    closed_cb=on_closed,
                    lame_duck_mode_cb=on_lame_duck,
                    error_cb=on_error,
                )
        except TimeoutError:
            raise Temporary("bus_timeout", last_error or f"no answer within {CONNECT_S:g} s") from None
        try:
            for action in self._on_connect:
                await action(nc)
            async with asyncio.timeout(5):
                await nc.flush()
            if not self.epoch:  # later connections continue with what they get, and the log reports the rest
                _check_subscriptions(refused, self._settings.nats_inbox_prefix)
        except BaseException:
            await nc.close()
            raise
        return nc

    async def request(
        self,
        subject: str,
        payload: bytes,
        timeout_s: float = 5.0,
        headers: dict[str, str] | None = None,
        *,
        is_read: bool = False,
    ) -> Reply:
        """`is_read`: as in `next_reply`. Raises Temporary if no answer comes."""
        with self.open_request() as request:
            await self.publish(subject, payload, reply=request.reply, headers=headers)
            return await self.next_reply(request, timeout_s, is_read=is_read)

    def open_request(self) -> contextlib.AbstractContextManager[PendingRequest]:
        """A request with several replies. It ends with its connection. Raises Temporary("bus_down")."""
        self.client()
        return self._multiplexer.new_request()

    async def next_reply(self, request: PendingRequest, timeout_s: float = 5.0, *, is_read: bool = False) -> Reply:
        """The next reply. `is_read`: it proves nothing, since a server that is cut off answers reads, too. Raises
        Temporary if none comes."""
        try:
            answer = await request.next_reply(timeout_s)
        except TimeoutError:
            self.record_answered(False)
            raise Temporary("bus_timeout", f"nothing in {timeout_s:g} s") from None
        if answer.no_responders:
            self.record_answered(False)
            raise Temporary("bus_busy", "no responders")
        if not answer.headers:  # else it is of a direct get, whose payload is somebody's data, whatever it looks like
            is_alive = not is_leaderless(answer.data)
            if not (is_read and is_alive):
                self.record_answered(is_alive)
        return answer

    async def api_request(
        self, verb: str, body: dict[str, Any] | None = None, timeout_s: float = 5.0
    ) -> dict[str, Any]:
        """A request to `$JS.API.<verb>`. Raises Temporary, Conflict, BusRefused."""
        reply = await self.request(
            f"$JS.API.{verb}", msgspec.json.encode(body) if body is not None else b"", timeout_s
        )
        if error := decode_reply(reply.data, ApiReply, verb).error:
            raise error_of(error)
        return decode_reply(reply.data, dict[str, Any], verb)

    async def publish(
        self, subject: str, payload: bytes, *, reply: str = "", headers: dict[str, str] | None = None
    ) -> None:
        """Publishes at most once, without an acknowledgement. Raises Temporary."""
        try:
            await self.client().publish(subject, payload, reply=reply, headers=headers)
        except NatsError as exc:
            raise Temporary("bus_down", str(exc)) from exc


class CoreNats:
    """Implements ports.CoreBus."""

    def __init__(self, connection: ManagedConnection) -> None:
        self._connection = connection

    async def publish(self, subject: str, payload: bytes, headers: dict[str, str]) -> None:
        await self._connection.publish(subject, payload, headers=headers)

    def subscribe(self, subject: str, on_message: Callable[[bytes], None]) -> None:
        """Subscribes on every connection. Messages that arrive while there is none are lost."""

        async def receive(msg: Msg) -> None:
            on_message(msg.data)

        self._on_each(subject, receive)

    def respond(self, subject: str, make: Callable[[bytes], bytes | None]) -> None:
        """Answers queries to all replicas, if the reply subject is an inbox; None: no answer."""

        async def receive(msg: Msg) -> None:
            reply = make(msg.data) if is_inbox(msg.reply) else None
            if reply is not None:
                await msg.respond(reply)

        self._on_each(subject, receive)

    def _on_each(self, subject: str, receive: Callable[[Msg], Awaitable[None]]) -> None:
        async def subscribe(nc: Client) -> None:
            await nc.subscribe(subject, cb=receive)

        self._connection.on_connect(subscribe)

    async def ask(self, subject: str, payload: bytes, *, within_s: float) -> bytes | None:
        with contextlib.suppress(TimeoutError), self._connection.open_request() as request:
            await self._connection.publish(subject, payload, reply=request.reply)
            reply = await request.next_reply(within_s)
            return None if reply.no_responders else reply.data
        return None


def _check_subscriptions(refused: list[tuple[str, str]], inbox_prefix: str) -> None:
    """Raises Temporary if the first connection lacks a permission to subscribe, so that it does not seem to work."""
    subjects = [subject for does, subject in refused if does == "subscription"]
    if not subjects:
        return
    inbox = any(subject.startswith(f"{inbox_prefix}.".lower()) for subject in subjects)
    advice = "set NATS_INBOX_PREFIX to _INBOX_adapter" if inbox else "run `wechat-nats doctor`"
    named = subjects[0] + (f" and {len(subjects) - 1} more" if len(subjects) > 1 else "")
    raise Temporary("bus_forbidden", f"this user may not subscribe {named}: {advice}, and see helm/nats/")


def _host_of(url: str) -> str:
    """Host and port, without credentials."""
    return url.rpartition("@")[2].rstrip("/").rpartition("/")[2]


def _servers_for_reconnect(servers: list[str], nc: Client) -> list[str]:
    """The order for the next connect: the current server comes last, since it was lost or left."""
    at = nc.connected_url
    current = [url for url in servers if at is not None and at.netloc and url.endswith(at.netloc)] or servers[:1]
    return [*(url for url in servers if url not in current), *current]
