"""nats-py's client with a fast path for publishes, their acknowledgements and deliveries.

For a publish nats-py takes four coroutines and checks each header; for an acknowledgement or a delivery it takes a
message, a queue and a task. Together that is a quarter of the cost of a message in a batch. Unusual messages take
nats-py's own path.
The fast path uses parts of nats-py that are not public, so `pyproject.toml` bounds its version.
"""

from __future__ import annotations

import asyncio
import functools
import re
from collections.abc import Callable
from typing import Any

from nats.aio.client import PING_PROTO, Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.aio.transport import TcpTransport
from nats.errors import ConnectionReconnectingError

from adapter.jetstream.credentials import UserCredentials

_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_VERSION = "NATS/1.0"
_VIOLATION = re.compile(r'permissions violation for (publish|subscription) to "([^"]+)"')

RawCallback = Callable[[str, bytes, bytes, bytes], None]
"""Subject, reply subject, payload and raw headers of a message; see `has_no_responders`, `parse_headers`."""
Admission = Callable[[str, str, int], bool]
"""Decides by subject, reply subject and payload size whether a message is accepted."""

BURST, BURST_BYTES = 64, 512 * 1024
"""Messages, or bytes of them, after which a connection pauses. They take about a millisecond."""
UNWRITTEN_BYTES = 64 * 1024
"""Bytes that the socket has not taken, above which nats-py's flusher waits for it."""
PAUSE_S = 0.004
"""Length of such a pause, so that a flood takes a fifth of the event loop's time."""


class BusClient(Client):
    """One connection. `publish` writes what nats-py's does. Messages for `subscribe_raw` skip nats-py's queue and
    task."""

    def __init__(self) -> None:
        super().__init__()
        self._raw_callbacks: dict[int, RawCallback] = {}
        self._admit: Admission | None = None
        self.pauses = False
        """Whether incoming messages may take only a part of the event loop's time."""
        self._burst = 0.0
        """Part of a burst that has come since the last pause."""
        self._is_write_due = False

    def set_admission(self, admit: Admission) -> None:
        """Makes a connection that other clients write to pause, and call `admit` before it processes a message that
        is not for `subscribe_raw`."""
        self._admit = admit
        self.pauses = True

    @property
    def is_asked_for_credentials(self) -> bool:
        """Whether the server lets in nobody without credentials; it tells that in its greeting."""
        return bool(self._server_info.get("auth_required"))

    def _setup_nkeys_connect(self) -> None:
        """Signs with our own key; nats-py's imports the package `nkeys`."""
        user = self._user_credentials
        assert isinstance(user, UserCredentials)
        self._signature_cb = user.key.sign
        self._user_jwt_cb = user.jwt.encode if user.jwt else None
        self._public_nkey = user.key.public

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        """Enforces TLS if it is configured. nats-py trusts the server's greeting alone, which an attacker in between
        may write. With a server that has no TLS the handshake fails before the credentials are sent.
        """
        if initial_connection and "tls" in self.options and not self.options["tls_handshake_first"]:
            info["tls_required"] = True
        await super()._process_info(info, initial_connection)

    async def publish(
        self, subject: str, payload: bytes = b"", reply: str = "", headers: dict[str, str] | None = None
    ) -> None:
        if not self.try_publish(subject, payload, reply, headers):
            await super().publish(subject, payload, reply, headers)

    def try_publish(self, subject: str, payload: bytes, reply: str, headers: dict[str, str] | None) -> bool:
        """Queues a publish, which is written together with others of this turn of the event loop. False: nothing is
        queued, and nats-py has to handle it."""
        if self._status != self.CONNECTED or len(payload) > self._max_payload:
            return False
        if self._pending_data_size > self._max_pending_size:
            return False
        command = _publish_command(subject, reply, headers, payload)
        if command is None:
            return False
        self.stats["out_msgs"] += 1
        self.stats["out_bytes"] += len(payload)
        self._pending.append(command)
        self._pending_data_size += len(command)
        if not self._is_write_due:
            self._is_write_due = True
            asyncio.get_running_loop().call_soon(self._write_due)
        return True

    def _write_due(self) -> None:
        """Writes what is queued. nats-py's flusher does it if the server does not keep up or the socket is closed."""
        self._is_write_due = False
        if not self._pending:
            return
        writer = self._transport._io_writer if isinstance(self._transport, TcpTransport) else None
        if (
            writer is not None
            and self._status == self.CONNECTED
            and not writer.transport.is_closing()
            and writer.transport.get_write_buffer_size() < UNWRITTEN_BYTES
        ):
            writer.transport.write(b"".join(self._pending))
            self._pending, self._pending_data_size = [], 0
        elif self._flush_queue is not None and self._flush_queue.empty():
            self._flush_queue.put_nowait(asyncio.get_running_loop().create_future())

    async def _process_connect_init(self) -> None:
        """Logs in. Turns the error that uvloop raises for a broken socket into ConnectionResetError."""
        try:
            await super()._process_connect_init()
        except RuntimeError as exc:
            raise ConnectionResetError(str(exc)) from exc

    async def _close(self, status: int, do_cbs: bool = True) -> None:
        """Closes a connection that broke with unwritten data. nats-py fails on it before it has ended its tasks."""
        if self._is_socket_closed():
            self._pending, self._pending_data_size = [], 0
        await super()._close(status, do_cbs)

    async def _send_ping(self, future: asyncio.Future[bool] | None = None) -> None:
        """Sends the ping after queued data. nats-py's ping overtakes them, so that a subscription might not exist
        after a `flush` and miss a message."""
        self._pongs.append(future or asyncio.get_running_loop().create_future())
        await self._send_command(PING_PROTO)
        await self._flush_pending()

    async def _flush_pending(self, force_flush: bool = False) -> Any:
        """Reconnects if the socket is closed and nats-py's flusher, which would do so, has ended. nats-py lets the
        socket's error through."""
        is_flusher_over = self._flusher_task is not None and self._flusher_task.done()
        if is_flusher_over and self.is_connected and self._is_socket_closed():
            await self._process_op_err(ConnectionResetError())
            raise ConnectionReconnectingError
        return await super()._flush_pending(force_flush)

    def _is_socket_closed(self) -> bool:
        writer = self._transport._io_writer if isinstance(self._transport, TcpTransport) else None
        return writer is not None and writer.transport.is_closing()

    async def subscribe_raw(self, subject: str, on_raw_message: RawCallback) -> Subscription:
        """Subscribes. `on_raw_message` is called while messages are read; its errors go to `error_cb`."""

        async def on_message(msg: Msg) -> None:
            raise AssertionError("raw subscriptions skip this callback")

        subscription = await self.subscribe(subject, cb=on_message, pending_msgs_limit=0, pending_bytes_limit=0)
        self._raw_callbacks[subscription._id] = on_raw_message
        return subscription

    def _remove_sub(self, sid: int, max_msgs: int = 0) -> None:
        self._raw_callbacks.pop(sid, None)
        super()._remove_sub(sid, max_msgs)

    async def _process_headers(self, headers: bytes | None) -> dict[str, str] | None:
        return parse_headers(headers) if headers else None

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: Any) -> None:
        on_raw_message = self._raw_callbacks.get(sid)
        if self.pauses:
            self._burst += 1 / BURST + len(data) / BURST_BYTES
            if self._burst > 1:
                self._burst = 0.0
                await asyncio.sleep(PAUSE_S)
        if on_raw_message is None:
            if self._admit is None or self._admit(
                subject.decode(errors="replace"), reply.decode(errors="replace"), len(data)
            ):
                await super()._process_msg(sid, subject, reply, data, headers)
            return
        self.stats["in_msgs"] += 1
        self.stats["in_bytes"] += len(data)
        try:
            on_raw_message(subject.decode(), reply, data, headers or b"")
        except Exception as exc:  # noqa: BLE001 - as nats-py does: a callback must not end the connection
            await self._error_cb(exc)


