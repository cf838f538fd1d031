"""An agent behind HTTP: each message is a POST, signed like Standard Webhooks, and the response is the answer.

A request is repeated with the same `webhook-id` after a failed connection, a timeout, 429 and 5xx. Media of the
message are part of it, as far as they fit.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import time
from typing import Annotated

import httpx
import msgspec
from msgspec.structs import replace

from adapter.agent.runner import Answer, Turn, until_answered
from adapter.agent.sandbox import Sandbox
from adapter.contract.messages import OutItem, OutText, TextItem
from adapter.errors import UNDECODABLE, Refused, SettingsError, Temporary
from adapter.tools.media_types import identify

CHECK_S = 5.0
SECRET_PREFIX = "whsec_"
ITEMS_BYTES = 32 * 1024 * 1024
"""Largest JSON response: its items may have data as base64."""
INLINE_BYTES = 10 * 1024 * 1024
"""Most bytes of the media in a request, before base64."""
WITH_MEDIA = 16
"""Most requests with media at the same time, each of which takes memory; others wait."""
JSON = "application/json"


class WebhookReply(msgspec.Struct):
    """A JSON response."""

    reply: str = ""
    items: Annotated[list[OutItem], msgspec.Meta(max_length=10)] = []


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
        """`max_output`: most bytes of the text of a response."""
        self._http = http
        self._with_media = asyncio.Semaphore(WITH_MEDIA)
        self._url = url
        self._key = key
        self._timeout_s = timeout_s
        self._max_output = max_output

    async def check(self) -> None:
        """Raises Temporary if nothing answers at the URL. Any answer will do."""
        try:
            async with asyncio.timeout(CHECK_S):
                await self._http.head(self._url)
        except (httpx.TransportError, TimeoutError) as exc:
            url = httpx.URL(self._url)
            where = f"{url.scheme}://{url.netloc.decode()}{url.path}"  # without what may be secret in it
            raise Temporary("unreachable", f"No answer at {where}: {str(exc) or 'timeout'}.") from exc

    async def __call__(self, turn: Turn) -> Answer:
        answer = await until_answered(turn, lambda: self._ask(turn))
        return Answer(answer.text, tuple([await _stored(turn.message.sandbox, item) for item in answer.items]))

    async def _ask(self, turn: Turn) -> Answer:
        if all(isinstance(item, TextItem) for item in turn.message.inbound.items):
            return await self._post(turn, await _event(turn))
        async with self._with_media:  # fetched for each try: kept for an hour, they would take memory
            return await self._post(turn, await _event(turn))

    async def _post(self, turn: Turn, body: bytes) -> Answer:
        timestamp, message_id = int(time.time()), turn.message.id
        headers = {
            "content-type": JSON,
            "accept-encoding": "identity",
            "webhook-id": message_id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": sign(self._key, message_id, timestamp, body),
        }
        try:
            async with asyncio.timeout(self._timeout_s):
                async with self._http.stream("POST", self._url, content=body, headers=headers) as response:
                    check_status(response)
                    return await self._read_answer(response)
        except (httpx.TransportError, TimeoutError) as exc:
            raise Temporary("unreachable", type(exc).__name__) from exc

    async def _read_answer(self, response: httpx.Response) -> Answer:
        if response.headers.get("content-type", "").partition(";")[0].strip() != JSON:
            return Answer((await read_body(response, self._max_output)).decode(errors="replace"))
        body = await read_body(response, ITEMS_BYTES)
        try:
            answer = msgspec.json.decode(body or b"{}", type=WebhookReply)
        except UNDECODABLE:
            detail = 'The response is no JSON such as {"reply": "…", "items": […]}, with ten items at most.'
            raise Refused("response", detail) from None
        if len(answer.reply.encode(errors="replace")) > self._max_output:
            raise Refused("too_large", f"The reply has more than {self._max_output} bytes.")
        return Answer(answer.reply, tuple(answer.items))


async def _event(turn: Turn) -> bytes:
    """The message. An item whose media fit has their bytes (`data`), of a recording those of its WAV if there is one,
    and their MIME type."""
    data = msgspec.to_builtins(turn.message.inbound)
    shown = iter([item for item in data.get("items", ()) if item["kind"] != "text"])
    async for file in turn.message.media(INLINE_BYTES):
        item = next(shown)
        if file.data:
            item |= {"data": base64.b64encode(file.data).decode(), "mime": identify(file.data).mime}
    event = {"type": "wechat.message", "session": turn.session, "position": turn.message.position, "data": data}
    return msgspec.json.encode(event)


async def _stored(sandbox: Sandbox, item: OutItem) -> OutItem:
    """The item, its data in the store: a command has little room. Raises Refused, Temporary."""
    if isinstance(item, OutText) or item.data is None:
        return item
    return replace(item, data=None, media=await sandbox.put_media(item.data, item.name))


async def read_body(response: httpx.Response, most: int) -> bytes:
    """Raises Refused above `most` bytes, and if the body is compressed."""
    if response.headers.get("content-encoding", "identity") != "identity":  # 2 kB may unpack to 2 GB at once
        raise Refused("response", "The response is compressed, although the request says Accept-Encoding: identity.")
    body = bytearray()
    async for block in response.aiter_raw():
        body += block
        if len(body) > most:
            raise Refused("too_large", f"The response has more than {most} bytes.")
    return bytes(body)


def check_status(response: httpx.Response, code: str = "") -> None:
    """`code`: what else the server says of it. Raises Temporary, Refused."""
    status, said = response.status_code, f"HTTP {response.status_code} {code}".rstrip()
    if status == 429 or status >= 500:
        after = response.headers.get("retry-after", "")
        wait_s = float(after) if after.isascii() and after.isdigit() else None
        raise Temporary("status", said, retry_after_s=wait_s)
    if not response.is_success:
        raise Refused("status", said)
