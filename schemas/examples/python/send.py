"""A service that tells a user something and waits until it is known what became of it.

    python send.py SANDBOX TEXT

Each receipt is a line. Exit code 0 only for `accepted`.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import uuid

import nats
from nats.errors import TimeoutError as NatsTimeoutError
from nats.js.errors import APIError, NoStreamResponseError, ServiceUnavailableError

TOO_MANY_REQUESTS = 10167


async def main(sandbox: str, text: str) -> int:
    nc = await nats.connect(
        os.environ.get("NATS_URL", "nats://127.0.0.1:4222"),
        inbox_prefix=os.environ.get("NATS_INBOX_PREFIX", "_INBOX"),
        max_reconnect_attempts=-1,
    )
    js = nc.jetstream()
    receipts = await nc.subscribe(f"wechat.event.{sandbox}.receipt.*")
    await nc.flush()  # listen before you speak
    command = {"id": f"{sandbox}.send.{uuid.uuid4()}", "sandbox": sandbox, "text": text}
    while True:
        try:
            await js.publish("wechat.out", json.dumps(command).encode(), headers={"Nats-Msg-Id": command["id"]})
            break
        except (NatsTimeoutError, NoStreamResponseError, ServiceUnavailableError):
            await asyncio.sleep(1)  # not confirmed: once more, with the same id
        except APIError as error:
            if error.err_code != TOO_MANY_REQUESTS:
                raise
            await asyncio.sleep(1)  # not stored, since others send more than the stream takes in: the same
    async for msg in receipts.messages:
        receipt = json.loads(msg.data)
        if receipt["command"] != command["id"]:
            continue
        print(receipt["outcome"], receipt.get("reason", ""), *receipt.get("message_ids", []), flush=True)
        if receipt["outcome"] != "parked":  # which is not final: it waits for the user
            await nc.close()
            return 0 if receipt["outcome"] == "accepted" else 1
    return 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main(*sys.argv[1:])))
