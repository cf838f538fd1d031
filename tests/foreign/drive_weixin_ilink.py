"""A bot made with weixin-ilink (requests): repeats what it is told. All addresses are its own settings.

Arguments: base URL of the API and of the CDN. Knows nothing of this repository.
"""

import sys
from pathlib import Path
from typing import Any

from weixin_ilink import ILinkClient, login_with_qr  # type: ignore[import-not-found]

NAMES = {2: "image.png", 4: "file.bin", 5: "video.mp4"}


def main(url: str, cdn_url: str) -> None:
    credentials = login_with_qr(on_qrcode=lambda _: None, base_url=url)
    client = ILinkClient(credentials.base_url, credentials.bot_token, cdn_base_url=cdn_url)
    while True:
        for message in client.poll().get("msgs") or []:
            if message.get("message_type") == 1 and message.get("item_list"):
                answer(client, message)


def answer(client: Any, message: dict[str, Any]) -> None:
    item, user, token = message["item_list"][0], message["from_user_id"], message.get("context_token", "")
    if item.get("type") not in NAMES:
        client.send_text(user, f"echo: {client.extract_text(message)}", token)
        return
    path = Path(NAMES[item["type"]])
    path.write_bytes(client.download_media_item(item))
    send = {2: client.send_image, 4: client.send_file, 5: client.send_video}[item["type"]]
    send(user, path, token)


if __name__ == "__main__":
    main(*sys.argv[1:])
