"""nats-py's client, with a short way for what each message of the bridge passes: a publish and its acknowledgement.

nats-py takes four coroutines for a publish, and for each header a look for what may not stand there; for an
acknowledgement a message, a queue and a task. Together that is a quarter of what a message in a batch costs. Whatever
is unusual goes nats-py's own way, also where a later version of it has none of the parts that the short one needs.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

from nats.aio.client import Client
from nats.aio.msg import Msg

_HEADER_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_PARTS = ("_error_cb", "_flush_pending", "_flush_queue", "_max_payload", "_send_command", "_status", "stats")

Take = Callable[[str, bytes, bool], None]
"""Subject and payload of a message that came, and whether it says that nobody listens to what was sent."""


class BusClient(Client):
    """One connection. `publish` writes what nats-py's does; what is for `hear` passes neither a queue nor a task."""

    def __init__(self) -> None:
        super().__init__()
        self._takes: dict[int, Take] = {}
        self._is_known = all(hasattr(self, part) for part in _PARTS)

    async def publish(
        self, subject: str, payload: bytes = b"", reply: str = "", headers: dict[str, str] | None = None
    ) -> None:
        usual = self._is_known and self._status == self.CONNECTED and len(payload) <= self._max_payload
        command = _command(subject, reply, headers, payload) if usual else None
        if command is None:
            await super().publish(subject, payload, reply, headers)
            return
        self.stats["out_msgs"] += 1
        self.stats["out_bytes"] += len(payload)
        await self._send_command(command)
        if self._flush_queue is not None and self._flush_queue.empty():
            await self._flush_pending()

    async def hear(self, subject: str, take: Take) -> None:
        """Subscribes; `take` is called as messages are read. What it raises goes to `error_cb`."""

        async def on_message(msg: Msg) -> None:
            take(msg.subject, msg.data, msg.headers is not None and msg.headers.get("Status") == "503")

        heard = await self.subscribe(subject, cb=on_message, pending_msgs_limit=0, pending_bytes_limit=0)
        sid: int | None = getattr(heard, "_id", None)
        if self._is_known and sid is not None:
            self._takes[sid] = take

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: Any) -> None:
        take = self._takes.get(sid)
        if take is None:
            await super()._process_msg(sid, subject, reply, data, headers)
            return
        self.stats["in_msgs"] += 1
        self.stats["in_bytes"] += len(data)
        try:
            take(subject.decode(), data, bool(headers) and headers.startswith(b"NATS/1.0 503"))
        except Exception as exc:  # noqa: BLE001 - as nats-py does: the connection outlives whoever listens
            await self._error_cb(exc)


def _command(subject: str, reply: str, headers: dict[str, str] | None, payload: bytes) -> bytes | None:
    """The line of the protocol and what follows it; None for what nats-py has to look at."""
    if not _is_plain(subject) or (reply and not _is_plain(reply)):
        return None
    if headers is None:
        return b"%b\r\n%b\r\n" % (f"PUB {subject} {reply} {len(payload)}".encode(), payload)
    lines = ["NATS/1.0\r\n"]
    for name, value in headers.items():
        if not (_is_name(name) and value.isprintable()) or value[:1] == " " or value[-1:] == " ":
            return None
        lines.append(f"{name}: {value}\r\n")
    lines.append("\r\n")
    head = "".join(lines).encode()
    line = f"HPUB {subject} {reply} {len(head)} {len(head) + len(payload)}\r\n"
    return b"%b%b%b\r\n" % (line.encode(), head, payload)


def _is_plain(subject: str) -> bool:
    return bool(subject) and " " not in subject and subject.isprintable()


@functools.lru_cache(maxsize=256)
def _is_name(name: str) -> bool:
    return _HEADER_NAME.fullmatch(name) is not None
