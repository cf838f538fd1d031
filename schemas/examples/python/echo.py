"""An agent that answers each message with the same words, or with what it has got.

    python echo.py SANDBOX

What its user wrote while nobody ran waits in the sandbox's inbox.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import sys
from typing import Any

from bus import connect, store
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import NoRespondersError
from nats.errors import TimeoutError as NatsTimeoutError

BUSY = ("429", "503")


async def main(sandbox: str) -> None:
    nc = await connect(f"_INBOX_{sandbox}")  # the only inboxes that a sandbox may be permitted
    rung = asyncio.Event()

    async def ring(_: Msg) -> None:
        rung.set()

    await nc.subscribe(f"wechat.in.{sandbox}", cb=ring)
    print(f"echo agent of {sandbox}: ready", flush=True)
    request: dict[str, Any] = {}  # the first one makes this program the sandbox's only reader
    while True:
        rung.clear()
        page = json.loads((await ask(nc, f"next.{sandbox}", request)).data)
        request = {"reader": page["reader"]}
        for handed in page.get("messages", ()):
            said = handed["message"]
            await store(nc, f"wechat.out.{sandbox}", await answer(nc, sandbox, handed["position"], said))
            # The next request confirms it. A crash before brings the message again; the id keeps its answer single.
            request["after"] = handed["position"]
            print(f"answered {said['id']}", flush=True)
        if "after" not in request:
            with contextlib.suppress(TimeoutError):  # a ring may get lost
                await asyncio.wait_for(rung.wait(), 30)


async def answer(nc: Client, sandbox: str, position: str, said: dict[str, Any]) -> dict[str, Any]:
    """The command. Its id follows from what caused it; it names the user, since another may be bound by now."""
    text = f"You said: {said['text']}"
    if not said["text"]:
        text = "You sent: " + ", ".join([await described(nc, sandbox, position, item) for item in said["items"]])
    return {"id": f"{sandbox}.echo.{said['id']}", "user": said["user"], "text": text, "reply_to": said["id"]}


async def described(nc: Client, sandbox: str, position: str, item: dict[str, Any]) -> str:
    if "media" not in item:
        return str(item["kind"])
    try:
        data = await read(nc, sandbox, position, item["media"]["object"])
    except RuntimeError as why:
        return f"{item['kind']} ({why})"
    return f"{item['kind']} ({len(data)} bytes)"


async def read(nc: Client, sandbox: str, position: str, name: str) -> bytes:
    """The bytes of an object, which may still be on their way from WeChat. Raises RuntimeError: there are none."""
    data, after = b"", 0
    while True:
        request = {"object": name, "position": position, "wait_s": 10, "after": after}
        piece = await ask(nc, f"media.get.{sandbox}", request)
        headers = piece.headers or {}
        data += piece.data
        if "Wechat-Next" not in headers:
            if hashlib.sha256(data).hexdigest() != headers["Wechat-Sha256"]:
                raise RuntimeError("The bytes are not those that were stored.")
            return data
        after = int(headers["Wechat-Next"])


async def ask(nc: Client, verb: str, request: dict[str, Any]) -> Msg:
    """Asks until an adapter answers. Raises RuntimeError with the sentence of an error."""
    while True:
        with contextlib.suppress(NatsTimeoutError, NoRespondersError):
            msg = await nc.request(f"wechat.svc.{verb}", json.dumps(request).encode(), timeout=15)
            headers = msg.headers or {}
            if "Nats-Service-Error" not in headers:
                return msg
            if headers["Nats-Service-Error-Code"] not in BUSY:
                raise RuntimeError(headers["Nats-Service-Error"])
        await asyncio.sleep(1)


if __name__ == "__main__":
    try:
        asyncio.run(main(*sys.argv[1:]))
    except RuntimeError as error:  # such as: another program reads the sandbox now
        sys.exit(str(error))
