"""An agent that answers each message with the same words.

    python echo.py SANDBOX

Bind the sandbox with the option `durable`: what its user wrote then waits in its consumer while nobody runs. Needs
`nats-py`, and NATS_URL where NATS is not on this machine.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

import nats
from nats.errors import TimeoutError as NatsTimeoutError
from nats.js import JetStreamContext
from nats.js.errors import APIError, NoStreamResponseError, ServiceUnavailableError

TOO_MANY_REQUESTS = 10167


async def main(sandbox: str) -> None:
    nc = await nats.connect(
        os.environ.get("NATS_URL", "nats://127.0.0.1:4222"),
        # the only inboxes that a sandbox may be permitted
        inbox_prefix=os.environ.get("NATS_INBOX_PREFIX", f"_INBOX_{sandbox}"),
        max_reconnect_attempts=-1,
    )
    js = nc.jetstream()
    print(f"echo agent of {sandbox}: ready", flush=True)
    # Asks for the next message; within 30 s there is one, or the word that there is none. In plain NATS, since a
    # sandbox need not be permitted anything else of JetStream.
    inbox = nc.new_inbox()
    pulled = await nc.subscribe(inbox)
    ask = json.dumps({"batch": 1, "expires": 30_000_000_000}).encode()
    while True:
        await nc.publish(f"$JS.API.CONSUMER.MSG.NEXT.WECHAT_IN.{sandbox}", ask, reply=inbox)
        try:
            msg = await pulled.next_msg(timeout=35)
        except NatsTimeoutError:
            continue  # NATS was away
        if status := (msg.headers or {}).get("Status"):
            if status == "503":
                await asyncio.sleep(1)  # not bound yet
            continue
        said = json.loads(msg.data)
        await store(js, f"wechat.out.{sandbox}", answer(sandbox, said))
        await msg.ack()  # a crash before this line brings the message again, and the id keeps its answer single
        print(f"answered {said['id']}", flush=True)


def answer(sandbox: str, said: dict[str, Any]) -> dict[str, Any]:
    """The command. Its id follows from what caused it; it names the user, since another may be bound by now."""
    kinds = ", ".join(item["kind"] for item in said["items"])
    text = f"You said: {said['text']}" if said["text"] else f"You sent: {kinds}"
    return {"id": f"{sandbox}.echo.{said['id']}", "user": said["user"], "text": text, "reply_to": said["id"]}


async def store(js: JetStreamContext, subject: str, command: dict[str, Any]) -> None:
    """Publishes until the stream has confirmed. The id makes the repeats one."""
    while True:
        try:
            await js.publish(subject, json.dumps(command).encode(), headers={"Nats-Msg-Id": command["id"]})
            return
        except (NatsTimeoutError, NoStreamResponseError, ServiceUnavailableError):
            await asyncio.sleep(1)
        except APIError as error:
            if error.err_code != TOO_MANY_REQUESTS:
                raise
            await asyncio.sleep(1)  # others send more than the stream takes in


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
