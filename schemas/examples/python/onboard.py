"""A platform that gives a sandbox its WeChat user.

    python onboard.py login SANDBOX        # shows a QR code; digits that the phone shows are typed here
    python onboard.py bind SANDBOX BOT     # a bot that you have; its token is in the environment, as BOT_TOKEN

Exit code 0 once the bot is bound.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import uuid
from typing import Any

from bus import connect, store
from nats.aio.client import Client
from nats.errors import TimeoutError as NatsTimeoutError

OVER = ("confirmed", "already_bound", "expired", "failed", "cancelled", "lost")


async def login(nc: Client, sandbox: str) -> int:
    events = await nc.subscribe(f"wechat.event.{sandbox}.login")
    now = await ask(nc, "login.start", {"sandbox": sandbox})
    code, shown = 0, ""
    while True:
        if now.get("qrcode_text") and now.get("code", 1) != code and now["status"] == "wait":
            code = now.get("code", 1)  # a code lives for a minute or two; a new one has a higher number
            print(now["qrcode_text"], flush=True)  # a secret: who scans it first gets the sandbox
        state = f"{now['status']} {now.get('reason', '')}".strip()
        if state != shown:
            shown = state
            print(f"{state}: {now.get('detail', '')}", flush=True)
        if now["status"] in OVER:
            return 0 if now["status"] in ("confirmed", "already_bound") else 1
        if now["status"] == "need_verify_code" and now.get("reason") != "checking":
            digits = (await asyncio.to_thread(sys.stdin.readline)).strip()
            now = await ask(nc, "login.verify", {"login": now["login"], "code": digits})
            continue
        with contextlib.suppress(NatsTimeoutError):  # an event may get lost; the status does not
            await events.next_msg(timeout=3)
        now = await ask(nc, "login.status", {"login": now["login"]})


async def bind(nc: Client, sandbox: str, bot: str) -> int:
    inbox = nc.new_inbox()
    answers = await nc.subscribe(inbox)
    command = {"id": f"bind.{uuid.uuid4()}", "bot": bot, "bot_token": os.environ["BOT_TOKEN"]}
    await store(nc, f"wechat.bind.{sandbox}", command, {"Reply-To": inbox})
    # the bind is stored, also while no adapter runs; its receipt comes when it is applied
    receipt = json.loads((await answers.next_msg(timeout=60)).data)
    is_bound = receipt["outcome"] == "applied"
    print("bound" if is_bound else receipt.get("detail", ""), flush=True)
    return 0 if is_bound else 1


async def ask(nc: Client, verb: str, request: dict[str, Any]) -> dict[str, Any]:
    """Asks any adapter. Raises RuntimeError with the sentence that it answers instead."""
    msg = await nc.request(f"wechat.svc.{verb}", json.dumps(request).encode(), timeout=20)
    if error := (msg.headers or {}).get("Nats-Service-Error"):
        raise RuntimeError(error)
    answer: dict[str, Any] = json.loads(msg.data)
    return answer


async def main(verb: str, *arguments: str) -> int:
    nc = await connect("_INBOX")
    try:
        return await (bind(nc, *arguments) if verb == "bind" else login(nc, *arguments))
    finally:
        await nc.close()


if __name__ == "__main__":
    if sys.argv[1:2] not in (["login"], ["bind"]) or len(sys.argv) != (3 if sys.argv[1] == "login" else 4):
        sys.exit("usage: onboard.py login SANDBOX | onboard.py bind SANDBOX BOT")
    if sys.argv[1] == "bind" and not os.environ.get("BOT_TOKEN"):
        sys.exit("Set BOT_TOKEN to the bot's token.")
    sys.exit(asyncio.run(main(*sys.argv[1:])))
