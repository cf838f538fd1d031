"""URLs of media for an agent behind HTTP. Each works for an hour, without other credentials.

A URL is signed over all that it names. The key derives from the webhook's secret, so that a URL outlives the process
that made it.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from types import TracebackType
from typing import Self
from urllib.parse import urlencode

from aiohttp import web

from adapter.agent.sandbox import Sandbox
from adapter.content.media import identify
from adapter.contract.messages import Media
from adapter.errors import AdapterError, Refused, SettingsError
from adapter.settings import split_addr

LIFE_S = 3600
"""Seconds that a URL works."""
ANYWHERE = ("", "0.0.0.0", "::")
LATER = {"retry-after": "10"}
SIGNED = ("object", "sequence", "expires")


class MediaUrls:
    """Serves media of the sandboxes that are added to `sandboxes`, while entered. Entering raises SettingsError."""

    def __init__(self, secret: bytes, addr: str, base: str = "") -> None:
        """`addr`: host:port to listen at; port 0: a free one. `base`: the URL of that for the agent; "": the address
        itself. Raises SettingsError."""
        self.sandboxes: dict[str, Sandbox] = {}
        """By name."""
        self._key = hmac.digest(secret, b"wechat-nats media", hashlib.sha256)
        self._base = base.rstrip("/")
        try:
            self._host, self._port = split_addr(addr)
        except ValueError as exc:
            raise SettingsError("invalid_settings", f"--files-addr: {exc}.") from None
        if self._host in ANYWHERE and not base:
            raise SettingsError("invalid_settings", f"Give --files-url, the agent's way to {addr}.")

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_get("/{any:.*}", self._answer)  # a proxy may add a path or take one away
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, self._port)
        try:
            await site.start()
        except OSError as exc:
            await self._runner.cleanup()
            raise SettingsError("invalid_settings", f"--files-addr: {exc.strerror}.") from None
        host = f"[{self._host}]" if ":" in self._host else self._host
        self._base = self._base or f"http://{host}:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._runner.cleanup()

    def url_of(self, media: Media, sequence: int) -> str:
        """The URL of an object that the message with this sequence names."""
        named = (media.object, str(sequence), str(int(time.time()) + LIFE_S))
        return f"{self._base}/?{urlencode([*zip(SIGNED, named, strict=True), ('signature', self._sign(named))])}"

    def _sign(self, named: tuple[str, ...]) -> str:
        return hmac.new(self._key, "\n".join(named).encode(errors="replace"), hashlib.sha256).hexdigest()

    async def _answer(self, request: web.Request) -> web.Response:
        named = tuple(request.query.get(field, "") for field in SIGNED)
        if not hmac.compare_digest(self._sign(named).encode(), request.query.get("signature", "").encode()):
            raise web.HTTPForbidden(text="The signature is wrong.")
        name, sequence, expires = named[0], int(named[1]), int(named[2])
        if expires < time.time():
            raise web.HTTPGone(text="The URL has expired.")
        try:
            data = await self.sandboxes[name.partition("/")[0]].read_media(name, sequence)
        except KeyError:
            raise web.HTTPServiceUnavailable(text="The sandbox is not open yet.", headers=LATER) from None
        except Refused as exc:
            raise web.HTTPNotFound(text=exc.detail) from None
        except AdapterError as exc:
            raise web.HTTPServiceUnavailable(text=exc.detail, headers=LATER) from None
        return web.Response(
            body=data, content_type=identify(data).mime, headers={"x-content-type-options": "nosniff"}
        )
