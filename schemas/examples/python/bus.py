"""What the programs share: a connection as the NATS tools make it, and a request until a command is stored."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import ssl
from typing import Any

import nats
from nats.aio.client import Client
from nats.errors import NoRespondersError
from nats.errors import TimeoutError as NatsTimeoutError

TOO_MANY_REQUESTS = 10167


async def connect(inbox_prefix: str) -> Client:
    """Connects to NATS_URL, as README.md says; answers come back below NATS_INBOX_PREFIX, else `inbox_prefix`."""
    env = os.environ.get
    options: dict[str, Any] = {
        "user_credentials": env("NATS_CREDS"),
        "nkeys_seed": env("NATS_NKEY"),
        "user": env("NATS_USER"),
        "password": env("NATS_PASSWORD"),
        "token": env("NATS_TOKEN"),
    }
    if env("NATS_CA") or env("NATS_CERT"):
        options["tls"] = context = ssl.create_default_context(cafile=env("NATS_CA"))
        if cert := env("NATS_CERT"):
            context.load_cert_chain(cert, env("NATS_KEY"))
    return await nats.connect(
        env("NATS_URL", "nats://127.0.0.1:4222").split(","),
        inbox_prefix=env("NATS_INBOX_PREFIX", inbox_prefix),
        max_reconnect_attempts=-1,
        **{option: value for option, value in options.items() if value},
    )


async def store(nc: Client, subject: str, command: dict[str, Any], headers: dict[str, str] | None = None) -> None:
    """Requests until the stream has confirmed that it has the command. The id makes the repeats one."""
    while True:
        with contextlib.suppress(NatsTimeoutError, NoRespondersError):
            msg = await nc.request(subject, json.dumps(command).encode(), timeout=5, headers=headers)
            error = json.loads(msg.data).get("error")
            if error is None:
                return
            if error["code"] != 503 and error.get("err_code") != TOO_MANY_REQUESTS:
                raise RuntimeError(error["description"])
        await asyncio.sleep(1)  # no stream now, or others send more than it takes in
