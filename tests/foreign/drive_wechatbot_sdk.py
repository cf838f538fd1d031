"""A bot made with wechatbot-sdk (aiohttp): repeats what it is told.

Its hosts for QR codes and media are constants of its modules, which are set here.
Arguments: base URL of the API and of the CDN. Knows nothing of this repository.
"""

import asyncio
import sys
from typing import Any

import wechatbot.auth  # type: ignore[import-not-found]
import wechatbot.client  # type: ignore[import-not-found]


async def main(url: str, cdn_url: str) -> None:
    wechatbot.auth.FIXED_QR_BASE_URL = url
    wechatbot.client.CDN_BASE_URL = cdn_url
    bot = wechatbot.client.WeChatBot(base_url=url, cred_path="credentials.json", on_qr_url=lambda _: None)

    async def answer(message: Any) -> None:
        media = await bot.download(message)
        if media is None:
            await bot.reply(message, f"echo: {message.text}")
        else:
            await bot.reply_media(message, {media.type: media.data, "file_name": media.file_name or "file.bin"})

    bot.on_message(answer)
    await bot.login()
    await bot.start()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