def parse_headers(raw: bytes) -> dict[str, str]:
    """Decodes raw headers, in a third of nats-py's time. The server's status is called `Status`, its reason
    `Description`. Of repeated headers the last counts: the server adds its own behind those of the author."""
    first, *lines = raw.decode(errors="replace").split("\r\n")
    found: dict[str, str] = {}
    if len(first) > len(_VERSION):
        found["Status"], _, found["Description"] = first[len(_VERSION) :].strip().partition(" ")
    for line in lines:
        name, _, value = line.partition(":")
        if _is_name(name):
            found[name] = value.strip()
    return found


def permission_violation(exc: Exception) -> tuple[str, str] | None:
    """What a server forbids: `publish` or `subscription`, and the subject in lower case; None: nothing."""
    match = _VIOLATION.search(str(exc).lower())
    return (match[1], match[2]) if match else None


def has_no_responders(headers: bytes) -> bool:
    """Whether the server reports that no subscriber exists for the subject."""
    return headers.startswith(b"NATS/1.0 503")


def _publish_command(subject: str, reply: str, headers: dict[str, str] | None, payload: bytes) -> bytes | None:
    """The protocol line and its payload; None: nats-py has to handle it."""
    if not subject or (names := subject + reply).split() != [names]:
        return None
    if headers is None:
        return f"PUB {subject} {reply} {len(payload)}\r\n".encode() + payload + b"\r\n"
    text = "".join([f"{name}: {value.strip()}\r\n" for name, value in headers.items()])
    if not (headers and text.isascii() and text.count("\r") == text.count("\n") == len(headers)):
        return None
    if not all(map(_is_name, headers)):
        return None
    size = len(text) + 12  # NATS/1.0 and two line ends
    head = f"HPUB {subject} {reply} {size} {size + len(payload)}\r\nNATS/1.0\r\n{text}\r\n"
    return head.encode() + payload + b"\r\n"


@functools.lru_cache(maxsize=256)
def _is_name(header: str) -> bool:
    return _NAME.fullmatch(header) is not None
