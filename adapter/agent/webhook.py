"""An agent behind HTTP: each message is a POST, signed like Standard Webhooks, and the response is the answer.

A request is repeated with the same `webhook-id` after a failed connection, a timeout, 429 and 5xx.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import time

import httpx
import msgspec

from adapter.agent.runner import Answer, Turn, until_answered
from adapter.errors import UNDECODABLE, Refused, SettingsError, Temporary

SECRET_PREFIX = "whsec_"


class WebhookReply(msgspec.Struct):
    """A JSON response."""

    reply: str = ""


def read_secret(text: str) -> bytes:
    """The key of `whsec_<base64>`. Raises SettingsError."""
    try:
        key = base64.b64decode(text.removeprefix(SECRET_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not text.startswith(SECRET_PREFIX) or len(key) < 24:
        raise SettingsError(
            "invalid_settings",
            'The secret is whsec_ and base64 of 24 bytes or more: echo "whsec_$(openssl rand -base64 32)".',
        )
    return key


def sign(key: bytes, message_id: str, timestamp: int, body: bytes) -> str:
    """The header `webhook-signature`."""
    signed = f"{message_id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()


class Webhook:
    """Asks a URL for each answer. A call raises Refused for a response that a repeat would not change, and Temporary
    after GIVE_UP_S of repeats."""

    def __init__(self, http: httpx.AsyncClient, url: str, key: bytes, *, timeout_s: float, max_output: int) -> None:
        """`max_output`: most bytes of a response."""
        self._http = http
        self._url = url
        self._key = key
        self._timeout_s = timeout_s
        self._max_output = max_output

    async def __call__(self, turn: Turn) -> Answer:
        message = turn.message
        event = {
            "type": "wechat.message",
            "session": turn.session,
            "sequence": message.sequence,
            "data": message.inbound,
        }
        body = msgspec.json.encode(event)
        return await until_answered(lambda: self._post(message.id, body))

    async def _post(self, message_id: str, body: bytes) -> Answer:
        timestamp = int(time.time())
        headers = {
            "content-type": "application/json",
            "accept-encoding": "identity",
            "webhook-id": message_id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": sign(self._key, message_id, timestamp, body),
        }
        try:
            async with asyncio.timeout(self._timeout_s):
                async with self._http.stream("POST", self._url, content=body, headers=headers) as response:
                    _check_status(response)
                    return Answer(_read_answer(response, await self._read_body(response)))
        except (httpx.TransportError, TimeoutError) as exc:
            raise Temporary("unreachable", type(exc).__name__) from exc

    async def _read_body(self, response: httpx.Response) -> bytes:
        if response.headers.get("content-encoding", "identity") != "identity":  # 2 kB may unpack to 2 GB at once
            raise Refused(
                "response", "The response is compressed, although the request says Accept-Encoding: identity."
            )
        body = b""
        async for block in response.aiter_raw():
            body += block
            if len(body) > self._max_output:
                raise Refused("too_large", f"The response has more than {self._max_output} bytes.")
        return body


def _read_answer(response: httpx.Response, body: bytes) -> str:
    if response.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        return body.decode(errors="replace")
    try:
        return msgspec.json.decode(body or b"{}", type=WebhookReply).reply
    except UNDECODABLE:
        raise Refused("response", 'The response is no JSON such as {"reply": "…"}.') from None


def _check_status(response: httpx.Response) -> None:
    """Raises Temporary, Refused."""
    status = response.status_code
    if status == 429 or status >= 500:
        after = response.headers.get("retry-after", "")
        wait_s = float(after) if after.isascii() and after.isdigit() else None
        raise Temporary("status", f"HTTP {status}", retry_after_s=wait_s)
    if not response.is_success:
        raise Refused("status", f"HTTP {status}")
