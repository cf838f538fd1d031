"""A service that tells a user something and waits until it is known what became of it.

    python send.py SANDBOX TEXT

Each receipt is a line. Exit code 0 only for `accepted`.
"""

from __future__ import annotations

import asyncio
import json
import sys
import uuid

from bus import connect, store


async def main(sandbox: str, text: str) -> int:
    nc = await connect("_INBOX")
    receipts = await nc.subscribe(f"wechat.event.{sandbox}.receipt.>")
    await nc.flush()  # listen before you speak
    command = {"id": f"{sandbox}.send.{uuid.uuid4()}", "sandbox": sandbox, "text": text}
    await store(nc, "wechat.out", command)
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
    if len(sys.argv) != 3:
        sys.exit("usage: send.py SANDBOX TEXT")
    sys.exit(asyncio.run(main(*sys.argv[1:])))
