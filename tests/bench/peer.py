"""An iLink server that costs next to nothing, so that a benchmark measures the bridge: `python -m tests.bench.peer`.

It knows only what a bridge calls in the ordinary case, checks nothing, and takes the bot from the token (`<n>@…`).
Message texts hold the moment of sending on the machine's monotonic clock, which all processes share.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import ssl
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import uvloop

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
HOLD_S = 35.0
"""How long a poll waits."""


class Bot:
    """One bot's queue of messages, and the poll that waits for them."""

    __slots__ = ("answered", "cursor", "number", "poll", "queue", "timer")

    def __init__(self, number: int) -> None:
        self.number = number
        self.cursor = 0
        self.queue: deque[bytes] = deque()
        self.poll: Connection | None = None
        self.answered = 0.0
        """When its last poll was."""
        self.timer: asyncio.TimerHandle | None = None


class Peer:
    """All bots, and what is counted of them."""

    def __init__(self) -> None:
        self.bots: dict[int, Bot] = {}
        self.counts = dict.fromkeys(("polls", "sends", "disordered", "connections", "other"), 0)
        self.newest: dict[bytes, int] = {}
        """The number in the newest text that each bot sent."""
        self.per_answer = 1
        self.ids = itertools.count(7497484083968569736 + time.time_ns() // 1000)
        """Above those of an earlier peer, whose messages a bridge may remember."""

    def bot(self, number: int) -> Bot:
        return self.bots.setdefault(number, Bot(number))

    def message(self, number: int) -> bytes:
        ident, now_ms = next(self.ids), int(time.time() * 1000)
        return (
            b'{"seq":%d,"message_id":%d,"from_user_id":"user%d@im.wechat","to_user_id":"%d@im.bot","client_id":"c%d",'
            b'"create_time_ms":%d,"update_time_ms":%d,"session_id":"user%d@im.wechat#%d@im.bot","message_type":1,'
            b'"message_state":2,"context_token":"AARzJW%0130d","item_list":[{"type":1,"create_time_ms":%d,'
            b'"update_time_ms":%d,"is_completed":true,"text_item":{"text":"at %d"}}]}'
        ) % (ident % 2**31, ident, number, number, ident, now_ms, now_ms, number, number, ident, now_ms, now_ms,
             time.monotonic_ns())  # fmt: skip

    def feed(self, number: int, count: int) -> None:
        bot = self.bot(number)
        bot.queue.extend(self.message(number) for _ in range(count))
        if bot.poll is not None:
            self.answer(bot)

    def answer(self, bot: Bot) -> None:
        """Answers the poll that waits, with what there is."""
        poll, bot.poll = bot.poll, None
        if bot.timer is not None:
            bot.timer.cancel()
            bot.timer = None
        bot.answered = time.monotonic()
        if poll is not None:
            poll.reply(self.updates(bot))

    @property
    def polling(self) -> int:
        """How many bots poll: one whose poll was just answered comes again, and of thousands a few always do."""
        horizon = time.monotonic() - 1.0
        return sum(bot.poll is not None or bot.answered > horizon for bot in self.bots.values())

    def updates(self, bot: Bot) -> bytes:
        messages = [bot.queue.popleft() for _ in range(min(self.per_answer, len(bot.queue)))]
        if messages:
            bot.cursor += 1
        return b'{"msgs":[%s],"sync_buf":"CAES","get_updates_buf":"CAES%092d","longpolling_timeout_ms":%d}' % (
            b",".join(messages),
            bot.cursor,
            int(HOLD_S * 1000),
        )

    def call(self, connection: Connection, path: bytes, token: bytes, body: bytes) -> None:
        """One request."""
        if path.endswith(b"/getupdates"):
            self.counts["polls"] += 1
            bot = self.bot(int(token.partition(b"@")[0]))
            if bot.poll is not None:
                self.answer(bot)
            if bot.queue:
                connection.reply(self.updates(bot))
                return
            bot.poll = connection
            connection.bot = bot
            bot.timer = asyncio.get_running_loop().call_later(HOLD_S, self.answer, bot)
        elif path.endswith(b"/sendmessage"):
            self.counts["sends"] += 1
            self.see(token, body)
            connection.reply(b'{"ret":0,"message_id":"%d"}' % next(self.ids))
        elif path.startswith(b"/admin/"):
            connection.reply(json.dumps(self.admin(path[7:].decode(), json.loads(body or b"{}"))).encode())
        else:
            self.counts["other"] += 1
            connection.reply(b'{"ret":0}')

    def see(self, token: bytes, body: bytes) -> None:
        """A bridge that keeps the order sends texts with numbers in the order of these, each once."""
        at = body.find(b"hello there ")
        if at >= 0:
            number = int(body[at + 12 : body.index(b'"', at)])
            self.counts["disordered"] += number <= self.newest.get(token, -1)
            self.newest[token] = number

    def admin(self, what: str, given: dict[str, Any]) -> Any:
        match what:
            case "feed":
                self.per_answer = given["per_answer"]
                for number in given["bots"]:
                    self.feed(number, given["count"])
            case "trickle":
                asyncio.get_running_loop().create_task(self.trickle(given["bots"], given["count"], given["per_s"]))
        return {"polling": self.polling, **self.counts}

    async def trickle(self, bots: int, count: int, per_s: float) -> None:
        """`count` single messages to bots picked by chance, evenly in time."""
        rng, began = random.Random(1), time.monotonic()
        for number in range(count):
            await asyncio.sleep(max(0.0, began + number / per_s - time.monotonic()))
            self.feed(rng.randrange(bots), 1)


class Connection(asyncio.Protocol):
    """HTTP/1.1 as far as a client needs it that sends a Content-Length."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.buffer = b""
        self.bot: Bot | None = None
        """The last one that polled over it."""
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self.peer.counts["connections"] += 1

    def connection_lost(self, exc: Exception | None) -> None:
        if self.bot is not None and self.bot.poll is self:
            self.bot.poll = None
            if self.bot.timer is not None:
                self.bot.timer.cancel()
                self.bot.timer = None
        self.transport = None

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end]
            low = head.lower()
            at = low.find(b"content-length:")
            size = int(low[at + 15 :].partition(b"\r\n")[0]) if at >= 0 else 0
            if len(self.buffer) < end + 4 + size:
                return
            body, self.buffer = self.buffer[end + 4 : end + 4 + size], self.buffer[end + 4 + size :]
            at = low.find(b"authorization: bearer ")
            token = head[at + 22 :].partition(b"\r\n")[0] if at >= 0 else b""
            self.peer.call(self, head.split(b" ", 2)[1].partition(b"?")[0], token, body)

    def reply(self, body: bytes) -> None:
        if self.transport is not None:
            self.transport.write(HEAD % len(body) + body)


async def serve(port: int, tls: Path | None) -> None:
    context = None
    if tls is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tls / "server.pem", tls / "server-key.pem")
    peer = Peer()
    server = await asyncio.get_running_loop().create_server(
        lambda: Connection(peer), "127.0.0.1", port, backlog=20_000, ssl=context
    )
    plain = await asyncio.get_running_loop().create_server(lambda: Connection(peer), "127.0.0.1", 0)
    print(json.dumps({"admin": plain.sockets[0].getsockname()[1]}), flush=True)
    async with server, plain:
        await server.serve_forever()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--tls", type=Path, help="folder with server.pem and server-key.pem")
    given = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(given.port, given.tls))
    return 0


if __name__ == "__main__":
    sys.exit(main())
