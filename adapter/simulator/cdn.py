"""The CDN over HTTP: `/c2c/upload` and `/c2c/download`, with the faults `F24` (uploads) and `F25` (downloads).

The faults `F4` to `F6` strike downloads, and `F5` and `F6` strike uploads.
"""

import asyncio

from aiohttp import web

from adapter.simulator import answers
from adapter.simulator.aes import encrypt
from adapter.simulator.faults import FaultRule
from adapter.simulator.media import Blob, MediaStore, look_inside
from adapter.simulator.world import World

PIECE = 256 * 1024


class CdnServer:
    """The CDN requires no iLink headers. A token in a request is noted as a violation."""

    def __init__(self, world: World, media: MediaStore) -> None:
        self._world = world
        self._media = media

    async def handle(self, request: web.Request) -> web.StreamResponse:
        action = request.match_info["action"].strip("/")
        param = self._param(request, action)
        if "Authorization" in request.headers:
            self._world.violate("token_on_cdn", f"cdn/{action}", None)
        if action == "upload" and request.method == "POST":
            return await self._upload(request, param)
        if action == "download" and request.method == "GET":
            return await self._download(request, param)
        return web.Response(status=404)

    def _param(self, request: web.Request, action: str) -> str:
        """The parameter in the URL. An unquoted plus reads as a space, which no parameter contains."""
        param = request.query.get("encrypted_query_param", "")
        if " " in param:
            self._world.violate("unquoted_param", f"cdn/{action}", None)
        return param.replace(" ", "+")

    async def _upload(self, request: web.Request, param: str) -> web.StreamResponse:
        upload = self._media.uploads.get(param)
        data = await request.read()
        if upload is None or request.query.get("filekey") != upload.filekey:
            return failure(400, "invalid encrypted_param")
        bot = self._world.bots[upload.bot]
        if rule := self._world.faults.strike("F24", "cdn/upload", bot.id, upload.user):
            return broken_upload(request, rule)
        if request.content_type != "application/octet-stream":
            self._world.violate("wrong_content_type", "cdn/upload", bot)
        if len(data) != upload.encrypted_size:
            return failure(400, "file size mismatch")
        limit = self._world.settings_of(bot).param_upload_limit
        if limit and len(data) > limit and "taskid" not in request.query:
            return web.Response(status=500)
        faults = self._world.faults
        if rule := faults.strike("F5", "cdn/upload", bot.id, upload.user):
            await answers.stay_silent(rule, self._world.clock)
        reset = faults.strike("F6", "cdn/upload", bot.id, upload.user)
        if reset is None or reset.params.get("when") == "after":
            plain = await asyncio.to_thread(look_inside, data, upload.key)
            reference = self._media.receive(upload, data, plain)
        if reset is not None:
            answers.reset_connection(request)
            return web.Response()
        return web.Response(headers={"x-encrypted-param": reference})

    async def _download(self, request: web.Request, param: str) -> web.StreamResponse:
        blob = self._media.blobs.get(param)
        if blob is None or not self._is_served(blob):
            return web.Response(status=400, text="invalid encrypted_param")
        if rule := self._strike_download("F25", blob):
            return broken_download(blob, rule)
        answer = answers.HttpAnswer(body=blob.data, content_type="application/octet-stream")
        if rule := self._strike_download("F4", blob):
            return await answers.dribble(request, answer, rule, self._world.clock)
        if rule := self._strike_download("F5", blob):
            await answers.stay_silent(rule, self._world.clock)
        if self._strike_download("F6", blob):
            answers.reset_connection(request)
            return web.Response()
        return await stream(request, blob.data)

    def _is_served(self, blob: Blob) -> bool:
        """Whether the bot may download `blob`: a setting can refuse a bot its own uploads."""
        settings = self._world.settings_of(self._world.bots[blob.bot])
        return blob.downloadable or settings.own_download == "served"

    def _strike_download(self, fault: str, blob: Blob) -> FaultRule | None:
        """The rule by which `fault` strikes this download, or None."""
        return self._world.faults.strike(fault, "cdn/download", blob.bot, self._world.bots[blob.bot].user)


async def stream(request: web.Request, data: bytes) -> web.StreamResponse:
    """Writes in pieces, so that 100 MB do not delay other requests."""
    response = web.StreamResponse()
    response.content_type = "application/octet-stream"
    response.content_length = len(data)
    await response.prepare(request)
    view = memoryview(data)
    for start in range(0, len(data), PIECE):
        await response.write(view[start : start + PIECE])
    await response.write_eof()
    return response


def failure(status: int, message: str, code: int | None = None) -> web.Response:
    headers = {"x-error-message": message}
    if code is not None:
        headers["x-error-code"] = str(code)
    return web.Response(status=status, headers=headers)


def broken_upload(request: web.Request, rule: FaultRule) -> web.Response:
    """The answer of fault `F24`, by `kind`: `rejected`, `error`, `no_header`, `down`."""
    kind = rule.params.get("kind", "error")
    if kind == "rejected":
        message = str(rule.params.get("message", "illegal content"))
        return failure(int(rule.params.get("status", 400)), message, rule.params.get("code", -5102031))
    if kind == "down":
        answers.reset_connection(request)
    status = 200 if kind in ("no_header", "down") else int(rule.params.get("status", 500))
    return web.Response(status=status)


def broken_download(blob: Blob, rule: FaultRule) -> web.Response:
    """The answer of fault `F25`, by `kind`: `status`, `wrong_key`, `odd_length`."""
    kind = rule.params.get("kind", "status")
    if kind == "wrong_key":
        return web.Response(body=encrypt(b"something else", bytes(16)), content_type="application/octet-stream")
    if kind == "odd_length":
        return web.Response(body=blob.data[:-1], content_type="application/octet-stream")
    return web.Response(status=int(rule.params.get("status", 404)))
