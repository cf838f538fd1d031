"""A bot made with weilink (urllib, ciphers of its own): repeats what it is told.

Its hosts for logins and media are constants of its modules, which are set here.
Arguments: base URL of the API and of the CDN. Knows nothing of this repository.
"""

import sys
from functools import partial
from typing import Any

from weilink import WeiLink, _cdn, _protocol  # type: ignore[import-not-found]


def main(url: str, cdn_url: str) -> None:
    _protocol.get_qr_code = partial(_protocol.get_qr_code, base_url=url)
    _protocol.poll_qr_status = partial(_protocol.poll_qr_status, base_url=url)
    _cdn.CDN_BASE = cdn_url
    client = WeiLink(base_path=".")
    client.login()
    while True:
        for message in client.recv():
            answer(client, message)


def answer(client: Any, message: Any) -> None:
    kind = message.msg_type.name.lower()
    if kind in ("image", "file", "video"):
        name = {"file_name": "file.bin"} if kind == "file" else {}
        client.send(message.from_user, **{kind: client.download(message)}, **name)
    else:
        client.send(message.from_user, f"echo: {message.text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
