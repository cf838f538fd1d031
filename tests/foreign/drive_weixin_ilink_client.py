"""A bot made with weixin-ilink-client (httpx): repeats what it is told. It speaks https only, logs in by POST, calls
`notifystart` and shows that it types.

Its host for logins is a constant of its modules, which is set here; that for media is its own setting.
Arguments: base URL of the API and of the CDN. Knows nothing of this repository.
"""

import asyncio
import sys
from functools import partial
from typing import Any

from weixin_ilink_client import (  # type: ignore[import-not-found]
    AsyncWeixinIlinkClient,
    ClientOptions,
    MediaKind,
    QrLoginManager,
    QrStatus,
    auth,
    protocol,
)

SENT = (MediaKind.IMAGE, MediaKind.FILE, MediaKind.VIDEO)


async def main(url: str, cdn_url: str) -> None:
    auth.DEFAULT_API_BASE_URL = protocol.DEFAULT_API_BASE_URL = url
    credentials = await log_in(QrLoginManager())
    async with AsyncWeixinIlinkClient(credentials, options=ClientOptions(cdn_base_url=cdn_url)) as client:
        await client.run(partial(answer, client))


async def log_in(manager: Any) -> Any:
    session = await manager.start()
    while True:
        result = await manager.poll(session)
        if result.credentials is not None:
            return result.credentials
        if result.status is QrStatus.EXPIRED:
            await manager.refresh(session)


async def answer(client: Any, message: Any) -> None:
    user = message.from_user_id
    if not user.endswith("@im.wechat"):
        return
    await client.set_typing(user, True)
    item = next((item for item in message.items if item.media_kind in SENT), None)
    if item is None:
        await client.send_text(user, f"echo: {message.text}")
    else:
        media = await client.download_media(item)
        await client.send_media(user, media.content, kind=media.kind, file_name=media.file_name or "file.bin")
    await client.set_typing(user, False)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
