"""What reads texts that take their time: here at once, as they say, or never."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from adapter.conversation.split import to_plain


class FakeTexts:
    """Implements TextReader."""

    def __init__(self) -> None:
        self.rendered: list[str] = []
        self.on_render: Callable[[str], Awaitable[None]] | None = None
        """Awaited before a text is read."""

    async def render_plain(self, texts: Sequence[str]) -> list[str]:
        await asyncio.sleep(0)
        for text in texts:
            if self.on_render is not None:
                await self.on_render(text)
            self.rendered.append(text)
        return [to_plain(text) for text in texts]

    async def close(self) -> None: ...
