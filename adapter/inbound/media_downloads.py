"""Downloads the media of a bot's messages ahead of their publication, a few at a time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

import structlog

from adapter.contract.messages import InboundItem
from adapter.inbound.dispatch_state import DispatchDeps, PendingMessage
from adapter.inbound.download import DownloadResult, MediaUnavailable, download, with_media
from adapter.kit.tasks import TaskSet
from adapter.ports import MediaRef

log = structlog.get_logger()

CONCURRENT_DOWNLOADS = 4
"""Messages of one bot that download their media at the same time."""


class MediaDownloads:
    """The downloads for one bot's pending messages."""

    def __init__(
        self,
        bot: str,
        waiting: deque[PendingMessage],
        deps: DispatchDeps,
        tasks: TaskSet,
        is_stopped: Callable[[], bool],
        on_change: Callable[[], None],
    ) -> None:
        """`on_change`: called when a download has ended."""
        self._bot = bot
        self._waiting = waiting
        self._deps = deps
        self._tasks = tasks
        self._is_stopped = is_stopped
        self._on_change = on_change

    def start(self) -> None:
        """Starts downloads for the oldest messages."""
        busy = sum(1 for waiting in self._waiting if waiting.work is not None and not waiting.work.done())
        for waiting in self._waiting:
            if busy >= CONCURRENT_DOWNLOADS or waiting.is_suspect or self._is_stopped():
                return
            if waiting.work is None and waiting.message.inbound.fetches:
                waiting.work = self._tasks.spawn(self._download_media(waiting))
                waiting.work.add_done_callback(self._on_downloaded)
                busy += 1

    def _on_downloaded(self, _: object) -> None:
        self.start()
        self._on_change()

    async def _download_media(self, waiting: PendingMessage) -> list[InboundItem]:
        """The items of a message, with their media or the reason why media are missing."""
        inbound = waiting.message.inbound
        found = await asyncio.gather(*(self._download_item(waiting, fetch) for fetch in inbound.fetches))
        items = list(inbound.items)
        for fetch, result in zip(inbound.fetches, found, strict=True):
            items[fetch.item] = with_media(items[fetch.item], result)
        return items

    async def _download_item(self, waiting: PendingMessage, fetch: MediaRef) -> DownloadResult:
        """Downloads the media of one item. Time in which the bus is unavailable does not count."""
        while True:
            left_s = waiting.until - self._deps.publishing.clock.monotonic()
            try:
                async with asyncio.timeout(max(0.0, left_s)):
                    return await download(waiting.message, fetch, self._deps.downloading)
            except TimeoutError:
                missing = MediaUnavailable("timeout", again=True)
            except MediaUnavailable as exc:
                missing = MediaUnavailable(exc.reason, again=exc.again)  # `exc` has frames that hold it, and buffers
            if missing.reason not in ("timeout", "store") or not missing.again or not await self._wait_for_bus():
                log.info("media.missing", bot=self._bot, reason=missing.reason)
                return DownloadResult(reason=missing.reason)
            waiting.until = self._deps.publishing.clock.monotonic() + self._deps.media_wait_s

    async def _wait_for_bus(self) -> bool:
        """Waits until the bus is available. Returns whether it was not."""
        began = self._deps.publishing.clock.monotonic()
        await self._deps.media_writable()
        return self._deps.publishing.clock.monotonic() > began + 0.01
