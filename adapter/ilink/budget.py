"""Bounds the memory and event loop time that large answers of iLink take.

An answer up to SMALL bytes, as nearly all are, is read and unpacked at once and needs no share. A larger one waits
for a share of one budget before it is read further, first come, first served, and holds it until its messages are
stored. Large answers are processed in a thread, one after the other.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import msgspec

from adapter.errors import Uncertain
from adapter.ilink.protocol import Reply
from adapter.ilink.unpack import Oversized, UnpackFailed, unpack
from adapter.kit.timing import complete_with_grace

P = ParamSpec("P")
T = TypeVar("T")

SMALL = 65_536
"""Largest answer without a share. A message has about a thousand bytes."""
BUDGET = 64 << 20
"""Bytes of all larger answers in flight."""
GRACE_S = 5.0
"""Time to process an answer that arrived before its request was cancelled, since iLink may count it as delivered."""


class Share:
    """A part of the budget, held until it is released or garbage collected. Implements ports.Share."""

    __slots__ = ("_budget", "_loop", "size")

    def __init__(self, budget: ByteBudget, size: int) -> None:
        self._budget = budget
        self._loop = asyncio.get_running_loop()
        self.size = size

    def shrink(self, size: int) -> None:
        """Returns what exceeds `size` bytes."""
        if size < self.size:
            surplus, self.size = self.size - size, size
            self._budget.return_bytes(surplus)

    def release(self) -> None:
        """Returns the share."""
        self.shrink(0)

    def __del__(self) -> None:
        """Releases the share, in whichever thread the last reference ends."""
        if self.size:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nothing waits for the budget
                self._loop.call_soon_threadsafe(self._budget.return_bytes, self.size)


class ByteBudget:
    """A shared number of bytes. A share that exceeds the budget gets the whole budget."""

    def __init__(self, size: int = BUDGET) -> None:
        self.size = self.free = size
        self._waiters: deque[tuple[int, asyncio.Future[Share]]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="answers")

    def reserve(self, size: int) -> asyncio.Future[Share]:
        """A share of `size` bytes, as soon as there is room. A cancelled future takes none."""
        share: asyncio.Future[Share] = asyncio.get_running_loop().create_future()
        self._waiters.append((min(size, self.size), share))
        self._grant_waiters()
        return share

    def return_bytes(self, size: int) -> None:
        """Takes bytes back from a share."""
        self.free += size
        self._grant_waiters()

    async def run_in_thread(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs `work` in the thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: work(*args, **kwargs))

    async def unpack(self, reply: Reply, limit: int) -> Reply:
        """The answer with its body unpacked to at most `limit` bytes, and with a share unless it is small.

        Raises Uncertain("unreadable").
        """
        encoding = reply.headers.get("content-encoding", "")
        try:
            if len(reply.body) <= SMALL:
                if not encoding:
                    return reply
                with contextlib.suppress(Oversized):
                    return msgspec.structs.replace(reply, body=unpack(encoding, reply.body, min(SMALL, limit)))
            return await complete_with_grace(self._unpack_large(reply, encoding, limit), GRACE_S)
        except UnpackFailed as exc:
            raise Uncertain("unreadable", str(exc)) from exc

    async def _unpack_large(self, reply: Reply, encoding: str, limit: int) -> Reply:
        share = reply.share or await self.reserve(len(reply.body) + (limit if encoding else 0))
        try:
            body = await self.run_in_thread(unpack, encoding, reply.body, limit) if encoding else reply.body
        except BaseException:
            share.release()
            raise
        share.shrink(len(body))
        return msgspec.structs.replace(reply, body=body, share=share)

    def close(self) -> None:
        """Ends the thread after its current work."""
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
