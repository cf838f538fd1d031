"""A hundred bots of a server of iLink's that answers as much as it can, as fast as it is asked.

Tiny packed answers that unpack into megabytes, answers of a million messages or of one that has a million items, of
what JSON does not allow, without end, a byte at a time. The adapter's memory is bounded whatever they are, and the
victim, whose iLink is another, hardly notices.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import itertools
import zlib
from collections import Counter
from collections.abc import Callable, Iterable

from tests.attacks.rig import ATTACKER, Rig

BOTS = 100
LARGEST = 8 << 20
"""Bytes of an answer that is read (adapter.ilink.protocol)."""
BOMB = 60_000_000
"""Bytes of one that is not."""
DRIBBLED_S = 0.05


def _filled(head: bytes, units: Iterable[bytes], tail: bytes, size: int) -> bytes:
    """As many units, with commas, as there is room for between `head` and `tail`."""
    found, left = [], size - len(head) - len(tail)
    for unit in units:
        left -= len(unit) + 1
        if left < 0:
            break
        found.append(unit)
    return head + b",".join(found) + tail


def _text(size: int, filler: bytes) -> bytes:
    """One message, one text."""
    head, tail = b'{"ret":0,"msgs":[{"from_user_id":"u","item_list":[{"type":1,"text_item":{"text":"', b'"}}]}]}'
    return head + filler * ((size - len(head) - len(tail)) // len(filler)) + tail


def _messages(size: int, *units: bytes) -> bytes:
    return _filled(b'{"ret":0,"msgs":[', itertools.cycle(units), b"]}", size)


def _within(size: int, before: bytes, unit: bytes, after: bytes = b"") -> bytes:
    """One message with a list in it."""
    head, tail = b'{"ret":0,"msgs":[{"from_user_id":"u",%b[' % before, b"]%b}]}" % after
    return _filled(head, itertools.repeat(unit), tail, size)


ITEM = b'{"type":1,"text_item":{"text":"x"}}'
USER = b'{"message_id":%d,"from_user_id":"u%d","item_list":[%b]}'
BODIES: dict[str, Callable[[int], bytes]] = {
    "control characters": lambda size: _text(size, b"\x01"),
    "halves of pairs": lambda size: _text(size, rb"\ud800"),
    "escaped line ends": lambda size: _text(size, rb"\n"),
    "a long text": lambda size: _text(size, "字".encode()),
    "no UTF-8": lambda size: _text(size, b"\xff"),
    "empty texts": lambda size: _messages(size, b'""'),
    "empty objects": lambda size: _messages(size, b"{}"),
    "numbers": lambda size: _messages(size, b"0"),
    "a list of numbers": lambda size: _filled(b'{"msgs":[[', itertools.repeat(b"0"), b"]]}", size),
    "a list of objects": lambda size: _filled(b'{"msgs":[[', itertools.repeat(b"{}"), b"]]}", size),
    "lists in the words": lambda size: _filled(b'{"errmsg":[', itertools.repeat(b"[]"), b"]}", size),
    "empty items": lambda size: _within(size, b'"item_list":', b"{}"),
    "plain items": lambda size: _within(size, b'"item_list":', ITEM),
    "objects in an item": lambda size: _within(size, b'"item_list":[{"type":1,"x":', b"{}", b"}]"),
    "objects in a group": lambda size: _within(size, b'"group_id":', b"{}"),
    "many users": lambda size: _filled(
        b'{"msgs":[', (USER % (number, number, ITEM) for number in itertools.count(1)), b"]}", size
    ),
    "control characters everywhere": lambda size: _messages(size, b'{"a":"\x02"}'),
}  # fmt: skip


def packed(body: bytes) -> bytes:
    """As a server packs it that wants to spend little."""
    work = zlib.compressobj(1, wbits=31)
    return work.compress(body) + work.flush()


class HostileServer:
    """An iLink whose polls are answered at once, each with another answer. `sizes`: of unpacked ones."""

    def __init__(self, *sizes: int, names: tuple[str, ...] = (), dribbles: bool = True) -> None:
        self.polls: Counter[str] = Counter()
        self.url = ""
        head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n"
        self._answers: list[tuple[str, bytes]] = []
        for size in sizes:
            for name in names or BODIES:
                body = packed(BODIES[name](size))
                self._answers.append((f"{name} {size}", head % len(body) + body))
        for name, body in (("a bomb", packed(_text(BOMB, b"\x01"))), ("members", gzip.compress(b"") * 50_000)):
            self._answers.append((name, head % len(body) + body))
        if dribbles:
            self._answers.append(("dribbled", b""))
        self._next = itertools.cycle(self._answers)
        self._tasks: set[asyncio.Task[None]] = set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length:")[2].partition(b"\r")[0] or b"0")
                await reader.readexactly(length)
                if b"/getupdates" not in head.partition(b"\r")[0]:
                    writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"ret":0}')
                    continue
                name, answer = next(self._next)
                self.polls[name] += 1
                if answer:
                    writer.write(answer)
                    await writer.drain()
                else:
                    await self._dribble(writer)
        writer.close()

    async def _dribble(self, writer: asyncio.StreamWriter) -> None:
        """Most of a large answer, and the rest a byte at a time."""
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % LARGEST + b" " * (LARGEST - 100_000))
        for _ in range(100_000):
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(DRIBBLED_S)

    async def __aenter__(self) -> HostileServer:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def attack(rig: Rig) -> None:
    """For the rig's seconds."""
    platform = await rig.server.connect("platform")
    async with await asyncio.to_thread(HostileServer, LARGEST - 64, LARGEST // 8) as server:
        for _ in range(BOTS):
            await rig.world.bind(platform.nc, ATTACKER, rig.sim.add_bot(), base_url=server.url)
        await asyncio.sleep(rig.seconds)
        rig.note(f"{server.polls.total() / rig.seconds:,.0f} answers/s")
