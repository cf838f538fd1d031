"""Bounds what large answers of iLink take of the process: memory, and the event loop's time.

An answer of SMALL bytes, as nearly all are, is read and unpacked at once and counts for nothing. A larger one waits
for a share of one budget before it is read on, first come, first served, and keeps it until its messages are stored.
What is done with its bytes is done in a thread, one answer after the other.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from adapter.errors import Uncertain
from adapter.ilink.protocol import Reply
from adapter.ilink.unpack import Oversized, Unpacker, UnpackFailed
from adapter.kit.timing import complete_with_grace

P = ParamSpec("P")
T = TypeVar("T")

SMALL = 65_536
"""Bytes of an answer that needs no share. A message has about a thousand."""
BUDGET = 64 << 20
"""Bytes of all larger answers in flight."""
GRACE_S = 5.0
"""How long an answer that has come is worked on after its request was cancelled: iLink may count it as delivered."""


class Share:
    """A part of the budget, held until it is released, or nothing refers to it any more. Implements ports.Share."""

    __slots__ = ("_budget", "_loop", "size")

    def __init__(self, budget: ByteBudget, size: int) -> None:
        self._budget = budget
        self._loop = asyncio.get_running_loop()
        self.size = size

    def shrink(self, size: int) -> None:
        """Gives back what is more than `size` bytes."""
        if size < self.size:
            surplus, self.size = self.size - size, size
            self._budget.return_bytes(surplus)

    def release(self) -> None:
        """Gives it back."""
        self.shrink(0)

    def __del__(self) -> None:
        """In whatever thread the last reference ends."""
        if self.size:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._budget.return_bytes, self.size)


class ByteBudget:
    """Bytes that are shared. A share that is larger than the whole is the whole."""

    def __init__(self, size: int = BUDGET) -> None:
        self.size = self.free = size
        self._waiters: deque[tuple[int, asyncio.Future[Share]]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="answers")

    def reserve(self, size: int) -> asyncio.Future[Share]:
        """A share of `size` bytes, now or once there is room. A future that is cancelled takes none."""
        share: asyncio.Future[Share] = asyncio.get_running_loop().create_future()
        self._waiters.append((min(size, self.size), share))
        self._grant_waiters()
        return share

    def return_bytes(self, size: int) -> None:
        """Takes bytes back. For shares."""
        self.free += size
        self._grant_waiters()

    async def run_in_thread(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Does `work` in the thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: work(*args, **kwargs))

    async def unpack(self, reply: Reply, limit: int) -> Reply:
        """The answer, of at most `limit` bytes, with its body unpacked, and a share unless it is small.

        Raises Uncertain("unreadable").
        """
        encoding = reply.headers.get("content-encoding", "")
        try:
            if len(reply.body) <= SMALL:
                if not encoding:
                    return reply
                with contextlib.suppress(Oversized):
                    return reply._replace(body=_unpack_body(encoding, reply.body, min(SMALL, limit)))
            return await complete_with_grace(self._unpack_large(reply, encoding, limit), GRACE_S)
        except UnpackFailed as exc:
            raise Uncertain("unreadable", str(exc)) from exc

    async def _unpack_large(self, reply: Reply, encoding: str, limit: int) -> Reply:
        share = reply.share or await self.reserve(len(reply.body) + (limit if encoding else 0))
        try:
            body = await self.run_in_thread(_unpack_body, encoding, reply.body, limit) if encoding else reply.body
        except BaseException:
            share.release()
            raise
        share.shrink(len(body))
        return reply._replace(body=body, share=share)

    def close(self) -> None:
        """Ends the thread once it has nothing in hand."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _grant_waiters(self) -> None:
        while self._waiters:
            size, share = self._waiters[0]
            if share.cancelled():
                self._waiters.popleft()
            elif size <= self.free:
                self._waiters.popleft()
                self.free -= size
                share.set_result(Share(self, size))
            else:
                return


def _unpack_body(encoding: str, body: bytes, limit: int) -> bytes:
    unpacker = Unpacker(encoding, limit)
    plain = unpacker.feed(body)
    unpacker.finish()
    return plain
