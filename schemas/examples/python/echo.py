"""An agent that answers each message with the same words.

    python echo.py SANDBOX

Bind the sandbox with the option `durable`: what its user wrote then waits in its consumer while nobody runs.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from bus import connect, store
from nats.errors import TimeoutError as NatsTimeoutError
from nats.js.errors import APIError


async def main(sandbox: str) -> None:
    nc = await connect(f"_INBOX_{sandbox}")  # the only inboxes that a sandbox may be permitted
    pulled = await nc.jetstream().pull_subscribe_bind(sandbox, "WECHAT_IN")
    print(f"echo agent of {sandbox}: ready", flush=True)
    while True:
        try:
            (msg,) = await pulled.fetch(1, timeout=30)
        except NatsTimeoutError:
            continue  # nothing was said
        except APIError:
            await asyncio.sleep(1)  # not bound yet
            continue
        said = json.loads(msg.data)
        await store(nc, f"wechat.out.{sandbox}", answer(sandbox, said))
        await msg.ack()  # a crash before this line brings the message again, and the id keeps its answer single
        print(f"answered {said['id']}", flush=True)


def answer(sandbox: str, said: dict[str, Any]) -> dict[str, Any]:
    """The command. Its id follows from what caused it; it names the user, since another may be bound by now."""
    kinds = ", ".join(item["kind"] for item in said["items"])
    text = f"You said: {said['text']}" if said["text"] else f"You sent: {kinds}"
    return {"id": f"{sandbox}.echo.{said['id']}", "user": said["user"], "text": text, "reply_to": said["id"]}


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
